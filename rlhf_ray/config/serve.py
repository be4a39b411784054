"""The service: one base, the adapters on it, how requests are limited, who may ask."""

from __future__ import annotations

import copy
import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.config.sections import Count, Float, NotNegative, OutputDir, Path, Positive, Section, Strings, field
from rlhf_ray.config.stages import JobFields, TemplateDate

ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _as_in_jobs(name: str) -> Any:
    """A field with the default and the description that every stage has for it."""
    return copy.copy(JobFields.model_fields[name])


class ReplicasConfig(Section):
    """How many copies of the base serve, and what each of them asks Ray for."""

    min_replicas: Count = field(1, "copies of the base that always run")
    max_replicas: Count | None = field(None, "copies under load; default: min_replicas, no autoscaling")
    target_ongoing_requests: Positive = field(16.0, "requests in flight per copy that autoscaling aims at")
    num_gpus: Annotated[Float, Field(ge=0)] | None = field(
        None, "GPUs, or a fraction of one, of each copy; default: 1 where the cluster has any, else 0"
    )
    num_cpus: NotNegative | None = field(
        None,
        "CPUs each copy asks Ray for; default: 1 on a cluster; on a Ray that the command starts, a share that always fits",
    )
    affinity_slack: NotNegative = field(
        8.0,
        "requests that the copy which has an adapter may have more than the least busy one, before another copy takes requests for"
        " that adapter and loads it too",
    )
    unresponsive_after_s: Annotated[Float, Field(ge=3)] = field(
        15.0, "a copy that has answered no health check for so long is ended, and another one started"
    )
    num_threads: Count | None = field(None, "CPU threads of each copy; default: usable cores shared among min_replicas")

    @model_validator(mode="after")
    def _grows(self) -> ReplicasConfig:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: expected at least min_replicas ({self.min_replicas}); got {self.max_replicas}"
            )
        return self


class LimitsConfig(Section):
    """What one request, and all of them together, may take."""

    max_batch_rows: Annotated[int, Field(ge=1, le=1024)] = field(32, "replies that a copy writes at the same time")
    max_waiting_rows: Annotated[int, Field(ge=0, le=100_000)] = field(
        16,
        "replies that may wait for a place in each copy, taking turns; beyond that a request is answered 429, unless it asks for"
        " no more than its share of the places",
    )
    max_loaded_adapters: Annotated[int, Field(ge=1, le=1024)] = field(
        32, "adapters on the device of each copy; the least recently used one that is idle makes room for another"
    )
    max_adapter_bytes: Annotated[int, Field(ge=1)] | None = field(
        None, "bytes of all adapters on the device of each copy, beside max_loaded_adapters; null: no limit of bytes"
    )
    max_host_adapter_bytes: Annotated[int, Field(ge=0)] = field(
        1 << 30,
        "bytes of adapters kept in the host's memory of each copy, read and verified, behind those on the device; what does not"
        " fit is read from disk again (the tiers of S-LoRA, arXiv:2311.03285)",
    )
    max_context: Count | None = field(
        None,
        "tokens of a prompt and its reply together, if that is to be less than the model's own limit; null: the model's",
    )
    max_cached_tokens: Annotated[int, Field(ge=64)] | None = field(
        None,
        "tokens in the key-value cache of each copy: replies written at the same time, times the tokens that the longest of them"
        " may come to, where very different lengths are counted apart; further ones wait; default: max_batch_rows x 2 x"
        " max_tokens, and one reply of any length always has room",
    )
    prompt_chunk: Annotated[int, Field(ge=16)] = field(
        512,
        "prompt tokens that are read between two tokens of the replies being written; a longer prompt is read in pieces"
        " (chunked prefill: Sarathi-Serve, arXiv:2403.02310)",
    )
    max_tokens: Count = field(1024, "longest reply that a request may ask for")
    default_max_tokens: Count = field(256, "longest reply if a request does not say; max_tokens if that is less")
    max_n: Annotated[int, Field(ge=1, le=128)] = field(8, "replies per prompt, and models per comparison")
    max_body_bytes: Annotated[int, Field(ge=1024)] = field(1_000_000, "longest request body (413)")
    max_messages: Count = field(100, "messages in a conversation, prompts in a request")
    body_timeout_s: Positive = field(10.0, "a request's body must be there within this time (408)")
    request_timeout_s: Positive = field(120.0, "a reply must be finished within this time, waiting included (504)")
    retry_after_s: Count = field(1, "Retry-After of a 429 answer, seconds")

    @property
    def cached_tokens(self) -> int:
        """max_cached_tokens, or its default."""
        return self.max_cached_tokens or self.max_batch_rows * 2 * self.max_tokens


class ServeVLLMConfig(Section):
    """vLLM in each copy, with `engine: vllm`."""

    max_lora_rank: Annotated[int, Field(ge=1, le=512)] = field(
        16,
        "largest rank of an adapter; memory for limits.max_loaded_adapters of this rank is taken at the start (vLLM's name and"
        " default)",
    )
    gpu_memory_utilization: Annotated[Float, Field(gt=0, lt=1)] | None = field(
        None,
        "on CUDA: share of the GPU's memory for vLLM's weights and its keys and values; default: 0.9 times replicas.num_gpus, less"
        " what the scoring base takes (vLLM's name)",
    )
    kv_cache_gb: Positive | None = field(
        None, "GiB of keys and values, instead of what gpu_memory_utilization leaves for them; default on a CPU: 1"
    )
    enforce_eager: bool = field(False, RolloutConfig.model_fields["enforce_eager"].description or "")
    scoring_base: bool = field(
        True,
        "a second base in each copy, on which `reward`, `kl`, `/v1/score`, `prompt_logprobs` and `echo` with `logprobs` are"
        " computed; false: no memory for it, and these are refused (400)",
    )

    @model_validator(mode="after")
    def _one_size(self) -> ServeVLLMConfig:
        if self.kv_cache_gb is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_cache_gb and gpu_memory_utilization exclude each other; drop one")
        return self


class ServeConfig(Section):
    """The endpoint: OpenAI's API over a base and its adapters."""

    output_dir: OutputDir = field(..., "folder for preferences, the access log and what each replica says it serves")
    model_name_or_path: Path = field(..., JobFields.model_fields["model_name_or_path"].description or "")
    revision: str | None = _as_in_jobs("revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _as_in_jobs("dtype")
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = _as_in_jobs("attn_implementation")
    load_in_8bit: bool = _as_in_jobs("load_in_8bit")
    load_in_4bit: bool = _as_in_jobs("load_in_4bit")
    cpu_offload: bool = _as_in_jobs("cpu_offload")
    engine: Literal["builtin", "vllm"] = field(
        "builtin",
        "builtin: the decode engine of this package; vllm: vLLM in the process of each copy, under the same API, the same registry"
        " and the same random numbers (needs vLLM there: pip install 'rlhf_ray[vllm]')",
    )
    vllm: ServeVLLMConfig = field(ServeVLLMConfig(), "memory and limits of `engine: vllm`")
    registry: Path | None = field(
        None, "folder that `rlhf-ray promote` writes to; its names are served, and changes to them followed; null: none"
    )
    adapters: dict[str, str] = field(
        {}, "further adapters, by name: a run, RUN@STEP or an adapter folder; loaded as they are now, not followed"
    )
    template: str | None = field(
        None,
        "prompt template of the base without an adapter, and of adapter folders that record none; default: chat where its tokenizer"
        " has one, else none, for such folders alpaca (any other adapter has the template it was trained with)",
    )
    template_date: TemplateDate | None = field(
        None,
        "what a chat template of the base that says the date (strftime_now) takes for now, e.g. 2026-01-31T09:00:00; default: the"
        " date that the adapters record, if they agree, else when the service started (an adapter always has that of its run)",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral"] = field(
        "auto", "form in which the base and its adapters write tool calls (vLLM's names); auto: by the chat template"
    )
    reward: str | None = field(
        None,
        "adapter that scores replies where a request says `reward: true`; default: the only reward adapter there is",
    )
    host: str = field(
        "127.0.0.1",
        "address to listen on; any but a loopback address needs api_keys, and cluster/nginx.conf in front of it",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = field(8000, "port to listen on")
    expose_metrics: bool = field(
        False,
        "metrics can be read from other machines also where `host` is a loopback address; false: a Ray that the command starts for"
        " such a host listens on this machine alone (a cluster's listens as it was started)",
    )
    api_keys: Path | None = field(None, "file of hashed API keys that `rlhf-ray api-key` writes; null: no key needed")
    allowed_hosts: Strings = field(
        (), "further names by which browsers may reach the service (Host header); loopback names and `host` are allowed"
    )
    allowed_origins: Strings = field(
        (),
        "web pages of other origins that may use the service (CORS), as https://app.example.org; *: any, with api_keys",
    )
    replicas: ReplicasConfig = field(ReplicasConfig(), "copies of the base")
    limits: LimitsConfig = field(LimitsConfig(), "limits of requests")
    poll_interval_s: Positive = field(0.5, "the registry is looked at for changes so often")
    log_prompts: bool = field(False, "write prompts and replies into the access log too")
    access_log_max_bytes: Annotated[int, Field(ge=1024)] = field(
        100_000_000, "size at which access.jsonl is renamed to access.jsonl.1, and begun again"
    )
    access_log_backups: Annotated[int, Field(ge=0, le=100)] = field(5, "renamed access logs that are kept")

    @model_validator(mode="after")
    def _rules(self) -> ServeConfig:
        problems = []
        if self.load_in_8bit and self.load_in_4bit:
            problems.append("load_in_8bit and load_in_4bit exclude each other")
        problems += self._engine_rules()
        if self.template_date is not None and self.template not in (None, "chat"):
            problems.append(
                f"template_date: has no effect with template {self.template}; drop it, or set template: chat"
            )
        if not is_loopback(self.host) and self.api_keys is None:
            problems.append(
                f"host: {self.host} can be reached from other machines: api_keys is needed (rlhf-ray api-key FILE --name NAME)"
            )
        for origin in self.allowed_origins:
            if origin == "*" and self.api_keys is None:
                problems.append("allowed_origins: * needs api_keys, else every web page could use the service")
            elif origin != "*" and not ORIGIN.fullmatch(origin):
                problems.append(f"allowed_origins: {origin!r} is no origin: https://HOST or https://HOST:PORT")
        for name in self.adapters:
            if not ADAPTER_NAME.fullmatch(name) or name.casefold() == "base":
                problems.append(f"adapters: {name!r} is no name: 1 to 64 letters, digits, _ . or -, and not base")
        if problems:
            raise ValueError(" | ".join(problems))
        return self

    def _engine_rules(self) -> list[str]:
        if self.engine == "builtin":
            defaults = ServeVLLMConfig()
            idle = [
                name for name in ServeVLLMConfig.model_fields if getattr(self.vllm, name) != getattr(defaults, name)
            ]
            return [f"vllm.{name}: has no effect with engine builtin; drop it, or set vllm" for name in idle]
        problems = []
        if self.load_in_8bit or self.load_in_4bit or self.cpu_offload:
            problems.append(
                "engine: vllm has a base that is not quantised, on its device alone; expected builtin, or load_in_8bit,"
                " load_in_4bit and cpu_offload off; got vllm"
            )
        if self.limits.max_cached_tokens is not None:
            problems.append(
                "limits.max_cached_tokens: has no effect with engine vllm; drop it, or set vllm.kv_cache_gb"
            )
        if self.reward is not None and not self.vllm.scoring_base:
            problems.append(
                f"vllm.scoring_base: reward {self.reward!r} needs it; expected true, or no reward; got false"
            )
        return problems


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service on `host`.

    >>> [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.org")]
    [True, True, True, False, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
