"""What an adapter must pass before it gets a name that others are served by. A gate without a measurement is not passed.

- integrity: hashes, the gate of models/adapter_files.py, some lora_B not zero, base, tokenizer and template on record. Whoever
  fails it never becomes a `Candidate`; nothing overrides it.
- Policies are judged on the held-out prompts that chose nothing (eval/confirm/*) where their run set some apart, as sweeps do: what
  was picked for its score on other prompts was picked for its luck there, too.
- kl (policy): held-out KL (k1) to the reference, at most --max-kl, else the sweep's kl_cap, else MAX_KL.
- reward (policy): held-out reward above that before training by more than CLEAR standard errors of the difference; or --min-reward.
- A DPO run is judged by kl and reward as well where a sweep's evaluation of it measured them.
- loss (sft, dpo), accuracy (dpo, reward): held-out loss below that before training; 95% interval of the accuracy above one half.
- base: that of the version that is live under the name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.maths.standard_errors import error_of_difference
from rlhf_ray.metrics import confirm_name, figure, held_out_reward, standard_error_name
from rlhf_ray.registry.candidate import Candidate
from rlhf_ray.sweep.results import K1

MAX_KL = 10.0
"""Nats per reply, well above the 1 to 5 at which the measured runs in README stand."""
CLEAR = 2.0
"""Standard errors of the difference by which a candidate must be above its start: one comparison, named beforehand."""
OVERRIDE = '--force --reason "..."'
NOT_SAMPLED = {
    "sft": "an SFT adapter is itself the reference",
    "dpo": "DPO samples no replies: rlhf-ray evaluate measures KL and reward, and a sweep's section evaluate",
    "reward": "a reward model samples nothing",
}
Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Gate:
    """One verdict. measured, limit: as text.  value: the figure behind `measured`.  fix: what mends a failure, beside force."""

    name: str
    status: Status
    measured: str
    limit: str = ""
    value: float | None = None
    fix: str = ""

    def __str__(self) -> str:
        line = f"gate {self.name:<9} {self.status}: {self.measured}"
        return f"{line}; {self.limit}" if self.limit else line

    def to_json(self) -> dict[str, Any]:
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        return {
            "gate": self.name,
            "status": self.status,
            "measured": self.measured,
            "limit": self.limit,
            "value": value,
        }


def verdict(name: str, passed: bool, measured: str, limit: str, value: float | None = None, fix: str = "") -> Gate:
    return Gate(name, "passed" if passed else "failed", measured, limit, value, fix)


def gates_of(candidate: Candidate, max_kl: float | None, min_reward: float | None) -> list[Gate]:
    """The gates that need nothing but the candidate. ConfigError for a limit that means nothing for its kind."""
    kind = candidate.kind
    is_sampled = kind == "policy" or (kind == "dpo" and K1 in candidate.after)
    for option, value in (("--max-kl", max_kl), ("--min-reward", min_reward)):
        if value is not None and not is_sampled:
            raise ConfigError.at(
                option, f"has no meaning for a run of stage {candidate.run.stage}", fix=f"drop {option}"
            )
        if value is not None and math.isnan(value):
            raise ConfigError.at(option, "is not a number")
    if is_sampled:
        others = [kl_gate(candidate, max_kl), reward_gate(candidate, min_reward)]
    else:
        others = [Gate(name, "not applicable", NOT_SAMPLED[kind]) for name in ("kl", "reward")]
    own: dict[str, tuple[Callable[[Candidate], Gate], ...]] = {
        "policy": (),
        "sft": (loss_gate,),
        "dpo": (loss_gate, accuracy_gate),
        "reward": (accuracy_gate,),
    }
    return [integrity(candidate), *others, *(gate(candidate) for gate in own[kind])]


def integrity(candidate: Candidate) -> Gate:
    files, base = candidate.files, candidate.base
    told = f"{len(files.tensors)} tensors, sha256 {files.sha256[:12]}, of base {base['weights_sha256'][:12]}"
    return Gate("integrity", "passed", told, "finite, complete, as the run's manifest records")


def kl_gate(candidate: Candidate, max_kl: float | None) -> Gate:
    """Held-out KL (k1), nats per reply."""
    sweep_cap = (candidate.sweep or {}).get("kl_cap")
    cap, origin = next(
        (float(cap), origin)
        for cap, origin in ((max_kl, "--max-kl"), (sweep_cap, "kl_cap of the sweep"), (MAX_KL, "default"))
        if cap is not None
    )
    limit, fix = f"at most {cap:g} ({origin})", "another step or trial, a higher --max-kl"
    name = _apart(K1, candidate)
    value, told = candidate.after.get(name), " on prompts that chose nothing" if name != K1 else ""
    if value is None:
        return verdict("kl", False, _unmeasured(candidate), limit, None, fix)
    return verdict("kl", value <= cap, f"{figure(value)} nats per reply{told}", limit, value, fix)


def _apart(name: str, candidate: Candidate) -> str:
    """The metric `name` on the held-out prompts that chose nothing, where there are any; else on all of them."""
    confirmed = confirm_name(name)
    return confirmed if confirmed in candidate.after else name


def reward_gate(candidate: Candidate, min_reward: float | None) -> Gate:
    """Held-out reward, by the sweep's metric, the reward that watches, or eval/reward. The two standard errors are taken as
    independent, which is cautious: the prompts are the same."""
    chosen_by = str((candidate.sweep or {}).get("metric", held_out_reward(candidate.config.get("watch"))))
    metric = _apart(chosen_by, candidate)
    after, before, error = candidate.after.get(metric), candidate.before.get(metric), standard_error_name(metric)
    fix = "another step or trial, --min-reward"
    if min_reward is not None:
        limit = f"at least {min_reward:g} (--min-reward)"
        if after is None:
            return verdict("reward", False, _unmeasured(candidate), limit, None, fix)
        return verdict("reward", after >= min_reward, f"{metric} {figure(after)}", limit, after, fix)
    limit = f"more than {CLEAR:g} standard errors above its start"
    if after is None or before is None:
        told = _unmeasured(candidate) if after is None else f"{metric} {figure(after)}, not measured before training"
        return verdict("reward", False, told, limit, after, fix)
    spread = error_of_difference(candidate.after.get(error, math.nan), candidate.before.get(error, math.nan))
    gain = after - before
    told = f"{metric} {figure(before)} -> {figure(after)}, gain {figure(gain)}"
    if candidate.sweep is not None and metric == chosen_by:
        told += " on the prompts that chose it"
    if math.isnan(spread):
        return verdict("reward", False, f"{told}, of too few prompts for a standard error", limit, after, fix)
    told += f" = {gain / spread:.3g} standard errors" if spread > 0 else " without spread"
    return verdict("reward", gain > CLEAR * spread, told, limit, after, fix)


def loss_gate(candidate: Candidate) -> Gate:
    after, before = candidate.after.get("eval/loss"), candidate.before.get("eval/loss")
    if after is None or before is None:
        told = (
            _unmeasured(candidate) if after is None else f"held-out loss {figure(after)}, not measured before training"
        )
        return verdict("loss", False, told, "below its start")
    item = "pair" if candidate.kind == "dpo" else "token"
    told = f"held-out loss {figure(before)} -> {figure(after)} nats per {item}"
    return verdict("loss", after < before, told, "below its start", after, "another step")


def accuracy_gate(candidate: Candidate) -> Gate:
    value, low = candidate.after.get("eval/accuracy"), candidate.after.get("eval/accuracy_low")
    if value is None or low is None:
        return verdict("accuracy", False, _unmeasured(candidate), "95% interval above 50%")
    told = f"{value:.1%} of held-out pairs, 95% interval from {low:.1%}"
    return verdict("accuracy", low > 0.5, told, "95% interval above 50%", value, "another step, more pairs")


def base_gate(candidate: Candidate, live: Mapping[str, Any] | None) -> Gate:
    """Clients of a name, and the replicas that serve it, expect its base to stay.   live: what the alias records of it."""
    ours, told = candidate.base, f"{candidate.base['path']} ({candidate.base['weights_sha256'][:12]})"
    if live is None:
        return Gate("base", "passed", told, "first version of this name")
    theirs = live["base"]
    same = all(ours.get(kind) == theirs.get(kind) for kind in ("weights_sha256", "config_sha256"))
    limit = f"that of {live['id']}"
    if not same:
        limit += f", {theirs.get('path')} ({str(theirs.get('weights_sha256'))[:12]})"
    return verdict("base", same, told, limit, None, "another --alias")


def check_gates(gates: Iterable[Gate], force: bool) -> tuple[str, ...]:
    """Names of the gates that failed and are overridden. ConfigError with all that failed, unless `force`."""
    failed = [gate for gate in gates if gate.status == "failed"]
    if not force:
        ConfigError.raise_all(
            Problem(
                f"gate {gate.name}",
                "failed",
                gate.limit,
                gate.measured,
                f"{gate.fix + ', or ' if gate.fix else ''}{OVERRIDE}",
            )
            for gate in failed
        )
    return tuple(gate.name for gate in failed)


def _unmeasured(candidate: Candidate) -> str:
    steps: Mapping[int, None] = dict.fromkeys(candidate.measured)
    told = f"held-out prompts were tried at steps {', '.join(map(str, steps))}" if steps else "nothing was held out"
    return f"not measured at step {candidate.step}: {told}"
