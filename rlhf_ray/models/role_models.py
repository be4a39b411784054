"""One loaded base with its named adapters and scalar heads: the module that DeepSpeed holds and every forward pass goes through.

A role binding says what a role is: the policy, its reference, the value model and each reward are a (stack, adapter, head) each.
With all roles as adapters on one base there is one stack; a merged or full reward model brings a second one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from rlhf_ray.batches import Sequences
from rlhf_ray.models.adapters import use_adapter
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.forward import (
    after_last_token,
    pair_scores,
    response_logprobs,
    response_states,
    response_values,
)
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.packing import packed_response_states
from rlhf_ray.models.zero3 import MaxOverRanks


@dataclass(frozen=True)
class RoleBinding:
    """adapter: None is the base itself, adapters off.  head: name of the scalar head, None for a language-model role."""

    stack: str
    adapter: str | None
    head: str | None = None


class AdapterStack(nn.Module):
    """`backbone` plus a PEFT model around it (None while no adapter is there) and scalar heads by name."""

    def __init__(self, backbone: Backbone, peft_model: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.model: nn.Module = peft_model if peft_model is not None else backbone.model
        self.heads = nn.ModuleDict()

    @property
    def peft(self) -> PeftModel:
        """The model with its adapters. TypeError if it has none."""
        if not isinstance(self.model, PeftModel):
            raise TypeError(f"no adapters on {self.backbone.identity.path}")
        return self.model

    def states(self, seq: Sequences, adapter: str | None) -> Tensor:
        """`response_states` under `adapter`; None is the base itself."""
        with use_adapter(self.model, adapter) if isinstance(self.model, PeftModel) else nullcontext():
            body, packing = trunk(self.backbone.model), self.backbone.packing
            if packing is not None and packing.takes(seq):
                return packed_response_states(body, packing, seq)
            return response_states(body, seq)

    def computed_tokens(self, seq: Sequences) -> int:
        """Of a pass over these rows, padding included."""
        packing = self.backbone.packing
        if packing is not None and packing.takes(seq):
            return sum(seq.packed.lengths)  # type: ignore[union-attr]
        return seq.computed_tokens

    def logprobs(
        self, states: Tensor, seq: Sequences, temperature: float, with_entropy: bool, max_over_ranks: MaxOverRanks
    ) -> tuple[Tensor, Tensor | None]:
        """`response_logprobs` of `states` under the base's language-model head."""
        head = self.backbone.lm_head
        if head is None:
            raise TypeError(f"no language-model head on {self.backbone.identity.path}")
        return response_logprobs(states, head, seq, temperature, with_entropy, max_over_ranks)


class RoleModels(nn.Module):
    """All stacks of a job and its role bindings. Every pass goes through `forward(kind, ...)`, so that ZeRO's hooks see every
    pass."""

    def __init__(self, stacks: dict[str, AdapterStack], bindings: dict[str, RoleBinding]) -> None:
        super().__init__()
        self.stacks = nn.ModuleDict(stacks)
        self.bindings = dict(bindings)
        self.recompute = False
        """Activations are recomputed in the backward pass; transformers does so in training mode only."""
        self.max_over_ranks: MaxOverRanks = int
        """How ranks agree on how often to call the language-model head; under ZeRO-3 they must (zero3.py)."""

    @property
    def shares_trunk(self) -> bool:
        """The value model is a head on the policy's own adapter: one pass gives log-probabilities and values."""
        policy, value = self.bindings.get("policy"), self.bindings.get("value")
        return (
            policy is not None and value is not None and (policy.stack, policy.adapter) == (value.stack, value.adapter)
        )

    def stack_of(self, role: str) -> AdapterStack:
        return self.stacks[self.bindings[role].stack]  # type: ignore[return-value]

    def head_of(self, role: str) -> ScalarHead:
        binding = self.bindings[role]
        if binding.head is None:
            raise KeyError(f"role {role} has no scalar head")
        return self.stack_of(role).heads[binding.head]  # type: ignore[return-value]

    def forward(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """kind: logprobs, values, both, rewards or decode; see the methods of these names."""
        passes: dict[str, Callable[..., Any]] = {
            "logprobs": self.logprobs,
            "values": self.values,
            "both": self.both,
            "rewards": self.rewards,
            "decode": self.decode,
        }
        return passes[kind](*args, **kwargs)

    def logprobs(
        self, role: str, seq: Sequences, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """f32[M, R] log-probabilities of the reply under `role`, and entropies."""
        stack = self.stack_of(role)
        states = stack.states(seq, self.bindings[role].adapter)
        return stack.logprobs(states, seq, temperature, with_entropy, self.max_over_ranks)

    def values(self, seq: Sequences) -> tuple[Tensor, Tensor]:
        """The value model's values f32[M, R] and f32[M] after the last token."""
        binding = self.bindings["value"]
        return response_values(self.stack_of("value").states(seq, binding.adapter), self.head_of("value"), seq)

    def both(
        self, seq: Sequences, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Policy log-probabilities, entropies, values and the value after the end, for one microbatch.

        A value model that shares the policy's adapter costs no second pass. Values are None without a value model."""
        stack, policy = self.stack_of("policy"), self.bindings["policy"]
        states = stack.states(seq, policy.adapter)
        logprobs, entropy = stack.logprobs(states, seq, temperature, with_entropy, self.max_over_ranks)
        if "value" not in self.bindings:
            return logprobs, entropy, None, None
        values, after = response_values(states, self.head_of("value"), seq) if self.shares_trunk else self.values(seq)
        return logprobs, entropy, values, after

    def rewards(self, role: str, seq: Sequences) -> Tensor:
        """f32[M]: the scalar head of `role`, read after the reply's last token; of an encoder what it says of the pair."""
        binding, backbone = self.bindings[role], self.stack_of(role).backbone
        if backbone.is_encoder:
            return pair_scores(backbone.model, seq, backbone.context_length, backbone.marks_second_text)
        every = self.head_of(role)(self.stack_of(role).states(seq, binding.adapter))
        return after_last_token(every, seq)

    def decode(self, **inputs: Any) -> Any:
        """One forward of the policy's language model, as the sampler makes it, under whichever adapter is active."""
        return self.stack_of("policy").model(**inputs)
