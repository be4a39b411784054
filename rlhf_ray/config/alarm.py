"""When PPO says that it maximises its reward and nothing else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections import Float, Section, Share, field

AtLeastOne = Annotated[Float, Field(gt=1)]


class AlarmConfig(Section):
    """Signs of over-optimisation (Gao et al. 2022, arXiv:2210.10760). What is measured in training counts once it has been out of
    its band in two steps in a row; the bands start from the first step."""

    action: Literal["warn", "stop", "none"] = field(
        "warn", "warn: say so, once for each sign; stop: save, and end the run with exit 75; none: look for none"
    )
    watch_errors: Annotated[Float, Field(gt=0)] | None = field(
        2.0,
        "with watch: the held-out reward that is maximised is above where it was at watch's best evaluation, and watch is this many"
        " standard errors of their difference below that best; null: not looked at",
    )
    length_factor: AtLeastOne | None = field(
        2.0, "replies are this many times longer, or shorter, than in the first step; null: not looked at"
    )
    repetition_rise: Share | None = field(
        0.2, "response/repetition has risen by this much since the first step; null: not looked at"
    )
    entropy_factor: AtLeastOne | None = field(
        5.0, "policy/entropy is this many times lower, or higher, than in the first step; null: not looked at"
    )
