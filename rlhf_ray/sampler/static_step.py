"""Decode steps over buffers of few shapes that stay where they are, so that a GPU can replay each as one CUDA graph.

A step of a large model is some two thousand kernels, each shorter than the time that its launch takes. A graph is launched once,
but over the very addresses and shapes that it was captured with. So here rows are padded to a multiple of ROWS, columns to one of
the cache's `multiple`; the slice that is attended to begins at column 0 of the buffers; and where a token is written is a tensor: a
shape lasts for as many steps as columns were padded. Which rows and columns are real, the mask says.

On a CPU the same steps run without a graph, which is how they are tested; no graph has been captured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.sampler.kv_cache import SlotCache

ROWS = 8
"""Rows are padded to a multiple of this."""
GRAPHS = 32
"""Shapes that are kept; the oldest goes."""

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The model: (ids i64[R, 1], mask bool[R, W], positions i64[R, 1]) -> [R, V]."""


def slides(config: Any) -> bool:
    """Whether some layer attends to a window alone, which columns behind the current one would move.   config: of a text model."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(kinds - {"full_attention"}) or (not kinds and bool(window))


class StaticSteps:
    """made: shapes so far.   Not thread-safe; weights and buffers must stay where they are until `forget`."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id
        self._shapes: dict[Any, _Shape] = {}
        self._pool: Any = None  # memory of all graphs, which run one after the other
        self.made = 0

    def forget(self) -> None:
        """Weights may be elsewhere from now on."""
        self._shapes.clear()
        self._pool = None

    def step(
        self, cache: SlotCache, tokens: Tensor, positions: Tensor, longest: int, logits: Logits, key: Any
    ) -> Tensor:
        """Logits [N, V] of the N rows in the first slots, whose current tokens go into the cache.

        tokens, positions: i64[N].   longest: tokens that the longest row holds.   logits: always the same function for one key."""
        rows = min(-(-len(tokens) // ROWS) * ROWS, cache.max_slots)
        column = cache.begin_static_step(rows, longest)
        found = (key, rows, cache.width, cache.address, id(column))  # the address may have been another cache's
        shape = self._shapes.pop(found, None)
        if shape is None:
            if self._pool is None and column.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            shape = _Shape(rows, cache.width, column, self._pad_id, self._pool)
            self.made += 1
        self._shapes[found] = shape
        if len(self._shapes) > GRAPHS:
            del self._shapes[next(iter(self._shapes))]
        output = shape.run(tokens, positions, logits)
        cache.end_step()
        return output[: len(tokens)]


class _Shape:
    """The inputs of R rows over W columns, and the graph over them."""

    def __init__(self, rows: int, width: int, column: Tensor, pad_id: int, pool: Any) -> None:
        self._pad_id, self._column, self._pool = pad_id, column, pool
        self.tokens = torch.full((rows, 1), pad_id, device=column.device)
        self.positions = torch.zeros_like(self.tokens)
        self._columns = torch.arange(width, device=column.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None

    def run(self, tokens: Tensor, positions: Tensor, logits: Logits) -> Tensor:
        n = len(tokens)
        self.tokens[:n, 0], self.positions[:n, 0] = tokens, positions
        self.tokens[n:], self.positions[n:] = self._pad_id, 0
        if self._column.device.type != "cuda":
            return self._forward(logits)
        if self._graph is None or self._output is None:
            self._capture(logits)
        assert self._graph is not None and self._output is not None
        self._graph.replay()
        return self._output

    def _forward(self, logits: Logits) -> Tensor:
        age = self._column - self._columns  # of each column; the current one's is 0
        return logits(self.tokens, (age >= 0) & (age <= self.positions), self.positions)

    def _capture(self, logits: Logits) -> None:
        """After a run beside it, in which kernels are chosen and libraries take their memory."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._forward(logits)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._pool):
            self._output = self._forward(logits)
