"""What each part of the product may import: counted in modules, not in seconds, in interpreters of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
"""The last line of stdout is the list of all modules that were imported."""


def imported(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", CODE.format(code=code)], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def command(*words: str) -> str:
    return f"from rlhf_ray.cli import main\nassert main({list(words)!r}) in (0, 2)"


JOBS = Path(__file__).parents[2] / "jobs"
HEAVY = "torch ray transformers peft datasets pandas"
REFUSED: tuple[tuple[str, ...], ...] = (
    ("ppo", "nowhere.yaml"),
    ("ppo", "nowhere.yaml", "no_such_field=1"),
    ("sweep", "nowhere.yaml"),
    ("serve", "nowhere.yaml"),
    ("plan", "nowhere.yaml"),
    ("resume", "nowhere"),
    ("report", "nowhere"),
    ("merge", "nowhere"),
    ("promote", "nowhere", "--alias", "a"),
    ("rollback", "nowhere"),
    ("generate", "--policy", "./nowhere", "--instruction", "hello"),
    ("chat", "--policy", "./nowhere"),
    ("score", "--run", "./nowhere", "--prompt", "a", "--completion", "b"),
    ("submit", "nowhere.yaml"),
    ("doctor", "nowhere.yaml"),
    *(
        (stage, str(JOBS / job), "no_such_field=1")
        for stage, job in (
            ("ppo", "ppo_2xa100_split.yaml"),
            ("pipeline", "tiny.yaml"),
            ("sweep", "sweep_kl.yaml"),
            ("reward", "smollm2_judge.yaml"),
        )
    ),
)
NOT_FOR_PPO = "transformers.trainer rlhf_ray.supervised datasets pandas ray.train deepspeed"


@pytest.mark.parametrize(
    ("code", "forbidden", "most"),
    [
        ("import rlhf_ray", f"{HEAVY} pydantic numpy", 150),
        (command("--help"), f"{HEAVY} pydantic_core numpy rich", 400),
        *((command(*words), HEAVY, 700) for words in REFUSED),
        ("import rlhf_ray.ppo.loop", NOT_FOR_PPO, 4300),
        ("import rlhf_ray.supervised.sft", "rlhf_ray.ppo ray.train deepspeed", 5200),
        # The service's API process and Serve's proxy have no model.
        ("import rlhf_ray.serve.app", "torch transformers peft deepspeed", 2600),
        ("import rlhf_ray.serve.api", f"{HEAVY} deepspeed", 700),
        ("import rlhf_ray.serve.admission", f"{HEAVY} deepspeed", 400),
    ],
    ids=[
        *("package", "help"),
        *(" ".join((words[0], Path(words[1]).name, *words[2:3])) for words in REFUSED),
        *("import ppo", "import sft", "import serve.app", "import serve.api", "import serve.admission"),
    ],
)
def test_nothing_is_imported_that_is_not_needed(code: str, forbidden: str, most: int) -> None:
    found = imported(code)
    heavy = [name for name in forbidden.split() if name in found]
    assert not heavy, f"{code!r} imports {', '.join(heavy)}"
    assert len(found) <= most, f"{code!r} imports {len(found)} modules"
