"""promote, rollback and adapters on the command line: streams, exit codes, what a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.registry import Registry
from rlhf_ray.storage.run_folder import RunFolder

Make = Callable[..., RunFolder]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_RAY_REGISTRY", str(registry.path))


def test_a_version_from_promotion_to_rollback(registry: Registry, make_run: Make, capsys: Capture) -> None:
    make_run("one")
    make_run("two", seed=1)
    assert main(["promote", "one", "--alias", "helper"]) == 0
    out, err = capsys.readouterr()
    first = out.strip()
    assert first == registry.resolve("helper").id
    assert [line.split()[:3] for line in err.splitlines()[:4]] == [
        ["gate", name, "passed:"] for name in ("integrity", "kl", "reward", "base")
    ]
    assert err.splitlines()[4:] == [f"{first} is live"]
    assert main(["promote", "two@5", "--alias", "helper", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["previous"], told["is_new"], len(told["gates"])) == (first, True, 4)
    assert err.splitlines()[-1] == f"{told['id']} is live instead of {first}; taken back by: rlhf-ray rollback helper"
    assert main(["promote", "two", "--step", "5", "--alias", "helper"]) == 0
    assert "is this very adapter and is live already: nothing changed" in capsys.readouterr().err
    assert main(["rollback", "helper", "--reason", "too chatty"]) == 0
    out, err = capsys.readouterr()
    assert (out.strip(), err.strip()) == (first, f"{first} is live again")
    assert main(["promote", "two@5", "--alias", "helper"]) == 0
    assert f"no new version; it is live again instead of {first}" in capsys.readouterr().err
    assert main(["rollback", "helper", "--to", "v1", "--json"]) == 0
    assert [e["version"] for e in json.loads(capsys.readouterr().out)["history"]] == [1, 2, 1, 2, 1]


def test_the_listing(registry: Registry, make_run: Make, capsys: Capture) -> None:
    registry.promote(str(make_run("one").path), "helper")
    worse = make_run("two", seed=1, evals=((0, 0.3, 0.02, 0.0), (10, 0.2, 0.02, 30.0)))
    registry.promote(str(worse.path), "brave", force=True, reason="to see it")
    assert main(["adapters"]) == 0
    header, brave, helper = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "live", "kind", "reward", "KL", "promoted", "by", "note"]
    assert brave.split()[:5] == ["brave", registry.resolve("brave").id.split("@")[1], "policy", "0.200", "30.0"]
    assert brave.endswith("forced over kl, reward: to see it") and "forced" not in helper
    assert main(["adapters", "brave"]) == 0
    out = capsys.readouterr().out
    assert (
        f"{registry.resolve('brave').id} (live)" in out
        and "promote v1" in out
        and "forced over kl, reward: to see it" in out
    )
    assert main(["adapters", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told] == ["brave", "helper"] and told[0]["manifest"]["forced"][
        "reason"
    ] == "to see it"
    assert main(["adapters", "helper", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["live"] == registry.resolve("helper").id


def test_the_listing_finds_damage(registry: Registry, make_run: Make, capsys: Capture) -> None:
    path = registry.promote(str(make_run("one").path), "helper").entry.path / "adapter_config.json"
    registry.promote(str(make_run("two", seed=1).path), "other")
    path.chmod(0o644)
    path.write_text("{}")
    for args in (["adapters"], ["adapters", "helper"], ["adapters", "helper", "--json"]):
        assert main(args) == 5
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {path}: file has changed; expected")
        assert "other" in out or "helper" in args
    assert main(["rollback", "other"]) == 2


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["promote", "bad", "--alias", "helper"], 2, "error: gate kl: failed; expected at most 10 (default); got 30.0"),
        (["promote", "bad", "--alias", "helper", "--force"], 2, "error: --force: needs a reason, which is recorded"),
        (["promote", "bad", "--alias", "a/b"], 2, "error: --alias: is not a name for an adapter; expected 1 to 64 letters"),
        (["promote", "bad", "--alias", "base"], 2, "error: --alias: 'base' is reserved for the model without an adapter"),
        (["promote", "bad"], 2, "error: Missing option '--alias'"),
        (["promote", "bed", "--alias", "helper"], 2, "error: bed: no such folder; expected a run folder"),
        (["promote", "zero", "--alias", "helper", "--force", "--reason", "x"], 5, "every lora_B is zero: the adapter does nothing"),
        (["promote", "bad@4", "--alias", "helper"], 5, "no checkpoint of step 4; expected one of 10"),
        (["promote", "bad", "--alias", "helper", "--max-kl", "nan"], 2, "error: --max-kl: is not a number"),
        (["rollback", "helper"], 2, "error: --registry: no registry at "),
        (["adapters"], 2, "fix: --registry DIR, or set RLHF_RAY_REGISTRY"),
        (["adapters", "--registry", "s3://x"], 2, "error: --registry: is not a folder; expected a local or NFS folder; got s3://x"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_each(args: list[str], code: int, line: str, make_run: Make, capsys: Capture) -> None:
    make_run("bad", evals=((0, 0.3, 0.02, 0.0), (10, 0.5, 0.02, 30.0)))
    make_run("zero", zero_b=True)
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == "" and line in err and "Traceback" not in err
    assert sum(text.startswith("error: ") for text in err.splitlines()) == 1


def test_another_registry(make_run: Make, tmp_path: Path, capsys: Capture) -> None:
    make_run("one")
    assert main(["promote", "one", "--alias", "helper", "--registry", "elsewhere"]) == 0
    assert Registry(tmp_path / "elsewhere").names() == ["helper"]
    assert main(["adapters", "--registry", "elsewhere"]) == 0
    (tmp_path / "elsewhere" / "adapters" / Registry("elsewhere").resolve("helper").id).chmod(0o755)


def test_help_says_what_is_decided(capsys: Capture) -> None:
    assert main(["promote", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "exit code 2 unless --force",
        "damage ends with 5",
        "kl_cap of the sweep, else 10",
        "2 standard errors above the start",
    ):
        assert part in out
