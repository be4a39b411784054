"""Where a reward comes from: a trained reward model on token ids, or a Python function on text."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.config.functions import IMPORTED_AS
from rlhf_ray.errors import ConfigError, Interrupted, InvariantError
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.maths.stats import disagreement, ensemble_scores
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.zero3 import MaxOverRanks, padding_batch
from rlhf_ray.rewards.protocol import Reward, RewardInputs, Texts, broken_as_inf
from rlhf_ray.runtime import coroutines
from rlhf_ray.runtime.session import global_generators
from rlhf_ray.storage.run_folder import sha256_file

FIX = "fix the function"
PAUSES_S = (0.5, 2.0)
"""Before a reward function that raised is asked again: a service behind it may be back."""


class ModelReward(Reward):
    """A reward adapter or a reward model of its own, by its role, on token ids.

    batching: how rows are cut into passes.  device: where the models are.  max_over_ranks: see `RewardInputs.sequences`."""

    def __init__(
        self,
        name: str,
        weight: float,
        models: Callable[..., Any],
        role: str,
        batching: Batching,
        device: torch.device,
        max_over_ranks: MaxOverRanks = int,
    ) -> None:
        self.name, self.weight, self.models, self.role = name, weight, models, role
        self.batching, self.device, self.max_over_ranks = batching, device, max_over_ranks

    @torch.no_grad()
    def score(self, inputs: RewardInputs) -> Tensor:
        """The scalar head's output after the reply's last token, on token ids, never re-tokenised."""
        found = torch.zeros(len(inputs))
        for rows, seq in inputs.sequences(self.batching, self.device, self.max_over_ranks):
            found[rows] = self.score_sequences(seq).cpu()
        return broken_as_inf(found)

    def score_sequences(self, seq: Sequences) -> Tensor:
        """f32[M]: of one forward pass, on the models' device."""
        scores: Tensor = self.models("rewards", self.role, seq)
        return scores.float()

    @torch.no_grad()
    def join(self) -> None:
        for _ in range(self.max_over_ranks(0)):
            self.models("rewards", self.role, padding_batch(self.device))


class NormalisedReward(Reward):
    """Another reward, (score - mean) / std by the held-out scores of its training."""

    def __init__(self, reward: Reward, mean: float, std: float) -> None:
        self.reward, self.mean, self.std = reward, mean, std
        self.name, self.weight = reward.name, reward.weight

    def score(self, inputs: RewardInputs) -> Tensor:
        return (self.reward.score(inputs) - self.mean) / self.std

    def join(self) -> None:
        self.reward.join()

    def drift(self, inputs: RewardInputs) -> Tensor | None:
        return self.reward.drift(inputs)


class EnsembleReward(Reward):
    """Several reward models as one, which can score low where they disagree: on replies unlike those that they were trained on.

    members: named <name>/1, <name>/2, ...; all of them apply to every reply.   aggregate, std_coef: see `ensemble_scores`."""

    def __init__(
        self, name: str, weight: float, members: Sequence[Reward], aggregate: str, std_coef: float | None
    ) -> None:
        self.name, self.weight, self.members = name, weight, tuple(members)
        self.aggregate, self.std_coef = aggregate, std_coef

    def score(self, inputs: RewardInputs) -> Tensor:
        return self.parts(inputs)[self.name]

    def parts(self, inputs: RewardInputs) -> dict[str, Tensor]:
        """Also what each member says, and `<name>/std`, how far they are apart: NaN where one of them is broken."""
        each = {member.name: member.score(inputs) for member in self.members}
        scores = torch.stack(list(each.values()))
        found = ensemble_scores(scores, self.aggregate, self.std_coef)
        found = found.masked_fill(~scores.isfinite().all(dim=0), math.inf)  # min would pass over one that is broken
        return {self.name: found, **each, f"{self.name}/std": disagreement(scores)}

    def join(self) -> None:
        for member in self.members:
            member.join()


class FunctionReward(Reward):
    """A Python function with TRL's signature score(prompts, completions, **columns) -> list[float].

    As in TRL, columns holds every column of the data that all rows have, and completion_ids; where the data's own `prompt` is a
    list of messages, prompts are those lists and completions are lists of one assistant message. A function that draws random
    numbers (random, numpy.random, torch) draws the same ones for the same texts, whoever asks it and however often."""

    def __init__(self, name: str, weight: float, spec: str) -> None:
        self.name, self.weight, self.spec = name, weight, spec
        self.function, self.sha256 = load_function(spec)
        # A plain function keeps the thread that it has always had: it may need it (signal.alarm, a connection to sqlite).
        self.waits = inspect.iscoroutinefunction(self.function)

    def score(self, inputs: RewardInputs) -> Tensor:
        return self.score_texts(inputs.texts)

    def score_texts(self, texts: Texts) -> Tensor:
        """f32[rows]: what the function returns, NaN for None, infinite for NaN. If it raises it is asked again, twice.

        Raises Interrupted if it raises to the end, or returns anything but one number per row: it is mended, and the run goes
        on."""
        offered = {"completion_ids": list(texts.completion_ids), **shared_columns(texts)}
        for taken in ("prompts", "completions"):
            offered.pop(taken, None)
        where = f"reward {self.name} ({self.spec})"
        got = self._asked({**spoken(texts), **self._accepted(offered)}, where)
        return checked_rewards(got, len(texts.prompts), where)

    def _asked(self, arguments: dict[str, Any], where: str) -> Any:
        seed = derived_seed(0, "reward", self.name, repr((arguments["prompts"], arguments["completions"])))
        for pause in (*PAUSES_S, None):
            try:
                with global_generators(seed):
                    answer = self.function(**_copied(arguments))
                    return coroutines.run(answer) if inspect.iscoroutine(answer) else answer
            except (Exception, SystemExit) as error:  # its sys.exit() is no end of ours
                if pause is None:
                    code = getattr(inspect.unwrap(self.function), "__code__", None)
                    line = "" if code is None else _line_of(error, code.co_filename)
                    what = f"raised {type(error).__name__} {len(PAUSES_S) + 1} times: {error}{line}"
                    raise Interrupted.at(where, what, fix=FIX) from error
                time.sleep(pause)

    def _accepted(self, offered: dict[str, Any]) -> dict[str, Any]:
        """TRL hands over every column; a function without **kwargs gets those it names."""
        parameters = inspect.signature(self.function).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return offered
        return {name: value for name, value in offered.items() if name in parameters}


def _copied(arguments: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """For the function to change as it likes: the run goes on with its own, and replies to one prompt share one."""
    return {name: [copy.deepcopy(value) for value in values] for name, values in arguments.items()}


def shared_columns(texts: Texts) -> dict[str, list[Any]]:
    """Columns of the data that all rows have, and whose names can be names of arguments."""
    shared = set.intersection(*(set(c) for c in texts.columns)) if texts.columns else set()
    return {name: [c[name] for c in texts.columns] for name in sorted(shared) if name.isidentifier()}


def spoken(texts: Texts) -> dict[str, Any]:
    """prompts and completions as a reward is given them: texts; messages where the data's own `prompt` is a list of them."""
    if texts.columns and all(isinstance(columns.get("prompt"), list) for columns in texts.columns):
        responses = [[{"role": "assistant", "content": text}] for text in texts.completions]
        return {"prompts": [columns["prompt"] for columns in texts.columns], "completions": responses}
    return {"prompts": list(texts.prompts), "completions": list(texts.completions)}


def checked_rewards(got: Any, rows: int, where: str, fix: str = FIX) -> Tensor:
    """f32[rows], NaN for None (the reward does not apply to this reply, as in TRL), infinite for a NaN, which is a fault: a made-up
    number would train on noise. Raises Interrupted for anything else.

    Text and dicts are refused although numbers can be read out of them: nobody can know which are meant."""
    if isinstance(got, (str, bytes, Mapping, Set)):
        raise _no_numbers(where, type(got).__name__, fix)
    try:
        answers = list(got)
    except Exception as error:
        raise _no_numbers(where, type(got).__name__, fix) from error
    values = [_reward(value, row, where, fix) for row, value in enumerate(answers)]
    if len(values) != rows:
        raise Interrupted.at(where, "returned the wrong number of rewards", str(rows), str(len(values)), fix)
    return torch.tensor(values, dtype=torch.float32)


def _reward(value: Any, row: int, where: str, fix: str) -> float:
    if isinstance(value, (str, bytes)):
        raise _no_numbers(where, f"{value[:40]!r} for reply {row}", fix)
    try:
        number = math.nan if value is None else float(value)
    except OverflowError as error:
        raise _no_numbers(where, f"{type(value).__name__} over the largest float for reply {row}", fix) from error
    except Exception as error:
        raise _no_numbers(where, f"{type(value).__name__} for reply {row}", fix) from error
    return math.inf if value is not None and math.isnan(number) else number


def _no_numbers(where: str, got: str, fix: str) -> Interrupted:
    return Interrupted.at(where, "did not return a list of numbers", "list[float]", got, fix)


def none_broken(values: Tensor, where: str) -> Tensor:
    """`values`, f32[rows], NaN where the reward does not apply. Raises InvariantError naming the first row that is infinite."""
    bad = torch.isinf(values).nonzero().flatten().tolist()
    if bad:
        what = f"reward of row {bad[0]} is not finite ({len(bad)} of {len(values)})"
        raise InvariantError.at(where, what, got=str(float(values[bad[0]])))
    return values


def load_function(spec: str) -> tuple[Callable[..., Any], str]:
    """The function of `file.py:name` or `pkg.mod:name`, and the sha256 of its file. Raises ConfigError.

    A reward function is code, as trusted as the job file that names it."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError.at("rewards.function", "no such file", "a Python file", place)
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"`
        raise ConfigError.at(
            "rewards.function", f"importing {place} failed: {type(error).__name__}: {error}{_line_of(error, place)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v)) or "none"
        raise ConfigError.at("rewards.function", f"{place} has no function {name}", f"one of {names}", spec)
    return function, sha256_file(Path(inspect.getfile(module)))


def _line_of(error: BaseException, file: str) -> str:
    """` (file:line)`, the last place in `file` that the error came through, of a module where it was raised; empty if there is
    none."""
    frames = traceback.extract_tb(error.__traceback__)
    if file.endswith(".py"):
        own = [frame for frame in frames if os.path.realpath(frame.filename) == os.path.realpath(file)]
    else:
        own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{IMPORTED_AS}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"not a Python module: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
