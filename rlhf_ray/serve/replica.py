"""A replica: one base, the adapters on it, and the requests that it answers. Knows nothing of HTTP or of Ray.

request ──> admission ──> models in memory ──> prompt ids ──> generation_stream.py: rows of the decode thread ──> events
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.data.encode import bos_ids
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import DEFAULT_TEMPLATE
from rlhf_ray.models.merge import merge_in_memory
from rlhf_ray.registry import Registry
from rlhf_ray.runtime.devices import own_device
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.serve.adapter_cache import AdapterCache, CachedAdapter, CacheTooSmall
from rlhf_ray.serve.api_errors import ApiError, adapter_refused, model_not_found, overloaded, request_timeout
from rlhf_ray.serve.decode_options import DecodeOptions, DecodeOptionsReader
from rlhf_ray.serve.decode_thread import DecodedToken, DecodeThread
from rlhf_ray.serve.generation import Event, Generation, GenerationRequest, ServedModel
from rlhf_ray.serve.generation_stream import GenerationStream, TokenBuffer, TokenRouter
from rlhf_ray.serve.metrics import Metrics, NoMetrics
from rlhf_ray.serve.model_index import (
    BASE,
    ModelCheckpoint,
    ModelIndex,
    ModelVersion,
    list_models,
    run_versions,
    to_be_merged,
)
from rlhf_ray.serve.prompt_encoder import PromptEncoder
from rlhf_ray.serve.registry_watcher import RegistryWatcher
from rlhf_ray.serve.response_scorer import ResponseScorer
from rlhf_ray.serve.response_text import ResponseText, special_stop_ids
from rlhf_ray.serve.status_files import read_statuses, remove_stale
from rlhf_ray.serve.vllm import load_base, no_scoring_base, refuse_scores, start_engine

SWITCH_INTERVAL_S = 0.0001
"""Python's lock changes hands this often between threads that want it. The decode thread gives it up in each of the hundreds of
operations of a step, and waits for so long to get it back while another thread (the event loop, a thread that reads an adapter) has
work; the default of 5 ms would make a step of that a second."""
MAX_REQUEST_ROWS = 4096


class Replica:
    """Build it on the event loop that will call it, then `await start()`."""

    def __init__(self, config: ServeConfig, name: str = "replica", metrics: Metrics | None = None) -> None:
        """On the GPU that Ray gave this process, if it gave one."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.config, self.limits, self.metrics = config, config.limits, metrics or NoMetrics()
        threads = config.replicas.num_threads
        if threads is not None:
            torch.set_num_threads(threads)
        more, device = to_be_merged(config), own_device()
        self.backbone: Backbone = load_base(config, device)
        if more is not None:
            merge_in_memory(self.backbone, more)
        chat = "chat" if self.backbone.tokenizer.chat_template is not None else "none"
        self.template = load_template(config.template or chat, self.backbone.tokenizer, config.template_date)
        self.router = TokenRouter()
        self.engine = DecodeThread(
            self.backbone,
            self.limits.max_batch_rows,
            self.router.deliver,
            threads,
            chunk=self.limits.prompt_chunk,
            max_cached=self.limits.cached_tokens,
            vllm=start_engine(config, self.backbone, device),
        )
        unrecorded = self.template
        if config.template is None and chat == "none":
            unrecorded = load_template(DEFAULT_TEMPLATE, self.backbone.tokenizer)
        check = self.engine.pack if config.engine == "vllm" else None
        self.runs = run_versions(config.adapters, self.backbone, unrecorded, check)
        self.merged: ModelCheckpoint | None = None
        """Of the one adapter that is served, where it is merged into the base: every name then means the model as it is."""
        if more is not None:
            ((version,), _) = next(iter(self.runs.values()))
            self.merged = version.load().without_tensors()
        self.adapter_cache = AdapterCache[ModelCheckpoint](
            self.engine,
            self.limits.max_loaded_adapters,
            self.limits.max_adapter_bytes,
            self.limits.max_host_adapter_bytes,
            self.metrics,
        )
        self.prompt_encoder = PromptEncoder(self.backbone, self.limits)
        self.options_reader = DecodeOptionsReader(self.backbone, config.tool_call_parser)
        self.scorer = ResponseScorer(self.engine, self.prompt_encoder)
        self.model_index = ModelIndex()
        registry = None if config.registry is None else Registry(config.registry)
        status_file = Path(config.output_dir) / "replicas" / f"{name}.json"
        status_file.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(status_file.parent, read_statuses(status_file.parent))
        self.watcher = RegistryWatcher(
            self.model_index, self.adapter_cache, self.backbone, registry, status_file, self.metrics
        )
        self.watcher.serves_base = self.merged is None
        self.started_at = int(time.time())
        self._listed: tuple[int, list[dict[str, Any]]] | None = None
        self._known_as: tuple[Any, str] = None, ""
        self._claims: dict[str, list[int]] = {}  # of places, by API key, for each request
        self._checked_progress = (-1, -1)
        self._told_waiting: set[str] = set()
        self._watching: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve the names there are, and follow the registry from now on."""
        await self.watcher.start(self.runs)
        if self.merged is not None:
            self.model_index.loaded(self.model_index.versions[self.merged.id], self.merged)
        self._watching = asyncio.create_task(self.watcher.run(self.config.poll_interval_s))
        self._settling = asyncio.create_task(self._settle())

    async def _settle(self) -> None:
        """Take what is there for good out of the garbage collector's sight: it walked through models, tokenizer and names for a
        quarter of a second every few minutes, on whichever thread, and nobody got a token meanwhile."""
        gc.freeze()
        await self.watcher.know_all()
        gc.freeze()  # with what was read of the registry's names

    async def close(self) -> None:
        for task in (self._watching, self._settling):
            if task is not None:
                task.cancel()
        gc.unfreeze()
        await asyncio.to_thread(self.engine.stop)
        self.watcher.status_file.unlink(missing_ok=True)

    # ---- what a backend calls ------------------------------------------------------------------------------------------

    async def events(
        self, request: GenerationRequest, arrived_at: float | None = None, whole: bool = False
    ) -> AsyncIterator[list[Event]]:
        """Lists of events as in generation.py; closing the iterator frees every row. Errors are events as well.

        arrived_at: `time.monotonic()` of the request; default now.  whole: the client does not stream (see TokenBuffer)."""
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        deadline = asyncio.get_running_loop().time() + self.limits.request_timeout_s
        try:
            async with AsyncExitStack() as resources:
                async with asyncio.timeout_at(deadline):
                    self._admit(request, resources)
                    generations, served_models, reward_model, options = await self._prepare(request, resources)
                start = self._start_event(generations, served_models)
                yield [{"start": start | ({"tool_format": options.tool_format} if request.calls_tools else {})}]
                stream = GenerationStream(
                    request,
                    generations,
                    reward_model,
                    self.engine,
                    self.router,
                    self.scorer,
                    self.metrics,
                    TokenBuffer(whole and not request.stop_strings),  # a stop string has to be noticed on the way
                    arrived_at,
                    options,
                    self.limits.max_batch_rows,
                )
                async with aclosing(stream.events(deadline)) as written:
                    async for events in written:
                        yield events
        except ApiError as error:
            yield [{"error": error.as_dict()}]
        except TimeoutError:
            yield [{"error": request_timeout(self.limits.request_timeout_s).as_dict()}]

    async def models(self) -> list[dict[str, Any]]:
        """See `model_index.list_models`. Made once for every change; not to be changed."""
        await self.watcher.know_all()
        if self._listed is None or self._listed[0] != self.model_index.revision:
            listed = list_models(self.model_index, self.started_at, with_base=self.merged is None)
            self._listed = self.model_index.revision, listed
        return self._listed[1]

    async def models_since(self, known: str) -> tuple[str, list[dict[str, Any]] | None]:
        """(what the list of `models` is known by, the list; None if it is still that of `known`). Replicas that serve the same
        know it by the same, so that a list of many names crosses processes only when it has changed."""
        models = await self.models()
        if self._known_as[0] is not models:
            text = await asyncio.to_thread(json.dumps, [{**m, "created": 0} for m in models], sort_keys=True)
            self._known_as = models, hashlib.sha256(text.encode()).hexdigest()
        return self._known_as[1], None if self._known_as[1] == known else models

    async def tokenize(self, model: str, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """{ids, texts, context}: what `model` would read of a prompt (generation.py). {error} for an ApiError."""
        try:
            if self.merged is not None and model == BASE:  # where the client names none
                model = self.merged.id
            async with AsyncExitStack() as resources:
                served = self._policy(model, await self._load([model], resources))
                ids = await self.prompt_encoder.encode(prompt, served.template)
        except ApiError as error:
            return {"error": error.as_dict()}
        texts = self.backbone.tokenizer.convert_ids_to_tokens(list(ids))
        return {"ids": list(ids), "texts": texts, "context": self.backbone.context_length}

    async def tokenizer_info(self) -> dict[str, Any]:
        """What a client that tokenizes by this service asks of its tokenizer, as vLLM's /tokenizer_info."""
        tokenizer = self.backbone.tokenizer
        named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        info = {"tokenizer_class": type(tokenizer).__name__, "model_max_length": self.backbone.context_length}
        return {**info, **named, "chat_template": tokenizer.chat_template}

    async def detokenize(self, ids: Sequence[int]) -> dict[str, Any]:
        """{text} of token ids. {error} for an ApiError."""
        if any(i >= self.prompt_encoder.vocabulary_size for i in ids):
            return {"error": ApiError(400, "A token id is not in the vocabulary.", "invalid_token", "tokens").as_dict()}
        return {"text": str(self.backbone.tokenizer.decode(list(ids)))}

    async def status(self) -> dict[str, Any]:
        """What it serves (see `RegistryWatcher.status`), and how busy it is."""
        busy = {"rows": self.engine.running, "adapters": self.adapter_cache.keys(), "steps": self.engine.steps}
        return self.watcher.status() | {"busy": busy}

    async def check_health(self) -> None:
        """Raises unless the decode thread decodes: it has (or has scored) since the last check, or it does now."""
        if not self.engine.alive or self.engine.failures > 3:
            raise RuntimeError("the decoder has failed")
        progress = self.engine.steps, self.engine.calls_done
        moved, self._checked_progress = progress != self._checked_progress, progress
        if moved and self.engine.running:
            return
        ids = (*self.backbone.eos_ids[:1], *bos_ids(self.backbone.tokenizer))[-1:] or (0,)
        buffer = TokenBuffer()
        ticket = self.engine.submit(DecodeRequest(tuple(ids), 0, 1, (), greedy=True))
        self.router.buffers[ticket] = buffer
        try:
            async with asyncio.timeout(self.config.replicas.unresponsive_after_s):
                [token, *_] = await buffer.get()
        finally:
            self.router.buffers.pop(ticket, None)
            if self.engine.alive:
                self.engine.cancel(ticket)
        if isinstance(token, DecodedToken) and token.end == "error":
            raise RuntimeError(f"the decoder has failed: {token.error}")
        self._checked_progress = self.engine.steps, self.engine.calls_done

    @property
    def places_taken(self) -> int:
        """Of max_batch_rows + max_waiting_rows, by requests that were admitted."""
        return sum(map(sum, self._claims.values()))

    def export_gauges(self) -> None:
        self.metrics.set("rows_running", self.engine.running)
        self.metrics.set("adapters_loaded", len(self.adapter_cache.keys()))
        self.metrics.set("decode_steps", self.engine.steps)
        self.metrics.set("adapter_bytes", self.adapter_cache.nbytes, where="device")
        self.metrics.set("adapter_bytes", self.adapter_cache.host_used, where="host")
        self.metrics.set("longest_step_seconds", self.engine.longest_step_s)
        self.engine.longest_step_s = 0.0
        waiting = self.engine.waiting_by_model()
        for adapter in self._told_waiting | waiting.keys():  # also that none waits any more
            self.metrics.set("rows_waiting", waiting.get(adapter, 0), adapter=adapter)
        self._told_waiting = set(waiting)
        self.watcher.export_gauges()

    # ---- from a request to generations -----------------------------------------------------------------------------------

    def _admit(self, request: GenerationRequest, resources: AsyncExitStack) -> None:
        """Take the request in, until `resources` is closed. ApiError 400 for too many replies, 429 if all places are taken."""
        if request.rows > MAX_REQUEST_ROWS:
            message = f"{request.rows} replies are asked for at once; at most {MAX_REQUEST_ROWS} can be."
            raise ApiError(400, message, "too_many_replies", "n")
        self.claim(request.key, request.rows, resources)

    def claim(self, key: str, rows: int, resources: AsyncExitStack) -> None:
        """Places for a request of so many rows, until `resources` is closed. ApiError 429 if all are taken.

        A request for more than half of the places claims half: its rows take turns. Where places are taken, who asks for no more
        than a fair share still comes in and waits: of the places divided among keys, or of a key's share divided among its
        requests. So large requests keep nobody out, and C places take C requests of one row at most."""
        places = self.limits.max_batch_rows + self.limits.max_waiting_rows
        claim, own = min(rows, max(places // 2, 1)), self._claims.get(key, [])
        share = places / (len(self._claims) + (not own))
        if self.places_taken + claim > places and sum(own) + claim > share and claim > share / (len(own) + 1):
            raise overloaded(self.limits.retry_after_s)
        self._claims.setdefault(key, []).append(claim)
        resources.callback(self._release, key, claim)

    def _release(self, key: str, claim: int) -> None:
        self._claims[key].remove(claim)
        if not self._claims[key]:
            del self._claims[key]

    async def _prepare(
        self, request: GenerationRequest, resources: AsyncExitStack
    ) -> tuple[list[Generation], list[ServedModel], ServedModel | None, DecodeOptions]:
        """Generations ready to be submitted; the models that write them; the reward model, if one is requested; what is asked of
        the sampler."""
        if not self.engine.has_weights:
            refuse_scores(request)
        reward = await self._reward_name(request.reward) if request.reward else None
        cached = await self._load([*request.models, *(() if reward is None else (reward,))], resources)
        served_models = [self._policy(model, cached) for model in request.models]
        reward_model = None if reward is None else self._reward_model(reward, cached)
        if request.kl and self.merged is not None:
            what = "kl: the adapter is merged into its base, which is not there to be compared with."
            raise ApiError(400, what, "no_base", "kl")
        options = await self.options_reader.read(request, served_models)
        generations: list[Generation] = []
        for prompt in request.prompts:
            for served in served_models:
                ids = await self.prompt_encoder.encode(prompt, served.template)
                max_new_tokens = self.prompt_encoder.max_new_tokens(len(ids), request.max_tokens)
                for _ in range(request.n):
                    after = ids if prompt.keys() & {"raw", "ids"} else ()
                    text = ResponseText(
                        self.backbone.tokenizer, request.stop_strings, after, request.min_tokens, options.spoken
                    )
                    generation = Generation(len(generations), served, prompt, ids, max_new_tokens, text)
                    special = special_stop_ids(self.backbone.tokenizer, request.stop_strings)
                    generation.stop_ids = (*special, *request.stop_token_ids)
                    generations.append(generation)
        return generations, served_models, reward_model, options

    def _policy(self, model: str, cached: Mapping[str, CachedAdapter[ModelCheckpoint]]) -> ServedModel:
        if self.merged is not None:
            merged = self.merged
            return ServedModel(model, merged.id, merged.sha256, merged.template, merged.stop_ids)
        if model == BASE:
            sha256 = self.backbone.identity.weights_sha256
            return ServedModel(model, BASE, sha256, self.template, self.backbone.stop_ids(self.template))
        served = _served(model, cached[model])
        if cached[model].checkpoint.kind == "reward":
            raise ApiError(
                400, f"{model!r} is a reward model: it scores replies, and writes none.", "not_a_policy", "model"
            )
        return served

    async def _reward_name(self, reward: str | bool) -> str:
        """reward: of the request, the name of an adapter, or True for the default one."""
        if (name := reward if isinstance(reward, str) else self.config.reward) is not None:
            return name
        await self.watcher.know_all()
        names = self.model_index.reward_models()
        if len(names) == 1:
            return names[0]
        several = f"several are served; name one of {', '.join(sorted(names)[:20])}"
        raise ApiError(400, f"reward: {several if names else 'no reward adapter is served'}.", "no_reward", "reward")

    async def reward_model(self, reward: str | bool, resources: AsyncExitStack) -> ServedModel:
        """The reward adapter `reward`, or with True the default one, ready until `resources` is closed. ApiError if it is none."""
        if not self.engine.has_weights:
            raise no_scoring_base("model")
        name = await self._reward_name(reward)
        return self._reward_model(name, await self._load([name], resources))

    def _reward_model(self, name: str, cached: Mapping[str, CachedAdapter[ModelCheckpoint]]) -> ServedModel:
        found = cached.get(name)
        if found is None or found.head is None:
            raise ApiError(400, f"reward: {name!r} is no reward adapter.", "not_a_reward", "reward")
        return _served(name, found)

    async def _load(
        self, models: Sequence[str], resources: AsyncExitStack
    ) -> dict[str, CachedAdapter[ModelCheckpoint]]:
        """The adapters that `models` name, by these names, ready until `resources` is closed. Waits while others use all places."""
        await self.watcher.know(models)
        versions = {model: self._resolve(model) for model in models if model != BASE or self.merged is not None}
        if self.merged is not None:
            return {}
        reads = {version.id: version.load for version in versions.values()}
        try:
            cached = await resources.enter_async_context(self.adapter_cache.use_all(reads))
        except CacheTooSmall as error:
            what = (
                f"{len(reads)} models are asked for at once; {error} (limits.max_loaded_adapters, max_adapter_bytes)."
            )
            raise ApiError(400, what, "too_many_models", "models") from None
        except RlhfRayError:
            await self.watcher.write_status()
            refused = [model for model, version in versions.items() if version.id in self.model_index.refused]
            raise adapter_refused(refused[0] if refused else models[0]) from None
        for version in versions.values():
            self.model_index.loaded(version, cached[version.id].checkpoint)
        return {model: cached[version.id] for model, version in versions.items()}

    def _resolve(self, model: str) -> ModelVersion:
        version = self.model_index.resolve(model)
        if self.model_index.is_refused(model) or (version is not None and not self.model_index.may_be_read(version)):
            raise adapter_refused(model)
        if version is None:
            raise model_not_found(model)
        return version

    def _start_event(self, generations: Sequence[Generation], served_models: Sequence[ServedModel]) -> Event:
        base = self.backbone.identity.weights_sha256[:8]
        return {
            "prompt_tokens": sum({(id(g.prompt), g.served.model): len(g.prompt_ids) for g in generations}.values()),
            "choices": [generation.served.model for generation in generations],
            "adapters": {
                s.model: {"id": s.id, "sha256": s.sha256, "fingerprint": f"{base}/{s.id}"} for s in served_models
            },
        }


def _served(model: str, cached: CachedAdapter[ModelCheckpoint]) -> ServedModel:
    checkpoint = cached.checkpoint
    return ServedModel(model, checkpoint.id, checkpoint.sha256, checkpoint.template, checkpoint.stop_ids, cached)
