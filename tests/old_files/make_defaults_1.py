"""Make defaults_1.tar.xz: half-done jobs that say nothing of what got another default in version 2 of the defaults.

It was run once, at commit ffc19e4, the last one before that, in a checkout of it, as make.py was:

    python tests/old_files/make_defaults_1.py /tmp/old

base/            as in fixtures.tar.xz
runs/            finished: pipeline, sweep, ppo (on the pipeline's sft and reward)
half/            the same jobs, cut off on the way: pipeline before PPO and ppo at step 2 by kill -9, sweep after one trial of three
jobs/            the jobs of half/, to be given again with resume=auto
answers.json     on what it was made
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make
import yaml

ARCHIVE = Path(__file__).with_name("defaults_1.tar.xz")
PPO: dict[str, Any] = {**make.ROLLOUTS, "rollout_batch_size": 8, "max_steps": 20, "save_steps": 1, "eval_steps": 20}
PIPELINE: dict[str, Any] = {
    "sft": {**make.SFT, "max_steps": 2, "save_steps": 2},
    "reward": {**make.PAIRS, "max_steps": 2},
    "ppo": PPO,
    "evaluate": {"data": {"train": "data/prompts.jsonl"}, "rollout_chunk_size": 8},
}
ALONE: dict[str, Any] = {
    **PPO,
    "sft": "runs/pipeline/sft",
    "rewards": [{"name": "reward", "run": "runs/pipeline/reward"}],
}
SWEEP: dict[str, Any] = {
    "learner": {"num_threads": 1},
    "ppo": {**ALONE, "max_steps": 2, "eval_steps": 1, "watch": "ascii", "rewards": [*ALONE["rewards"], make.FUNCTION]},
    "space": {"learning_rate": [0.01, 0.02, 0.03]},
    "max_concurrent_trials": 1,
    "kl_cap": None,
}
SWEEP["ppo"]["rewards"][1] = {**make.FUNCTION, "weight": 0.0}
JOBS = {"pipeline": PIPELINE, "ppo": ALONE, "sweep": SWEEP}


def main(place: Path) -> None:
    place.mkdir()
    os.chdir(place)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LOGNAME": "somebody"}
    make.make_base(Path("base"))
    make.make_data()
    for name in JOBS:
        make.command(name, job(name, "runs"))
    for name, fault in (
        ("pipeline", "learner:step_end:call=3:kill"),  # once in sft; the second one in reward: PPO is not begun
        ("ppo", "learner:rollout:step=3:kill"),
    ):
        make.command(name, job(name, "half"), code=-signal.SIGKILL, RLHF_RAY_FAULT=fault)
    half_a_sweep()
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    import torch
    from transformers import __version__ as transformers

    made_on = {"torch": torch.__version__, "transformers": transformers, "cpu": cpu[1] if cpu else ""}
    made_on |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    Path("answers.json").write_text(json.dumps({"place": str(place), "made_on": made_on}, indent=1))
    make.ARCHIVE = ARCHIVE
    for name in JOBS:  # job files in the place itself are not packed
        Path("jobs").mkdir(exist_ok=True)
        shutil.copy(f"half-{name}.yaml", f"jobs/{name}.yaml")
    make.pack(place)


def job(name: str, folder: str) -> str:
    """The job file of run folder/name."""
    path = Path(f"{folder}-{name}.yaml")
    path.write_text(yaml.safe_dump({**make.SHARED, "output_dir": f"{folder}/{name}", **JOBS[name]}))
    return str(path)


def half_a_sweep() -> None:
    """One trial done, the others not begun."""
    Path("slow").write_text("1")
    process = subprocess.Popen([*make.COMMAND, "sweep", job("sweep", "half")])
    trials = Path("half/sweep/trials")
    while not list(trials.glob("*/summary.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(list(trials.glob("*/summary.json"))) == 1
    Path("slow").unlink()


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]).absolute())
