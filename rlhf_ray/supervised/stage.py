"""What SFT, DPO and reward modelling share: from a job to a finished run folder, around transformers' Trainer.

enter the run folder -> read rows -> load the base, check lineage -> tokenise -> header -> train -> save, read back, compare -> seal
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.unused import unused_fields
from rlhf_ray.data.collate import Tokenised, require_batch
from rlhf_ray.data.load import StageRows, load_rows
from rlhf_ray.data.records import DataFile, Row, check_same_data
from rlhf_ray.data.stored import tokenised
from rlhf_ray.data.templates import Template, load_template, unused_chat_template
from rlhf_ray.errors import InvariantError
from rlhf_ray.metrics import MetricsWriter
from rlhf_ray.models.adapters import add_from_files, gradient_checkpointing, read_adapter, use_adapter
from rlhf_ray.models.assembly import load_options
from rlhf_ray.models.backbone import Backbone, load_backbone, trunk
from rlhf_ray.models.context import shortened_note
from rlhf_ray.models.coverage import adapter_notes
from rlhf_ray.models.packing import packing_of
from rlhf_ray.runtime.session import Session, seed_everything
from rlhf_ray.storage.checkpoints import require_room
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import RunFolder
from rlhf_ray.supervised.batch_sampler import RowOrder
from rlhf_ray.supervised.callback import RunCallback
from rlhf_ray.supervised.checkpoint import MAY_CHANGE
from rlhf_ray.supervised.header import header_lines, warnings_about
from rlhf_ray.supervised.task import Examples, Job, Recipe, SupervisedConfig, Task
from rlhf_ray.supervised.trained_model import check_packing
from rlhf_ray.supervised.trainer import SupervisedTrainer, total_steps, training_arguments, undisturbed
from rlhf_ray.training import run_entry
from rlhf_ray.training.ancestry import check_ancestors
from rlhf_ray.training.run_entry import discarded_on_error, finish_run

RELOAD_TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest of them, or to 1. Equal weights may be multiplied in another order: a tiny
Zamba turns 2e-7 in its first layer into 7e-5 of logits of 8."""
FIXTURE_ROWS = 4
READ_BACK = "read_back"


def train_supervised(config: SupervisedConfig, session: Session, recipe: Recipe) -> Run:
    """The body of an SFT, DPO or reward stage; every rank runs it. Returns the finished run."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # libraries talking among themselves
        folder = run_entry.enter_run(config, session, stack, recipe.stage, MAY_CHANGE)
        if session.from_main(folder.manifest()["status"]) == "done":
            session.console.log(f"{recipe.stage}: {config.output_dir} is finished; nothing to do")
            return load_run(folder.path)
        with discarded_on_error(folder):
            job = prepare(config, session, recipe, folder)
        return finish(job, train(job, stack))


def prepare(config: SupervisedConfig, session: Session, recipe: Recipe, folder: RunFolder) -> Job:
    """Everything that can be wrong with a job is found here, before the first step; cheap checks come first."""
    seed_everything(config.seed)
    rows = load_rows(config.data, recipe.kind, recipe.half)
    require_rows(config, len(rows.train), rows.summary)
    sft = getattr(config, "sft", None)
    sources = [("base", config.model_name_or_path), *([("sft", sft)] if sft else [])]
    shared, leaks = check_ancestors(rows, sources, refuse=not folder.checkpoints())
    rows = replace(rows, summary=(*rows.summary, *shared), warnings=(*rows.warnings, *leaks))
    if folder.checkpoints():
        check_same_data(folder.manifest()["data"], [DataFile(**item) for item in rows.manifest])
    backbone = load_base(config, session.device)
    template = load_template(config.template, backbone.tokenizer, config.template_date, config.chat_template_kwargs)
    examples = tokenise(config, recipe, rows, template, backbone, folder.path)
    require_rows(config, len(examples.train), [*context_warnings(config, backbone), *examples.lines])
    task = recipe.build(backbone, template)
    if getattr(config, "packing", False):
        check_packing(task.model, [row.input_ids for row in examples.train[:3]])
    wanted = config.gradient_checkpointing
    recomputes = session.device.type == "cuda" if wanted is None else wanted
    if recomputes:
        gradient_checkpointing(task.model.peft_model)
    if config.has_packed_rows and "neftune_noise_alpha" not in config.trainer:  # whose size goes by the width of a pass
        kernel = backbone.attn_implementation
        backbone.packing = packing_of(trunk(task.model.peft_model), kernel, skips=not recomputes)
    run_entry.check_same_models(folder, backbone.identity, template, [p.manifest() for p in task.parents])
    if session.is_main and not folder.checkpoints():
        require_room(folder.path, sum(p.numel() for p in task.model.parameters() if p.requires_grad))
    job = Job(config, session, recipe, folder, task, examples, total_steps(config, len(examples.train)))
    if session.is_main:
        write_lineage(job, template, rows)
        tell(job, template)
    return job


def require_rows(config: SupervisedConfig, rows: int, account: Sequence[str]) -> None:
    """DataError if there are fewer rows than one optimizer step takes.   account: what became of all rows."""
    where, fix = ", ".join(config.data.train), "add rows, or lower train_batch_size and per_device_train_batch_size"
    require_batch(rows, config.train_batch_size, where, fix, account)


def load_base(config: SupervisedConfig, device: torch.device) -> Backbone:
    return load_backbone(
        path=config.model_name_or_path,
        revision=config.revision,
        lora_compute_dtype=config.lora_compute_dtype,
        **load_options(config, device),
    )


def tokenise(
    config: SupervisedConfig, recipe: Recipe, rows: StageRows, template: Template, backbone: Backbone, folder: Path
) -> Examples:
    """Both sides as token ids, no longer than the model's context.   folder: where they lie if data.streaming."""
    limit = min(config.max_length, backbone.context_length)
    notes = [*rows.warnings, *context_warnings(config, backbone)]
    lines, sides = list(rows.summary), []

    def encode(part: Sequence[Row]) -> Tokenised[Any]:
        return recipe.tokenise(part, template, backbone.tokenizer, limit)

    for name, side, most in (("train", rows.train, None), ("held out", rows.held_out, config.data.eval_max_rows)):
        examples, done = tokenised(side, encode, folder if config.data.streaming else None)
        lines += [f"{name}: {tally}" for tally in done.tallies]
        notes += [f"{name}: {warning}" for warning in done.warnings]
        sides.append(examples[:most])
    if not sides[1]:
        notes.append("no held-out rows: nothing is evaluated (data.held_out_fraction, data.eval)")
    return Examples(sides[0], sides[1], lines, notes)


def context_warnings(config: SupervisedConfig, backbone: Backbone) -> list[str]:
    """A line if the model cannot read rows of max_length."""
    limit = backbone.context_length
    if limit >= config.max_length:
        return []
    return [shortened_note(config.max_length, limit, backbone.model.config.get_text_config())]


def write_lineage(job: Job, template: Template, rows: StageRows) -> None:
    identity = job.task.model.backbone.identity
    job.folder.update_manifest(
        parents=[parent.manifest() for parent in job.task.parents],
        base=identity.manifest(),
        tokenizer_sha256=identity.tokenizer_sha256,
        template=template.manifest(),
        stop_token_ids=list(job.task.model.backbone.stop_ids(template)),
        data=list(rows.manifest),
        held_out=rows.rule.manifest(),
        threads=job.session.num_threads,
        world_size=job.session.world_size,
    )


def tell(job: Job, template: Template) -> None:
    """The header: what is about to happen, and what looks wrong with it."""
    console = job.session.console
    console.header(f"{job.stage}  {job.config.output_dir}", header_lines(job, template))
    model, is_fresh = job.task.model, getattr(job.config, "sft", None) is None
    notes = [*model.backbone.notes, *unused_chat_template(job.config, model.backbone.tokenizer)]
    if is_fresh and job.config.lora.target_modules == "all-linear":
        notes += adapter_notes(trunk(model.peft_model), job.task.adapter)
    for line in [
        *notes,
        *job.examples.warnings,
        *warnings_about(job.config, job.steps),
        *map(str, unused_fields(job.config)),
    ]:
        console.warn(line)


def train(job: Job, stack: ExitStack) -> RunCallback:
    """Run Trainer to the last step. What comes out of it is in the task's weights and in the callback."""
    config, session, rows = job.config, job.session, job.examples.train
    writer = None
    if session.is_main:
        writer = stack.enter_context(MetricsWriter(job.folder.path, config.report_to, config.run_name))
    callback = RunCallback(job, writer)
    order = RowOrder(
        job.task.lengths(rows),
        config.train_batch_size,
        config.per_device_train_batch_size,
        config.seed,
        session.rank,
        session.world_size,
        group_by_length=bool(getattr(config, "group_by_length", False)),
    )
    with undisturbed(session.world_size):
        arguments = training_arguments(config, str(job.folder.path), session.device, session.world_size)
        trainer = SupervisedTrainer(
            job.task, rows, order, config, arguments, session.sum, callback.log, callback.monitor.guards, [callback]
        )
    with session.stop.deferred(), callback.monitor.watchdog.watching():
        callback.run(trainer)
    trainer.accelerator.free_memory()
    callback.keep_best()
    return callback


def finish(job: Job, callback: RunCallback) -> Run:
    """Save the adapter, read it back, compare, write manifest, summary and report."""
    folder, task, session = job.folder, job.task, job.session
    run = Run(
        stage=job.stage,
        status="done",
        run_dir=str(folder.path),
        steps=callback.step,
        seconds=callback.seconds,
        seed=job.config.seed,
        metrics=callback.summary(),
        artifacts={"adapter": "adapter", "report": "report.html"},
    )
    if session.is_main:
        rows = (job.examples.held_out or job.examples.train)[:FIXTURE_ROWS]
        task.model.eval()
        task.save(folder.adapter_dir)
        run.metrics["reload_difference"] = check_saved(task, folder.adapter_dir, rows)
        folder.update_manifest(**task.manifest(rows))
        finish_run(folder, run)
        session.console.done()
        if (line := task.verdict(run.metrics)) is not None:
            session.console.log(f"{job.stage}: {line}")
    session.barrier()
    return run


def check_saved(task: Task, folder: Path, rows: Sequence[Any]) -> float:
    """Read the adapter back from disk and compare weights and outputs with those in memory (F25). Returns the largest difference of
    outputs.

    InvariantError if a weight differs, or outputs by more than RELOAD_TOLERANCE: what was saved is not what was trained."""
    model = task.model
    batch = {k: t.to(model.backbone.device) for k, t in task.collate([(row, True) for row in rows]).items()}
    files = read_adapter(folder)
    weights = task.tensors()
    wrong = [name for name in weights | files.tensors if not _equal(weights.get(name), files.tensors.get(name))]
    if wrong:
        raise InvariantError.at(
            str(folder),
            "the adapter read back has other weights than the one trained",
            "equal tensors",
            ", ".join(wrong[:3]),
        )
    add_from_files(model.peft_model, READ_BACK, files, trainable=False)
    with torch.no_grad():
        trained = task.outputs(batch, None)
        with use_adapter(model.peft_model, READ_BACK):
            worst = float((task.outputs(batch, files.head) - trained).abs().max())
    model.peft_model.delete_adapter(READ_BACK)
    limit = RELOAD_TOLERANCE * max(float(trained.abs().max()), 1.0)
    if not worst <= limit:
        raise InvariantError.at(
            str(folder),
            "the adapter read back gives other outputs than the one trained",
            f"a difference of at most {limit:.3g}",
            f"{worst:.3g}",
        )
    return worst


def _equal(trained: torch.Tensor | None, saved: torch.Tensor | None) -> bool:
    return trained is not None and saved is not None and torch.equal(trained, saved)
