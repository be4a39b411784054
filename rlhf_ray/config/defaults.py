"""What a job leaves open, where the default is no constant: it follows from another field, or was another one in an older version.

A run folder keeps `defaults_version`. What was begun under older defaults is finished under them, whichever version finishes it:
their values stand here, and nowhere else. Whoever changes a default counts VERSION up and adds the old one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from rlhf_ray.config.sections import MAX_TEMPERATURE, MIN_TEMPERATURE, VALUE_LEARNING_RATE, to_float

VERSION = 4
CONTIGUOUS_ROWS_SINCE = 3
"""Until then forward passes took rows in the order in which they came, prompts padded on the left. Sums in another order have other
last bits, so what was begun so ends so."""
PACKED_ROWS_SINCE = 4
"""Until then rows of a forward pass lay side by side, the shorter ones padded on the right."""
WHOLE_GROUPS_SINCE = 4
"""Until then a chunk could end inside a group of num_generations replies."""
REWARD_GATE_SINCE = 3
"""From then on PPO asks whether a reward run is better than chance."""
CHAT_RESPONSE_LENGTH = 512
ROOM_FOR_CHAT = 1024
"""max_length from which on a reply to a chat template may take CHAT_RESPONSE_LENGTH."""
EVAL_MAX_ROWS = 256
"""Held-out prompts of an evaluation in PPO, if the job does not say: replies are sampled to all of them."""

VERSION_1: dict[str, Any] = {
    "adam_epsilon": 1e-5,
    "cliprange_value": 0.2,
    "value.warmup_steps": 0,
    "response_length": 128,
    "max_prompt_length": None,
}
"""Constants that were other ones in version 1, in every stage that has the field. `_value_rate` and `_reward_runs_as_they_are` have
the rest."""

Values = Mapping[str, Any]
UNSET: Any = object()


def _whiten_advantages(values: Values) -> Any:
    return False if values.get("advantage_estimator") in ("rloo", "grpo") else UNSET


def _eval_temperature(values: Values) -> Any:
    sampling = _plain(values.get("eval_sampling", {}))
    heat: Any = values.get("temperature")
    samples = isinstance(sampling, dict) and sampling.get("do_sample", True) is True
    return heat if samples and _is_positive(heat) and MIN_TEMPERATURE <= heat <= MAX_TEMPERATURE else UNSET


def _value_learning_rate(values: Values) -> Any:
    return _times_policy_rate(values, _value_rate(values.get("defaults_version", VERSION)))


def _value_rate(version: Any) -> float:
    return 1.0 if version == 1 else VALUE_LEARNING_RATE


def _times_policy_rate(values: Values, factor: float) -> Any:
    rate: Any = values.get("learning_rate")
    if values.get("advantage_estimator", "gae") != "gae" or not _is_positive(rate):
        return UNSET
    return factor * rate if _is_positive(factor * rate) else rate


def _response_length(values: Values) -> Any:
    limit = values.get("max_length")
    fits = limit is None or (isinstance(limit, int) and limit >= ROOM_FOR_CHAT)
    return CHAT_RESPONSE_LENGTH if values.get("template") == "chat" and fits else UNSET


def _max_prompt_length(values: Values) -> Any:
    return UNSET if values.get("max_length") is None else None


def _allow_chance_rewards(values: Values) -> Any:
    """Jobs of versions without the gate go on without it."""
    version = values.get("defaults_version", VERSION)
    return True if isinstance(version, int) and version < REWARD_GATE_SINCE else UNSET


FOLLOWS: dict[str, Callable[[Values], Any]] = {
    "whiten_advantages": _whiten_advantages,
    "eval_sampling.temperature": _eval_temperature,
    "value.learning_rate": _value_learning_rate,
    "response_length": _response_length,
    "max_prompt_length": _max_prompt_length,
    "allow_chance_rewards": _allow_chance_rewards,
}
"""Field -> its default beside the job's other values; UNSET where it is the constant that the field's class says."""


def filled_in(cls: type[BaseModel], values: Values) -> tuple[dict[str, Any], list[str]]:
    """`values` of a job of class `cls`, with the defaults that are no constants; and the names (dotted) of those.

    What is of a wrong type is left for its field to refuse."""
    found, names = dict(values), []

    def offer(name: str, default: Any) -> None:
        if default is not UNSET and _put(found, name, default):
            names.append(name)

    is_old = found.get("defaults_version") == 1
    rate = cls.model_fields.get("learning_rate")
    known = found if rate is None else {"learning_rate": rate.default, **found}
    if is_old:
        _reward_runs_as_they_are(found)
    for name, value in VERSION_1.items() if is_old else ():
        if name.partition(".")[0] in cls.model_fields:
            offer(name, value)
    for name, default in FOLLOWS.items():
        if name.partition(".")[0] in cls.model_fields:
            offer(name, default(known))
    return found, names


def follows(config: BaseModel, name: str) -> bool:
    """Whether field `name` (dotted) of a job has a default that follows from another field."""
    section, _, inner = name.rpartition(".")
    return name in FOLLOWS and inner not in (getattr(config, section) if section else config).model_fields_set


def usual(config: Any, name: str) -> Any:
    """What field `name` (dotted) of a job is, where it is not the constant of its class, if nobody sets it; UNSET if it is that.

    Of the value model also where the job has none: it was written out when it had one."""
    if name == "value.learning_rate":
        return _times_policy_rate({"learning_rate": config.learning_rate}, _value_rate(config.defaults_version))
    return VERSION_1.get(name, UNSET) if config.defaults_version == 1 else UNSET


def _reward_runs_as_they_are(found: dict[str, Any]) -> None:
    """Version 1 normalised a reward only where the job said so."""
    rewards = found.get("rewards")
    if isinstance(rewards, (list, tuple)):
        plain = [_plain(reward) for reward in rewards]
        is_open = [isinstance(r, dict) and r.get("run") and r.get("normalize") is None for r in plain]
        found["rewards"] = type(rewards)({**r, "normalize": False} if o else r for r, o in zip(plain, is_open))


def _put(found: dict[str, Any], name: str, value: Any) -> bool:
    """Set field `name` (dotted) of `found` if it is not there; a value's learning rate also if it is null. True if it was set."""
    section, _, inner = name.rpartition(".")
    if not section:
        if name in found:
            return False
        found[name] = value
        return True
    own = _plain(found.get(section, {}))
    if not isinstance(own, dict) or (inner in own and not (name == "value.learning_rate" and own[inner] is None)):
        return False
    found[section] = {**own, inner: value}
    return True


def _plain(value: Any) -> Any:
    """A section as the fields that are set in it."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _is_positive(value: Any) -> bool:
    value = to_float(value)
    return isinstance(value, float) and value > 0 and math.isfinite(value)
