"""Servers that a job asks over HTTP: reward servers, LLM judges, policies that are served elsewhere. And what must not be in a job.

A job file is copied into run folders, onto clusters and into logs, so a key is never part of it: it comes from a variable of the
node's environment, or from a file on the node.
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlhf_ray.config.sections import Count, Float, NotNegative, Path, Positive, Section, _to_tuple, field
from rlhf_ray.config.uris import has_credentials

SECRET_FORMS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an OpenAI key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
"""What secrets look like, whatever field they stand in."""
KEY_FIELDS = ("api_key", "api-key", "apikey", "key", "token", "headers", "authorization", "password", "secret")
ELSEWHERE = "a job file is copied into runs, clusters and logs; put the key into a file (headers_file) or a variable (api_key_env)"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_PARAMETER = re.compile(r"(?i).*(key|token|secret|password|signature|sig|auth)")


def is_built_in(prompt: str) -> bool:
    """Whether a judge's prompt is one of the package's, by its name; a path has a dot or a slash."""
    return re.fullmatch(r"[a-z_]+", prompt) is not None


def secrets_in(text: str) -> list[str]:
    """Kinds of the secrets that `text` holds, by their form.

    >>> secrets_in("api: sk-0123456789abcdefghijkl"), secrets_in("name: sk-learn")
    (['an OpenAI key'], [])
    """
    return [kind for kind, form in SECRET_FORMS.items() if form.search(text)]


def http_url(url: str) -> str:
    """`url` as it is. ValueError, which does not show it, unless it is http or https, has a host, and holds no credentials."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is no URL; expected http://host:port/path or https://host/path") from None
    secret = any(_SECRET_PARAMETER.fullmatch(name) for name, _ in urllib.parse.parse_qsl(parts.query))
    if has_credentials(url) or secret:
        raise ValueError(f"has credentials in it; {ELSEWHERE}")
    if parts.scheme not in ("http", "https") or not host or parts.fragment or any(c.isspace() for c in url):
        raise ValueError("is no URL of a server; expected http://host:port/path or https://host/path")
    return url


def variable_name(name: str) -> str:
    """`name` as it is. ValueError, which does not show it, if it is no environment variable's name: it may be the key itself."""
    if not _VARIABLE.fullmatch(name) or secrets_in(name):
        raise ValueError("is no environment variable's name; expected one like OPENAI_API_KEY, never the key itself")
    return name


def without_keys(values: Any) -> Any:
    """`values` of a section as they are. ValueError, which does not show it, if a field of them would hold a key."""
    for name in values if isinstance(values, dict) else ():
        if isinstance(name, str) and name.lower() in KEY_FIELDS:
            raise ValueError(f"{name}: no key in a job: {ELSEWHERE}")
    return values


HttpUrl = Annotated[str, AfterValidator(http_url)]
VariableName = Annotated[str, AfterValidator(variable_name)]
HEADERS_FILE = (
    "a file on the node, readable by its owner alone (mode 600), with one `Name: value` per line, sent with every request:"
    " `Authorization: Bearer ...`; never sent to another host, never logged"
)
API_KEY_ENV = "variable of the node's environment that holds the key, sent as `Authorization: Bearer`; default: no key"
TIMEOUT_S = "seconds that one request may take, from connecting to the answer's last byte"
MAX_RETRIES = (
    "further tries of a request that was answered with 408, 425, 429 or 5xx, with nonsense, too late or not at all; after pauses of"
    " 1, 2, 4, ... s, at most 60, or what Retry-After says, at most 300"
)

LONGEST_RETRY_AFTER_S = 300.0
"""That a server may ask for; it says so in MAX_RETRIES."""


def longest_request_s(
    timeout_s: float, max_retries: int, concurrency: int = 1, requests_per_minute: float | None = None
) -> float:
    """Seconds after which a request has its answer or has failed for good: all its tries, the longest pauses that a server may ask
    for between them, and its turns where only so many may start in a minute. Whoever waits for it must wait longer."""
    turns_s = (max_retries + 1) * concurrency * 60.0 / requests_per_minute if requests_per_minute else 0.0
    return (max_retries + 1) * timeout_s + max_retries * LONGEST_RETRY_AFTER_S + turns_s


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint (/chat/completions): vLLM, OpenAI, or `rlhf-ray serve`."""

    base_url: HttpUrl = field(..., "the endpoint without /chat/completions: http://127.0.0.1:8000/v1")
    model: Path = field(..., "name of the model there")
    api_key_env: VariableName | None = field(None, API_KEY_ENV)
    headers_file: Path | None = field(None, HEADERS_FILE)
    timeout_s: Positive = field(120.0, TIMEOUT_S)
    max_retries: Annotated[int, Field(ge=0, le=20)] = field(5, MAX_RETRIES)
    concurrency: Annotated[int, Field(ge=1, le=1000)] = field(8, "requests at a time, of each process that asks")
    requests_per_minute: Positive | None = field(None, "of each process that asks; default: no limit")

    @model_validator(mode="before")
    @classmethod
    def _no_key(cls, values: Any) -> Any:
        return without_keys(values)


class AnnotatorConfig(Section):
    """One member of a judge's pool (AlpacaFarm, arXiv:2305.14387: prompts and temperatures that differ as annotators do)."""

    prompt: Path | None = field(
        None,
        "name of a prompt that comes with the package (pairwise, pairwise_reasoned, pointwise), or a file like those; default: the"
        " one that is called as mode",
    )
    temperature: Annotated[Float, Field(ge=0, le=2)] = field(0.0, "of its verdicts; 0: greedy")
    model: Path | None = field(None, "name of its model at the endpoint; default: the judge's")


class LLMJudgeConfig(EndpointConfig):
    """A language model as judge. Replies to one prompt are always judged by the same member of the pool, drawn by seed."""

    mode: Literal["pairwise", "pointwise"] = field(
        "pointwise",
        "pointwise: a number from min_score to max_score per reply, as a reward or in evaluate; pairwise: which of two replies is"
        " better, in evaluate alone",
    )
    annotators: Annotated[tuple[AnnotatorConfig, ...], BeforeValidator(_to_tuple)] = field(
        (), "the pool; default: one, with the prompt that is called as mode, at temperature 0"
    )
    both_orders: bool = field(
        True,
        "pairwise: ask twice, with the replies exchanged; one wins if it is preferred both times, else they draw (arXiv:2306.05685,"
        " section 3.4); false: one order, drawn by seed",
    )
    min_score: int = field(1, "pointwise: lowest score")
    max_score: int = field(10, "pointwise: highest score")
    max_tokens: Count | None = field(512, "of a verdict; null: not sent")
    structured_output: bool = field(
        False,
        "ask for the verdict alone as JSON that the endpoint holds to a schema (response_format, as OpenAI, vLLM and `rlhf-ray"
        " serve` take it): for judges too small to keep to a form, and without reasons before the verdict",
    )
    verdict_retries: Annotated[int, Field(ge=0, le=10)] = field(
        2,
        "times that a judge is asked again, whose answer does not end with a verdict; then the reply or pair is dropped",
    )
    seed: Annotated[int, Field(ge=0)] = field(
        0, "of the pool's assignment, of the order, and of verdicts with a temperature"
    )
    cache_dir: Path | None = field(
        None,
        "folder of answers by content (endpoint, model, prompt, decoding): what is there is not asked again; default: in the run"
        " folder of PPO, so that it resumes bit for bit, else $XDG_CACHE_HOME/rlhf_ray/judges (~/.cache/...)",
    )
    input_price: NotNegative | None = field(None, "money per million tokens of prompts")
    output_price: NotNegative | None = field(None, "money per million tokens of verdicts")
    max_cost: Positive | None = field(
        None,
        "money that a run may cost, over all its attempts; then it stops, and resumes where it is raised. Requests under way are"
        " still paid",
    )
    max_total_tokens: Count | None = field(None, "tokens that a run may cost, as max_cost")

    @model_validator(mode="after")
    def _fits(self) -> LLMJudgeConfig:
        if self.min_score >= self.max_score:
            raise ValueError(f"max_score: expected above min_score {self.min_score}; got {self.max_score}")
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost: needs input_price and output_price; set them, or use max_total_tokens")
        return self
