"""What the log says about rows that were not used as they are."""

from __future__ import annotations

from rlhf_ray.data.counts import Tally, describe_rows


def test_one_reason_and_several() -> None:
    tally = Tally("dropped")
    assert (str(tally), tally.total) == ("0 dropped", 0)
    for line in range(14, 26):
        tally.add("over max_length 256", f"alpaca.jsonl:{line}", f"{line + 297} tokens")
    account = describe_rows(2012, {"train": 1800, "held out": 200}, tally, Tally("truncated"))
    assert account == (
        "2,012 rows: 1,800 train, 200 held out, 12 dropped: over max_length 256 (first alpaca.jsonl:14, 311 tokens)"
    )
    tally.add("draw", "b.jsonl:3")
    assert (
        str(tally) == "13 dropped: 12 over max_length 256 (first alpaca.jsonl:14, 311 tokens), 1 draw (first b.jsonl:3)"
    )
    assert tally.counts() == {"over max_length 256": 12, "draw": 1}


def test_update_keeps_the_first_row_and_leaves_the_other_alone() -> None:
    one, other = Tally("dropped"), Tally("dropped")
    one.add("draw", "a:1")
    other.add("draw", "b:1")
    other.add("late", "b:2")
    one.update(other)
    one.add("late", "c:1")
    assert str(one) == "4 dropped: 2 draw (first a:1), 2 late (first b:2)"
    assert other.counts() == {"draw": 1, "late": 1}
