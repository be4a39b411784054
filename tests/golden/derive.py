"""Golden values for `rlhf_ray.maths`, from the definitions alone: plain Python floats and integers, no torch, no project code.

    python tests/golden/derive.py            # writes maths.json beside this file

Each function is the textbook form, written the slow way (sums over all later tokens, ratios instead of logarithms, two passes), so
that a mistake in the project's recursions and log-space forms cannot be repeated here. `wrong_*` entries are the answers of
well-known mistakes: tests hold that the project does NOT give them.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

MASK64 = 2**64 - 1


# --- divergences ---------------------------------------------------------------------------------------------------------------


def penalties(d: float) -> dict[str, float]:
    """The five penalties as ratios of probabilities p, q with log p - log q = d."""
    q = 0.01
    p = q * math.exp(d)
    m = (p + q) / 2
    return {
        "kl": math.log(p / q),
        "clamped_kl": max(math.log(p / q), 0.0),
        "bregman": q / p - 1 + math.log(p / q),
        "jensen_shannon": (max(math.log(p / m), 0.0) + max(math.log(q / m), 0.0)) / 2,
        "squared_error": math.log(p / q) ** 2 / 2,
        "none": 0.0,
    }


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def kl_divergence(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q))


def vocabulary_example() -> dict[str, object]:
    logits_p, logits_q = [0.3, -1.2, 2.0, 0.0, 0.7, -0.4], [0.1, -0.9, 1.1, 0.6, 0.7, -1.5]
    p, q = softmax(logits_p), softmax(logits_q)
    m = [(a + b) / 2 for a, b in zip(p, q)]
    return {
        "logits_p": logits_p,
        "logits_q": logits_q,
        "kl": kl_divergence(p, q),
        "js": (kl_divergence(p, m) + kl_divergence(q, m)) / 2,
        "temperature": 0.7,
        "logprobs_p": [math.log(a) for a in softmax(logits_p, 0.7)],
        "entropy_p": -math.fsum(a * math.log(a) for a in softmax(logits_p, 0.7)),
    }


# --- controllers ---------------------------------------------------------------------------------------------------------------


def controllers() -> dict[str, object]:
    def error(kl: float) -> float:
        return max(-0.2, min(0.2, (kl - 6.0) / 6.0))

    kls = [12.0, 6.6, 6.0, 3.0, -1.0]
    return {
        "kl_coef": 0.2,
        "kl_target": 6.0,
        "adaptive": {"step_size": 0.1, "cases": [[kl, 0.2 * (1 + 0.1 * error(kl))] for kl in kls]},
        "horizon": {
            "horizon": 10_000.0,
            "n_samples": 256,
            "cases": [[kl, 0.2 * (1 + error(kl) * 256 / 10_000)] for kl in kls],
        },
    }


# --- returns -------------------------------------------------------------------------------------------------------------------


def gae(r: list[float], v: list[float], after: float, gamma: float, lam: float) -> dict[str, list[float]]:
    """One reply. A_t = sum_k (gamma lam)^k delta_{t+k}: no recursion."""
    after_v = v[1:] + [after]
    delta = [r[t] + gamma * after_v[t] - v[t] for t in range(len(r))]
    a = [math.fsum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t)) for t in range(len(r))]
    return {"advantages": a, "returns": [x + y for x, y in zip(a, v)]}


def gae_cases() -> dict[str, object]:
    r, v, pad = [-0.01, 0.02, 0.98], [0.5, 0.6, 0.7], 9.9

    def case(gamma: float, lam: float, after: float = 0.0) -> dict[str, object]:
        return {"gamma": gamma, "lam": lam, "bootstrap": after, **gae(r, v, after, gamma, lam)}

    return {
        "rewards": r,
        "values": v,
        "pad_value": pad,
        "cases": {
            "ends at eos": case(1.0, 0.95),
            "cut off by length": case(1.0, 0.95, 0.7),
            "lambda 1": case(1.0, 1.0),
            "lambda 0": case(1.0, 0.0),
            "gamma .9 lambda .8": case(0.9, 0.8),
        },
        "wrong_pad_counted": gae([*r, 0.0], [*v, pad], 0.0, 1.0, 0.95)["advantages"][:3],
    }


def mean_var(x: list[float]) -> tuple[float, float]:
    mean = math.fsum(x) / len(x)
    return mean, math.fsum((y - mean) ** 2 for y in x) / len(x)


def whitening() -> dict[str, object]:
    rows = [[1.0, 2.0, 3.0], [4.0]]
    mean, var = mean_var(rows[0] + rows[1])
    wrong_mean, wrong_var = mean_var([1.0, 2.0, 3.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    return {
        "rows": rows,
        "mean": mean,
        "var": var,
        "centred": [[(x - mean) / math.sqrt(var) for x in row] for row in rows],
        "uncentred": [[(x - mean) / math.sqrt(var) + mean for x in row] for row in rows],
        "wrong_unmasked_mean": wrong_mean,
        "wrong_unmasked_var": wrong_var,
        "wrong_unmasked_pad": (0.0 - wrong_mean) / math.sqrt(wrong_var),
    }


def groups() -> dict[str, object]:
    scores, k, eps = [1.0, 2.0, 6.0, -0.5, 0.25, 0.25], 3, 1e-4
    penalties = [0.1, 0.4, 0.1, 0.0, 0.3, 0.3]
    _, batch_var = mean_var(scores)
    batch_std = math.sqrt(batch_var * len(scores) / (len(scores) - 1))
    rloo, grpo, unscaled, batch, penalised = [], [], [], [], []
    for g, p in ((scores[:k], penalties[:k]), (scores[k:], penalties[k:])):
        mean, var = mean_var(g)
        sample_std = math.sqrt(var * k / (k - 1))
        for i, own in enumerate(g):
            others = [x for j, x in enumerate(g) if j != i]
            rloo.append(own - math.fsum(others) / len(others))
            unscaled.append(own - mean)
            grpo.append((own - mean) / (sample_std + eps))
            batch.append((own - mean) / (batch_std + eps))
            penalised.append((own - mean) / (sample_std + eps) - (p[i] - math.fsum(p) / k))
    return {
        "scores": scores,
        "penalties": penalties,
        "group_size": k,
        "eps": eps,
        "rloo": rloo,
        "grpo": grpo,
        "grpo_unscaled": unscaled,
        "grpo_batch": batch,
        "grpo_penalised": penalised,
    }


# --- losses --------------------------------------------------------------------------------------------------------------------


def losses() -> dict[str, object]:
    def policy(a: float, rho: float) -> float:
        return max(-a * rho, -a * max(0.8, min(1.2, rho)))

    def value(v: float, old: float, target: float, c: float) -> float:
        near = old + max(-c, min(c, v - old))
        return max((v - target) ** 2, (near - target) ** 2) / 2

    policy_inputs = [(1.0, 1.5), (1.0, 0.5), (-1.0, 1.5), (-1.0, 0.5), (2.0, 1.1), (-2.0, 0.9)]
    value_inputs = [(1.0, 0.5, 2.0), (0.6, 0.5, 2.0), (1.0, 0.5, 0.0), (0.4, 0.5, 0.45)]
    gaps = [0.0, 2.0, -3.0, 0.5]

    def dpo(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, wrong: float) -> float:
        """From the probability that the first reply is preferred, as odds; it is labelled the wrong way round with `wrong`."""
        odds = (math.exp(chosen - ref_chosen) / math.exp(rejected - ref_rejected)) ** beta
        p = odds / (1 + odds)
        return -(1 - wrong) * math.log(p) - wrong * math.log(1 - p)

    dpo_inputs = [
        (-7.0, -9.0, -7.0, -9.0, 0.1, 0.0),
        (-5.0, -9.5, -7.0, -9.0, 0.1, 0.0),
        (-8.0, -6.0, -7.0, -9.0, 0.5, 0.0),
        (-8.0, -6.0, -7.0, -9.0, 0.5, 0.25),
    ]
    token_losses = [[1.0, 1.0, 1.0, 1.0], [3.0]]
    return {
        "cliprange": 0.2,
        "policy": [[a, rho, policy(a, rho)] for a, rho in policy_inputs],
        "policy_approx_kl": [[rho, (rho - 1) - math.log(rho)] for _, rho in policy_inputs],
        "value": [[*x, value(*x, 0.2)] for x in value_inputs],
        "value_unclipped": [[v, old, target, (v - target) ** 2 / 2] for v, old, target in value_inputs],
        "pairwise": [[g, -math.log(1 / (1 + math.exp(-g)))] for g in gaps],
        "dpo": [[*x, dpo(*x)] for x in dpo_inputs],
        "token_losses": token_losses,
        "normalised": math.fsum(x for part in token_losses for x in part) / sum(map(len, token_losses)),
        "wrong_mean_of_means": math.fsum(math.fsum(p) / len(p) for p in token_losses) / len(token_losses),
    }


# --- statistics ----------------------------------------------------------------------------------------------------------------


def win_rates() -> dict[str, object]:
    wins, defeats, draws = 370, 424, 9
    x = [1.0] * wins + [0.0] * defeats + [0.5] * draws
    mean, var = mean_var(x)
    n = len(x)
    return {
        "wins": wins,
        "losses": defeats,
        "draws": draws,
        "rate": 100 * mean,
        "se": 100 * math.sqrt(var * n / (n - 1) / n),
        "wrong_draws_are_losses": 100 * wins / n,
    }


def wilson(successes: int, n: int, z: float) -> list[float]:
    """The two shares pi with |successes/n - pi| = z sqrt(pi (1 - pi) / n), found by bisection."""
    share = successes / n

    def outside(pi: float) -> bool:
        return abs(share - pi) > z * math.sqrt(pi * (1 - pi) / n)

    ends = []
    for far in (0.0, 1.0):
        inner, outer = share, far
        for _ in range(200):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        ends.append(inner)
    return ends


def moments() -> dict[str, object]:
    batches = [[1.0, 2.5, -3.0], [10.0], [0.5, 0.5, 0.25, 8.0]]
    mean, var = mean_var([x for b in batches for x in b])
    return {"batches": batches, "mean": mean, "var": var}


# --- random numbers ------------------------------------------------------------------------------------------------------------


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator: add the increment, then mix."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        out.append(mix64(state))
    return out


def mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def permutation(run_seed: int, step: int, epoch: int, n: int) -> list[int]:
    """Rows sorted by their hash, read as a signed number."""
    text = f'[{run_seed}, "permutation", {step}, {epoch}]'
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**63
    keys = splitmix64(splitmix64(seed, 1)[0], n)
    return sorted(range(n), key=lambda i: keys[i] - (keys[i] >> 63) * 2**64)


def random_numbers() -> dict[str, object]:
    seeds = [0, 1, 42, 2**63 - 1, 1234567890123456789]
    streams = [splitmix64(splitmix64(seed, 1)[0], 4) for seed in seeds]
    return {
        "splitmix64_1234567": [str(x) for x in splitmix64(1234567, 5)],
        "permutation": {"run_seed": 7, "step": 3, "epoch": 1, "n": 12, "order": permutation(7, 3, 1, 12)},
        "seeds": seeds,
        "uniforms": [[(x >> 11) / 2**53 for x in stream] for stream in streams],
    }


def derive() -> dict[str, object]:
    """All golden values, JSON-able."""
    points = [-5.0, -2.0, -0.5, -1e-2, 0.0, 1e-2, 0.5, 2.0, 5.0]
    return {
        "penalties": [[d, penalties(d)] for d in points],
        "vocabulary": vocabulary_example(),
        "controllers": controllers(),
        "gae": gae_cases(),
        "whitening": whitening(),
        "groups": groups(),
        "losses": losses(),
        "win_rate": win_rates(),
        "wilson": [[s, n, wilson(s, n, 1.959963984540054)] for s, n in ((67, 100), (0, 10), (10, 10), (332, 500))],
        "moments": moments(),
        "random": random_numbers(),
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("maths.json")
    target.write_text(json.dumps(derive(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
