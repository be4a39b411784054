"""metrics.py: the table of names, cleaning, the files and the trackers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import ArtifactError, InvariantError, ResourceError
from rlhf_ray.metrics import METRICS, MetricsWriter, SamplesWriter, clean, describe, figure, read_metrics

# The contract with users and checks, copied from the documentation and not from the code.
PPO_CONTRACT = """
    reward/mean kl/k1_per_response kl/k3_per_response kl/penalty_per_response kl/coef response/length response/finished
    ratio/first_minibatch_max_deviation policy/clip_fraction policy/approx_kl policy/entropy value/explained_variance
    grad_norm/policy grad_norm/value time/generate time/score time/update time/publish time/step sync/bytes tokens/generated
"""
OTHERS = """
    loss learning_rate epoch grad_norm tokens/train eval/loss eval/accuracy eval/accuracy_low eval/accuracy_high eval/margin
    eval/label_positive_rate eval/positive_rate eval/true_positive_rate eval/false_positive_rate eval/reward eval/reward_se
    eval/kl_k1_per_response eval/length eval/finished loss/policy loss/value reward/std ratio/mean ratio/max value/mean
    sampler/logprob_difference returns/mean advantage/std lr/policy lr/value kl/clamped_share
"""


@pytest.mark.parametrize("name", [*PPO_CONTRACT.split(), *OTHERS.split()])
def test_named_metrics_have_an_entry_of_their_own(name: str) -> None:
    assert METRICS[name].meaning


@pytest.mark.parametrize(
    "name",
    [
        "reward/helpful",
        "true_reward/ppo",
        "true_reward_se/base",
        "memory/rss",
        "faults/other",
        "data/dropped",
        "time/x",
    ],
)
def test_open_groups_are_covered_by_patterns(name: str) -> None:
    assert describe(name).meaning and name not in METRICS


def test_an_exact_entry_wins_over_a_pattern_and_patterns_do_not_overlap() -> None:
    assert describe("reward/std") is METRICS["reward/std"]
    assert describe("eval/reward/x") is METRICS["eval/reward/*"]
    assert describe("time/generate") is METRICS["time/generate"]
    prefixes = [name[:-1] for name in METRICS if name.endswith("*")]
    assert not [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)]


@pytest.mark.parametrize("name", ["reward", "reward/", "reward/*", "policy/typo", "", "loss/"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        describe(name)
    with pytest.raises(InvariantError, match="without an entry"):
        clean(name, 1.0)


def test_only_time_memory_and_faults_may_differ_between_equal_runs() -> None:
    varying = {name.split("/")[0] for name, metric in METRICS.items() if not metric.deterministic}
    assert varying == {"time", "memory", "faults"}
    assert all(metric.deterministic for name, metric in METRICS.items() if name.split("/")[0] not in varying)


def test_trl_names_are_unique() -> None:
    names = [metric.trl for metric in METRICS.values() if metric.trl]
    assert len(names) == len(set(names)) >= 15


@pytest.mark.parametrize("value", [1.5, np.float32(1.5), torch.tensor(1.5), torch.tensor([1.5]), np.array(1.5)])
def test_clean_makes_a_python_float(value: object) -> None:
    assert type(clean("loss", value)) is float and clean("loss", value) == 1.5


def test_clean_takes_integers_and_booleans() -> None:
    assert clean("loss", 3) == 3.0 and clean("loss", True) == 1.0 and clean("loss", np.int64(4)) == 4.0


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), None, "1.0x", [1.0, 2.0], torch.ones(2)]
)
def test_clean_names_metric_and_step_of_what_is_not_a_finite_number(value: object) -> None:
    with pytest.raises(InvariantError, match=r"step 12: loss/policy: not (finite|a number)"):
        clean("loss/policy", value, 12)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_the_file_bit_for_bit(value: float) -> None:
    assert json.loads(json.dumps(clean("loss", value))).hex() == value.hex()


def test_rows_are_lines_of_json_flushed_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": np.float32(0.1), "grad_norm": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.10000000149011612, "grad_norm": 2.0}\n'
    writer.close()


def test_a_row_with_one_bad_metric_is_not_written_at_all(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        with pytest.raises(InvariantError, match="step 2: grad_norm"):
            writer.write(2, {"loss": 1.0, "grad_norm": math.nan})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_resume_cuts_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    """F7: a resumed run has every step once, in order."""
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": float(step)})
        length = writer.bytes
        writer.write(3, {"loss": 33.0})
    with MetricsWriter(tmp_path) as writer:
        assert writer.resume_at(length, 2) == ""
        assert writer.bytes == length
        for step in (3, 4):
            writer.write(step, {"loss": float(step)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": s, "loss": float(s)} for s in (1, 2, 3, 4)]


def test_resume_goes_on_with_a_file_that_is_not_the_checkpoints_and_says_what_is_lost(tmp_path: Path) -> None:
    """Too short, not cut between lines there, or gone: rows up to the checkpoint's step stay, and no step is there twice."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
        assert "expected 9999 bytes at step 2; got 75; the 2 rows up to there are kept" in (writer.resume_at(9999, 2))
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        assert f"{path}: does not match its checkpoint" in writer.resume_at(writer.bytes - 1, 2)
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        writer.write(3, {"loss": 3.0})
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    path.unlink()
    with MetricsWriter(tmp_path) as writer:
        assert "got 0; the 0 rows up to there" in writer.resume_at(75, 3)
        writer.write(4, {"loss": 4.0})
        assert writer.resume_at(0, 0) == ""
    assert path.read_bytes() == b""


def test_a_torn_last_line_is_left_out_and_then_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss": 2.0})
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("torn", [b"", b"\n", b"\0\0\0\0\n", b'{"step": 2, "loss": 2.0'])
def test_reading_ends_before_a_torn_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + torn)
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("bad", [b"not json\n", b"[1, 2]\n", b'"text"\n'])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
    with pytest.raises(ArtifactError, match=r"metrics.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_samples_keep_any_text(tmp_path: Path) -> None:
    texts = ["<script>alert(1)</script>", "line\nbreak\r\u2028", "\ud800 lone", "naïve 語", "\x00\x1b[31m", ""]
    with SamplesWriter(tmp_path) as writer:
        writer.write(
            3,
            [
                {"prompt": "p", "reply": t, "reward": np.float32(0.5), "finished": True, "parts": {"a": 1}}
                for t in texts
            ],
        )
        length = writer.bytes
        writer.write(4, [{"prompt": "p", "reply": "later"}])
        assert writer.resume_at(length, 3) == ""
    rows = read_metrics(tmp_path / "samples.jsonl")
    assert [row["reply"] for row in rows] == texts
    assert rows[0] == {"step": 3, "prompt": "p", "reply": texts[0], "reward": 0.5, "finished": True, "parts": {"a": 1}}


def test_samples_refuse_figures_that_are_not_finite(tmp_path: Path) -> None:
    with SamplesWriter(tmp_path) as writer, pytest.raises(InvariantError, match="step 1: samples: reward: not finite"):
        writer.write(1, [{"prompt": "p", "reply": "r", "reward": math.nan}])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"wandb is not installed.*rlhf_ray\[wandb\]"):
        MetricsWriter(tmp_path, ("tensorboard", "wandb"))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_a_copy_and_hides_steps_that_were_undone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, ("tensorboard",)) as writer:
        writer.write(1, {"reward/mean": 0.5})
        length = writer.bytes
        writer.write(2, {"reward/mean": 99.0})
    with MetricsWriter(tmp_path, ("tensorboard",)) as writer:
        assert writer.resume_at(length, 1) == ""
        writer.write(2, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (12345, "12,345"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (9.996, "10.0"),
        (12345.6, "12,346"),
        (0.0631, "0.063"),
        (0.00361, "0.0036"),
        (2e-5, "2.0e-5"),
        (-1.25, "-1.25"),
        (3e12, "3.0e12"),
    ],
)
def test_figures_for_people(value: float, text: str) -> None:
    assert figure(value) == text
