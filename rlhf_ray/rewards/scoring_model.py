"""A reward model on its own, for texts: loaded as it was trained, and asked as PPO asks it.

The run's own prompt template, token ids of prompt and reply encoded apart, the reply's end as in training, the head read after the
last real token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_ray.config import EvaluateConfig, RewardSource
from rlhf_ray.console import Console
from rlhf_ray.data.encode import end_of_turn
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.metrics import figure
from rlhf_ray.models.adapters import read_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_backbone, load_classifier, trunk
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.heads import scalar_head
from rlhf_ray.models.lineage import (
    DEFAULT_TEMPLATE,
    check_lineage,
    parent_of,
    recorded_add_eos_token,
    recorded_date,
    recorded_end,
    recorded_kwargs,
    recorded_reward,
    recorded_template,
)
from rlhf_ray.models.loading import DTYPES
from rlhf_ray.models.merge import fixture_difference
from rlhf_ray.models.packing import packing_of
from rlhf_ray.models.role_models import AdapterStack, RoleBinding, RoleModels
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.models.specs import ModelSpec, reward_source
from rlhf_ray.rewards.retokenised import PairReader, Reader
from rlhf_ray.rewards.sources import ModelReward

ROLE = "reward"
STACK = "reward"
BATCHING = Batching(int(EvaluateConfig.model_fields["per_device_eval_batch_size"].default), packed=True)
"""As PPO reads rows, so that it gives their scores bit for bit where passes hold the same ones."""
FIXTURE_TOLERANCE = 1e-3
"""Rounding between machines stays far below this in float32; a wrong base, head or precision goes far beyond."""


@dataclass(frozen=True)
class ScoringModel:
    """A loaded reward model, and how its training formed the sequences that it scores."""

    reader: Reader
    reward: ModelReward
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Of the threads of a server that score: a pass sets what the model's last layer leaves out."""

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float | None]:
        """One score per sequence; None where there is nothing to read, or more than the model can."""
        fits = [
            i
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
            if prompt and response and len(prompt) + len(response) <= self.reader.backbone.context_length
        ]
        found: list[float | None] = [None] * len(prompts)
        for rows in BATCHING.passes(torch.tensor([len(prompts[i]) + len(responses[i]) for i in fits])):
            part = [fits[row] for row in rows.tolist()]
            seq = self.reader.sequences([prompts[i] for i in part], [responses[i] for i in part], packed=True)
            with self.turn:
                values = self.reward.score_sequences(seq).tolist()
            for i, value in zip(part, values):
                found[i] = value
        return found


def load_scoring_model(
    source: RewardSource, template: str | None, device: torch.device, console: Console
) -> ScoringModel:
    """The reward model that `source` names, at the precision it was trained at where this machine can; its fixture is checked.

    Raises ConfigError, ArtifactError."""
    (path,) = source.models(ROLE).values()
    found = reward_source(path)
    backbone, models = _load(found, device)
    name = template or recorded_template(found) or ("none" if backbone.is_encoder else DEFAULT_TEMPLATE)
    prompt_template = load_template(name, backbone.tokenizer, recorded_date(found), recorded_kwargs(found))
    for line in [*backbone.notes, *check_lineage(found, backbone.identity, prompt_template, role=ROLE)]:
        console.warn(line)
    reader = reader_of(found, backbone, prompt_template)
    model = ScoringModel(reader, ModelReward(source.name, source.weight, models, ROLE, BATCHING, device))
    ending = "without eos" if reader.end_id is None else f"in {backbone.tokenizer.decode([reader.end_id])}"
    how = "prompt and reply are a pair of texts" if backbone.is_encoder else f"replies end {ending}"
    console.log(
        f"{found.describe()} on {backbone.identity.path} ({backbone.identity.precision}); template {prompt_template.name}; {how}"
    )
    gap = _fixture_gap(model, found, recorded_reward(found).get("fixture") or [])
    if gap is not None and gap > FIXTURE_TOLERANCE:
        console.warn(f"the texts that it was tested on when it was made score differently here, by up to {figure(gap)}")
    elif gap is not None:
        console.log(f"reproduces the scores it was tested on when it was made, to within {figure(gap)}")
    return model


def reader_of(source: ModelSpec, backbone: Backbone, template: Template) -> Reader:
    """How the reward model `source` reads text. ConfigError if its replies end with a token that its tokenizer lacks."""
    if backbone.is_encoder:
        return PairReader(backbone, template, False)
    if not recorded_add_eos_token(source):
        return Reader(backbone, template, False)
    end = recorded_end(source)
    if end is None:  # not made here, or by a version that did not say
        end = end_of_turn(backbone.tokenizer, template)
    if end is None:
        raise ConfigError.at(source.path, "its tokenizer has no eos token to end replies with")
    return Reader(backbone, template, True, end)


def _load(source: ModelSpec, device: torch.device) -> tuple[Backbone, RoleModels]:
    if source.kind == "full":
        backbone = load_classifier(source.path, revision=None, **_how(None, device))
        stack = AdapterStack(backbone, None)
        if backbone.is_encoder:
            return backbone, RoleModels({STACK: stack}, {ROLE: RoleBinding(STACK, None)}).eval()
        head: Any = backbone.model.score
        binding, score = RoleBinding(STACK, None, ROLE), scalar_head(head)
    else:
        base, files = parent_of(source, ROLE).base, read_adapter(source.path)
        if files.head is None:
            raise ArtifactError.at(source.path, "has no reward head", "the adapter of a reward run", "a policy adapter")
        if base is None:
            raise ArtifactError.at(source.path, "does not record its base model", "base_model_name_or_path")
        backbone = load_backbone(
            path=str(base["path"]), revision=base.get("revision"), **_how(base.get("precision"), device)
        )
        backbone.notes += files.notes
        stack, binding = AdapterStack(backbone, wrap(backbone.model, files, ROLE)), RoleBinding(STACK, ROLE, ROLE)
        score = files.scalar_head(backbone.hidden_size)
    stack.heads[ROLE] = score.to(device)
    backbone.packing = packing_of(trunk(backbone.model), backbone.attn_implementation)
    models = RoleModels({STACK: stack}, {ROLE: binding})
    models.requires_grad_(False)
    models.eval()
    return backbone, models


def _how(precision: str | None, device: torch.device) -> dict[str, Any]:
    """Arguments of the loaders for a recorded precision; the machine's own choice where it is unknown or needs a GPU."""
    known = precision in DTYPES and not (precision == "float16" and device.type != "cuda")
    return {
        "dtype": precision if known else "auto",
        "attn_implementation": "auto",
        "load_in_8bit": precision == "8bit",
        "load_in_4bit": precision == "4bit",
        "cpu_offload": False,
        "device": device,
    }


def _fixture_gap(model: ScoringModel, source: ModelSpec, fixture: Sequence[dict[str, Any]]) -> float | None:
    """Largest difference from the scores that its training, or its merge, left: is this the reward model that was made?"""
    if source.kind == "full":
        return fixture_difference(resolve_source(source.path).folder, model.reader.backbone)
    ids = [row["input_ids"] for row in fixture]
    found = model.score([row[:1] for row in ids], [row[1:] for row in ids])
    gaps = [abs(value - row["score"]) for value, row in zip(found, fixture) if value is not None]
    return max(gaps, default=None)
