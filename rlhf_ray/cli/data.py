"""The command around data files: data check."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Literal

import typer

from rlhf_ray.errors import DataError
from rlhf_ray.runtime.imports import importing

data = typer.Typer(help="Look at data files before anything is trained.", rich_markup_mode=None)


@data.callback()
def _data() -> None:
    """Look at data files before anything is trained."""


@data.command("check")
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="data file, folder, URI or Hub data set")],
    model: Annotated[str, typer.Option(help="whose tokenizer and chat template read it: folder or Hub id")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE", help="as in the job, e.g. data.format=messages max_length=256"),
    ] = None,
    stage: Annotated[Literal["sft", "dpo", "reward", "ppo"], typer.Option(help="what the rows are for")] = "sft",
    template: Annotated[str | None, typer.Option(help="prompt template; default: the job's, alpaca")] = None,
    rows: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """What a stage would make of a data file. Format, counts, lengths, what is left out and why, rows as the model reads them.
    Exit 4 where the job would stop."""
    from rlhf_ray.cli.output import stdout_kept
    from rlhf_ray.config.load import load_dict
    from rlhf_ray.config.pipeline import STAGES

    values: dict[str, Any] = {"output_dir": ".", "model_name_or_path": model, "data": {"train": file}}
    if stage == "ppo":
        values["rewards"] = [{"function": "none:none"}]  # a job has one; its data are read without asking it
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    with stdout_kept():
        with importing():
            from rlhf_ray.stages.data_check import check_data

        said = {} if template is None else {"template": template}
        config = load_dict(STAGES[stage], {**values, **said}, "data check", overrides or ())
        found = check_data(config, rows, colour)
    print("\n".join(found.lines), flush=True)
    DataError.raise_all(found.stops)
