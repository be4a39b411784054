"""The commands of the adapter registry: promote, rollback, adapters."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

Folder = Annotated[
    str | None,
    typer.Option("--registry", metavar="DIR", help="default: $RLHF_RAY_REGISTRY, else ./registry; local or NFS"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result on stdout as JSON")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Why = Annotated[str, typer.Option("--reason", metavar="TEXT", help="reason; recorded in the history")]


def promote(
    source: Annotated[str, typer.Argument(metavar="RUN", help="run folder, RUN@STEP, or a sweep: the trial that won")],
    alias: Annotated[str, typer.Option(metavar="NAME", help="name to serve it under")],
    registry: Folder = None,
    step: Annotated[int | None, typer.Option(min=1, help="take the checkpoint of this step")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="highest held-out KL, nats per reply; default: kl_cap of the sweep, else 10")
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option(help="lowest held-out reward; default: 2 standard errors above the start")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="promote although gates failed; needs --reason")] = False,
    reason: Why = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a run's adapter a name. It becomes the next version of NAME, immutable, with lineage and gate results, and goes live.

    Gates, a line each: integrity, KL, held-out reward (of an SFT run its loss, of a reward run its accuracy), and the base,
    which is that of the version before. A failed gate ends with exit code 2 unless --force; damage ends with 5 and cannot be
    forced.
    Prints the version's full name.
    """
    from rlhf_ray.registry.show import outcome
    from rlhf_ray.registry.store import Registry

    done = Registry(registry).promote(
        source, alias, step=step, max_kl=max_kl, min_reward=min_reward, force=force, reason=reason, log=_say
    )
    _say(outcome(done))
    if as_json:
        gates = [gate.to_json() for gate in done.gates]
        told = {"id": done.entry.id, "path": str(done.entry.path), "is_new": done.is_new, "changed": done.changed}
        print(json.dumps({**told, "previous": done.previous, "gates": gates, "manifest": done.entry.manifest}))
    else:
        print(done.entry.id)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a promoted adapter")],
    to: Annotated[str | None, typer.Option(metavar="vN", help="default: the version that was live before")] = None,
    registry: Folder = None,
    reason: Why = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take a promotion back. Makes an earlier version of NAME live, verified; nothing is deleted."""
    from rlhf_ray.registry.store import Registry

    opened = Registry(registry)
    entry = opened.rollback(name, to, reason)
    _say(f"{entry.id} is live again")
    print(
        json.dumps({"id": entry.id, "path": str(entry.path), "history": opened.history(name)}) if as_json else entry.id
    )


def adapters(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="versions and history of this one")] = None,
    registry: Folder = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the promoted adapters. With NAME its versions and history; live versions are verified (exit code 5 if damaged)."""
    from rlhf_ray.errors import ArtifactError
    from rlhf_ray.registry import show
    from rlhf_ray.registry.store import Registry

    opened = Registry(registry)
    if as_json:
        found = [show.as_json(opened, each) for each in (opened.names() if name is None else [name])]
        print(json.dumps(found if name is None else found[0]))
        return
    if name is not None:
        print("\n".join(show.story(opened, name)))
        opened.resolve(name)
        return
    lines, problems = show.overview(opened)
    print("\n".join(lines))
    ArtifactError.raise_all(problems)


def policy_path(policy: str) -> str:
    """The folder that `registry:NAME` stands for; any other policy as it is."""
    prefix, colon, name = policy.partition(":")
    if prefix != "registry" or not colon:
        return policy
    from rlhf_ray.registry.store import Registry

    return str(Registry().resolve(name).path)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def add_registry_commands(app: typer.Typer) -> None:
    for command in (promote, rollback, adapters):
        app.command()(command)
