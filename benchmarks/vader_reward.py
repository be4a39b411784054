"""A Python reward with TRL's signature: the VADER compound sentiment of the reply, from -1 to 1 (Hutto and Gilbert 2014)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """One compound score per completion."""
    return [float(_analyser().polarity_scores(text)["compound"]) for text in completions]
