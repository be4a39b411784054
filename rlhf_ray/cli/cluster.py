"""The commands around clusters: submit, doctor."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="the cluster's dashboard, http://HEAD:8265; default: $RAY_API_SERVER_ADDRESS"),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="what relative paths of the job mean on the cluster; default: the working folder"),
]
Stage = Annotated[str | None, typer.Option(help="stage of the job, if the file does not say")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="job file, of any kind")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="set fields, e.g. lora.r=8")
    ] = None,
    address: Address = None,
    storage: Storage = None,
    stage: Stage = None,
    name: Annotated[str | None, typer.Option(help="of the submission; default: from the run, with the time")] = None,
    max_package: Annotated[
        float, typer.Option(metavar="MB", min=0.01, max=90, help="most that may be sent beside this package")
    ] = 1.0,
    no_check: Annotated[bool, typer.Option("--no-check", help="do not check the nodes first")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow; print Ray's commands for the job")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print id, run folder and exit code as one JSON object")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a job on a Ray cluster. The job file stays as it is; exit codes are those of the job itself.

    Sends the job, the code and small data that it names, and this package where the nodes lack it; models and large data are read
    from storage that all nodes have. A job that was stopped goes on when it is submitted again. The token comes from
    RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; other secrets live on the nodes and are never sent."""
    from rlhf_ray.console import LocalConsole
    from rlhf_ray.submit.submission import submit as run_submit

    with LocalConsole() as console:
        done = run_submit(
            job,
            overrides or (),
            address=address or os.environ.get("RAY_API_SERVER_ADDRESS"),
            console=console,
            stage=stage,
            storage=storage,
            name=name,
            limit_bytes=int(max_package * 1e6),
            check_nodes=not no_check,
            detach=detach,
            debug=debug,
        )
    if as_json:
        told = {"id": done.id, "address": done.url, "output_dir": done.output_dir, "exit_code": done.exit_code}
        print(json.dumps(told))
    elif done.exit_code is not None:
        print(f"submit: {done.id}: exit code {done.exit_code}", file=sys.stderr)
    if done.exit_code:
        raise typer.Exit(done.exit_code)


def doctor(
    job: Annotated[str | None, typer.Argument(metavar="[JOB.yaml]", help="look at what this job needs, too")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[FIELD=VALUE]", help="set fields of the job, e.g. lora.r=8")
    ] = None,
    address: Address = None,
    model: Annotated[str | None, typer.Option(help="look at this model's tokenizer; default: the job's")] = None,
    template: Annotated[str | None, typer.Option(help="and at prompts under this template; default: the job's")] = None,
    storage: Storage = None,
    stage: Stage = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as one JSON object")] = False,
    debug: Debug = False,
) -> None:
    """Check what this machine or cluster can do. Versions, GPUs, memory, storage, authentication, ports, the job's model; ok, warn
    or fail, with the fix. Exit code 3 if anything fails."""
    from rlhf_ray.cli.output import stdout_kept
    from rlhf_ray.doctor.checks import text, to_json
    from rlhf_ray.doctor.examine import examine

    with stdout_kept():
        found = examine(
            job,
            overrides or (),
            address=address or os.environ.get("RAY_API_SERVER_ADDRESS"),
            model=model,
            template=template,
            storage=storage,
            stage=stage,
        )
    print(json.dumps(to_json(found)) if as_json else text(found))
    if not to_json(found)["healthy"]:
        raise typer.Exit(3)


def add_cluster_commands(app: typer.Typer) -> None:
    for command in (submit, doctor):
        app.command()(command)
