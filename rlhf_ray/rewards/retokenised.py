"""A reward model that reads other tokens than the policy writes.

Token ids mean nothing to it, so replies travel as text: decoded, put after the row's prompt in the reward model's own template, and
encoded again, with its end token where the reply is finished. Text that does not encode back into the ids that were sampled
has drifted: what is scored is then not quite what was said. The share of such replies is a metric. An encoder reads text whatever
its tokenizer: the prompt without a template, and the reply, as a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.data.collate import pad_left, pad_right
from rlhf_ray.data.continuation import texts_after_prompts
from rlhf_ray.data.encode import encode_prompts, encode_texts, end_of_turn
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.zero3 import MaxOverRanks, padding_batch
from rlhf_ray.rewards.protocol import Reward, RewardInputs, broken_as_inf


@dataclass(frozen=True)
class Reader:
    """How a reward model reads text.  add_eos_token: whether its training ended complete replies with the end token.
    end_id: that token; default: the end of turn under `template`."""

    backbone: Backbone
    template: Template
    add_eos_token: bool
    end_id: int | None = None

    def encode(
        self, rows: Sequence[Row], responses: Sequence[str], finished: Sequence[bool] | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of the rows' prompts and of the replies, each complete unless `finished` says otherwise."""
        tokenizer = self.backbone.tokenizer
        prompts = encode_prompts(tokenizer, self.template, [row.prompt for row in rows], [row.where for row in rows])
        end_id = end_of_turn(tokenizer, self.template) if self.end_id is None else self.end_id
        end = [end_id] if self.add_eos_token and end_id is not None else []
        complete = finished if finished is not None else [True] * len(responses)
        return prompts, [
            ids + (end if whole else [])
            for ids, whole in zip(
                encode_texts(tokenizer, texts_after_prompts(tokenizer, responses)), complete, strict=True
            )
        ]

    def sequences(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        contiguous: bool = True,
        packed: bool = False,
    ) -> Sequences:
        """Padded, on the reward model's device. Every prompt and reply must hold a token.   contiguous, packed: see
        `Sequences.trim`."""
        before, real_before = pad_left(prompts, self.backbone.pad_id)
        after, real_after = pad_right(responses, self.backbone.pad_id)
        seq = Sequences.trim(torch.cat([before, after], dim=1), real_before, real_after, contiguous, packed)
        return to_device(seq, self.backbone.device)


@dataclass(frozen=True)
class PairReader(Reader):
    """How an encoder reads text: prompt and reply as a pair, with the tokens that its tokenizer sets before, between and behind
    them ([CLS] prompt [SEP] reply [SEP]). What stands before the reply is its prompt here."""

    @cached_property
    def frame(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens before, between and behind the texts of a pair."""
        pair = self.backbone.tokenizer("a", "b", add_special_tokens=True)
        ids, which = list(pair.input_ids), pair.sequence_ids(0)
        ends = [max(i for i, text in enumerate(which) if text == number) + 1 for number in (0, 1)]
        starts = [which.index(number) for number in (0, 1)]
        return ids[: starts[0]], ids[ends[0] : starts[1]], ids[ends[1] :]

    def encode(
        self, rows: Sequence[Row], responses: Sequence[str], finished: Sequence[bool] | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of each pair, cut to what the encoder reads: a prompt loses its start, a reply that is still too long its end."""
        tokenizer, (before, between, behind) = self.backbone.tokenizer, self.frame
        asked = encode_texts(tokenizer, [self.template.render(row.prompt) for row in rows])
        said = encode_texts(tokenizer, list(responses))
        room = self.backbone.context_length - len(before) - len(between) - len(behind)
        prompts, replies = [], []
        for prompt, reply in zip(asked, said, strict=True):
            kept = reply[:room]
            left = room - len(kept)
            prompts.append([*before, *(prompt[-left:] if left else []), *between])
            replies.append([*kept, *behind])
        return prompts, replies


class RetokenisedReward(Reward):
    """A whole reward model with a tokenizer of its own, or an encoder, by its role.

    reader: of the reward model.  writer: the policy's base.  batching, max_over_ranks: as the scorer's."""

    def __init__(
        self,
        name: str,
        weight: float,
        models: Callable[..., Any],
        role: str,
        reader: Reader,
        writer: Backbone,
        batching: Batching,
        max_over_ranks: MaxOverRanks = int,
    ) -> None:
        self.name, self.weight, self.models, self.role = name, weight, models, role
        self.reader, self.writer, self.batching, self.max_over_ranks = reader, writer, batching, max_over_ranks

    @torch.no_grad()
    def score(self, inputs: RewardInputs) -> Tensor:
        """f32[rows]. What is longer than the reward model's context loses the start of its prompt, as in a long conversation."""
        prompts, responses = self.reader.encode(inputs.rows, inputs.texts.completions, inputs.finished)
        fitted = [_fit(p, r, self.reader.backbone.context_length) for p, r in zip(prompts, responses, strict=True)]
        found = torch.zeros(len(inputs))
        lengths = torch.tensor([len(p) + len(r) for p, r in fitted])
        for rows in self.batching.passes(lengths, self.max_over_ranks):
            some = [fitted[i] for i in rows.tolist()]
            how = self.batching.contiguous, self.batching.packed
            seq = self.reader.sequences([p for p, _ in some], [r for _, r in some], *how)
            found[rows] = self.models("rewards", self.role, seq).float().cpu()
        return broken_as_inf(found)

    @torch.no_grad()
    def join(self) -> None:
        """Take part in the passes that other ranks make (see `Scorer.join`)."""
        for _ in range(self.max_over_ranks(0)):
            self.models("rewards", self.role, padding_batch(self.reader.backbone.device))

    def drift(self, inputs: RewardInputs) -> Tensor:
        """f32[rows]: 1 where a reply's text does not encode back into the ids that were sampled, special ones aside, else 0."""
        texts = inputs.texts
        special = set(self.writer.tokenizer.all_special_ids)
        said = [[i for i in ids if i not in special] for ids in texts.completion_ids]
        tokenizer = self.writer.tokenizer
        back = encode_texts(tokenizer, texts_after_prompts(tokenizer, texts.completions))
        return torch.tensor([float(a != b) for a, b in zip(said, back, strict=True)])


def _fit(prompt: list[int], response: list[int], context: int) -> tuple[list[int], list[int]]:
    """At most the last `context` tokens, cut so that both parts hold one: a reply without tokens is read after its prompt."""
    tokens = (prompt + response)[-context:]
    at = min(max(len(tokens) - len(response), 1), len(tokens) - 1)
    return tokens[:at], tokens[at:]
