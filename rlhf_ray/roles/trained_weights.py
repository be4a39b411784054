"""What PPO trains, as plain tensors: the policy's adapter, the value model's adapter and head. Read from and put back into the
models here, and nowhere else; under ZeRO-3 both are collectives, which every rank calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.models.adapters import adapter_tensors, load_adapter_tensors
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.zero3 import gathered


@dataclass(frozen=True)
class TrainedWeights:
    """On the CPU. policy, value: plain PEFT keys -> f32.  head: f32[1, D].  value, head: None without a value model."""

    policy: dict[str, Tensor]
    value: dict[str, Tensor] | None = None
    head: Tensor | None = None


def read_weights(models: RoleModels, policy: dict[str, Tensor]) -> TrainedWeights:
    """policy: as it was published. The value model as it is now."""
    if "value" not in models.bindings:
        return TrainedWeights(policy)
    value = adapter_tensors(models.stack_of("value").peft, str(models.bindings["value"].adapter))
    weight = models.head_of("value").weight
    with gathered([weight]):
        return TrainedWeights(policy, value, weight.detach().to("cpu", torch.float32, copy=True))


def load_weights(models: RoleModels, weights: TrainedWeights) -> None:
    """Put back what `read_weights` gave."""
    load_adapter_tensors(models.stack_of("policy").peft, str(models.bindings["policy"].adapter), weights.policy)
    if weights.value is None or weights.head is None:
        return
    load_adapter_tensors(models.stack_of("value").peft, str(models.bindings["value"].adapter), weights.value)
    weight = models.head_of("value").weight
    with gathered([weight], change=True):
        weight.data.copy_(weights.head)
