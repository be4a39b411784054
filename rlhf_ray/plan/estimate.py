"""From a job to the memory of each of its processes, phase by phase. Loads nothing: config.json and the job are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rlhf_ray.config import (
    STAGES,
    DPOConfig,
    EvaluateConfig,
    JobFields,
    PipelineConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlhf_ray.config.deepspeed import read_deepspeed_json
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan.engine import engine_note, engine_parts, with_engine
from rlhf_ray.plan.memory import Parts, Phases, Process, Zero, with_overhead
from rlhf_ray.plan.meta_tracker import Device, Peak
from rlhf_ray.plan.passes import Cast, PPOLearning, Shapes, SupervisedLearning
from rlhf_ray.plan.role_models import (
    Made,
    evaluation_models,
    generator_models,
    learner_models,
    scorer_models,
    supervised_models,
)
from rlhf_ray.ppo.vllm import gpu_share

ASSUMED_PROMPT = 512
"""Prompt tokens where neither max_length nor --prompt-tokens says."""

_SHAPE_FIELDS = {
    *(
        "output_dir",
        "run_name",
        "seed",
        "resume",
        "copy_to",
        "report_to",
        "data",
        "ptx_data",
        "rollout_batch_size",
        "rollout_chunk_size",
        "sampler_rows",
    ),
    *(
        "per_device_train_batch_size",
        "tokens_per_microbatch",
        "num_mini_batches",
        "max_length",
        "response_length",
        "learner",
        "generator",
    ),
    *("scorer", "wait_for_resources", "per_device_eval_batch_size"),
}
"""Fields that change no model: two jobs that differ in these alone have the same cast."""


@dataclass
class Estimator:
    """Estimates jobs; what two of them have in common is worked out once.

    prompt: tokens of the longest prompt, None for what the job allows."""

    device: Device
    made: Made = field(default_factory=Made)
    prompt: int | None = None
    _casts: dict[Any, Any] = field(default_factory=dict)
    _peaks: dict[Any, Parts] = field(default_factory=dict)

    def stages(self, job: JobFields) -> Iterator[tuple[str, JobFields]]:
        """A pipeline's stages by name; any other job alone."""
        if isinstance(job, PipelineConfig):
            yield from ((stage, job.stage_config(stage)) for stage in job.stages)
        else:
            yield next(stage for stage, cls in STAGES.items() if type(job) is cls), job

    def processes(self, job: JobFields) -> list[Process]:
        """The processes of one stage. Raises ConfigError, ArtifactError for models that cannot be read."""
        if isinstance(job, PPOConfig):
            return self._ppo(job)
        if isinstance(job, EvaluateConfig):
            return self._evaluation(job)
        assert isinstance(job, (SFTConfig, DPOConfig, RewardConfig))
        return self._supervised(job)

    def shapes(self, job: PPOConfig | EvaluateConfig, context: int) -> Shapes:
        """Widest passes of a job on a model of this context. ConfigError if no prompt fits."""
        limit = min(job.max_length or context, context)
        room = limit - job.response_length
        if room < 1:
            raise ConfigError.at(
                "response_length", "leaves no room for a prompt", f"below {limit}", str(job.response_length)
            )
        longest = job.max_prompt_length if isinstance(job, PPOConfig) else None
        longest = longest or (room if job.max_length is not None else ASSUMED_PROMPT)
        prompt = min(room, self.prompt or longest)
        if isinstance(job, EvaluateConfig):
            rows = job.per_device_eval_batch_size
            scored, chunk = min(rows, job.rollout_chunk_size), job.rollout_chunk_size
            return Shapes(rows, scored, chunk, 1, prompt, job.response_length, job.sampler_rows)
        chunk = min(job.chunk_rows, job.rollout_batch_size)
        share = -(-job.rollout_batch_size // job.num_mini_batches // max(job.learner.num_workers, 1))
        rows = min(job.per_device_train_batch_size, share)
        scored = min(job.per_device_train_batch_size, chunk)
        how: dict[str, Any] = {"contiguous": job.has_contiguous_rows, "packed": job.has_packed_rows}
        return Shapes(rows, scored, chunk, job.num_generations, prompt, job.response_length, job.sampler_rows, **how)

    def about(self, job: JobFields) -> str:
        """What the estimate stands on, in a line."""
        cast = self._first(job)
        base = cast.assembly.base
        recomputed = "recomputed" if cast.models.recompute else "kept"
        facts = [f"{base.identity.path}", f"{cast.base_weights / 1e9:.3g} G weights in {len(cast.bases)} base"]
        facts[-1] += "s" if len(cast.bases) > 1 else ""
        facts += [f"{base.identity.precision} on {self.device}", f"activations {recomputed}"]
        if isinstance(job, (PPOConfig, EvaluateConfig)):
            shapes = self.shapes(job, base.context_length)
            facts.append(f"prompts of {shapes.prompt} and replies of {shapes.response} tokens, {shapes.chunk} at once")
            if isinstance(job, PPOConfig) and job.ptx_coef:
                facts.append(f"rows of ptx_data of {shapes.prompt + shapes.response} tokens")
        else:
            assert isinstance(job, (SFTConfig, DPOConfig, RewardConfig))
            facts.append(f"rows of {min(job.max_length, base.context_length)} tokens")
        return ", ".join(facts)

    def notes(self, job: JobFields) -> list[str]:
        """What had to be assumed."""
        found = []
        if isinstance(job, (PPOConfig, EvaluateConfig)) and job.max_length is None and self.prompt is None:
            tokens = self.shapes(job, self._first(job).assembly.base.context_length).prompt
            found.append(
                f"max_length is not set: prompts of {tokens} tokens are assumed; set it, or give --prompt-tokens"
            )
        if isinstance(job, PPOConfig) and job.rollout.engine == "vllm" and self.device == "cuda":
            cast = self._first(job)
            shapes = self.shapes(job, cast.assembly.base.context_length)
            engine = engine_parts(job, cast, shapes, self.device)
            found.append(engine_note(engine, gpu_share(job), "rollout.gpu_memory_utilization"))
        if job.cpu_offload:
            found.append("cpu_offload is not counted: these are the bytes if nothing is moved to the CPU")
        return found

    def _first(self, job: JobFields) -> Cast:
        """The cast of the learner."""
        if isinstance(job, PPOConfig):
            return self._cast("learner", job, partial(learner_models, job, self.device, self.made))
        if isinstance(job, EvaluateConfig):
            return self._cast("evaluation", job, partial(evaluation_models, job, self.device, self.made))
        assert isinstance(job, (SFTConfig, DPOConfig, RewardConfig))
        return self._cast("supervised", job, partial(supervised_models, job, self.device, self.made))

    def _ppo(self, job: PPOConfig) -> list[Process]:
        split, workers = job.placement == "split", max(job.learner.num_workers, 1)
        found = [self._learner(job, workers)]
        if split:
            for role, build in (("generator", generator_models), ("scorer", scorer_models)):
                cast = self._cast(role, job, partial(build, job, self.device, self.made))
                shapes = self.shapes(job, cast.assembly.base.context_length)
                if role == "generator" and job.rollout.engine == "vllm":
                    phases = {"sampling": engine_parts(job, cast, shapes, self.device)}
                    phases["load"] = {part: phases["sampling"][part] for part in ("bases", "adapters")}
                else:
                    phases = {"load": self._peak(cast, "load", (), cast.load), **self._acting(role, cast, shapes, job)}
                actors = getattr(job, role)
                found.append(self._process(role, actors.num_actors, actors.num_gpus, phases, cast))
        return found

    def _learner(self, job: PPOConfig, workers: int) -> Process:
        cast = self._first(job)
        learning: PPOLearning = self._learning(cast, partial(PPOLearning, cast, job))
        shapes = self.shapes(job, cast.assembly.base.context_length)
        stage = job.learner.zero_stage
        phases = {"load": self._peak(cast, "load", (), cast.load)}
        if job.placement == "colocate":
            if job.rollout.engine == "builtin":
                phases |= self._acting("generator", cast, shapes, job)
            else:
                phases["sampling"] = phases["load"]
            phases |= self._acting("scorer", cast, shapes, job)
        joint, passes = stage > 0, shapes.within(job.tokens_per_microbatch)
        phases["evaluation"] = self._widest(cast, "evaluation", passes, lambda s: learning.evaluation(s, job))
        phases["update"] = self._widest(cast, ("update", joint), passes, lambda s: learning.updates(s, job, joint))
        file = job.learner.deepspeed
        settings = read_deepspeed_json(file, stage).get("zero_optimization", {}) if file is not None else {}
        zero = Zero.of(stage, workers, cast.trained, cast.base_weights, settings)
        phases = zero.applied(phases, self.device)
        if job.placement == "colocate" and job.rollout.engine == "vllm":
            asleep = {"evaluation", "update"} if job.rollout.enable_sleep_mode and self.device == "cuda" else ()
            phases = with_engine(phases, engine_parts(job, cast, shapes, self.device), frozenset(asleep))
        return self._process("learner", workers, job.learner.num_gpus, phases, cast)

    def _acting(self, role: str, cast: Cast, shapes: Shapes, job: PPOConfig) -> Phases:
        """What a generator, or a scorer, does."""
        if role == "generator":
            how = job.eval_sampling.model_copy(update={"temperature": job.temperature})  # rollouts never truncate
            return {"sampling": self._peak(cast, "sampling", shapes, lambda: cast.sampling(shapes, how))}
        rewards = [role for r in job.rewards for role in r.models(r.name) if role in cast.models.bindings]
        passes = shapes.within(job.tokens_per_microbatch)
        return {
            "scoring": self._widest(
                cast, "scoring", passes, lambda s: cast.scoring(s, job.temperature, "reference", rewards)
            )
        }

    def _evaluation(self, job: EvaluateConfig) -> list[Process]:
        cast = self._first(job)
        bases = [stack.backbone for stack in cast.assembly.stacks.values()]
        shapes = self.shapes(job, min(base.context_length for base in bases if not base.is_encoder))
        policies = [f"policy_{i}" for i, policy in enumerate(job.policies) if policy.policy is not None]
        rewards = [role for i, r in enumerate(job.rewards) for role in r.models(f"reward_{i}")]
        heat = job.sampling.temperature
        phases = {"load": self._peak(cast, "load", (), cast.load)}
        sampled = [
            self._peak(cast, ("sampling", p), shapes, partial(cast.sampling, shapes, job.sampling, p)) for p in policies
        ]
        if sampled:
            phases["sampling"] = max(sampled, key=lambda parts: sum(parts.values()))
        phases["scoring"] = self._peak(
            cast, "scoring", shapes, lambda: cast.scoring(shapes, heat, next(iter(policies), None), rewards)
        )
        return [self._process("learner", max(job.learner.num_workers, 1), job.learner.num_gpus, phases, cast)]

    def _supervised(self, job: SFTConfig | DPOConfig | RewardConfig) -> list[Process]:
        cast = self._first(job)
        learning: SupervisedLearning = self._learning(cast, partial(SupervisedLearning, cast, job))
        rows, evaluated = job.per_device_train_batch_size, job.per_device_eval_batch_size
        phases = {
            "load": self._peak(cast, "load", (), cast.load),
            "evaluation": self._peak(cast, "evaluation", evaluated, lambda: learning.evaluation(evaluated)),
            "update": self._peak(cast, "update", rows, lambda: learning.training(rows)),
        }
        workers = max(job.learner.num_workers, 1)
        if workers > 1:  # DDP sends gradients from buckets of its own
            update = phases["update"]
            phases["update"] = {**update, "gradients": update.get("gradients", 0) + 4 * cast.trained}
        return [self._process("learner", workers, job.learner.num_gpus, phases, cast)]

    def _process(self, role: str, count: int, asked: float | None, phases: Phases, cast: Cast) -> Process:
        share = 0.0 if self.device == "cpu" else 1.0 if asked is None else asked
        return Process(role, count, share, with_overhead(phases, self.device), cast.bases)

    def _cast(self, role: str, job: JobFields, build: Callable[[], Any]) -> Cast:
        key = role, job.model_dump_json(exclude=_SHAPE_FIELDS)
        if key not in self._casts:
            self._casts[key] = Cast(self.device, build)
        cast: Cast = self._casts[key]
        return cast

    def _learning(self, cast: Cast, make: Callable[[], Any]) -> Any:
        key = "learning", id(cast)
        if key not in self._casts:
            self._casts[key] = make()
        return self._casts[key]

    def _widest(self, cast: Cast, what: Any, passes: list[Shapes], run: Callable[[Shapes], Peak]) -> Parts:
        """`_peak` of the passes that take most."""
        found = [self._peak(cast, what, shapes, partial(run, shapes)) for shapes in passes]
        return max(found, key=lambda parts: sum(parts.values()))

    def _peak(self, cast: Cast, what: Any, shapes: Any, run: Callable[[], Peak]) -> Parts:
        key = id(cast), what, shapes
        if key not in self._peaks:
            self._peaks[key] = run().bytes
        return dict(self._peaks[key])


def changed(job: JobFields, **fields: Any) -> JobFields:
    """The job with other values of some fields (`learner__zero_stage=3` reaches into a section), checked as a job file is.

    Raises pydantic's ValidationError (a ValueError) if they do not go together."""
    values = job.model_dump(exclude_unset=True)
    for name, value in fields.items():
        section, _, inner = name.rpartition("__")
        target = values.setdefault(section, {}) if section else values
        target[inner] = value
    return type(job).model_validate(values)


def with_stages(job: PipelineConfig, estimator: Estimator) -> Estimator:
    """An estimator that knows what the pipeline's earlier stages will make."""
    return replace(estimator, made=Made.by(job), _casts={}, _peaks={})
