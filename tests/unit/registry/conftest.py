"""Run folders as training leaves them, written by the project's own writers, without the training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.data.templates import load_template
from rlhf_ray.models.adapter_files import save_adapter
from rlhf_ray.registry import Registry
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, create_run, write_checkpoint

SHAPE = {
    "r": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "use_rslora": False,
    "fan_in_fan_out": False,
}
GOOD = ((0, 0.30, 0.02, 0.0), (5, 0.60, 0.02, 1.5), (10, 0.70, 0.02, 2.5))
"""(step, eval/reward, its standard error, KL): a run that improved."""


def tensors(seed: int, zero_b: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    found = {}
    for layer in range(2):
        found[key.format(layer, "A")] = torch.randn(4, 64, generator=generator)
        found[key.format(layer, "B")] = torch.randn(64, 4, generator=generator) * (0 if zero_b else 1)
    return found


def hash_of(text: str) -> str:
    return (text.encode().hex() * 64)[:64]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """make_run("name", stage=, seed=, evals=, base=, template=, steps=, **config): a finished run with checkpoints of all steps."""

    def make(
        name: str,
        *,
        stage: str = "ppo",
        seed: int = 0,
        evals: Any = GOOD,
        base: str = "tiny",
        template: str = "alpaca_short",
        zero_b: bool = False,
        done: bool = True,
        alpha: float = 8.0,
        parents: Any = (),
        rows: Any = None,
        **config: Any,
    ) -> RunFolder:
        run = create_run(tmp_path / name, stage, {"seed": seed, "template": template, **config}, "never")
        shape, steps = {**SHAPE, "lora_alpha": alpha}, [e[0] for e in evals if e[0]] or [10]
        head = torch.ones(1, 64) if stage == "reward" else None
        kind = "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"

        def save(folder: Path, offset: int) -> None:
            save_adapter(folder / "adapter", tensors(seed + offset, zero_b), shape, kind, head, f"/models/{base}")  # type: ignore[arg-type]

        for step in steps:
            write_checkpoint(run, step, lambda folder, step=step: save(folder, 100 * (step != steps[-1])), 10)  # type: ignore[misc]
        found = rows
        if rows is None:
            found = [
                {"step": s, "eval/reward": r, "eval/reward_se": e, "eval/kl_k1_per_response": k, "eval/rows": 64.0}
                for s, r, e, k in evals
            ]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        run.update_manifest(
            base={
                "path": f"/models/{base}",
                "revision": None,
                "config_sha256": hash_of(f"c{base}"),
                "weights_sha256": hash_of(base),
                "precision": "float32",
            },
            tokenizer_sha256=hash_of("tokenizer"),
            template=load_template(template).manifest(),
            stop_token_ids=[2],
            parents=list(parents),
        )
        if done:
            save(run.path, 0)
            Run(stage, "done", str(run.path), steps[-1], 1.0, seed, {"best/step": 5.0}).save()
            run.seal()
        return run

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    yield Registry(tmp_path / "registry")
    for folder in (tmp_path / "registry" / "adapters").glob("*"):  # so that pytest can clean up where it is not root
        folder.chmod(0o755)
