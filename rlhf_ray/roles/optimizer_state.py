"""The optimizer's state by parameter name, whatever the ZeRO stage and world size: what a checkpoint stores.

DeepSpeed flattens and shards optimizer state; its public accessors assemble it. At stage 0 they return None, and torch's own state
is read instead. Measured in DeepSpeed 0.19: state is lazy, so a restore needs one step at learning rate 0 first, and the moments
alone are not enough, Adam's step count must follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.zero3 import gathered, is_sharded, own_share
from rlhf_ray.roles.deepspeed_engine import TrainingEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


def export_state(engine: TrainingEngine) -> dict[str, Tensor]:
    """{parameter name}::{key} -> tensor on the CPU. A collective under ZeRO: every rank must call it."""
    if engine.zero_stage == 0:
        return export_torch_state(engine.engine.optimizer, _parameters(engine))
    found: dict[str, Tensor] = {}
    for name, parameter in _parameters(engine).items():
        for key, value in _zero_state(engine, parameter).items():
            found[f"{name}::{key}"] = value.detach().cpu().clone()
    return found


def restore_state(engine: TrainingEngine, stored: Mapping[str, Tensor]) -> None:
    """Put an exported state back. Raises ArtifactError if it names other parameters than the engine has."""
    parameters = _parameters(engine)
    if engine.zero_stage == 0:
        restore_torch_state(engine.engine.optimizer, parameters, stored)
    else:
        _check_names(parameters, stored)
        _restore_zero(engine, parameters, stored)


def export_torch_state(optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The state of any optimizer of torch's kind, in the form of `export_state`; numbers become tensors of no dimension."""
    return {
        f"{name}::{key}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_torch_state(
    optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor]
) -> None:
    """Put back what `export_torch_state` gave. Raises ArtifactError if it names other parameters."""
    _check_names(parameters, stored)
    for name, parameter in parameters.items():
        prefix = f"{name}::"
        state = {k.removeprefix(prefix): v.clone() for k, v in stored.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {k: _as_it_was(k, v, parameter.device) for k, v in state.items()}


def _as_it_was(key: str, value: Tensor, device: torch.device) -> Tensor | int:
    """Adam counts steps in a float tensor on the CPU, others in an int."""
    if key != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _check_names(parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor]) -> None:
    """Nothing at all is the state before the first update, where all so far were left out."""
    if not stored:
        return
    names = {key.rpartition("::")[0] for key in stored}
    if names != set(parameters):
        different = sorted(names ^ set(parameters))
        raise ArtifactError.at(
            "optimizer.safetensors", f"parameters differ: {', '.join(different[:3])} ({len(different)})"
        )


def _parameters(engine: TrainingEngine) -> dict[str, torch.nn.Parameter]:
    return {name: p for group in engine.groups for name, p in group.parameters.items()}


def _zero_state(engine: TrainingEngine, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    if not engine.engine.optimizer.optimizer.state:
        return {}  # before the first step, where the accessors fail
    state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    if any(v is None for v in state.values()):
        return {}
    return {**state, "step": _zero_step(engine)}


def _restore_zero(
    engine: TrainingEngine, parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor]
) -> None:
    with gathered(parameters.values()):
        for (
            parameter
        ) in parameters.values():  # the weights were restored in the model; ZeRO steps from a copy of its own
            _set_master(parameter, parameter.detach().clone())
        zero = torch.stack([(p * 0).sum() for p in parameters.values()]).sum()
        engine.accumulate(zero, last=True)
    engine.step({group.name: 0.0 for group in engine.groups})
    for name, parameter in parameters.items():
        for key in MOMENTS if stored else ():  # the step above leaves moments of 0
            _set_moment(parameter, stored[f"{name}::{key}"].to(parameter.device), key)
    count = next((v for k, v in stored.items() if k.endswith("::step")), torch.tensor(0.0))
    _set_zero_step(engine, count)
    if not torch.equal(_zero_step(engine), count.float().cpu()):
        raise ArtifactError.at("optimizer.safetensors", "this DeepSpeed does not take Adam's step count back")


def _set_master(parameter: torch.nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_sharded(parameter):
        safe_set_local_fp32_param(parameter, own_share(parameter, value, dist.get_rank()))
    else:
        safe_set_full_fp32_param(parameter, value)


def _set_moment(parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_sharded(parameter):
        safe_set_local_optimizer_state(parameter, own_share(parameter, value, dist.get_rank()), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _zero_step(engine: TrainingEngine) -> Tensor:
    inner = engine.engine.optimizer.optimizer
    counts = [torch.as_tensor(s["step"]).float().cpu() for s in inner.state.values() if "step" in s]
    return counts[0] if counts else torch.tensor(0.0)


def _set_zero_step(engine: TrainingEngine, count: Tensor) -> None:
    """DeepSpeed has no public setter; under ZeRO the wrapped torch optimizer holds the count."""
    for state in engine.engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = count.clone() if isinstance(state["step"], Tensor) else float(count)
