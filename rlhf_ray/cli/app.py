"""The console script `rlhf-ray`: commands in, exit codes out. Heavy imports happen inside the command that needs them.

Logs go to stderr; stdout carries only what was asked for: the run's summary with --json, generated text, scores, a path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rlhf_ray.cli.chat import (
    Greedy,
    In4Bit,
    In8Bit,
    MaxNewTokens,
    Model,
    Policies,
    Seed,
    Temperature,
    TemplateName,
    TopK,
    TopP,
    add_chat_command,
    named_policies,
    sampling_of,
)
from rlhf_ray.cli.cluster import add_cluster_commands
from rlhf_ray.cli.data import data
from rlhf_ray.cli.importers import add_import_commands
from rlhf_ray.cli.output import stdout_kept
from rlhf_ray.cli.registry import add_registry_commands
from rlhf_ray.cli.serve import add_serve_commands
from rlhf_ray.errors import DISK_FULL, ConfigError, Interrupted, RlhfRayError
from rlhf_ray.runtime.imports import imported, importing

if TYPE_CHECKING:
    from rlhf_ray.storage.run import Run

app = typer.Typer(
    help="LoRA RLHF on Ray: from a base model and preference data to an aligned adapter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # typer's boxes cost half of the time that `--help` may take
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda t: t.replace("_", "-")},
)

NO_SUCH_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Of an OSError with a path: whoever named it, or the permissions of it, can mend it."""
_TEMPORARY = re.compile(r"\.([^/]+)\.tmp-[0-9a-f]+$")
"""A file while it is written; people know its name without that."""

Job = Annotated[str, typer.Argument(metavar="JOB.yaml", help="job file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="set fields, e.g. lora.r=8")]
Wait = Annotated[
    float | None,
    typer.Option("--wait-for-resources", metavar="SECONDS", help="wait so long for the cluster to have room"),
]
Json = Annotated[bool, typer.Option("--json", help="print the run's summary on stdout as one JSON object")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help="run folder")]


class _StageCommand(TyperCommand):
    """`--help` ends with every field of the stage's job file."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        super().format_help(ctx, formatter)
        formatter.write("\n" + _fields_table(str(self.name)))


def _fields_table(stage: str) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlhf_ray.config import STAGES, PipelineConfig, Section, ServeConfig, SweepConfig
    from rlhf_ray.config.load import describe

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Field of the job file", no_wrap=True)
    for name in ("Type", "Default", "Meaning"):
        table.add_column(name, overflow="fold")
    classes: dict[str, type[Section]] = {
        **STAGES,
        "pipeline": PipelineConfig,
        "sweep": SweepConfig,
        "serve": ServeConfig,
    }
    for row in describe(classes[stage]):
        table.add_row(*(Text(cell) for cell in (row.name, row.type, row.default, row.meaning)))
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
    console = Console(width=width, highlight=False, file=sys.stdout)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


STAGE_HELP = {
    "sft": "Fine-tune a LoRA adapter on instruction data.",
    "dpo": "Train a policy on preference pairs directly.",
    "reward": "Train a reward model on preference pairs.",
    "ppo": "Train the policy by PPO on the rewards listed.",
    "evaluate": "Compare policies on held-out prompts.",
    "pipeline": "Run several stages in one job.",
}


def _add_stage(stage: str) -> None:
    @app.command(stage, cls=_StageCommand, help=STAGE_HELP[stage])
    def command(
        job: Job, overrides: Overrides = None, wait: Wait = None, as_json: Json = False, debug: Debug = False
    ) -> None:
        import rlhf_ray
        from rlhf_ray.config import STAGES, PipelineConfig
        from rlhf_ray.config.load import load
        from rlhf_ray.launch.preflight import check_this_machine

        waiting = [] if wait is None else [f"wait_for_resources={wait}"]
        config = load(STAGES.get(stage, PipelineConfig), job, [*(overrides or ()), *waiting])
        check_this_machine(config)
        with stdout_kept(), _resumable(config.output_dir):
            run = getattr(rlhf_ray, stage)(config)
        _tell(run, as_json)


for _stage in STAGE_HELP:
    _add_stage(_stage)


@app.command(cls=_StageCommand)
def sweep(job: Job, overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> None:
    """Search over PPO or DPO jobs. Settings x seeds, early stopping, one table and report, a winner by a stated rule."""
    from rlhf_ray.config import SweepConfig
    from rlhf_ray.config.load import load

    config = load(SweepConfig, job, overrides or ())
    with importing():
        from rlhf_ray.sweep.sweep import sweep as run_sweep

    with stdout_kept(), _resumable(config.output_dir):
        run = run_sweep(config)
    _tell(run, as_json)


@app.command(cls=_StageCommand)
def serve(job: Job, overrides: Overrides = None, debug: Debug = False) -> None:
    """Serve adapters behind OpenAI's API. Every adapter on one base, a page to compare them; Ctrl-C drains and stops."""
    from rlhf_ray.config import ServeConfig
    from rlhf_ray.config.load import load

    config = load(ServeConfig, job, overrides or ())
    from rlhf_ray.serve.service import run_service

    with stdout_kept():
        run_service(config)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="where the runs and their job files go")] = "runs/demo",
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of resuming")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the whole chain on the bundled task. Base, SFT, reward model, PPO, comparison, report: no download, no GPU."""
    with importing():
        from rlhf_ray.stages.demo import demo as run_demo

    with stdout_kept(), _resumable(output_dir):
        run = run_demo(output_dir, fresh=fresh)
    _tell(run, as_json)


@app.command()
def resume(
    run: RunDir,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="change fields")] = None,
    reset_data: Annotated[bool, typer.Option("--reset-data", help="resume although data files have changed")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Resume an interrupted run. It starts from its newest valid checkpoint.

    FIELD=VALUE applies from now on. Once there is a checkpoint, only limits, paths and intervals may change, e.g. max_kl=20."""
    from rlhf_ray.storage.run_folder import open_run

    with stdout_kept(), _resumable(run):
        if open_run(run, verify=False).stage == "sweep":
            with importing():
                from rlhf_ray.sweep.sweep import resume_sweep

            if changes := [*(overrides or ()), *(["--reset-data"] if reset_data else [])]:
                raise ConfigError.at(
                    run,
                    "a sweep resumes with the settings and the data it was started with",
                    "no FIELD=VALUE, no --reset-data",
                    changes[0],
                    "leave it out",
                )
            result = resume_sweep(run)
        else:
            from rlhf_ray.stages.resume import resume as resume_run

            result = resume_run(run, reset_data=reset_data, overrides=overrides or ())
    _tell(result, as_json)


@app.command()
def merge(
    run: RunDir,
    output_dir: Annotated[str | None, typer.Option(help="default: <run>-adapter-merged")] = None,
    dtype: Annotated[str | None, typer.Option(help="precision of the merged checkpoint; default: the base's")] = None,
    model: Annotated[str | None, typer.Option(help="the base, where it does not lie where the adapter says")] = None,
    debug: Debug = False,
) -> None:
    """Fold a run's adapter into its base. A stand-alone checkpoint, verified against the unmerged outputs."""
    from rlhf_ray.models.specs import policy_source

    policy_source(run)  # refused before anything heavy is imported
    with importing():
        from rlhf_ray.models.merge import merge_run

    with stdout_kept():
        merged = merge_run(run, output_dir, dtype, model=model, log=lambda line: print(line, file=sys.stderr))
    print(merged)


@app.command()
def generate(
    policy: Policies,
    instruction: Annotated[str | None, typer.Option(help="one instruction to answer")] = None,
    input: Annotated[str, typer.Option(help="its input")] = "",
    file: Annotated[
        str | None, typer.Option(help="answer every row of this file instead (.json, .jsonl, .csv or .parquet)")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="write JSON lines here instead of printing; FILE.html: a page to compare replies and vote blind"
        ),
    ] = None,
    model: Model = None,
    template: TemplateName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    greedy: Greedy = False,
    seed: Seed = 0,
    reward: Annotated[
        list[str] | None, typer.Option(help="score replies with this reward run; may be repeated")
    ] = None,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="print the prompt as the model reads it")] = False,
    load_in_8bit: In8Bit = False,
    load_in_4bit: In4Bit = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines")] = False,
    debug: Debug = False,
) -> None:
    """Answer instructions with several policies side by side. One instruction or a file; base, SFT, merged, PPO."""
    _exactly_one({"--instruction": instruction, "--file": file})
    sampling = sampling_of(temperature, top_p, top_k, greedy, "generate")
    policies = named_policies(policy)
    with importing():
        from rlhf_ray.stages.generate import generate as run_generate

    with stdout_kept():
        rows = run_generate(
            policies=policies,
            instruction=instruction,
            input=input,
            file=file,
            out=out,
            model=model,
            template=template,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            rewards=reward or (),
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
        )
    if out is None:
        _print_rows(rows, as_json, hidden=() if show_prompt else ("prompt",))


add_chat_command(app)


@app.command()
def score(
    run: Annotated[str | None, typer.Option(help="reward run, or its merged checkpoint")] = None,
    model: Annotated[
        str | None, typer.Option(help="sequence-classification checkpoint: a decoder, or an encoder")
    ] = None,
    function: Annotated[str | None, typer.Option(help="my_reward.py:score")] = None,
    url: Annotated[
        str | None, typer.Option(help="reward server: /v1/score of rlhf-ray serve, or one of OpenRLHF's remote_rm_url")
    ] = None,
    headers_file: Annotated[
        str | None, typer.Option(help="with --url: a file (mode 600) of `Name: value` lines to send; never a key here")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="with --url: variable of the environment that holds the key")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="score every row (or pair) of this file (.json, .jsonl, .csv or .parquet)")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="prompt of one text to score")] = None,
    completion: Annotated[str | None, typer.Option(help="the reply to score")] = None,
    template: Annotated[str | None, typer.Option(help="prompt template; default: the reward model's own")] = None,
    out: Annotated[str | None, typer.Option(help="write JSON lines here instead of printing")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON lines")] = False,
    debug: Debug = False,
) -> None:
    """Print the reward of a reply, or of the rows of a file."""
    _exactly_one({"--run": run, "--model": model, "--function": function, "--url": url})
    _exactly_one({"--completion": completion, "--file": file})
    from rlhf_ray.config import RewardSource
    from rlhf_ray.config.load import load_dict

    server = {"url": url, "headers_file": headers_file, "api_key_env": api_key_env}
    source = load_dict(RewardSource, {"run": run, "model": model, "function": function, **server}, "score")
    if run or model:
        from rlhf_ray.models.specs import reward_source

        reward_source(run or model or "")  # refused before anything heavy is imported
    with importing():
        from rlhf_ray.stages.score import score as run_score

    with stdout_kept():
        rows = run_score(source=source, file=file, prompt=prompt, completion=completion, template=template, out=out)
    if out is None:
        _print_rows(rows, as_json)


app.add_typer(data, name="data")
add_import_commands(app)


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="stage of the job, if the file does not say")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; auto: cuda, unless the job runs without a GPU")] = "auto",
    gpu: Annotated[float | None, typer.Option(min=1, help="GiB of the GPUs to fit; default: of those here")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest prompt; default: max_length minus the reply, else 512")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="exit 3 if the job does not fit or cannot be placed")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as one JSON object")] = False,
    debug: Debug = False,
) -> None:
    """Show what a job needs. Memory of every process and GPU, which card it fits, and whether it can be placed here.

    Models need no weights: a folder with a config.json is enough. Nothing is loaded."""
    if device not in ("auto", "cuda", "cpu"):
        raise typer.BadParameter(f"--device: expected auto, cuda or cpu; got {device}")
    from rlhf_ray.config.load import load_any

    name, config = load_any(job, overrides or (), stage)
    where = {"sweep": ("sweep.planning", "plan_sweep"), "serve": ("serve.planning", "plan_service")}
    module, function = where.get(name, ("plan.job_plan", "plan"))
    print("plan: tries the job's passes on models without weights; for a 7B that takes about a minute", file=sys.stderr)
    with stdout_kept():
        with importing():
            from rlhf_ray.plan.job_plan import text

        found = imported(f"rlhf_ray.{module}:{function}")(config, device, gpu, prompt_tokens)
    print(json.dumps(found.to_json()) if as_json else text(found))
    if check and not (found.fits and found.placed):
        raise typer.Exit(3)


@app.command()
def report(run: RunDir, debug: Debug = False) -> None:
    """Write a run's report.html again."""
    from rlhf_ray.report import write_report
    from rlhf_ray.storage.run_folder import is_run, open_run

    if is_run(run) and open_run(run, verify=False).stage == "sweep":
        from rlhf_ray.sweep.report import write_sweep_report

        print(write_sweep_report(run))
        return
    print(write_report(run))


add_cluster_commands(app)
add_registry_commands(app)
add_serve_commands(app)


def _version(wanted: bool) -> None:
    if wanted:
        import rlhf_ray

        print(rlhf_ray.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _exactly_one(options: dict[str, str | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise typer.BadParameter(f"give exactly one of {', '.join(options)}; got {', '.join(given) or 'none'}")


def _tell(run: Run, as_json: bool) -> None:
    if as_json:
        print(json.dumps(run.to_json()))
    else:
        print(f"{run.stage}: {run.status} in {run.run_dir}", file=sys.stderr)


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool, hidden: Sequence[str] = ()) -> None:
    for row in rows:
        shown = {name: value for name, value in row.items() if name not in hidden and value is not None}
        if as_json:
            print(json.dumps(shown, ensure_ascii=False))
        else:
            print("\n".join(f"{name}: {value}" for name, value in shown.items()), end="\n\n")


@contextlib.contextmanager
def _resumable(run_dir: str) -> Iterator[None]:
    """Ctrl-C becomes an error that tells the command that goes on, if there is a run to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        started = Path(run_dir, "manifest.json").exists()
        fix = f"rlhf-ray resume {shlex.quote(run_dir)}" if started else "start it again"
        raise Interrupted.at(run_dir, "interrupted", fix=fix) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: the only place that turns errors into exit codes."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=args, prog_name="rlhf-ray", standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        return 75
    except BrokenPipeError:  # the reader of stdout left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if "--debug" in args:
            traceback.print_exception(error)
        lines, code = _verdict(error)
        with contextlib.suppress(OSError):  # a terminal that was closed; the exit code still tells
            print("\n".join(lines), file=sys.stderr)
        return code


def _field_of_option(command: str, option: str) -> str:
    """How a field of a job is overridden, if `--field` was given as other trainers take it; else empty."""
    from rlhf_ray.config.hints import RENAMED, dotted_fields
    from rlhf_ray.config.pipeline import STAGES

    job, name = STAGES.get(command.split()[-1]), option.strip("-").replace("-", "_")
    fields = set(dotted_fields(job)) if job is not None else set()
    found = next((field for field in (name, *RENAMED.get(name, ())) if field in fields), None)
    return "" if found is None else f"fields of a job have no dashes: {found}=VALUE"


def _verdict(error: Exception) -> tuple[list[str], int]:
    """The lines to show and the exit code."""
    if isinstance(error, RlhfRayError):
        return error.lines(), error.exit_code
    if hasattr(error, "format_message"):  # a wrong command line
        command = getattr(getattr(error, "ctx", None), "command_path", "rlhf-ray")
        fix = _field_of_option(command, getattr(error, "option_name", "")) or f"see `{command} --help`"
        return [f"error: {error.format_message().rstrip('.')}; fix: {fix}"], 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = str(error).strip().partition("\n")[0] or "no memory left"
        return [f"error: out of memory: {first}; fix: lower per_device_train_batch_size or rollout_chunk_size"], 3
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        return [f"error: {where}cannot be written: {error.strerror}; fix: free some space, and run it again"], 3
    if isinstance(error, OSError) and error.filename and error.errno in NO_SUCH_PLACE:
        where = _TEMPORARY.sub(r"\1", os.fsdecode(error.filename))
        told = f"error: {where}: cannot be read or written: {error.strerror}"
        return [f"{told}; fix: check its permissions, or name another place"], 2
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return [f"error: a bug in rlhf_ray: {what}; run again with --debug for the traceback"], 1
