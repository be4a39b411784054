"""Runs on one base in one process: each is the run that it is by itself, and leaves nothing behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import Interrupted
from rlhf_ray.roles.turns import Seat, Seats
from rlhf_ray.stages.resume import resume
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import load_run

pytestmark = pytest.mark.integration
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def together(
    jobs: Mapping[str, PPOConfig],
    console: Any,
    seats: Seats | None = None,
    hears: Callable[[Seat], None] = lambda seat: None,
) -> dict[str, BaseException]:
    """Run all jobs on one base. Returns what they raised. hears: is told every seat, before its run begins."""
    seats = seats or Seats()
    raised: dict[str, BaseException] = {}

    def body(job: PPOConfig, seat: Seat) -> None:
        try:
            with seat.taken():
                ppo(job, console, seat)
        except BaseException as error:
            raised[seat.name] = error

    taken = {name: seats.seat(name) for name in jobs}
    threads = [threading.Thread(target=body, args=(jobs[name], seat), daemon=True) for name, seat in taken.items()]
    for seat in taken.values():
        hears(seat)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a run waits for ever"
    return raised


def weights(job: PPOConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output_dir) / ADAPTER)


def rewards(job: PPOConfig) -> list[float]:
    lines = (Path(job.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [row["reward/mean"] for row in map(json.loads, lines) if "reward/mean" in row]


def replies(job: PPOConfig) -> list[Any]:
    rows = map(json.loads, (Path(job.output_dir) / "samples.jsonl").read_text().splitlines())
    return [(row["step"], row["reply"]) for row in rows]


def test_a_run_alone_on_a_shared_base_is_the_run_without_one_bit_for_bit(ppo_job: Any, console: Any) -> None:
    apart, shared = ppo_job("apart"), ppo_job("shared")
    ppo(apart, console)
    assert together({"one": shared}, console) == {}
    assert (Path(apart.output_dir) / ADAPTER).read_bytes() == (Path(shared.output_dir) / ADAPTER).read_bytes()
    assert rewards(apart) == rewards(shared)


def test_several_runs_are_what_they_are_apart_and_leave_nothing_behind(
    ppo_job: Any, console: Any, tmp_path: Path
) -> None:
    """Other seeds, rates, shapes, ZeRO stages and penalties; a second wave on the base of the first."""
    start = ppo_job("start", max_steps=1)
    ppo(start, console)  # an adapter to start from: the reference is frozen, and the same for both
    kinds: dict[str, dict[str, Any]] = {
        "fresh": {"seed": 1, "kl_coef": 0.5},
        "sharded": {"seed": 2, "learning_rate": 3e-3, "learner": {"num_workers": 0, "num_threads": 1, "zero_stage": 2}},
        "targets": {
            "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
            "value": {"adapter": "shared"},
        },
        "tuned": {"sft": start.output_dir, "ref_model_sync_steps": 2},
        "tuned_too": {"sft": start.output_dir, "gradient_checkpointing": True, "num_generations": 2},
    }
    apart = {name: ppo_job(f"{name}_apart", **fields) for name, fields in kinds.items()}
    for job in apart.values():
        ppo(job, console)
    seats = Seats()
    shared = {name: ppo_job(f"{name}_shared", **fields) for name, fields in kinds.items()}
    assert together(shared, console, seats) == {}
    equal = total = 0
    for name, job in shared.items():
        found, expected = weights(job), weights(apart[name])
        assert found.keys() == expected.keys()
        for key, tensor in found.items():  # sums of other shapes have other last bits, which 12 updates of Adam enlarge
            torch.testing.assert_close(tensor, expected[key], atol=2e-4, rtol=0, msg=f"{name} {key}")
        said, as_expected = replies(job), replies(apart[name])
        total += len(as_expected)
        equal += sum(a == b for a, b in zip(said, as_expected, strict=True))
    assert equal == total, f"{equal} of {total} replies are equal"
    # nothing is left but the base: no adapter, and nothing that wants a gradient
    (model,) = {id(m): m for m in seats.base._wrapped.values()}.values()
    assert len(model.peft_config) == 1, "PEFT cannot be without any"
    assert not any(p.requires_grad for p in model.parameters())
    again = ppo_job("again", **kinds["fresh"])
    assert together({"again": again}, console, seats) == {}
    assert list(model.peft_config) not in (["fresh_policy"], ["frozen1"])
    assert all(torch.equal(tensor, weights(apart["fresh"])[key]) for key, tensor in weights(again).items())


def test_a_run_that_is_stopped_and_one_that_fails_leave_the_others_alone_and_resume(
    ppo_job: Any, console: Any, tmp_path: Path
) -> None:
    bad = tmp_path / "bad_reward.py"
    bad.write_text(
        "from pathlib import Path\nFAILS = Path(__file__).with_name('fails')\n\n\n"
        "def score(prompts, completions, **columns):\n    if FAILS.is_file():\n        raise RuntimeError('gone')\n"
        "    return [float(len(t)) for t in completions]\n"
    )
    (tmp_path / "fails").touch()
    fields = {"save_steps": 1, "max_steps": 4}
    whole = ppo_job("whole", **fields)
    ppo(whole, console)
    jobs = {
        "stopped": ppo_job("stopped", **fields),
        "failing": ppo_job("failing", rewards=[{"name": "bad", "function": f"{bad}:score"}], **fields),
        "good": ppo_job("good", **fields),
    }

    def hears(seat: Seat) -> None:
        if seat.name == "stopped":
            batches = seat.seats.sampling.decode
            counted = iter(range(1000))

            def decode(requests: Any) -> Any:
                if next(counted) == 3:
                    seat.stop.ask("a test")
                return batches(requests)

            seat.seats.turns._decode = decode

    raised = together(jobs, console, hears=hears)
    assert isinstance(raised.pop("stopped"), Interrupted) and "gone" in str(raised.pop("failing")) and not raised
    assert load_run(jobs["good"].output_dir).status == "done"
    (tmp_path / "fails").unlink()
    done = resume(jobs["stopped"].output_dir, console)
    assert done.status == "done" and done.steps == 4
    for key, tensor in weights(jobs["stopped"]).items():
        torch.testing.assert_close(tensor, weights(whole)[key], atol=2e-4, rtol=0)
        torch.testing.assert_close(weights(jobs["good"])[key], weights(whole)[key], atol=2e-4, rtol=0)


def test_no_run_sees_a_gradient_of_another(ppo_job: Any, console: Any) -> None:
    """Between turns only the run that has the turn wants gradients."""
    seats, found = Seats(), []
    decode = seats.sampling.decode

    def watched(requests: Any) -> Any:
        (model,) = seats.base._wrapped.values()
        found.append([n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None])
        return decode(requests)

    seats.turns._decode = watched
    assert together({"a": ppo_job("a"), "b": ppo_job("b", seed=1)}, console, seats) == {}
    assert found and not any(found)
