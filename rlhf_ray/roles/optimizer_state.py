"""The optimizer's state by parameter name, whatever the ZeRO stage and world size: what a checkpoint stores.

DeepSpeed flattens and shards optimizer state; its public accessors assemble it. At stage 0 they return None, and torch's own state
is read instead. Measured in DeepSpeed 0.19: state is lazy, so a restore needs one step at learning rate 0 first, and the moments
alone are not enough, Adam's step count must follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return export_torch_state(engine.adam, _parameters(engine))
    found: dict[str, Tensor] = {}
    if not engine.adam.state:
        return found  # before the first step, where the accessors fail
    for group, count in zip(engine.groups, _step_counts(engine)):
        for name, parameter in group.parameters.items():
            for key, value in _zero_state(parameter, count).items():
                found[f"{name}::{key}"] = value.detach().cpu().clone()
    return found


def restore_state(engine: TrainingEngine, stored: Mapping[str, Tensor]) -> None:
    """Put an exported state back. Raises ArtifactError if it names other parameters than the engine has."""
    parameters = _parameters(engine)
    _check_names([set(group.parameters) for group in engine.groups], stored)
    if engine.zero_stage == 0:
        _put_torch_state(engine.adam, parameters, stored)
    else:
        _restore_zero(engine, parameters, stored)


def forget_state(engine: TrainingEngine, group: str) -> None:
    """Put the optimizer's state of one parameter group back to what it is before the first step; weights stay."""
    for ours, flat in zip(engine.groups, engine.flat_parameters() if engine.zero_stage else [[]] * len(engine.groups)):
        if ours.name != group:
            continue
        for parameter in ours.parameters.values() if engine.zero_stage == 0 else ():
            engine.adam.state.pop(parameter, None)
        for state in (engine.adam.state[p] for p in flat):  # ZeRO has linked these to the parameters: they must stay
            for key, value in state.items():
                state[key] = value.zero_() if isinstance(value, Tensor) else 0.0


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
    _check_names([set(parameters)], stored)
    _put_torch_state(optimizer, parameters, stored)


def _put_torch_state(
    optimizer: Any, parameters: Mapping[str, torch.nn.Parameter], stored: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        prefix = f"{name}::"
        state = {k.removeprefix(prefix): v.clone() for k, v in stored.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {k: _as_it_was(k, v, parameter.device) for k, v in state.items()}


def _as_it_was(key: str, value: Tensor, device: torch.device) -> Tensor | int:
    """Adam counts steps in a float tensor on the CPU, others in an int."""
    if key != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _check_names(groups: Sequence[set[str]], stored: Mapping[str, Tensor]) -> None:
    """A group of which nothing is stored has not been stepped yet: its updates were left out, or the value model warmed up."""
    names = {key.rpartition("::")[0] for key in stored}
    wanted = {name for group in groups if group & names for name in group}
    if names != wanted:
        different = sorted(names ^ wanted)
        raise ArtifactError.at(
            "optimizer.safetensors", f"parameters differ: {', '.join(different[:3])} ({len(different)})"
        )


def _parameters(engine: TrainingEngine) -> dict[str, torch.nn.Parameter]:
    return {name: p for group in engine.groups for name, p in group.parameters.items()}


def _zero_state(parameter: torch.nn.Parameter, count: Tensor) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    if any(v is None for v in state.values()):
        return {}
    return {**state, "step": count}


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
        for key in MOMENTS:
            if f"{name}::{key}" in stored:  # else the step above leaves moments of 0
                _set_moment(parameter, stored[f"{name}::{key}"].to(parameter.device), key)
    counts = [stored.get(f"{next(iter(group.parameters))}::step", torch.tensor(0.0)) for group in engine.groups]
    _set_step_counts(engine, counts)
    if [float(count) for count in _step_counts(engine)] != [float(count) for count in counts]:
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


def _step_counts(engine: TrainingEngine) -> list[Tensor]:
    """Adam's step count of each group. Under ZeRO the wrapped torch optimizer holds it, for this rank's share of the group."""
    return [
        torch.as_tensor(engine.adam.state[group[0]]["step"]).float().cpu().clone() if group else torch.tensor(0.0)
        for group in engine.flat_parameters()
    ]


def _set_step_counts(engine: TrainingEngine, counts: Sequence[Tensor]) -> None:
    """DeepSpeed has no public setter."""
    for group, count in zip(engine.flat_parameters(), counts):
        for state in (engine.adam.state[p] for p in group):
            state["step"] = count.clone() if isinstance(state["step"], Tensor) else float(count)
