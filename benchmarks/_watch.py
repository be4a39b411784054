"""Steps of a training process by the clock, and its memory: what both sides of a comparison with TRL report. Needs no rlhf_ray."""

from __future__ import annotations

import json
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Watch(TrainerCallback):
    """Notes when each step ends, on the clock and in CPU seconds of the process, and the memory before the first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = resident()
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def told(self, **more: Any) -> str:
        """As JSON: seconds and CPU seconds of each step, peak memory of the process and what it held before."""
        seconds, cpu = ([b - a for a, b in pairwise(times)] for times in (self.times, self.cpu))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "before_bytes": self.before}
        return json.dumps({**told, **more})
