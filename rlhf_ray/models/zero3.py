"""Parameters that DeepSpeed's ZeRO-3 has cut into one share per rank.

Outside the forward pass of its own module such a parameter is an empty tensor, so whoever reads or writes weights asks here. On
parameters that are not cut everything below is a plain attribute or does nothing, and DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Sequences

MaxOverRanks = Callable[[int], int]
"""The largest of all ranks' numbers. Under ZeRO-3 every call of a module is a collective, so ranks must make equally many: each
states how many it needs, and all make as many as the one that needs most."""


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape, whatever part of it is here."""
    whole: Any = parameter
    return tuple(whole.ds_shape) if is_sharded(parameter) else tuple(parameter.shape)


def whole_numel(parameter: Tensor) -> int:
    whole: Any = parameter
    return int(whole.ds_numel) if is_sharded(parameter) else parameter.numel()


@contextmanager
def gathered(parameters: Iterable[Tensor], change: bool = False) -> Iterator[None]:
    """Inside the block every rank has the parameters whole. A collective if any of them is sharded.

    change: the block writes them, the same values on every rank; without it, writes are lost."""
    given = list(parameters)
    if not any(map(is_sharded, given)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(given, modifier_rank=0 if change else None):
        yield


def own_share(parameter: Tensor, value: Tensor, rank: int) -> Tensor:
    """This rank's part of `value`, flat, as ZeRO-3 cuts `parameter`: equal parts, the last one filled up with zeros.

    DeepSpeed's own setters of whole tensors (safe_set_full_*) fail where the parts are not equal (measured, 0.19)."""
    sharded: Any = parameter
    width = sharded.ds_tensor.numel()
    flat = value.reshape(-1)
    part = flat[rank * width : (rank + 1) * width]
    return torch.cat([part, part.new_zeros(width - part.numel())])


def padding_batch(device: torch.device) -> Sequences:
    """One row of one prompt token and one reply token, to take part in a pass that only other ranks need."""
    token, real = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    return Sequences(token.to(device), real.to(device), real[:, :1].to(device), 2)
