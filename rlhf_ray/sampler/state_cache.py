"""States of recurrent layers beside the keys and values: one slot per row, as in kv_cache.py, and which caches a model needs.

A state has no columns, so it costs the same however long its row is, and there is nothing to mask: a row's state must be that
of its own tokens alone. Its prompt is read without padding, its slot starts from zeros if it has read none, and rows move with
their states.

What a state is and how a token changes it stays with transformers (`LinearAttentionLayer`): in a step its states are views of the
first rows of the buffers here, and what the model leaves in them is kept.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.recurrent import ATTENTION, BOTH, NEITHER, STATE, is_recurrent, layer_types
from rlhf_ray.sampler.kv_cache import Geometry, SlotCache, SlotLayer

_KINDS = ("conv_states", "recurrent_states")


class SlotStates(LinearAttentionLayer):
    """States of one layer, a buffer [slots, ...] each."""

    def __init__(self, geometry: Geometry, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._geometry = geometry
        self._states: dict[tuple[str, int], Tensor] = {}

    def begin_step(self) -> None:
        for (kind, i), buffer in self._states.items():
            getattr(self, kind)[i] = buffer[: self._geometry.rows]

    def end_step(self) -> None:
        """Keep what the model has put in place of the views: at its very first token there were none."""
        for key, left in _held(self).items():
            buffer = self._state(key, left)
            if left.data_ptr() != buffer.data_ptr():
                buffer[: len(left)] = left

    def _state(self, key: tuple[str, int], like: Tensor) -> Tensor:
        if key not in self._states:
            self._states[key] = like.new_zeros(self._geometry.slots, *like.shape[1:])
            kind, i = key
            getattr(self, f"is_{kind}_initialized")[i] = True
            if kind == "conv_states":
                self.conv_kernel_size[i] = like.shape[-1]
        return self._states[key]

    def relocate(self, rows: int, source: slice, target: slice) -> None:
        for key, old in self._states.items():
            if old.shape[0] != self._geometry.slots:
                self._states[key] = old.new_zeros(self._geometry.slots, *old.shape[1:])
                self._states[key][:rows] = old[:rows]

    def copy(self, source: int, target: int, tokens: int) -> None:
        for buffer in self._states.values():
            buffer[target] = buffer[source]

    def insert(self, slot: int, prefilled: Any, row: int, tokens: int) -> None:
        for key, states in _held(prefilled).items():
            self._state(key, states)[slot] = states[row]
        self.has_previous_state.update(prefilled.has_previous_state)

    def start(self, slot: int) -> None:
        for buffer in self._states.values():
            buffer[slot] = 0

    clear = start


class SlotBlock(SlotStates):
    """States that a block of RG-LRU (recurrent Gemma) keeps on itself: lent to it for a step, and taken back."""

    def __init__(self, block: Any, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._block = block

    def begin_step(self) -> None:
        super().begin_step()
        _lend(self._block, self.conv_states[0], self.recurrent_states[0])

    def end_step(self) -> None:
        _take_back(self._block, self)
        super().end_step()


def _lend(block: Any, conv: Tensor | None, recurrent: Tensor | None) -> None:
    block.conv1d_state, block.rg_lru.recurrent_states = conv, recurrent


def _take_back(block: Any, layer: LinearAttentionLayer) -> None:
    layer.conv_states[0], layer.recurrent_states[0] = block.conv1d_state, block.rg_lru.recurrent_states
    _lend(block, None, None)


class SlotHybrid(SlotStates, SlotLayer):  # type: ignore[override]  # as transformers' own layers of both kinds
    """Attention and a recurrence side by side in one layer."""

    def __init__(self, geometry: Geometry, number_of_states: int = 1) -> None:
        SlotLayer.__init__(self, geometry)
        SlotStates.__init__(self, geometry, number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:  # type: ignore[override]
        if keys_and_values:
            SlotLayer.lazy_initialization(self, *keys_and_values)
        else:
            SlotStates.lazy_initialization(self, **states)

    def relocate(self, rows: int, source: slice, target: slice) -> None:
        SlotStates.relocate(self, rows, source, target)
        SlotLayer.relocate(self, rows, source, target)

    def copy(self, source: int, target: int, tokens: int) -> None:
        SlotStates.copy(self, source, target, tokens)
        SlotLayer.copy(self, source, target, tokens)

    def insert(self, slot: int, prefilled: Any, row: int, tokens: int) -> None:
        SlotStates.insert(self, slot, prefilled, row, tokens)
        SlotLayer.insert(self, slot, prefilled, row, tokens)

    def clear(self, slot: int) -> None:
        SlotStates.clear(self, slot)
        SlotLayer.clear(self, slot)


class SlotNothing(DummyLayer):
    """A layer that keeps nothing."""

    def __init__(self, geometry: Geometry, **kwargs: Any) -> None:
        super().__init__()

    def begin_step(self) -> None: ...
    def end_step(self) -> None: ...
    def relocate(self, rows: int, source: slice, target: slice) -> None: ...
    def copy(self, source: int, target: int, tokens: int) -> None: ...
    def insert(self, slot: int, prefilled: Any, row: int, tokens: int) -> None: ...
    def start(self, slot: int) -> None: ...
    def clear(self, slot: int) -> None: ...


class Caches:
    """Makes the caches of one model. base: a transformers causal language model, without PEFT around it.

    recurrent: it has layers with a state.   attends: it has layers with keys and values.
    Raises ConfigError for a model that keeps something else, or keeps it elsewhere."""

    def __init__(self, base: Any) -> None:
        self._types = layer_types(base.config)
        self.recurrent = is_recurrent(base.config)
        self.attends = not self._types or bool(set(self._types) & (ATTENTION | BOTH))
        if getattr(base, "_is_stateful", False) and not self.recurrent:
            raise elsewhere(base.config.model_type)
        text = base.config.get_text_config()
        self._counts = _numbers_of_states(text) if self.recurrent else []
        self._model_type = base.config.model_type
        self._own = _own_class(base)
        blocks = [module for module in base.modules() if hasattr(module, "rg_lru")]
        places = [i for i, kind in enumerate(self._types) if kind in STATE]
        self._blocks = dict(zip(places, blocks)) if blocks else {}  # by layer

    def slots(self, max_slots: int, max_tokens: int, **how: Any) -> SlotCache:
        """how: further arguments of `SlotCache`."""
        if not self.recurrent:
            return SlotCache(max_slots, max_tokens, **how)
        kinds: dict[str, Any] = {
            "state": SlotStates,
            "both": SlotHybrid,
            "neither": SlotNothing,
            "attention": SlotLayer,
        }

        def layers(geometry: Geometry) -> list[Any]:
            made = (kinds[kind](geometry, number_of_states=n) for kind, n in self._layers())
            return [SlotBlock(self._blocks[i], geometry) if i in self._blocks else m for i, m in enumerate(made)]

        cache = self._made_as(SlotCache)
        SlotCache.__init__(cache, max_slots, max_tokens, layers, **how)
        return cache

    def prompts(self) -> Cache:
        """Every column of every layer, also where a window slides."""
        if not self.recurrent:
            return DynamicCache()
        kinds: dict[str, Any] = {
            "state": LinearAttentionLayer,
            "both": LinearAttentionAndFullAttentionLayer,
            "neither": DummyLayer,
            "attention": DynamicLayer,
        }
        for block in self._blocks.values():
            _lend(block, None, None)
        cache = self._made_as(_PromptCache)
        _PromptCache.__init__(cache, layers=[kinds[k](number_of_states=n) for k, n in self._layers()])
        return cache

    def finish_read(self, cache: Cache) -> None:
        """Of a cache of `prompts`. ConfigError if the model has read a prompt and left no state: it keeps it in its own modules."""
        for i, block in self._blocks.items():
            _take_back(block, cache.layers[i])  # type: ignore[arg-type]
        for layer in cache.layers if self.recurrent else ():
            if isinstance(layer, LinearAttentionLayer) and not _held(layer):
                raise elsewhere(self._model_type)

    def _layers(self) -> list[tuple[str, int]]:
        named = (("state", STATE), ("both", BOTH), ("neither", NEITHER), ("attention", ATTENTION))
        return [(next(k for k, of in named if kind in of), n) for kind, n in zip(self._types, self._counts)]

    def _made_as(self, cls: type[Cache]) -> Any:
        """An empty instance of `cls`, also of the model's own class of cache, where it insists on one."""
        if self._own is None:
            return cls.__new__(cls)
        made: Any = type(cls.__name__, (_LinearCache, cls, self._own), {})
        cache = made.__new__(made)
        cache.linear_cache = []
        return cache


class _PromptCache(Cache):
    """Of one prompt read from its beginning, so it holds nothing before, also where no layer has keys to count."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class _LinearCache:
    """MiniMax's names of a layer's one state."""

    layers: list[Any]

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.layers[layer_idx].recurrent_states[0]  # type: ignore[no-any-return]

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(state)


def elsewhere(model_type: str) -> ConfigError:
    return ConfigError.at(
        f"model type {model_type}",
        "cannot be decoded here: its state is kept inside its own modules",
        "states in a cache of transformers, where each row has its own",
    )


def _held(layer: LinearAttentionLayer) -> dict[tuple[str, int], Tensor]:
    """The states that a layer has, by kind and number."""
    all_of = ((kind, i, state) for kind in _KINDS for i, state in getattr(layer, kind).items())
    return {(kind, i): state for kind, i, state in all_of if state is not None}


def _numbers_of_states(text_config: Any) -> list[int]:
    return [kwargs.get("number_of_states", 1) for kwargs in get_layer_types_and_kwargs(text_config)[1]]


def _own_class(base: nn.Module) -> type[Cache] | None:
    """The class of cache that a model's file defines for itself."""
    module = sys.modules[type(base).__module__]
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Cache)]
    return next((c for c in own if c.__module__ == module.__name__), None)
