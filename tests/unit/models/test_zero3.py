"""How ZeRO-3's shares are cut. The real ones are in tests/integration/zero; here is the arithmetic."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rlhf_ray.models.zero3 import gathered, is_sharded, own_share, whole_numel, whole_shape


@given(numel=st.integers(1, 50), world_size=st.integers(1, 7))
def test_shares_are_equal_and_together_the_whole(numel: int, world_size: int) -> None:
    width = -(-numel // world_size)
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.empty(width)  # type: ignore[attr-defined]
    value = torch.arange(1.0, numel + 1)
    shares = [own_share(parameter, value, rank) for rank in range(world_size)]
    assert {len(share) for share in shares} == {width}
    together = torch.cat(shares)
    assert torch.equal(together[:numel], value) and not together[numel:].any()


def test_parameters_that_are_not_cut_are_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    assert (is_sharded(parameter), whole_shape(parameter), whole_numel(parameter)) == (False, (2, 3), 6)
    with gathered([parameter], change=True), torch.no_grad():
        parameter.mul_(2)
    assert parameter.sum() == 12
