"""How a stage comes into its run folder: made or found, locked, and the run that the job describes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.config import JobFields
from rlhf_ray.config.defaults import follows
from rlhf_ray.config.resolved import dump_yaml, to_dict, to_yaml, written_out
from rlhf_ray.config.stored import load_stored, split_known
from rlhf_ray.console import Console
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import ArtifactError, ConfigError, Problem
from rlhf_ray.report import write_report
from rlhf_ray.runtime.session import Session
from rlhf_ray.runtime.watchdog import forget_stacks
from rlhf_ray.storage import object_store
from rlhf_ray.storage.checkpoints import delete_checkpoint
from rlhf_ray.storage.lock import WAIT_S
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_text, config_changes, create_run, open_run

if TYPE_CHECKING:
    from rlhf_ray.models.backbone import BaseIdentity

J = TypeVar("J", bound=JobFields)
MAY_CHANGE = (
    *("output_dir", "resume", "run_name", "report_to", "learner.", "wait_for_resources", "stop_grace_s", "watchdog_s"),
    *(
        "per_device_train_batch_size",
        "tokens_per_microbatch",
        "packing",
        "gradient_checkpointing",
        "save_steps",
        "save_total_limit",
        "copy_to",
    ),
)
"""Fields that may differ between the job that started a run and the one that goes on with it: where and how often, never what."""

LENGTH = ("num_train_epochs", "max_steps")
"""An unfinished run may be given another length; learning rates follow the schedule of that length from there on."""

REWARDS = ("rewards", "ppo.rewards", "evaluate.rewards")
"""Of a job, and of a sweep what its trials share. Those of its `space` tell trials apart, and may not change."""
ASKED = ("url", "timeout_s", "max_retries", "concurrency", "requests_per_minute", "headers_file", "api_key_env")
LIMITS = ("input_price", "output_price", "max_cost", "max_total_tokens")
"""Of REWARDS: where and how a server is asked, and what a judge may cost. A server may move, a limit be raised; what they said is
kept."""

KEPT = ("output_dir", "resume")
"""Of these, what a start says holds for that start alone."""


def enter_run(
    config: JobFields, session: Session, held: ExitStack, stage: str, may_change: tuple[str, ...] = MAY_CHANGE
) -> RunFolder:
    """Rank 0 makes the run folder and locks it for as long as `held` lasts; all ranks open it.

    ConfigError if it holds a run that was started with other settings, or if another process is writing to it."""
    made = None
    if session.is_main:
        values = to_dict(config)
        made = folder = create_run(config.output_dir, stage, values, config.resume)
        held.enter_context(folder.lock(WAIT_S if config.resume == "auto" else 0.0, session.console.log))
        if folder.checkpoints() or folder.manifest()["status"] == "done":
            go_on_under(folder, config, may_change, session.console)
        else:  # nothing was kept of what ran under other settings
            atomic_write_text(folder.path / "config.yaml", dump_yaml(values))
            folder.update_manifest(seed=config.seed)
        forget_stacks(folder.path)
    session.barrier()
    found = open_run(config.output_dir)
    return made or found


def enter_afresh(
    config: JobFields, session: Session, held: ExitStack, stage: str, may_change: tuple[str, ...] = MAY_CHANGE
) -> tuple[RunFolder, Run | None]:
    """`enter_run` for a stage without checkpoints: an unfinished run that is there starts over, and says so.

    Returns the folder, and the run in it if it is finished."""
    finished: dict[str, Any] | None = None
    folder = RunFolder(Path(config.output_dir).absolute())
    if session.is_main:
        values = to_dict(config)
        folder = create_run(config.output_dir, stage, values, config.resume)
        held.enter_context(folder.lock(WAIT_S if config.resume == "auto" else 0.0, session.console.log))
        if folder.manifest()["status"] == "done":
            require_same(folder, config, may_change)
            copy_from_now_on(folder, config.copy_to, session.console.warn)
            session.console.log(f"{stage}: {config.output_dir} is finished; nothing to do")
            finished = load_run(folder.path).to_json()
        elif folder.found is None:
            session.console.log(
                f"{stage}: {config.output_dir} was interrupted before it finished; it starts again from the beginning"
            )
            start_over(folder, config)
    finished = session.from_main(finished)
    return folder, None if finished is None else Run.from_json(finished)


def require_same(
    folder: RunFolder, config: J, may_change: tuple[str, ...], full: Callable[[J], dict[str, Any]] = to_dict
) -> dict[str, tuple[Any, Any]]:
    """{field: (old, new)} of what differs from the configuration in `folder` and may.   full: writes a configuration out.

    Going on under other settings would be a third run, which no configuration describes: ConfigError with every difference."""
    stored = load_stored(type(config), folder.config(), str(folder.path / "config.yaml"))
    changes = other_settings(full(stored), full(config))
    is_done = folder.manifest()["status"] == "done"
    refused = {n: c for n, c in changes.items() if not _may_change(n, c, may_change) or (n in LENGTH and is_done)}
    causes = {name: change for name, change in refused.items() if not follows(config, name)}
    kind = "a finished run" if is_done else "a run"
    ConfigError.raise_all(
        Problem(
            name,
            f"{folder.path} holds {kind} with another value",
            json.dumps(old),
            json.dumps(new),
            _another_run(folder) if name in LENGTH else "put it back, or choose another output_dir",
        )
        for name, (old, new) in (causes or refused).items()
    )
    return changes


def _may_change(name: str, change: tuple[Any, Any], may_change: tuple[str, ...]) -> bool:
    return name.startswith(may_change) or (name in REWARDS and _asked(change[0]) == _asked(change[1]))


def _asked(rewards: Any) -> Any:
    """Rewards without what may change of them; the name of a kind that is asked over HTTP stays."""
    if not isinstance(rewards, list):
        return rewards
    found = []
    for reward in rewards:
        left = {name: value for name, value in reward.items() if name not in ASKED} | {
            "is_server": bool(reward.get("url"))
        }
        if isinstance(reward.get("llm"), dict):
            left["llm"] = {name: value for name, value in reward["llm"].items() if name not in (*ASKED, *LIMITS)}
        found.append(left)
    return found


def _another_run(folder: RunFolder) -> str:
    """How to train further from a finished run."""
    if folder.stage == "reward":
        return "put it back, or train another run with it"
    return f"continue from it in another run: rlhf-ray {folder.stage} JOB sft={folder.path} output_dir=..."


def require_steps_left(step: int, steps: int) -> None:
    """ConfigError if a run that has made `step` steps is given a length of fewer."""
    if steps < step:
        raise ConfigError.at(
            "max_steps", f"the run has made {step:,} steps already", f"at least {step:,}", f"{steps:,}"
        )


def other_settings(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`config_changes`, without paths that name the same place beside the run folder, which was moved."""
    beside = config_changes(beside_the_run(then), beside_the_run(now))
    return {
        name: change for name, change in config_changes(then, now).items() if name in beside or name == "output_dir"
    }


def beside_the_run(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a job, with paths below the parent of its run folder written from there: runs that are moved together, as the
    stages of a pipeline are, still name each other. That they are the same runs is checked by hash (`check_same_models`)."""
    parent = os.path.dirname(str(values.get("output_dir") or ""))

    def written(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: written(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [written(item) for item in value]
        below = isinstance(value, str) and parent and value.startswith(f"{parent}{os.sep}")
        return os.path.join("..", os.path.relpath(value, parent)) if below else value

    return {name: value if name == "output_dir" else written(value) for name, value in values.items()}


def require_same_as_saved(
    checkpoint: Path, saved: Mapping[str, Any] | None, config: JobFields, may_change: tuple[str, ...]
) -> None:
    """ConfigError with every field whose value is another one than when `checkpoint` was written: config.yaml was edited since.

    saved: the configuration in the checkpoint; None in one of an older version, which is accepted."""
    if saved is None:
        return
    known, _ = split_known(type(config), saved)  # of what is gone, config.yaml has been asked already
    then = to_dict(load_stored(type(config), known, str(checkpoint)))
    ConfigError.raise_all(
        Problem(
            name,
            f"{checkpoint} was written under another value, and config.yaml has been edited since",
            json.dumps(old),
            json.dumps(new),
            f"put it back in {checkpoint.parents[1] / 'config.yaml'}, or start another run",
        )
        for name, (old, new) in other_settings(then, to_dict(config)).items()
        if not _may_change(name, (old, new), may_change)
    )


def go_on_under(folder: RunFolder, config: JobFields, may_change: tuple[str, ...], console: Console) -> None:
    """Tell what has changed since the last start, and keep it: the next start finds the run as it is now."""
    changes = require_same(folder, config, may_change)
    if folder.manifest()["status"] == "done":
        copy_from_now_on(folder, config.copy_to, console.warn)
        return
    if "max_steps" in changes and changes["max_steps"][1] > 0:  # a refusal must come before it is kept
        done = max((checkpoint.step for checkpoint in folder.checkpoints()), default=0)
        require_steps_left(done, changes["max_steps"][1])
    tell_changes(folder, changes, console)
    keep_config(folder, written_out(config))


def tell_changes(folder: RunFolder, changes: Mapping[str, tuple[Any, Any]], console: Console) -> None:
    """changes: of `require_same`."""
    for name, (old, new) in changes.items():
        if name not in KEPT:
            console.log(f"{folder.stage}: continuing with {name} {json.dumps(new)} (was {json.dumps(old)})")


def keep_config(folder: RunFolder, full: Mapping[str, Any]) -> None:
    """Write config.yaml anew where it says otherwise; the run keeps the name that it was given, and its `resume`.

    full: the configuration, written out."""
    before = folder.config()
    values = {**full, **{name: before[name] for name in KEPT if name in before}}
    if values != before:
        atomic_write_text(folder.path / "config.yaml", dump_yaml(values))


def copy_from_now_on(folder: RunFolder, uri: str | None, warn: Callable[[str], None]) -> None:
    """Another `copy_to` than before: the next checkpoints go there. A finished run, whose configuration is sealed, is copied there
    now, unless that was done before: what could not be copied when it finished is. What lies at the old place stays."""
    if folder.manifest()["status"] == "done":
        if uri is not None:
            object_store.copy_finished(folder.path, uri, warn, again=False)
    elif (values := folder.config()).get("copy_to") != uri:
        atomic_write_text(folder.path / "config.yaml", dump_yaml({**values, "copy_to": uri}))


def start_over(folder: RunFolder, config: JobFields) -> None:
    """Forget everything that an unfinished run has written."""
    for checkpoint in folder.checkpoints():
        delete_checkpoint(checkpoint)
    for name in ("checkpoints", "adapter", "tensorboard"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    for name in ("metrics.jsonl", "summary.json", "report.html"):
        (folder.path / name).unlink(missing_ok=True)
    atomic_write_text(folder.path / "config.yaml", to_yaml(config))


def check_same_models(
    folder: RunFolder, identity: BaseIdentity, template: Template, parents: Iterable[Mapping[str, Any]]
) -> None:
    """ArtifactError if a run with checkpoints would go on beside another base, tokenizer, template or parent adapter.

    parents: entries as in a manifest. Reward functions are not among them, see `mended_functions`."""
    if not folder.checkpoints():
        return
    manifest = folder.manifest()
    known = {p["role"]: p.get("sha256") for p in manifest["parents"]}
    pairs = [
        ("base", identity.path, (manifest["base"] or {}).get("weights_sha256"), identity.weights_sha256),
        ("tokenizer", identity.path, manifest["tokenizer_sha256"], identity.tokenizer_sha256),
        ("template", template.name, (manifest["template"] or {}).get("sha256"), template.manifest().get("sha256")),
        *((f"{p['role']} adapter", str(p["path"]), known.get(p["role"]), p.get("sha256")) for p in parents),
    ]
    ArtifactError.raise_all(
        Problem(where, f"the {what} is not the one that this run was started with", f"sha256 {before}", f"sha256 {now}")
        for what, where, before, now in pairs
        if before and now and before != now
    )


def mended_functions(folder: RunFolder, parents: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for each reward function that is no longer what it was: one that failed is mended, then the run goes on, but not as
    the run that nobody touched.   parents: entries as in a manifest."""
    known = {p["role"]: p.get("sha256") for p in folder.manifest()["parents"]}
    return [
        f"{p['role']}: {p['path']} has changed since this run's last start (sha256 {before[:12]}, now {p['sha256'][:12]}); the"
        " following steps are rewarded by the new one"
        for p in parents
        if (before := known.get(p["role"])) and before != p["sha256"]
    ]


@contextlib.contextmanager
def discarded_on_error(folder: RunFolder, kept: Callable[[], bool] = bool) -> Iterator[None]:
    """Leave no run behind that this start has made and that has not taken a step: the job is mended and started again under the
    same name.

    kept: asked at an error whether there is more to keep than checkpoints; default: there is not."""
    try:
        yield
    except BaseException:
        if folder.found is not None and not folder.checkpoints() and not kept():
            folder.discard()
        raise


def finish_run(folder: RunFolder, run: Run, sealed: Iterable[str] | None = None) -> None:
    """Summary, seal, report, and then the copy, which holds all of them.   sealed: see `RunFolder.seal`. Rank 0 calls it."""
    run.save()
    folder.seal() if sealed is None else folder.seal(sealed)
    write_report(folder.path)
    folder.copy_finished()
