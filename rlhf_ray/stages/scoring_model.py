"""A reward model on its own, for texts: loaded as it was trained, and asked as PPO asks it.

The run's own prompt template, token ids of prompt and reply encoded apart, the reply's eos as in training, the head read after the
last real token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.batches import Sequences
from rlhf_ray.config import EvaluateConfig, JobFields, RewardConfig, RewardSource
from rlhf_ray.console import Console
from rlhf_ray.data.collate import pad_left, pad_right
from rlhf_ray.data.encode import encode_prompts, encode_texts
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.metrics import figure
from rlhf_ray.models.adapters import read_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_backbone, load_classifier
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.lineage import check_lineage, merged_manifest, parent_of
from rlhf_ray.models.loading import DTYPES
from rlhf_ray.models.merge import fixture_difference
from rlhf_ray.models.source import resolve_source
from rlhf_ray.models.specs import Source, reward_source
from rlhf_ray.models.stack import AdapterStack, RoleModels, Seat
from rlhf_ray.roles.rewards import ModelReward
from rlhf_ray.stages.recorded import recorded_template

ROLE = "reward"
STACK = "reward"
ROWS_PER_FORWARD = int(EvaluateConfig.model_fields["per_device_eval_batch_size"].default)
FIXTURE_TOLERANCE = 1e-3
"""Rounding between machines stays far below this in float32; a wrong base, head or precision goes far beyond."""


@dataclass(frozen=True)
class ScoringModel:
    """A loaded reward model, and how its training formed the sequences that it scores."""

    backbone: Backbone
    reward: ModelReward
    template: Template
    add_eos_token: bool

    def encode(self, rows: Sequence[Row], replies: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of the rows' prompts, and of the replies with their eos, as in training."""
        tokenizer = self.backbone.tokenizer
        prompts = encode_prompts(tokenizer, self.template, [row.prompt for row in rows], [row.where for row in rows])
        end = [int(tokenizer.eos_token_id)] if self.add_eos_token else []  # type: ignore[arg-type]
        return prompts, [ids + end for ids in encode_texts(tokenizer, replies)]

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> list[float | None]:
        """One score per sequence; None where there is nothing to read, or more than the model can."""
        fits = [
            i
            for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
            if prompt and reply and len(prompt) + len(reply) <= self.backbone.context_length
        ]
        found: list[float | None] = [None] * len(prompts)
        for start in range(0, len(fits), ROWS_PER_FORWARD):
            part = fits[start : start + ROWS_PER_FORWARD]
            seq = _sequences([prompts[i] for i in part], [replies[i] for i in part], self.backbone.pad_id)
            for i, value in zip(part, self.reward.score(to_device(seq, self.backbone.device)).tolist()):
                found[i] = value
        return found


def load_scoring_model(
    source: RewardSource, template: str | None, device: torch.device, console: Console
) -> ScoringModel:
    """The reward model that `source` names, at the precision it was trained at where this machine can; its fixture is checked.

    Raises ConfigError, ArtifactError."""
    found = reward_source(source.run or source.model or "")
    manifest = found.run.manifest() if found.run is not None else {}
    if found.kind == "full":
        manifest = merged_manifest(resolve_source(found.path).folder) or {}
    backbone, models = _load(found, device)
    trained_with = recorded_template(found) or str(JobFields.model_fields["template"].default)
    frame = load_template(template or trained_with, backbone.tokenizer)
    for line in check_lineage(found, backbone.identity, frame, role=ROLE):
        console.warn(line)
    trained = manifest.get("reward") or {}
    add_eos = bool(trained.get("add_eos_token", RewardConfig.model_fields["add_eos_token"].default))
    if add_eos and backbone.tokenizer.eos_token_id is None:
        raise ConfigError.at(found.path, "its tokenizer has no eos token to end replies with")
    model = ScoringModel(backbone, ModelReward(source.name, source.weight, models, ROLE), frame, add_eos)
    console.log(
        f"{found.describe()} on {backbone.identity.path} ({backbone.identity.precision}); template {frame.name};"
        f" replies {'end in ' + str(backbone.tokenizer.eos_token) if add_eos else 'end without eos'}"
    )
    gap = _fixture_gap(model, found, trained.get("fixture") or [])
    if gap is not None and gap > FIXTURE_TOLERANCE:
        console.warn(f"texts it was tested on when it was made score otherwise here, by up to {figure(gap)}")
    elif gap is not None:
        console.log(f"reproduces the scores it was tested on when it was made, to within {figure(gap)}")
    return model


def _load(source: Source, device: torch.device) -> tuple[Backbone, RoleModels]:
    if source.kind == "full":
        backbone = load_classifier(source.path, revision=None, **_how(None, device))
        head: Any = backbone.model.score
        stack, seat, weight = AdapterStack(backbone, None), Seat(STACK, None, ROLE), head.weight.detach()
    else:
        base, files = parent_of(source, ROLE).base, read_adapter(source.path)
        if files.head is None:
            raise ArtifactError.at(source.path, "has no reward head", "the adapter of a reward run", "a policy adapter")
        if base is None:
            raise ArtifactError.at(source.path, "does not say which base it belongs on", "base_model_name_or_path")
        weight = files.head
        backbone = load_backbone(
            path=str(base["path"]), revision=base.get("revision"), **_how(base.get("precision"), device)
        )
        stack, seat = AdapterStack(backbone, wrap(backbone.model, files, ROLE)), Seat(STACK, ROLE, ROLE)
    stack.heads[ROLE] = ScalarHead(backbone.hidden_size, weight.float().cpu()).to(device)
    models = RoleModels({STACK: stack}, {ROLE: seat})
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


def _sequences(prompts: Sequence[list[int]], replies: Sequence[list[int]], pad_id: int) -> Sequences:
    before, real_before = pad_left(prompts, pad_id)
    after, real_after = pad_right(replies, pad_id)
    return Sequences(torch.cat([before, after], dim=1), torch.cat([real_before, real_after], dim=1), real_after)


def _fixture_gap(model: ScoringModel, source: Source, fixture: Sequence[dict[str, Any]]) -> float | None:
    """Largest difference from the scores that its training, or its merge, left: is this the reward model that was made?"""
    if source.kind == "full":
        return fixture_difference(resolve_source(source.path).folder, model.backbone)
    ids = [row["input_ids"] for row in fixture]
    found = model.score([row[:1] for row in ids], [row[1:] for row in ids])
    gaps = [abs(value - row["score"]) for value, row in zip(found, fixture) if value is not None]
    return max(gaps, default=None)
