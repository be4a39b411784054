"""What a judge has cost a run so far, over all its attempts and processes, and when that is enough."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.config import LLMJudgeConfig
from rlhf_ray.errors import ArtifactError, Interrupted
from rlhf_ray.storage.files import atomic_write_json, read_json

PER = 1_000_000
"""Tokens that a price is for."""


@dataclass
class JudgeUsage:
    """folder: of the run, for this judge: each process that asks writes a file of its own there; None to count in memory alone.

    requests, prompt_tokens, completion_tokens: paid by this process.  cached: answers that were there."""

    where: str
    config: LLMJudgeConfig
    folder: Path | None
    counts: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    _name: str = field(default_factory=lambda: f"{uuid.uuid4().hex[:12]}.json")

    def add(self, answer: dict[str, Any]) -> None:
        """One answer that was paid for. Raises Interrupted if there is a limit and the endpoint does not say what it took."""
        limited = self.config.max_cost is not None or self.config.max_total_tokens is not None
        if limited and answer["prompt_tokens"] is None:
            what = "does not report its usage of tokens, so no limit can be kept"
            raise Interrupted.at(self.where, what, fix="drop max_cost and max_total_tokens")
        self.counts["requests"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            self.counts[name] += answer[name] or 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.folder / self._name, dict(self.counts))

    def total(self) -> Counter[str]:
        """Of all processes and attempts of the run."""
        found = Counter(self.counts)
        for file in sorted(self.folder.glob("*.json")) if self.folder is not None else ():
            try:
                found += Counter(read_json(file)) if file.name != self._name else Counter()
            except ArtifactError:  # removed or damaged: counted as nothing, and a limit is kept a little later
                continue
        return found

    def cost(self, counts: Counter[str] | None = None) -> float | None:
        """Money, of `total` by default; None without prices."""
        if self.config.input_price is None or self.config.output_price is None:
            return None
        found = self.total() if counts is None else counts
        prompts, verdicts = found["prompt_tokens"], found["completion_tokens"]
        return (prompts * self.config.input_price + verdicts * self.config.output_price) / PER

    def require_left(self) -> None:
        """Before a request. Raises Interrupted if a limit is reached."""
        config = self.config
        if config.max_cost is None and config.max_total_tokens is None:
            return
        found = self.total()
        tokens, cost = found["prompt_tokens"] + found["completion_tokens"], self.cost(found)
        if config.max_cost is not None and cost is not None and cost >= config.max_cost:
            self._stop("max_cost", f"{config.max_cost:g}", f"{cost:.4g} after {found['requests']:,} requests")
        if config.max_total_tokens is not None and tokens >= config.max_total_tokens:
            self._stop(
                "max_total_tokens", f"{config.max_total_tokens:,}", f"{tokens:,} after {found['requests']:,} requests"
            )

    def _stop(self, name: str, limit: str, got: str) -> None:
        fix = f"raise {name} and start it again: what was answered is kept"
        raise Interrupted.at(self.where, f"{name} is reached", f"below {limit}", got, fix)

    def line(self) -> str:
        """For the console."""
        found, cost = self.total(), self.cost()
        parts = [f"{found['requests']:,} requests", f"{found['prompt_tokens'] + found['completion_tokens']:,} tokens"]
        parts += [f"{self.cached:,} answers from the cache"] if self.cached else []
        return ", ".join(parts) + (f", cost {cost:.4g}" if cost is not None else "")
