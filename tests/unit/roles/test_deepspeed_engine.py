"""The DeepSpeed settings: whose key is whose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.config.deepspeed import OUR_KEYS
from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.deepspeed_engine import deepspeed_settings


def test_no_precision_section_because_it_would_cast_the_adapters() -> None:
    """F16."""
    assert not {"fp16", "bf16"} & deepspeed_settings(2, None).keys()


@pytest.mark.parametrize("key", OUR_KEYS)
def test_a_key_that_is_a_field_of_the_job_is_refused_by_name(tmp_path: Path, key: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({key: 1}))
    with pytest.raises(ConfigError, match=f"{key} is set by the job.*{OUR_KEYS[key].split()[0]}"):
        deepspeed_settings(1, str(path))


def test_the_users_zero_keys_are_kept_and_all_wrong_keys_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5}, "prescale_gradients": True}))
    settings = deepspeed_settings(2, str(path))
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert settings["prescale_gradients"] is True
    path.write_text(json.dumps({"bf16": {}, "optimizer": {}}))
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(2, str(path))
    assert len(error.value.problems) == 2


def test_the_stage_is_the_jobs_and_the_file_may_only_agree(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    agreed = deepspeed_settings(3, str(path))["zero_optimization"]
    assert agreed == {"stage": 3, "stage3_param_persistence_threshold": 0}
    with pytest.raises(ConfigError) as error:
        deepspeed_settings(0, str(path))
    (line,) = error.value.lines()
    assert line.endswith(
        "ds.json: zero_optimization.stage contradicts learner.zero_stage; expected 0; got 3; "
        "fix: remove it, or set learner.zero_stage=3"
    )
    assert error.value.exit_code == 2
