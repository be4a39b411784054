"""What a DPO trial is measured by: an evaluation of its adapter beside the policy that it started from, in a folder of its run.

DPO samples no replies, so its own figures say neither reward nor KL. The evaluation's prompts are cut in two by their hashes, the
same for all trials: one half chooses (eval/*), the other one confirms (eval/confirm/*), as PPO's held-out prompts do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config.sections import SamplingConfig
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.splits import confirms, prompt_hash
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.metrics import confirm_name, read_metrics, standard_error_name
from rlhf_ray.storage.run_folder import RunFolder, is_run, open_run

EVALUATION = "evaluation"
"""Folder in the trial's run."""
STARTED_FROM, TRAINED = "reference", "policy"
"""The two policies of the evaluation."""
Figures = dict[str, float]


def evaluated(folder: Path, verify: bool = False) -> tuple[Figures, Figures] | None:
    """What the evaluation in a trial's run says of the policy that it started from, and of the trained one, under the names that
    held-out figures of PPO have; None if there is none, or it has not come to its end.   verify: whether its files are
    those that it was sealed with; ArtifactError if not."""
    place = folder / EVALUATION
    if not is_run(place) or (run := open_run(place, verify=verify)).manifest()["status"] != "done":
        return None
    has_kl = _estimates_kl(run)
    rows = read_metrics(place / "results.jsonl")
    apart = [confirms(_hash(row)) for row in rows]
    if all(apart) or not any(apart):  # too few prompts: all of them choose
        apart = [False] * len(rows)
    choosing = [row for row, confirming in zip(rows, apart) if not confirming]
    confirming = [row for row, is_apart in zip(rows, apart) if is_apart]
    found = []
    for policy in (STARTED_FROM, TRAINED):
        figures = _figures([row["replies"][policy] for row in choosing], has_kl)
        confirmed = _figures([row["replies"][policy] for row in confirming], has_kl)
        found.append(figures | {confirm_name(name): value for name, value in confirmed.items()})
    return found[0], found[1]


def _estimates_kl(run: RunFolder) -> bool:
    """Whether its replies were drawn from the whole distribution; older versions wrote a `kl` into its rows all the same."""
    how = (run.manifest().get("decoding") or {}).get(TRAINED) or run.config().get("sampling") or {}
    return SamplingConfig(**{name: how[name] for name in SamplingConfig.model_fields if name in how}).estimates_kl


def _hash(row: Mapping[str, Any]) -> int:
    """Of what was asked, not of the text that the models read: a template or date that varies must not move the halves."""
    if "hash" in row:
        return int(row["hash"], 16)
    return prompt_hash(Prompt(row["instruction"], row["input"]))  # an evaluation of an older version


def _figures(replies: Sequence[Mapping[str, Any]], has_kl: bool) -> Figures:
    """Means over replies, with the standard error of rewards. What no reply has is left out; so is KL unless `has_kl`."""
    if not replies:
        return {}
    columns = {
        "eval/reward": [reply.get("reward") for reply in replies],
        **{f"eval/reward/{name}": [reply["rewards"][name] for reply in replies] for name in replies[0]["rewards"]},
        "eval/kl_k1_per_response": [reply["kl"] for reply in replies if has_kl],
    }
    found: Figures = {"eval/rows": float(len(replies))}
    for name in ("length", "finished"):
        found[f"eval/{name}"] = sum(reply[name] for reply in replies) / len(replies)
    for name, values in columns.items():
        known = [float(value) for value in values if value is not None]
        if known:
            found |= {name: math.fsum(known) / len(known), standard_error_name(name): standard_error(known)}
    return {name: value for name, value in found.items() if math.isfinite(value)}
