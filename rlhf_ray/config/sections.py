"""Types, rules and the sections that several stages share. Descriptions here are what `--help` prints."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rlhf_ray.config.uris import a_folder_here, without_credentials

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int)) and not isinstance(value, bool) else _to_tuple(value)


def _to_float(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits: out of range, like 1e400
        return float("inf") if value > 0 else float("-inf")


Strings = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_one_or_many)]
Float = Annotated[float, BeforeValidator(_to_float), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Logits divided by less overflow in half precision and, at the extreme, in float32 (vLLM's floor is the same)."""
Temperature = Annotated[Float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
NotNegative = Annotated[Float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Path = Annotated[str, Field(min_length=1)]
OutputDir = Annotated[Path, AfterValidator(a_folder_here)]
Sources = Annotated[Strings, AfterValidator(without_credentials)]


def field(default: Any, description: str, **rules: Any) -> Any:
    """A documented field; `...` as default makes it required."""
    return Field(default, description=description, **rules)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, types are not coerced, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class LoraConfig(Section):
    """LoRA adapter, spelled as in PEFT's LoraConfig (Hu et al. 2021, arXiv:2106.09685)."""

    preset: Literal["alpaca_farm_lora", "alpaca_lora_rlhf"] | None = field(
        None, "values of an ancestor system (r 8, alpha 64, dropout 0.1, q,k,v,o / r 8, alpha 16, dropout 0.05, q,v)"
    )
    r: Annotated[int, Field(ge=1, le=1024)] = field(16, "rank")
    lora_alpha: Positive = field(32.0, "scale numerator: the update is (lora_alpha / r) B A")
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)] = field(
        0.0, "dropout on the adapter's input; PPO always runs with 0"
    )
    target_modules: Literal["all-linear"] | Strings = field(
        "all-linear", "module names to adapt (names, not a regular expression), or all-linear"
    )
    target_parameters: Strings = field(
        (),
        "stacked expert weights to adapt beside target_modules, by name: mlp.experts.gate_up_proj, mlp.experts.down_proj",
    )
    use_rslora: bool = field(False, "rank-stabilised scale lora_alpha / sqrt(r) (arXiv:2312.03732)")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        presets = {
            "alpaca_farm_lora": (8, 64.0, 0.1, ("q_proj", "k_proj", "v_proj", "o_proj")),
            "alpaca_lora_rlhf": (8, 16.0, 0.05, ("q_proj", "v_proj")),
        }
        if isinstance(values, dict) and values.get("preset") in presets:
            names = ("r", "lora_alpha", "lora_dropout", "target_modules")
            return {**dict(zip(names, presets[values["preset"]])), **values}
        return values

    @model_validator(mode="after")
    def _names_only(self) -> LoraConfig:
        for name in self.target_modules if not isinstance(self.target_modules, str) else ():
            if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
                raise ValueError(f"target_modules takes module names, not a regular expression: {name!r}")
        for name in self.target_parameters:
            if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
                raise ValueError(f"target_parameters takes parameter names, not a regular expression: {name!r}")
        if self.target_parameters and self.lora_dropout:
            raise ValueError("target_parameters: PEFT has no dropout on stacked weights: set lora_dropout to 0")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one module, or all-linear")
        return self


class DataConfig(Section):
    """Where rows come from and which of them are used. No hidden caps: a limit exists only where one is set here."""

    train: Sources = field(
        ...,
        "files (.json .jsonl .csv .parquet, each also .gz), here or on an object store (s3://bucket/rows.jsonl), or Hugging Face"
        " data set ids, or folders that are laid out like one",
        min_length=1,
    )
    weights: Annotated[tuple[Positive, ...], BeforeValidator(_to_tuple)] | None = field(
        None,
        "share of the training rows that each entry of data.train gets, e.g. [0.7, 0.3]: the most rows in these shares, none twice;"
        " default: all rows of all files",
    )
    mix_seed: Annotated[int, Field(ge=0)] = field(
        0, "which rows are taken of a file of which data.weights leaves some out"
    )
    eval: Sources | None = field(None, "separate evaluation files; default: the held-out share of data.train")
    name: str | None = field(
        None, "configuration (subset) to read of a Hub data set that has several, as `main` of gsm8k"
    )
    split: str = field("train", "split to read of a Hub data set")
    format: Literal[
        "auto",
        "alpaca",
        "comparison",
        "alpaca_farm",
        "text",
        "messages",
        "prompt_completion",
        "preference",
        "hh",
        "sharegpt",
        "ranked",
        "prompt",
    ] = field("auto", "row format; auto recognises it from the field names")
    columns: dict[str, str] = field({}, "renames: name in the file -> name in the format, e.g. {question: instruction}")
    max_rows: Count | None = field(None, "use only the first rows of data.train")
    streaming: bool = field(
        False,
        "read no further than the first max_rows rows of each entry of data.train, for files that are larger than memory: JSONL,"
        " Parquet and Hub data sets, of which only these rows are fetched; what follows is neither checked nor hashed",
    )
    eval_max_rows: Count | None = field(
        None,
        "use only the first held-out rows in evaluations; default: 256 in PPO, which samples replies to them, else all",
    )
    held_out_fraction: Annotated[Float, Field(ge=0, lt=1)] = field(
        0.1, "share of prompts held out from every stage, chosen by a hash of the last question; the same along a chain"
    )
    held_out_prompts: Sources | None = field(
        None,
        "prompt files of later stages: no training row may ask, or begin with, a prompt of their held-out share; for rows of format"
        " text, which ask nothing themselves",
    )
    disjoint_stages: bool = field(False, "reward and PPO train on different halves of the prompts (by hash)")
    on_bad_row: Literal["stop", "skip"] = field(
        "stop", "a malformed row stops the job (exit 4), or is skipped and counted"
    )
    special_tokens: Literal["text", "parse"] = field(
        "text",
        "what a row's text that spells a special token (<|im_start|>, </s>) is: text, with a warning that counts such rows; or, for"
        " rows that were rendered with the model's own markers, the token (parse)",
    )
    too_long: Literal["stop", "drop", "truncate"] = field(
        "drop",
        "rows over max_length: stop (exit 4), drop and count, or truncate (prompts left, replies right) and count",
    )
    max_row_bytes: Count = field(1_000_000, "a longer row is malformed")

    @model_validator(mode="after")
    def _one_weight_for_each_file(self) -> DataConfig:
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.train)} entries of train; give one for each")
        return self

    @model_validator(mode="after")
    def _streams_so_far(self) -> DataConfig:
        if self.streaming and self.max_rows is None:
            raise ValueError("streaming reads the first max_rows rows of each file: set max_rows")
        return self


class LearnerConfig(Section):
    """The group of training workers that Ray Train starts."""

    num_workers: Annotated[int, Field(ge=0)] = field(1, "training workers; 0 runs in this process, without Ray")
    num_gpus: NotNegative | None = field(None, "GPUs per worker; default 1 where the cluster has GPUs, else 0")
    num_threads: Count | None = field(
        None, "CPU threads per worker; default: usable cores shared among the workers of a node"
    )
    label_selector: dict[str, str] = field({}, "Ray node labels that a worker's node must have")
    accelerator_type: str | None = field(None, "GPU model a worker's node must have, as Ray calls it, e.g. A100")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = field(
        0, "DeepSpeed ZeRO stage of the PPO learner; 3 also shards the base, and slows decoding on the same ranks"
    )
    deepspeed: Path | None = field(
        None, "your own DeepSpeed JSON (PPO): ZeRO and communication keys only; zero_stage remains the stage"
    )

    @model_validator(mode="after")
    def _this_process_asks_for_nothing(self) -> LearnerConfig:
        if self.num_workers == 0 and self.num_gpus is not None:
            raise ValueError("num_gpus: has no effect with num_workers: 0, which runs where this process runs; drop it")
        if self.num_workers > 1 and self.num_gpus is not None and 0 < self.num_gpus <= 0.5:
            raise ValueError(
                f"num_gpus: {self.num_gpus:g} lets several of {self.num_workers} workers share a GPU, which NCCL refuses;"
                " set 1, a share above 0.5, or 0 for the CPU"
            )
        return self


class SamplingConfig(Section):
    """How replies are decoded outside of rollouts (rollouts always sample the full distribution at `temperature`)."""

    do_sample: bool = field(True, "sample; false: take the most likely token")
    temperature: Temperature = field(1.0, "divides the logits")
    top_p: Annotated[Float, Field(gt=0, le=1)] = field(
        1.0, "keep the smallest set of tokens with this probability; 1 keeps all"
    )
    top_k: Annotated[int, Field(ge=0)] = field(0, "keep this many tokens; 0 keeps all")

    @model_validator(mode="after")
    def _greedy_has_no_knobs(self) -> SamplingConfig:
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError("temperature, top_p and top_k have no effect with do_sample: false; drop them or sample")
        return self

    @property
    def estimates_kl(self) -> bool:
        """Whether replies are drawn from the whole distribution, without which a mean of k1 over them estimates no KL."""
        return self.do_sample and self.top_p == 1 and self.top_k == 0


RESERVED_REWARDS = ("mean", "std", "min", "max", "score", "shaped")
"""reward/<name> with one of these names is a metric of the step."""
RESERVED_MODELS = ("policy", "reference", "synced_reference", "value")
"""Roles of PPO, beside which a reward model is a role of its name."""


class RewardSource(Section):
    """One reward: a reward run, an ensemble, a sequence-classification checkpoint or a Python function. Set exactly one of them."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")] = field(
        "reward", "how metrics and value.init_from call it"
    )
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
    model: Path | None = field(None, "a one-label sequence-classification checkpoint (path or Hub id)")
    function: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")] | None = field(
        None,
        "my_reward.py:score or pkg.mod:score, with TRL's signature score(prompts, completions, **columns); None for a reply that it"
        " does not apply to; what it draws from random, numpy.random or torch depends on the texts alone",
    )
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
        None, "prompt template of a reward model with another tokenizer; default: the one it records, else the job's"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_an_ensemble(cls, values: Any) -> Any:
        """Filled in, so that a run records what it did."""
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
        if self.name in RESERVED_MODELS and self.function is None:
            raise ValueError(f"name: {self.name} is another model of PPO; choose another name for the reward")
        if sum(x is not None for x in (self.run, self.ensemble, self.model, self.function)) != 1:
            raise ValueError("a reward needs exactly one of run, ensemble, model, function")
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

    def models(self, role: str) -> dict[str, str]:
        """The models that it loads: the role of each, for a reward of role `role`, and its path. None for a function."""
        if self.ensemble is not None:
            return {f"{role}/{number}": path for number, path in enumerate(self.ensemble, start=1)}
        path = self.run or self.model
        return {} if path is None else {role: path}


VALUE_LEARNING_RATE = 5.0
"""The value model's learning rate where none is set, times the policy's."""


class ValueConfig(Section):
    """The value model of PPO with GAE."""

    init_from: Annotated[str, Field(pattern=r"^(policy|reward:[A-Za-z0-9_-]+(/[1-9]\d*)?)$")] | None = field(
        None,
        "policy, or reward:<name>, of an ensemble reward:<name>/1, /2, ...; default the first reward run, policy if there is none",
    )
    adapter: Literal["own", "shared"] = field("own", "own LoRA adapter, or a head on the policy's own adapter")
    lora: LoraConfig | None = field(None, "its adapter when it is fresh; default as the policy's")
    learning_rate: Positive | None = field(
        None,
        f"of its head alone where it shares the policy's adapter; default: {VALUE_LEARNING_RATE:g} times learning_rate (OpenRLHF: 9"
        " times, verl: 10, TRL: 1)",
    )
    warmup_steps: NotNegative = field(
        0.05,
        "first PPO steps that train only the value model: a share of all steps, rounded down, if below 1, else steps; the policy's"
        " own warm-up starts after them (OpenRLHF's freezing_actor_steps, verl's critic_warmup, both off there)",
    )


class PolicySpec(Section):
    """A policy to compare."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,32}$")] = field(..., "column in the table")
    policy: str = field(..., "base, a run folder, RUN@STEP, an adapter folder or a merged checkpoint")


def under(uri: str, part: str) -> str:
    """The URI of `part` under `uri`; options after a question mark stay at the end.

    >>> under("s3://bucket/runs?region=eu", "ppo")
    's3://bucket/runs/ppo?region=eu'
    """
    head, mark, options = uri.partition("?")
    return f"{head.rstrip('/')}/{part}{mark}{options}"


def check_accumulation(name: str, rows: int, per_device: int, num_workers: int) -> int:
    """Microbatches per worker and optimizer step: rows / (per_device x workers), which must be a whole number."""
    world = max(num_workers, 1)
    if rows % (per_device * world):
        low = max(rows // (per_device * world), 1) * per_device * world
        raise ValueError(
            f"{name}: {rows} is not a multiple of per_device_train_batch_size {per_device} x {world} workers"
            f" = {per_device * world}; try {low} or {low + per_device * world}"
        )
    return rows // (per_device * world)


def _division(name: str, part: int, whole_name: str, whole: int) -> str:
    reach, top = 10_000, min(part, whole)  # the nearest divisors, not searched for without end
    below = next((d for d in range(top, max(top - reach, 0), -1) if whole % d == 0), 1)
    above = next((d for d in range(part + 1, min(part + reach, whole) + 1) if whole % d == 0), whole)
    near = " or ".join(map(str, sorted({below, above})))
    return f"{name}: {part} does not divide {whole_name} {whole} (try {near})"
