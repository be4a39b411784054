"""The types that cross processes, in the order in which one PPO step makes them.

Letters: B replies, P prompt width (LEFT padded), R reply width (RIGHT padded), T = P + R. Column t of every [B, R] tensor is
about reply token t: token column P + t, predicted by logits column P + t - 1. A filled Rollout with P = 3, R = 4, eos 2, pad 0:

    column             0  1  2 |  3  4  5  6     response_mask   finished
    row 0 tokens       0 11 12 | 21 22  2  0     1 1 1 0         True      (True up to and INCLUDING eos)
    row 1 tokens      13 14 15 | 23 24 25 26     1 1 1 1         False     (cut off by length)

`response_mask` and `finished` are set once, where tokens are sampled; nobody works them out again from "not pad", since pad may
equal eos. Constructors check shapes, dtypes and masks, so that a wrong batch fails where it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F


def _require(condition: bool | Tensor, message: str) -> None:
    if not bool(condition):
        raise ValueError(message)


def _check(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if dtype is not None:
        _require(tensor.dtype == dtype, f"{name}: expected {dtype}, got {tensor.dtype}")


def _pad(tensor: Tensor, left: int, right: int, value: float) -> Tensor:
    return F.pad(tensor, (left, right), value=value) if left or right else tensor


class _Rows:
    """Row selection and concatenation shared by all batches; every tensor field has B as its first dimension."""

    def rows(self, index: Tensor | slice) -> Self:
        """The given rows, in the given order, as a batch of the same type."""
        picked = {f.name: _pick(getattr(self, f.name), index) for f in fields(self) if f.init}  # type: ignore[arg-type]
        return type(self)(**picked)


def _pick(value: Any, index: Tensor | slice) -> Any:
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, dict):
        return {k: _pick(v, index) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class PromptBatch(_Rows):
    """Prompts of one chunk. `row_id` is the row's index in the step's global batch: it seeds the row's randomness.

    prompt_ids: i64[B, P], left padded.  prompt_mask: bool[B, P], True on real tokens.  row_id: i64[B].
    max_new_tokens: i64[B], the reply budget of each row.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    row_id: Tensor
    max_new_tokens: Tensor

    def __post_init__(self) -> None:
        b, p = self.prompt_ids.shape
        _check("prompt_ids", self.prompt_ids, torch.int64, (b, p))
        _check("prompt_mask", self.prompt_mask, torch.bool, (b, p))
        _check("row_id", self.row_id, torch.int64, (b,))
        _check("max_new_tokens", self.max_new_tokens, torch.int64, (b,))
        _require(self.prompt_mask[:, -1].all(), "prompt_mask: prompts are left padded, so the last column must be real")
        _require((self.prompt_mask.long().diff(dim=1) >= 0).all(), "prompt_mask: padding must come first, without gaps")

    def __len__(self) -> int:
        return int(self.prompt_ids.shape[0])


@dataclass(frozen=True)
class Rollout(_Rows):
    """Replies sampled by the generator with one adapter.

    tokens: i64[B, P+R].  prompt_mask: bool[B, P].  response_mask: bool[B, R], True up to and including eos.
    sample_logprobs: f32[B, R], of the sampled tokens under the sampling temperature, 0 outside the mask.
    finished: bool[B], eos was sampled.  row_id: i64[B].
    adapter_version, adapter_sha256: what was really active while sampling.
    """

    tokens: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    sample_logprobs: Tensor
    finished: Tensor
    row_id: Tensor
    adapter_version: int = 0
    adapter_sha256: str = ""

    def __post_init__(self) -> None:
        b, p = self.prompt_mask.shape
        r = int(self.response_mask.shape[1])
        _check("tokens", self.tokens, torch.int64, (b, p + r))
        _check("prompt_mask", self.prompt_mask, torch.bool, (b, p))
        _check("response_mask", self.response_mask, torch.bool, (b, r))
        _check("sample_logprobs", self.sample_logprobs, torch.float32, (b, r))
        _check("finished", self.finished, torch.bool, (b,))
        _check("row_id", self.row_id, torch.int64, (b,))
        _require(self.response_mask[:, 0].all(), "response_mask: every reply has at least one token")
        _require(
            (self.response_mask.long().diff(dim=1) <= 0).all(), "response_mask: real tokens come first, without gaps"
        )
        _require((self.sample_logprobs[~self.response_mask] == 0).all(), "sample_logprobs: must be 0 outside the mask")

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def prompt_width(self) -> int:
        return int(self.prompt_mask.shape[1])

    @property
    def response_width(self) -> int:
        return int(self.response_mask.shape[1])

    @property
    def attention_mask(self) -> Tensor:
        """bool[B, T], True on real prompt and reply tokens."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def prompt_ids(self) -> Tensor:
        """i64[B, P]."""
        return self.tokens[:, : self.prompt_width]

    @property
    def response_ids(self) -> Tensor:
        """i64[B, R]."""
        return self.tokens[:, self.prompt_width :]

    @property
    def lengths(self) -> Tensor:
        """i64[B], reply tokens including eos."""
        return self.response_mask.sum(dim=1)

    def widen(self, prompt_width: int, response_width: int, pad_id: int) -> Rollout:
        """The same rows with at least these widths: padding is added left of prompts and right of replies."""
        left, right = prompt_width - self.prompt_width, response_width - self.response_width
        _require(left >= 0 and right >= 0, "widen: cannot make a rollout narrower; use trim")
        return replace(
            self,
            tokens=_pad(self.tokens, left, right, pad_id),
            prompt_mask=_pad(self.prompt_mask, left, 0, False),
            response_mask=_pad(self.response_mask, 0, right, False),
            sample_logprobs=_pad(self.sample_logprobs, 0, right, 0.0),
        )

    @classmethod
    def concat(cls, parts: Sequence[Rollout], pad_id: int) -> Rollout:
        """All rows of `parts`, ordered by row_id and padded to common widths; adapters must agree."""
        _require(len(parts) > 0, "concat: no rollouts")
        versions = {(p.adapter_version, p.adapter_sha256) for p in parts}
        _require(len(versions) == 1, f"concat: rollouts come from different adapters: {sorted(versions)}")
        width_p, width_r = max(p.prompt_width for p in parts), max(p.response_width for p in parts)
        wide = [p.widen(width_p, width_r, pad_id) for p in parts]
        names = ("tokens", "prompt_mask", "response_mask", "sample_logprobs", "finished", "row_id")
        joined: dict[str, Any] = {n: torch.cat([getattr(w, n) for w in wide]) for n in names}
        order = torch.argsort(joined["row_id"])
        _require((joined["row_id"][order].diff() > 0).all(), "concat: a row appears twice")
        return replace(parts[0], **{n: t[order] for n, t in joined.items()})


@dataclass(frozen=True)
class Scores(_Rows):
    """What the scorer says of a rollout, row by row.

    reward: f32[B], the weighted sum, raw; not finite where there is none.  parts: name -> f32[B], each reward before its weight,
    NaN where it does not apply, infinite where it is broken.
    ref_logprobs: f32[B, R], log-probabilities of the sampled tokens under the reference policy, 0 outside the mask.
    start_logprobs: the same under the policy that the run started from, where that is no longer the reference; else None.
    reference_sha256: of the adapter that was the reference then (ref_model_sync_steps); "" for the one that the run started from.
    drift: f32[B], 1 where a reward model with its own tokenizer read text that is not quite the sampled ids; None without one.
    """

    reward: Tensor
    ref_logprobs: Tensor
    row_id: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    drift: Tensor | None = None
    start_logprobs: Tensor | None = None
    reference_sha256: str = ""

    @property
    def start(self) -> Tensor:
        """f32[B, R]: log-probabilities under the policy that the run started from."""
        return self.ref_logprobs if self.start_logprobs is None else self.start_logprobs

    def __post_init__(self) -> None:
        b = int(self.reward.shape[0])
        _check("reward", self.reward, torch.float32, (b,))
        _check("row_id", self.row_id, torch.int64, (b,))
        _require(self.ref_logprobs.ndim == 2 and self.ref_logprobs.shape[0] == b, "ref_logprobs: expected [B, R]")
        for name, part in self.parts.items():
            _check(f"parts[{name}]", part, torch.float32, (b,))
        if self.drift is not None:
            _check("drift", self.drift, torch.float32, (b,))
        if self.start_logprobs is not None:
            _check("start_logprobs", self.start_logprobs, torch.float32, tuple(self.ref_logprobs.shape))

    @classmethod
    def concat(cls, parts: Sequence[Scores]) -> Scores:
        """All rows of `parts`, ordered by row_id; log-probabilities are padded to the widest; references must agree."""
        _require(len(parts) > 0, "concat: no scores")
        references = {p.reference_sha256 for p in parts}
        _require(len(references) == 1, f"concat: scores are against different references: {sorted(references)}")
        order = torch.argsort(torch.cat([p.row_id for p in parts]))

        def joined(name: str) -> Any:
            every = [getattr(p, name) for p in parts]
            if any(t is None for t in every):
                return None
            if every[0].ndim == 2:
                width = max(t.shape[1] for t in every)
                every = [_pad(t, 0, width - t.shape[1], 0.0) for t in every]
            return torch.cat(every)[order]

        return cls(
            reward=joined("reward"),
            ref_logprobs=joined("ref_logprobs"),
            row_id=joined("row_id"),
            parts={name: torch.cat([p.parts[name] for p in parts])[order] for name in parts[0].parts},
            drift=joined("drift"),
            start_logprobs=joined("start_logprobs"),
            reference_sha256=parts[0].reference_sha256,
        )


@dataclass(frozen=True)
class Experience(_Rows):
    """All a PPO update needs, for all rows of a step; floats are 0 outside `rollout.response_mask`.

    old_logprobs, ref_logprobs, old_values, advantages, returns: f32[B, R].
    token_weights: f32[B, R], what each token's loss counts; None for 1 (rollouts of the newest adapter).
    """

    tokens: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    token_weights: Tensor | None = None

    def __post_init__(self) -> None:
        b, p = self.prompt_mask.shape
        r = int(self.response_mask.shape[1])
        _check("tokens", self.tokens, torch.int64, (b, p + r))
        _check("prompt_mask", self.prompt_mask, torch.bool, (b, p))
        _check("response_mask", self.response_mask, torch.bool, (b, r))
        weights = () if self.token_weights is None else ("token_weights",)
        for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", *weights):
            value = getattr(self, name)
            _check(name, value, torch.float32, (b, r))
            _require((value[~self.response_mask] == 0).all(), f"{name}: must be 0 outside the mask")

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of rows are, for a pass that reads them as one row (models/packing.py).

    lengths: tokens of each row.   real_at: i64[K], where `attention_mask` is True, counted row by row.
    read_at: i64[S], of these K, the last prompt token of each row and its reply: the states that are read."""

    lengths: tuple[int, ...]
    real_at: Tensor
    read_at: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, response_mask: Tensor) -> PackedRows:
        """attention_mask: bool[M, T].   response_mask: bool[M, R], its last columns."""
        read = F.pad(response_mask, (attention_mask.shape[1] - response_mask.shape[1], 0))
        read[:, :-1] |= read[:, 1:].clone()
        real = attention_mask.flatten()
        lengths = tuple(int(n) for n in attention_mask.sum(dim=1))
        return cls(lengths, real.nonzero().flatten(), read.flatten()[real].nonzero().flatten())

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(self.lengths, self.real_at.to(device), self.read_at.to(device))


@dataclass(frozen=True)
class Sequences:
    """Prompt and reply of some rows, cut to the narrowest width that holds them: what a forward pass sees.

    tokens: i64[M, P'+R'].  attention_mask: bool[M, P'+R'].  response_mask: bool[M, R'].
    length: tokens of the longest row, for a pass that reads prompt and reply one right behind the other: all padding is then on the
    right, and is `length` columns wide at most.  None: rows are read as they lie here, prompts padded on the left.
    reply_at: i64[K], where `response_mask` is True, counted row by row; None: everywhere, or nobody looked.
    packed: for a pass that may read all rows as one; a base that cannot reads them by `length`.
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    length: int | None = None
    reply_at: Tensor | None = None
    packed: PackedRows | None = None

    @property
    def response_width(self) -> int:
        return int(self.response_mask.shape[1])

    @property
    def computed_tokens(self) -> int:
        """Of a forward pass that is not packed, padding included."""
        rows, width = self.tokens.shape
        return int(rows) * (int(width) if self.length is None else self.length)

    @classmethod
    def trim(
        cls,
        tokens: Tensor,
        prompt_mask: Tensor,
        response_mask: Tensor,
        contiguous: bool = True,
        packed: bool = False,
    ) -> Sequences:
        """Drop columns that are padding in every row. Widths depend on these rows alone, never on the rest of the batch.

        contiguous: a forward pass reads each prompt and its reply without padding between them.   packed: and may read all rows as
        one."""
        prompt_width = prompt_mask.shape[1]
        left = int((~prompt_mask.any(dim=0)).sum())
        response = int(response_mask.any(dim=0).sum())
        mask = torch.cat([prompt_mask[:, left:], response_mask[:, :response]], dim=1)
        real = response_mask[:, :response].contiguous()
        return cls(
            tokens[:, left : prompt_width + response].contiguous(),
            mask,
            real,
            int(mask.sum(dim=1).max()) if contiguous else None,
            real.flatten().nonzero().flatten() if contiguous else None,
            PackedRows.of(mask, real) if contiguous and packed else None,
        )
