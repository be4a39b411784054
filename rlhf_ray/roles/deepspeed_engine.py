"""The learner's optimizer step: a DeepSpeed engine with the accumulation boundary and the clipping done by hand.

DeepSpeed averages gradients over ranks, clips all parameters together and scales by the number of accumulation steps. PPO wants
one global token count as the normaliser and a clip for policy and value each, so the loss arrives here already divided by the
global count, the average is undone by a factor of the world size, and clipping goes through DeepSpeed's public gradient access.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import OptimFields
from rlhf_ray.config.deepspeed import read_deepspeed_json
from rlhf_ray.errors import ResourceError
from rlhf_ray.models.quantisation import refuse_offloaded
from rlhf_ray.models.zero3 import is_sharded, whole_numel

BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces together, by its own default."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a clipping norm, by their names."""

    name: str
    parameters: Mapping[str, nn.Parameter]


class TrainingEngine:
    """Accumulate losses, then step. `module` is what forwards must go through (its hooks matter under ZeRO-3)."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        optim: OptimFields,
        zero_stage: int,
        deepspeed_json: str | None,
        world_size: int,
    ) -> None:
        import deepspeed

        refuse_offloaded(module)
        _quiet()
        _compile_nothing()
        self.groups, self.world_size, self.zero_stage = tuple(groups), world_size, zero_stage
        self.max_grad_norm = optim.max_grad_norm
        trained = sum(whole_numel(p) for g in groups for p in g.parameters.values())
        settings = deepspeed_settings(zero_stage, deepspeed_json, trained)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, optim),
            model_parameters=[p for g in groups for p in g.parameters.values()],
            config=settings,
            dist_init_required=False,
        )
        self.module = self.engine

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one microbatch's share of the loss; `last` marks the one after which `step` follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer that steps: torch's own, around which ZeRO is wrapped."""
        optimizer: torch.optim.Optimizer = (
            self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer
        )
        return optimizer

    def step(self, learning_rates: Mapping[str, float]) -> dict[str, float]:
        """Clip each group, step, and forget the gradients. Returns each group's gradient norm before clipping."""
        norms = self.clip()
        self.apply(learning_rates)
        return norms

    def clip(self) -> dict[str, float]:
        """Clip each group. Returns each group's gradient norm before that; not finite if one gradient is not."""
        return {group.name: self._clip(group) for group in self.groups}

    def apply(self, learning_rates: Mapping[str, float], frozen: Collection[str] = ()) -> None:
        """Step, and forget the gradients. Groups named `frozen` keep weights, moments and step counts as they are."""
        for ours, theirs in zip(self.groups, self.engine.optimizer.param_groups):
            theirs["lr"] = learning_rates[ours.name]
        self._make_states()
        self._step_without(frozen)

    def skip(self) -> None:
        """Forget the gradients without a step: weights, moments and step counts stay as they are."""
        self._step_without([group.name for group in self.groups])

    def _step_without(self, frozen: Collection[str]) -> None:
        """DeepSpeed steps and does its bookkeeping, and finds the optimizer under it asleep for frozen groups."""
        adam = self.adam
        idle = [theirs for ours, theirs in zip(self.groups, self.engine.optimizer.param_groups) if ours.name in frozen]
        step = adam.step

        def step_the_others(*args: Any, **kwargs: Any) -> None:
            every = adam.param_groups
            adam.param_groups = [group for group in every if not any(group is other for other in idle)]
            try:
                if adam.param_groups:
                    step(*args, **kwargs)
            finally:
                adam.param_groups = every

        adam.step = step_the_others  # type: ignore[method-assign, assignment]
        try:
            self.engine.step()
        finally:
            del adam.step  # type: ignore[method-assign]

    def flat_parameters(self) -> list[list[Tensor]]:
        """Under ZeRO, what the optimizer under it steps: of each group, this rank's share, in one or more pieces."""
        zero = self.engine.optimizer
        if self.zero_stage < 3:
            return [list(group["params"]) for group in self.adam.param_groups]
        places = [zero.sub_group_to_group_id[i] for i in range(len(zero.fp32_partitioned_groups_flat))]
        return [
            [p for p, place in zip(zero.fp32_partitioned_groups_flat, places) if place == number]
            for number in range(len(self.groups))
        ]

    def _make_states(self) -> None:
        """Make Adam's state of all groups, where ZeRO is.

        DeepSpeed 0.19 steps group by group and links optimizer state to parameters after the first group's first step, when the
        state of the others is not there yet: their moments could then never be read for a checkpoint."""
        if self.zero_stage == 0:
            return
        for p in (p for group in self.flat_parameters() for p in group):
            if not self.adam.state[p]:
                self.adam.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )

    def _clip(self, group: ParameterGroup) -> float:
        from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        gradients = {n: safe_get_full_grad(p) for n, p in group.parameters.items()}
        missing = [n for n, g in gradients.items() if g is None]
        if missing:
            raise RuntimeError(
                f"no gradient reached {missing[0]} ({len(missing)} of {len(gradients)} parameters of {group.name})"
            )
        norm = float(
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients.values()]))
        )
        scale = self.max_grad_norm / (norm + 1e-6)
        if scale < 1.0:
            for name, parameter in group.parameters.items():
                if is_sharded(parameter):
                    safe_set_local_grad(parameter, safe_get_local_grad(parameter) * scale)
                else:
                    safe_set_full_grad(parameter, gradients[name] * scale)
        return norm


def _quiet() -> None:
    """DeepSpeed tells its progress, and calls collectives by names that torch is about to change: nothing a user can act on."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)


def _compile_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs when it is first used.

    It needs a compiler and a minute, and a process that is killed while it compiles leaves a lock behind that every later run
    waits for, for ever. Without it CPU ranks talk through gloo."""
    from deepspeed import ops

    compatible = getattr(ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False


def build_optimizer(groups: Sequence[ParameterGroup], optim: OptimFields) -> torch.optim.Optimizer:
    """One torch optimizer with a parameter group for each of ours; learning rates are set at every step."""
    grouped: list[dict[str, Any]] = [{"params": list(g.parameters.values()), "lr": 0.0} for g in groups]
    betas, eps, decay = (optim.adam_beta1, optim.adam_beta2), optim.adam_epsilon, optim.weight_decay
    if optim.optim == "adamw_torch":
        return torch.optim.AdamW(grouped, betas=betas, eps=eps, weight_decay=decay)
    if optim.optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(grouped, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ResourceError.at("optim", "adamw_8bit needs bitsandbytes", fix="pip install 'rlhf_ray[quant]'") from error
    return AdamW8bit(grouped, betas=betas, eps=eps, weight_decay=decay)


def deepspeed_settings(zero_stage: int, deepspeed_json: str | None, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, with the user's ZeRO and communication keys over it.

    trained: parameters that are. Buckets of gradients hold no more: at DeepSpeed's own size an adapter of 10 M parameters would
    keep 2 GB of them.

    Precision, batches, optimizer, schedule, clipping and the ZeRO stage are fields of the job (config/deepspeed.py).
    There is no bf16/fp16 section, because it would cast the float32 adapters as well. Clipping is off, because its default is a
    joint one to 1.0, after ours."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": min(BUCKET, max(trained, 1))},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if deepspeed_json is None:
        return settings
    theirs = read_deepspeed_json(deepspeed_json, zero_stage)
    zero = {**settings["zero_optimization"], **theirs.pop("zero_optimization", {})}
    return {**settings, **theirs, "zero_optimization": zero}
