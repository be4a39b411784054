"""One configuration class per stage."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rlhf_ray.config import defaults
from rlhf_ray.config.actors import ActorsConfig
from rlhf_ray.config.alarm import AlarmConfig
from rlhf_ray.config.rewards import PolicySpec, RewardSource
from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.config.sections import (
    RUN_NAME,
    Count,
    DataConfig,
    Float,
    Ints,
    LearnerConfig,
    LoraConfig,
    NotNegative,
    OutputDir,
    Path,
    Positive,
    SamplingConfig,
    Section,
    Share,
    Strings,
    Temperature,
    ValueConfig,
    _division,
    _one_or_many,
    _to_tuple,
    check_accumulation,
    field,
)
from rlhf_ray.config.uris import without_credentials

RESPONSE_LENGTH = (
    "longest reply in tokens; default with template chat, unless max_length is below"
    f" {defaults.ROOM_FOR_CHAT}: {defaults.CHAT_RESPONSE_LENGTH} (verl's; OpenRLHF: 1024, TRL's GRPO: 256)"
)
CLIPPED_ERROR = 0.2
"""maths.controllers.MAX_ERROR, which a job file is read without."""
SAMPLER_ROWS = (
    "replies of a chunk that are written at the same time, a token of each in every step; what `plan` counts; default: all of them,"
    " on the CPU at most 64, on a GPU at most 256"
)


def _iso(value: str) -> str:
    try:
        datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"expected a date and time in ISO form, as 2026-01-31T09:00:00; got {value!r}") from error
    return value


TemplateDate = Annotated[str, AfterValidator(_iso)]


class JobFields(Section):
    """Fields that every stage has."""

    output_dir: OutputDir = field(..., "the run folder itself")
    run_name: str | None = field(None, "name in trackers; default: the folder's name")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = field(0, "root of all randomness")
    resume: Literal["never", "auto"] = field(
        "never", "never: refuse a folder that holds a run; auto: resume from its newest valid checkpoint, else start"
    )
    defaults_version: Annotated[int, Field(ge=1, le=defaults.VERSION)] = field(
        defaults.VERSION,
        "whose defaults hold for what the job leaves open (MIGRATING.md lists them); kept in the run folder, so that a run is"
        " finished under the defaults that it was begun with",
    )
    model_name_or_path: Path = field(..., "base model: folder or Hub id of a causal language model")
    revision: str | None = field(None, "Hub revision of the base")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        "auto",
        "precision of the base; auto: on CUDA the checkpoint's own, bfloat16 for a float16 one where the GPU computes in it, on the"
        " CPU float32 (adapters are always float32); float16 is not trained: without loss scaling its gradients vanish",
    )
    lora_compute_dtype: Literal["float32", "bfloat16"] = field(
        "float32",
        "precision in which adapters of linear layers are multiplied; bfloat16, on a base in bfloat16, rounds their float32 weights"
        " for each product, as torch.autocast does, instead of widening every input to float32: adapters still learn in float32",
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = field(
        "auto",
        "attention kernel; auto: sdpa; flash_attention_2 (flash-attn, which you install) reads whole rows faster, but takes the"
        " padding out of the cache again in every layer, for every token that is decoded",
    )
    load_in_8bit: bool = field(False, "quantise the base to 8 bits (bitsandbytes)")
    load_in_4bit: bool = field(False, "quantise the base to 4 bits, nf4 (bitsandbytes)")
    cpu_offload: bool = field(
        False, "let layers of a quantised base that do not fit on the GPU live on the CPU (CUDA only)"
    )
    gradient_checkpointing: bool | None = field(
        None, "recompute activations in the backward pass; default: on CUDA only"
    )
    template: str = field(
        "alpaca",
        "prompt template: alpaca, alpaca_legacy, alpaca_short, vigogne, none (the prompt as it is), chat, or a JSON file",
    )
    template_date: TemplateDate | None = field(
        None,
        "what a chat template that says the date (strftime_now) takes for now, e.g. 2026-01-31T09:00:00; default: that of the run"
        " it starts from, else when it was started; kept in the run folder",
    )
    chat_template_kwargs: dict[str, Any] = field(
        {},
        "further variables of the chat template, e.g. {enable_thinking: false}; kept with the template in the run folder",
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_one_or_many)] = field(
        ("tensorboard",), "trackers besides metrics.jsonl"
    )
    copy_to: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://"), AfterValidator(without_credentials)] | None = (
        field(
            None,
            "URI of a folder on an object store, e.g. s3://bucket/runs/mine, that checkpoints and the finished run are copied to;"
            " a run that is not here is restored from it (resume: auto)",
        )
    )
    learner: LearnerConfig = field(LearnerConfig(), "training workers")
    wait_for_resources: NotNegative = field(
        10.0, "seconds to wait for what other jobs hold, or for nodes that an autoscaling cluster can add (then exit 3)"
    )

    stop_grace_s: Positive = field(
        60.0, "seconds after SIGTERM or Ctrl-C to finish the step and save; then the run ends at once"
    )
    watchdog_s: NotNegative = field(
        120.0,
        "a phase counts as hanging after ten times its median and at least this many seconds: stacks of all ranks are"
        " written, and the learner group restarts from the newest checkpoint; 0: off",
    )

    @property
    def has_contiguous_rows(self) -> bool:
        """Whether forward passes read prompt and reply without padding between them; see defaults.py."""
        return self.defaults_version >= defaults.CONTIGUOUS_ROWS_SINCE

    @property
    def has_packed_rows(self) -> bool:
        """Whether they read all rows as one, without padding, where the base can; see defaults.py."""
        return self.defaults_version >= defaults.PACKED_ROWS_SINCE

    @model_validator(mode="wrap")
    @classmethod
    def _open_fields(cls, values: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Defaults that are no constants are filled in, so that a run records what it did; they do not count as set."""
        if not isinstance(values, dict):
            return handler(values)
        found, names = defaults.filled_in(cls, values)
        config = handler(found)
        for section, _, name in (name.rpartition(".") for name in names):
            if section:
                getattr(config, section).model_fields_set.discard(name)
            if (section or name) not in values:
                config.model_fields_set.discard(section or name)
        return config

    @model_validator(mode="after")
    def _common_rules(self) -> JobFields:
        if self.run_name is not None and not RUN_NAME.fullmatch(self.run_name):
            raise ValueError(
                f"run_name: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit: {self.run_name!r}"
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other")
        if self.cpu_offload and not (self.load_in_8bit or self.load_in_4bit):
            raise ValueError("cpu_offload needs load_in_8bit or load_in_4bit")
        return self

    @model_serializer(mode="wrap")
    def _loadable(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped can be loaded: a default lora section beside an SFT adapter would read like one that contradicts it."""
        values: dict[str, Any] = handler(self)
        copies_sft = values.get("sft") is not None and values.get("init_from", "sft") == "sft"
        if copies_sft and "lora" not in self.model_fields_set:
            values.pop("lora", None)
        return values


class OptimFields(Section):
    """Optimizer and schedule, spelled as in transformers' TrainingArguments."""

    optim: Literal["adamw_torch", "adafactor", "adamw_8bit"] = field("adamw_torch", "optimizer")
    weight_decay: NotNegative = field(0.0, "decoupled weight decay")
    adam_beta1: Annotated[Float, Field(ge=0, lt=1)] = field(0.9, "Adam: decay of the mean of gradients")
    adam_beta2: Annotated[Float, Field(ge=0, lt=1)] = field(0.999, "Adam: decay of the mean of squared gradients")
    adam_epsilon: Positive = field(1e-8, "Adam: added to the denominator (that of torch, transformers and TRL)")
    max_grad_norm: Positive = field(1.0, "clip the gradient to this norm (PPO: policy and value each)")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = field("linear", "decay after the warm-up")
    min_lr_ratio: Share = field(0.0, "learning rate at the end, as a share of the peak")
    warmup_steps: NotNegative = field(
        0.03, "warm-up: a share of all steps if below 1, else steps; the first step is never 0"
    )
    max_steps: int = field(-1, "stop after this many steps; -1: use num_train_epochs")
    num_train_epochs: Positive = field(1.0, "passes over the training rows")
    save_total_limit: Count | None = field(3, "checkpoints to keep besides the best one; null keeps all")
    gradient_accumulation_steps: None = field(None, "derived from the batch sizes; setting it is an error")

    @model_validator(mode="after")
    def _steps(self) -> OptimFields:
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps: expected at least 1, or -1; got {self.max_steps}")
        return self


class _SupervisedFields(JobFields, OptimFields):
    """What SFT, DPO and reward modelling share."""

    data: DataConfig = field(..., "rows")
    lora: LoraConfig = field(LoraConfig(), "the adapter that is trained")
    max_length: Annotated[int, Field(ge=2)] = field(512, "tokens of prompt and reply together")
    train_batch_size: Count = field(64, "rows per optimizer step over all workers")
    per_device_train_batch_size: Count = field(8, "rows per forward pass and worker: memory only")
    per_device_eval_batch_size: Count = field(16, "rows per forward pass in evaluations")
    eval_steps: Count | None = field(None, "evaluate every this many steps; default: ten times in a run")
    save_steps: Count | None = field(None, "checkpoint every this many steps; default: with each evaluation")
    load_best_model_at_end: bool = field(False, "keep the adapter with the best evaluation, not the last")
    logging_steps: Count = field(5, "write metrics every this many steps")
    trainer: dict[str, Any] = field({}, "further transformers TrainingArguments, from an allow-list")

    @model_validator(mode="after")
    def _batches(self) -> _SupervisedFields:
        check_accumulation(
            "train_batch_size", self.train_batch_size, self.per_device_train_batch_size, self.learner.num_workers
        )
        allowed = set(TRAINER_ARGUMENTS)
        for name in self.trainer:
            if name not in allowed:
                raise ValueError(f"trainer.{name} is not among the arguments passed on: {', '.join(sorted(allowed))}")
        return self


TRAINER_ARGUMENTS = (
    "neftune_noise_alpha",
    "label_smoothing_factor",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "torch_compile",
    "torch_empty_cache_steps",
    "use_liger_kernel",
    "optim_args",
    "lr_scheduler_kwargs",
)


class SFTConfig(_SupervisedFields):
    """Supervised fine-tuning of a LoRA adapter on instruction data."""

    learning_rate: Positive = field(2e-4, "peak learning rate")
    train_on_inputs: bool = field(False, "compute the loss on prompt tokens as well")
    train_on_turns: Literal["all", "last"] = field(
        "all",
        "which of the assistant's turns in a conversation (messages, sharegpt) are learnt: all of them, or the last",
    )
    add_eos_token: bool = field(
        True, "end every reply with the chat template's end of turn, else the end-of-sequence token"
    )
    group_by_length: bool = field(False, "batch rows of similar length together")
    packing: bool = field(
        False,
        "read the rows of a forward pass as one row, without padding: positions begin again with each, and none sees another; the"
        " loss is the same. Attention reads each row by itself (torch's sdpa, flash-attn's variable length); kernels that cannot"
        " get a mask of all pairs of tokens. Not for models with a state",
    )
    sft: Path | None = field(
        None,
        "SFT or PPO run, or adapter, that training continues from: a copy of it is trained (default: a fresh adapter)",
    )

    @model_validator(mode="after")
    def _goes_on(self) -> SFTConfig:
        _refuse_lora_beside_sft(self)
        return self


def _refuse_lora_beside_sft(config: SFTConfig | DPOConfig) -> None:
    if config.sft is not None and "lora" in config.model_fields_set:
        raise ValueError("lora: the adapter named by sft has its own r, alpha and targets; drop lora")


class DPOConfig(_SupervisedFields):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): a policy from preference pairs, without a reward
    model or replies of its own. Names are those of TRL's DPOConfig, and defaults but for the learning rate."""

    learning_rate: Positive = field(
        5e-6,
        "peak learning rate; TRL's default of 1e-6 is one for full fine-tuning: its DPO script takes 5e-7 there, and ten times as"
        " much, 5e-6, with LoRA",
    )
    sft: Path | None = field(
        None,
        "SFT run or adapter: start of the policy, and the frozen reference, both on one loaded base; none: a fresh adapter, and the"
        " base itself is the reference",
    )
    loss_type: Literal["sigmoid"] = field("sigmoid", "the loss of the paper, which is that of a Bradley-Terry model")
    beta: Positive = field(0.1, "how strongly the policy is held to the reference: higher moves less")
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = field(
        0.0, "probability that a pair is labelled the wrong way round (conservative DPO, ericmitchell.ai/cdpo.pdf)"
    )
    rpo_alpha: NotNegative | None = field(
        None,
        "weight of -log p of the chosen reply, mean over its tokens, added to each pair's loss (arXiv:2404.19733, equation 2, which"
        " takes 1; TRL takes the mean over the tokens of a microbatch); null: off",
    )
    add_eos_token: bool = field(True, "replies end with the token that ends them (see sft), as PPO's do")

    @model_validator(mode="after")
    def _start(self) -> DPOConfig:
        _refuse_lora_beside_sft(self)
        return self


class RewardConfig(_SupervisedFields):
    """Pairwise reward model: a LoRA adapter with a scalar head (Bradley-Terry loss)."""

    learning_rate: Positive = field(1e-4, "peak learning rate")
    sft: Path | None = field(None, "SFT run or adapter that the reward adapter starts from")
    init_from: Literal["sft", "base"] = field("sft", "start as a copy of the SFT adapter, or fresh on the base")
    center_rewards_coefficient: NotNegative = field(
        0.0, "weight of a loss that keeps scores near 0 (arXiv:2312.09244: 0.01; TRL's name)"
    )
    add_eos_token: bool = field(True, "score replies with the token that ends them (see sft), as PPO does")

    @model_validator(mode="after")
    def _sft(self) -> RewardConfig:
        if self.sft is not None and self.init_from == "sft" and "lora" in self.model_fields_set:
            raise ValueError(
                "lora: the reward adapter copies the SFT adapter's r, alpha and targets; drop lora, or set init_from: base"
            )
        return self


class PPOConfig(JobFields, OptimFields):
    """PPO with LoRA on the rewards listed (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593)."""

    data: DataConfig = field(..., "prompts; any row format serves, answers are ignored")
    sft: Path | None = field(
        None, "SFT run or adapter: start of the policy and reference; none: the base itself is the reference"
    )
    lora: LoraConfig = field(LoraConfig(), "the policy adapter when it is fresh (no sft)")
    rewards: Annotated[tuple[RewardSource, ...], BeforeValidator(_to_tuple)] = field(
        ..., "what is maximised", min_length=1
    )
    watch: str | None = field(
        None,
        "name of a reward of weight 0, which PPO does not maximise, to judge by: best checkpoint, over_optimisation_patience,"
        " sweeps, promotion and the report go by eval/reward/<name>; null: by the very reward that is maximised",
    )
    allow_chance_rewards: bool = field(
        False,
        "maximise reward runs that are not shown to be better than chance: the 95% interval of their held-out accuracy reaches 50%"
        " (else exit 2)",
    )
    value: ValueConfig = field(ValueConfig(), "the value model (critic)")
    placement: Literal["colocate", "split"] = field(
        "colocate",
        "colocate: every learner worker also generates and scores, on one base; split: generators and scorers are Ray"
        " actors on GPUs of their own; results are the same",
    )
    generator: ActorsConfig = field(ActorsConfig(), "generators (placement: split)")
    scorer: ActorsConfig = field(ActorsConfig(), "scorers: rewards and reference (placement: split)")
    rollout: RolloutConfig = field(RolloutConfig(), "the engine that samples rollouts and evaluations")
    probe_steps: Count = field(
        1, "compare the sampler's log-probabilities with the learner's every so many steps; a mismatch stops the run"
    )

    learning_rate: Positive = field(2e-5, "peak learning rate of the policy")
    adam_epsilon: Positive = field(
        1e-5,
        "Adam: added to the denominator (that of OpenAI's PPO in baselines; OpenRLHF, verl and tinker-cookbook: 1e-8)",
    )
    warmup_steps: NotNegative = field(
        0.05, "warm-up: a share of all steps if below 1, else steps; the first step is never 0"
    )
    min_lr_ratio: Share = field(0.1, "learning rate at the end, as a share of the peak")
    rollout_batch_size: Annotated[int, Field(ge=8)] = field(256, "replies per step, over all workers")
    rollout_chunk_size: Count = field(
        64,
        "replies sampled together, rounded down to whole groups of num_generations; results depend on it, not on who does it",
    )
    sampler_rows: Count | None = field(None, SAMPLER_ROWS)
    per_device_train_batch_size: Count = field(16, "rows per forward pass and worker: memory only")
    tokens_per_microbatch: Count | None = field(
        None,
        "tokens per forward pass and worker, padding included, in updates and scores: as many rows as fit, more short ones than"
        " long (verl's ppo_max_token_len_per_gpu); memory only; null: per_device_train_batch_size rows",
    )
    num_ppo_epochs: Count = field(2, "passes over each rollout")
    num_mini_batches: Count = field(4, "optimizer steps per pass")
    advantage_estimator: Literal["gae", "rloo", "grpo"] = field(
        "gae", "gae uses a value model; rloo and grpo compare replies to one prompt"
    )
    num_generations: Count = field(1, "replies per prompt (rloo and grpo need at least 2)")
    max_length: Annotated[int, Field(ge=2)] | None = field(
        None, "tokens of prompt and reply together; default: the model's context"
    )
    max_prompt_length: Count | None = field(
        1024,
        "prompts of more tokens are too long (data.too_long says what becomes of them); default: this (OpenRLHF's; verl: 512) where"
        " max_length is not set, else what max_length leaves; null: no limit of its own",
    )
    response_length: Count = field(128, RESPONSE_LENGTH)
    min_response_length: Count | None = field(
        None, "draw each reply's budget from [this, response_length]; default: always the longest"
    )
    max_staleness: Annotated[int, Field(ge=0, le=1)] = field(
        0,
        "1: each rollout is sampled while the learner is still busy with the one before, by the adapter from before that"
        " update (placement: split); 0: by the newest adapter",
    )
    importance_sampling_cap: Positive = field(
        2.0,
        "max_staleness 1, or rollout.engine vllm: a token's loss is weighted by its probability to the learner over that when"
        " sampled, at most this (truncated importance sampling; TRL's vllm_importance_sampling_cap: 2)",
    )
    temperature: Temperature = field(1.0, "sampling temperature of rollouts; every log-probability is taken at it")
    stop_token_ids: Ints | None = field(
        None,
        "tokens that end a reply; default: the chat template's end of turn, eos of tokenizer and generation config",
    )

    kl_penalty: Literal["kl", "clamped_kl", "bregman", "jensen_shannon", "squared_error", "none", "k1", "k2", "k3"] = (
        field("kl", "per-token penalty against the reference; k1, k2, k3 are aliases of kl, squared_error, bregman")
    )
    kl_coef: NotNegative = field(0.05, "its coefficient at the start; 0 switches it off")
    use_kl_loss: bool = field(
        False,
        "put the penalty into the loss instead of the reward: squared_error pulls along KL(policy||reference), bregman along"
        " KL(reference||policy); kl has no gradient there",
    )
    kl_controller: Literal["fixed", "adaptive", "horizon"] = field(
        "fixed",
        "adaptive: AlpacaFarm's rule; horizon: TRL's rule; with kl and clamped_kl they held their target where that was measured,"
        " with the other penalties in the reward a higher coefficient brought a higher KL (benchmarks/README.md)",
    )
    kl_target: Positive = field(
        6.0,
        "adaptive controllers: wanted k1 per response, nats, against the reference as it then is (ref_model_sync_steps)",
    )
    kl_step_size: Positive = field(0.1, "adaptive: step size (k_beta), below 5")
    kl_horizon: Positive = field(
        10000.0, "horizon: samples over which the coefficient adapts, above 0.2 x rollout_batch_size"
    )
    ref_model_sync_steps: Count | None = field(
        None,
        "after every so many PPO steps the policy as it then is becomes the reference of the KL penalty (ProRL, arXiv:2505.24864;"
        " TRL's name); evaluations, max_kl and the report keep to the policy that the run started from; null: never",
    )
    ref_model_sync_resets_optimizer: bool = field(
        False, "forget the moments of the policy's optimizer with each of these resets, as ProRL does"
    )
    target_kl: Positive | None = field(
        None, "end a step's epochs once approx_kl of new against old exceeds 1.5 times this"
    )

    max_kl: Positive | None = field(
        None,
        "stop (exit 75) once k1 against the policy that the run started from, nats per reply, exceeds this; null: off",
    )
    max_clip_fraction: Annotated[Float, Field(gt=0, le=1)] | None = field(
        None, "stop (exit 75) once a larger share of tokens than this is clipped in a step; null: off"
    )
    min_finished: Annotated[Float, Field(gt=0, le=1)] | None = field(
        None, "stop (exit 75) once a smaller share of replies than this ends by itself; null: off"
    )
    over_optimisation_patience: Count | None = field(
        None,
        "stop (exit 75) after this many evaluations in a row whose reward is two standard errors below the best one, at a"
        " larger KL; null: off",
    )

    alarm: AlarmConfig = field(AlarmConfig(), "signs of over-optimisation")
    kl_cap: Positive | None = field(
        None,
        "the best step is chosen among evaluations at a held-out KL (k1) of at most this, nats, which eval_sampling from the whole"
        " distribution measures; default: max_kl, any without one",
    )

    gamma: Share = field(1.0, "discount")
    lam: Share = field(0.95, "GAE lambda")
    cliprange: Annotated[Float, Field(gt=0, lt=1)] = field(0.2, "PPO ratio clip")
    cliprange_high: Positive | None = field(
        None, "ratio clip upwards where it differs from cliprange (clip-higher, DAPO, arXiv:2503.14476: 0.28)"
    )
    dual_clip: Annotated[Float, Field(gt=1)] | None = field(
        None,
        "bound the loss of tokens with a negative advantage by this many times the advantage (arXiv:1912.09729: 3)",
    )
    ratio_level: Literal["token", "sequence"] = field(
        "token", "probability ratio of each token, or one for a reply: the geometric mean (GSPO, arXiv:2507.18071)"
    )
    loss_aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"] = field(
        "token_mean",
        "the policy loss of an optimizer step: mean over tokens (DAPO, arXiv:2503.14476), over replies of their sums, or over"
        " replies of their means (GRPO, arXiv:2402.03300); verl's names",
    )
    entropy_coef: NotNegative = field(
        0.0, "entropy bonus: weight of the policy's entropy in its loss (arXiv:1602.01783)"
    )
    ptx_coef: NotNegative = field(
        0.0,
        "weight of a supervised loss in the policy's, mean over the tokens of as many rows of ptx_data as an optimizer step has"
        " replies (PPO-ptx, arXiv:2203.02155; OpenRLHF's name, there 0.05)",
    )
    ptx_data: DataConfig | None = field(
        None, "rows of that loss, as data of an sft job; none that asks a prompt which data holds out is learnt"
    )
    cliprange_value: Positive | None = field(
        None,
        "value clip around the old value; null: off, since it did harm where it was measured (arXiv:2006.05990; TRL: 0.2,"
        " OpenRLHF and verl: 0.5)",
    )
    vf_coef: NotNegative = field(0.1, "weight of the value loss")
    whiten_rewards: bool = field(False, "scale shaped rewards to unit variance, mean kept")
    whiten_advantages: bool = field(
        True, "normalise advantages over the whole step; default with rloo and grpo: false, as in TRL"
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        "group",
        "grpo: divide scores, before the KL penalty, by their spread in the group (arXiv:2402.03300), in the step, or not"
        " (Dr. GRPO, arXiv:2503.20783); TRL's name",
    )
    missing_eos_penalty: NotNegative | None = field(
        1.0,
        "subtracted from the score of a reply that did not finish, though its budget was response_length; not with"
        " bootstrap_truncated; null: off",
    )
    overlong_buffer: Count | None = field(
        None, "charge replies that end within this many tokens of response_length (DAPO, arXiv:2503.14476); null: off"
    )
    overlong_penalty: Positive = field(
        1.0, "overlong_buffer: what a reply of response_length pays; a shorter one in proportion"
    )
    filter_groups: bool = field(
        False,
        "learn nothing from prompts whose replies all score the same, not even the KL penalty (dynamic sampling without drawing"
        " anew, DAPO, arXiv:2503.14476); needs num_generations >= 2",
    )
    bootstrap_truncated: bool = field(
        False,
        "take the value model's value after the last token of a reply that did not finish for all that it was still to earn, its"
        " score left out (Pardo et al. 2018, arXiv:1712.00378); else that value is 0",
    )
    reward_baseline: Float = field(0.0, "subtracted from every score")
    normalize_rewards: bool = field(False, "divide scores by their running standard deviation")
    reward_clip: Positive | None = field(None, "clip scores to plus/minus this, after normalisation")

    eval_steps: Count | None = field(
        None, "evaluate on held-out prompts every this many steps; default: ten times in a run"
    )
    eval_on_start: bool = field(True, "evaluate before the first update")
    eval_sampling: SamplingConfig = field(
        SamplingConfig(), "decoding in evaluations; its temperature is by default that of the rollouts"
    )
    confirm_held_out: bool = field(
        False,
        "report half of the held-out prompts (by hash) as eval/confirm/*, apart from eval/*: what was chosen by eval/reward (a"
        " sweep's winner, the best step) is then measured where nothing was chosen; sweeps set it",
    )
    save_steps: Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], BeforeValidator(_to_tuple)] | None = field(
        None,
        "checkpoint every this many steps, or at the steps listed; default: with each evaluation; always at the last step",
    )
    load_best_model_at_end: bool = field(False, "result = the checkpoint with the best held-out reward, not the last")
    num_samples_logged: Annotated[int, Field(ge=0)] = field(4, "replies written to samples.jsonl per step")

    @property
    def samples_off_policy(self) -> bool:
        """Whether tokens are sampled by other probabilities than the learner's: an older adapter's, or another engine's."""
        return self.max_staleness > 0 or self.rollout.engine != "builtin"

    @property
    def chunk_rows(self) -> int:
        """Replies that are sampled together: rollout_chunk_size, rounded down to whole groups of num_generations.

        Equal prompts of a chunk are read once, so a group that lay in two would be read twice. A group larger than a chunk is."""
        whole = self.rollout_chunk_size // self.num_generations * self.num_generations
        return whole if whole and self.defaults_version >= defaults.WHOLE_GROUPS_SINCE else self.rollout_chunk_size

    @model_validator(mode="after")
    def _ppo_rules(self) -> PPOConfig:
        problems = []
        if self.placement == "split" and self.learner.num_workers == 0:
            problems.append(
                "learner.num_workers: placement split needs Ray, and 0 runs in this process without it; set at least 1, or"
                " placement: colocate"
            )
        if self.max_staleness and self.placement != "split":
            problems.append(
                "max_staleness: 1 needs generators of their own, to sample while the learner learns; expected placement:"
                f" split, or max_staleness 0; got placement {self.placement}"
            )
        if self.rollout_batch_size % self.num_mini_batches:
            problems.append(
                _division("num_mini_batches", self.num_mini_batches, "rollout_batch_size", self.rollout_batch_size)
            )
        if self.rollout_batch_size % self.num_generations:
            problems.append(
                _division("num_generations", self.num_generations, "rollout_batch_size", self.rollout_batch_size)
            )
        if self.advantage_estimator != "gae" and self.num_generations < 2:
            problems.append(
                f"num_generations: {self.advantage_estimator} compares replies of one prompt; expected at least 2; got 1"
            )
        if self.filter_groups and self.num_generations < 2:
            problems.append(
                "filter_groups: compares replies to one prompt; expected num_generations of at least 2; got 1"
            )
        if self.overlong_buffer is not None and self.overlong_buffer > self.response_length:
            problems.append(f"overlong_buffer: {self.overlong_buffer} is over response_length {self.response_length}")
        if self.max_length is not None and self.response_length >= self.max_length:
            problems.append(
                f"response_length: {self.response_length} leaves no room for a prompt in max_length {self.max_length}"
            )
        if self.min_response_length is not None and self.min_response_length > self.response_length:
            problems.append(
                f"min_response_length: {self.min_response_length} is over response_length {self.response_length}"
            )
        if self.use_kl_loss and self.kl_penalty in ("kl", "k1"):
            problems.append(
                f"use_kl_loss: {self.kl_penalty} has no gradient in the loss, in expectation; set kl_penalty: squared_error, which"
                " pulls towards the policy's KL to the reference as kl does in the reward, or bregman (the reference's KL to the"
                " policy), or use_kl_loss: false"
            )
        for name, data in (("data", self.data), ("ptx_data", self.ptx_data)):
            if data is not None and data.streaming and data.max_rows is None:
                problems.append(f"{name}.streaming: PPO keeps all its rows in memory; set {name}.max_rows, or drop it")
        problems += [*self._ptx_rules(), *self._zero_rules(), *self._engine_rules(), *self._controller_rules()]
        names = [r.name for r in self.rewards]
        if not any(r.weight for r in self.rewards):
            problems.append("rewards: all weights are 0, so nothing is maximised; give one of them a weight")
        problems += [
            f"rewards.{r.name}.llm.mode: a judge of pairs has no score for one reply; set pointwise"
            for r in self.rewards
            if r.is_pairwise
        ]
        if len(set(names)) != len(names):
            problems.append(f"rewards: names repeat: {', '.join(names)}; give each its own name")
        watched = next((r for r in self.rewards if r.name == self.watch), None)
        if self.watch is not None and (watched is None or watched.weight):
            idle = ", ".join(r.name for r in self.rewards if not r.weight) or "none"
            what = f"reward {self.watch} is maximised" if watched else f"no reward is called {self.watch!r}"
            problems.append(f"watch: {what}; expected one of weight 0: {idle}")
        problems += self._value_start()
        if isinstance(self.save_steps, tuple) and any(s < 1 for s in self.save_steps):
            problems.append("save_steps: steps start at 1")
        if self.sft is not None and "lora" in self.model_fields_set:
            problems.append(
                "lora: the policy copies the SFT adapter's r, alpha and targets; drop lora, or merge the SFT adapter first"
            )
        if problems:
            raise ValueError(" | ".join(problems))
        return self

    def _controller_rules(self) -> list[str]:
        """A step moves the coefficient by at most this share of itself times the relative error of the KL, which both published
        rules clip (maths/controllers.py): at a whole, it could turn negative."""
        if self.kl_controller == "adaptive" and self.kl_step_size * CLIPPED_ERROR >= 1:
            return [
                "kl_step_size: the coefficient could turn negative in one step; expected below"
                f" {1 / CLIPPED_ERROR:g}; got {self.kl_step_size:g}; fix: lower it (AlpacaFarm: 0.1)"
            ]
        least = CLIPPED_ERROR * self.rollout_batch_size
        if self.kl_controller == "horizon" and self.kl_horizon <= least:
            return [
                "kl_horizon: the coefficient could turn negative in one step; expected above"
                f" {CLIPPED_ERROR:g} x rollout_batch_size = {least:g}; got {self.kl_horizon:g}; fix: raise it (TRL: 10000)"
            ]
        return []

    def _value_start(self) -> list[str]:
        start = (self.value.init_from or "policy").removeprefix("reward:")
        ensemble = next((list(r.models(r.name)) for r in self.rewards if r.name == start and r.ensemble), None)
        if ensemble is not None:
            which = " or ".join(f"reward:{role}" for role in ensemble)
            return [f"value.init_from: reward {start!r} is an ensemble; expected one member of it: {which}"]
        names = [name for r in self.rewards for name in (r.models(r.name) if r.ensemble else (r.name,))]
        if start != "policy" and start not in names:
            return [f"value.init_from: no reward is called {start!r}; rewards: {', '.join(names)}"]
        return []

    def _ptx_rules(self) -> list[str]:
        if self.ptx_data is None:
            lacks = "ptx_coef: there are no rows to learn from; set ptx_data, as data of an sft job, or ptx_coef: 0"
            return [lacks] if self.ptx_coef else []
        idle = [name for name in ("eval", "eval_max_rows", "disjoint_stages") if getattr(self.ptx_data, name)]
        return [
            f"ptx_data.{name}: has no effect: nothing is evaluated on ptx_data, all of it trains; drop it"
            for name in idle
        ]

    def _engine_rules(self) -> list[str]:
        if self.rollout.engine == "builtin":
            return []
        problems = []
        if self.load_in_8bit or self.load_in_4bit:
            problems.append(
                "rollout.engine: vllm has a base that is not quantised, and the learner's would be; expected builtin, or"
                " load_in_8bit and load_in_4bit off; got vllm"
            )
        if self.lora.target_parameters:
            problems.append(
                "lora.target_parameters: vLLM cannot adapt stacked expert weights; drop it, or rollout.engine: builtin"
            )
        if self.placement == "colocate" and self.learner.num_workers > 1:
            problems.append(
                "rollout.engine: vllm beside a learner needs one worker; expected learner.num_workers 0 or 1, or placement: split;"
                f" got {self.learner.num_workers}"
            )
        return problems

    def _zero_rules(self) -> list[str]:
        stage, problems = self.learner.zero_stage, []
        if stage > 0 and self.optim != "adamw_torch":
            problems.append(
                f"optim: {self.optim} loses its statistics of whole tensors when ZeRO cuts them up; expected adamw_torch,"
                f" or learner.zero_stage 0; got zero_stage {stage}"
            )
        if stage == 3 and (self.load_in_8bit or self.load_in_4bit):
            problems.append("learner.zero_stage: 3 cannot cut up a quantised base; expected 0, 1 or 2")
        return problems


class EvaluateConfig(JobFields):
    """Compare policies on held-out prompts: reward, KL to the reference, length, share finished, win rate."""

    data: DataConfig = field(..., "prompts")
    policies: Annotated[tuple[PolicySpec, ...], BeforeValidator(_to_tuple)] = field(
        ..., "what is compared", min_length=1
    )
    rewards: Annotated[tuple[RewardSource, ...], BeforeValidator(_to_tuple)] = field((), "scores of the replies")
    judge: Strings | None = field(
        None,
        "reward that decides wins, or several: the first decides, the others are shown beside it with their agreement (Cohen's"
        " kappa); default: the first reward",
        min_length=1,
    )
    baseline: str | None = field(None, "policy that wins are counted against; default: the first")
    reference: str | None = field(None, "policy that KL is measured against; default: the baseline")
    response_length: Count = field(128, RESPONSE_LENGTH)
    max_length: Annotated[int, Field(ge=2)] | None = field(
        None, "tokens of prompt and reply together; default: the model's context"
    )
    rollout_chunk_size: Count = field(64, "replies sampled together")
    sampler_rows: Count | None = field(None, SAMPLER_ROWS)
    per_device_eval_batch_size: Count = field(16, "rows per forward pass")
    sampling: SamplingConfig = field(SamplingConfig(), "decoding")
    stop_token_ids: Ints | None = field(
        None,
        "tokens that end a reply; default: the chat template's end of turn, eos of tokenizer and generation config",
    )

    @model_validator(mode="after")
    def _names(self) -> EvaluateConfig:
        policies, rewards = [p.name for p in self.policies], [r.name for r in self.rewards]
        for label, name, known in (
            ("baseline", self.baseline, policies),
            ("reference", self.reference, policies),
            *(("judge", name, rewards) for name in self.judge or ()),
            *((f"policies.{p.name}.best_of_reward", p.best_of_reward, rewards) for p in self.policies),
        ):
            if name is not None and name not in known:
                raise ValueError(f"{label}: {name!r} is not among {', '.join(known) or 'none'}")
        for label, names in (("policies", policies), ("rewards", rewards)):
            if len(set(names)) != len(names):
                raise ValueError(f"{label}: names repeat: {', '.join(names)}; give each its own name")
        self._check_judging()
        return self

    def _check_judging(self) -> None:
        if self.judge is not None and len(set(self.judge)) != len(self.judge):
            raise ValueError(f"judge: names repeat: {', '.join(self.judge)}")
        pairwise = [r.name for r in self.rewards if r.is_pairwise]
        for reward in self.rewards:
            if reward.is_pairwise and reward.name not in self.judges:
                raise ValueError(
                    f"judge: {reward.name} compares pairs, and judges nothing; name it in judge, or drop it"
                )
            if reward.is_pairwise and reward.weight != 1:
                raise ValueError(f"rewards.{reward.name}.weight: has no effect on a judge of pairs; drop it")
        for policy in self.policies:
            chooser = policy.best_of_reward or next((r.name for r in self.rewards), None)
            if policy.best_of > 1 and (chooser is None or chooser in pairwise):
                raise ValueError(
                    f"policies.{policy.name}.best_of: expected a reward that scores single replies; got {chooser}"
                )
            if policy.name == self.reference and policy.policy is None:
                raise ValueError(
                    f"reference: {policy.name} is no model that is loaded here, so no KL can be measured against it"
                )

    @property
    def judges(self) -> tuple[str, ...]:
        """Names of the rewards that decide wins, the first of them first; empty without rewards."""
        return self.judge or tuple(r.name for r in self.rewards[:1])
