"""Rows read as one row, without any padding: products of matrices see real tokens alone, and attention each row by itself.

Positions begin again with every row. Attention is what keeps rows apart: torch's sdpa by reading them one after the other,
flash-attn by where they begin (its variable length). Whether a base reads packed rows as it reads each alone is tried when it is
loaded; one that does not gets its rows padded on the right, as one whose layers carry a state does.

What the last layer makes of a prompt enters nothing but that prompt's own states, which nobody reads: there keys and values are
needed of all tokens, everything behind them of those that are read alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.batches import Sequences
from rlhf_ray.maths.masks import position_ids
from rlhf_ray.models.recurrent import is_recurrent

KERNELS = ("sdpa", "flash_attention_2")
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Fields of transformers' configs: rows up to so many tokens are read without a mask."""
BY_POSITION = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
"""Parts of a layer, by their names in most families, that do the same to every token whatever the others are."""
TOLERANCE = {torch.float32: 1e-3}
"""Largest difference of hidden states over the largest of them, in shorter precisions 0.1. Sums in another order differ by 1e-6,
rows that see each other by 0.1 to 1."""
PROBED = (5, 3, 4)
"""Tokens of the rows that are tried: a layer that mixes rows up changes the first tokens of the second one already."""


@dataclass(frozen=True)
class Packing:
    """How a trunk reads packed rows.

    kernel: its attention.   longest: tokens that a row may have.   by_position: parts of its last layer, by their names in the
    trunk, that compute only what is read."""

    kernel: str
    longest: int
    by_position: tuple[str, ...] = ()

    def takes(self, seq: Sequences) -> bool:
        """Whether a pass over these rows is packed."""
        return seq.packed is not None and max(seq.packed.lengths) <= self.longest


def packing_of(trunk: nn.Module, kernel: str, skips: bool = True) -> Packing | None:
    """How `trunk` reads packed rows, tried on three short ones; None if it does not read them as it reads each alone.

    kernel: its attn_implementation.   skips: the last layer may leave out what is not read; not where layers are computed again in
    the backward pass, after the trunk's own forward has ended."""
    body: Any = trunk
    config = body.config.get_text_config()
    if kernel not in KERNELS or is_recurrent(config):
        return None
    windows = [int(size) for name in WINDOWS if (size := getattr(config, name, None))]
    longest = min(windows, default=2**31)
    if kernel == "sdpa":
        _register()
    for names in (_last_layer(trunk), ()) if skips else ((),):
        packing = Packing(kernel, longest, names)
        if _reads_as_alone(body, packing):
            return packing
    return None


def read_packed(
    trunk: nn.Module,
    packing: Packing,
    ids: Tensor,
    positions: Tensor,
    lengths: Sequence[int],
    read_at: Tensor | None = None,
) -> Tensor:
    """[K, D]: the last hidden states of rows' tokens, row after row.

    ids, positions: i64[K].   lengths: tokens of each row.   read_at: i64[S], the states that are read: others need not mean
    anything."""
    body: Any = trunk
    apart: dict[str, Any]
    if packing.kernel == "sdpa":
        # A mask of four dimensions goes through as it is: none is made of the positions, K x K large, that nobody would look at.
        apart = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device), "row_lengths": lengths}
    else:
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(ids.device)
        apart = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths)}
        apart |= {"max_length_k": max(lengths)}
    with _only(trunk, packing.by_position, read_at):
        found = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, **apart)
    states: Tensor = found.last_hidden_state[0]
    return states


def packed_response_states(trunk: nn.Module, packing: Packing, seq: Sequences) -> Tensor:
    """`forward.response_states` of rows that are read packed: [M, R+1, D]. What it says of columns behind a reply means nothing."""
    packed = seq.packed
    assert packed is not None
    ids = seq.tokens.flatten().index_select(0, packed.real_at)
    positions = position_ids(seq.attention_mask).flatten().index_select(0, packed.real_at)
    states = read_packed(trunk, packing, ids, positions, packed.lengths, packed.read_at)
    ends = seq.attention_mask.sum(dim=1).cumsum(0)[:, None]  # one past each row's last token
    first = ends - seq.response_mask.sum(dim=1, keepdim=True) - 1
    columns = torch.arange(seq.response_width + 1, device=ids.device)
    at = torch.minimum(first + columns, ends - 1)
    return states.index_select(0, at.flatten()).unflatten(0, at.shape)


def rows_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` attention; of packed rows, each row's own.

    query, key, value: [N, heads, T, d]; N = 1 and T = sum of row_lengths for packed rows, whose mask is not looked at."""
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward
    if row_lengths is None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
    parts = zip(*(tensor.split(list(row_lengths), dim=2) for tensor in (query, key, value)))
    return torch.cat([attend(module, *part, None, *args, **kwargs)[0] for part in parts], dim=1), None


def _register() -> None:
    """Have transformers' `sdpa` read packed rows. Others are read as before."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", rows_apart)


def _last_layer(trunk: nn.Module) -> tuple[str, ...]:
    """Parts of the last layer that do the same at every position."""
    for name, layers in trunk.named_children():
        if isinstance(layers, nn.ModuleList) and len(layers):
            inside = {n for n, _ in layers[-1].named_modules()}
            return tuple(f"{name}.{len(layers) - 1}.{part}" for part in BY_POSITION if part in inside)
    return ()


@contextmanager
def _only(trunk: nn.Module, names: Sequence[str], read_at: Tensor | None) -> Iterator[None]:
    """Inside the block the modules called `names` compute tokens `read_at` of their input [1, K, D] alone; of others they say 0."""
    handles: list[Any] = []
    for module in (trunk.get_submodule(name) for name in names if read_at is not None):
        part = _Part(read_at)  # type: ignore[arg-type]
        handles += [module.register_forward_pre_hook(part.select), module.register_forward_hook(part.put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Part:
    """The hooks of one module."""

    def __init__(self, read_at: Tensor) -> None:
        self.read_at, self.tokens = read_at, 0

    def select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.tokens = args[0].shape[1]
        return args[0].index_select(1, self.read_at), *args[1:]

    def put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(1, self.tokens, output.shape[-1])
        return whole.index_copy(1, self.read_at, output)


@torch.no_grad()
def _reads_as_alone(trunk: nn.Module, packing: Packing) -> bool:
    """Whether the trunk reads short rows packed as it reads each alone. On the meta device: whether it can be asked to."""
    body: Any = trunk
    device = next(body.parameters()).device
    lengths = [min(tokens, packing.longest) for tokens in PROBED]
    ids = (torch.arange(sum(lengths)) % int(body.config.get_text_config().vocab_size)).to(device)
    positions = torch.cat([torch.arange(tokens) for tokens in lengths]).to(device)
    ends = torch.tensor(lengths).cumsum(0).to(device)
    read_at = torch.stack([ends - 2, ends - 1], 1).flatten() if packing.by_position else None
    try:
        packed = read_packed(trunk, packing, ids, positions, lengths, read_at)
        alone = [body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids.split(lengths)]
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ):  # whatever it does with what it was not made for
        return False
    if device.type == "meta":
        return True
    each = torch.cat(alone)
    if read_at is not None:
        packed, each = packed[read_at], each[read_at]
    off = float((packed - each).abs().max()) / max(float(each.abs().max()), 1e-9)
    return off <= TOLERANCE.get(packed.dtype, 0.1)
