"""Checks a practitioner would make on a PPO run, with the numbers they rest on. A check without its metrics is left out.

Thresholds are where trouble usually shows, not laws. Over-optimisation by distance: the best published win rates of LoRA PPO lie
at 0.03 to 0.13 nats of true KL per token and fall beyond about 0.2 (technical report of AlpacaFarm-LoRA, 2023).
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_ray.maths.standard_errors import error_of_difference, standard_error
from rlhf_ray.metrics import START_KL, held_out_reward, standard_error_name, start_kl
from rlhf_ray.report.folder import RunFiles, mean
from rlhf_ray.report.numbers import shown
from rlhf_ray.report.story import Finding

RATIO_LIMIT = 1e-4
KL_PER_TOKEN = 0.2
CLIP_FRACTION = 0.3
FINISHED = 0.5
LENGTH_GROWTH = 1.5
ENTROPY_LEFT = 0.2


def ppo_findings(run: RunFiles) -> list[Finding]:
    """All checks that could be made, concerns first."""
    found = [finding for check in CHECKS if (finding := check(run)) is not None]
    return sorted(found, key=lambda finding: not finding.concern)


def _late(values: list[float]) -> float:
    """Mean of the last quarter: one noisy step should not raise an alarm."""
    return mean(values[-max(len(values) // 4, 1) :])


def _early(values: list[float]) -> float:
    return mean(values[: max(len(values) // 10, 1)])


def _ratio(run: RunFiles) -> Finding | None:
    values = run.values("ratio/first_minibatch_max_deviation")
    if not values:
        return None
    worst = max(values)
    text = f"largest deviation from 1: {shown(worst)}, limit {shown(RATIO_LIMIT)}."
    if worst <= RATIO_LIMIT:
        return Finding(False, "The ratio of the first minibatch is 1", text)
    meaning = " Old and new log-probabilities of the same weights differ, so the updates are biased."
    return Finding(True, "The ratio of the first minibatch is not 1", text + meaning)


def _negative_kl(run: RunFiles) -> Finding | None:
    k1, k3 = run.values("kl/k1_per_response"), run.values("kl/k3_per_response")
    if not k1:
        return None
    late, tolerance = _late(k1), 0.1 * _late(k3) if k3 else 0.0
    if late >= -tolerance:
        return Finding(False, "KL is not negative", f"k1 {shown(late)} nats per reply in the last quarter.")
    meaning = " Replies are not sampled from the policy that is scored: look for a temperature or a mask that differs."
    return Finding(True, "KL is negative", f"k1 {shown(late)} nats per reply in the last quarter." + meaning)


def _distance(run: RunFiles) -> Finding | None:
    kl, length = run.values(start_kl(run.names())), run.values("response/length")
    if not kl or not length:
        return None
    per_token = _late(kl) / max(_late(length), 1.0)
    text = f"{shown(per_token)} nats per token in the last quarter."
    origin = "where it started" if run.values(START_KL) else "its reference"
    if per_token <= KL_PER_TOKEN:
        return Finding(False, f"The policy stays near {origin}", text)
    meaning = f" Beyond about {KL_PER_TOKEN}, replies often get worse while reward still rises: raise kl_coef or stop earlier."
    return Finding(True, f"The policy is far from {origin}", text + meaning)


def _over_optimised(run: RunFiles) -> Finding | None:
    metric = held_out_reward(run.config.get("watch"))
    held_out, errors = run.values(metric), run.values(standard_error_name(metric))
    if len(held_out) < 3:
        return None
    fall = max(held_out) - held_out[-1]
    noise = 2 * error_of_difference(errors[-1], errors[-1]) if errors else 0.0
    text = f"best {shown(max(held_out))}, last {shown(held_out[-1])} ({metric})."
    if fall <= noise:
        return Finding(False, "Held-out reward ends at its best, within noise", text)
    meaning = " It has fallen by more than its noise: use an earlier checkpoint, or set load_best_model_at_end."
    return Finding(True, "Held-out reward is past its best", text + meaning)


def _signs(run: RunFiles) -> Finding | None:
    """What the alarm saw while the run was under way."""
    alarm = run.config.get("alarm")
    if not isinstance(alarm, dict) or alarm.get("action") == "none" or not run.values("reward/mean"):
        return None
    seen = {n.removeprefix("alarm/"): run.points(n)[0][0] for n in run.names() if n.startswith("alarm/")}
    if not seen:
        return Finding(
            False, "No sign of over-optimisation", "length, repetition, entropy and the watch stayed within bounds."
        )
    told = ", ".join(f"{kind} from step {step:.0f}" for kind, step in sorted(seen.items(), key=lambda item: item[1]))
    return Finding(
        True, "The alarm for over-optimisation went off", f"{told}. Use a checkpoint from before, or raise kl_coef."
    )


def _independent(run: RunFiles) -> Finding | None:
    watch = run.config.get("watch")
    if not run.values("eval/reward"):
        return None
    if watch is not None:
        text = f"{watch}. It is as independent of what was maximised as its rule, or the data that it learnt from."
        return Finding(False, "A reward that PPO did not maximise was measured", text)
    return Finding(
        True,
        "Nothing independent was measured",
        "The held-out reward is the very reward that was maximised, on new prompts: it cannot show that replies got better by"
        " another measure. Add a reward of weight 0 and name it in watch.",
    )


def _learned(run: RunFiles) -> Finding | None:
    rewards = run.values("reward/mean")
    if len(rewards) < 8:
        return None
    quarter = len(rewards) // 4
    first, final = rewards[:quarter], rewards[-quarter:]
    noise = 2 * error_of_difference(standard_error(first), standard_error(final))
    text = f"{shown(mean(first))} in the first quarter, {shown(mean(final))} in the last; two standard errors {shown(noise)}."
    if mean(final) - mean(first) > noise:
        return Finding(False, "Training reward rose", text)
    title = "Training reward did not rise" + (" beyond its noise" if mean(final) > mean(first) else "")
    return Finding(True, title, text + " Try a higher learning rate or a lower kl_coef.")


def _flat_reward(run: RunFiles) -> Finding | None:
    flat = [step for step, value in run.points("reward/std") if value == 0]
    if not run.values("reward/std"):
        return None
    if not flat:
        return Finding(False, "Rewards differ between replies", "in every step.")
    text = f"at {len(flat)} of {len(run.values('reward/std'))} steps, first at step {flat[0]:.0f}: nothing can be learned there."
    return Finding(True, "All replies had the same reward", text)


def _finished(run: RunFiles) -> Finding | None:
    values = run.values("response/finished")
    if not values:
        return None
    text = f"{shown(_late(values), 'share')} in the last quarter."
    if _late(values) >= FINISHED:
        return Finding(False, "Most replies end by themselves", text)
    meaning = " The rest run into response_length: raise it, or missing_eos_penalty."
    return Finding(True, "Few replies end by themselves", text + meaning)


def _length(run: RunFiles) -> Finding | None:
    values = run.values("response/length")
    if len(values) < 8:
        return None
    growth = _late(values) / max(_early(values), 1.0)
    text = f"{shown(_early(values))} tokens in the first tenth, {shown(_late(values))} in the last quarter."
    if growth <= LENGTH_GROWTH:
        return Finding(False, "Replies keep their length", text)
    return Finding(True, "Replies grew", text + " The reward may pay for length: compare replies of equal length.")


def _entropy(run: RunFiles) -> Finding | None:
    values = run.values("policy/entropy")
    if len(values) < 8 or _early(values) <= 0:
        return None
    left = _late(values) / _early(values)
    text = f"{shown(left, 'share')} of the entropy of the first tenth is left."
    if left >= ENTROPY_LEFT:
        return Finding(False, "Replies stay varied", text)
    return Finding(
        True, "Replies have collapsed", text + " The policy repeats itself: lower the learning rate or raise kl_coef."
    )


def _clipping(run: RunFiles) -> Finding | None:
    values = run.values("policy/clip_fraction")
    if not values:
        return None
    text = f"{shown(_late(values), 'share')} of tokens in the last quarter."
    if _late(values) <= CLIP_FRACTION:
        return Finding(False, "Few tokens are clipped", text)
    return Finding(
        True, "Many tokens are clipped", text + " Steps are too large: lower learning_rate or num_ppo_epochs."
    )


def _value(run: RunFiles) -> Finding | None:
    values = run.values("value/explained_variance")
    if len(values) < 8:
        return None
    text = f"explained variance {shown(_late(values))} in the last quarter."
    if _late(values) > 0:
        return Finding(False, "The value model explains part of the returns", text)
    return Finding(True, "The value model does not help", text + " Raise value.learning_rate or value.warmup_steps.")


CHECKS: tuple[Callable[[RunFiles], Finding | None], ...] = (
    _over_optimised, _signs, _independent, _learned, _flat_reward, _distance, _negative_kl, _finished, _length, _entropy, _clipping,
    _value, _ratio,
)  # fmt: skip
