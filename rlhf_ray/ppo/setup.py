"""Everything a PPO run needs before its first step: models and who sits where, prompts, roles, writers, schedule of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from rlhf_ray.batches import Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.config.unused import unused_fields
from rlhf_ray.console import counted
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.records import DataFile, Row, check_same_data
from rlhf_ray.data.schedule import PromptSchedule, response_budgets
from rlhf_ray.data.templates import unused_chat_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.maths.schedules import lr_multiplier, resolve_warmup, value_warmup
from rlhf_ray.metrics import MetricsWriter, SamplesWriter
from rlhf_ray.models.adapters import adapter_config
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.coverage import adapter_notes
from rlhf_ray.models.lineage import describe, header_line
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.zero3 import whole_numel
from rlhf_ray.ppo.actors import check_and_describe
from rlhf_ray.ppo.models import assemble, decoding, policy_sampler, synced_reference, text_maker
from rlhf_ray.ppo.prompts import Prompts, load_prompts
from rlhf_ray.ppo.reward_gate import check_reward_models
from rlhf_ray.ppo.vllm import engine_lines, policy_engine
from rlhf_ray.rewards.build import RewardBuilder
from rlhf_ray.rewards.protocol import Texts
from rlhf_ray.roles.collector import Collector, LocalCollector
from rlhf_ray.roles.generator import Decoding, Generator
from rlhf_ray.roles.invariants import tolerance
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.loaded_adapter import EngineAdapter, LoadedAdapter
from rlhf_ray.roles.loading_generator import BesideGenerator
from rlhf_ray.roles.ptx import PtxRows
from rlhf_ray.roles.roles_log import RolesLog
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.checkpoints import require_room
from rlhf_ray.storage.run_folder import RunFolder
from rlhf_ray.training.environment import not_exact
from rlhf_ray.training.header import config_line
from rlhf_ray.training.run_entry import check_same_models, mended_functions

if TYPE_CHECKING:
    from rlhf_ray.roles.actor_collector import RemoteRoles
    from rlhf_ray.roles.actor_pool import PendingCall

EVALUATIONS = 10


class Writers:
    """metrics.jsonl and samples.jsonl of rank 0, under `placement: split` roles.log; nothing on other ranks."""

    def __init__(self, config: PPOConfig, folder: RunFolder, is_main: bool) -> None:
        self._open = ExitStack()
        self.roles: RolesLog | None = None
        if is_main and config.placement == "split":
            self.roles = RolesLog(folder.path / "roles.log")
            self._open.callback(self.roles.close)
        if is_main:
            self.metrics = MetricsWriter(folder.path, config.report_to, config.run_name)
            self.samples = SamplesWriter(folder.path)
            self._open.callback(self.metrics.close)
            self._open.callback(self.samples.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()


@dataclass
class PPOSetup:
    """The parts of one rank. held_out: evaluation prompts, the same on every rank.  confirming: which of them are reported apart.

    budgets, learning_rates: of a step.  save_due: (step, last step) -> whether a checkpoint is.

    synced_reference: this rank's own, where it scores; None without resets of the reference.  engine_adapter: the policy in an
    engine of this process with a base of its own; None where the sampler is on the learner's model, or elsewhere."""

    folder: RunFolder
    backbone: Backbone
    learner: Learner
    remote_roles: RemoteRoles | None
    synced_reference: LoadedAdapter | None
    engine_adapter: EngineAdapter | None
    collector: Collector
    eval_collector: Collector
    eval_decoding: Decoding
    schedule: PromptSchedule[TokenisedPrompt]
    held_out: Sequence[TokenisedPrompt]
    confirming: Sequence[bool]
    stop_ids: tuple[int, ...]
    total_steps: int
    eval_every: int
    budgets: Callable[[int], list[int]]
    learning_rates: Callable[[int], dict[str, float]]
    save_due: Callable[[int, int], bool]
    listed_saves: frozenset[int]
    to_texts: Callable[[Rollout, Sequence[Row]], Texts]
    tolerance: float
    policy_config: dict[str, Any]
    value_config: dict[str, Any]
    writers: Writers = field(repr=False)

    @property
    def base_path(self) -> str:
        return self.backbone.identity.path

    @property
    def value_base_path(self) -> str:
        return self.learner.models.stack_of("value").backbone.identity.path


def set_up(config: PPOConfig, session: Session, folder: RunFolder, held: ExitStack | None = None) -> PPOSetup:
    """Load, check, and say what this run is. Raises the error tree before the first rollout.

    held: ends what must not outlive the run, an engine beside the learner; None leaves it to the process's end."""
    weak = check_reward_models(config) if not folder.checkpoints() else []
    engine_adapter = _engine_beside(config, session, held)
    remote_roles = _remote_roles(session) if config.placement == "split" else None
    loading = remote_roles.wake() if remote_roles is not None and session.is_main else []
    assembly, roles = assemble(config, session.device, None if session.seat is None else session.seat.place)
    backbone, template = assembly.base, roles.template
    prompts = load_prompts(config, backbone, template, is_resumed=bool(folder.checkpoints()))
    if folder.checkpoints():
        check_same_data(folder.manifest()["data"], [DataFile(**item) for item in prompts.manifest])
        judges, functions = roles.kinds_of_parents()
        check_same_models(folder, backbone.identity, template, [*_started_from(assembly, roles), *judges])
        roles.warnings += mended_functions(folder, functions)
    models = assembly.finish()
    learner = Learner(models, config, session, PtxRows(prompts.ptx, config, backbone.pad_id) if prompts.ptx else None)
    synced = synced_reference(models)
    if session.is_main and not folder.checkpoints():
        require_room(folder.path, sum(whole_numel(p) for group in learner.groups for p in group.parameters.values()))
    to_texts = text_maker(backbone, template)
    stop_ids = backbone.stop_ids(template)
    eval_decoding = decoding(config.eval_sampling, stop_ids)
    collector: Callable[[float], Collector]
    if remote_roles is not None:
        split = remote_roles.collector(config.chunk_rows, backbone.pad_id)
        collector = lambda temperature: split  # noqa: E731  # scorers take the temperature with each request
    else:
        collector = _own_collector(config, session, assembly, roles, learner, to_texts, synced, engine_adapter)
    total = _total_steps(config, prompts.schedule, "value" in models.bindings)
    eval_every = config.eval_steps or max(total // EVALUATIONS, 1)
    listed = frozenset(config.save_steps) if isinstance(config.save_steps, tuple) else frozenset()
    save_every = config.save_steps if isinstance(config.save_steps, int) else None if listed else eval_every
    policy_model = models.stack_of("policy").peft
    setup = PPOSetup(
        folder=folder,
        backbone=backbone,
        learner=learner,
        remote_roles=remote_roles,
        synced_reference=synced,
        engine_adapter=engine_adapter,
        collector=collector(config.temperature),
        eval_collector=collector(eval_decoding.temperature),
        eval_decoding=eval_decoding,
        schedule=prompts.schedule,
        held_out=prompts.held_out,
        confirming=prompts.confirming,
        stop_ids=stop_ids,
        total_steps=total,
        eval_every=eval_every,
        budgets=lambda step: response_budgets(
            config.rollout_batch_size, config.min_response_length, config.response_length, config.seed, step
        ),
        learning_rates=partial(learning_rates, config, [group.name for group in learner.groups], total),
        save_due=lambda step, last: step == last or step in listed or bool(save_every and step % save_every == 0),
        listed_saves=listed,
        to_texts=to_texts,
        tolerance=tolerance(backbone.dtype, config.load_in_8bit or config.load_in_4bit),
        policy_config=adapter_config(policy_model, str(models.bindings["policy"].adapter)),
        value_config=_value_config(models),
        writers=Writers(config, folder, session.is_main),
    )
    whereabouts = [f"rank {rank}, {line}" for rank, line in enumerate(session.gather(session.where)) if line]
    if session.is_main:
        _write_manifest(setup, assembly, roles, prompts, session)
        _tell(config, session, setup, roles, prompts, loading, whereabouts)
        notes = [note for stack in assembly.stacks.values() for note in stack.backbone.notes]
        notes += unused_chat_template(config, backbone.tokenizer)
        if config.sft is None and config.lora.target_modules == "all-linear":
            notes += adapter_notes(trunk(policy_model), "policy")
        _warn(config, session, total, [*notes, *prompts.warnings, *roles.warnings, *weak])
    return setup


def _engine_beside(config: PPOConfig, session: Session, held: ExitStack | None) -> EngineAdapter | None:
    """vLLM beside the learner, if this process is to sample with it."""
    if config.rollout.engine != "vllm" or config.placement != "colocate":
        return None
    _, adapter = policy_engine(config, session.device, "generator")
    if held is not None:
        held.callback(adapter.engine.close)
    return adapter


def _total_steps(config: PPOConfig, schedule: PromptSchedule, has_value: bool) -> int:
    """Steps of the run. ConfigError if the value model would warm up through all of them."""
    total = config.max_steps if config.max_steps > 0 else schedule.steps(config.num_train_epochs)
    if has_value and value_warmup(config.value.warmup_steps, total) >= total:
        raise ConfigError.at(
            "value.warmup_steps",
            f"the run has {total} steps, and in none of them would the policy learn",
            f"less than {total}",
            f"{config.value.warmup_steps:g}",
            "lower it, or add prompts or max_steps",
        )
    return total


def _tell(
    config: PPOConfig,
    session: Session,
    setup: PPOSetup,
    roles: RewardBuilder,
    prompts: Prompts,
    loading: list[list[PendingCall]],
    whereabouts: list[str],
) -> None:
    """The run's header, and who is who in roles.log.   loading: actors that were woken.   whereabouts: a line for each rank."""
    lines = header_lines(config, setup, roles, session, prompts.lines, whereabouts)
    if setup.remote_roles is not None and setup.writers.roles is not None:
        found = setup.remote_roles.introduce(loading)
        actors = check_and_describe(found, setup.backbone.identity)
        learners = [header_line("learner", line) for line in whereabouts]
        setup.writers.roles.start([*learners, *actors], {name: about["pid"] for name, about in found})
        lines += [*actors, header_line("log", "roles.log: who sampled and scored each step, with which adapter")]
    session.console.header(f"ppo  {config.output_dir}", lines)


def _warn(config: PPOConfig, session: Session, total: int, notes: Sequence[str]) -> None:
    _, never = reference_resets(config, total)
    for line in [*notes, *map(str, unused_fields(config)), *never, *controller_warnings(config)]:
        session.console.warn(line)


def _remote_roles(session: Session) -> RemoteRoles:
    from rlhf_ray.roles.actor_collector import RemoteRoles  # brings Ray, without which a job in one process runs

    return RemoteRoles(session.actor_handles, session)


def _own_collector(
    config: PPOConfig,
    session: Session,
    assembly: Assembly,
    roles: RewardBuilder,
    learner: Learner,
    to_texts: Callable[[Rollout, Sequence[Row]], Texts],
    synced: LoadedAdapter | None,
    engine_adapter: EngineAdapter | None,
) -> Callable[[float], Collector]:
    """Makes collectors, by temperature, that sample and score on the learner's own models, or sample in an engine beside them."""
    models, pad_id, batching = learner.models, assembly.base.pad_id, learner.batching
    module, lockstep, max_over_ranks = learner.engine.module, learner.lockstep, learner.models.max_over_ranks
    rewards = roles.build(module, batching, session.device, max_over_ranks)
    if engine_adapter is not None:
        generator: Generator = BesideGenerator(pad_id, config.seed, engine_adapter)
    else:
        forward = partial(module, "decode") if lockstep else None
        sampler: Any = policy_sampler(config, assembly, models.stack_of("policy").model, forward)
        if session.seat is not None:
            sampler = session.seat.sampler(sampler)
        some_rank_decodes = (lambda busy: bool(session.highest(int(busy)))) if lockstep else None
        generator = Generator(sampler, pad_id, config.seed, some_rank_decodes)

    def collector(temperature: float) -> Collector:
        scorer = Scorer(
            module,
            rewards,
            to_texts,
            temperature,
            batching,
            session.device,
            max_over_ranks=max_over_ranks,
            synced=synced,
            overlaps=session.seat is None,  # runs that share a process take turns
        )
        return LocalCollector(generator, scorer, session, config.chunk_rows, pad_id, lockstep)

    return collector


def learning_rates(config: PPOConfig, groups: Sequence[str], total_steps: int, step: int) -> dict[str, float]:
    """Learning rate of each parameter group at `step` (from 1).

    The policy waits while the value model warms up, and its own warm-up and decay fill the steps after that."""

    def rate(peak: float, waits: int) -> float:
        if step <= waits:
            return 0.0
        steps = total_steps - waits
        warmup = resolve_warmup(config.warmup_steps, steps)
        return peak * lr_multiplier(config.lr_scheduler_type, step - 1 - waits, steps, warmup, config.min_lr_ratio)

    waits = value_warmup(config.value.warmup_steps, total_steps) if "value" in groups else 0
    peaks = {"policy": (config.learning_rate, waits), "value": (config.value.learning_rate or 0.0, 0)}
    return {group: rate(*peaks[group]) for group in groups}


def _value_config(models: RoleModels) -> dict[str, Any]:
    if "value" not in models.bindings:
        return {}
    return adapter_config(models.stack_of("value").peft, str(models.bindings["value"].adapter))


def header_lines(
    config: PPOConfig,
    setup: PPOSetup,
    roles: RewardBuilder,
    session: Session,
    data_lines: list[str],
    whereabouts: list[str],
) -> list[str]:
    """What the run is, before it starts. whereabouts: of the learner's ranks, where they are Ray workers."""
    backbone, learner = setup.backbone, setup.learner
    trained = {g.name: sum(map(whole_numel, g.parameters.values())) for g in learner.groups}
    total = sum(map(whole_numel, learner.models.parameters()))
    share = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    per_step, world = config.rollout_batch_size // config.num_mini_batches, session.world_size
    penalty = "none" if config.kl_penalty == "none" else f"{config.kl_coef:g} x {config.kl_penalty}"
    resets, _ = reference_resets(config, setup.total_steps)
    return [
        *describe(backbone.identity, (), roles.template),
        *roles.assembly.describe(),
        header_line("trainable", f"{share} of {total:,} parameters"),
        header_line(
            "placement",
            f"{config.placement}, {counted(world, 'worker')}, ZeRO {config.learner.zero_stage}",
        ),
        *engine_lines(config, session.device),
        *zero_3_lines(config, session),
        header_line(
            "device", f"{session.device}, {counted(session.num_threads, 'thread')}, {backbone.attn_implementation}"
        ),
        *([header_line("", f"not bit-exact: {why}")] if (why := not_exact(session.device)) else []),
        *(header_line("learner", line) for line in whereabouts),
        *(header_line("data", line) for line in data_lines),
        header_line(
            "steps",
            f"{setup.total_steps} of {config.rollout_batch_size} replies; {config.num_ppo_epochs} epochs x "
            f"{config.num_mini_batches} minibatches of {per_step} replies; {len(setup.held_out)} held-out prompts",
        ),
        header_line("KL penalty", "; ".join([f"{penalty}, {config.kl_controller} coefficient", *resets])),
        *ptx_lines(config, learner.ptx),
        header_line(
            "tokens", f"pad {backbone.pad.token!r} ({backbone.pad.why}); replies end at {list(setup.stop_ids)}"
        ),
        config_line(config),
    ]


def ptx_lines(config: PPOConfig, ptx: PtxRows | None) -> list[str]:
    if ptx is None:
        return []
    rows = f"{ptx.per_minibatch} of {len(ptx.passes.rows):,} rows in each optimizer step"
    return [header_line("ptx", f"{config.ptx_coef:g} x supervised loss, {rows}")]


def reference_resets(config: PPOConfig, total_steps: int) -> tuple[list[str], list[str]]:
    """(for the header: how often the reference becomes the policy; a warning where that would be after the last step)."""
    every = config.ref_model_sync_steps
    if every is None:
        return [], []
    if every >= total_steps:
        return [], [
            f"ref_model_sync_steps: {every} is not below the run's {total_steps} steps: the reference is never reset"
        ]
    forgets = ", the policy's optimizer with it" if config.ref_model_sync_resets_optimizer else ""
    return [f"the reference is reset to the policy after every {every} steps{forgets}"], []


HELD_BY_A_CONTROLLER = ("kl", "clamped_kl")
"""Penalties under which an adaptive coefficient held its target where that was measured (benchmarks/kl_study.py)."""


def controller_warnings(config: PPOConfig) -> list[str]:
    """A warning where an adaptive coefficient may drive the KL away from its target."""
    penalty = config.kl_penalty
    if config.kl_controller == "fixed" or config.use_kl_loss or penalty in ("none", *HELD_BY_A_CONTROLLER):
        return []
    return [
        f"kl_controller {config.kl_controller} with {penalty} in the reward: where that was measured a higher coefficient brought a"
        " higher KL, and the target was not held (benchmarks/README.md); choose kl or clamped_kl, or kl_controller: fixed"
    ]


def zero_3_lines(config: PPOConfig, session: Session) -> list[str]:
    """What the whole sharding of the base costs where the learner also samples."""
    if config.learner.zero_stage < 3 or config.placement == "split":
        return []
    cost = "every token decoded gathers the whole base again, on all ranks"
    if session.world_size == 1:
        return [
            header_line("", f"ZeRO 3 with 1 worker saves nothing: there is no other worker to share with, and {cost}")
        ]
    return [header_line("", f"ZeRO 3: {cost}; generators of their own (placement: split) decode faster")]


def _started_from(assembly: Assembly, roles: RewardBuilder) -> list[dict[str, Any]]:
    """The adapters that the policy starts from, as a manifest records them."""
    known = {parent["role"] for parent in roles.parents}
    return [
        {"role": role, "path": files.path, "sha256": files.sha256}
        for role, files in assembly.files.items()
        if role not in known
    ]


def _write_manifest(
    setup: PPOSetup, assembly: Assembly, roles: RewardBuilder, prompts: Prompts, session: Session
) -> None:
    """Parents: what the policy starts from, then every reward."""
    parents, identity, template = (
        [*_started_from(assembly, roles), *roles.parents],
        setup.backbone.identity,
        roles.template,
    )
    setup.folder.update_manifest(
        parents=parents,
        base=identity.manifest(),
        tokenizer_sha256=identity.tokenizer_sha256,
        template=template.manifest(),
        stop_token_ids=list(setup.stop_ids),
        data=list(prompts.manifest),
        held_out=prompts.rule.manifest(),
        threads=session.num_threads,
        world_size=session.world_size,
    )
