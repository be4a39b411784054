"""Run folders as the stages write them, with made-up numbers that behave like real ones."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

PROMPTS = (
    "Write a short story about a lost key.",
    "Tell a story about a dog who learns to share.",
    "Describe a rainy day in the village.",
    "Write about two friends who find a map.",
)
PLAIN = "Tom saw a key. The key was in the mud. He took it home and put it in a box. Then he went to bed."
WARM = "Tom was happy. He found the key with his best friend, and they smiled and laughed all the way home."
HASH = "0f3a9c" * 11


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_common(path: Path, stage: str, config: dict, status: str, metrics: dict | None, seconds: float) -> None:
    path.mkdir(parents=True, exist_ok=True)
    config = {"output_dir": str(path), "seed": 7, "model_name_or_path": "models/tiny-llama", "dtype": "auto", **config}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    parents = {"reward": ["sft"], "ppo": ["sft", "reward"]}.get(stage, [])
    manifest = {
        "schema": 1,
        "stage": stage,
        "status": status,
        "created": "2026-03-04T10:11:12+00:00",
        "parents": [{"role": p, "path": f"runs/demo/{p}", "sha256": p[0].encode().hex() * 32} for p in parents],
        "base": {
            "path": "models/tiny-llama",
            "revision": None,
            "config_sha256": HASH[:64],
            "weights_sha256": HASH[1:65],
        },
        "tokenizer_sha256": HASH[2:66],
        "template": {"name": "alpaca", "sha256": HASH[3:67]},
        "data": [{"path": "data/stories.jsonl", "sha256": HASH[:64], "rows": 4000, "used": 3600}],
        "seed": 7,
        "threads": 2,
        "versions": {
            "rlhf_ray": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "ray": "2.60.0",
        },
        "git_commit": None,
        "files": {"adapter/adapter_model.safetensors": {"sha256": HASH[:64], "bytes": 1234567}}
        if status == "done"
        else {},
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    if status == "done":
        summary = {"stage": stage, "status": "done", "run_dir": str(path), "steps": 60, "seconds": seconds, "seed": 7}
        summary |= {"metrics": metrics or {}, "artifacts": {"adapter": "adapter", "report": "report.html"}}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def ppo_row(step: int, total: int, rng: random.Random) -> dict:
    """One step of a run that learns: reward saturates, KL grows, entropy and clip fraction shrink, the value model catches up."""
    t = step / total
    reward = -0.4 + 2.3 * (1 - math.exp(-3.2 * t)) + rng.gauss(0, 0.08)
    k1 = 9.5 * (1 - math.exp(-2.2 * t)) + rng.gauss(0, 0.35) * (0.3 + t)
    rate = 2e-5 * min(step / 3, 1) * (1 - 0.9 * max(t - 0.05, 0) / 0.95)
    generate, score, update = 2.1 + rng.gauss(0, 0.08), 0.55 + rng.gauss(0, 0.02), 3.4 + rng.gauss(0, 0.1)
    return {
        "step": step,
        "reward/mean": reward,
        "reward/std": 0.9 - 0.35 * t + rng.gauss(0, 0.02),
        "kl/k1_per_response": k1,
        "kl/k3_per_response": 9.2 * (1 - math.exp(-2.2 * t)) + abs(rng.gauss(0, 0.12)),
        "kl/penalty_per_response": k1,
        "kl/coef": 0.05,
        "response/length": 74 + 9 * t + rng.gauss(0, 1.4),
        "response/finished": min(0.78 + 0.2 * t + rng.gauss(0, 0.01), 1.0),
        "ratio/first_minibatch_max_deviation": 0.0,
        "ratio/mean": 1 + rng.gauss(0, 0.001),
        "ratio/max": 1.6 + abs(rng.gauss(0, 0.3)),
        "policy/clip_fraction": 0.02 + 0.11 * math.exp(-2 * t) + rng.gauss(0, 0.006),
        "policy/approx_kl": 0.002 + 0.008 * math.exp(-2 * t) + abs(rng.gauss(0, 0.0006)),
        "policy/entropy": 1.9 - 0.6 * t + rng.gauss(0, 0.02),
        "loss/policy": rng.gauss(-0.01, 0.006),
        "loss/value": 0.4 * math.exp(-4 * t) + 0.05 + abs(rng.gauss(0, 0.01)),
        "value/explained_variance": 0.72 - 1.1 * math.exp(-6 * t) + rng.gauss(0, 0.03),
        "value/clip_fraction": 0.15 * math.exp(-3 * t),
        "grad_norm/policy": 0.5 + abs(rng.gauss(0, 0.08)),
        "grad_norm/value": 1.4 * math.exp(-2 * t) + 0.2 + abs(rng.gauss(0, 0.05)),
        "lr/policy": rate,
        "lr/value": rate * 2,
        "sampler/logprob_difference": 2e-7 + abs(rng.gauss(0, 2e-8)),
        "sync/bytes": 412_672,
        "tokens/generated": round(256 * (74 + 9 * t)),
        "time/generate": generate,
        "time/score": score,
        "time/update": update,
        "time/publish": 0.06,
        "time/step": generate + score + update + 0.1,
        "memory/rss": 9.1e8 + 2e6 * t,
    }


def write_ppo(path: Path, steps: int = 60, total: int = 60, done: bool = True, response: str | None = None) -> Path:
    """A PPO run with evaluations every six steps and four samples per step."""
    rng, rows, samples = random.Random(1), [], []
    for step in range(steps + 1):
        row = ppo_row(step, total, rng) if step else {"step": 0}
        if step % 6 == 0:
            row |= {
                "eval/reward": -0.45 + 2.1 * (1 - math.exp(-3.0 * step / total)) + rng.gauss(0, 0.03),
                "eval/reward_se": 0.06,
                "eval/kl_k1_per_response": 9.3 * (1 - math.exp(-2.2 * step / total)),
                "eval/length": 74 + 9 * step / total,
                "eval/finished": min(0.78 + 0.2 * step / total, 1.0),
                "time/evaluate": 4.0,
            }
        rows.append(row)
        for i, prompt in enumerate(PROMPTS if step else ()):
            text = response or (WARM if rng.random() < step / total else PLAIN)
            figures = {
                "reward": row["reward/mean"] + rng.gauss(0, 0.5),
                "kl": row["kl/k1_per_response"],
                "length": len(text.split()),
            }
            samples.append(
                {"step": step, "row": i, "prompt": alpaca(prompt), "reply": text, **figures, "finished": i != 3}
            )
    config = {
        "max_steps": total,
        "sft": "runs/demo/sft",
        "rewards": [{"name": "reward", "run": "runs/demo/reward"}],
        "kl_penalty": "kl",
        "kl_coef": 0.05,
        "cliprange": 0.2,
        "max_grad_norm": 1.0,
    }
    write_common(
        path, "ppo", config, "done" if done else "running", {k: v for k, v in rows[-1].items() if k != "step"}, 431.5
    )
    write_lines(path / "metrics.jsonl", rows)
    write_lines(path / "samples.jsonl", samples)
    return path


def write_sft(path: Path) -> Path:
    rng, rows = random.Random(2), []
    for step in range(5, 121, 5):
        row = {
            "step": step,
            "loss": 1.1 + 2.4 * math.exp(-step / 25) + rng.gauss(0, 0.03),
            "learning_rate": 2e-4 * (1 - step / 121),
        }
        row |= {"grad_norm": 0.8 + abs(rng.gauss(0, 0.1)), "epoch": step / 60, "tokens/train": step * 4100}
        rows.append(row | ({"eval/loss": 1.15 + 2.3 * math.exp(-step / 24)} if step % 15 == 0 else {}))
    write_common(
        path, "sft", {"max_steps": 120, "learning_rate": 2e-4}, "done", {"loss": 1.12, "eval/loss": 1.16}, 48.2
    )
    write_lines(path / "metrics.jsonl", rows)
    return path


def write_reward(path: Path) -> Path:
    rng, rows = random.Random(3), []
    for step in range(5, 101, 5):
        row = {
            "step": step,
            "loss": 0.35 + 0.35 * math.exp(-step / 30) + rng.gauss(0, 0.02),
            "learning_rate": 1e-4 * (1 - step / 101),
        }
        row |= {
            "accuracy": 0.86 - 0.3 * math.exp(-step / 30) + rng.gauss(0, 0.02),
            "margin": 1.9 * (1 - math.exp(-step / 40)),
        }
        row |= {"grad_norm": 1.1 + abs(rng.gauss(0, 0.2)), "epoch": step / 100}
        if step % 20 == 0:
            accuracy = 0.83 - 0.3 * math.exp(-step / 30)
            row |= {
                "eval/accuracy": accuracy,
                "eval/accuracy_low": accuracy - 0.04,
                "eval/accuracy_high": accuracy + 0.035,
            }
            row |= {"eval/loss": 0.4 + 0.3 * math.exp(-step / 30), "eval/margin": 1.7 * (1 - math.exp(-step / 40))}
            row |= {"eval/label_positive_rate": 0.51, "eval/positive_rate": 0.5, "eval/true_positive_rate": 0.82}
            row |= {"eval/false_positive_rate": 0.17, "eval/length_correlation": 0.08, "eval/rows": 400}
        rows.append(row)
    write_common(path, "reward", {"max_steps": 100, "learning_rate": 1e-4}, "done", {"eval/accuracy": 0.82}, 61.0)
    write_lines(path / "metrics.jsonl", rows)
    return path


def write_evaluate(path: Path) -> Path:
    policies = {
        "base": (-1.1, 0.09, 0.21, 0.0, 64.0),
        "sft": (-0.42, 0.06, 0.5, 0.0, 74.0),
        "ppo": (1.62, 0.06, 0.93, 9.1, 82.5),
    }
    metrics, samples = {}, []
    for name, (reward, error, wins, kl, length) in policies.items():
        metrics |= {
            f"reward/{name}": reward,
            f"reward_se/{name}": error,
            f"win_rate/{name}": wins,
            f"win_rate_se/{name}": 0.02,
        }
        if name != "sft":
            gap = reward + 0.42
            metrics |= {
                f"score_difference{end}/{name}": gap + 0.1 * by for end, by in (("", 0), ("_low", -1), ("_high", 1))
            }
        metrics |= {
            f"kl_k1_per_response/{name}": kl,
            f"length/{name}": length,
            f"finished/{name}": 0.9,
            f"rows/{name}": 400,
        }
    for prompt in PROMPTS:
        for name in policies:
            response = WARM if name == "ppo" else PLAIN
            samples.append(
                {"step": 0, "policy": name, "prompt": alpaca(prompt), "reply": response, "reward": policies[name][0]}
            )
    config = {"policies": [{"name": n, "policy": n if n == "base" else f"runs/demo/{n}"} for n in policies]}
    config |= {"baseline": "sft", "rewards": [{"name": "judge", "run": "runs/demo/reward"}]}
    write_common(path, "evaluate", config, "done", metrics, 22.0)
    write_lines(path / "samples.jsonl", samples)
    return path


def write_demo(path: Path) -> Path:
    metrics = {}
    for name, value, error in (("base", -0.2, 0.05), ("sft", 0.31, 0.04), ("ppo", 1.94, 0.05)):
        metrics |= {f"true_reward/{name}": value, f"true_reward_se/{name}": error, f"evaluate/draws/{name}": 0.1}
    metrics |= {
        "reward/loss": 0.4,
        "reward/eval/accuracy": 0.8,
        "sft/loss": 1.1,
        "ppo/reward/mean": 1.7,
        "ppo/length/ppo": 1.0,
    }
    write_common(path, "demo", {"stages": ["sft", "reward", "ppo", "evaluate"]}, "done", metrics, 570.0)
    for stage, write in (
        ("sft", write_sft),
        ("reward", write_reward),
        ("ppo", write_ppo),
        ("evaluate", write_evaluate),
    ):
        write(path / stage)
    return path


def alpaca(instruction: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


@pytest.fixture
def fake() -> SimpleNamespace:
    """fake.ppo(path), fake.sft(path), ...: write a run folder and return its path."""
    return SimpleNamespace(
        ppo=write_ppo, sft=write_sft, reward=write_reward, evaluate=write_evaluate, demo=write_demo, lines=write_lines
    )
