"""Puts the rewards of a job on its loaded models: what ppo and evaluate share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import EndpointConfig, JobFields, PPOConfig, RewardSource
from rlhf_ray.config.paths import user_cache
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.lineage import (
    check_lineage,
    header_line,
    parent_of,
    recorded_add_eos_token,
    recorded_date,
    recorded_end,
    recorded_kwargs,
    recorded_reward,
    recorded_template,
)
from rlhf_ray.models.loading import config_of, is_encoder
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.models.specs import ModelSpec, reward_source
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.models.zero3 import MaxOverRanks
from rlhf_ray.rewards.http_client import HttpClient, check_reachable, credentials
from rlhf_ray.rewards.http_reward import make_http_reward
from rlhf_ray.rewards.judge_usage import JudgeUsage
from rlhf_ray.rewards.llm_judge import LLMJudge, LLMReward, read_completion, read_refusal
from rlhf_ray.rewards.protocol import Reward
from rlhf_ray.rewards.retokenised import Reader, RetokenisedReward
from rlhf_ray.rewards.scoring_model import reader_of
from rlhf_ray.rewards.sources import EnsembleReward, FunctionReward, ModelReward, NormalisedReward
from rlhf_ray.storage.answers import Answers

ANSWERS = "answers"
"""Folder of a run for what its servers and judges have said."""
Maker = Callable[[Any, Batching, torch.device, MaxOverRanks], Reward]
"""(models, how rows are cut into passes, device, max_over_ranks) -> the reward."""


class RewardBuilder:
    """`add` each reward of the job, finish the assembly, then `build`.

    template: of the job.  template_name: as the job file has it.  readers: by role, of those with a tokenizer of their own.
    judges: the LLM judges by name.
    parents: what a manifest records.  lines, warnings: for the header."""

    def __init__(self, assembly: Assembly, template: Template, template_name: str) -> None:
        self.assembly, self.template, self.template_name = assembly, template, template_name
        self.readers: dict[str, Reader] = {}
        self._functions: set[str] = set()
        self._makers: list[Maker] = []
        self.judges: dict[str, LLMJudge] = {}
        self.parents: list[dict[str, str]] = []
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def add(
        self, reward: RewardSource, role: str, label: str | None = None, load: Collection[str] | None = None
    ) -> None:
        """Load it as `role` and check its lineage. Raises ConfigError, ArtifactError.

        label: how a manifest's parents call it; default: `role`.   load: which roles of `RewardSource.models` this process loads,
        default all; the others are checked and recorded, another process scores."""
        if reward.function is not None:
            make = self._add_function(reward, label or role)
        elif reward.url is not None:
            make = self._add_server(reward)
        elif reward.llm is not None:
            self._add_judge(reward)
            return
        elif reward.ensemble is not None:
            make = self._add_ensemble(reward, role, label or role, load)
        else:
            make = self._add_model(reward, role, label or role, load is None or role in load)
        self._makers.append(make)

    def _add_function(self, reward: RewardSource, label: str) -> Maker:
        function = FunctionReward(reward.name, reward.weight, reward.function or "")
        self._functions.add(function.spec)
        self.parents.append({"role": label, "path": function.spec, "sha256": function.sha256})
        self.lines.append(header_line("reward", f"{reward.name}: Python function {function.spec}"))
        return lambda *_: function

    def _add_server(self, reward: RewardSource) -> Maker:
        kept = Answers(Path(self.assembly.job.output_dir).absolute() / ANSWERS / reward.name)
        found = make_http_reward(reward, kept, self.assembly.base.identity.tokenizer_sha256)
        weight = "" if reward.weight == 1 else f", weight {reward.weight:g}"
        self.lines.append(header_line("reward", f"{reward.name}: server {reward.url}{weight}"))
        return lambda *_: found

    def _add_judge(self, reward: RewardSource) -> None:
        """A judge of pairs scores nothing by itself: it is found in `judges`."""
        judge = make_judge(reward, self.assembly.job)
        self.judges[reward.name] = judge
        assert reward.llm is not None
        pool = f", {len(judge.pool)} annotators" if len(judge.pool) > 1 else ""
        weight = "" if reward.weight == 1 else f", weight {reward.weight:g}"
        line = f"{reward.name}: {reward.llm.mode} judge {reward.llm.model} at {reward.llm.base_url}{pool}{weight}"
        self.lines.append(header_line("judge" if reward.is_pairwise else "reward", line))
        if not reward.is_pairwise:
            found = LLMReward(reward.name, reward.weight, judge)
            self._makers.append(lambda *_: found)

    def _add_ensemble(self, reward: RewardSource, role: str, label: str, load: Collection[str] | None) -> Maker:
        less = f"mean minus {reward.std_coef or 0:g} standard deviations over members (1/n)"
        how = {"mean_minus_std": less, "min": "the lowest member", "mean": "mean"}[reward.aggregate or "mean"]
        weight = "" if reward.weight == 1 else f", weight {reward.weight:g}"
        self.lines.append(header_line("reward", f"{reward.name}: ensemble of {len(reward.members)}: {how}{weight}"))
        makers: list[Maker] = []
        known: dict[str, str] = {}
        for (role_of, path), label_of, member in zip(
            reward.models(role).items(), reward.models(label), reward.members, strict=True
        ):
            if reward_source(path).kind != "adapter":
                raise ArtifactError.at(
                    f"rewards.{reward.name}.ensemble",
                    "a member is a whole checkpoint",
                    "reward runs, which are adapters on the job's base",
                    path,
                )
            makers.append(self._add_model(member, role_of, label_of, load is None or role_of in load))
            sha256 = self.parents[-1]["sha256"]
            if sha256 in known:
                raise ArtifactError.at(
                    f"rewards.{reward.name}.ensemble",
                    f"{known[sha256]} and {path} hold the same adapter",
                    "different reward models, e.g. of different seeds",
                    f"sha256 {sha256} twice",
                )
            known[sha256] = path
        return lambda *where: EnsembleReward(
            reward.name, reward.weight, [make(*where) for make in makers], reward.aggregate or "mean", reward.std_coef
        )

    def _add_model(self, reward: RewardSource, role: str, label: str, load: bool) -> Maker:
        source = reward_source(reward.run or reward.model or "")
        foreign = self._reads_text(source)
        self.warnings += check_lineage(
            source,
            self.assembly.base.identity,
            None if foreign else self.template,
            role=label,
            same_tokenizer=not foreign,
        )
        self.parents.append(parent_of(source, label).manifest())
        spread, is_normalised = _spread(reward, source)
        self.lines.append(
            header_line("reward", f"{reward.name}: {source.describe()}{_scale_line(reward, spread, is_normalised)}")
        )
        if load:
            self.assembly.add_reward(role, source)
        ends = self.assembly.base.stop_ids(self.template)
        if not foreign and not recorded_add_eos_token(source):
            self.warnings.append(
                f"{label}: was trained on replies without their end token, and scores sampled ones with it: train it with"
                " add_eos_token: true"
            )
        elif not (foreign or self.assembly.stop_token_ids or (end := recorded_end(source)) in (None, ends[0])):
            self.warnings.append(
                f"{label}: was trained on replies that end with token {end}, and scores sampled ones that end with token {ends[0]}:"
                " train it again, or set stop_token_ids"
            )
        if foreign:
            foreign_reward = self._retokenised(reward, source, role, load)
            return _normalised(foreign_reward, spread) if is_normalised else foreign_reward
        if reward.template is not None:
            raise ArtifactError.at(
                f"rewards.{reward.name}.template",
                "is set, and the reward model reads the policy's own tokens",
                "a template only where the reward model has another tokenizer",
                fix="drop it",
            )
        own: Maker = lambda models, batching, device, agree: ModelReward(  # noqa: E731
            reward.name, reward.weight, models, role, batching, device, agree
        )
        return _normalised(own, spread) if is_normalised else own

    def _retokenised(self, reward: RewardSource, source: ModelSpec, role: str, load: bool) -> Maker:
        if load:
            backbone = self.assembly.stacks[self.assembly.bindings[role].stack].backbone
            recorded = "none" if backbone.is_encoder else recorded_template(source) or self.template_name
            name = reward.template or recorded
            date = recorded_date(source) or self.assembly.job.template_date
            template = load_template(name, backbone.tokenizer, date, recorded_kwargs(source))
            self.readers[role] = reader_of(source, backbone, template)
            how = f"has its own tokenizer: replies are decoded, put in template {template.name}, encoded again"
            if backbone.is_encoder:
                how = f"is an encoder: prompt (template {template.name}) and reply are a pair of texts"
            self.lines.append(header_line("", f"{reward.name} {how}"))
        return lambda models, batching, device, agree: RetokenisedReward(
            reward.name, reward.weight, models, role, self.readers[role], self.assembly.base, batching, agree
        )

    def kinds_of_parents(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """`parents`: of models, and of functions."""
        models = [parent for parent in self.parents if parent["path"] not in self._functions]
        return models, [parent for parent in self.parents if parent["path"] in self._functions]

    def build(
        self, models: Any, batching: Batching, device: torch.device, max_over_ranks: MaxOverRanks = int
    ) -> list[Reward]:
        """What scores, in the job's order, over the finished models. max_over_ranks: as the scorer's."""
        return [make(models, batching, device, max_over_ranks) for make in self._makers]

    def is_foreign(self, reward: RewardSource) -> bool:
        """Whether it reads text and not the policy's tokens. Loads nothing."""
        return any(self._reads_text(reward_source(path)) for path in reward.models("").values())

    def _reads_text(self, source: ModelSpec) -> bool:
        """A whole checkpoint with another tokenizer, or an encoder; an adapter stands on the job's base, so it reads what that
        reads."""
        if source.kind != "full":
            return False
        found = resolve_source(source.path)
        own = self.assembly.base.identity.tokenizer_sha256
        return tokenizer_sha256(tokenizer_of(found)) != own or is_encoder(config_of(found))


def make_judge(reward: RewardSource, job: JobFields) -> LLMJudge:
    """The LLM judge that `reward` names, for a job. ConfigError: a key or a prompt is not there; ResourceError: nobody listens.

    What it costs is counted in the run folder. What it answers is kept there as well by PPO, which has to resume with the same
    scores; an evaluation keeps it where the next one finds it, outside of all runs."""
    config, where = reward.llm, f"rewards.{reward.name}.llm"
    assert config is not None
    run = Path(job.output_dir).absolute()
    if config.cache_dir is not None:
        cache = Path(config.cache_dir).expanduser()
    else:
        cache = run / ANSWERS / reward.name if isinstance(job, PPOConfig) else user_cache("judges")
    url = f"{config.base_url.rstrip('/')}/chat/completions"
    headers = credentials(where, config.headers_file, config.api_key_env)
    named = f"judge {reward.name} ({url})"
    client = HttpClient(
        named, url, headers, accept=read_completion, accept_error=read_refusal, **request_limits(config)
    )
    usage = JudgeUsage(named, config, run / "usage" / reward.name)
    judge = LLMJudge(reward.name, config, client, Answers(cache), usage)
    check_reachable(f"{where}.base_url", config.base_url)
    return judge


def request_limits(config: EndpointConfig) -> dict[str, Any]:
    """How an endpoint may be asked, as arguments of `HttpClient`."""
    names = ("timeout_s", "max_retries", "concurrency", "requests_per_minute")
    return {name: getattr(config, name) for name in names}


def _spread(reward: RewardSource, source: ModelSpec) -> tuple[dict[str, float], bool]:
    """mean and std of a reward run's held-out scores, empty where it recorded none; and whether the reward goes by them.
    ConfigError if it has to and cannot."""
    found = dict(recorded_reward(source).get("held_out_scores") or {})
    is_known = bool(found.get("std"))
    if reward.normalize and not is_known:
        raise ConfigError.at(
            f"rewards.{reward.name}.normalize",
            "the reward run recorded no held-out scores to go by",
            "a reward run that held pairs out",
            fix="set it to false, or train the reward model with data.held_out_fraction",
        )
    by_default = reward.run is not None and is_known
    return found, by_default if reward.normalize is None else reward.normalize


def _scale_line(reward: RewardSource, spread: dict[str, float], is_normalised: bool) -> str:
    """What a reward's scores were like on held-out pairs, and what is made of them."""
    weight = "" if reward.weight == 1 else f", weight {reward.weight:g}"
    if not spread:
        return weight
    scores = f"; held-out scores {spread['mean']:.3g}, standard deviation {spread['std']:.3g}"
    return f"{scores}, normalised to 0 and 1{weight}" if is_normalised else f"{scores}{weight}"


def _normalised(make: Maker, spread: dict[str, float]) -> Maker:
    return lambda *where: NormalisedReward(make(*where), spread["mean"], spread["std"])
