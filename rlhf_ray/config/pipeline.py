"""Several stages in one job. Shared fields stand at the top; each stage's own fields stand under its name; a stage finds what
an earlier one made without the path being typed again."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from rlhf_ray.config.rewards import StageFields
from rlhf_ray.config.sections import DataConfig, _to_tuple, field, under
from rlhf_ray.config.stages import DPOConfig, EvaluateConfig, JobFields, PPOConfig, RewardConfig, SFTConfig

STAGES: dict[str, type[JobFields]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
OPTIONAL = ("dpo",)
"""Stages that run by default only where the job has a section of them."""
SOURCES = {"run", "ensemble", "model", "function"}
"""A reward has one of these; in ppo.rewards of a pipeline one without is that of the reward stage."""


class PipelineConfig(JobFields):
    """SFT, DPO, reward model, PPO and evaluation in turn, in one worker group. Each stage writes output_dir/<stage>."""

    stages: Annotated[
        tuple[Literal["sft", "dpo", "reward", "ppo", "evaluate"], ...],
        BeforeValidator(_to_tuple),
    ] = field(
        tuple(stage for stage in STAGES if stage not in OPTIONAL),
        "stages to run, in this order; default where the job has a section dpo: that one too, after sft",
    )
    sft: StageFields = field({}, "fields of SFTConfig")
    dpo: StageFields = field({}, "fields of DPOConfig; its data by default those of the reward stage")
    reward: StageFields = field({}, "fields of RewardConfig")
    ppo: StageFields = field(
        {},
        "fields of PPOConfig; of its rewards, one that names no run, ensemble, model or function is that of the reward stage",
    )
    evaluate: StageFields = field({}, "fields of EvaluateConfig")

    @model_validator(mode="before")
    @classmethod
    def _stages_with_a_section(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "stages" in values or not any(values.get(stage) for stage in OPTIONAL):
            return values
        return {**values, "stages": tuple(s for s in STAGES if s not in OPTIONAL or values.get(s))}

    @model_validator(mode="after")
    def _stages(self) -> PipelineConfig:
        if not self.stages or list(self.stages) != [s for s in STAGES if s in self.stages]:
            raise ValueError(
                f"stages: each at most once, in the order {', '.join(STAGES)}; got {', '.join(self.stages) or 'none'}"
            )
        for stage in STAGES:
            if "learner" in getattr(self, stage):
                raise ValueError(f"{stage}.learner: a pipeline has one worker group; set learner at the top")
            if "output_dir" in getattr(self, stage):
                raise ValueError(f"{stage}.output_dir: stages write to output_dir/<stage>; set output_dir at the top")
            if stage not in self.stages and getattr(self, stage):
                raise ValueError(f"{stage}: has settings but is not among stages: {', '.join(self.stages)}")
        return self

    def stage_config(self, stage: str) -> JobFields:
        """The configuration of one stage, wired to the stages before it. Raises pydantic's ValidationError."""
        shared = {name: getattr(self, name) for name in self.model_fields_set & set(JobFields.model_fields)}
        wiring, own = self.wiring(stage), getattr(self, stage)
        wired = {**shared, **wiring, **own, "output_dir": f"{self.output_dir}/{stage}"}
        if self.copy_to is not None and "copy_to" not in own:
            wired["copy_to"] = under(self.copy_to, stage)
        if stage == "ppo" and "rewards" in wiring:
            wired["rewards"] = wiring["rewards"]
        if stage == "evaluate":  # what PPO maximised is always compared; the job may add judges of its own
            wired["rewards"] = [*wiring["rewards"], *own.get("rewards", ())]
        return STAGES[stage].model_validate(wired)

    def _rewards(self, made: dict[str, str]) -> list[Any] | None:
        """PPO's: as the job has them, those that name no reward taken for the reward stage's; that one alone if it names none."""
        given = self.ppo.get("rewards", None if "reward" not in made else [{}])
        if "reward" not in made or not isinstance(given, (list, tuple)):
            return given  # type: ignore[no-any-return]
        own = {"name": "reward", "run": made["reward"]}
        return [{**own, **r} if isinstance(r, dict) and not r.keys() & SOURCES else r for r in given]

    def wiring(self, stage: str) -> dict[str, Any]:
        """What a stage has of those before it, where it says nothing else."""
        made: dict[str, str] = {s: f"{self.output_dir}/{s}" for s in self.stages}
        rewards, wiring = self._rewards(made), dict[str, Any]()
        if "sft" in made and (
            stage in ("dpo", "ppo") or (stage == "reward" and self.reward.get("init_from") != "base")
        ):
            wiring["sft"] = made["sft"]
        if stage == "dpo" and "data" in self.reward:
            wiring["data"] = self.reward["data"]
        if stage == "ppo" and rewards is not None:
            wiring["rewards"] = rewards
        if stage == "evaluate":
            wiring["policies"] = [{"name": "base", "policy": "base"}]
            wiring["policies"] += [{"name": s, "policy": made[s]} for s in ("sft", "dpo", "ppo") if s in made]
            wiring["rewards"] = rewards or []
            for name in (
                "response_length",
                "max_length",
                "stop_token_ids",
                "rollout_chunk_size",
                "sampler_rows",
                "data",
            ):
                if name in self.ppo:
                    wiring[name] = self.ppo[name]
        return wiring


def stages_of(config: Any) -> list[Any]:
    """The jobs of a pipeline's stages; any other job, or a service, by itself."""
    return [config.stage_config(s) for s in config.stages] if isinstance(config, PipelineConfig) else [config]


def held_out_conflicts(config: PipelineConfig) -> list[tuple[str, str, str]]:
    """(stage, what, fix) for each stage that holds out prompts on which a stage before it trains, as far as their data sections
    say. What only the rows can tell is found when the stage starts (training/ancestry.py)."""
    found: list[tuple[str, str, str]] = []
    before: dict[str, DataConfig] = {}
    for stage in config.stages:
        if stage == "evaluate" and "data" not in config.evaluate:
            continue  # it has PPO's
        data: DataConfig = config.stage_config(stage).data  # type: ignore[attr-defined]
        for earlier, theirs in before.items():
            same = set(data.train) & set(theirs.train)
            held = 0.0 if theirs.eval else theirs.held_out_fraction
            if same and not data.eval and data.held_out_fraction > held:
                how = "data.eval" if theirs.eval else f"held_out_fraction {held:g}"
                what = (
                    f"holds out {data.held_out_fraction:g} of {min(same)}, of which {earlier} ({how}) trains on a part"
                )
                found.append((stage, what, f"set {earlier}.data and {stage}.data to the same held_out_fraction"))
        before[stage] = data
    return found
