"""The batch types: wrong shapes, dtypes and masks fail where a batch is made; rows, widths and order are kept by every move."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.batches import Experience, PromptBatch, Rollout, Scores, Sequences

PAD, EOS = 0, 2


def picture() -> Rollout:
    """The filled example of the module's docstring."""
    return Rollout(
        tokens=torch.tensor([[0, 11, 12, 21, 22, 2, 0], [13, 14, 15, 23, 24, 25, 26]]),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        response_mask=torch.tensor([[True, True, True, False], [True, True, True, True]]),
        sample_logprobs=torch.tensor([[-1.0, -2.0, -3.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]),
        finished=torch.tensor([True, False]),
        row_id=torch.tensor([0, 1]),
        adapter_version=3,
        adapter_sha256="abc",
    )


def prompts() -> PromptBatch:
    r = picture()
    return PromptBatch(r.tokens[:, :3], r.prompt_mask, r.row_id, torch.tensor([4, 4]))


def scores() -> Scores:
    reward = torch.tensor([0.5, -1.0])
    return Scores(reward, torch.zeros(2, 4), torch.tensor([0, 1]), {"a": reward, "b": -reward})


def experience() -> Experience:
    r = picture()
    return Experience(r.tokens, r.prompt_mask, r.response_mask, *[r.sample_logprobs] * 5)


@st.composite
def rollouts(draw: st.DrawFn, pad: int = PAD) -> Rollout:
    """Random prompts and replies, padded to random widths; token ids are never the pad, log-probabilities never 0."""
    rows = draw(st.integers(1, 6))
    prompt_lengths = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    reply_lengths = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    p = max(prompt_lengths) + draw(st.integers(0, 2))
    r = max(reply_lengths) + draw(st.integers(0, 2))
    ids = draw(st.permutations(range(100)))[:rows]
    tokens = torch.full((rows, p + r), pad)
    prompt_mask, response_mask = torch.zeros(rows, p, dtype=torch.bool), torch.zeros(rows, r, dtype=torch.bool)
    for row, (n, m) in enumerate(zip(prompt_lengths, reply_lengths, strict=True)):
        prompt_mask[row, p - n :] = True
        response_mask[row, :m] = True
        tokens[row, p - n : p + m] = torch.arange(n + m) + 1000 * ids[row] + 1
    logprobs = -(tokens[:, p:] + 1).float() * response_mask
    finished = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    return Rollout(tokens, prompt_mask, response_mask, logprobs, finished, torch.tensor(ids), 7, "sha")


def content(batch: Rollout) -> dict[int, tuple[list[int], list[int], list[float], bool]]:
    """What a rollout says, without padding: row id -> prompt, reply, log-probabilities, finished."""
    said = {}
    for i in range(len(batch)):
        keep = batch.response_mask[i]
        prompt = batch.tokens[i, : batch.prompt_width][batch.prompt_mask[i]].tolist()
        response, logprobs = batch.response_ids[i][keep].tolist(), batch.sample_logprobs[i][keep].tolist()
        said[int(batch.row_id[i])] = (prompt, response, logprobs, bool(batch.finished[i]))
    return said


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": torch.zeros(2, 3, dtype=torch.int32)}, "prompt_ids: expected torch.int64, got torch.int32"),
        ({"prompt_mask": torch.ones(2, 3)}, "prompt_mask: expected torch.bool, got torch.float32"),
        ({"prompt_mask": torch.ones(2, 4, dtype=torch.bool)}, r"prompt_mask: expected shape \(2, 3\), got \(2, 4\)"),
        ({"row_id": torch.tensor([0])}, r"row_id: expected shape \(2,\), got \(1,\)"),
        ({"max_new_tokens": torch.tensor([4.0, 4.0])}, "max_new_tokens: expected torch.int64"),
        ({"prompt_mask": torch.tensor([[True, True, False]] * 2)}, "left padded"),
        ({"prompt_mask": torch.tensor([[True, False, True]] * 2)}, "padding must come first"),
        ({"prompt_mask": torch.zeros(2, 3, dtype=torch.bool)}, "left padded"),
    ],
)
def test_prompt_batch_refuses(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(prompts(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, r"tokens: expected shape \(2, 7\), got \(2, 6\)"),
        ({"tokens": torch.zeros(2, 7)}, "tokens: expected torch.int64"),
        ({"prompt_mask": torch.ones(1, 3, dtype=torch.bool)}, r"tokens: expected shape \(1, 7\)"),
        ({"sample_logprobs": torch.zeros(2, 4, dtype=torch.float64)}, "sample_logprobs: expected torch.float32"),
        ({"sample_logprobs": torch.zeros(2, 3)}, r"sample_logprobs: expected shape \(2, 4\)"),
        ({"sample_logprobs": torch.full((2, 4), -1.0)}, "sample_logprobs: must be 0 outside the mask"),
        ({"finished": torch.tensor([1, 0])}, "finished: expected torch.bool"),
        ({"row_id": torch.tensor([0, 1], dtype=torch.int32)}, "row_id: expected torch.int64"),
        ({"response_mask": torch.tensor([[True, False, True, False]] * 2)}, "real tokens come first"),
        ({"response_mask": torch.tensor([[False] * 4, [True] * 4])}, "every reply has at least one token"),
    ],
)
def test_rollout_refuses(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(picture(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": torch.tensor([1.0], dtype=torch.float64)}, "reward: expected torch.float32"),
        ({"row_id": torch.tensor([0])}, r"row_id: expected shape \(2,\)"),
        ({"ref_logprobs": torch.zeros(3, 4)}, r"ref_logprobs: expected \[B, R\]"),
        ({"ref_logprobs": torch.zeros(2)}, r"ref_logprobs: expected \[B, R\]"),
        ({"parts": {"length": torch.zeros(3)}}, r"parts\[length\]: expected shape \(2,\), got \(3,\)"),
    ],
)
def test_scores_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(scores(), **change)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"])
def test_experience_refuses_values_outside_the_mask_and_wrong_shapes(name: str) -> None:
    leak = torch.zeros(2, 4)
    leak[0, 3] = 9.9  # the pad column of row 0
    with pytest.raises(ValueError, match=f"{name}: must be 0 outside the mask"):
        replace(experience(), **{name: leak})
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(2, 4\), got \(2, 3\)"):
        replace(experience(), **{name: torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=f"{name}: expected torch.float32, got torch.bfloat16"):
        replace(experience(), **{name: torch.zeros(2, 4, dtype=torch.bfloat16)})


def test_nan_outside_the_mask_is_refused() -> None:
    """F13: NaN is unequal to 0, so garbage outside the mask cannot hide as NaN."""
    leak = torch.zeros(2, 4)
    leak[0, 3] = float("nan")
    with pytest.raises(ValueError, match="must be 0 outside the mask"):
        replace(experience(), advantages=leak)


# ---------------------------------------------------------------- the picture


def test_the_picture_reads_as_drawn() -> None:
    r = picture()
    assert (len(r), r.prompt_width, r.response_width) == (2, 3, 4)
    assert r.lengths.tolist() == [3, 4]  # eos counts
    assert r.response_ids.tolist() == [[21, 22, 2, 0], [23, 24, 25, 26]]
    assert r.attention_mask.long().tolist() == [[0, 1, 1, 1, 1, 1, 0], [1] * 7]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("make", [prompts, picture, scores, experience])
def test_rows_picks_rows_of_every_field_in_the_order_asked(make: Any) -> None:
    batch = make()
    picked = batch.rows(torch.tensor([1, 0, 1]))
    assert type(picked) is type(batch)
    for name, value in vars(batch).items():
        got = getattr(picked, name)
        if isinstance(value, Tensor):
            assert got.tolist() == [value.tolist()[i] for i in (1, 0, 1)], name
        elif isinstance(value, dict):
            assert {k: v.tolist() for k, v in got.items()} == {
                k: [v.tolist()[i] for i in (1, 0, 1)] for k, v in value.items()
            }
        else:
            assert got == value, name


def test_rows_takes_slices() -> None:
    assert picture().rows(slice(1, 2)).row_id.tolist() == [1]
    assert len(picture().rows(slice(0, 0))) == 0


# ---------------------------------------------------------------- widen, concat


@given(rollouts(), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_widen_keeps_the_content_and_pads_with_the_pad(batch: Rollout, left: int, right: int) -> None:
    p, r = batch.prompt_width + left, batch.response_width + right
    wide = batch.widen(p, r, pad_id=5)
    assert (wide.prompt_width, wide.response_width) == (p, r)
    assert content(wide) == content(batch)
    assert (wide.tokens[:, :left] == 5).all() and (wide.tokens[:, wide.tokens.shape[1] - right :] == 5).all()
    assert not wide.prompt_mask[:, :left].any()
    assert (wide.adapter_version, wide.adapter_sha256) == (7, "sha")


def test_widen_does_not_narrow() -> None:
    for p, r in ((2, 4), (3, 3)):
        with pytest.raises(ValueError, match="use trim"):
            picture().widen(p, r, PAD)


@given(rollouts(), st.data())
@settings(max_examples=60, deadline=None)
def test_concat_does_not_depend_on_how_rows_were_cut_and_who_came_first(batch: Rollout, data: st.DataObject) -> None:
    """The Experience of a step must be the same however its chunks were spread over actors."""
    cuts = data.draw(st.sets(st.integers(1, max(len(batch) - 1, 1))))
    bounds = [0, *sorted(c for c in cuts if c < len(batch)), len(batch)]
    parts = [batch.rows(slice(a, b)) for a, b in pairwise(bounds)]
    joined = Rollout.concat(data.draw(st.permutations(parts)), PAD)
    assert joined.row_id.tolist() == sorted(batch.row_id.tolist())
    assert content(joined) == content(batch)
    again = Rollout.concat([batch], PAD)
    for name in ("tokens", "prompt_mask", "response_mask", "sample_logprobs", "finished"):
        assert torch.equal(getattr(joined, name), getattr(again, name)), name


@given(rollouts(), rollouts())
@settings(max_examples=40, deadline=None)
def test_concat_pads_to_the_widest(a: Rollout, b: Rollout) -> None:
    b = replace(b, row_id=b.row_id + 100)
    joined = Rollout.concat([b, a], PAD)
    assert joined.prompt_width == max(a.prompt_width, b.prompt_width)
    assert joined.response_width == max(a.response_width, b.response_width)
    assert content(joined) == content(a) | content(b)


def test_concat_refuses_mixed_adapters_and_nothing() -> None:
    """A stale generator's rows never mix with fresh ones."""
    stale = replace(picture(), row_id=torch.tensor([2, 3]), adapter_version=2)
    with pytest.raises(ValueError, match="different adapters"):
        Rollout.concat([picture(), stale], PAD)
    other = replace(picture(), row_id=torch.tensor([2, 3]), adapter_sha256="abd")
    with pytest.raises(ValueError, match="different adapters"):
        Rollout.concat([picture(), other], PAD)
    with pytest.raises(ValueError, match="no rollouts"):
        Rollout.concat([], PAD)


# ---------------------------------------------------------------- trim


@given(rollouts(pad=EOS))
@settings(max_examples=60, deadline=None)
def test_trim_drops_only_padding_even_if_pad_is_eos(batch: Rollout) -> None:
    """F12: widths come from the masks, never from token ids."""
    cut = Sequences.trim(batch.tokens, batch.prompt_mask, batch.response_mask)
    assert cut.response_width == int(batch.lengths.max())
    assert cut.tokens.shape[1] == int(batch.prompt_mask.sum(1).max()) + int(batch.lengths.max())
    assert cut.tokens.shape == cut.attention_mask.shape
    for i in range(len(batch)):
        assert cut.tokens[i][cut.attention_mask[i]].tolist() == batch.tokens[i][batch.attention_mask[i]].tolist()
        response = cut.tokens[i, -cut.response_width :][cut.response_mask[i]]
        assert response.tolist() == content(batch)[int(batch.row_id[i])][1]


@given(rollouts(), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_trim_does_not_depend_on_the_padding_it_is_given(batch: Rollout, left: int, right: int) -> None:
    wide = batch.widen(batch.prompt_width + left, batch.response_width + right, PAD)
    a = Sequences.trim(batch.tokens, batch.prompt_mask, batch.response_mask)
    b = Sequences.trim(wide.tokens, wide.prompt_mask, wide.response_mask)
    for name in ("tokens", "attention_mask", "response_mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_trim_of_the_picture_row_by_row() -> None:
    r = picture().rows(torch.tensor([0]))
    cut = Sequences.trim(r.tokens, r.prompt_mask, r.response_mask)
    assert cut.tokens.tolist() == [[11, 12, 21, 22, 2]]
    assert cut.attention_mask.all() and cut.response_mask.tolist() == [[True] * 3]


def test_scores_of_chunks_of_different_widths_keep_both_references_and_never_mix_them() -> None:
    def chunk(row: int, width: int, reference: str) -> Scores:
        ref, start = torch.full((1, width), -1.0), torch.full((1, width), -2.0)
        return Scores(torch.ones(1), ref, torch.tensor([row]), {}, None, start, reference)

    joined = Scores.concat([chunk(1, 3, "a"), chunk(0, 2, "a")])
    assert joined.ref_logprobs.tolist() == [[-1, -1, 0], [-1, -1, -1]] and joined.reference_sha256 == "a"
    assert joined.start.tolist() == [[-2, -2, 0], [-2, -2, -2]]
    with pytest.raises(ValueError, match="against different references"):
        Scores.concat([chunk(1, 3, "a"), chunk(0, 2, "b")])
    alone = Scores(torch.ones(1), torch.zeros(1, 2), torch.tensor([0]))
    assert alone.start is alone.ref_logprobs
