"""What the service counts, for Prometheus: Ray exports these as `ray_rlhf_ray_<name>`, with deployment and replica as tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.ray_metrics import metric_tag

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

COUNTERS = {
    "replies": ("replies that were finished", ("adapter", "end")),
    "prompt_tokens": ("prompt tokens read", ("adapter",)),
    "completion_tokens": ("reply tokens written", ("adapter",)),
    "refused": ("requests answered 429", ()),
    "adapter_lookups": (
        "adapters that requests asked for, by where they were found: device, host or disk; device / all is the hit rate",
        ("found",),
    ),
    "adapter_loads": ("adapters that came onto the device", ()),
    "adapter_evictions": ("adapters that made room for others", ()),
    "adapters_refused": ("versions that were not fit to be served", ("adapter",)),
    "preferences": ("preferences stored", ()),
}
GAUGES = {
    "rows_running": ("replies being written or waiting, in this replica", ()),
    "rows_waiting": ("replies that wait for a place, in this replica, by version of an adapter", ("adapter",)),
    "adapter_bytes": ("weights of adapters, in this replica, by where they are: device or host", ("where",)),
    "longest_step_seconds": ("longest time between two decoding steps since the last report, in this replica", ()),
    "adapters_loaded": ("adapters in memory, in this replica", ()),
    "decode_steps": ("forward passes of the decoder since the replica started", ()),
    "live_version": ("version that is served under a name, in this replica", ("adapter",)),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("from a request's arrival at a replica to its first token", ("adapter",)),
    "reply_seconds": ("from a request's arrival at a replica to the end of a reply", ("adapter",)),
}


def _ascii(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: metric_tag(value) for name, value in tags.items()}


class Metrics:
    """`count`, `set` and `observe` by the names above; an unknown one is a KeyError."""

    def __init__(self) -> None:
        from ray.util import metrics

        def made(kind: Any, table: Mapping[str, tuple[str, tuple[str, ...]]], **options: Any) -> dict[str, Any]:
            return {n: kind(f"rlhf_ray_{n}", text, tag_keys=tags, **options) for n, (text, tags) in table.items()}

        self._counters = made(metrics.Counter, COUNTERS)
        self._gauges = made(metrics.Gauge, GAUGES)
        self._histograms = made(metrics.Histogram, HISTOGRAMS, boundaries=list(SECONDS))

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        if value > 0:
            self._counters[name].inc(value, tags=_ascii(tags))

    def set(self, name: str, value: float, **tags: str) -> None:
        self._gauges[name].set(value, tags=_ascii(tags))

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._histograms[name].observe(value, tags=_ascii(tags))


class NoMetrics(Metrics):
    """Where there is no Ray."""

    def __init__(self) -> None:
        pass

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        pass

    def set(self, name: str, value: float, **tags: str) -> None:
        pass

    def observe(self, name: str, value: float, **tags: str) -> None:
        pass
