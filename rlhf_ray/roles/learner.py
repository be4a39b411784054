"""The learner: evaluates a rollout, updates policy and value model by PPO, publishes the policy adapter.

A plain class; every rank has one. All ranks hold all rows of a step, work on their own share and exchange sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlhf_ray.batches import Experience, Rollout, Sequences
from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.maths import losses
from rlhf_ray.maths.masks import zero_outside
from rlhf_ray.models.adapters import adapter_parameters, adapter_tensors, load_adapter_tensors
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.zero3 import padding_batch
from rlhf_ray.roles.deepspeed_engine import ParameterGroup, TrainingEngine
from rlhf_ray.roles.experience import Evaluation
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.minibatches import Microbatch, by_length, microbatches, minibatches
from rlhf_ray.roles.optimizer_state import export_state, forget_state, restore_state
from rlhf_ray.roles.ptx import PtxBatch, PtxRows
from rlhf_ray.roles.trained_weights import TrainedWeights, load_weights, read_weights
from rlhf_ray.runtime.fault_injection import fault_point, inject_nan
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run_folder import sha256_tensors

RATIO_LIMIT = 1e-4


@dataclass(frozen=True)
class PublishedAdapter:
    """What the policy is now. tensors: plain PEFT keys -> f32 on the CPU; sha256 is over their names, shapes and bytes."""

    version: int
    sha256: str
    tensors: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass
class UpdateStats:
    """Sums over real tokens of the minibatches of a step that were learned from, over all ranks.

    updates, skipped: minibatches learned from, and left out.  left_out: gradient norms of the last one if it was left out."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    norms: list[dict[str, float]] = field(default_factory=list)
    epochs: int = 0
    updates: int = 0
    skipped: int = 0
    left_out: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        tokens = max(self.sums.get("tokens", 0.0), 1.0)
        value_tokens = max(self.sums.get("value_tokens", 0.0), 1.0)
        found = {
            "loss/policy": self.sums.get("policy_loss", 0.0) / tokens,
            "policy/clip_fraction": self.sums.get("clip_fraction", 0.0) / tokens,
            "policy/approx_kl": self.sums.get("approx_kl", 0.0) / tokens,
            "ratio/mean": self.sums.get("ratio", 0.0) / tokens,
            "ratio/max": self.maxima["ratio"],
            "ratio/first_minibatch_max_deviation": self.maxima["first_deviation"],
            "policy/epochs": float(self.epochs),
            "policy/skipped_updates": float(self.skipped),
        }
        if "computed_tokens" in self.sums:
            found["update/real_token_share"] = self.sums["real_tokens"] / self.sums["computed_tokens"]
        if "kl_loss" in self.sums:
            found["loss/kl"] = self.sums["kl_loss"] / tokens
        if "ptx_tokens" in self.sums:
            found["loss/ptx"] = self.sums["ptx_loss"] / max(self.sums["ptx_tokens"], 1.0)
        if "value_tokens" in self.sums:
            found["loss/value"] = self.sums["value_loss"] / value_tokens
            found["value/clip_fraction"] = self.sums["value_clip_fraction"] / value_tokens
        for group in self.norms[0] if self.norms else ():
            found[f"grad_norm/{group}"] = sum(n[group] for n in self.norms) / len(self.norms)
        return found


class Learner:
    """models: who sits where.  The policy's adapter, the value model's adapter and head are trained; everything else is frozen.

    ptx: rows of the supervised loss in the policy's (ptx_coef), None without one.

    lockstep: every forward pass through `models` is a collective (ZeRO-3), and all ranks must make the same ones."""

    def __init__(self, models: RoleModels, config: PPOConfig, session: Session, ptx: PtxRows | None = None) -> None:
        self.models, self.config, self.session, self.ptx = models, config, session, ptx
        self.batching = Batching.of(config)
        self.lockstep = config.learner.zero_stage == 3
        if self.lockstep:
            models.max_over_ranks = session.highest
        self.groups = trained_groups(models)
        self.engine = TrainingEngine(
            models, self.groups, config, config.learner.zero_stage, config.learner.deepspeed, session.world_size
        )
        self.version = 0
        self.published = self.publish()

    def evaluate(self, rollout: Rollout, step: int, learnt: Tensor | None = None) -> Evaluation:
        """Log-probabilities, entropies and values of all rows before the step's updates.

        Computed in the very rows and widths of epoch 0's microbatches, so that the first ratio is exactly 1 in any dtype.
        learnt: bool[B], the rows that the update gets; None for all."""
        found: list[tuple[Tensor, list[Tensor]]] = []
        lengths = rollout.attention_mask.sum(dim=1)
        chosen = torch.ones(len(rollout), dtype=torch.bool) if learnt is None else learnt
        inside, outside = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        batches = [inside[index] for index in self._minibatches(step, 0, len(inside))] if len(inside) else []
        for minibatch in [*batches, outside] if len(outside) else batches:
            for micro in self._microbatches(minibatch, lengths[minibatch]):
                seq = self._sequences(rollout, micro)
                with torch.no_grad():
                    passed = self.engine.module("both", seq, self.config.temperature, with_entropy=True)
                rows = [x.float().cpu()[micro.counts] for x in passed if x is not None]
                found.append((micro.index[micro.counts], rows))
        parts = [part for rank in self.session.gather(found) for part in rank]
        return _assemble(parts, *rollout.response_mask.shape)

    def logprobs_under(self, adapter: PublishedAdapter, rollout: Rollout) -> Tensor:
        """f32[B, R]: log-probabilities of all rows under an adapter published earlier, 0 outside the mask.

        The policy's own weights are put back, bit for bit. Not to be called between an update and its publishing; every rank
        calls it."""
        binding = self.models.bindings["policy"]
        model, name = self.models.stack_of("policy").peft, str(binding.adapter)
        found: list[tuple[Tensor, Tensor]] = []
        load_adapter_tensors(model, name, adapter.tensors)
        try:
            for micro in self._microbatches(torch.arange(len(rollout)), rollout.attention_mask.sum(dim=1)):
                seq = self._sequences(rollout, micro)
                with torch.no_grad():
                    logprobs, _ = self.engine.module("logprobs", "policy", seq, self.config.temperature)
                found.append((micro.index[micro.counts], logprobs.float().cpu()[micro.counts]))
        finally:
            load_adapter_tensors(model, name, self.published.tensors)
        logprobs = torch.zeros(rollout.response_mask.shape)
        for index, rows in (part for rank in self.session.gather(found) for part in rank):
            logprobs[index, : rows.shape[1]] = rows
        return logprobs

    def update(
        self, experience: Experience, step: int, learning_rates: dict[str, float], kl_coef: float, guards: Guards
    ) -> UpdateStats:
        """num_ppo_epochs passes of num_mini_batches optimizer steps; ends early on target_kl.

        A minibatch whose gradient is not finite is left out and counted. Raises InvariantError, and StopTraining after three
        such."""
        stats = UpdateStats(maxima={"first_deviation": 0.0, "ratio": 0.0})
        self.models.train(self.models.recompute)  # dropout is 0 everywhere: the mode switches recomputation on, no more
        try:
            self._epochs(experience, step, learning_rates, kl_coef, stats, guards)
        finally:
            self.models.eval()
        stats.maxima["ratio"] = max(self.session.gather(stats.maxima["ratio"]))
        return stats

    def _epochs(
        self,
        experience: Experience,
        step: int,
        learning_rates: dict[str, float],
        kl_coef: float,
        stats: UpdateStats,
        guards: Guards,
    ) -> None:
        for epoch in range(self.config.num_ppo_epochs if len(experience) else 0):
            for number, minibatch in enumerate(self._minibatches(step, epoch, len(experience))):
                first = epoch == 0 and number == 0
                fault_point("learner", "minibatch", step, self.session.rank)
                ptx = self.ptx.minibatch(step, epoch, number) if self.ptx and learning_rates["policy"] > 0 else None
                approx_kl = self._optimizer_step(
                    experience, minibatch, stats, learning_rates, kl_coef, step, first, ptx
                )
                guards.note_update(not stats.left_out, stats.left_out, step)
                if first:
                    self._check_first_ratio(stats, step)
                if self.config.target_kl is not None and approx_kl > 1.5 * self.config.target_kl:
                    stats.epochs = epoch + 1
                    return
            stats.epochs = epoch + 1

    def publish(self) -> PublishedAdapter:
        """Snapshot the policy adapter under a new version, with its hash. Every rank calls it (it may be sharded)."""
        binding = self.models.bindings["policy"]
        tensors = adapter_tensors(self.models.stack_of("policy").peft, str(binding.adapter))
        self.published = PublishedAdapter(self.version, sha256_tensors(tensors), tensors)
        self.version += 1
        return self.published

    def weights(self) -> TrainedWeights:
        """The policy as it was published, the value model as it is. Every rank calls it (they may be sharded)."""
        return read_weights(self.models, self.published.tensors)

    def optimizer_state(self) -> dict[str, Tensor]:
        """By parameter name, whatever the ZeRO stage and world size. Every rank calls it."""
        return export_state(self.engine)

    def forget_optimizer(self, group: str) -> None:
        """Begin anew with the moments and the step count of a parameter group. Every rank calls it."""
        forget_state(self.engine, group)

    def restore(self, weights: TrainedWeights, optimizer: dict[str, Tensor], version: int) -> None:
        """Put back `weights` and `optimizer_state`, and publish the policy as `version`. Every rank calls it."""
        load_weights(self.models, weights)
        restore_state(self.engine, optimizer)
        self.version = version
        self.publish()

    def _optimizer_step(
        self,
        experience: Experience,
        minibatch: Tensor,
        stats: UpdateStats,
        learning_rates: dict[str, float],
        kl_coef: float,
        step: int,
        first: bool,
        ptx: PtxBatch | None,
    ) -> float:
        tokens = int(experience.response_mask[minibatch].sum())
        train_policy = learning_rates["policy"] > 0
        lengths = experience.response_mask.sum(dim=1)
        whole = lengths + experience.prompt_mask.sum(dim=1)
        micros = self._microbatches(minibatch, whole[minibatch])
        row_weights = torch.ones(len(experience))
        aggregated = losses.aggregation_weights(self.config.loss_aggregation, lengths[minibatch])
        if aggregated is not None:
            row_weights[minibatch] = aggregated
        sums: dict[str, float] = {"tokens": float(tokens) if self.session.is_main else 0.0}
        if ptx is not None:  # ahead: the last backward, after which gradients are reduced, must reach every parameter
            self._accumulate_ptx(ptx, sums)
        deviation, ratio = 0.0, 0.0
        for number, micro in enumerate(micros):
            seq = self._sequences(experience, micro)
            self._count_tokens(sums, seq, whole, micro)
            rows = experience.rows(micro.index)
            mask = seq.response_mask & micro.counts.to(seq.tokens.device)[:, None]
            weights = None if aggregated is None else row_weights[micro.index]
            for loss, found in self._losses(seq, rows, mask, kl_coef, train_policy, weights):
                loss = inject_nan("learner", "gradient", loss.reshape(1), step, self.session.rank)[0]
                self.engine.accumulate(loss / tokens, last=number == len(micros) - 1)
                deviation = max(deviation, found.pop("ratio_max_deviation", 0.0))
                ratio = max(ratio, found.pop("ratio_max", 0.0))
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
        if first:
            stats.maxima["first_deviation"] = max(self.session.gather(deviation))
        norms = self.engine.clip()
        if self.session.highest(int(not all(map(math.isfinite, norms.values())))):
            self.engine.skip()
            stats.skipped, stats.left_out = stats.skipped + 1, norms
            return 0.0
        self.engine.apply(learning_rates, frozen=() if train_policy else ("policy",))
        stats.norms.append(norms)
        stats.maxima["ratio"] = max(stats.maxima["ratio"], ratio)
        stats.updates, stats.left_out = stats.updates + 1, {}
        names = sorted(sums)
        totals = dict(zip(names, self.session.sum([sums[n] for n in names])))
        for name, value in totals.items():
            stats.sums[name] = stats.sums.get(name, 0.0) + value
        return totals["approx_kl"] / tokens

    def _accumulate_ptx(self, ptx: PtxBatch, sums: dict[str, float]) -> None:
        """Backward of ptx_coef x the mean of -log p over the learnt tokens of all ranks' rows. Adds this rank's to `sums`."""
        total = int(ptx.learnt.sum())
        sums |= {"ptx_loss": 0.0, "ptx_tokens": 0.0}
        for number, micro in enumerate(self._microbatches(torch.arange(len(ptx)), ptx.lengths)):
            seq = to_device(ptx.sequences(micro.index, self.batching), self.session.device)
            self._count_tokens(sums, seq, ptx.lengths, micro)
            logprobs, _ = self.engine.module("logprobs", "policy", seq, 1.0)
            learnt = (ptx.learnt[micro.index] & micro.counts[:, None])[:, : seq.response_width].to(logprobs.device)
            loss, count = losses.ptx_loss_sum(logprobs, learnt)
            self.engine.accumulate(self.config.ptx_coef * loss / total + self._reach_value(number), last=False)
            sums["ptx_loss"] += float(loss.detach())
            sums["ptx_tokens"] += float(count)

    def _reach_value(self, number: int) -> Tensor | float:
        """0, under ZeRO-3 in an accumulation's first backward with a gradient of 0 for the value model.

        DeepSpeed 0.19 overwrites the gradients of the step before in the first backward alone: a parameter that only later ones
        reach would keep them."""
        if self.engine.zero_stage < 3 or number or "value" not in self.models.bindings:
            return 0.0
        values, _ = self.engine.module("values", padding_batch(self.session.device))
        return values.sum() * 0.0

    def _losses(
        self,
        seq: Sequences,
        rows: Experience,
        mask: Tensor,
        kl_coef: float,
        train_policy: bool,
        row_weights: Tensor | None,
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The microbatch's loss SUMS (the caller divides by the minibatch's token count), each with its statistics.

        Policy and value model together where they share a trunk; else one after the other, so that the activations of only one pass
        are alive at a time. ZeRO 1 to 3 reduce gradients in a single backward at the end of an accumulation: together as well."""
        module, temperature = self.engine.module, self.config.temperature
        with_entropy = self.config.entropy_coef > 0
        if "value" in self.models.bindings and (self.models.shares_trunk or self.engine.zero_stage > 0):
            new, entropy, values, _ = module("both", seq, temperature, with_entropy)
            policy, found = self._policy_loss(new, entropy, rows, mask, kl_coef, train_policy, row_weights)
            value, more = self._value_loss(values, rows, mask)
            yield policy + value, found | more
            return
        new, entropy = module("logprobs", "policy", seq, temperature, with_entropy)
        yield self._policy_loss(new, entropy, rows, mask, kl_coef, train_policy, row_weights)
        if "value" in self.models.bindings:
            values, _ = module("values", seq)
            yield self._value_loss(values, rows, mask)

    def _policy_loss(
        self,
        new: Tensor,
        entropy: Tensor | None,
        rows: Experience,
        mask: Tensor,
        kl_coef: float,
        train_policy: bool,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        config, width = self.config, new.shape[1]
        row_weights = None if row_weights is None else row_weights.to(new.device)
        old, ref, advantages = (
            x[:, :width].to(new.device) for x in (rows.old_logprobs, rows.ref_logprobs, rows.advantages)
        )
        weights = None if rows.token_weights is None else rows.token_weights[:, :width].to(new.device)
        policy, _, stats = losses.policy_loss_sum(
            new,
            old,
            advantages,
            mask,
            config.cliprange,
            weights,
            cliprange_high=config.cliprange_high,
            dual_clip=config.dual_clip,
            ratio_level=config.ratio_level,
            row_weights=row_weights,
        )
        loss = policy if train_policy else policy * 0.0
        names = ("clip_fraction", "approx_kl", "ratio", "ratio_max", "ratio_max_deviation")
        found = {"policy_loss": float(policy.detach()), **{name: float(stats[name]) for name in names}}
        if config.use_kl_loss:
            penalty, _ = losses.kl_loss_sum(config.kl_penalty, new, ref, mask, weights, row_weights)
            found["kl_loss"] = float(penalty.detach())
            loss = loss + kl_coef * penalty if kl_coef else loss
        if entropy is not None:
            bonus = zero_outside(entropy, mask)
            bonus = (bonus if row_weights is None else bonus * row_weights[:, None]).sum()
            loss = loss - config.entropy_coef * (bonus if train_policy else bonus * 0.0)
        return loss, found

    def _value_loss(self, values: Tensor, rows: Experience, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
        config, width = self.config, values.shape[1]
        old, targets = (x[:, :width].to(values.device) for x in (rows.old_values, rows.returns))
        value, count, stats = losses.value_loss_sum(values, old, targets, mask, config.cliprange_value)
        return config.vf_coef * value, {
            "value_loss": float(value.detach()),
            "value_tokens": float(count),
            "value_clip_fraction": float(stats["clip_fraction"]),
        }

    def _check_first_ratio(self, stats: UpdateStats, step: int) -> None:
        worst = stats.maxima["first_deviation"]
        if not worst <= RATIO_LIMIT:
            raise InvariantError.at(
                f"step {step}",
                "the probability ratio of the first minibatch is not 1: the update does not see the policy that was evaluated",
                f"a deviation of at most {RATIO_LIMIT:g}",
                f"{worst:.3g}",
                "look for dropout, an adapter that is not the active one, or a second dtype",
            )

    def _minibatches(self, step: int, epoch: int, rows: int) -> list[Tensor]:
        return minibatches(self.config.seed, step, epoch, rows, self.config.num_mini_batches)

    def _microbatches(self, minibatch: Tensor, lengths: Tensor) -> list[Microbatch]:
        rank, world_size = self.session.rank, self.session.world_size
        if not self.batching.contiguous:
            return microbatches(minibatch, rank, world_size, self.batching.rows)
        return by_length(minibatch, lengths, rank, world_size, self.batching)

    def _count_tokens(self, sums: dict[str, float], seq: Sequences, lengths: Tensor, micro: Microbatch) -> None:
        """What the passes over a microbatch read of rows that count, and what they compute: one for each base, since that of a
        value model of its own may need padding where the policy's needs none. Older runs log what they have logged.

        lengths: tokens of every row that `micro` may name."""
        if self.batching.contiguous:
            real = float(lengths[micro.index[micro.counts]].sum())
            stacks = {id(s): s for s in map(self.models.stack_of, {"policy", "value"} & self.models.bindings.keys())}
            sums["real_tokens"] = sums.get("real_tokens", 0.0) + real * len(stacks)
            sums["computed_tokens"] = sums.get("computed_tokens", 0.0) + float(
                sum(stack.computed_tokens(seq) for stack in stacks.values())
            )

    def _sequences(self, rows: Rollout | Experience, micro: Microbatch) -> Sequences:
        seq = self.batching.sequences(rows.tokens, rows.prompt_mask, rows.response_mask, micro.index)
        return to_device(seq, self.session.device)


def trained_groups(models: RoleModels) -> list[ParameterGroup]:
    """The policy's adapter; and the value model's adapter and head, or its head alone where it shares the policy's adapter.

    A shared adapter's gradients of both losses cannot be told apart: they belong to the policy, with its clip and its rate."""
    policy_binding = models.bindings["policy"]
    policy: dict[str, nn.Parameter] = {
        f"policy.{n}": p
        for n, p in adapter_parameters(models.stack_of("policy").peft, str(policy_binding.adapter)).items()
    }
    if "value" not in models.bindings:
        return [ParameterGroup("policy", policy)]
    value_binding = models.bindings["value"]
    head = {f"value.head.{n}": p for n, p in models.head_of("value").named_parameters()}
    own: dict[str, nn.Parameter] = {}
    if not models.shares_trunk:
        own = {
            f"value.{n}": p
            for n, p in adapter_parameters(models.stack_of("value").peft, str(value_binding.adapter)).items()
        }
    return [ParameterGroup("policy", policy), ParameterGroup("value", own | head)]


def _assemble(parts: list[tuple[Tensor, list[Tensor]]], rows: int, width: int) -> Evaluation:
    """Put each microbatch's rows where they belong. Every row must come exactly once."""
    seen = torch.zeros(rows, dtype=torch.int64)
    has_value = len(parts[0][1]) == 4
    wide = [torch.zeros(rows, width) for _ in range(3 if has_value else 2)]
    after = torch.zeros(rows)
    for index, found in parts:
        seen[index] += 1
        for target, value in zip(wide, found[:3]):
            target[index, : value.shape[1]] = value
        if has_value:
            after[index] = found[3]
    if not bool((seen == 1).all()):
        raise InvariantError.at(
            "evaluation", "a row was evaluated twice or not at all", "every row once", str(seen.tolist())
        )
    return Evaluation(wide[0], wide[1], wide[2] if has_value else None, after if has_value else None)
