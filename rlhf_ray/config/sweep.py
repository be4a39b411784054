"""A sweep: one PPO or DPO job, what varies in it, and how the winner is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.rewards import SpaceFields, StageFields
from rlhf_ray.config.sections import Count, Ints, Positive, field
from rlhf_ray.config.stages import JobFields

_OF_EACH_TRIAL = ("policies", "baseline", "reference", "output_dir", "seed", "resume")
"""Fields of `evaluate` that a sweep fills in itself."""


class SweepConfig(JobFields):
    """A search over PPO or DPO jobs. Shared fields stand at the top, those of the stage under `ppo` or `dpo`; trials write
    output_dir/trials/<id>."""

    ppo: StageFields | None = field(None, "fields of PPOConfig that all trials share")
    dpo: StageFields | None = field(None, "fields of DPOConfig that all trials share; instead of ppo")
    evaluate: StageFields | None = field(
        None,
        "dpo: fields of EvaluateConfig (data, rewards, response_length, ...); each trial, trained, answers its held-out prompts"
        " beside the policy that it started from. Reward, KL and length come from there, since DPO samples nothing; half of the"
        " prompts choose nothing, and confirm the winner (as with ppo.confirm_held_out)",
    )
    space: SpaceFields = field(
        ...,
        "what varies: a field of ppo or dpo (a.b for nested ones) -> a list of values, {choice: [..]}, {uniform: [low, high]},"
        " {loguniform: [low, high]}, {randint: [low, high]}, or {given: other field, cases: {its value: any of these}}",
    )
    seeds: Ints = field((0,), "every setting runs once with each; settings x seeds: at most 10,000", min_length=1)
    search: Literal["grid", "random", "optuna"] = field(
        "grid", "grid: every combination of lists; random: independent draws; optuna: TPE (extra sweep)"
    )
    num_samples: Count = field(16, "random and optuna: settings to try, each with every seed")
    metric: Annotated[str, Field(pattern=r"^eval/")] = field(
        "eval/reward",
        "what is maximised: a held-out metric, e.g. eval/reward/<name> of a judge with weight 0; default: that of ppo.watch; of dpo"
        " without evaluate: eval/accuracy, the share of held-out pairs that the trial ranks as they are labelled",
    )
    scheduler: Literal["none", "asha", "median_stopping"] = field(
        "none", "stop trials early: asha (arXiv:1810.05934), or those below the median of the others"
    )
    grace_evaluations: Count = field(2, "evaluations of a trial before it can be stopped early")
    reduction_factor: Annotated[int, Field(ge=2)] = field(3, "asha: at each rung one in this many trials continues")
    max_concurrent_trials: Count | None = field(None, "trials at once; default: as many as fit")
    share_base: bool = field(
        False,
        "trials run several at a time in one process on one loaded base, each with adapters and optimizer of its own; they sample"
        " in one batch and take turns for the rest. For colocated trials of one worker at ZeRO 0 to 2; with learner.num_workers 0"
        " that process is this one, without Ray",
    )
    trials_per_base: Count = field(
        8, "with share_base: trials at once in a process; more of them take another process, where resources allow one"
    )
    time_budget_s: Positive | None = field(
        None,
        "seconds for all trials of a start; what has not ended by then is stopped, and resumes with the sweep if no trial had"
        " finished by then, or if the sweep is started again with a larger budget",
    )
    max_trial_failures: Annotated[int, Field(ge=0)] = field(
        1, "how often a trial that fails or dies is resumed from its checkpoint"
    )
    kl_cap: Positive | None = field(
        10.0,
        "selection: highest mean eval/kl_k1_per_response, nats, that a winner may have; null: any; of dpo without evaluate, which"
        " measures no KL: null; a winner whose KL was not measured (greedy evaluations, say) comes with a warning",
    )
    length_ratio: Annotated[float, Field(ge=1)] | None = field(
        2.0,
        "selection: replies may become at most this many times longer, or shorter, than before training (which needs"
        " ppo.eval_on_start); null: any; of dpo without evaluate: null",
    )

    @model_validator(mode="before")
    @classmethod
    def _judged_by_what_watches(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        ppo = values.get("ppo")
        watch = ppo.get("watch") if isinstance(ppo, dict) else None
        if isinstance(watch, str) and "metric" not in values:
            return {**values, "metric": f"eval/reward/{watch}"}
        if values.get("dpo") is not None and values.get("evaluate") is None:  # no replies: pairs are all there is
            return {"metric": "eval/accuracy", "kl_cap": None, "length_ratio": None, **values}
        return values

    @model_validator(mode="after")
    def _sweep_rules(self) -> SweepConfig:
        if (self.ppo is None) == (self.dpo is None):
            raise ValueError("ppo: a sweep is over jobs of one stage; set exactly one of ppo and dpo")
        problems = [
            f"{self.stage}.{name}: {why}"
            for name, why in (
                ("output_dir", "each trial writes to output_dir/trials; set output_dir at the top"),
                ("seed", "set seeds at the top"),
                ("resume", "trials always resume from their checkpoints; set resume at the top level"),
            )
            if name in self.fields or name in self.space
        ]
        problems += self._evaluate_rules()
        if "seed" in self.model_fields_set:
            problems.append("seed: a sweep has seeds; write seeds: [0, 1, 2]")
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds: repeat: {', '.join(map(str, self.seeds))}")
        if self.metric.startswith("eval/confirm/"):
            problems.append("metric: eval/confirm/* are the prompts that confirm the winner, and must not choose it")
        if not self.space:
            problems.append(f"space: is empty; name at least one field of {self.stage} and its values")
        if problems:
            raise ValueError(" | ".join(problems))
        return self

    def _evaluate_rules(self) -> list[str]:
        if self.dpo is None:
            return ["evaluate: trials of PPO are measured as they train; drop it"] if self.evaluate is not None else []
        problems = [
            f"evaluate.{name}: is each trial's own; drop it" for name in _OF_EACH_TRIAL if name in (self.evaluate or ())
        ]
        if self.scheduler != "none":
            problems.append(
                f"scheduler: trials of DPO are measured once, at their end; expected none; got {self.scheduler}"
            )
        if self.evaluate is None:
            for name in ("kl_cap", "length_ratio"):
                if getattr(self, name) is not None:
                    problems.append(f"{name}: DPO samples no replies to measure it by; add evaluate, or drop it")
            if self.metric != "eval/accuracy":
                problems.append(
                    f"metric: expected eval/accuracy, or a section evaluate to measure it by; got {self.metric}"
                )
        elif not self.metric.startswith("eval/reward"):
            problems.append(
                f"metric: expected eval/reward or eval/reward/<name>, as evaluate measures it; got {self.metric}"
            )
        return problems

    @property
    def stage(self) -> Literal["ppo", "dpo"]:
        """Of the trials."""
        return "ppo" if self.dpo is None else "dpo"

    @property
    def fields(self) -> dict[str, Any]:
        """What all trials share beside the fields at the top."""
        return (self.ppo if self.dpo is None else self.dpo) or {}

    def shared_values(self) -> dict[str, Any]:
        """The fields at the top that are set, as in a job file."""
        shared = {n: getattr(self, n) for n in self.model_fields_set & set(JobFields.model_fields)}
        return {n: v.model_dump(exclude_unset=True) if hasattr(v, "model_dump") else v for n, v in shared.items()}

    def trial_values(self) -> dict[str, Any]:
        """What the trials' job files have in common."""
        return {**self.shared_values(), **self.fields, "resume": "auto"}

    def confirming(self, confirm: bool) -> SweepConfig:
        """With ppo.confirm_held_out as given, where the job says nothing of it."""
        if self.ppo is None or "confirm_held_out" in {**self.ppo, **self.space}:
            return self
        return self.model_copy(update={"ppo": {**self.ppo, "confirm_held_out": confirm}})
