"""Suggestions by Optuna's TPE sampler (arXiv:1907.10902), each tried with every seed before the sampler hears its mean score.

A sweep that goes on tells the sampler its results first, and then runs the trials that are left of settings that were suggested
before. No setting is suggested twice. Needs the extra `sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.tune.search import Searcher

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.results import TrialOutcome
from rlhf_ray.sweep.space import Range, Settings, Space, Values, ask, combinations, has_ranges
from rlhf_ray.sweep.trials import setting_name

MOST_ASKED = 100
"""Times that the sampler is asked for a setting that was not tried yet: one that has learnt what is best comes back to it."""


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
    """A setting that is being tried. trial: Optuna's, None for one of an earlier start.  seeds: that are still to be started."""

    trial: Any
    settings: Settings
    seeds: list[int]
    scores: list[float | None] = field(default_factory=list)


class Suggestions(Searcher):
    """A Tune searcher. to_run: trials that are left of earlier starts, and those of settings still to be suggested."""

    def __init__(self, space: Space, config: SweepConfig, record: Record) -> None:
        super().__init__(metric="score", mode="max")
        self.optuna = import_optuna()
        self.space, self.config = space, config
        self.study = self.optuna.create_study(
            direction="maximize", sampler=self.optuna.samplers.TPESampler(seed=config.seeds[0])
        )
        self.current: Suggestion | None = None
        self.running: dict[str, Suggestion] = {}  # by Tune's trial id
        self.to_run = len(record.left()) + record.to_suggest() * len(config.seeds)
        self.known: set[str] = set()  # names of settings
        self.begun: list[Suggestion] = []  # settings of earlier starts with seeds that are left
        groups: dict[str, list[TrialOutcome]] = {}
        for outcome in record.outcomes():
            groups.setdefault(outcome.trial.setting, []).append(outcome)
        for name, group in groups.items():
            self.known.add(name)
            self._take_up(group)

    def suggest(self, trial_id: str) -> Any:
        """The next trial; Tune's mark of the end if the sampler finds no setting that is new."""
        if self.current is None or not self.current.seeds:
            self.current = self.begun.pop(0) if self.begun else self._new()
        if self.current is None:
            return Searcher.FINISHED
        self.running[trial_id] = self.current
        return {"trial": {"settings": self.current.settings, "seed": self.current.seeds.pop(0)}}

    def _new(self) -> Suggestion | None:
        """A setting that was not tried yet: two trials of one folder would be in each other's way, and say nothing new."""
        for _ in range(MOST_ASKED):
            trial = self.study.ask()
            settings = ask(self.space, partial(_value, trial))
            if setting_name(settings) not in self.known:
                break
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)  # which the sampler does not learn from
        else:
            left = iter(()) if has_ranges(self.space) else combinations(self.space)
            found = next((one for one in left if setting_name(one) not in self.known), None)
            if found is None:
                return None
            trial, settings = None, found
        self.known.add(setting_name(settings))
        return Suggestion(trial, settings, list(self.config.seeds))

    def _take_up(self, group: list[TrialOutcome]) -> None:
        """A setting of an earlier start: tell the sampler, or go on with the seeds that are left."""
        ended = [o for o in group if o.status in ("done", "stopped")]
        left = [o.trial.seed for o in group if o not in ended]
        scores = [o.last.get(self.config.metric) for o in ended]
        tried = Suggestion(None, group[0].trial.settings, left, scores)
        if left:
            self.begun.append(tried)
        else:
            self._tell(tried)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        tried = self.running.pop(trial_id)
        tried.scores.append(None if error or not result else result.get("score"))
        if len(tried.scores) == len(self.config.seeds):
            self._tell(tried)

    def _tell(self, tried: Suggestion) -> None:
        known = [score for score in tried.scores if score is not None]
        if known and tried.trial is None:
            self._replay(tried.settings, sum(known) / len(known))
        elif known:
            self.study.tell(tried.trial, sum(known) / len(known))
        elif tried.trial is not None:
            self.study.tell(tried.trial, state=self.optuna.trial.TrialState.FAIL)

    def _replay(self, settings: Settings, score: float) -> None:
        """Tell the sampler of a setting that it has not suggested itself, or at an earlier start."""
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
