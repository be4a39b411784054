"""Where replies and their scores come from: the rewards and the policies of a job."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf_ray.config.endpoints import (
    API_KEY_ENV,
    HEADERS_FILE,
    MAX_RETRIES,
    TIMEOUT_S,
    EndpointConfig,
    HttpUrl,
    LLMJudgeConfig,
    VariableName,
    longest_request_s,
    without_keys,
)
from rlhf_ray.config.functions import function_name
from rlhf_ray.config.sections import Count, Float, Path, Positive, Section, _one_or_many, field

HTTP_DEFAULTS: dict[str, Any] = {"batch_size": 64, "timeout_s": 60.0, "max_retries": 5, "concurrency": 4}
KINDS = ("run", "ensemble", "model", "function", "url", "llm")
NAME = re.compile(r"^[A-Za-z0-9_-]{1,32}$")
RESERVED_REWARDS = ("mean", "std", "min", "max", "score", "shaped")
"""reward/<name> with one of these names is a metric of the step."""
RESERVED_MODELS = ("policy", "reference", "synced_reference", "value")
"""Roles of PPO, beside which a reward model is a role of its name."""


def _by_name(value: Any) -> Any:
    """A reward as a job file spells it, where Python gave a function: alone, as TRL takes them, or as the field of a section."""
    if isinstance(value, dict) and callable(value.get("function")):
        return {**value, "function": function_name(value["function"])}
    if not callable(value) or isinstance(value, type):
        return value
    name = getattr(value, "__name__", "")
    is_free = NAME.fullmatch(name) and name not in RESERVED_REWARDS
    return {"function": function_name(value), **({"name": name} if is_free else {})}


def _rewards_by_name(fields: Any) -> Any:
    rewards = fields.get("rewards") if isinstance(fields, dict) else None
    return {**fields, "rewards": [_by_name(r) for r in rewards]} if isinstance(rewards, (list, tuple)) else fields


def _space_by_name(space: Any) -> Any:
    """Lists of rewards are values of a sweep's space too."""
    if not isinstance(space, dict) or not isinstance(space.get("rewards"), (list, tuple)):
        return space
    named = [[_by_name(r) for r in v] if isinstance(v, (list, tuple)) else v for v in space["rewards"]]
    return {**space, "rewards": named}


StageFields = Annotated[dict[str, Any], BeforeValidator(_rewards_by_name)]
"""The section of a stage in another job: checked as that stage's own job when it is put together, and kept as text."""
SpaceFields = Annotated[dict[str, Any], BeforeValidator(_space_by_name)]
"""What varies between the trials of a sweep; kept as text too."""


class RewardSource(Section):
    """One reward: a reward run, an ensemble, a sequence-classification checkpoint, a Python function, a server or an LLM judge. Set
    exactly one of them."""

    short_form: ClassVar[str | None] = "run"

    name: Annotated[str, Field(pattern=NAME.pattern)] = field("reward", "how metrics and value.init_from call it")
    run: Path | None = field(None, "folder of a reward run, or of its merged checkpoint")
    ensemble: Annotated[tuple[Path, ...], BeforeValidator(_one_or_many)] | None = field(
        None,
        "folders of at least two reward runs on the job's base that score together, e.g. of different seeds (Coste et al. 2023,"
        " arXiv:2310.02743); metrics call them <name>/1, <name>/2, ... and their disagreement (standard deviation) <name>/std",
    )
    aggregate: Literal["mean_minus_std", "min", "mean"] | None = field(
        None,
        "ensemble: the mean of its members less std_coef times their standard deviation over members (population, 1/n; UWO of"
        " arXiv:2310.02743 takes off the variance), the lowest member (WCO there), or the mean; default: mean_minus_std",
    )
    std_coef: Positive | None = field(None, "aggregate mean_minus_std: its factor; default: 1")
    model: Path | None = field(
        None,
        "a sequence-classification checkpoint of one label or two (path or Hub id); an encoder (BERT, DeBERTa) reads prompt and"
        " reply as a pair of texts",
    )
    function: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")] | None = field(
        None,
        "my_reward.py:score or pkg.mod:score (in Python also the function itself), with TRL's signature"
        " score(prompts, completions, **columns); None for a reply that it does not apply to; may be `async def`, and is then asked"
        " while later replies are sampled, as url and llm are;"
        " what it draws from random, numpy.random or torch depends on the texts alone",
    )
    url: HttpUrl | None = field(
        None,
        "a reward server: POST of {ids, prompts, completions, columns, ...}, answered with {ids, rewards} (rewards/http_reward.py;"
        " servers of OpenRLHF's remote_rm_url fit). What it says is kept in the run folder, so that a resumed run gets it again",
    )
    llm: LLMJudgeConfig | None = field(None, "a language model as judge, behind an OpenAI-compatible endpoint")
    batch_size: Count | None = field(None, f"url: replies per request; default: {HTTP_DEFAULTS['batch_size']}")
    timeout_s: Positive | None = field(None, f"url: {TIMEOUT_S}; default: {HTTP_DEFAULTS['timeout_s']:g}")
    max_retries: Annotated[int, Field(ge=0, le=20)] | None = field(
        None, f"url: {MAX_RETRIES}; default: {HTTP_DEFAULTS['max_retries']}"
    )
    concurrency: Annotated[int, Field(ge=1, le=1000)] | None = field(
        None, f"url: requests at a time, of each process that scores; default: {HTTP_DEFAULTS['concurrency']}"
    )
    headers_file: Path | None = field(None, f"url: {HEADERS_FILE}")
    api_key_env: VariableName | None = field(None, f"url: {API_KEY_ENV}")
    weight: Float = field(
        1.0, "factor in the sum of rewards; 0: measured only, it can neither stop training nor cost a reply its place"
    )
    normalize: bool | None = field(
        None,
        "subtract the mean and divide by the standard deviation of the reward run's held-out scores, before the weight: so rewards"
        " of different scale weigh what their weights say, and kl_coef does not depend on the scale; default: wherever the run has"
        " such scores, so never with model or function (arXiv:2009.01325 takes off the mean; OpenRLHF's --normalize_reward); an"
        " ensemble: each member by its own, before aggregate; default there: true, since where a reward model has its zero is"
        " chance, and so would be which member is the lowest",
    )
    template: str | None = field(
        None,
        "prompt template of a reward model with another tokenizer; default: the one it records, else the job's; encoders: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_kind(cls, values: Any) -> Any:
        """Filled in, so that a run records what it did."""
        values = _by_name(values)
        without_keys(values)
        if isinstance(values, dict) and values.get("url") is not None:
            return values | {name: value for name, value in HTTP_DEFAULTS.items() if values.get(name) is None}
        if not isinstance(values, dict) or values.get("ensemble") is None:
            return values
        found = dict(values)
        if found.get("normalize") is None:
            found["normalize"] = True
        if found.get("aggregate") is None:
            found["aggregate"] = "mean_minus_std"
        if found["aggregate"] == "mean_minus_std" and found.get("std_coef") is None:
            found["std_coef"] = 1.0
        return found

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSource:
        if self.name in RESERVED_REWARDS:
            raise ValueError(f"name: {self.name} is a metric of its own; choose another name for the reward")
        kinds = {name: getattr(self, name) for name in KINDS}
        if self.name in RESERVED_MODELS and any(kinds[name] is not None for name in ("run", "ensemble", "model")):
            raise ValueError(f"name: {self.name} is another model of PPO; choose another name for the reward")
        if sum(x is not None for x in kinds.values()) != 1:
            raise ValueError(f"a reward needs exactly one of {', '.join(KINDS)}")
        for name in (*HTTP_DEFAULTS, "headers_file", "api_key_env") if self.url is None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: only a reward with a url has one; drop it")
        if self.llm is not None and self.template is not None:
            raise ValueError("template: an LLM judge reads the prompts of its pool; drop it")
        if self.normalize and self.run is None and self.ensemble is None:
            raise ValueError("normalize: needs a reward run, which records its held-out scores; drop it")
        self._check_ensemble()
        return self

    def _check_ensemble(self) -> None:
        if self.ensemble is None:
            for name in ("aggregate", "std_coef"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: only an ensemble has one; drop it")
            return
        if len(self.ensemble) < 2:
            raise ValueError(
                f"ensemble: expected at least 2 reward runs; got {len(self.ensemble)}; name more, or use run"
            )
        places = [os.path.abspath(path) for path in self.ensemble]
        for path, place in zip(self.ensemble, places):
            if places.count(place) > 1:
                raise ValueError(
                    f"ensemble: {path} is named {places.count(place)} times; expected different reward runs"
                )
        if self.std_coef is not None and self.aggregate != "mean_minus_std":
            raise ValueError(
                f"std_coef: has no effect with aggregate {self.aggregate}; drop it, or set aggregate: mean_minus_std"
            )
        if self.template is not None:
            raise ValueError("template: an ensemble reads the policy's own tokens; drop it")

    @property
    def members(self) -> tuple[RewardSource, ...]:
        """An ensemble's runs as rewards of weight 1, <name>/1, <name>/2, ...; empty for any other reward."""
        alone = {"ensemble": None, "aggregate": None, "std_coef": None, "weight": 1.0}
        return tuple(
            self.model_copy(update={**alone, "name": f"{self.name}/{number}", "run": path})
            for number, path in enumerate(self.ensemble or (), start=1)
        )

    @property
    def is_pairwise(self) -> bool:
        """Whether it compares two replies, and has no score for one."""
        return self.llm is not None and self.llm.mode == "pairwise"

    def models(self, role: str) -> dict[str, str]:
        """The models that it loads: the role of each, for a reward of role `role`, and its path. None for functions, servers and
        judges."""
        if self.ensemble is not None:
            return {f"{role}/{number}": path for number, path in enumerate(self.ensemble, start=1)}
        path = self.run or self.model
        return {} if path is None else {role: path}

    @property
    def longest_request_s(self) -> float:
        """Of a server or a judge; 0 for any other reward."""
        if self.llm is not None:
            how = self.llm
            return longest_request_s(how.timeout_s, how.max_retries, how.concurrency, how.requests_per_minute)
        if self.url is None:
            return 0.0
        return longest_request_s(self.timeout_s, self.max_retries)  # type: ignore[arg-type]  # filled in by _defaults_of_its_kind


def longest_reward_request_s(config: Any) -> float:
    """Seconds that a request to one of the job's reward servers and judges may take at most; 0 if it has none."""
    return max((reward.longest_request_s for reward in getattr(config, "rewards", ())), default=0.0)


class PolicySpec(Section):
    """A policy to compare: a model, a model that is served elsewhere, or the replies of one in a file. Set exactly one of them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,32}$")] = field(..., "column in the table")
    policy: str | None = field(None, "base, a run folder, RUN@STEP, an adapter folder or a merged checkpoint")
    endpoint: EndpointConfig | None = field(
        None, "a served model, asked with the job's own decoding; it applies its own template. No KL"
    )
    outputs: Path | None = field(
        None,
        "a file of replies: rows of {instruction, input, output} as AlpacaFarm's 805, or of any format with a reply; each prompt of"
        " the job takes the reply of the row that asks the same. No KL",
    )
    best_of: Annotated[int, Field(ge=1, le=1000)] = field(
        1,
        "replies sampled to each prompt, of which the best under best_of_reward answers (BoN: arXiv:2009.01325); 1: the one that is"
        " sampled. Its KL from the policy is at most ln n - (n - 1) / n (arXiv:2204.05862; a bound: arXiv:2401.01879)",
    )
    best_of_reward: str | None = field(None, "name of the reward that chooses; default: the first of the job")

    @model_validator(mode="after")
    def _exactly_one(self) -> PolicySpec:
        if sum(x is not None for x in (self.policy, self.endpoint, self.outputs)) != 1:
            raise ValueError("a policy needs exactly one of policy, endpoint, outputs")
        if self.best_of > 1 and self.outputs is not None:
            raise ValueError("best_of: a file of replies is not sampled from; drop it")
        if self.best_of == 1 and self.best_of_reward is not None:
            raise ValueError("best_of_reward: has no effect with best_of 1; drop it, or raise best_of")
        return self
