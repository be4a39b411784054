"""Roles of a PPO run that compute nothing, around the loop, the collector, the actors, the checks and the files that are real.

`train` is the body of a learner worker of control_plane.py; `build_generator` and `build_scorer` are what its actors build. A
generator answers at once with tokens of zero log-probability, a scorer with rewards that differ from row to row, the learner's
engine with log-probabilities of zero and no gradients. All that is left is what a step costs beside the models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_ray.batches import PromptBatch, Rollout, Scores
from rlhf_ray.config import PPOConfig
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult
from rlhf_ray.storage.files import sha256_tensors

if TYPE_CHECKING:
    from rlhf_ray.runtime.session import Session
    from rlhf_ray.storage.run import Run

CASES = "cases.json"
"""Beside the run folder: [{"rows", "adapter_mb", "steps"}, ...], tried one after the other by the same processes."""
PROMPT, REPLY = 64, 64
"""Tokens of each row."""
RANK, WIDTH = 16, 4096
STEP_ROWS = 64
"""Rows of a forward pass."""


class Instantly:
    """A decode engine whose replies are there when they are asked for."""

    def run(self, requests: Sequence[DecodeRequest], *_: Any) -> list[DecodeResult]:
        return [DecodeResult((7,) * r.max_new_tokens, (0.0,) * r.max_new_tokens, False) for r in requests]


class NullGenerator(Generator):
    """Takes adapters as LoadingGenerator does: a new one is copied, looked at and hashed; what is held is hashed for each chunk."""

    def __init__(self) -> None:
        super().__init__(Instantly(), 0, 0)  # type: ignore[arg-type]
        self.held: dict[str, Tensor] = {}
        self.sha256 = ""

    def describe(self) -> dict[str, Any]:
        return {}

    def generate_with(
        self,
        prompts: PromptBatch,
        adapter: ActiveAdapter,
        tensors: Mapping[str, Any],
        decoding: Decoding,
        role: str,
        step: int,
    ) -> Rollout:
        if self.sha256 != adapter.sha256:
            self.held = {key: torch.asarray(value, copy=True) for key, value in tensors.items()}
            assert all(bool(torch.isfinite(value).all()) for value in self.held.values())
            self.sha256 = sha256_tensors(self.held)
        now = ActiveAdapter(adapter.name, adapter.version, sha256_tensors(self.held))
        return self.generate(prompts, now, decoding, role, step)


class NullScorer:
    def describe(self) -> dict[str, Any]:
        return {}

    def score_at(self, rollout: Rollout, rows: Sequence[Any], temperature: float) -> Scores:
        reward = (rollout.row_id % 7).float()
        return Scores(reward, torch.zeros(rollout.response_mask.shape), rollout.row_id, {"nothing": reward})


def build_generator(config: PPOConfig, num_gpus: float) -> NullGenerator:
    return NullGenerator()


def build_scorer(config: PPOConfig, num_gpus: float) -> NullScorer:
    return NullScorer()


def adapter_of(megabytes: float) -> dict[str, Tensor]:
    """Tensors of an adapter of about this size: pairs [16, 4096] and [4096, 16]."""
    pairs = max(round(megabytes * 1e6 / (2 * 4 * RANK * WIDTH)), 1)
    names = [f"base_model.model.model.layers.{i}.mlp.up_proj" for i in range(pairs)]
    return {f"{n}.lora_A.weight": torch.ones(RANK, WIDTH) for n in names} | {
        f"{n}.lora_B.weight": torch.ones(WIDTH, RANK) for n in names
    }


class NullEngine:
    """What the learner calls in place of DeepSpeed and the models."""

    zero_stage = 0

    def module(self, kind: str, *given: Any, **how: Any) -> tuple[Tensor | None, ...]:
        seq = given[0] if kind == "both" else given[1]
        nothing = torch.zeros(seq.response_mask.shape)
        return (nothing, nothing, None, None) if kind == "both" else (nothing, None)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        pass

    def clip(self) -> dict[str, float]:
        return {"policy": 1.0}

    def apply(self, rates: Mapping[str, float], frozen: Sequence[str] = ()) -> None:
        pass


def null_learner(config: PPOConfig, session: Session, megabytes: float) -> Any:
    """A learner whose rows, minibatches, losses, hashes and files are real."""
    from rlhf_ray.models.batching import Batching
    from rlhf_ray.roles.learner import Learner, PublishedAdapter
    from rlhf_ray.roles.trained_weights import TrainedWeights

    class NullLearner(Learner):
        def __init__(self) -> None:
            self.config, self.session, self.ptx, self.lockstep = config, session, None, False
            self.batching, self.engine, self.groups = Batching.of(config), NullEngine(), []  # type: ignore[assignment]
            binding, quiet = SimpleNamespace(adapter="policy"), lambda *_: None
            stack = lambda role: SimpleNamespace(computed_tokens=lambda seq: seq.computed_tokens)  # noqa: E731
            self.models = SimpleNamespace(  # type: ignore[assignment]
                bindings={"policy": binding},
                train=quiet,
                eval=quiet,
                recompute=False,
                shares_trunk=False,
                stack_of=stack,
            )
            self.tensors, self.version = adapter_of(megabytes), 0
            self.moments = {f"{i}.{n}": torch.zeros_like(t) for i in range(2) for n, t in self.tensors.items()}
            self.published = self.publish()

        def publish(self) -> PublishedAdapter:
            next(iter(self.tensors.values()))[0, 0] += 1.0
            copied = {key: value.clone() for key, value in self.tensors.items()}
            self.published = PublishedAdapter(self.version, sha256_tensors(copied), copied)
            self.version += 1
            return self.published

        def weights(self) -> TrainedWeights:
            return TrainedWeights(self.published.tensors)

        def optimizer_state(self) -> dict[str, Tensor]:
            return {name: value.clone() for name, value in self.moments.items()}

    return NullLearner()


def set_up(config: PPOConfig, session: Session, folder: Any, megabytes: float) -> Any:
    """What `rlhf_ray.ppo.setup.set_up` makes, without models."""
    from rlhf_ray.data.collate import TokenisedPrompt
    from rlhf_ray.data.prompts import Prompt
    from rlhf_ray.data.records import Row
    from rlhf_ray.data.schedule import PromptSchedule, response_budgets
    from rlhf_ray.ppo.setup import PPOSetup, Writers
    from rlhf_ray.roles.actor_collector import RemoteRoles

    rows = config.rollout_batch_size
    prompts = [TokenisedPrompt((5,) * PROMPT, Row(f"row {i}", Prompt("nothing"))) for i in range(rows)]
    remote = RemoteRoles(session.actor_handles, session)
    collector = remote.collector(config.rollout_chunk_size, 0)
    identity = SimpleNamespace(path=config.model_name_or_path, precision="float32")
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "use_rslora", "fan_in_fan_out")
    shape = (RANK, 32.0, 0.0, ["up_proj"], [], False, False)
    more = {"task_type": None, "base_model_name_or_path": config.model_name_or_path, "revision": None}
    budgets = partial(response_budgets, rows, None, REPLY, config.seed)
    return PPOSetup(
        folder=folder,
        backbone=SimpleNamespace(identity=identity, attn_implementation="none", dtype=torch.float32),  # type: ignore[arg-type]
        learner=null_learner(config, session, megabytes),
        remote_roles=remote,
        synced_reference=None,
        engine_adapter=None,
        collector=collector,
        eval_collector=collector,
        eval_decoding=Decoding((2,)),
        schedule=PromptSchedule(prompts, rows, config.num_generations, config.seed),
        held_out=(),
        confirming=(),
        stop_ids=(2,),
        total_steps=config.max_steps,
        eval_every=config.max_steps,
        budgets=lambda step: budgets(step),
        learning_rates=lambda step: {"policy": 1e-3},
        save_due=lambda step, last: True,
        listed_saves=frozenset(),
        to_texts=_texts,
        tolerance=1e-3,
        policy_config={**dict(zip(names, shape)), **more},
        value_config={},
        writers=Writers(config, folder, session.is_main),
    )


def _texts(rollout: Rollout, rows: Sequence[Any]) -> Any:
    from rlhf_ray.rewards.protocol import Texts

    return Texts(["nothing"] * len(rows), ["nothing"] * len(rows), rollout.response_ids.tolist(), [{}] * len(rows))


class Counted:
    """Calls of Ray's by this process while the block lasts, and the references that it looked at."""

    def __init__(self) -> None:
        import ray

        self.ray, self.kept = ray, {name: getattr(ray, name) for name in ("wait", "get", "put")}
        self.calls = dict.fromkeys((*self.kept, "looked_at"), 0)

    def __enter__(self) -> Counted:
        for name, real in self.kept.items():
            setattr(self.ray, name, self._counting(name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self.kept.items():
            setattr(self.ray, name, real)

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **how: Any) -> Any:
            self.calls[name] += 1
            if name == "wait":
                self.calls["looked_at"] += len(given[0])
            return real(*given, **how)

        return call


def train(config: PPOConfig, session: Session) -> Run:
    """The body of every learner rank: all cases, one after the other."""
    from rlhf_ray.storage.run import Run

    folder = Path(config.output_dir)
    found = [one_case(config, session, case) for case in json.loads((folder.parent / CASES).read_text())]
    if session.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "found.json").write_text(json.dumps(found))
    session.barrier()
    return Run("ppo", "done", str(folder), 0, 0.0, 0)


def one_case(config: PPOConfig, session: Session, case: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds by phase of every step of `case`, and what it sent."""
    from rlhf_ray.metrics import read_metrics
    from rlhf_ray.ppo.checkpoint import enter_run
    from rlhf_ray.ppo.loop import PPOLoop

    rows, steps = case["rows"], case["steps"]
    where = f"{config.output_dir}-{rows}-{case['adapter_mb']}"
    fields = {"rollout_batch_size": rows, "max_steps": steps, "output_dir": where}
    own = config.model_copy(update=fields)
    with ExitStack() as held:
        folder = enter_run(own, session, held)
        setup = set_up(own, session, folder, case["adapter_mb"])
        loop, phases = PPOLoop(own, session, setup), []
        real = loop.monitor.phases
        loop.monitor.phases = lambda step: phases.append(real(step)) or phases[-1]  # type: ignore[method-assign,func-returns-value]
        started = time.perf_counter()
        with Counted() as counted, setup.writers, loop.monitor.watchdog.watching():
            loop.run()
        whole = time.perf_counter() - started
        alone = [bare_step(setup, own, step) for step in range(1, steps + 1)]
    told = [] if not session.is_main else list(read_metrics(folder.path / "metrics.jsonl"))
    return {
        **case,
        "chunks": -(-rows // own.rollout_chunk_size),
        "seconds": whole,
        "phases": [p.seconds for p in phases],
        "metrics": [{n: v for n, v in row.items() if n.startswith(("time/", "memory/", "sync/"))} for row in told],
        "calls": counted.calls,
        "bare": alone,
        "sizes": sizes(setup, own),
        "learner_rss": _rss(os.getpid()),
    }


def bare_step(setup: Any, config: PPOConfig, step: int) -> float:
    """Seconds of the same roles called one after the other in this process: no Ray, checks, metrics or files."""
    from rlhf_ray.maths.stats import RunningMoments
    from rlhf_ray.roles.experience import make_experience
    from rlhf_ray.roles.guards import Guards
    from rlhf_ray.roles.minibatches import chunks

    started = time.perf_counter()
    generator, scorer, learner = Generator(Instantly(), 0, 0), NullScorer(), setup.learner  # type: ignore[arg-type]
    prompts, budgets, adapter = setup.schedule.step(step), setup.budgets(step), ActiveAdapter("policy")
    sampled = [
        generator.generate(setup.collector._batch(prompts, budgets, rows), adapter, Decoding((2,)), "rollout", step)
        for rows in chunks(len(prompts), config.rollout_chunk_size)
    ]
    scores = Scores.concat([scorer.score_at(rollout, [], 1.0) for rollout in sampled])
    rollout = Rollout.concat(sampled, 0)
    evaluation = learner.evaluate(rollout, step)
    experience, _ = make_experience(rollout, scores, evaluation, config, config.kl_coef, RunningMoments())
    learner.update(experience, step, {"policy": 1e-3}, config.kl_coef, Guards())
    return time.perf_counter() - started


def sizes(setup: Any, config: PPOConfig) -> dict[str, int]:
    """Pickled bytes of one chunk's messages, and of the adapter."""
    from ray import cloudpickle

    prompts = setup.collector._batch(setup.schedule.step(1), setup.budgets(1), range(config.rollout_chunk_size))
    adapter = ActiveAdapter("policy", 1, "0" * 64)
    rollout = NullGenerator().generate(prompts, adapter, Decoding((2,)), "rollout", 1)
    scores = NullScorer().score_at(rollout, [], 1.0)
    found = {"prompts": prompts, "rollout": rollout, "scores": scores}
    return {name: len(cloudpickle.dumps(value)) for name, value in found.items()} | {
        "adapter": setup.learner.published.size_bytes
    }


def _rss(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).memory_info().rss)
