"""Following a registry: what has changed, once, at a cost that does not grow with its names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.registry import Registry, RegistryFollower, follow, store
from rlhf_ray.registry.alias import Alias
from rlhf_ray.storage.files import atomic_write_json

MakeAlias = Callable[..., Alias]


@pytest.fixture
def registry(tmp_path: Path, alias_of: MakeAlias) -> Registry:
    (tmp_path / "aliases").mkdir()
    atomic_write_json(tmp_path / "registry.json", {"schema": 1})
    for i in range(50):
        alias_of(f"name{i:02d}").write(tmp_path / "aliases" / f"name{i:02d}.json")
    return Registry(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the file of each name was read, and the folder was looked through."""
    counted: Counter[str] = Counter()
    read_alias, stamps = follow.read_alias, Registry.stamps

    def counting(path: Path, name: str) -> Alias:
        counted[name] += 1
        return read_alias(path, name)

    def looking(self: Registry) -> Any:
        counted["the folder"] += 1
        return stamps(self)

    monkeypatch.setattr(follow, "read_alias", counting)
    monkeypatch.setattr(store, "read_alias", counting)
    monkeypatch.setattr(Registry, "stamps", looking)
    return counted


def test_only_what_has_changed_is_read(
    registry: Registry, alias_of: MakeAlias, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change read every name twice, and listed the folder once for each: 30 CPU seconds for 2,000 names."""
    follower = RegistryFollower(registry)
    assert len(follower.changes().aliases) == 50 and set(reads.values()) == {1}
    reads.clear()
    monkeypatch.setattr(follow, "SETTLED_S", 0.0)
    assert not follower.changes() and not reads
    alias_of("name07", 2).write(registry.path / "aliases" / "name07.json")
    changes = follower.changes()
    assert list(changes.aliases) == ["name07"] and changes.aliases["name07"].live == 2
    assert reads == {"name07": 1, "the folder": 1}
    assert registry.names() == [f"name{i:02d}" for i in range(50)]
    assert reads["name08"] == 1 and reads["the folder"] == 1


def test_two_changes_within_one_tick_of_the_clock_are_both_seen(registry: Registry, alias_of: MakeAlias) -> None:
    follower, folder = RegistryFollower(registry), registry.path / "aliases"
    follower.changes()
    alias_of("name01", 2).write(folder / "name01.json")
    assert list(follower.changes().aliases) == ["name01"]
    before = folder.stat().st_mtime_ns
    alias_of("name02", 2).write(folder / "name02.json")
    os.utime(folder, ns=(before, before))  # a coarse clock
    assert list(follower.changes().aliases) == ["name02"]


def test_a_damaged_name_is_told_once_and_hides_no_other(registry: Registry) -> None:
    follower, file = RegistryFollower(registry), registry.path / "aliases" / "name03.json"
    whole = file.read_bytes()
    file.write_text("{")
    changes = follower.changes()
    assert list(changes.problems) == ["name03"] and len(changes.aliases) == 49
    assert not follower.changes()
    file.write_bytes(whole)
    os.utime(file.parent)
    assert list(follower.changes().aliases) == ["name03"]


def test_a_registry_that_is_not_there_yet_is_followed_from_its_first_name(tmp_path: Path, alias_of: MakeAlias) -> None:
    follower = RegistryFollower(Registry(tmp_path))
    assert not follower.changes()
    (tmp_path / "aliases").mkdir()
    alias_of("first").write(tmp_path / "aliases" / "first.json")
    assert list(follower.changes().aliases) == ["first"]


def test_many_names_are_read_a_few_at_a_time_and_changes_before_the_rest(
    registry: Registry, alias_of: MakeAlias, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were read before the first answer: a start with 10,000 names took 20 times as long as one with 3."""
    monkeypatch.setattr(follow, "LOOK_S", 0.0)
    follower = RegistryFollower(registry)
    assert list(follower.changes(10).aliases) == [f"name{i:02d}" for i in range(10)] and len(follower.due) == 40
    assert sum(reads.values()) == 10, "and the folder was listed alone"
    assert follower.read(["name33", "name02", "unknown"]).aliases.keys() == {"name33"}
    alias_of("name05", 2).write(registry.path / "aliases" / "name05.json")
    (registry.path / "aliases" / "name40.json").unlink()
    assert [*follower.changes(3).aliases][:1] == ["name05"] and len(follower.due) == 36
    assert len(follower.changes().aliases) == 36 and not follower.due and "name40" not in reads
