"""Prompts that a PPO job has in common with the pairs its reward models were trained on.

Training prompts may be shared. A held-out prompt that a reward model was trained on is another matter: its reward there is
remembered, and the evaluation looks better than it is (F29).
"""

from __future__ import annotations

from rlhf_ray.config import DataConfig, PPOConfig
from rlhf_ray.data.load import StageRows, load_rows
from rlhf_ray.data.splits import overlap
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.artifact import is_run, open_run


def reward_overlap(config: PPOConfig, rows: StageRows) -> tuple[list[str], list[str]]:
    """(header lines, warnings), one line per reward run whose training rows can still be read."""
    lines: list[str] = []
    warnings: list[str] = []
    for reward in config.rewards:
        if reward.run is None or not is_run(reward.run):
            continue
        try:
            job = open_run(reward.run, verify=False).config()
            trained = load_rows(DataConfig(**job["data"]), "preference", "reward").train
        except (RlhfRayError, OSError, ValueError, KeyError):
            lines.append(f"{reward.name}: its training pairs are not there any more: overlap unknown")
            continue
        shared, leaked = overlap(rows.train, trained), overlap(rows.held_out, trained)
        lines.append(
            f"{shared.count:,} of {shared.total:,} training prompts are also in the training pairs of {reward.name}"
        )
        if leaked.count:
            warnings.append(
                f"{leaked.count:,} of {leaked.total:,} held-out prompts are in the training pairs of {reward.name}: eval/reward"
                " will look too good; use the same data.held_out_fraction in both stages"
            )
    return lines, warnings
