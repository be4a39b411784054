"""The parts of an SFT, DPO or reward stage: the task (what is trained, and on what), the recipe that makes it, the job at hand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rlhf_ray.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_ray.data.collate import Tokenised
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.records import Row
from rlhf_ray.data.splits import Half
from rlhf_ray.data.stored import StoredRows
from rlhf_ray.data.templates import Template
from rlhf_ray.models.adapters import (
    adapter_config,
    adapter_sha256,
    adapter_tensors,
    load_adapter_tensors,
    save_adapter,
)
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import Parent
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run_folder import RunFolder
from rlhf_ray.supervised.batch_sampler import eval_batches
from rlhf_ray.supervised.trained_model import TrainedModel
from rlhf_ray.supervised.trainer import Batch, Objective

SupervisedConfig: TypeAlias = SFTConfig | DPOConfig | RewardConfig


class Task(Objective):
    """What a stage adds to the objective: its adapter, its evaluation, its files."""

    model: TrainedModel
    adapter: str
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    evaluates_at_start = True

    def __init__(self, model: TrainedModel, parents: Sequence[Parent], lineage: Sequence[str]) -> None:
        """lineage: header lines."""
        self.model, self.parents, self.lineage = model, tuple(parents), tuple(lineage)
        self.starts_from = adapter_sha256(self.tensors(), self.head())

    @abstractmethod
    def evaluate(self, rows: Sequence[Any], session: Session) -> dict[str, float]:
        """Metrics on held-out rows, equal on every rank. Called in eval mode, without gradients, by all ranks."""

    @abstractmethod
    def outputs(self, batch: Batch, head: Tensor | None) -> Tensor:
        """One row per row of the batch, under the active adapter: equal before saving and after reading back.

        head: stands in for the scalar head that is trained, where there is one."""

    def head(self) -> Tensor | None:
        """[1, D] weights of a scalar head, as they are now."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Plain PEFT key -> a copy of the adapter's tensor on the CPU."""
        return adapter_tensors(self.model.peft_model, self.adapter)

    def restore(self, tensors: dict[str, Tensor], head: Tensor | None) -> None:
        """Put back what `tensors` and `head` gave."""
        load_adapter_tensors(self.model.peft_model, self.adapter, tensors)

    def save(self, folder: Path, is_trained: bool = True) -> str:
        """Write a plain PEFT folder; InvariantError if training, where there was any, changed nothing. Returns the adapter's
        sha256."""
        identity = self.model.backbone.identity
        return save_adapter(
            folder,
            self.tensors(),
            adapter_config(self.model.peft_model, self.adapter),
            self.task_type,
            self.head(),
            identity.path,
            identity.revision,
            must_differ_from=self.starts_from if is_trained else None,
        )

    def lengths(self, rows: Sequence[Any]) -> Tensor:
        """i64[N], `length` of every row; rows that are stored need not be made for it."""
        if isinstance(rows, StoredRows):
            return torch.from_numpy(rows.lengths).long()
        return torch.tensor([self.length(row) for row in rows], dtype=torch.int64)

    def eval_parts(self, rows: Sequence[Any], size: int, session: Session) -> Iterator[tuple[list[int], Batch]]:
        """This rank's share of `rows`: (indices, batch on the device)."""
        for part in eval_batches(self.lengths(rows).tolist(), size, session.rank, session.world_size):
            batch = self.collate([(rows[i], True) for i in part])
            yield part, {name: tensor.to(session.device) for name, tensor in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the task itself counts from step to step, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""

    def verdict(self, metrics: Mapping[str, float]) -> str | None:
        """The result in a line, from the run's metrics; None where there is nothing to tell."""
        return None

    def manifest(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Further manifest entries, made by rank 0 after training. rows: a few rows."""
        return {}


@dataclass(frozen=True)
class Recipe:
    """One stage. tokenise: (rows, template, tokenizer, max_length) -> examples.  build: the task on a freshly loaded base."""

    stage: Literal["sft", "dpo", "reward"]
    kind: RowKind
    half: Half | None
    tokenise: Callable[[Sequence[Row], Template, Any, int], Tokenised[Any]]
    build: Callable[[Backbone, Template], Task]


@dataclass
class Examples:
    """Tokenised rows, and the lines that account for them."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    lines: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Job:
    """One run of a stage, ready to train. steps: optimizer steps in all."""

    config: SupervisedConfig
    session: Session
    recipe: Recipe
    folder: RunFolder
    task: Task
    examples: Examples
    steps: int

    @property
    def stage(self) -> str:
        return self.recipe.stage
