"""Metric names with their unit and meaning, and the writers of metrics.jsonl, samples.jsonl, TensorBoard and W&B.

A name is in `METRICS`, or falls under one of its patterns (`reward/*`); a name the table does not hold is refused, so that the
table stays complete. metrics.jsonl is the truth: one JSON object per line, `{"step": 12, "reward/mean": 0.71, ...}`, floats
written so that they read back bit for bit. Trackers get copies.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import uuid
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rlhf_ray.errors import ArtifactError, InvariantError, ResourceError
from rlhf_ray.json_lines import JsonLines
from rlhf_ray.ray_metrics import RunGauges, on_ray

NON_DETERMINISTIC = ("time", "memory", "faults")


@dataclass(frozen=True)
class Metric:
    """unit and meaning for people.  deterministic: repeats bit for bit when a run is resumed.  trl: TRL's name for it, or ""."""

    unit: str
    meaning: str
    deterministic: bool = True
    trl: str = ""


# Name, unit, meaning, and TRL's name where it has one (PPOTrainer, SFTTrainer, RewardTrainer).
_ROWS: tuple[tuple[str, ...], ...] = (
    # Rollout: reward
    ("reward/mean", "reward", "weighted sum of rewards, raw: before baseline, scaling, clip, eos penalty", "objective/scores"),
    ("reward/std", "reward", "standard deviation of the raw reward over the step's replies"),
    ("reward/min", "reward", "lowest raw reward of the step"),
    ("reward/max", "reward", "highest raw reward of the step"),
    ("reward/score", "reward", "mean score as PPO sees it: after baseline, scaling, clip, eos penalty"),
    ("reward/shaped", "reward", "mean over replies of score minus coefficient times KL penalty", "objective/rlhf_reward"),
    ("reward/*", "reward", "mean of one reward source, before its weight; of an ensemble also of each member, and of their std"),
    # Rollout: distance from the reference
    ("kl/k1_per_response", "nats", "mean over replies of the summed log p - log q (k1), at the old policy", "objective/kl"),
    ("kl/start_k1_per_response", "nats", "the same against the policy that the run started from (ref_model_sync_steps)"),
    ("kl/reference_step", "steps", "step after which the reference was the policy; 0: the policy that the run started from"),
    ("kl/k3_per_response", "nats", "k1_per_response with k3 = exp(-d) - 1 + d, which is never negative"),
    ("kl/k1_per_token", "nats", "k1, mean over reply tokens"),
    ("kl/k3_per_token", "nats", "k3, mean over reply tokens"),
    ("kl/penalty_per_response", "nats", "the penalty that is active, summed over tokens, before the coefficient"),
    ("kl/coef", "", "coefficient of the KL penalty during the step"),
    ("kl/clamped_share", "share", "tokens more than 20 nats less likely than under the reference, where k3 is a straight line"),
    # Rollout: replies
    ("response/length", "tokens", "mean reply length, eos included"),
    ("response/length_max", "tokens", "longest reply of the step"),
    ("response/finished", "share", "replies that ended with a stop token"),
    ("response/repetition", "share", "of a reply's pairs of neighbouring tokens, those that it has said before; mean over replies"),
    ("response/retokenised_drift", "share", "replies that a reward model with its own tokenizer does not read as the ids sampled"),
    ("sampler/logprob_difference", "nats", "mean absolute difference of the sampler's and learner's log-probabilities"),
    ("sampler/probe_difference", "nats", "the same for the adapter that sampled, on the rows that were probed"),
    ("sampler/staleness", "updates", "steps of learning between the adapter that sampled and the one that learns"),
    (
        "sampler/importance_weight",
        "",
        "mean weight of a token's loss (max_staleness 1, or rollout.engine vllm)",
        "sampling/importance_sampling_ratio/mean",
    ),
    ("sampler/importance_clipped", "share", "tokens whose weight was cut to importance_sampling_cap"),
    ("reference/logprob_difference", "nats", "largest difference between policy and reference before the first update"),
    ("rollout/replies", "", "replies sampled in the step"),
    ("tokens/generated", "tokens", "reply tokens sampled in the step"),
    ("tokens/total", "tokens", "reply tokens sampled since the start of the run"),
    ("tokens/train", "tokens", "tokens that carried loss since the start of the run", "num_tokens"),
    # Update
    ("ratio/first_minibatch_max_deviation", "", "largest |ratio - 1| in the first minibatch; 0 unless something is wrong"),
    ("ratio/mean", "", "mean of new over old probability, over tokens", "val/ratio"),
    ("ratio/max", "", "largest ratio of any token and minibatch"),
    ("policy/clip_fraction", "share", "tokens whose ratio was clipped", "policy/clipfrac_avg"),
    ("policy/approx_kl", "nats", "k3 of the new against the old policy, mean over tokens", "policy/approxkl_avg"),
    ("policy/entropy", "nats", "entropy per token over the full vocabulary", "policy/entropy_avg"),
    ("policy/epochs", "", "passes over the rollout; fewer than num_ppo_epochs if target_kl ended them"),
    ("policy/skipped_updates", "", "minibatches skipped because a gradient was not finite"),
    ("update/real_token_share", "share", "tokens of prompts and replies, of all that the update's passes compute; the rest pads"),
    ("policy/adapter_norm", "", "norm of the adapter's weight update, all modules"),
    ("loss/policy", "", "clipped policy loss, mean over tokens", "loss/policy_avg"),
    ("loss/value", "", "value loss, mean over tokens", "loss/value_avg"),
    ("loss/kl", "nats", "KL penalty in the loss (use_kl_loss), before the coefficient, mean over tokens"),
    ("loss/ptx", "nats", "supervised loss in the policy's (ptx_coef), before the coefficient, mean over learnt tokens"),
    ("value/explained_variance", "", "1 - variance of (returns - values) over variance of returns"),
    ("value/mean", "reward", "mean of the value model's values"),
    ("value/clip_fraction", "share", "tokens whose value was clipped", "val/clipfrac_avg"),
    ("returns/mean", "reward", "mean return over tokens"),
    ("returns/std", "reward", "standard deviation of the returns"),
    ("advantage/mean", "reward", "mean advantage before whitening"),
    ("advantage/equal_groups", "share", "prompts whose replies all scored the same", "frac_reward_zero_std"),
    ("advantage/std", "reward", "standard deviation of the advantage before whitening"),
    ("alarm/*", "", "1 in steps with this sign of over-optimisation (alarm)"),
    ("grad_norm/policy", "", "norm of the policy's gradient before clipping"),
    ("grad_norm/value", "", "norm of the value model's gradient before clipping"),
    ("lr/policy", "", "learning rate of the policy", "lr"),
    ("lr/value", "", "learning rate of the value model"),
    ("sync/bytes", "bytes", "size of the adapter published to the samplers"),
    # SFT, DPO and reward modelling
    ("loss", "nats", "training loss: mean over tokens (SFT) or pairs (DPO, reward)", "loss"),
    ("rewards/chosen", "nats", "DPO: beta (log p - log p of the reference) of chosen replies, training pairs", "rewards/chosen"),
    ("rewards/rejected", "nats", "DPO: the same of rejected replies", "rewards/rejected"),
    ("rewards/accuracies", "share", "DPO: training pairs whose chosen reply has the higher of these rewards", "rewards/accuracies"),
    ("rewards/margins", "nats", "DPO: mean of chosen minus rejected of these rewards, training pairs", "rewards/margins"),
    ("logps/chosen", "nats", "DPO: log-probability of chosen replies, summed over their tokens, training pairs", "logps/chosen"),
    ("logps/rejected", "nats", "DPO: log-probability of rejected replies, training pairs", "logps/rejected"),
    ("accuracy", "share", "training pairs whose chosen reply scores higher", "accuracy"),
    ("margin", "reward", "mean score of chosen minus rejected, training pairs", "margin"),
    ("learning_rate", "", "learning rate", "learning_rate"),
    ("epoch", "epochs", "passes over the training rows so far", "epoch"),
    ("grad_norm", "", "norm of the gradient before clipping", "grad_norm"),
    ("reload_difference", "", "largest difference between outputs of the trained adapter and of the saved one, read back"),
    ("skipped_updates", "", "steps skipped since the last logged one because loss or gradient was not finite"),
    # Evaluation on held-out prompts or pairs
    ("eval/loss", "nats", "held-out loss", "eval_loss"),
    ("eval/perplexity", "", "exp of the held-out loss"),
    ("eval/accuracy", "share", "held-out pairs whose chosen reply scores higher", "eval_accuracy"),
    ("eval/accuracy_low", "share", "lower end of the 95% Wilson interval of the accuracy"),
    ("eval/accuracy_high", "share", "upper end of the 95% Wilson interval of the accuracy"),
    ("eval/margin", "reward", "mean score of chosen minus rejected, held-out pairs", "eval_margin"),
    ("eval/rewards/chosen", "nats", "DPO: rewards/chosen of held-out pairs", "eval_rewards/chosen"),
    ("eval/rewards/rejected", "nats", "DPO: rewards/rejected of held-out pairs", "eval_rewards/rejected"),
    ("eval/rewards/margins", "nats", "DPO: rewards/margins of held-out pairs", "eval_rewards/margins"),
    ("eval/logps/chosen", "nats", "DPO: logps/chosen of held-out pairs", "eval_logps/chosen"),
    ("eval/logps/rejected", "nats", "DPO: logps/rejected of held-out pairs", "eval_logps/rejected"),
    ("eval/label_positive_rate", "share", "held-out pairs whose first reply is the chosen one"),
    ("eval/positive_rate", "share", "held-out pairs whose first reply scores higher"),
    ("eval/true_positive_rate", "share", "of pairs whose first reply is chosen, those where it scores higher"),
    ("eval/false_positive_rate", "share", "of pairs whose second reply is chosen, those where the first scores higher"),
    ("eval/length_correlation", "", "correlation of score and reply length: how much the model pays for length"),
    ("eval/calibration_error", "share", "mean gap between predicted and observed preference, ten bins"),
    ("eval/longer_wins", "share", "held-out pairs whose longer reply scores higher"),
    ("eval/accuracy_shorter_chosen", "share", "of held-out pairs whose shorter reply is chosen, those where it scores higher"),
    ("eval/accuracy_longer_chosen", "share", "of held-out pairs whose longer reply is chosen, those where it scores higher"),
    ("eval/accuracy_by/*", "share", "accuracy on the held-out pairs of one group (column group of the data)"),
    ("eval/reward", "reward", "raw reward on held-out prompts"),
    ("eval/reward_se", "reward", "standard error of eval/reward"),
    ("eval/reward/*", "reward", "one reward source on held-out prompts, before its weight"),
    ("eval/reward_se/*", "reward", "standard error of eval/reward/*"),
    ("eval/kl_k1_per_response", "nats", "k1 per reply on held-out prompts, against the policy that the run started from"),
    ("eval/kl_k3_per_response", "nats", "k3 per reply on held-out prompts"),
    ("eval/length", "tokens", "mean reply length on held-out prompts"),
    ("eval/finished", "share", "held-out replies that ended with a stop token"),
    ("eval/entropy", "nats", "entropy per token on held-out prompts"),
    ("eval/rows", "", "held-out rows evaluated"),
    # The same on held-out prompts that chose nothing (confirm_held_out)
    ("eval/confirm/reward", "reward", "raw reward on the held-out prompts that confirm"),
    ("eval/confirm/reward_se", "reward", "standard error of eval/confirm/reward"),
    ("eval/confirm/reward/*", "reward", "one reward source on the held-out prompts that confirm, before its weight"),
    ("eval/confirm/reward_se/*", "reward", "standard error of eval/confirm/reward/*"),
    ("eval/confirm/kl_k1_per_response", "nats", "k1 per reply on the held-out prompts that confirm"),
    ("eval/confirm/kl_k3_per_response", "nats", "k3 per reply on the held-out prompts that confirm"),
    ("eval/confirm/length", "tokens", "mean reply length on the held-out prompts that confirm"),
    ("eval/confirm/finished", "share", "replies that ended with a stop token, on the held-out prompts that confirm"),
    ("eval/confirm/rows", "", "held-out rows that confirm"),
    # Comparison of policies: one metric per policy, the policy's name after the last slash
    ("reward_applies/*", "share", "replies that one reward has a number for, where that is not all"),
    ("reward_se/*", "reward", "standard error of a policy's reward"),
    ("true_reward/*", "reward", "a policy's score under the bundled task's own rule, which no training stage sees"),
    ("true_reward_se/*", "reward", "standard error of a policy's true reward"),
    ("win_rate/*", "share", "share of prompts on which a policy beats the baseline; a draw counts half"),
    ("win_rate_se/*", "share", "standard error of a policy's win rate"),
    ("win_rate_low/*", "share", "lower end of the win rate's 95% interval (bootstrap over prompts where it is skewed)"),
    ("win_rate_high/*", "share", "upper end of the win rate's 95% interval"),
    ("win_rate_length_controlled/*", "share", "win rate at equal length: a logistic line through the length difference, at 0"),
    ("win_rate_length_controlled_se/*", "share", "standard error of the win rate at equal length"),
    ("win_rate_by/*", "share", "win rate by a judge that does not decide: judge, then policy"),
    ("win_rate_by_se/*", "share", "its standard error"),
    ("win_rate_by_length_controlled/*", "share", "the same at equal length"),
    ("best_of/*", "", "replies of which the best answers, to each prompt"),
    ("kl_bound/*", "nats", "ln n - (n - 1) / n: best-of-n is at most this far (KL) from the policy that it draws from"),
    ("draws/*", "share", "prompts on which a policy and the baseline draw"),
    ("score_difference/*", "reward", "the judge's score of a policy minus the baseline's, mean over prompts (paired)"),
    ("score_difference_se/*", "reward", "standard error of the paired score difference"),
    ("score_difference_low/*", "reward", "lower end of its 95% interval (paired bootstrap over prompts where it is skewed)"),
    ("score_difference_high/*", "reward", "upper end of its 95% interval"),
    ("kl_k1_per_response/*", "nats", "k1 of a policy against the reference, per reply"),
    ("kl_k1_per_response_se/*", "nats", "standard error of a policy's k1 per reply"),
    ("kl_k3_per_response/*", "nats", "k3 of a policy against the reference, per reply"),
    ("kl_k3_per_response_se/*", "nats", "standard error of a policy's k3 per reply"),
    ("length/*", "tokens", "mean reply length of a policy"),
    ("finished/*", "share", "a policy's replies that ended with a stop token"),
    ("distinct_2/*", "share", "different word pairs among distinct_2_pairs drawn from a policy's replies, mean over all draws"),
    ("distinct_2_pairs/*", "", "word pairs at which distinct_2 is taken: 1,000, or the fewest that a policy of the evaluation has"),
    ("rows/*", "", "prompts a policy was evaluated on"),
    ("dropped/*", "", "prompts left out of an evaluation because they are too long"),
    # Bookkeeping
    ("data/*", "", "rows read, used, dropped or cut"),
    ("time/generate", "s", "sampling replies; under max_staleness 1, what the learner still waited for them"),
    ("time/score", "s", "rewards and reference log-probabilities"),
    ("time/evaluate", "s", "evaluation on held-out rows"),
    ("time/update", "s", "log-probabilities, values and optimizer steps"),
    ("time/publish", "s", "handing the new adapter to the samplers"),
    ("time/checkpoint", "s", "writing a checkpoint"),
    ("time/step", "s", "the whole step"),
    ("time/idle_generator", "share", "of the step in which generators had nothing to do (placement: split)"),
    ("time/idle_scorer", "share", "of the step in which scorers had nothing to do (placement: split)"),
    ("time/idle_learner", "share", "of the step in which the learner waited for rollouts and scores (placement: split)"),
    ("time/*", "s", "wall-clock time"),
    ("memory/process_peak", "bytes", "largest resident memory of rank 0 so far"),
    ("memory/device_peak", "bytes", "largest memory that tensors took on rank 0's GPU so far"),
    ("memory/generator_process_peak", "bytes", "largest resident memory of any generator so far (placement: split)"),
    ("memory/scorer_process_peak", "bytes", "largest resident memory of any scorer so far (placement: split)"),
    ("memory/*", "bytes", "memory of a process or device"),
    ("faults/retries", "", "chunks done again in the step, because the actor that had them was lost"),
    ("faults/*", "", "faults met and survived"),
)  # fmt: skip

METRICS: dict[str, Metric] = {
    name: Metric(unit, meaning, name.split("/")[0] not in NON_DETERMINISTIC, *trl)
    for name, unit, meaning, *trl in _ROWS
}
_PATTERNS = tuple(name[:-1] for name in METRICS if name.endswith("*"))


def describe(name: str) -> Metric:
    """The table's entry for `name`: its own, or that of the pattern it falls under. Raises KeyError."""
    if "*" in name:
        raise KeyError(name)
    if name in METRICS:
        return METRICS[name]
    for prefix in _PATTERNS:
        if name.startswith(prefix) and len(name) > len(prefix):
            return METRICS[prefix + "*"]
    raise KeyError(name)


def held_out_reward(watch: str | None) -> str:
    """The metric that says how good a policy is: of the reward that watches, which PPO does not maximise, if the job names one."""
    return f"eval/reward/{watch}" if watch is not None else "eval/reward"


START_KL = "kl/start_k1_per_response"


def start_kl(names: Container[str]) -> str:
    """The metric that says how far the policy is from the one that the run started from, which is the reference unless it is reset.

    names: of the metrics that there are."""
    return START_KL if START_KL in names else "kl/k1_per_response"


_REWARD = re.compile(r"(eval/(?:confirm/)?reward)(.*)")


def standard_error_name(metric: str) -> str:
    """`eval/reward/judge` -> `eval/reward_se/judge`, and so for `eval/confirm/`."""
    found = _REWARD.fullmatch(metric)
    return f"{found[1]}_se{found[2]}" if found else f"{metric}_se"


def confirm_name(name: str) -> str:
    """`eval/reward` -> `eval/confirm/reward`: the same figure on the held-out prompts that chose nothing."""
    return f"eval/confirm/{name.removeprefix('eval/')}"


def clean(name: str, value: Any, step: int | None = None) -> float:
    """`value` (number, numpy scalar or tensor of one element) as a finite float.

    Raises InvariantError, which names the metric and the step, if it is not a number, not finite, or not in the table.
    """
    where = name if step is None else f"step {step}: {name}"
    try:
        describe(name)
    except KeyError:
        raise InvariantError.at(where, "metric without an entry in rlhf_ray/metrics.py", fix="add its row") from None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InvariantError.at(where, "not a number", "one finite number", f"{value!r:.80}") from None
    if not math.isfinite(number):
        raise InvariantError.at(where, "not finite", "a finite number", str(number))
    return number


def figure(value: float) -> str:
    """A number for people: about three significant digits, thousands with separators, exponents at the far ends."""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    if 999.5 <= size < 1e9:
        return f"{value:,.0f}"
    if size < 0.0005 or size >= 1e9:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = next((d for bound, d in ((99.5, 0), (9.95, 1), (0.995, 2), (0.00995, 3)) if size >= bound), 4)
    return f"{value:.{decimals}f}"


class MetricsWriter:
    """Writes `RUN/metrics.jsonl` and copies to the trackers of `report_to` ("tensorboard", "wandb"); on Ray to its port, too.

    Raises ResourceError at once if W&B is asked for and not installed. Only one process of a run may hold a writer.
    """

    def __init__(self, run_dir: str | Path, report_to: Sequence[str] = (), run_name: str | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.run_name = run_name or self.run_dir.resolve().name
        self._trackers: list[Any] | None = None
        self._report_to = tuple(report_to)
        if "wandb" in self._report_to and importlib.util.find_spec("wandb") is None:
            raise ResourceError.at("report_to", "wandb is not installed", fix="pip install 'rlhf_ray[wandb]'")
        self._lines = JsonLines(self.run_dir / "metrics.jsonl")

    @property
    def bytes(self) -> int:
        """Length of metrics.jsonl, for the checkpoint."""
        return self._lines.bytes

    def resume_at(self, length: int, step: int) -> str:
        """Cut metrics.jsonl to the length that the checkpoint of `step` stored, so that no step is there twice.

        Returns what is to be warned of, "" for nothing."""
        return self._lines.resume_at(length, step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Append the metrics of `step`, cleaned, and return them. Raises InvariantError and then writes nothing."""
        row = {name: clean(name, value, step) for name, value in metrics.items()}
        self._lines.append({"step": int(step), **row})
        if self._trackers is None:
            self._trackers = [_TRACKERS[name](self.run_dir, self.run_name, int(step)) for name in self._report_to]
            self._trackers += [RunGauges(self.run_name)] if on_ray() else []
        for tracker in self._trackers:
            tracker.write(int(step), row)
        return row

    def close(self) -> None:
        self._lines.close()
        for tracker in self._trackers or ():
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SamplesWriter(JsonLines):
    """Writes `RUN/samples.jsonl`: one reply per line with `step`, `prompt`, `reply` and its figures (reward, kl, length, ...)."""

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(Path(run_dir) / "samples.jsonl")

    def write(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append replies. Figures may be Python numbers or anything `float` takes; they must be finite (InvariantError)."""
        for sample in samples:
            self.append({"step": int(step), **{name: _plain(name, value, step) for name, value in sample.items()}})


def _plain(name: str, value: Any, step: int) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {k: _plain(f"{name}.{k}", v, step) for k, v in value.items()}
    number = float(value)
    if not math.isfinite(number):
        raise InvariantError.at(f"step {step}: samples: {name}", "not finite", "a finite number", str(number))
    return number


class _TensorBoard:
    def __init__(self, run_dir: Path, run_name: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of a run that was killed and resumed from an earlier step are hidden from first_step on.
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, run_name: str, first_step: int) -> None:
        import wandb

        # The id lives in the run folder, so a resumed run goes on in the same W&B run, and a fresh one never does.
        (run_dir / "wandb").mkdir(exist_ok=True)
        id_file = run_dir / "wandb" / "run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run: Any = wandb.init(
            name=run_name, id=id_file.read_text(encoding="utf-8").strip(), dir=str(run_dir), resume="allow"
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, samples.jsonl or results.jsonl, in order; a torn last line, as a kill leaves it, is left out.

    Raises ArtifactError if there is no file, or if another line is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise ArtifactError.at(str(path), "cannot be read", got=e.strerror or str(e)) from None
    filled = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, line in filled:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number != filled[-1][0]:
            raise ArtifactError.at(f"{path}:{number}", "not a JSON object", got=f"{line[:60]!r}")
    return rows
