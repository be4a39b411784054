"""The learner's optimizer step: a DeepSpeed engine with the accumulation boundary and the clipping done by hand.

DeepSpeed averages gradients over ranks, clips all parameters together and scales by the number of accumulation steps. PPO wants
one global token count as the normaliser and a clip for policy and value each, so the loss arrives here already divided by the
global count, the average is undone by a factor of the world size, and clipping goes through DeepSpeed's public gradient access.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import OptimFields
from rlhf_ray.config.deepspeed import read_deepspeed_json
from rlhf_ray.errors import ResourceError
from rlhf_ray.models.zero3 import is_sharded


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

        _quiet()
        _compile_nothing()
        self.groups, self.world_size, self.zero_stage = tuple(groups), world_size, zero_stage
        self.max_grad_norm = optim.max_grad_norm
        settings = deepspeed_settings(zero_stage, deepspeed_json)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, optim),
            model_parameters=[p for g in groups for p in g.parameters.values()],
            config=settings,
            dist_init_required=False,
        )
        self.module = self.engine
        if zero_stage in (1, 2):
            _link_every_group(self.engine.optimizer.optimizer)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one microbatch's share of the loss; `last` marks the one after which `step` follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rates: Mapping[str, float]) -> dict[str, float]:
        """Clip each group, step, and forget the gradients. Returns each group's gradient norm before clipping."""
        norms = self.clip()
        self.apply(learning_rates)
        return norms

    def clip(self) -> dict[str, float]:
        """Clip each group. Returns each group's gradient norm before that; not finite if one gradient is not."""
        return {group.name: self._clip(group) for group in self.groups}

    def apply(self, learning_rates: Mapping[str, float]) -> None:
        """Step, and forget the gradients."""
        for ours, theirs in zip(self.groups, self.engine.optimizer.param_groups):
            theirs["lr"] = learning_rates[ours.name]
        self.engine.step()

    def skip(self) -> None:
        """Forget the gradients without a step: weights, moments and step counts stay as they are.

        DeepSpeed does its bookkeeping, and finds the optimizer under it asleep."""
        inner = self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer
        inner.step = lambda *args, **kwargs: None
        try:
            self.engine.step()
        finally:
            del inner.step

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


def _link_every_group(optimizer: torch.optim.Optimizer) -> None:
    """Make Adam's state for all parameter groups before the first of them steps.

    DeepSpeed 0.19 steps group by group and links optimizer state to parameters after the first group's first step, when the state
    of the others is not there yet: their moments could then never be read for a checkpoint."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def make_states(*_: Any) -> None:
        for p in parameters:
            if not optimizer.state[p]:
                optimizer.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )

    optimizer.register_step_pre_hook(make_states)


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


def deepspeed_settings(zero_stage: int, deepspeed_json: str | None) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, with the user's ZeRO and communication keys over it.

    Precision, batches, optimizer, schedule, clipping and the ZeRO stage are fields of the job (config/deepspeed.py).
    There is no bf16/fp16 section, because it would cast the float32 adapters as well. Clipping is off, because its default is a
    joint one to 1.0, after ours."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero_stage},
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
