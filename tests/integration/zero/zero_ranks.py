"""Functions that run on every rank of a gloo group on this machine: what a Ray Train worker group is, without Ray's start."""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from rlhf_ray.batches import Experience
from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.models import forward
from rlhf_ray.models.adapters import adapter_tensors
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.zero3 import gathered
from rlhf_ray.ppo import loop as ppo_stage
from rlhf_ray.ppo.models import assemble
from rlhf_ray.ppo.prompts import load_prompts
from rlhf_ray.ppo.setup import set_up
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.optimizer_state import export_state
from rlhf_ray.roles.ptx import PtxRows
from rlhf_ray.runtime.session import Session

PATIENCE = timedelta(seconds=120)
"""A rank that waits for a collective nobody else comes to fails after this."""


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(session, *args)` returns on each rank, as JSON. Raises if any rank does; the others are then ended."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_rank, args=(world_size, folder, function, args), nprocs=world_size)
        except mp.ProcessExitedException as error:  # a signal: where each rank was then, as it wrote down itself
            raise AssertionError(
                f"{error}\n" + "\n".join(f.read_text() for f in Path(folder).glob("*.stack"))
            ) from error
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    faulthandler.enable(Path(folder, f"{rank}.stack").open("w"))  # noqa: SIM115 (open for as long as the process lives)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    result = function(Session(rank, world_size, torch.device("cpu"), 1, NullConsole()), *args)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # nobody closes a connection that another one still reads
    dist.destroy_process_group()
    os._exit(
        0
    )  # what a rank has to say is written; how torch's and DeepSpeed's threads end with the interpreter is no claim here


def assert_sharded(models: RoleModels) -> None:
    """Outside a forward pass nothing of the base or of the adapters is here; otherwise a test of ZeRO-3 tests nothing.

    What DeepSpeed keeps whole, small tensors by default, is there from the first pass on: look before and after."""
    for name, parameter in models.named_parameters():
        assert parameter.numel() == 0 and parameter.ds_numel > 0, f"{name} is here: {tuple(parameter.shape)}"  # type: ignore[attr-defined]


def train(session: Session, jobs: Sequence[PPOConfig], head_calls: int | None = None) -> list[str]:
    """Run the jobs, one after the other. Returns the sha256 of the adapter that this rank published last, for each.

    head_calls: positions per call of the language-model head, so few that ranks with different widths need different numbers."""
    if head_calls is not None:
        forward.LOGITS_AT_ONCE = 260 * head_calls
    published: list[str] = []

    def watched(config: PPOConfig, *others: Any) -> Any:
        setup = set_up(config, *others)
        if config.learner.zero_stage == 3:
            assert_sharded(setup.learner.models)
        learners.append(setup.learner)
        return setup

    learners: list[Learner] = []
    ppo_stage.set_up = watched
    for job in jobs:
        os.environ["REPLIES"] = f"{job.output_dir}.replies_{session.rank}.jsonl"
        ppo_stage.train_ppo(job, session)
        if job.learner.zero_stage == 3:
            assert_sharded(learners[-1].models)
        published.append(learners[-1].published.sha256)
    return published


def learn(session: Session, job: PPOConfig, experience: str, out: str) -> dict[str, Any]:
    """The updates of one step on a stored Experience. Rank 0 writes adapters and optimizer state to `out`.

    Returns the published hash and the gradient norm."""
    assembly, roles = assemble(job, session.device)
    rows = load_prompts(job, assembly.base, roles.template).ptx
    learner = Learner(assembly.finish(), job, session, PtxRows(rows, job, assembly.base.pad_id))
    if job.learner.zero_stage == 3:
        assert_sharded(learner.models)
    rates = {"policy": job.learning_rate, "value": job.learning_rate}
    stats = learner.update(Experience(**load_file(experience)), 1, rates, 0.05, Guards())
    found = {f"policy.{k}": v for k, v in learner.publish().tensors.items()}
    found |= {f"value.{k}": v for k, v in adapter_tensors(learner.models.stack_of("value").peft, "value").items()}
    head = learner.models.head_of("value").weight
    with gathered([head]):
        found["head"] = head.detach().clone()
    state = export_state(learner.engine)
    if session.is_main:
        save_file(
            {k: v.contiguous() for k, v in (found | {f"optimizer.{k}": v for k, v in state.items()}).items()}, out
        )
    return {"sha256": learner.published.sha256, "norm": stats.metrics()["grad_norm/policy"]}


def learn_at_every_stage(session: Session, jobs: Sequence[PPOConfig], experience: str, folder: str) -> list[Any]:
    """`learn` with each job; job number i writes `folder`/{world size}_{i}.safetensors."""
    return [
        learn(session, job, experience, f"{folder}/{session.world_size}_{i}.safetensors") for i, job in enumerate(jobs)
    ]
