"""What each role does that takes memory, done on models without weights: the passes of a PPO step and of supervised training.

Widest case: every prompt and every reply has its full length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import PackedRows, Sequences
from rlhf_ray.config import DPOConfig, OptimFields, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from rlhf_ray.maths import losses
from rlhf_ray.models.adapters import adapter_parameters
from rlhf_ray.models.assembly import BASE, Assembly
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.plan.meta_tracker import Device, MetaMemoryTracker, Peak
from rlhf_ray.plan.skeleton import Head, size_of
from rlhf_ray.roles.deepspeed_engine import ParameterGroup, build_optimizer
from rlhf_ray.roles.learner import trained_groups
from rlhf_ray.sampler.engine import WIDTHS, Sampler, rows_at_once
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.rows import PREFILL_TOKENS
from rlhf_ray.supervised.trained_model import LanguageModel, PreferenceModel, RewardModel


@dataclass(frozen=True)
class Shapes:
    """Rows and tokens of the passes. rows: of a forward pass in updates.  scored: of one in scoring.  chunk: replies sampled
    together.  same: replies to one prompt.  prompt, response: tokens.  at_once: sampler_rows of the job.  contiguous: rows are read
    without a mask.  packed: and as one where the base can."""

    rows: int
    scored: int
    chunk: int
    same: int
    prompt: int
    response: int
    at_once: int | None = None
    contiguous: bool = True
    packed: bool = False

    @property
    def _length(self) -> int | None:
        return self.prompt + self.response if self.contiguous else None

    def within(self, tokens: int | None) -> list[Shapes]:
        """The widest passes of at most so many tokens (`tokens_per_microbatch`): as many of the longest rows as fit, and a row
        more of somewhat shorter ones.   None: these."""
        if tokens is None or not self.contiguous:
            return [self]
        longest = self.prompt + self.response
        most = max(self.chunk, self.rows)
        whole = max(tokens // longest, 1)
        found = [self._of(whole, longest)]
        if tokens > whole * longest and whole < most:
            found.append(self._of(whole + 1, tokens // (whole + 1)))
        return found

    def _of(self, rows: int, length: int) -> Shapes:
        response = min(self.response, length - 1)
        return replace(self, rows=rows, scored=min(rows, self.chunk), prompt=length - response, response=response)

    def texts(self, rows: int) -> Sequences:
        """Rows of ptx_data: every token but the first is predicted, as `PtxBatch` has them."""
        return self._sequences(rows, 1)

    def sequences(self, rows: int) -> Sequences:
        return self._sequences(rows, self.prompt)

    def _sequences(self, rows: int, prompt: int) -> Sequences:
        length = self.prompt + self.response
        tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        mask = torch.ones_like(tokens, dtype=torch.bool)
        real, read = (torch.zeros(rows * n, dtype=torch.int64, device="meta") for n in (length, length - prompt + 1))
        packed = PackedRows((length,) * rows, real, read) if self.packed else None
        return Sequences(tokens, mask, mask[:, prompt:], self._length, packed=packed)


class Cast:
    """The models of one process, and a tracker that knows them. build: makes them, inside the tracker."""

    def __init__(self, device: Device, build: Callable[[], tuple[Assembly, RoleModels]]) -> None:
        self.tracker = MetaMemoryTracker(device)
        with self.tracker:
            self.assembly, self.models = build()
        stacks = self.assembly.stacks
        self.bases = tuple(stack.backbone.identity.path for stack in stacks.values())
        self.tracker.own("adapters", self.models.parameters())
        self.base_weights = 0
        for stack in stacks.values():
            model = stack.backbone.model
            frozen = [p for name, p in model.named_parameters() if ".lora_" not in name]
            self.tracker.own("bases", [*frozen, *model.buffers()])
            self.base_weights += size_of(model)[0] - sum(
                p.numel() for n, p in model.named_parameters() if ".lora_" in n
            )
            self.tracker.vocabulary.add(int(model.config.get_text_config().vocab_size))
        self.trained = sum(p.numel() for p in self.models.parameters() if p.requires_grad)

    def load(self) -> Peak:
        with self.tracker, self.tracker.watch() as peak:
            pass
        return peak

    def sampling(self, shapes: Shapes, how: SamplingConfig, role: str = "policy") -> Peak:
        """One chunk through the sampler. Steps between the first and the last go without the model: only the cache grows."""
        stack, binding = self.models.stack_of(role), self.models.bindings[role]
        vocabulary = int(stack.backbone.model.config.get_text_config().vocab_size)
        forward = _OutputShapes(stack.model, vocabulary, shapes.prompt + shapes.response - 1)
        different = range(-(-shapes.chunk // shapes.same))  # equal prompts are read once
        prompts = [(i % vocabulary,) + (0,) * (shapes.prompt - 1) for i in different for _ in range(shapes.same)]
        knobs = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "adapter": binding.adapter}
        requests = [DecodeRequest(p, 0, shapes.response, (), **knobs) for p in prompts]  # type: ignore[arg-type]
        with self.tracker:
            device = self.tracker.device
            rows = rows_at_once(shapes.at_once, shapes.chunk, device)
            sampler = Sampler(
                stack.model, 0, rows, forward, WIDTHS.get(device, 1), prefill_tokens=PREFILL_TOKENS[device]
            )
            with self.tracker.watch() as peak:
                sampler.run(requests[: shapes.chunk])
        return peak

    def scoring(self, shapes: Shapes, temperature: float, reference: str | None, rewards: Sequence[str]) -> Peak:
        """Reference and rewards over the rows of one forward pass, as `Scorer` asks for them."""
        with self.tracker, self.tracker.watch() as peak, torch.no_grad():
            if reference is not None:
                self.models("logprobs", reference, shapes.sequences(shapes.scored), temperature)
            for reward in rewards:
                self.models("rewards", reward, shapes.sequences(shapes.scored))
        return peak


class Learning:
    """A cast with an optimizer, whose moments are there from the start, as they are from a run's second step on."""

    def __init__(self, tracker: MetaMemoryTracker, groups: Sequence[ParameterGroup], optim: OptimFields) -> None:
        self.tracker = tracker
        self.parameters = [p for g in groups for p in g.parameters.values()]
        self.optimizer = None if optim.optim == "adamw_8bit" else build_optimizer(groups, optim)
        self.moments: list[Tensor] = []
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = 1.0
            if optim.optim == "adamw_torch":  # torch's own choice by device
                group["foreach"] = tracker.device == "cuda"
        with tracker:
            for p in self.parameters:
                p.grad = torch.empty_like(p)
            self.step()
            if (
                self.optimizer is None
            ):  # bitsandbytes: two states of a byte and their scales; small tensors keep float32
                sizes = [2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in (p.numel() for p in self.parameters)]
                self.moments = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        self.tracker.own(
            "optimizer", [*self.moments, *(t for s in states for t in s.values() if isinstance(t, Tensor))]
        )

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        for p in self.parameters:
            p.grad = None

    def update(self, microbatch: Callable[[], Iterator[Tensor]]) -> Peak:
        """Two microbatches, of which the second meets the gradients of the first, and the step."""
        with self.tracker, self.tracker.watch() as peak:
            for _ in range(2):
                for loss in microbatch():
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss
                self.tracker.own("gradients", (p.grad for p in self.parameters))
            self.step()
        return peak


class PPOLearning(Learning):
    """The learner's passes."""

    def __init__(self, cast: Cast, job: PPOConfig) -> None:
        self.cast, self.models = cast, cast.models
        super().__init__(cast.tracker, trained_groups(cast.models), job)

    def evaluation(self, shapes: Shapes, job: PPOConfig) -> Peak:
        with self.tracker, self.tracker.watch() as peak, torch.no_grad():
            self.models("both", shapes.sequences(shapes.rows), job.temperature, with_entropy=True)
        return peak

    def updates(self, shapes: Shapes, job: PPOConfig, joint: bool) -> Peak:
        """joint: policy and value model are one loss (ZeRO 1 to 3; a shared trunk always)."""
        self.models.train(self.models.recompute)
        peak = self.update(lambda: self._losses(shapes, job, joint))
        self.models.eval()
        return peak

    def _losses(self, shapes: Shapes, job: PPOConfig, joint: bool) -> Iterator[Tensor]:
        """As `Learner` makes them."""
        models, seq = self.models, shapes.sequences(shapes.rows)
        fixed, mask = torch.zeros(shapes.rows, shapes.response, device="meta"), seq.response_mask
        weights = fixed if job.samples_off_policy else None

        if job.ptx_coef:
            texts = shapes.texts(shapes.rows)
            yield losses.ptx_loss_sum(models("logprobs", "policy", texts, 1.0)[0], texts.response_mask)[0]

        with_entropy = job.entropy_coef > 0

        def policy(new: Tensor, entropy: Tensor | None) -> Tensor:
            loss = losses.policy_loss_sum(new, fixed, fixed, mask, job.cliprange, weights)[0]
            if job.use_kl_loss:
                loss = loss + losses.kl_loss_sum(job.kl_penalty, new, fixed, mask, weights)[0]
            return loss if entropy is None else loss - entropy.sum()

        def value_loss(values: Tensor) -> Tensor:
            return losses.value_loss_sum(values, fixed, fixed, mask, job.cliprange_value)[0]

        if "value" in models.bindings and (joint or models.shares_trunk):
            new, entropy, values, _ = models("both", seq, job.temperature, with_entropy)
            yield policy(new, entropy) + value_loss(values)
            return
        yield policy(*models("logprobs", "policy", seq, job.temperature, with_entropy))
        if "value" in models.bindings:
            yield value_loss(models("values", seq)[0])


class SupervisedLearning(Learning):
    """The passes of SFT, DPO and reward modelling."""

    def __init__(self, cast: Cast, job: SFTConfig | DPOConfig | RewardConfig) -> None:
        base, peft_model = cast.assembly.base, cast.assembly.stacks[BASE].peft
        self.job, self.length = job, min(job.max_length, base.context_length)
        trained: dict[str, Any] = dict(adapter_parameters(peft_model, "trained"))
        if isinstance(job, SFTConfig):
            # Rows that attention reads one after the other take what rows of full length take side by side.
            masked = job.packing and not (job.has_packed_rows and job.attn_implementation != "eager")
            self.model: Any = LanguageModel(base, peft_model, job.has_contiguous_rows, masked)
            cast.tracker.packs = masked and job.attn_implementation != "flash_attention_2"
        elif isinstance(job, DPOConfig):
            self.model = PreferenceModel(base, peft_model, None if job.sft is None else "reference")
        else:
            head = Head(base.hidden_size).to("meta")
            trained |= dict(head.named_parameters())
            self.model = RewardModel(base, peft_model, head, job.has_contiguous_rows)
        super().__init__(cast.tracker, [ParameterGroup("all", trained)], job)

    def training(self, rows: int) -> Peak:
        self.model.train()
        peak = self.update(lambda: iter([self._loss(rows)]))
        self.model.eval()
        return peak

    def evaluation(self, rows: int) -> Peak:
        with self.tracker, self.tracker.watch() as peak, torch.no_grad():
            self._loss(rows)
        return peak

    def _loss(self, rows: int) -> Tensor:
        """rows: a pair of replies each in DPO and reward modelling."""
        is_sft = isinstance(self.job, SFTConfig)
        tokens = torch.zeros(rows if is_sft else 2 * rows, self.length, dtype=torch.int64, device="meta")
        if is_sft:
            loss: Tensor = self.model(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
            return loss
        if isinstance(self.job, DPOConfig):
            inputs = tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
            ref_chosen, ref_rejected = self.model.reference_logprobs(*inputs).chunk(2)
            chosen, rejected = self.model(*inputs).chunk(2)
            return losses.dpo_loss_sum(chosen, rejected, ref_chosen, ref_rejected, self.job.beta)[0]
        chosen, rejected = self.model(tokens, torch.ones_like(tokens)).chunk(2)
        return losses.pairwise_reward_loss_sum(chosen, rejected)[0]


class _OutputShapes:
    """How the sampler calls the model. It runs for prompts, and once for a token, as soon as a step attends to the last of them."""

    def __init__(self, model: Any, vocabulary: int, longest: int) -> None:
        self.model, self.vocabulary, self.longest, self.done = model, vocabulary, longest, False

    def __call__(self, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        cache = next(inputs[name] for name in ("past_key_values", "cache_params") if name in inputs)
        if ids.shape[1] == 1 and (self.done or cache.get_seq_length() + 1 < self.longest):
            dtype = next(self.model.parameters()).dtype
            return SimpleNamespace(logits=torch.empty(len(ids), 1, self.vocabulary, dtype=dtype, device="meta"))
        self.done = ids.shape[1] == 1
        return self.model(**inputs)
