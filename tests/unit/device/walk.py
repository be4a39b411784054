"""Walks everything that touches a model once with the model on a pretend GPU (tests/pretend_gpu.py), then leaves out a move to the
device at a time, to see that each is noticed. A process of its own:

    python walk.py BASE OUTPUT          # prints {walk: what it found} and {move that was left out: what was refused} as JSON
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

spec = importlib.util.spec_from_file_location("pretend_gpu", Path(__file__).parents[2] / "pretend_gpu.py")
assert spec is not None and spec.loader is not None
pretend = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretend)


def forgotten() -> dict[str, tuple[str, Any, str, Any]]:
    """Name -> the walk that must notice, and the module, its attribute and what is put there instead."""
    from rlhf_ray.rewards import protocol
    from rlhf_ray.roles import learner
    from rlhf_ray.sampler import engine
    from rlhf_ray.serve import echo

    of, tensor = engine.Batch.of, torch.tensor

    plain = type("torch", (), {**vars(torch), "tensor": staticmethod(lambda x, device=None: tensor(x))})
    stay = lambda seq, device: seq  # noqa: E731
    return {
        "a step of the sampler": (
            "ppo",
            engine.Batch,
            "of",
            lambda rows, forward, _: of(rows, forward, torch.device("cpu")),
        ),
        "rows of the learner": ("ppo", learner, "to_device", stay),
        "rows of the scorer": ("ppo", protocol, "to_device", stay),
        "a prompt that is echoed": ("serve", echo, "torch", plain),
    }


def on_the_device(device: torch.device) -> None:
    """Every process is given this device, DeepSpeed too."""
    import deepspeed.accelerator as accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from rlhf_ray.runtime import session
    from rlhf_ray.serve import replica

    class Pretended(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return pretend.NAME

        def current_device_name(self) -> str:
            return str(device)

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == pretend.NAME

    accelerator.set_accelerator(Pretended())
    session.own_device = lambda: device
    replica.own_device = lambda: device


def jobs(base: Path, output: Path) -> tuple[dict[str, Any], Path, Path]:
    """Fields that all jobs have, a file of instructions, a file of preferences."""
    plain, pairs = output / "rows.jsonl", output / "pairs.jsonl"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i * 7}."} for i in range(60)]
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    better = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "No."} for r in rows]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in better))
    common = {
        "model_name_or_path": str(base),
        "template": "none",
        "learner": {"num_workers": 0, "num_threads": 1},
        "report_to": [],
        "max_steps": 1,
        "gradient_checkpointing": True,
    }
    return common, plain, pairs


def walk_ppo(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A reward run, then PPO with value model, reference, reward model and ptx: every role and every pass."""
    from rlhf_ray import ppo, reward
    from rlhf_ray.config import PPOConfig, RewardConfig

    common, plain, pairs = jobs(base, output)
    small = {"lora": {"r": 2}, "per_device_train_batch_size": 4}
    if not (output / "reward").exists():
        data = {"train": str(pairs)}
        reward(RewardConfig(output_dir=str(output / "reward"), data=data, train_batch_size=8, **small, **common))
    fields = {
        "output_dir": tempfile.mkdtemp(prefix="ppo-", dir=output) + "/run",
        "data": {"train": str(plain), "eval_max_rows": 4},
        "rewards": [{"name": "model", "run": str(output / "reward")}],
        "rollout_batch_size": 16,
        "rollout_chunk_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "entropy_coef": 0.01,
        "ptx_coef": 0.1,
        "ptx_data": {"train": str(plain)},
        "allow_chance_rewards": True,
    }
    run = ppo(PPOConfig(**{**fields, **small, **common, **changes}))
    return {"steps": run.steps, "reward": run.metrics.get("eval/reward"), "run": run.run_dir}


def walk_sharded(base: Path, output: Path) -> dict[str, Any]:
    """PPO with ZeRO 2, with statistics of the group in place of a value model, and resets of the reference."""
    learner = {"num_workers": 0, "num_threads": 1, "zero_stage": 2}
    group = {"advantage_estimator": "grpo", "num_generations": 2, "ref_model_sync_steps": 1}
    return walk_ppo(base, output, learner=learner, **group)


def walk_sft(base: Path, output: Path) -> dict[str, Any]:
    from rlhf_ray import sft
    from rlhf_ray.config import SFTConfig

    common, plain, _ = jobs(base, output)
    fields = {"lora": {"r": 2}, "train_batch_size": 8, "per_device_train_batch_size": 4, "max_length": 64}
    run = sft(SFTConfig(output_dir=str(output / "sft"), data={"train": str(plain)}, **fields, **common))
    return {"steps": run.steps}


def walk_evaluate(base: Path, output: Path) -> dict[str, Any]:
    """Policies side by side, with rows of several adapters."""
    from rlhf_ray import evaluate
    from rlhf_ray.config import EvaluateConfig

    trained = walk_ppo(base, output)["run"]
    common, plain, _ = jobs(base, output)
    del common["max_steps"], common["gradient_checkpointing"]
    config = EvaluateConfig(
        output_dir=tempfile.mkdtemp(prefix="evaluate-", dir=output) + "/run",
        data={"train": str(plain), "eval_max_rows": 4},
        policies=[{"name": "base", "policy": "base"}, {"name": "ppo", "policy": trained}],
        rewards=[{"name": "model", "run": str(output / "reward")}],
        response_length=6,
        **common,
    )
    return {"metrics": len(evaluate(config).metrics)}


def walk_serve(base: Path, output: Path) -> dict[str, Any]:
    """A replica that writes with two adapters at once, compares, scores replies, and echoes a prompt's log-probabilities."""
    from rlhf_ray.config.serve import ServeConfig
    from rlhf_ray.serve.generation import GenerationRequest
    from rlhf_ray.serve.replica import Replica

    trained = walk_ppo(base, output)["run"]
    runs = {"a": trained, "b": trained, "judge": str(output / "reward")}
    config = ServeConfig(
        output_dir=tempfile.mkdtemp(prefix="serve-", dir=output),
        model_name_or_path=str(base),
        template="none",
        adapters=runs,
        reward="judge",
    )

    async def ask() -> list[Any]:
        replica = Replica(config)
        await replica.start()
        request = GenerationRequest(
            models=("a", "b", "base"),
            prompts=({"text": "Say 1."},),
            n=2,
            max_tokens=4,
            reward=True,
            kl=True,
            logprobs=True,
        )
        found = [event async for events in replica.events(request, whole=True) for event in events]
        echoed = GenerationRequest(
            models=("a",), prompts=({"raw": "Say 1."},), n=1, max_tokens=2, logprobs=True, top_logprobs=2, echo=True
        )
        found += [event async for events in replica.events(echoed, whole=True) for event in events]
        await replica.check_health()
        await replica.close()
        return found

    events = asyncio.run(ask())
    errors = [event["error"] for event in events if "error" in event]
    if errors:
        raise RuntimeError(str(errors))
    return {"events": len(events)}


WALKS = {"sft": walk_sft, "ppo": walk_ppo, "sharded": walk_sharded, "evaluate": walk_evaluate, "serve": walk_serve}


def main() -> None:
    base, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    noticed: dict[str, Any] = {}
    with pretend.pretend_gpu() as device:
        on_the_device(device)
        for name, walk in WALKS.items():
            found[name] = walk(base, output)
        found["refused"] = list(pretend.refused)
        for name, (which, where, attribute, instead) in forgotten().items():
            pretend.refused.clear()
            with mock.patch.object(where, attribute, instead):
                try:
                    WALKS[which](base, output)
                except Exception as error:
                    noticed[name] = {"refused": pretend.refused[:1], "error": type(error).__name__}
                else:
                    noticed[name] = {"refused": pretend.refused[:1], "error": ""}
    print(json.dumps({"found": found, "noticed": noticed}))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
