"""Suggestions by Optuna's TPE sampler (arXiv:1907.10902), each tried with every seed before the sampler hears its mean score.

Results of a sweep that goes on are told to the sampler first. Needs the extra `sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.tune.search import Searcher

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.results import settings_of
from rlhf_ray.sweep.space import Range, Settings, Space, Values, ask


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError.at(
            "search", "optuna is not installed", "grid or random", "optuna", "pip install 'rlhf_ray[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass
class Suggestion:
    """A setting that is being tried. trial: Optuna's."""

    trial: Any
    settings: Settings
    seeds: list[int]
    scores: list[float | None] = field(default_factory=list)


class Suggestions(Searcher):
    """A Tune searcher. done: trials of earlier starts that count towards num_samples x seeds."""

    def __init__(self, space: Space, config: SweepConfig, record: Record) -> None:
        super().__init__(metric="score", mode="max")
        self.optuna = import_optuna()
        self.space, self.config = space, config
        self.study = self.optuna.create_study(
            direction="maximize", sampler=self.optuna.samplers.TPESampler(seed=config.seeds[0])
        )
        self.current: Suggestion | None = None
        self.running: dict[str, Suggestion] = {}  # by Tune's trial id
        self.done = 0
        for setting in settings_of(record.outcomes(), config.metric):
            self._replay(setting.settings, setting.score)
            self.done += len(setting.outcomes)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.current is None or not self.current.seeds:
            trial = self.study.ask()
            settings = ask(self.space, lambda name, domain: _value(trial, name, domain))
            self.current = Suggestion(trial, settings, list(self.config.seeds))
        self.running[trial_id] = self.current
        return {"trial": {"settings": self.current.settings, "seed": self.current.seeds.pop(0)}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        tried = self.running.pop(trial_id)
        tried.scores.append(None if error or not result else result.get("score"))
        if len(tried.scores) < len(self.config.seeds):
            return
        known = [score for score in tried.scores if score is not None]
        if known:
            self.study.tell(tried.trial, sum(known) / len(known))
        else:
            self.study.tell(tried.trial, state=self.optuna.trial.TrialState.FAIL)

    def _replay(self, settings: Settings, score: float) -> None:
        """Tell the sampler of a setting that an earlier start tried."""
        given = iter(settings.values())
        labels: dict[str, Any] = {}

        def note(name: str, domain: Values | Range) -> Any:
            labels[name] = (next(given), _distribution(self.optuna, domain))
            return labels[name][0]

        ask(self.space, note)
        self.study.add_trial(
            self.optuna.trial.create_trial(
                params={n: _plain(v, d) for n, (v, d) in labels.items()},
                distributions={n: d for n, (_, d) in labels.items()},
                value=score,
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the run folders are what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep resumes from its run folders")


def _distribution(optuna: Any, domain: Values | Range) -> Any:
    kinds = optuna.distributions
    if isinstance(domain, Values):
        return kinds.CategoricalDistribution([str(v) for v in domain.values])
    if domain.kind == "randint":
        return kinds.IntDistribution(int(domain.low), int(domain.high))
    return kinds.FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _plain(value: Any, distribution: Any) -> Any:
    return str(value) if type(distribution).__name__ == "CategoricalDistribution" else value


def _value(trial: Any, name: str, domain: Values | Range) -> Any:
    if isinstance(domain, Values):  # values may be lists or null, which Optuna cannot hold: their texts stand for them
        texts = [str(v) for v in domain.values]
        return domain.values[texts.index(trial.suggest_categorical(name, texts))]
    if domain.kind == "randint":
        return trial.suggest_int(name, int(domain.low), int(domain.high))
    return trial.suggest_float(name, domain.low, domain.high, log=domain.kind == "loguniform")
