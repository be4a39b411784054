"""The DeepSpeed settings: whose key is whose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.deepspeed import OUR_KEYS
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.models.quantisation import refuse_offloaded
from rlhf_ray.models.zero3 import gathered
from rlhf_ray.roles.deepspeed_engine import ParameterGroup, TrainingEngine, deepspeed_settings
from rlhf_ray.roles.optimizer_state import export_state, forget_state, restore_state
from rlhf_ray.runtime.session import process_session


def test_no_precision_section_because_it_would_cast_the_adapters() -> None:
    """F16."""
    assert not {"fp16", "bf16"} & deepspeed_settings(2, None, 9).keys()


@pytest.mark.parametrize("key", OUR_KEYS)
def test_a_key_that_is_a_field_of_the_job_is_refused_by_name(tmp_path: Path, key: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: 1}))
    with pytest.raises(ConfigError, match=f"{key} is set by the job.*{OUR_KEYS[key].split()[0]}"):
        deepspeed_settings(1, str(path), 9)


def test_the_users_zero_keys_are_kept_and_all_wrong_keys_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5}, "prescale_gradients": True}))
    settings = deepspeed_settings(2, str(path), 9)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert settings["prescale_gradients"] is True
    path.write_text(json.dumps({"bf16": {}, "optimizer": {}}))
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(2, str(path), 9)
    assert len(error.value.problems) == 2


def test_the_stage_is_the_jobs_and_the_file_may_only_agree(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    agreed = deepspeed_settings(3, str(path), 9)["zero_optimization"]
    assert agreed == {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 9}
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(0, str(path), 9)
    (line,) = error.value.lines()
    assert line.endswith(
        "ds.json: zero_optimization.stage contradicts learner.zero_stage; expected 0; got 3; "
        "fix: remove it, or set learner.zero_stage=3"
    )
    assert error.value.exit_code == 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_hold_what_is_trained_and_no_more(stage: int) -> None:
    """At DeepSpeed's own size a GPU would keep 2 GB of gradients for an adapter of any size."""
    _, engine = _engine(stage)
    assert engine.engine.optimizer.reduce_bucket_size == 8
    assert deepspeed_settings(stage, None, 7 * 10**9)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_a_base_that_is_partly_on_the_cpu_is_not_trained() -> None:
    """DeepSpeed would move it to the GPU as a whole, which is what did not fit."""
    module = nn.ModuleDict({"base": nn.Linear(4, 1)})
    module["base"].hf_device_map = {"layers.0": 0, "layers.1": "cpu", "lm_head": "disk"}  # type: ignore[assignment]
    with pytest.raises(ResourceError, match=r"cpu_offload: 2 parts of the base do not fit.*layers\.1, lm_head"):
        refuse_offloaded(module)
    module["base"].hf_device_map = {"": "cuda:0"}  # type: ignore[assignment]
    refuse_offloaded(module)


def _engine(zero_stage: int, **optim: Any) -> tuple[nn.Module, TrainingEngine]:
    """A module of two weights of 4 numbers, groups `policy` and `value`, in a group of one process."""
    process_session(NullConsole(), num_threads=1)
    module = nn.ModuleDict({name: nn.Linear(4, 1, bias=False) for name in ("policy", "value")})
    groups = [ParameterGroup(name, {f"{name}.weight": module[name].weight}) for name in ("policy", "value")]
    job = {"output_dir": "x", "model_name_or_path": "x", "data": {"train": "x"}, "rewards": [{"function": "x:y"}]}
    return module, TrainingEngine(module, groups, PPOConfig.model_validate(job | optim), zero_stage, None, 1)


def _weights(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    parameters = {group.name: p for group in engine.groups for p in group.parameters.values()}
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


def _gradients(engine: TrainingEngine, policy: float, value: float) -> None:
    """Leave gradients of these norms."""
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    loss = sum(norm * engine.module.module[name](x).sum() for name, norm in (("policy", policy), ("value", value)))
    engine.accumulate(loss, last=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("limit", "policy", "value"), [(10.0, 6.0, 3.0), (1.0, 1.0, 1.0), (4.0, 4.0, 3.0)])
def test_each_group_is_clipped_to_max_grad_norm_and_nothing_more(
    stage: int, limit: float, policy: float, value: float
) -> None:
    """Adam's mean of gradients after one step is a tenth of the gradient it was given. DeepSpeed's own default clips all groups
    together to 1.0 after us: a policy of 1 beside a value model of 1 became 0.71, and no limit over 1 had an effect."""
    _, engine = _engine(stage, max_grad_norm=limit)
    _gradients(engine, 6.0, 3.0)
    norms = engine.step({"policy": 1e-3, "value": 1e-3})
    assert norms == pytest.approx({"policy": 6.0, "value": 3.0})
    state = export_state(engine)
    given = {name: 10 * float(state[f"{name}.weight::exp_avg"].norm()) for name in ("policy", "value")}
    assert given == pytest.approx({"policy": policy, "value": value}, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_group_is_as_if_it_had_never_been_there(stage: int) -> None:
    """While the value model warms up. Stepped at a learning rate of 0 with gradients of 0, Adam counted steps, and the correction
    of its start was gone when the policy's first real gradient came: its first step was up to 4 times too large."""
    rates = {"policy": 1e-2, "value": 1e-2}
    moved = []
    for idle_steps in (0, 3):
        _, engine = _engine(stage)
        for _ in range(idle_steps):
            _gradients(engine, 0.0, 1.0)
            engine.clip()
            engine.apply({**rates, "policy": 0.0}, frozen=("policy",))
        before = _weights(engine)["policy"]
        _gradients(engine, 0.5, 1.0)
        engine.clip()
        engine.apply(rates)
        moved.append(_weights(engine)["policy"] - before)
        state = export_state(engine)
        assert [float(state[f"{n}.weight::step"]) for n in ("policy", "value")] == [1.0, 1.0 + idle_steps]
    assert moved[0].abs().max() == pytest.approx(1e-2, rel=1e-3)
    torch.testing.assert_close(moved[1], moved[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_group_that_is_forgotten_steps_as_for_the_first_time(stage: int) -> None:
    """ref_model_sync_resets_optimizer. A first step of Adam is the learning rate, whatever the gradient (0.5 after three of -2);
    the other group keeps its moments."""
    rates = {"policy": 1e-2, "value": 1e-2}
    _, engine = _engine(stage)
    for _ in range(3):
        _gradients(engine, -2.0, 1.0)
        engine.step(rates)
    forget_state(engine, "policy")
    assert not any(bool(t.any()) for name, t in export_state(engine).items() if name.startswith("policy."))
    before = _weights(engine)
    _gradients(engine, 0.5, 1.0)
    engine.step(rates)
    moved = {name: float((w - before[name])[0, 0]) for name, w in _weights(engine).items()}
    assert moved["policy"] == pytest.approx(-1e-2, rel=1e-3)
    state = export_state(engine)
    assert [float(state[f"{n}.weight::step"]) for n in ("policy", "value")] == [1.0, 4.0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_with_a_group_that_was_never_stepped_comes_back(stage: int, steps: int) -> None:
    """A checkpoint in the middle of the value model's warm-up, and one before any step; also from another ZeRO stage."""
    module, engine = _engine(stage)
    for _ in range(steps):
        _gradients(engine, 0.5, 1.0)
        engine.clip()
        engine.apply({"policy": 0.0, "value": 1e-2}, frozen=("policy",))
    stored, kept = export_state(engine), _weights(engine)
    for other in (0, stage):
        again_module, again = _engine(other)
        with gathered(again_module.parameters()), torch.no_grad():
            for name, weight in kept.items():
                again_module[name].weight.copy_(weight)
        restore_state(again, stored)
        after = []
        for one in (engine, again):
            _gradients(one, 0.5, 1.0)
            one.clip()
            one.apply({"policy": 1e-2, "value": 1e-2})
            after.append((_weights(one), export_state(one)))
        torch.testing.assert_close(after[1][0], after[0][0])
        assert after[1][1].keys() == after[0][1].keys()
        for key, value in after[0][1].items():
            torch.testing.assert_close(after[1][1][key].float(), value.float(), msg=key)
        module, engine = _engine(stage)
        with gathered(module.parameters()), torch.no_grad():
            for name, weight in kept.items():
                module[name].weight.copy_(weight)
        restore_state(engine, stored)
