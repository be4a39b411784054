"""What goes into a decode engine and what comes out: the interface that the sampler implements and another engine can."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from rlhf_ray.config.sections import MAX_TEMPERATURE, MIN_TEMPERATURE
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.sampler.logits import LogitsOptions


@dataclass(frozen=True)
class DecodeRequest:
    """One reply to make.

    prompt_ids: the prompt's token ids, without padding.   row_seed: 64 bits; token t uses the uniform of (row_seed, t).
    max_new_tokens: the reply is cut off after this many.   stop_ids: the reply ends after the first of these; may be empty.
    temperature: divides the logits, above 0; for greedy rows it only scales the reported log-probabilities.
    top_k: keep the k likeliest tokens, 0 keeps all.   top_p: then keep the smallest set whose probability reaches p, 1 keeps all.
    greedy: take the likeliest token instead of sampling.   adapter: a name known to the model, None for the base, adapters off.
    begun: the reply's first tokens, from an attempt that broke off: the row goes on behind them, with the same random numbers.
    min_p: keep tokens at least p times as likely as the likeliest, before top_k; 0 keeps all.   logits: what is done to logits
    before all that.   raw_logprobs: report log-probabilities at temperature 1.   top_logprobs: list so many likeliest tokens.
    """

    prompt_ids: tuple[int, ...]
    row_seed: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    adapter: str | None = None
    begun: tuple[int, ...] = ()
    min_p: float = 0.0
    logits: LogitsOptions | None = None
    raw_logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class DecodeResult:
    """One reply. token_ids: a stop id included, if one was sampled. logprobs: float32 precision, of these tokens under the whole
    distribution at the request's temperature (top-k and top-p not applied). finished: a stop id was sampled."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class DecodeEvent(NamedTuple):
    """One token of one row. end: None while the row goes on; "stop" or "length" with its last token; "error" if its logits were
    not finite: then the row is over and the token means nothing. top: (id, log-probability) of the likeliest tokens, if the
    request lists them."""

    request_id: int
    token_id: int
    logprob: float
    end: Literal["stop", "length", "error"] | None
    top: tuple[tuple[int, float], ...] = ()

    @property
    def done(self) -> bool:
        return self.end is not None


KeepStepping = Callable[[bool], bool]
"""Asked before every forward of a run, with "this rank has work left"; answers "some rank has". See `DecodeEngine.run`."""


class DecodeEngine(Protocol):
    """Rows enter, take a step together and leave when they finish; waiting rows take their place."""

    def run(
        self,
        requests: Sequence[DecodeRequest],
        keep_stepping: KeepStepping | None = None,
        idle_adapter: str | None = None,
    ) -> list[DecodeResult]:
        """All replies, in the order of the requests, from an engine that starts empty and ends empty.

        keep_stepping: for models whose every forward is a collective (ZeRO-3): called once before each forward, on all ranks; a
        rank without work makes dummy forwards under `idle_adapter` until no rank has any. All rows must then name that adapter.
        Raises ConfigError, naming every request that is wrong, before any forward; InvariantError if logits are not finite.
        """
        ...

    def submit(self, request: DecodeRequest) -> int:
        """Queue one request; returns its id. Raises ConfigError."""
        ...

    def step(self) -> list[DecodeEvent]:
        """One forward. Returns its tokens, one for each row that decoded; none if it read prompts. Go on while `busy`.

        After an exception the engine is empty: all requests are lost."""
        ...

    def cancel(self, request_id: int) -> bool:
        """Drop a request, wherever it is, with its slot; False if it is not there (any more)."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Around `step`, for as long as nobody else uses the model."""
        ...

    def release(self) -> None:
        """Give back memory that is not in use. Between two sessions."""
        ...

    @property
    def busy(self) -> bool:
        """Some request is not finished: call `step` again."""
        ...

    @property
    def free_slots(self) -> int:
        """Rows that could be submitted now without waiting for another to finish."""
        ...


@dataclass(frozen=True)
class Limits:
    """What the model can do. context: positions it has, 0 if unlimited. adapters: the names it knows."""

    vocabulary: int
    context: int
    adapters: Collection[str]


def check_requests(requests: Sequence[DecodeRequest], limits: Limits) -> None:
    """Raise one ConfigError with everything that is wrong with any of the requests."""
    ConfigError.raise_all(p for i, r in enumerate(requests) for p in _problems(f"request {i}", r, limits))


def _problems(where: str, request: DecodeRequest, limits: Limits) -> list[Problem]:
    r, vocabulary = request, limits.vocabulary
    prompt, new = len(r.prompt_ids), r.max_new_tokens
    unknown = r.adapter is not None and r.adapter not in limits.adapters
    known = sorted(limits.adapters) if unknown else []  # there may be thousands
    in_vocabulary = f"0 <= id < {vocabulary}"
    checks: list[tuple[bool, str, str, str, str]] = [
        (prompt > 0, "prompt_ids", "at least one token", "an empty prompt", "start the prompt with the bos token"),
        (_all_in(r.prompt_ids, vocabulary), "prompt_ids", in_vocabulary, _strangers(r.prompt_ids, vocabulary), ""),
        (
            _all_in(r.stop_ids, vocabulary),
            "stop_ids",
            in_vocabulary,
            _strangers(r.stop_ids, vocabulary),
            "take stop ids from this model's tokenizer and generation config",
        ),
        (_all_in(r.begun, vocabulary), "begun", in_vocabulary, _strangers(r.begun, vocabulary), ""),
        (new > len(r.begun), "max_new_tokens", f"at least {len(r.begun) + 1}", str(new), ""),
        (
            not limits.context or prompt + max(new, 0) <= limits.context,
            "prompt and reply are longer than the model's context",
            f"at most {limits.context} tokens",
            f"{prompt} prompt tokens + {new} new tokens",
            "shorten the prompt or the reply",
        ),
        (
            MIN_TEMPERATURE <= r.temperature <= MAX_TEMPERATURE,
            "temperature",
            f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            str(r.temperature),
            "set greedy for temperature 0",
        ),
        (0 < r.top_p <= 1, "top_p", "0 < top_p <= 1", str(r.top_p), "1 keeps all tokens"),
        (r.top_k >= 0, "top_k", "at least 0", str(r.top_k), "0 keeps all tokens"),
        (0 <= r.min_p <= 1, "min_p", "0 to 1", str(r.min_p), "0 keeps all tokens"),
        (
            _all_in([i for i, _ in r.logits.logit_bias] if r.logits else (), vocabulary),
            "logit_bias",
            in_vocabulary,
            _strangers([i for i, _ in r.logits.logit_bias] if r.logits else (), vocabulary),
            "",
        ),
        (-(2**63) <= r.row_seed < 2**63, "row_seed", "a signed 64-bit integer", str(r.row_seed), ""),
        (
            not unknown,
            "adapter",
            f"one of {', '.join(known)}" if known else "none: this model has no adapters",
            repr(r.adapter),
            "",
        ),
    ]
    return [Problem(where, what, expected, got, fix) for good, what, expected, got, fix in checks if not good]


def _all_in(ids: Sequence[int], vocabulary: int) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < vocabulary)


def _strangers(ids: Sequence[int], vocabulary: int) -> str:
    return str([i for i in ids if not 0 <= i < vocabulary][:5])
