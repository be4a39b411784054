"""Writes the tables of benchmarks/README.md from benchmarks/results/*.json. The prose around them stays as it is.

    python benchmarks/write_readme.py

Figures are printed as the reports hold them; a list of figures is in the order of the seeds or repeats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rlhf_ray.maths.comparisons import range_p_value, worse_than_best
from rlhf_ray.maths.standard_errors import error_of_difference, error_of_mean, pooled_deviation
from rlhf_ray.sweep.choice import CONFIDENCE

HERE = Path(__file__).parent
README = HERE / "README.md"
PENALTIES = ("kl", "clamped_kl", "bregman", "jensen_shannon", "squared_error", "none")


def result(name: str) -> Any:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def measured(name: str) -> Any:
    return result(name)["measured"]


def mid(figure: dict[str, Any]) -> str:
    """The median."""
    return f"{figure['median']:g}"


def scattered(figure: dict[str, Any]) -> str:
    """The median, and the lowest and highest of the repeats."""
    return f"{mid(figure)} ({figure['min']:g} to {figure['max']:g})"


def each(figure: dict[str, Any]) -> str:
    """All values, in order."""
    return ", ".join(f"{value:g}" for value in figure["values"])


def table(head: str, rows: Iterable[Iterable[str]]) -> list[str]:
    """head: the cells of the first line, with | between them."""
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


# The overview: what was done, on which model, and what came out, for each report.


def sentiment() -> str:
    m = measured("stories_sentiment")
    return (
        f"held-out compound {each(m['eval/reward_start'])} before and {each(m['eval/reward'])} after, at "
        f"{each(m['eval/kl_k1_per_response'])} nats per reply, in {each(m['seconds'])} s"
    )


def chain() -> str:
    m = measured("stories_chain")
    return (
        f"VADER compound, by whose lexicon the pairs were ranked: SFT {each(m['true_reward/sft'])}, PPO "
        f"{each(m['true_reward/ppo'])}, at "
        f"{each(m['kl_k1_per_response/ppo'])} nats per reply; held-out accuracy of the reward model "
        f"{each(m['reward_model/accuracy'])}; {each(m['seconds'])} s"
    )


TASKS = {"tiny": "Bundled task", "stories": "stories260K"}


def baselines() -> str:
    told = []
    for task, m in measured("baselines").items():
        rewards = ", ".join(f"{name} {fmean(p['true_reward']):.3f}" for name, p in m["policies"].items())
        told.append(f"{TASKS[task]} ({len(m['seeds'])} seeds): {rewards}")
    return f"true reward: {'; '.join(told)} ([details](#sft-dpo-best-of-n-and-ppo-in-one-frame))"


def overlapping() -> str:
    m = measured("reward_overlap")
    alone, beside = (m[name] for name in ("one thread", "beside"))
    return (
        f"{mid(beside['time/step'])} s a step, {mid(alone['time/step'])} with everything on one thread: "
        f"{scattered(m['beside to one thread'])} times; of these scoring {mid(beside['time/score'])} and "
        f"{mid(alone['time/score'])} s"
    )


def sharing(name: str) -> str:
    m = measured(name)
    most = max((k for k in m if "processes" in m[k]), key=lambda k: int(k.split()[0]))
    return (
        f"{most}: {mid(m[most]['seconds to processes'])} times the seconds and {mid(m[most]['pss_mib to processes'])} times the "
        "memory of as many processes ([details](#trials-on-one-base))"
    )


def staleness() -> str:
    m = measured("staleness")
    fresh, stale = m["max_staleness_0"], m["max_staleness_1"]
    return (
        f"held-out compound {each(fresh['eval/reward'])} fresh and {each(stale['eval/reward'])} stale: mean difference "
        f"{m['mean_difference']:.4f}, standard error over seeds {m['standard_error_over_seeds']:.4f}; mean weight of a "
        f"token {mid(stale['sampler/importance_weight'])}, a share of {stale['sampler/importance_clipped']['median']:.4f} clipped"
    )


def at(setting: dict[str, Any]) -> str:
    """A score and the KL where it was reached."""
    return f"{setting['score']:.3f} at {setting['kl_k1']:.3f} nats"


def name_of(setting: dict[str, Any]) -> str:
    return f"{setting['kl_penalty']} {setting['kl_coef']:g}" if setting["kl_coef"] else "no penalty"


def not_shown_to_be_worse(m: dict[str, Any]) -> int:
    """Other settings that a study did not show to be worse (95 % confidence for all verdicts together). Studies of before that rule
    recorded lowest, mean and highest score of three seeds, from which the middle one follows, but not whose it is: no blocks."""
    if "not_shown_to_be_worse" in m["choice"]:
        return len(m["choice"]["not_shown_to_be_worse"])
    p = worse_than_best([of_seeds(s) for s in m["settings"]], blocks=False)
    return sum(not value < 1 - CONFIDENCE for value in p) - 1


def of_seeds(setting: dict[str, Any]) -> list[float]:
    """The scores of three seeds, lowest first."""
    low, mean, high = setting["score_low"], setting["score"], setting["score_high"]
    return [low, 3 * mean - low - high, high]


def standard_error_of_a_score(m: dict[str, Any]) -> float:
    """Of the mean of three seeds: their spread, pooled over settings."""
    return error_of_mean([pooled_deviation([of_seeds(s) for s in m["settings"]]) or 0.0] * 3)


def crossing(m: dict[str, Any], penalty: str, axis: str, level: float) -> tuple[float, float, float] | None:
    """Where the straight lines through a penalty's settings, in the order of their KL, reach `level` on `axis` (kl_k1 or score):
    the other coordinate there; the standard error of the line's height, in those of a score; its slope. None if they do not."""
    points = sorted((s["kl_k1"], s["score"]) for s in m["settings"] if s["kl_penalty"] == penalty)
    for (x0, y0), (x1, y1) in pairwise(points):
        start, end = (x0, x1) if axis == "kl_k1" else (y0, y1)
        if start <= level <= end:
            t = (level - start) / (end - start)
            other = y0 + t * (y1 - y0) if axis == "kl_k1" else x0 + t * (x1 - x0)
            return other, error_of_difference(1 - t, t), (y1 - y0) / (x1 - x0)
    return None


def gold_study() -> str:
    m = measured("kl_study_gold")
    blocks = f"{m['blocks']} seed{'s' if m['blocks'] > 1 else ''}"
    levels = ", ".join(f"{m['at_target'][t]['kl']['mean']:.3f} at {t}" for t in m["at_target"])
    told = f"{blocks}: gold reward {m['base']:.3f} before PPO; under kl {levels} nats"
    if "comparisons" in m:
        verdicts = [c["verdict"] for c in m["comparisons"].values()]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        told += f"; against kl of {len(verdicts)} forms {counts} (margin {m['margin']:g})"
    return f"{told} ([details](#five-kl-penalties-at-equal-kl))"


def study(name: str) -> str:
    m = measured(name)
    best, (free,) = m["choice"]["settings"], [s for s in m["settings"] if s["kl_penalty"] == "none"]
    left, others = not_shown_to_be_worse(m), len(m["settings"]) - 1
    (won,) = [s for s in m["settings"] if {k: s[k] for k in best} == best]
    told = (
        f"{left} of {others} other settings not shown to be worse"
        if left
        else f"all {others} other settings shown to be worse"
    )
    unpenalized = "" if won is free else f"; no penalty {at(free)}"
    return (
        f"highest score: {name_of(won)}, {at(won)}, {told}{unpenalized} ([details](#five-kl-penalties-and-measured-kl))"
    )


def sweeping() -> str:
    m = measured("sweep_overhead")
    alone, shared, both = (m[k]["median"] for k in ("single commands", "sweep, one at a time", "sweep"))
    saved, more = 1 - shared / alone, 1 - both / alone
    return f"{alone:g} s, {shared:g} s and {both:g} s: shared processes save {saved:.0%}, both cores {more:.0%}"


def submitting() -> str:
    m = measured("submit_overhead")
    ways = ("here", "submitted", "submitted_unchecked")
    first, whole = ([m[f"{way}/{what}_seconds"]["median"] for way in ways] for what in ("first_step", "whole"))
    return (
        "first step after {:g} s, {:g} s and {:g} s; ".format(*first)
        + "end after {:g} s, {:g} s and {:g} s: ".format(*whole)
        + f"checking the nodes costs {first[1] - first[2]:.2f} s of the first; ends scatter too much to say "
        + f"({m['submitted/whole_seconds']['min']:g} to {m['submitted/whole_seconds']['max']:g} s with it)"
    )


def placed() -> str:
    m = measured("placements")
    ways = ("colocate", "split", "split, max_staleness 1")
    told = ["{}, {}, {}".format(*(mid(m[model][way]["time/step"]) for way in ways)) for model in m]
    return f"seconds a step: {told[0]} (two threads; one each); 5.9 M: {told[1]} ([details](#placements))"


def real_lengths(name: str) -> str:
    m = measured(name)
    return (
        f"{mid(m['ours/episodes_per_second'])} episodes a second, TRL {mid(m['trl/episodes_per_second'])}: "
        f"{scattered(m['ours_over_trl/episodes_per_second'])} times; peak memory {mid(m['ours/peak_mib'])} MiB, TRL "
        f"{mid(m['trl/peak_mib'])} ([details](#a-ppo-step-against-trl))"
    )


def to_reward() -> str:
    m, told = measured("ppo_to_reward"), result("ppo_to_reward")["settings"]
    return (
        f"CPU seconds to a mean score {told['goal'] - told['start']:.2g} above the SFT model's: {scattered(m['ours/seconds'])} "
        f"({told['best_ours']}; KL {mid(m['ours/kl'])}), TRL {scattered(m['trl/seconds'])} ({told['best_trl']}; KL "
        f"{mid(m['trl/kl'])}): {scattered(m['times_as_quick'])} times as quick"
    )


def trainers() -> str:
    m = measured("trainers_vs_trl")
    told = [f"{work} {scattered(m[f'{work}/ours_over_trl/per_second'])}" for work in WORKS]
    return f"times TRL's speed: {', '.join(told)} ([details](#other-trainers-of-trl))"


def updating() -> str:
    m = measured("update_real_lengths")
    return (
        f"update {mid(m['packed/update_seconds'])} s packed, {mid(m['contiguous/update_seconds'])} side by side, "
        f"{mid(m['padded/update_seconds'])} padded; {scattered(m['packed/update_over_floor'])} times its matrix products "
        "([details](#what-an-update-computes))"
    )


def trl() -> str:
    m = measured("ppo_step_vs_trl")
    return (
        f"{mid(m['ours/episodes_per_second'])} episodes a second, TRL {mid(m['trl/episodes_per_second'])}: "
        f"{scattered(m['ours_over_trl/episodes_per_second'])} times TRL; peak memory "
        f"{mid(m['ours/peak_mib'])} MiB, TRL {mid(m['trl/peak_mib'])} ([details](#a-ppo-step-against-trl))"
    )


def sampler() -> str:
    m = measured("sampler_vs_generate")
    return (
        f"{mid(m['sampler/tokens_per_second'])} tokens a second, generate {mid(m['generate/tokens_per_second'])}: "
        f"{scattered(m['sampler/times_generate_wall'])} times; in the chunks of a rollout "
        f"{mid(m['sampler_in_chunks/tokens_per_second'])}: {scattered(m['sampler_in_chunks/times_generate_wall'])} times"
    )


def mixed(name: str) -> str:
    m = measured(name)
    counts = (1, 32, 128)
    speed = "{}, {} and {}".format(*(mid(m[f"tokens_per_second/{n}"]) for n in counts))
    share = " and ".join(scattered(m[f"share_of_one_adapter/{n}"]) for n in counts[1:])
    differ = sum(value for key, f in m.items() if key.startswith("replies_that_differ") for value in f["values"])
    forms = " and ".join(
        f"{scattered(m[f'times_{form}/32'])} times {form}" for form in ("masked stacks", "copies by row")
    )
    return (
        f"{speed} tokens a second: {share} of one adapter; {scattered(m['times_switching/32'])} times switching among 32 adapters, "
        f"{forms}; " + ("all replies equal" if not differ else f"{differ:g} replies differ")
    )


def long_reply() -> str:
    m = measured("long_reply")
    told = []
    for name in ("a cache of 16,000 tokens", "room for all"):
        groups, one, alone = (
            mid(m[f"seconds/{case}"])
            for case in (
                f"groups/{name}/beside a long one",
                f"one cache/{name}/beside a long one",
                f"groups/{name}/alone",
            )
        )
        times = scattered(m[f"times_one_cache/{name}"])
        told.append(f"{name}: {groups} s, one cache {one} s, {times} times as fast; alone {alone} s")
    differ = max(m["replies_that_differ"]["values"])
    return "; ".join(told) + ("; all replies equal" if not differ else f"; {differ:g} replies differ")


def engines(name: str) -> str:
    """vLLM and `generate` as shares of the builtin engine, without an adapter, under one, and under the most in one batch."""
    m, report = measured(name), result(name)
    most = max(int(key.rpartition("/")[2]) for key in m)
    said = [
        f"{what}: {mid(m[f'tokens_per_second/builtin/{n}'])} tokens a second, "
        f"vLLM {scattered(m[f'times_builtin/vllm/{n}'])} times that"
        + (f", `generate` {scattered(m[by_generate])}" if (by_generate := f"times_builtin/generate/{n}") in m else "")
        for what, n in (("base", 0), ("one adapter", 1), (f"{most} adapters", most))
    ]
    differ = sum(value for key, f in m.items() if key.startswith("replies_that_differ") for value in f["values"])
    load, cores = report["machine"]["load_average"], report["machine"]["cores"]
    busy = f"; on a busy machine (load {load:g} on {cores} cores)" if load > 1.5 * cores else ""
    return "; ".join(said) + ("; all replies equal" if not differ else f"; {differ:g} replies differ") + busy


def engine_chain(name: str) -> str:
    """What PPO learns from replies of either engine."""
    m = measured(name)
    rewards = {e: m[f"true_reward/{e}"] for e in ("builtin", "vllm")}
    error = max(value for e in rewards for value in m[f"true_reward_se/{e}"]["values"])
    return (
        f"true reward {mid(m['true_reward/sft'])} after SFT; {scattered(rewards['builtin'])} by the builtin engine, "
        f"{scattered(rewards['vllm'])} by vLLM, each +- {error:.2g}; by seed vLLM's minus the builtin's "
        f"{scattered(m['true_reward_gap/vllm'])}; ratio deviation {m['ratio_deviation/vllm']['max']:g}, the learner's own "
        f"log-probabilities within {m['largest_probe_difference/vllm']['max']:.1g}"
    )


def service() -> str:
    m = measured("serve_load")
    counts = [name.split()[-1] for name in m if name.startswith("times vLLM, adapters")]
    by_count = ", ".join(scattered(m[f"times vLLM, adapters {n}"]) for n in counts)
    under_adapters = f"; over {', '.join(counts)} adapters {by_count} times vLLM" if counts else ""
    return (
        f"tokens a second: {mid(m['rlhf_ray, base']['tokens_per_second'])}; {scattered(m['times transformers serve'])} times "
        f"`transformers serve`, {scattered(m['times FastAPI + generate'])} times FastAPI and `generate`, "
        f"{scattered(m['times vLLM'])} times vLLM{under_adapters} ([details](#the-service))"
    )


def overload() -> str:
    m = measured("serve_overload")
    return (
        f"{mid(m['asked_per_second'])} requests a second: {mid(m['accepted'])} answered, {mid(m['refused'])} refused, the median "
        f"after {m['refused_p50_s']['median'] * 1000:.2f} ms ([details](#ten-times-its-capacity))"
    )


def agreement(name: str) -> str:
    """Where the greedy replies of two engines part, and how near a tie that was."""
    m, settings = measured(name), result(name)["settings"]
    said = []
    for which, what in (("base", "without an adapter"), ("adapter", "under one")):
        differ, gaps = mid(m[f"{which}/replies_that_differ"]), m.get(f"{which}/gap_where_they_part")
        near = "" if gaps is None else f", where the two tokens were within {max(gaps['values']):.2g} nats"
        said.append(f"{differ} of {settings['prompts']} replies differ {what}{near}")
    gap = max(m[f"{which}/logprob_difference"]["max"] for which in ("base", "adapter"))
    changed = mid(m["replies_that_the_adapter_changes"])
    read = f"{mid(m['base/tokens'])} and {mid(m['adapter/tokens'])} tokens, the adapter changes {changed} replies"
    return "; ".join([*said, read]) + f"; log-probabilities within {gap:.1g}"


def thousand(name: str) -> str:
    m = measured(name)
    names, starts = result(name)["settings"]["names"], m["start_against_3"]
    return (
        f"replies a second: {mid(m['many_replies_per_second'])}, {scattered(m['replies_against_one'])} times those of one adapter; "
        f"start with {names:,} names {scattered(starts)} times that with 3 ([details](#a-thousand-adapters))"
    )


def two_replicas(name: str) -> str:
    m = measured(name)
    with_it, without = m["two, affinity"], m["two, Serve's router"]
    return (
        f"found on the device {mid(with_it['hit_rate'])} of the time, against {mid(without['hit_rate'])} without; replies a second "
        f"{scattered(m['replies_with_affinity_against_without'])} times those without ([details](#a-thousand-adapters))"
    )


def planned() -> str:
    m = measured("plan_memory")
    ratios = {key: f["median"] for key, f in m.items() if key.endswith("planned_over_measured")}
    peaks = [ratio for key, ratio in ratios.items() if "/peak_" in key]
    return (
        f"whole run: planned {min(peaks):.2f} to {max(peaks):.2f} times measured; single phases {min(ratios.values()):.2f} to "
        f"{max(ratios.values()):.2f}; largest error {m['largest_error_percent']['median']:g}% ([details](#plan))"
    )


def starting() -> str:
    m = measured("start_time")
    return (
        f"first step after {scattered(m['with Ray/first_step_seconds'])} s with a Ray of its own, "
        f"{scattered(m['without Ray/first_step_seconds'])} s without; the imports of torch, transformers, PEFT and DeepSpeed alone "
        f"take {mid(m['baseline_seconds'])} s"
    )


def overhead() -> str:
    m = measured("control_plane")
    rows = m["rows"]
    told = [
        f"{o['step']:.3f} s, its checkpoint {o['checkpoint']:.3f} s (adapter of {mb} MB)"
        for mb, o in sorted(m["overhead"].items(), key=lambda item: float(item[0]))[:2]
    ]
    least, most = min(rows, key=int), max(rows, key=int)
    whole = {n: rows[n]["seconds"]["step"]["median"] for n in (least, most)}
    return (
        f"against the same roles called bare, a step of {least} replies costs {'; '.join(told)}; "
        f"{int(most) / int(least):g} times the replies: {whole[most]:.3g} s a step, {whole[most] / whole[least]:.0f} times "
        "([details](#what-a-step-costs-beside-its-models))"
    )


STORIES, TINY, BUSY = "stories260K, 260,032 parameters", "bundled Llama, 0.66 M parameters", "other work on the machine"
OVERVIEW: tuple[tuple[str, str, Callable[[], str], str], ...] = (
    (
        "PPO on a VADER reward, 24 steps of 128 replies, three seeds; figures are of that reward on held-out prompts",
        STORIES,
        sentiment,
        "stories_sentiment",
    ),
    (
        f"The whole chain: SFT on stories, reward model on 990 sentiment pairs, PPO on the learned reward, three seeds ({BUSY})",
        STORIES,
        chain,
        "stories_chain",
    ),
    (
        "SFT, DPO, best of n and PPO from one start, on the same pairs; judged by the true reward, by a reward model that nothing"
        " was trained or chosen by, and by an LLM judge behind `rlhf-ray serve`",
        f"bundled Llama, 0.66 M parameters; {STORIES}",
        baselines,
        "baselines",
    ),
    (
        "`max_staleness` 1 against 0, the PPO of the first row under `placement: split`, three seeds",
        STORIES,
        staleness,
        "staleness",
    ),
    (
        f"The study of KL penalties: five forms held at three KLs, and none; a proxy is maximised, VADER judges ({BUSY})",
        STORIES,
        gold_study,
        "kl_study_gold",
    ),
    (
        f"A sweep over penalties: six kinds, up to three coefficients, three seeds, 48 trials, two at a time ({BUSY})",
        TINY,
        lambda: study("kl_study_tiny"),
        "kl_study_tiny",
    ),
    (
        f"The same sweep on a VADER reward, which is also the score, two coefficients each, 33 trials ({BUSY})",
        STORIES,
        lambda: study("kl_study_stories"),
        "kl_study_stories",
    ),
    (
        "Four PPO jobs of two steps: as four commands, as a sweep in one process, as a sweep with two at a time",
        STORIES,
        sweeping,
        "sweep_overhead",
    ),
    (
        "One PPO job of 12 steps: run here on a Ray that it starts, submitted to a running one-node cluster with a token, "
        "submitted with `--no-check`",
        STORIES,
        submitting,
        "submit_overhead",
    ),
    (
        "From the command to the first PPO step: with a Ray that the job starts, and without Ray",
        STORIES,
        starting,
        "start_time",
    ),
    (
        "The loop, its actors, checks and files around roles that compute nothing, a checkpoint each step",
        "none",
        overhead,
        "control_plane",
    ),
    (
        "A reward server that takes 0.25 s a request, asked while later chunks are sampled: 8 chunks of 16 replies",
        STORIES,
        overlapping,
        "reward_overlap",
    ),
    (
        "Trials of a sweep on one base (`share_base`) against as many commands at once: 32 replies a step, VADER reward",
        STORIES,
        lambda: sharing("sweep_share_base"),
        "sweep_share_base",
    ),
    (
        "The same, 8 replies a step",
        "SmolLM2-135M-Instruct, float32",
        lambda: sharing("sweep_share_base_135m"),
        "sweep_share_base_135m",
    ),
    (
        "One PPO job as colocate, split, and split with `max_staleness: 1`",
        f"{STORIES}; random Llama, 5.9 M parameters",
        placed,
        "placements",
    ),
    (
        "One PPO step against TRL 1.12.0, same work: LoRA r 8, 64 prompts of 64 tokens, 64 new tokens, 4 epochs",
        "random Llama, 5.8 M parameters",
        trl,
        "ppo_step_vs_trl",
    ),
    (
        "The same on real lengths: prompts as long as Alpaca's, replies that end anywhere up to 128 tokens",
        "random Llama, 5.8 M parameters",
        lambda: real_lengths("ppo_step_real_lengths"),
        "ppo_step_real_lengths",
    ),
    (
        "The same, 16 prompts a step, one epoch",
        "random Llama of SmolLM2-135M's layers",
        lambda: real_lengths("ppo_step_real_lengths_135m"),
        "ppo_step_real_lengths_135m",
    ),
    (
        "Time to the same reward, each side in the best of its configurations tried (11 of ours, 8 of TRL's), 5,120 episodes",
        TINY,
        to_reward,
        "ppo_to_reward",
    ),
    (
        "A critic-free PPO step (GRPO), SFT with packing, DPO and reward training against TRL's trainers",
        "random Llama, 5.8 M parameters",
        trainers,
        "trainers_vs_trl",
    ),
    (
        "Evaluation and update of a PPO step on rows as long as Alpaca's, by how rows lie",
        "random Llama, 5.8 M parameters",
        updating,
        "update_real_lengths",
    ),
    (
        "The sampler against transformers' `generate`, batch 64, replies of 8 to 128 tokens",
        "random Llama, 5.8 M parameters",
        sampler,
        "sampler_vs_generate",
    ),
    (
        "A batch of 32 rows over 1, 32 and 128 adapters (LoRA r 8 on all linear layers), and `set_adapter` and `generate` in turn, "
        "same requests, greedy",
        "random Llama, 5.8 M parameters",
        lambda: mixed("mixed_adapters_5_8m"),
        "mixed_adapters_5_8m",
    ),
    ("The same", STORIES, lambda: mixed("mixed_adapters_stories260k"), "mixed_adapters_stories260k"),
    (
        "128 replies of 60 tokens, 32 at a time, beside one of 2,000 and more: groups by length, and one cache for all",
        "random Llama, 5.8 M parameters",
        long_reply,
        "long_reply",
    ),
    (
        "The builtin engine, vLLM 0.30 (CPU build) and transformers' `generate`, same greedy requests, 32 rows at a time",
        "random Llama, 5.8 M parameters",
        lambda: engines("engines_5_8m"),
        "engines_5_8m",
    ),
    (
        "The same, 32 requests",
        "SmolLM2-135M-Instruct, float32",
        lambda: engines("engines_smollm2_135m"),
        "engines_smollm2_135m",
    ),
    (
        "vLLM 0.30 (CPU build) against the builtin engine: greedy replies of 64 tokens to instructions of the Alpaca file",
        "SmolLM2-135M-Instruct, float32",
        lambda: agreement("engine_agreement"),
        "engine_agreement",
    ),
    (
        "PPO of the demo, from the same SFT and reward runs, with `rollout.engine` builtin and vllm",
        TINY,
        lambda: engine_chain("engine_chain"),
        "engine_chain",
    ),
    (
        "The service: 32 clients that stream replies of 64 tokens, greedy, against each server in turn",
        "random Llama, 6 M parameters, head dimension 32",
        service,
        "serve_load",
    ),
    ("The same service at ten times its capacity, for a minute", "the same", overload, "serve_overload"),
    (
        "One replica, 1,000 adapters of ranks 4 to 64, asked for by Zipf's law by 16 clients, replies of 32 tokens",
        STORIES,
        lambda: thousand("serve_many_adapters_stories260k"),
        "serve_many_adapters_stories260k",
    ),
    (
        "The same",
        "random Llama, 6 M parameters, head dimension 32",
        lambda: thousand("serve_many_adapters_6m"),
        "serve_many_adapters_6m",
    ),
    (
        "The same on two replicas of one thread each, with and without regard to who has which adapter",
        STORIES,
        lambda: two_replicas("serve_replicas_stories260k"),
        "serve_replicas_stories260k",
    ),
    (
        "The same",
        "random Llama, 6 M parameters, head dimension 32",
        lambda: two_replicas("serve_replicas_6m"),
        "serve_replicas_6m",
    ),
    (
        "`plan --device cpu` against eight runs in their own processes (one run each)",
        "random Llamas, 134, 121 and 101 M parameters",
        planned,
        "plan_memory",
    ),
)


def overview() -> list[str]:
    return table(
        "what | model | result | file",
        (
            (what, model, told(), f"[`results/{name}.json`](results/{name}.json)")
            for what, model, told, name in OVERVIEW
            if is_measured(name)
        ),
    )


# Details.


def gold_table() -> list[str]:
    """A row per form, and the line of best of n."""
    m, rows = measured("kl_study_gold"), []
    for form in PENALTIES:
        reached = [c for c in m["cells"] if c["penalty"] == form]
        means = [by_form[form]["mean"] for by_form in m["at_target"].values()]
        at_target = ["" if mean is None else f"{mean:.3f}" for mean in means]
        steps = ", ".join(f"{c['steps']:.0f}" for c in reached)
        kls = ", ".join(" to ".join(dict.fromkeys(f"{kl:.2g}" for kl in c["kl_range"])) for c in reached)
        held = ", ".join(str(c["held"]) for c in reached) if form != "none" else ""
        coefficients = ", ".join(f"{c['coefficient']:.2g}" for c in reached)
        compared = m.get("comparisons", {}).get(form)
        against = ["", ""]
        if compared:
            low, high = compared["interval_90"]
            against = [f"{compared['difference']:+.3f} ({low:+.3f} to {high:+.3f})", compared["verdict"]]
        rows.append([form, *at_target, held, kls, coefficients if form != "none" else "", steps, *against])
    by_n = ", ".join(f"{row['gold']:.3f} at {row['kl']:.2f} (n = {row['n']})" for row in m["best_of_n"])
    head = " | ".join(f"gold at {target}" for target in m["at_target"])
    told = f"form | {head} | held, of {m['blocks']} | KL read | last coefficient | steps | less kl (90 % interval) | verdict"
    return [*table(told, rows), "", f"Best of n by the proxy, gold at KL: {by_n}. Before PPO: {m['base']:.3f}."]


JUDGES = {"true_reward": "by the true reward", "unseen": "by the unseen reward model", "llm": "by the LLM judge"}


def within(found: dict[str, Any] | None, digits: str, scale: float = 1.0) -> str:
    """A mean and its 95 % interval."""
    if not found or found["mean"] is None:
        return ""
    mean, low, high = (f"{scale * found[end]:{digits}}" for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def frame() -> list[str]:
    """A table per task, with a row per policy; and how far the judges agree."""
    lines: list[str] = []
    if not is_measured("baselines"):
        return ["Not measured yet."]
    for task, m in measured("baselines").items():
        seeds, asked = ", ".join(map(str, m["seeds"])), m["llm"]["prompts"]
        told = f"**{TASKS[task]}**: {m['prompts']} held-out prompts, seeds {seeds}"
        lines += [f"{told}; the LLM judge on {asked} of them." if asked else f"{told}.", ""]
        head = f"policy | true reward | less SFT | wins, %, {' | '.join(JUDGES.values())} | KL, nats"
        rows = [framed(name, p, m["budget"]) for name, p in m["policies"].items()]
        lines += [*table(f"{head} | replies sampled in training | pairs read | replies an answer", rows), ""]
        accuracy = {name: fmean(r[name]["accuracy"] for r in m["reward_models"]) for name in ("proxy", "unseen")}
        lines.append(
            f"Held-out accuracy of the reward models: {', '.join(f'{n} {a:.3f}' for n, a in accuracy.items())}."
        )
        lines += [*agreements(m), ""]
    return lines[:-1]


def framed(name: str, p: dict[str, Any], budget: dict[str, int]) -> list[str]:
    """The row of a policy. Best of n has a bound on its KL, no KL."""
    n = name.removeprefix("best_of_")
    kl = ", ".join(f"{v:.2f}" for v in p.get("kl_k1_per_response", ())) or f"at most {p['kl_bound'][0]:.2f}"
    wins = [within(p.get(f"win_rate_{judge}"), ".0f", 100) for judge in JUDGES]
    sampled = f"{budget['replies_sampled']:,}" if name == "ppo" else "0"
    pairs = f"{budget['pairs_read']:,}" if name == "dpo" else "0"
    true = ", ".join(f"{v:.3f}" for v in p["true_reward"])
    return [name, true, within(p.get("true_difference"), "+.3f"), *wins, kl, sampled, pairs, n if n != name else "1"]


def agreements(m: dict[str, Any]) -> list[str]:
    """A sentence per judge: does it say what the true reward says, more often than by chance?"""
    lines = []
    for pair, found in m["agreement"].items():
        judge = {"unseen": "The unseen reward model", "llm": "The LLM judge"}[pair.partition(",")[0]]
        if found["kappa"] is None or found["low"] is None:
            lines.append(
                f"{judge} and the true reward cannot be compared: {found['pairs']} verdicts, all one and the same."
            )
            continue
        kappa = f"{judge} and the true reward: Cohen's kappa {within({**found, 'mean': found['kappa']}, '.2f')}"
        verdict = "**not told from chance**" if found["low"] <= 0 <= found["high"] else "beyond chance"
        lines.append(f"{kappa}, {verdict}; {found['same']} of {found['pairs']} verdicts the same.")
    for about in m["about_llm"]:
        told = f"{about['flipped']} of its pairs went with the order and count as draws"
        lines.append(f"Of the LLM judge: {told}, {about['unparsable']} had no verdict that could be read.")
    return lines


def penalties(name: str) -> list[str]:
    """A row per penalty: score at measured KL, by coefficient; and compared where that can be done: at a KL that several penalties
    reach, else where they reach the same score."""
    m = measured(name)
    common, rows = {k: v for k, v in m["score_at_common_kl"].items() if v is not None}, []
    shared = len(common) > 1  # else there is no KL that several penalties reach
    for penalty in PENALTIES:
        told = [s for s in m["settings"] if s["kl_penalty"] == penalty]
        cells = [
            f"{s['score']:.3f} at {s['kl_k1']:.3f}" + (f" ({s['kl_coef']:g})" if s["kl_coef"] else "") for s in told
        ]
        length = min(s["length_ratio"] for s in told)
        between = (f"{common[penalty]:.3f}" if penalty in common else "") if shared else nats_at(m, penalty, SAME_SCORE)
        rows.append([penalty, ", ".join(cells), between, f"{length:.2f}"])
    column = (
        f"at {m['common_kl']:.1f} nats, interpolated" if shared else f"nats at a score of {SAME_SCORE:g}, interpolated"
    )
    return table(
        f"penalty | score at KL (coefficient) | {column} | shortest replies, times the length before PPO", rows
    )


SAME_SCORE = 0.65
"""About the middle of the scores that all five penalties reach in the VADER study."""


def nats_at(m: dict[str, Any], penalty: str, score: float) -> str:
    """KL where a penalty reaches a score, with what the score's standard error makes of it; the KL's own was not recorded."""
    found = crossing(m, penalty, "score", score)
    if found is None:
        return ""
    kl, share, slope = found
    return f"{kl:.1f} ± {share * standard_error_of_a_score(m) / slope:.1f}"


def shared_kl() -> list[str]:
    """The verdict on the bundled task: do the five penalties differ where all were measured, at one KL?

    Their range is held against that of five equal means (studentized range), whose standard error is the mean of those of the
    interpolated scores; the KL is taken as known. A simulation with the errors as they are gives the same p to 0.01 (a test)."""
    m = measured("kl_study_tiny")
    found = {p: found for p in PENALTIES if (found := crossing(m, p, "kl_k1", m["common_kl"])) is not None}
    scores = {penalty: score for penalty, (score, _, _) in found.items()}
    error = standard_error_of_a_score(m) * fmean(share for _, share, _ in found.values())
    freedom = 2 * len(m["settings"])
    low, high = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    seen = scores[high] - scores[low]
    p = range_p_value(seen / error, len(scores), freedom)
    least = next(d / 1000 for d in range(1, 1000) if range_p_value(d / 1000 / error, len(scores), freedom) < 0.05)
    return [
        f"At {m['common_kl']:.1f} nats the {len(scores)} penalties lie within {seen:.3f} of each other ({low} {scores[low]:.3f},",
        f"{high} {scores[high]:.3f}). **No difference between them was detected**: if all were equal,",
        f"a range as large would come in {p:.0%} of studies (range test, p = {p:.2g}). Nor were they shown to be equal: a range",
        f"below {least:.3f} could not have been told from chance.",
    ]


def no_shared_kl() -> list[str]:
    """The verdict on the VADER study: which KLs each penalty was measured at."""
    m = measured("kl_study_stories")
    ends = {p: [s["kl_k1"] for s in m["settings"] if s["kl_penalty"] == p] for p in PENALTIES if p != "none"}
    if max(map(min, ends.values())) <= min(map(max, ends.values())):
        raise ValueError("kl_study_stories: the penalties have a KL in common; compare them there")
    told = [f"{p} {min(v):.1f} to {max(v):.1f}" for p, v in sorted(ends.items(), key=lambda item: min(item[1]))]
    return [
        f"No KL lies in the range of all {len(told)} ({', '.join(told[:3])},",
        f"{', '.join(told[3:])} nats): **which of them scores higher at equal KL is not known** from this study.",
    ]


def placements() -> list[str]:
    rows = []
    for model, ways in measured("placements").items():
        for way, m in ways.items():
            roles = ("generator", "scorer", "learner")
            idle = ", ".join(mid(m[f"time/idle_{r}"]) for r in roles) if "time/idle_learner" in m else ""
            peaks = ("process", "generator_process", "scorer_process")
            memory = " + ".join(
                f"{m[f'memory/{p}_peak']['median'] / 1e6:.4g}" for p in peaks if f"memory/{p}_peak" in m
            )
            sent = f"{m['sync/bytes']['median'] / 1e3:.0f} kB in {m['time/publish']['median'] * 1e3:.1f} ms"
            rows.append([model, way, mid(m["time/step"]), idle, memory, sent])
    return table(
        "model | placement | s a step | idle share of generator, scorer, learner | peak MB | adapter handed over", rows
    )


def against_trl() -> list[str]:
    m = measured("ppo_step_vs_trl")
    names = {"ours": "rlhf_ray", "trl": "TRL 1.12.0", "ours_shared_trunk": "rlhf_ray, `value.adapter: shared`"}
    return table(
        "trainer | episodes a second | times TRL | peak MiB | times TRL",
        (
            [
                name,
                mid(m[f"{key}/episodes_per_second"]),
                mid(m[f"{key}_over_trl/episodes_per_second"]) if key != "trl" else "1",
                mid(m[f"{key}/peak_mib"]),
                mid(m[f"{key}_over_trl/peak"]) if key != "trl" else "1",
            ]
            for key, name in names.items()
            if f"{key}/peak_mib" in m
        ),
    )


def times(m: dict[str, Any], side: str, other: str, name: str) -> dict[str, Any]:
    """A figure of `side` over that of `other`, run by run."""
    pairs = zip(m[f"{side}/{name}"]["values"], m[f"{other}/{name}"]["values"], strict=True)
    ratios = [float(f"{x / y:.4g}") for x, y in pairs]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def against_trl_on_real_lengths() -> list[str]:
    names = {"ours": "rlhf_ray", "padded": "rlhf_ray, padded rows (`defaults_version: 2`)", "trl": "TRL 1.12.0"}
    rows = []
    for result_name, model in (("ppo_step_real_lengths", "5.8 M"), ("ppo_step_real_lengths_135m", "135 M")):
        m = measured(result_name) if is_measured(result_name) else {}
        for key, name in names.items():
            if f"{key}/peak_mib" in m:
                speed, memory = (times(m, key, "trl", figure) for figure in ("episodes_per_second", "peak_mib"))
                rows.append(
                    [
                        *(model, name, scattered(m[f"{key}/episodes_per_second"])),
                        *(scattered(speed) if key != "trl" else "1", mid(m[f"{key}/peak_mib"])),
                        mid(memory) if key != "trl" else "1",
                        mid(m[f"{key}/real_token_share"]) if f"{key}/real_token_share" in m else "",
                        mid(m[f"{key}/reply_tokens"]),
                    ]
                )
    head = "model | trainer | episodes a second | times TRL | peak MiB | times TRL | real tokens in the update"
    return table(f"{head} | tokens a reply", rows)


WORKS = {
    "grpo": ("critic-free PPO step, groups of 8 (GRPO)", "episodes", 1.5),
    "sft": ("SFT, packed", "tokens", 1.0),
    "dpo": ("DPO", "tokens", 1.0),
    "reward": ("reward model", "tokens", 1.0),
}
"""Work of trainers_vs_trl.py -> what it is, what is counted, how many times TRL's speed was aimed at."""


def other_trainers() -> list[str]:
    m, rows = measured("trainers_vs_trl") if is_measured("trainers_vs_trl") else {}, []
    for work, (name, what, _) in WORKS.items():
        ours, theirs, over = (f"{work}/{side}" for side in ("ours", "trl", "ours_over_trl"))
        if f"{over}/peak_mib" not in m:
            rows.append([name, "not measured yet", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{mid(m[f'{ours}/per_second'])} {what}, TRL {mid(m[f'{theirs}/per_second'])}",
                scattered(m[f"{over}/per_second"]),
                f"{mid(m[f'{ours}/peak_mib'])}, TRL {mid(m[f'{theirs}/peak_mib'])}",
                mid(m[f"{over}/peak_mib"]),
            ]
        )
    return table("work | a second | times TRL | peak MiB | times TRL", rows)


def update_layouts() -> list[str]:
    m = measured("update_real_lengths")
    names = {
        "padded": "padded rows (`defaults_version: 2`)",
        "contiguous": "prompt and reply side by side, sorted by length (3)",
        "packed": "all rows of a pass as one (now)",
        "budget": "the same, `tokens_per_microbatch: 2400`",
        "compiled": "all rows as one, decoder layers under `torch.compile`",
    }
    rows = [
        [
            name,
            mid(m[f"{way}/update_seconds"]),
            scattered(m[f"{way}/update_over_floor"]),
            mid(m[f"{way}/real_token_share"]),
        ]
        for way, name in names.items()
    ]
    shares = [f"{kind} {mid(m[f'share of {kind}'])}" for kind in ("matrix products", "attention", "all else")]
    told = (
        f"Of an evaluation and an update, packed: {', '.join(shares)}. The compiler makes the first update take "
        f"{mid(m['compiled/first_update_seconds'])} s, so PPO has no field for it; SFT, reward and DPO jobs have Trainer's "
        "(`trainer.torch_compile`, `trainer.use_liger_kernel` on CUDA, which nobody has tried here)."
    )
    return [
        *table("rows of a forward pass | update, s | times the matrix products | share of real tokens", rows),
        "",
        told,
    ]


def is_measured(name: str) -> bool:
    return (HERE / "results" / f"{name}.json").exists()


def speed_aims() -> list[str]:
    """What was aimed at and what came out, missed or not, or not measured."""
    real, large, update = "ppo_step_real_lengths", "ppo_step_real_lengths_135m", "update_real_lengths"
    aims = []  # what, the result, its figure, the aim, whether more is better
    for model, name in (("5.8 M", real), ("135 M", large)):
        aims.append(
            (f"PPO step, real lengths, {model}: speed, times TRL", name, "ours_over_trl/episodes_per_second", 2.0, True)
        )
        aims.append(("the same: peak memory, times TRL", name, "ours_over_trl/peak_mib", 0.6, False))
    equal = "PPO step, equal lengths: speed, times TRL"
    aims.append((equal, "ppo_step_vs_trl", "ours_over_trl/episodes_per_second", 1.2, True))
    quickest = "to the same reward, each side's best configuration: times as quick as TRL"
    aims.append((quickest, "ppo_to_reward", "times_as_quick", 3.0, True))
    for work, (what, _, aim) in WORKS.items():
        aims.append((f"{what}: speed, times TRL", "trainers_vs_trl", f"{work}/ours_over_trl/per_second", aim, True))
        if work != "grpo":
            memory = f"{work}/ours_over_trl/peak_mib"
            aims.append(("the same: peak memory, times TRL", "trainers_vs_trl", memory, 1.0, False))
    aims.append(("an update, times its matrix products", update, "packed/update_over_floor", 1.5, False))
    aims.append(
        (
            "8 trials on one base: memory, times 8 processes",
            "sweep_share_base",
            "8 trials > pss_mib to processes",
            0.3,
            False,
        )
    )
    aims.append(
        ("the same: seconds, times 8 processes", "sweep_share_base", "8 trials > seconds to processes", 0.6, False)
    )
    aims.append(("real tokens of those computed, packed", update, "packed/real_token_share", 0.83, True))
    aims.append(("the same where a base cannot pack", update, "contiguous/real_token_share", 0.83, True))
    rows = []
    for what, name, key, aim, more in aims:
        told = f"at {'least' if more else 'most'} {aim:g}"
        if not is_measured(name):
            rows.append([what, told, "", "not measured"])
            continue
        group, _, inner = key.partition(" > ")
        figure = measured(name)[group][inner] if inner else measured(name)[key]
        rows.append([what, told, scattered(figure), verdict(figure["median"], aim, more)])
    rows += step_overheads()
    return table("what | aim | measured | ", rows)


def verdict(value: float, aim: float, more: bool) -> str:
    return "met" if (value >= aim if more else value <= aim) else "**missed**"


def step_overheads() -> list[list[str]]:
    """What a run does beside sampling, scoring and learning, checkpoint of every step included, of a step of one second."""
    return [
        [
            f"overhead of a step of one second that saves a checkpoint, adapter of {size} MB",
            "at most 0.05",
            f"{seconds['all']:.3g} (the checkpoint alone {seconds['checkpoint']:.3g})",
            verdict(seconds["all"], 0.05, False),
        ]
        for size, seconds in sorted(measured("control_plane")["overhead"].items(), key=lambda item: float(item[0]))
    ]


SERVE_AIMS = (
    ("replies a second, 1,000 adapters against one", "replies_against_one", 0.6, True),
    ("longest time between two steps, s", "many_longest_stall", 0.05, False),
    ("start with all adapters, times that with three", "start_against_3", 1.5, False),
    ("a promotion among 10,000 names is seen after, s", "promotion_seen_seconds", 1.0, False),
    ("requests that failed", "many_errors", 0.0, False),
)


def serve_aims() -> list[str]:
    """A thousand adapters: what was aimed at, and what came out."""
    rows = []
    for what, key, aim, more in SERVE_AIMS:
        row = [what, f"at {'least' if more else 'most'} {aim:g}"]
        for name in ("serve_many_adapters_stories260k", "serve_many_adapters_6m"):
            figure = measured(name)[key]
            row += [mid(figure), verdict(figure["median"], aim, more)]
        rows.append(row)
    return table("what | aim | stories260K |  | 6 M parameters | ", rows)


def adapters() -> list[str]:
    models = {"5.8 M": measured("mixed_adapters_5_8m"), "stories260K": measured("mixed_adapters_stories260k")}
    rows = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        row = [str(count)]
        for m in models.values():
            times = m.get(f"times_switching/{count}")
            row += [
                mid(m[f"tokens_per_second/{count}"]),
                mid(m[f"share_of_one_adapter/{count}"]),
                mid(times) if times else "",
            ]
        rows.append(row)
    cells = " | ".join(f"{model}: tokens a second | of one adapter | times switching" for model in models)
    return table(f"adapters | {cells}", rows)


def servers() -> list[str]:
    rows = []
    for server, m in measured("serve_load").items():
        if "tokens_per_second" in m:
            speed = m["tokens_per_second"]
            first = (m[f"first_token_{p}_s"]["median"] for p in ("p50", "p99"))
            rows.append(
                [
                    server,
                    f"{speed['median']:g} ({speed['min']:g} to {speed['max']:g})",
                    *(f"{value:g}" for value in first),
                    mid(m["latency_p99_s"]),
                ]
            )
    return table(
        "server, over | tokens a second (least to most) | first token p50, s | p99, s | whole reply p99, s", rows
    )


def overloaded() -> list[str]:
    m = measured("serve_overload")
    total = sum(sum(m[k]["values"]) for k in ("accepted", "refused", "neither"))

    def ms(figure: float) -> str:
        return f"{figure * 1000:.3g} ms"

    p99 = m["refused_p99_s"]
    return table(
        "what | median of 3 minutes",
        [
            ["requests a second", mid(m["asked_per_second"])],
            ["answered; refused", f"{mid(m['accepted'])}; {mid(m['refused'])}"],
            [
                "refusal after, p50; p99",
                f"{ms(m['refused_p50_s']['median'])}; {ms(p99['median'])} ({ms(p99['max'])} in the worst minute)",
            ],
            [
                "neither answered nor refused",
                f"{sum(m['neither']['values']):g} of about {total:,.0f} in all three: its connection ended",
            ],
            ["whole reply p99", f"{mid(m['accepted_p99_s'])} s"],
            [
                "that, times p99 at capacity; with 32 clients",
                f"{mid(m['times_p99_at_capacity'])}; {mid(m['times_p99_of_one_batch'])}",
            ],
            ["memory growth over the last 50 s", f"{mid(m['memory_growth_mib'])} MiB, of {mid(m['memory_mib'])}"],
            ["the next request, answered after", f"{mid(m['next_request_s'])} s"],
        ],
    )


def thousand_adapters() -> list[str]:
    reports = [result(f"serve_many_adapters_{model}") for model in ("stories260k", "6m")]
    found = [r["measured"] for r in reports]

    def row(what: str, *figures: str) -> list[str]:
        """One figure with its spread, or the medians of several."""
        told = scattered if len(figures) == 1 else mid
        return [what, *("; ".join(told(m[figure]) for figure in figures) for m in found)]

    rows = [
        ["seconds of each load, times", *(f"{r['settings']['seconds']:g}, {r['repeats']}" for r in reports)],
        row("replies a second, one adapter of rank 4", "one_replies_per_second"),
        row("five adapters, of ranks 4 to 64", "five_replies_per_second"),
        row("1,000 adapters", "many_replies_per_second"),
        row("1,000 against one", "replies_against_one"),
        row("1,000: found on the device; read from disk", "many_hit_rate", "many_read_from_disk"),
    ]
    for kind, of in (("one", "one adapter"), ("five", "five"), ("many", "1,000")):
        rows.append(row(f"first token, s, {of}: p50; p99", f"{kind}_first_token_p50", f"{kind}_first_token_p99"))
        rows.append(row(f"longest time between two steps, s, {of}", f"{kind}_longest_stall"))
    rows += [
        row("start, s: with 3 names; with 10,000", "start_seconds_3", "start_seconds_all"),
        row("with 10,000 against 3", "start_against_3"),
        row("all names read after, s", "all_names_read_seconds"),
        row("a promotion is seen after, s", "promotion_seen_seconds"),
        row("adapters, MiB: on the device; in the host's memory", "device_adapter_mib", "host_adapter_mib"),
        row("largest resident memory, MiB", "peak_rss_mib"),
    ]
    return table("what | stories260K | 6 M parameters", rows)


def replicas() -> list[str]:
    return table(
        "model | replicas | replies a second | found on the device | read from disk | whole reply p50, s | p99, s",
        (
            [
                model,
                case,
                scattered(by["replies_per_second"]),
                mid(by["hit_rate"]),
                mid(by["read_from_disk"]),
                mid(by["reply_p50"]),
                mid(by["reply_p99"]),
            ]
            for model, name in (("stories260K", "serve_replicas_stories260k"), ("6 M", "serve_replicas_6m"))
            for case, by in measured(name).items()
            if "hit_rate" in by
        ),
    )


def plan() -> list[str]:
    m, rows = measured("plan_memory"), []
    for case in dict.fromkeys(key.split("/")[0] for key in m if "/" in key):
        phases = {
            k.split("/")[1]: f
            for k, f in m.items()
            if k.startswith(f"{case}/") and "over_measured" in k and "/peak" not in k
        }
        ratios = ", ".join(f"{name.split('_')[0]} {f['median']:.2f}" for name, f in phases.items())
        peak = (f"{m[f'{case}/peak_{k}']['median']:.0f}" for k in ("planned_mib", "mib"))
        rows.append([f"`{case}`", *peak, f"{m[f'{case}/peak_planned_over_measured']['median']:.3f}", ratios])
    return table("case | planned MiB | measured MiB | planned / measured | by phase", rows)


def control_plane() -> list[str]:
    """A row per case: seconds by phase, and what it takes."""
    m, rows = measured("control_plane"), []
    kinds = {"rows": "{} replies", "adapter_mb": "adapter of {} MB", "actors": "{} actors", "ranks": "{} learner ranks"}
    phases = ("rollout", "evaluate", "experience", "update", "publish", "checkpoint")
    for kind, name in kinds.items():
        for value, case in m[kind].items():
            seconds = [f"{case['seconds'][p]['median']:.3g}" if p in case["seconds"] else "" for p in phases]
            calls = sum(case["calls_per_step"][c] for c in ("wait", "get", "put"))
            rows.append([name.format(value), str(case["chunks"]), *seconds, f"{calls:.0f}"])
    return table(f"case | chunks | {' | '.join(phases)} | Ray calls of the learner", rows)


def on_paper() -> list[str]:
    paper = measured("control_plane")["on_paper"]
    sizes = list(paper["seconds"])
    rows = [[part, *(f"{paper['seconds'][n][part]:.3g}" for n in sizes)] for part in paper["seconds"][sizes[0]]]
    assumed = "; ".join(f"{k}: {v if isinstance(v, str) else f'{v:g}'}" for k, v in paper["assumed"].items())
    bounds = []
    for n in sizes:
        parts = paper["seconds"][n]
        around = {part: parts[part] for part in parts if part not in COMPUTES and not part.startswith("checkpoint")}
        first, whole = max(around, key=around.__getitem__), sum(parts[part] for part in COMPUTES)
        bounds.append(f"{n} GPUs {first} ({around[first]:.2g} s, {around[first] / whole:.1%} of what computes)")
    return [
        *table(f"seconds of a step | {' | '.join(f'{n} GPUs' for n in sizes)}", rows),
        "",
        f"Largest beside computing and checkpoints: {'; '.join(bounds)}.",
        "",
        f"Assumed: {assumed}.",
    ]


COMPUTES = ("decode", "evaluation and update")


def shared_base() -> list[str]:
    models = {"sweep_share_base": "stories260K", "sweep_share_base_135m": "SmolLM2-135M"}
    found = [(model, *case) for name, model in models.items() if is_measured(name) for case in measured(name).items()]
    threads = {
        model: result(name)["settings"].get("threads_of_shared", 1)
        for name, model in models.items()
        if is_measured(name)
    }
    found = [(model, trials.replace("1 trials", "1 trial"), m) for model, trials, m in found]
    rows = []
    for model, trials, m in found:
        for name in ("shared", "with Ray", "processes", "in turn"):
            if name in m:
                memory = m[name].get("pss_mib_of_all_at_once", m[name]["pss_mib"])
                figures = (mid(m[name]["seconds"]), mid(m[name]["cpu_seconds"]), mid(memory))
                how = (
                    f"{name}, {threads[model]} threads"
                    if name in ("shared", "with Ray") and threads[model] > 1
                    else name
                )
                rows.append([model, trials, how, *figures])
    lines = table("model | trials | how | seconds | CPU seconds | peak MiB (PSS)", rows)
    for model, trials, m in found:
        if "equality" in m:
            e = m["equality"]
            same, at_first = mid(e["equal_replies"]), mid(e["equal_replies_of_the_first_step"])
            lines += [
                "",
                f"{model}, {trials}: of {mid(e['replies'])} replies kept a share of {same} is the same, letter for letter, as in"
                f" processes of their own ({at_first} in the first step); scores differ by at most"
                f" {mid(e['largest_difference_of_scores'])}.",
            ]
    return lines


def conditions() -> list[str]:
    rows = []
    for name in (name for _, _, _, name in OVERVIEW if is_measured(name)):
        r = result(name)
        machine = r["machine"]
        rows.append(
            [
                name,
                f"{machine['cores']} cores of {machine['cpu']}, {len(machine['gpus']) or 'no'} GPU",
                str(machine["threads"]),
                f"{machine['load_average']:g}",
                str(r["repeats"]),
                r["versions"]["torch"],
                r["commit"][:8],
            ]
        )
    return table("result | machine | threads | load average at the end | repeats or seeds | torch | commit", rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "overview": overview,
    "baselines": frame,
    "study-gold": gold_table,
    "study-tiny": lambda: penalties("kl_study_tiny"),
    "study-tiny-verdict": shared_kl,
    "study-stories-verdict": no_shared_kl,
    "study-stories": lambda: penalties("kl_study_stories"),
    "shared-base": shared_base,
    "placements": placements,
    "trl": against_trl,
    "trl-real-lengths": against_trl_on_real_lengths,
    "trl-trainers": other_trainers,
    "update-layouts": update_layouts,
    "speed-aims": speed_aims,
    "serve-aims": serve_aims,
    "adapters": adapters,
    "servers": servers,
    "overload": overloaded,
    "thousand": thousand_adapters,
    "replicas": replicas,
    "plan": plan,
    "control-plane": control_plane,
    "on-paper": on_paper,
    "conditions": conditions,
}
"""Name of the marker in README -> what stands there."""


def written(text: str) -> str:
    """`text` with every table made anew. Raises ValueError where a table has no place, or a place no table."""
    found = re.findall(r"<!-- ([\w-]+): written by write_readme\.py -->", text)
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"places {sorted(found)}, tables {sorted(TABLES)}")

    def fill(place: re.Match[str]) -> str:
        return "\n".join([place[1], "", *TABLES[place[2]](), "", "<!-- end -->"])

    return re.sub(r"(<!-- ([\w-]+): written by write_readme\.py -->)\n.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
