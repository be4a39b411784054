"""A promotion or rollback that is killed at any write leaves what was live as it was, or is done; two at once do not mix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.registry import Registry
from rlhf_ray.storage.files import sha256_file
from rlhf_ray.storage.run_folder import RunFolder

Make = Callable[..., RunFolder]
CALLS = ("mkdir", "replace", "rename", "fsync", "chmod", "unlink")
KEPT = (".lock", ".owner")
KILLED, DONE = 9, 0


def in_child(action: Callable[[], object], die_at: int | None = None) -> tuple[int, int]:
    """Run `action` in a forked process that ends at once, without cleaning up, before its `die_at`-th write.

    Returns its exit status and how many writes it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def counting(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == die_at:
                    os._exit(KILLED)
                return function(*args, **kwargs)

            return call

        try:
            for name in CALLS:
                setattr(os, name, counting(getattr(os, name)))
            action()
            os.write(writer, str(count).encode())
            os._exit(DONE)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(told or 0)


def state(registry: Registry) -> list[str]:
    """Every file but the lock, with its hash."""
    files = sorted(p for p in registry.path.rglob("*") if p.is_file() and p.name not in KEPT)
    return [f"{p.relative_to(registry.path)} {sha256_file(p)}" for p in files]


def hidden(registry: Registry) -> list[Path]:
    return [p for p in registry.path.rglob(".*") if p.name not in KEPT]


def test_a_promotion_killed_at_any_write(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run(f"run{i}", seed=i) for i in range(3)]

    def fresh(number: int) -> Registry:
        registry = Registry(tmp_path / f"registry{number}")
        registry.promote(str(runs[0].path), "helper")
        return registry

    code, writes = in_child(lambda: fresh(0).promote(str(runs[1].path), "helper"))
    assert (code, writes > 20) == (DONE, True)
    was_done = []
    for cut in range(1, writes + 1):
        registry = fresh(cut)
        before = registry.resolve("helper")
        code, _ = in_child(lambda registry=registry: registry.promote(str(runs[1].path), "helper"), cut)  # type: ignore[misc]
        if code == DONE:  # the first promotion of `fresh(0)` was counted too
            break
        assert code == KILLED
        live = registry.resolve("helper")
        was_done.append(live.version == 2)
        assert live.id == before.id or live.version == len(registry.history("helper")) == 2
        assert registry.resolve("helper@v1").sha256 == before.sha256
        # another run now takes the number, unless it was given away
        again = registry.promote(str(runs[1 if was_done[-1] else 2].path), "helper")
        assert again.entry.version == 2 and registry.history("helper")[-1]["version"] == 2
        assert again.is_new is not was_done[-1]
        assert hidden(registry) == []
        assert len(list((registry.path / "adapters").iterdir())) == 2
        for folder in (registry.path / "adapters").iterdir():
            folder.chmod(0o755)
    assert len(was_done) > 10 and was_done == sorted(was_done)
    assert was_done[-1], "the last write of all is no longer the one that makes the version"


def test_the_first_promotion_of_all_killed_at_any_write(make_run: Make, tmp_path: Path) -> None:
    run = str(make_run("run").path)
    code, writes = in_child(lambda: Registry(tmp_path / "whole").promote(run, "helper"))
    assert code == DONE
    for cut in range(1, writes + 1):
        registry = Registry(tmp_path / f"registry{cut}")
        code, _ = in_child(lambda registry=registry: registry.promote(run, "helper"), cut)  # type: ignore[misc]
        assert code == KILLED
        if (registry.path / "registry.json").exists():
            assert registry.names() in ([], ["helper"])
        done = registry.promote(run, "helper")
        assert done.entry.version == 1 and registry.names() == ["helper"] and hidden(registry) == []
        done.entry.path.chmod(0o755)


def test_a_rollback_killed_at_any_write(registry: Registry, make_run: Make) -> None:
    for i in range(2):
        registry.promote(str(make_run(f"run{i}", seed=i).path), "helper")
    before, cut, versions = state(registry), 0, []
    while True:
        cut += 1
        code, _ = in_child(lambda: registry.rollback("helper"), cut)
        versions.append(registry.resolve("helper").version)
        if versions[-1] == 1:
            break
        assert code == KILLED and [line for line in state(registry) if ".tmp-" not in line] == before
    assert cut > 2
    registry.rollback("helper", "v2")
    assert hidden(registry) == []


def test_two_processes_promote_at_once(registry: Registry, make_run: Make) -> None:
    """Every version is made once, and none of either process is lost."""
    each = 4
    runs = [[str(make_run(f"run{who}-{i}", seed=10 * who + i).path) for i in range(each)] for who in range(2)]
    start, go = os.pipe()
    children = []
    for mine in runs:
        pid = os.fork()
        if pid == 0:
            try:
                os.close(go)
                os.read(start, 1)  # ends when the parent closes its end
                for run in mine:
                    registry.promote(run, "helper")
                os._exit(0)
            except BaseException as error:
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
        children.append(pid)
    os.close(start)
    os.close(go)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    history = registry.history("helper")
    assert [e["version"] for e in history] == list(range(1, 2 * each + 1))
    assert [e["from"] for e in history] == [None, *range(1, 2 * each)]
    sources = [registry.resolve(f"helper@v{e['version']}").manifest["source"]["run_dir"] for e in history]
    assert sorted(sources) == sorted(run for mine in runs for run in mine)
    for mine in runs:  # each in its own order
        assert [s for s in sources if s in mine] == mine


def test_a_reader_never_sees_half_a_change(registry: Registry, make_run: Make) -> None:
    """While another process promotes and rolls back, every look finds a whole version."""
    runs = [str(make_run(f"run{i}", seed=i).path) for i in range(3)]
    registry.promote(runs[0], "helper")
    seen, tokens, code = set(), {registry.poll()}, None
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(3):
                registry.promote(runs[1], "helper")
                registry.promote(runs[2], "helper")
                registry.rollback("helper")
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    while code is None:
        tokens.add(registry.poll())
        seen.add(registry.resolve("helper").version)
        assert json.loads((registry.path / "aliases" / "helper.json").read_text())["name"] == "helper"
        ended, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else None
    tokens.add(registry.poll())
    assert code == 0 and registry.resolve("helper").version == 2 and seen <= {1, 2, 3} and len(tokens) > 1


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
