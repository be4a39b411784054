"""ZeRO stage 3, where every forward pass is a collective: against the other stages, on one rank and two, and over a restart.

`assert_sharded` comes before everything else: with DeepSpeed's default threshold the parameters of a tiny model stay whole, and
every test below would pass without testing anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zero_ranks import learn_at_every_stage, on_ranks, train

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.maths.stats import RunningMoments
from rlhf_ray.metrics import read_metrics
from rlhf_ray.ppo.checkpoint import enter_run
from rlhf_ray.ppo.loop import PPOLoop
from rlhf_ray.ppo.setup import set_up
from rlhf_ray.roles.experience import make_experience
from rlhf_ray.runtime.session import process_session
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run_folder import sha256_tensors
from tests.encoders import KINDS

pytestmark = [pytest.mark.integration, pytest.mark.slow]
Job = Callable[..., PPOConfig]
HERE = {"num_workers": 0, "num_threads": 1}


def weights(folder: str, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / name / "adapter_model.safetensors")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def deterministic(folder: str) -> list[dict[str, Any]]:
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


def responses(job: PPOConfig) -> list[Any]:
    """(prompt, reply ids) of everything that was scored, in the order of ranks and calls."""
    files = [Path(f"{job.output_dir}.replies_{rank}.jsonl") for rank in range(2)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def experience(zero_job: Job, tmp_path: Path) -> str:
    """A step's Experience, sampled and evaluated in this process, in a file."""
    job, session = (
        zero_job("stored", 0, learner=HERE, lora={"r": 3, "lora_alpha": 6}),
        process_session(NullConsole(), 1),
    )
    with ExitStack() as held:
        loop = PPOLoop(job, session, set_up(job, session, enter_run(job, session, held)))
    prompts, budgets = loop.setup.schedule.step(1), loop.setup.budgets(1)
    collected = loop.collector.collect(prompts, budgets, loop.hand_over.active(), loop.rollouts.decoding, "rollout", 1)
    evaluation = loop.learner.evaluate(collected.rollout, 1)
    made, _ = make_experience(collected.rollout, collected.scores, evaluation, job, 0.05, RunningMoments())
    path = str(tmp_path / "experience.safetensors")
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    save_file({name: tensor.contiguous() for name, tensor in fields.items() if tensor is not None}, path)
    return path


def test_one_and_two_ranks_and_all_stages_learn_the_same(zero_job: Job, experience: str, tmp_path: Path) -> None:
    """From one stored Experience, three updates later: weights within 1e-6, and one published hash on all ranks.

    The gradient clip binds, and one of the adapters' tensors cannot be cut into equal halves (its last share is filled up)."""
    changes = {"num_ppo_epochs": 3, "num_mini_batches": 1, "max_grad_norm": 0.05, "lora": {"r": 3, "lora_alpha": 6}}
    jobs = [zero_job(f"stage_{s}", s, **changes) for s in range(4)]
    for world_size in (1, 2):
        ranks = on_ranks(world_size, learn_at_every_stage, jobs, experience, str(tmp_path))
        for stage, told in enumerate(zip(*ranks)):
            assert len({rank["sha256"] for rank in told}) == 1, "every rank publishes the same adapter"
            assert told[0]["norm"] > 0.05, "the clip must bind"
            found = load_file(tmp_path / f"{world_size}_{stage}.safetensors")
            policy = {k.removeprefix("policy."): v for k, v in found.items() if k.startswith("policy.")}
            assert sha256_tensors(policy) == told[0]["sha256"]
    expected = load_file(tmp_path / "1_0.safetensors")
    assert max(float(t.abs().max()) for k, t in expected.items() if "lora_B" in k) > 1e-3, "it must have moved"
    for world_size in (1, 2):
        for stage in range(4):
            gap = difference(expected, load_file(tmp_path / f"{world_size}_{stage}.safetensors"))
            assert gap < 1e-6, f"{world_size} ranks, stage {stage}: {gap:.2g}"


def test_a_whole_run_gives_the_adapter_and_the_replies_of_stage_0(zero_job: Job) -> None:
    """Sampling, scoring, evaluation and updates in lockstep, with replies that end at different steps and unequal prompts, and a
    reference that is reset after step 1."""
    resets = {"ref_model_sync_steps": 1, "ref_model_sync_resets_optimizer": True}
    plain, sharded = zero_job("plain", 0, **resets), zero_job("sharded", 3, **resets)
    alone = zero_job("alone", 0, learner=HERE, **resets)
    ranks = on_ranks(2, train, [plain, sharded], 7)
    assert ranks[0] == ranks[1], "every rank published the same adapter"
    said = responses(sharded)
    assert responses(plain) == said
    assert len({len(ids) for _, ids in said}) > 4 and len({len(prompt) for prompt, _ in said}) > 4
    assert difference(weights(plain.output_dir), weights(sharded.output_dir)) < 1e-5
    assert difference(weights(plain.output_dir, "value"), weights(sharded.output_dir, "value")) < 1e-5
    assert sha256_tensors(weights(sharded.output_dir)) == ranks[0][1], "what was published is what was saved"
    ppo(alone, NullConsole())
    assert difference(weights(alone.output_dir), weights(sharded.output_dir)) < 1e-5


@pytest.fixture
def reward_model(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Callable[..., str]:
    """A whole reward model with a base of its own; bos=False: and a tokenizer of its own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def make(**options: Any) -> str:
        base, folder = tiny_llama(seed=3, **options), tmp_path / f"reward_model_{options.get('bos', True)}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
            torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return str(folder)

    return make


def test_encoders_that_score(zero_job: Job, encoder: Callable[..., Path]) -> None:
    """Their forward passes are collectives too: two ranks with unequal chunks, one of them empty, learn as at stage 0."""
    rewards = [{"name": kind, "model": str(encoder(kind))} for kind in KINDS]
    plain, sharded = (zero_job(f"stage_{stage}", stage, rewards=rewards, max_steps=1) for stage in (0, 3))
    on_ranks(2, train, [plain, sharded], 7)
    for name in ("adapter", "value"):
        assert difference(weights(plain.output_dir, name), weights(sharded.output_dir, name)) < 1e-5
    assert any(bool(t.any()) for k, t in weights(sharded.output_dir).items() if "lora_B" in k)
    for ours, theirs in zip(deterministic(sharded.output_dir), deterministic(plain.output_dir), strict=True):
        for name in (f"reward/{kind}" for kind in KINDS):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4)


@pytest.mark.long
def test_what_else_a_run_can_have(zero_job: Job, reward_model: Callable[..., str]) -> None:
    """At stage 3 as at stage 0: recomputed activations, a reward model and critic on a base of their own, a reward model that reads
    text, half precision, a value model on the policy's adapter, no critic."""
    judge, reader = ([{"name": "judge", "model": reward_model(bos=bos)}] for bos in (True, False))
    variants: list[dict[str, Any]] = [
        {"gradient_checkpointing": True, "rewards": judge},
        {"value": {"adapter": "shared"}, "rewards": reader},
        {"dtype": "bfloat16", "advantage_estimator": "rloo", "num_generations": 4},
    ]
    jobs = [
        [zero_job(f"variant_{i}_{stage}", stage, max_steps=1, **changes) for stage in (0, 3)]
        for i, changes in enumerate(variants)
    ]
    on_ranks(2, train, [job for pair in jobs for job in pair], 7)
    # bfloat16 gradients depend on the order of sums: 0.000502 was seen, of the 0.001 that one step of Adam moves a weight.
    for (plain, sharded), limit in zip(jobs, (1e-5, 1e-5, 1e-3)):
        assert difference(weights(plain.output_dir), weights(sharded.output_dir)) < limit
        assert any(bool(t.any()) for k, t in weights(sharded.output_dir).items() if "lora_B" in k)
    with_two_bases, in_half_precision = jobs[0], jobs[2]
    assert difference(*(weights(job.output_dir, "value") for job in with_two_bases)) < 1e-5
    before_the_update = slice(3 + 12)  # of rank 0: the first evaluation and its two chunks
    assert responses(in_half_precision[0])[before_the_update] == responses(in_half_precision[1])[before_the_update]


@pytest.mark.long
def test_under_ray_train(zero_job: Job, console: Any) -> None:
    """The same run in the project's own worker group of two; its header says what it costs."""
    sharded, plain = zero_job("sharded", 3, max_steps=1), zero_job("plain", 0, max_steps=1, learner=HERE)
    ppo(sharded, console)
    ppo(plain, NullConsole())
    assert difference(weights(plain.output_dir), weights(sharded.output_dir)) < 1e-5
    assert "every token decoded gathers the whole base again" in console.text and "placement: split" in console.text


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_bits(zero_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """F7 at stage 3: masters, moments and Adam's step count come back from their shares; two ranks each time."""
    common: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "eval_steps": 3, "lora": {"r": 3, "lora_alpha": 6}}
    straight, broken = zero_job("straight", 3, **common), zero_job("broken", 3, resume="auto", **common)
    on_ranks(2, train, [straight])
    monkeypatch.setenv("FAIL_AT_CALL", "4")  # rank 0: an evaluation, two chunks a step; so in step 2
    with pytest.raises(Exception, match="the reward service is gone"):
        on_ranks(2, train, [broken])
    monkeypatch.delenv("FAIL_AT_CALL")
    assert [path.name for path in Path(broken.output_dir).glob("checkpoints/step_*")] == ["step_000001"]
    on_ranks(2, train, [broken])
    for name in ("adapter", "value"):
        assert difference(weights(straight.output_dir, name), weights(broken.output_dir, name)) == 0.0
    assert deterministic(straight.output_dir) == deterministic(broken.output_dir)
