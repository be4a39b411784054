"""Runs that share a process: one at a time, all of them in one batch, and none hurts another. No model is needed for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from rlhf_ray.roles.turns import Turns
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult


def request(token: int) -> DecodeRequest:
    return DecodeRequest(prompt_ids=(token,), row_seed=0, max_new_tokens=1, stop_ids=())


class Decoder:
    """Answers each request with its prompt. batches: who was in which."""

    def __init__(self, broken: str = "", raises: int = -1) -> None:
        self.batches: list[dict[str, int]] = []
        self.broken, self.raises = broken, raises

    def __call__(self, requests: Mapping[str, Sequence[DecodeRequest]]) -> dict[str, Any]:
        self.batches.append({name: len(mine) for name, mine in requests.items()})
        if len(self.batches) - 1 == self.raises:
            raise RuntimeError("the batch is lost")
        found: dict[str, Any] = {
            name: [DecodeResult(r.prompt_ids, (0.0,), False) for r in mine] for name, mine in requests.items()
        }
        return {name: ValueError("broken") if name == self.broken else r for name, r in found.items()}


def run_all(turns: Turns, runs: dict[str, Callable[[], None]], begin: bool = True) -> dict[str, BaseException]:
    """Each of `runs` in a thread, registered in their order. Returns what they raised."""
    raised: dict[str, BaseException] = {}

    def body(name: str) -> None:
        try:
            turns.begin(name)
            runs[name]()
        except BaseException as error:
            raised[name] = error
        finally:
            turns.leave(name)

    for name in runs:
        turns.register(name)
    threads = [threading.Thread(target=body, args=(name,), daemon=True) for name in reversed(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a run waits for ever"
    return raised


def test_one_runs_at_a_time_in_order_and_all_are_decoded_together() -> None:
    decoder, seen, inside = Decoder(), [], []
    turns = Turns(decoder)

    def run(name: str, steps: int) -> Callable[[], None]:
        def body() -> None:
            for step in range(steps):
                assert not inside, "two runs at once"
                inside.append(name)
                seen.append((name, step))
                inside.remove(name)
                assert [r.token_ids for r in turns.sample(name, [request(10 * step + ord(name))] * 2)] == [
                    (10 * step + ord(name),)
                ] * 2

        return body

    assert run_all(turns, {"a": run("a", 3), "b": run("b", 1), "c": run("c", 3)}) == {}
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2), ("c", 2)]
    assert decoder.batches == [{"a": 2, "b": 2, "c": 2}, {"a": 2, "c": 2}, {"a": 2, "c": 2}]


def test_a_run_that_fails_takes_nobody_with_it() -> None:
    """Outside of sampling, in its own rows, and before its first turn."""
    decoder = Decoder(broken="broken")
    turns, done = Turns(decoder), []

    def good() -> None:
        for _ in range(3):
            turns.sample("good", [request(1)])
        done.append("good")

    def fails() -> None:
        turns.sample("fails", [request(1)])
        raise KeyError("of its own")

    def broken() -> None:
        turns.sample("broken", [request(1)])

    raised = run_all(turns, {"fails": fails, "broken": broken, "good": good})
    assert done == ["good"]
    assert {name: type(error) for name, error in raised.items()} == {"fails": KeyError, "broken": ValueError}
    assert decoder.batches == [{"fails": 1, "broken": 1, "good": 1}, {"good": 1}, {"good": 1}]


def test_a_batch_that_is_lost_is_told_to_all_and_the_next_one_goes_on() -> None:
    decoder = Decoder(raises=0)
    turns, again = Turns(decoder), []

    def run(name: str) -> Callable[[], None]:
        def body() -> None:
            with pytest.raises(RuntimeError, match="the batch is lost"):
                turns.sample(name, [request(1)])
            again.append(turns.sample(name, [request(7)])[0].token_ids)

        return body

    assert run_all(turns, {"a": run("a"), "b": run("b")}) == {}
    assert again == [(7,), (7,)]


def test_a_run_that_comes_later_is_in_the_next_batch_and_whose_turn_it_is_is_told() -> None:
    decoder, told = Decoder(), []
    turns = Turns(decoder, told.append)
    late: list[threading.Thread] = []

    def second() -> None:
        turns.begin("b")
        turns.sample("b", [request(1)])
        turns.leave("b")

    def first() -> None:
        turns.sample("a", [request(1)])
        turns.register("b")  # it is waited for from here on
        late.append(threading.Thread(target=second, daemon=True))
        late[0].start()
        turns.sample("a", [request(1)])

    assert run_all(turns, {"a": first}) == {}
    late[0].join(20)
    assert not late[0].is_alive()
    assert decoder.batches == [{"a": 1}, {"a": 1, "b": 1}]
    assert told == ["a", "", "a", "b", "", "a", "b"]


def test_a_run_that_never_begins_is_not_waited_for() -> None:
    turns = Turns(Decoder())
    turns.register("a")
    turns.register("b")
    turns.leave("a")
    turns.begin("b")
    assert turns.sample("b", [request(3)])[0].token_ids == (3,)
    with pytest.raises(ValueError, match="b is there already"):
        turns.register("b")
