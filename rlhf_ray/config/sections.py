"""Types, rules and the sections that several stages share. Descriptions here are what `--help` prints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rlhf_ray.config.uris import a_folder_here, without_credentials

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int)) and not isinstance(value, bool) else _to_tuple(value)


def to_float(value: Any) -> Any:
    """An integer as a float, anything else as it is."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits: out of range, like 1e400
        return float("inf") if value > 0 else float("-inf")


Strings = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_one_or_many)]
Float = Annotated[float, BeforeValidator(to_float), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
"""Logits divided by less overflow in half precision and, at the extreme, in float32 (vLLM's floor is the same)."""
Temperature = Annotated[Float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
NotNegative = Annotated[Float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Path = Annotated[str, Field(min_length=1)]
OutputDir = Annotated[Path, AfterValidator(a_folder_here)]
Sources = Annotated[tuple[Path, ...], BeforeValidator(_one_or_many), AfterValidator(without_credentials)]


def field(default: Any, description: str, **rules: Any) -> Any:
    """A documented field; `...` as default makes it required."""
    return Field(default, description=description, **rules)


class Section(BaseModel):
    """Base of every section: unknown keys are refused, types are not coerced, values cannot change after loading.

    Called as a class it raises ConfigError, as a job file does; `model_validate` raises pydantic's ValidationError."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    short_form: ClassVar[str | None] = None
    """The field that a text in the section's place is probably meant to be; default: the one that is required."""
    as_raised: ClassVar[Callable[[ValidationError, type[Section], Mapping[str, Any]], Exception]]
    """What a call of the class raises for pydantic's error: config/__init__.py puts in explain.py, which knows every section."""

    if not TYPE_CHECKING:  # type checkers see the fields as arguments

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise Section.as_raised(error, type(self), values) from None

        # As BaseModel's own: sections inside others are validated by pydantic, which collects what is wrong in all of them.
        __init__.__pydantic_base_init__ = True


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
        preset = values.get("preset") if isinstance(values, dict) else None
        if isinstance(preset, str) and preset in presets:
            names = ("r", "lora_alpha", "lora_dropout", "target_modules")
            return {**dict(zip(names, presets[preset])), **values}
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
        " data set ids, or folders: all their files of data.split, or as a README.md of a Hub data set says, or what save_to_disk"
        " of datasets wrote",
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
    split: str = field(
        "train",
        "split to read of a Hub data set, or of a folder: files whose names, or folders, have its word (test, validation); those"
        " that name none are train",
    )
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
        "for files larger than memory (JSONL, Parquet, Hub data sets): SFT, DPO and reward modelling read data.train several times"
        " instead of keeping it, and each worker keeps its tokens in a nameless file in output_dir, 8 bytes each; the result is the"
        " same. With max_rows, only the first max_rows rows of each entry are read and fetched; the rest is not checked or hashed",
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
        total = sum(self.weights or ())
        if self.weights is not None and not (
            math.isfinite(total) and all(weight / total > 0 for weight in self.weights)
        ):
            raise ValueError("weights: too far apart, or too large, to be shares of their sum")
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
