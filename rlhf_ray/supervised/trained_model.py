"""A frozen base with the one adapter that is trained, as the single module that Trainer (and DDP) holds and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlhf_ray.data.collate import IGNORE_INDEX, pad_right
from rlhf_ray.errors import ConfigError
from rlhf_ray.maths.logprobs import chunked_token_logprobs
from rlhf_ray.maths.masks import last_token_index, position_ids
from rlhf_ray.models.adapters import use_adapter
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.forward import LOGITS_AT_ONCE
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.packing import TOLERANCE, read_packed
from rlhf_ray.models.recurrent import hidden_states, turned


class TrainedModel(nn.Module):
    """`backbone` with the PEFT model around it. Only the active adapter, and a head where there is one, has gradients.

    contiguous: rows are read with their padding on the right and without a mask; False for runs begun under defaults_version 1 and
    2, whose sums were made with one."""

    def __init__(self, backbone: Backbone, peft_model: PeftModel, contiguous: bool = True) -> None:
        super().__init__()
        self.backbone, self.peft_model, self.contiguous = backbone, peft_model, contiguous

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [N, T, D]; positions count real tokens, so padding on either side changes nothing."""
        width = input_ids.shape[1] if self.contiguous else None
        return hidden_states(trunk(self.peft_model), input_ids, attention_mask.bool(), length=width)

    def packed(self, input_ids: Tensor, real: Tensor, read: Tensor) -> Tensor:
        """[K, D]: last hidden states of the real tokens, row after row, read as one row (`backbone.packing` must be there).

        input_ids: i64[N, T].   real: bool[N, T].   read: bool[N, T], whose states are read; others need not mean anything."""
        assert self.backbone.packing is not None
        lengths, read_at = real.sum(dim=1).tolist(), read[real].nonzero().flatten()
        ids, positions = input_ids[real], position_ids(real)[real]
        return read_packed(trunk(self.peft_model), self.backbone.packing, ids, positions, lengths, read_at)

    def may_pack(self, real: Tensor) -> bool:
        """Whether the base reads rows as long as these packed.   real: bool[N, T]."""
        packing = self.backbone.packing
        return packing is not None and real.shape[1] <= packing.longest

    def read(self, attention_mask: Tensor, input_ids: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        """`states`, and mask and what lies `beside` the ids (i64[N, T]), all with padding on one side: that which costs nothing."""
        if not self.contiguous:
            return self.states(input_ids, attention_mask), attention_mask, *beside
        begin = attention_mask.long().argmax(dim=1, keepdim=True)
        mask, ids, *others = (turned(values, begin) for values in (attention_mask, input_ids, *beside))
        states = trunk(self.peft_model)(input_ids=ids, use_cache=False).last_hidden_state
        return states, mask, *others

    # What Trainer and accelerate ask a model for: NEFTune its embeddings, Liger the model inside, bitsandbytes how it was loaded.

    def get_base_model(self) -> nn.Module:
        return self.peft_model.get_base_model()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_base_model().get_input_embeddings()  # type: ignore[operator]

    @property
    def is_loaded_in_8bit(self) -> bool:
        return bool(getattr(self.get_base_model(), "is_loaded_in_8bit", False))

    @property
    def is_loaded_in_4bit(self) -> bool:
        return bool(getattr(self.get_base_model(), "is_loaded_in_4bit", False))

    @property
    def hf_device_map(self) -> Any:
        """AttributeError where the base has none, which is how its users ask."""
        return self.get_base_model().hf_device_map


class LanguageModel(TrainedModel):
    """SFT: the loss of a batch.   packing: see `packed_states`."""

    def __init__(
        self, backbone: Backbone, peft_model: PeftModel, contiguous: bool = True, packing: bool = False
    ) -> None:
        super().__init__(backbone, peft_model, contiguous)
        self.packing = packing

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        """sum_t -log p(labels_t | tokens before t), over labels that are not IGNORE_INDEX.   All i64[N, T], labels not shifted.

        label_smoothing e: (1 - e) x that + e x the mean of -log p over the vocabulary (arXiv:1512.00567)."""
        real = attention_mask.bool()
        if self.packing and self.may_pack(real):
            targets = _next(labels)
            states, targets = self.packed(input_ids, real, targets != IGNORE_INDEX), targets[real]
        elif self.packing:
            states, targets = packed_states(trunk(self.peft_model), input_ids, real), _next(labels)[real]
        else:
            states, _, labels = self.read(attention_mask, input_ids, labels)
            states, targets = states[:, :-1], labels[:, 1:]
        wanted = targets != IGNORE_INDEX
        return token_loss_sum(states[wanted], self._lm_head(), targets[wanted], label_smoothing)

    def next_token_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """f32[N, V], after each row's last real token."""
        states = self.states(input_ids, attention_mask)
        return self._lm_head()(at_last_token(states, attention_mask)).float()

    def _lm_head(self) -> nn.Module:
        if self.backbone.lm_head is None:
            raise TypeError("the base is not a causal language model")
        return self.backbone.lm_head


class PreferenceModel(LanguageModel):
    """DPO: how likely replies are, under the adapter that is trained or the one that it is compared with."""

    def __init__(self, backbone: Backbone, peft_model: PeftModel, reference: str | None) -> None:
        """reference: the name of the frozen adapter; None: the base itself, adapters off."""
        super().__init__(backbone, peft_model)
        self.reference = reference

    def forward(self, input_ids: Tensor, attention_mask: Tensor, replies: Tensor) -> Tensor:  # type: ignore[override]
        """f32[N]: log p of each row's reply, summed over its tokens, under the active adapter.

        input_ids, attention_mask: i64[N, T], padded on the right.   replies: bool[N, T], True on the tokens of the reply."""
        real = attention_mask.bool()
        if self.may_pack(real):
            before = F.pad(replies[:, 1:], (0, 1))
            states, ids = self.packed(input_ids, real, before)[before[real]], input_ids
        else:
            every, _, ids, replies = self.read(attention_mask, input_ids, input_ids, replies)
            states = every[:, :-1][replies[:, 1:]]
        targets, wanted = ids[:, 1:], replies[:, 1:]
        head = self._lm_head()
        size = max(LOGITS_AT_ONCE // int(getattr(head, "out_features", 0) or 32_000), 1)
        said, _ = chunked_token_logprobs(states, head, targets[wanted], 1.0, size, with_entropy=False)
        return said.new_zeros(targets.shape).masked_scatter(wanted, said).sum(dim=1)

    @torch.no_grad()
    def reference_logprobs(self, input_ids: Tensor, attention_mask: Tensor, replies: Tensor) -> Tensor:
        """The same under the reference, on the same loaded base."""
        with use_adapter(self.peft_model, self.reference):
            return self.forward(input_ids, attention_mask, replies)


class RewardModel(TrainedModel):
    """The scalar head, read after the last real token."""

    def __init__(self, backbone: Backbone, peft_model: PeftModel, head: ScalarHead, contiguous: bool = True) -> None:
        super().__init__(backbone, peft_model, contiguous)
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """f32[N] scores of sequences i64[N, T]. They depend on the real tokens alone, wherever the padding is (F11)."""
        real = attention_mask.bool()
        if self.may_pack(real):
            last = last_token_index(real)[:, None]
            states = self.packed(input_ids, real, torch.zeros_like(real).scatter(1, last, True))
            return self.head(states[real.sum(dim=1).cumsum(0) - 1])
        states, mask = self.read(attention_mask, input_ids)
        return self.head(at_last_token(states, mask))


def packed_states(body: nn.Module, input_ids: Tensor, real: Tensor) -> Tensor:
    """[K, D]: the last hidden states of rows' real tokens, row after row, read by trunk `body` as one row without padding.

    Positions begin again with every row, by which attention keeps rows apart: flash-attn by cutting them up, other kernels by a
    block-diagonal mask. A state would be carried from row to row (`check_packing`).   input_ids: i64[N, T].   real: bool[N, T]."""
    output = body(input_ids=input_ids[real][None], position_ids=position_ids(real)[real][None], use_cache=False)
    states: Tensor = output.last_hidden_state[0]
    return states


@torch.no_grad()
def check_packing(model: TrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """ConfigError if the base does not read these rows packed as it reads each alone: layers with a state, attention that goes by
    columns, kernels that take no mask of pairs.   rows: token ids, a few short rows."""
    body, name = trunk(model.peft_model), model.backbone.model.config.model_type
    device, some = model.backbone.device, [list(row)[:PROBED_TOKENS] for row in rows]
    ids, real = (tensor.to(device) for tensor in pad_right(some, model.backbone.pad_id))
    try:
        packed = packed_states(body, ids, real)
        alone = [
            body(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0] for row in some
        ]
        each = torch.cat(alone).float()
        off = float((packed.float() - each).abs().max() / each.abs().max().clamp_min(1e-9))
        got = "" if off <= TOLERANCE.get(packed.dtype, 0.1) else f"off by {off:.2g} of the largest"
    except (RuntimeError, TypeError, ValueError) as error:  # whatever a model does with what it was not made for
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if got:
        raise ConfigError.at(
            "packing",
            f"models of type {name} do not read packed rows as they read each alone (tried on the first rows)",
            "the same hidden states",
            got,
            "set packing: false",
        )


PROBED_TOKENS = 24
"""Of each row: enough for a mask that is wrong to show."""


def _next(labels: Tensor) -> Tensor:
    """[N, T]: of every column the label of the next one; of the last none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def at_last_token(states: Tensor, attention_mask: Tensor) -> Tensor:
    """[N, D] of [N, T, D]: the state that has seen all real tokens of its row."""
    last = last_token_index(attention_mask.bool())
    return states[torch.arange(len(last), device=last.device), last]


def token_loss_sum(hidden: Tensor, head: nn.Module, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over tokens, in float32, with the logits of LOGITS_AT_ONCE / V positions in memory at any time.

    hidden: [K, D] states that predict targets i64[K].   head: [K, D] -> logits [K, V].   K = 0 gives 0, with a gradient of 0."""

    def one_chunk(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="sum", label_smoothing=label_smoothing)

    vocabulary = int(getattr(head, "out_features", 0) or 32_000)
    size = max(LOGITS_AT_ONCE // vocabulary, 1)
    if len(targets) <= size or not torch.is_grad_enabled():
        return torch.stack([one_chunk(h, y) for h, y in zip(hidden.split(size), targets.split(size))]).sum()
    parts = [checkpoint(one_chunk, h, y, use_reentrant=False) for h, y in zip(hidden.split(size), targets.split(size))]
    return torch.stack(parts).sum()
