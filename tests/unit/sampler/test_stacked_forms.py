"""The three forms of a mixed forward, products with a row's own entries, masked factors and each row's own factors, say what
separate passes say: unequal ranks, rows without an adapter, adapters on other layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapter_pool import PackedAdapter
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, use_adapter, wrap
from rlhf_ray.sampler import factor_pages, stacked_lora
from rlhf_ray.sampler.factor_pages import FactorPages
from rlhf_ray.sampler.stacked_lora import Stacks

SHAPES = (("p", 4, "all-linear"), ("q", 2, ("q_proj", "v_proj")), ("s", 8, ("down_proj",)), ("t", 20, "all-linear"))
FORMS = (stacked_lora._OwnEntries, stacked_lora._SharedFactors, stacked_lora._RowFactors)


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


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_equal_separate_passes(model: Any, monkeypatch: pytest.MonkeyPatch, form: type) -> None:
    monkeypatch.setattr(stacked_lora, "form_of", lambda *args: form)
    together = assert_as_apart(model, Stacks(model), ["t", None, "p", "q", "s", "p", None])
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_come_and_go_leave_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch, form: type) -> None:
    """What is kept between batches: a row's factors, the stacks of adapters that left."""
    monkeypatch.setattr(stacked_lora, "form_of", lambda *args: form)
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
    """Own entries on a CPU, from three adapters on; on a GPU ranks are compared with widths, of all layers together."""
    stacks = Stacks(many(make_llama, [8] * 24))
    own, shared, by_row = FORMS

    def form(count: int, to: torch.dtype | torch.device) -> type:
        packed = [stacks._get(f"p{i}").to(to) for i in range(count)]
        return stacked_lora.form_of(stacks.groups, packed, packed)

    cpu, gpu = torch.float32, torch.device("meta")  # which is no CPU either
    assert [form(count, cpu) for count in (1, 2, 3, 24)] == [shared, shared, own, own]
    assert [form(count, gpu) for count in (1, 2, 24)] == [shared, shared, by_row]
    assert form(24, torch.bfloat16) is by_row


def test_a_row_is_multiplied_with_its_own_entries_alone(make_llama: Callable[..., nn.Module]) -> None:
    """Rows of rank 4 were multiplied with the factors of all adapters of the batch, or had some of the largest rank."""
    ranks = (3, 8, 16, 32, 64)
    stacks = Stacks(many(make_llama, ranks))
    delta: Any = stacks.forward([None, "p4", *(f"p{i}" for i in range(5))]).hooks[0][1]  # type: ignore[attr-defined]
    entries, starts, wanted = delta._rows.of(2)
    assert starts.diff().tolist() == [0, 0, 64, 64, 3, 3, 8, 8, 16, 16, 32, 32, 64, 64]
    assert len(wanted.values()) == len(entries) == 2 * (64 + sum(ranks))
    assert entries[:64].tolist() == entries[-64:].tolist(), "two rows of one adapter share its factors"


def test_a_broken_adapter_stays_with_its_own_rows(model: Any) -> None:
    """An infinite factor of one adapter was multiplied by 0 for all other rows of the batch, which gave them nan."""
    for key, parameter in adapter_parameters(model, "t").items():
        if "lora_A" in key:
            parameter.data[0, 0] = torch.inf
    together = Stacks(model).forward(["p", "t", "q"])(input_ids=torch.full((3, 4), 5)).logits
    assert together[0].isfinite().all() and together[2].isfinite().all() and not together[1].isfinite().all()


def test_the_bits_of_a_row_are_those_of_its_own_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else is in the batch, and wherever its factors lie: sums over a row's own entries, in the order of its rank. The base
    is left out, whose products may depend on the number of rows."""
    monkeypatch.setattr(stacked_lora, "form_of", lambda *args: FORMS[0])
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x, y = torch.randn(5, 3, layer.in_features), torch.randn(5, 3, layer.out_features)

    def delta(stacks: Stacks, rows: Sequence[str | None]) -> torch.Tensor:
        hooks = {id(module): hook for module, hook in stacks.forward(rows).hooks}  # type: ignore[attr-defined]
        return hooks[id(layer)](3, layer, (x[: len(rows)],), y[: len(rows)])  # type: ignore[no-any-return]

    alone, used = Stacks(model), Stacks(model)
    expected = delta(alone, ["t", "p"])
    for rows in (["q", "s", "p", "t"], ["s", None, "q"], ["p", "p", "q", "s"]):
        delta(used, rows)
    assert torch.equal(delta(used, ["t", "p", "q", "s", None])[:2], expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_there_is_not_copied_again(model: Any, monkeypatch: pytest.MonkeyPatch, form: type) -> None:
    """A row that moved within the batch was copied, and reading the prompts of two rows threw away what all others had."""
    filled: list[int] = []
    fill = FactorPages._fill
    monkeypatch.setattr(stacked_lora, "form_of", lambda *args: form)

    def counting(self: Any, adapter: Any, pages: Any) -> None:
        filled.append(adapter.r)
        fill(self, adapter, pages)

    monkeypatch.setattr(FactorPages, "_fill", counting)
    stacks = Stacks(model)
    own, _, by_row = FORMS
    stacks.forward(["p", "q", "s", "t"], "rows")
    stacks.forward(["q", "p"], "prompts")
    assert sorted(filled) == ([2, 4, 8, 20] if form is own else [2, 2, 4, 4, 8, 20])
    filled.clear()
    stacks.forward(["t", "s", "q", "p"], "rows")
    stacks.forward(["p", "q"], "prompts")
    assert not filled
    stacks.forward(["t", "s", "p", "p"], "rows")
    assert filled == ([4] if form is by_row else [])


def pages_of(stacks: Stacks, ranks: Sequence[int], **kwargs: Any) -> tuple[FactorPages, dict[str, PackedAdapter]]:
    adapters = {f"p{i}": stacks._get(f"p{i}") for i in range(len(ranks))}
    return FactorPages(stacks.groups, adapters.__getitem__, 4, **kwargs), adapters


def test_a_batch_that_grows_keeps_its_place(
    make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers for one more row were zeroed and filled anew with all rows: 60 ms of a step with 13 rows."""
    ranks = [8] * 40
    stacks = Stacks(many(make_llama, ranks))
    pages, _ = pages_of(stacks, ranks, unused_are_read=False)
    first = pages.of([("p0", 0)])
    buffers = pages.buffers
    for count in range(2, 41):
        assert pages.of([(f"p{i}", 0) for i in range(count)])["p0", 0] == first["p0", 0]
    assert pages.buffers is buffers
    monkeypatch.setattr(factor_pages, "RESERVED", 0)
    few, _ = pages_of(stacks, ranks, unused_are_read=False)
    own = few.of([("p0", 0)])["p0", 0]
    kept, there = few.buffers, slice(4 * own[0], 4 * own[-1] + 4)
    placed = kept[0][0][:, there].clone()
    everything = few.of([(f"p{i}", 0) for i in range(40)])
    assert few.buffers is not kept and len({page for own in everything.values() for page in own}) == 80
    assert placed.isfinite().all()
    assert torch.equal(kept[0][0][:, there], placed), "whoever still uses the buffers before finds them as they were"


def test_buffers_shrink_when_they_are_not_needed_for_long(
    make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They shrank for one small batch between two large ones, and grew again for the next."""
    ranks = [8] * 40
    stacks = Stacks(many(make_llama, ranks))
    monkeypatch.setattr(factor_pages, "SMALL", 0)
    pages, _ = pages_of(stacks, ranks)
    large, small = [(f"p{i}", 0) for i in range(40)], [("p0", 0)]
    pages.of(large)
    buffers = pages.buffers
    for _ in range(3):
        for _ in range(factor_pages.PATIENCE):
            pages.of(small)
        pages.of(large)
    assert pages.buffers is buffers
    for _ in range(factor_pages.PATIENCE + 1):
        pages.of(small)
    assert pages.buffers[0][0].numel() < buffers[0][0].numel() / 8


def test_factors_that_others_use_stay_where_they_are(make_llama: Callable[..., nn.Module]) -> None:
    """Prompts are read between the steps of rows whose factors lie in the same buffers."""
    ranks = [8] * 5
    pages, _ = pages_of(Stacks(many(make_llama, ranks)), ranks, unused_are_read=False)
    rows = pages.of([("p0", 0), ("p1", 0)])
    prompts = pages.of([("p2", 0), ("p1", 0)], others=rows)
    assert prompts["p1", 0] == rows["p1", 0] and not {*prompts["p2", 0]} & {*rows["p0", 0]}
    assert pages.of([("p3", 0)])["p3", 0] == rows["p0", 0], "of nobody any more"
