"""The two forms of a mixed forward, masked factors and each row's own, say what separate passes say: unequal ranks, rows without
an adapter, adapters on other layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, use_adapter, wrap
from rlhf_ray.sampler import stacked_lora
from rlhf_ray.sampler.stacked_lora import Stacks

SHAPES = (("p", 4, "all-linear"), ("q", 2, ("q_proj", "v_proj")), ("s", 8, ("down_proj",)), ("t", 20, "all-linear"))


@pytest.fixture
def model(make_llama: Callable[..., nn.Module]) -> Any:
    found = wrap(make_llama(), LoraConfig(r=4, lora_alpha=8.0), "p", seed=0)
    for number, (name, r, targets) in enumerate(SHAPES[1:], start=1):
        add_fresh(found, name, LoraConfig(r=r, lora_alpha=3.0 * r, target_modules=targets), seed=number)
    for number, (name, _, _) in enumerate(SHAPES):
        draw = torch.Generator().manual_seed(number)
        for key, parameter in adapter_parameters(found, name).items():
            if "lora_B" in key:
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return found.eval()


def assert_as_apart(model: Any, stacks: Stacks, rows: Sequence[str | None]) -> torch.Tensor:
    ids = torch.randint(3, 97, (len(rows), 5), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        together = stacks.forward(rows)(input_ids=ids).logits
        for row, name in enumerate(rows):
            with use_adapter(model, name):
                apart = model(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], apart, atol=2e-4, rtol=1e-4)
    return together


@pytest.mark.parametrize("by_row", [False, True])
def test_both_forms_equal_separate_passes(model: Any, monkeypatch: pytest.MonkeyPatch, by_row: bool) -> None:
    monkeypatch.setattr(stacked_lora, "_prefers_rows", lambda *args: by_row)
    together = assert_as_apart(model, Stacks(model), ["t", None, "p", "q", "s", "p", None])
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("by_row", [False, True])
def test_rows_that_come_and_go_leave_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch, by_row: bool) -> None:
    """What is kept between batches: a row's factors, the stacks of adapters that left."""
    monkeypatch.setattr(stacked_lora, "_prefers_rows", lambda *args: by_row)
    stacks = Stacks(model)
    for rows in (
        ["q", "p", None],
        ["q", None, "t"],
        ["t", "p", "s", "q", None],  # more rows, and a larger rank
        ["q", "q", "q", "q", "q"],  # a smaller rank where a larger one was
        [None, "p"],
        ["s", "t", "p", "q", None, None, "t"],
        ["t", "q", "p", None],  # other places
    ):
        assert_as_apart(model, stacks, rows)


def many(make_llama: Callable[..., nn.Module], ranks: Sequence[int]) -> Any:
    model = wrap(make_llama(), LoraConfig(r=ranks[0], lora_alpha=8.0), "p0", seed=0)
    for number, r in enumerate(ranks[1:], start=1):
        add_fresh(model, f"p{number}", LoraConfig(r=r, lora_alpha=8.0), seed=number)
    return model


def test_the_form_is_chosen_by_what_it_costs(make_llama: Callable[..., nn.Module]) -> None:
    """Sixteen rows of sixteen ranks got factors of the largest rank each, at twice the time of one stack for all."""
    stacks = Stacks(many(make_llama, [8] * 24))

    def form(rows: int, tokens: int = 1) -> type:
        return type(stacks.forward([f"p{row}" for row in range(rows)], tokens=tokens).hooks[0][1])  # type: ignore[attr-defined]

    shared, by_row = stacked_lora._Delta, stacked_lora._RowDelta
    assert [form(2), form(12), form(24)] == [shared, shared, by_row]
    assert [form(2, 16), form(12, 16)] == [shared, by_row], "products of matrices in either form"


def test_a_row_costs_what_its_rank_costs(make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row had factors of the largest rank."""
    monkeypatch.setattr(stacked_lora, "_prefers_rows", lambda *args: True)
    ranks = (4, 8, 16, 32, 64)
    stacks = Stacks(many(make_llama, ranks))
    delta: Any = stacks.forward([None, *(f"p{i}" for i in range(5))]).hooks[0][1]  # type: ignore[attr-defined]
    assert delta._down.shape[0] == 1 + 1 + 2 + 4 + 8 and delta._row_of.bincount().tolist() == [0, 1, 1, 2, 4, 8]


@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_there_is_not_copied_again(model: Any, monkeypatch: pytest.MonkeyPatch, by_row: bool) -> None:
    """A row that moved within the batch was copied, and reading the prompts of two rows threw away what all others had."""
    filled: list[int] = []
    fill = stacked_lora._Pages._fill
    monkeypatch.setattr(stacked_lora, "_prefers_rows", lambda *args: by_row)

    def counting(self: Any, adapter: Any, pages: Any) -> None:
        filled.append(adapter.r)
        fill(self, adapter, pages)

    monkeypatch.setattr(stacked_lora._Pages, "_fill", counting)
    stacks = Stacks(model)
    stacks.forward(["p", "q", "s", "t"], "rows")
    stacks.forward(["q", "p"], "prompts")
    assert sorted(filled) == [2, 2, 4, 4, 8, 20]
    filled.clear()
    stacks.forward(["t", "s", "q", "p"], "rows")
    stacks.forward(["p", "q"], "prompts")
    assert not filled
    stacks.forward(["t", "s", "p", "p"], "rows")
    assert filled == ([4] if by_row else [])
