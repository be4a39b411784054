"""When each rollout is begun, and by which adapter."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.roles.generator import Decoding
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.minibatches import chunks
from rlhf_ray.roles.rollouts import Rollouts, probed_rows


class Recorder:
    """A collector that notes what is begun and finished."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(
        self, prompts: Any, budgets: Any, adapter: Any, decoding: Any, role: str, step: int, reference: Any
    ) -> int:
        self.log.append(f"begin {step} by {adapter.version}")
        return step

    def finish(self, started: int) -> Any:
        self.log.append(f"end {started}")
        return started


def rollouts(ahead: bool, last_step: int = 3) -> tuple[Rollouts, list[str]]:
    recorder = Recorder()
    return Rollouts(recorder, lambda step: ([], []), Decoding((2,)), "policy", ahead, last_step), recorder.log  # type: ignore[arg-type]


def adapter(version: int) -> PublishedAdapter:
    return PublishedAdapter(version, f"sha {version}", {})


def test_by_default_each_rollout_is_begun_when_it_is_wanted() -> None:
    source, log = rollouts(ahead=False)
    taken = [source.take(step, adapter(step - 1)) for step in (1, 2, 3)]
    assert log == ["begin 1 by 0", "end 1", "begin 2 by 1", "end 2", "begin 3 by 2", "end 3"]
    assert [s.adapter.version for s in taken] == [0, 1, 2]


def test_ahead_the_next_is_begun_before_the_update_and_nothing_after_the_last() -> None:
    source, log = rollouts(ahead=True)
    taken = [source.take(step, adapter(step - 1)) for step in (1, 2, 3)]
    assert log == ["begin 1 by 0", "end 1", "begin 2 by 0", "end 2", "begin 3 by 1", "end 3"]
    assert [s.adapter.version for s in taken] == [0, 0, 1]
    assert source.settle() is None


def test_what_has_settled_waits_for_its_step() -> None:
    source, log = rollouts(ahead=True)
    source.take(1, adapter(0))
    waiting = source.settle()
    assert waiting is not None and (waiting.step, waiting.adapter.version) == (2, 0)
    assert source.settle() is waiting, "asked twice, finished once"
    resumed, more = rollouts(ahead=True)
    resumed.pending = waiting
    assert resumed.take(2, adapter(1)) is waiting
    assert (log, more) == (["begin 1 by 0", "end 1", "begin 2 by 0", "end 2"], ["begin 3 by 1"])


def test_a_rollout_of_another_step_is_not_passed_off() -> None:
    source, _ = rollouts(ahead=True)
    source.take(1, adapter(0))
    with pytest.raises(LookupError, match=r"step 3 .* 2 was started"):
        source.take(3, adapter(2))


@pytest.mark.parametrize(("rows", "chunk", "wanted"), [(24, 4, 8), (256, 64, 16), (10, 3, 4), (5, 64, 16)])
def test_probed_rows_come_from_every_chunk(rows: int, chunk: int, wanted: int) -> None:
    picked = probed_rows(rows, chunk, wanted).tolist()
    assert len(set(picked)) == len(picked) <= rows
    assert min(rows, wanted) <= len(picked) < wanted + len(chunks(rows, chunk))
    assert all(any(row in part for row in picked) for part in chunks(rows, chunk))
