"""vLLM as the decode engine: the interface, rows and random numbers of the builtin one, with vLLM's kernels and its paged cache.

The engine lives in the process that samples, so adapters reach it as tensors, what its layers hold can be looked at before every
chunk, and no process of its own can be left behind. It has a base of its own, loaded from the same files. What vLLM changes in a
process that it does not own (random generators, threads, the garbage collector) is put back.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.errors import ConfigError, InvariantError, ResourceError, RlhfRayError
from rlhf_ray.runtime.devices import free_cached_memory
from rlhf_ray.runtime.imports import is_installed, vllm_missing, vllm_version
from rlhf_ray.sampler import vllm_lora
from rlhf_ray.sampler.requests import DecodeEvent, DecodeRequest, DecodeResult, KeepStepping, Limits, check_requests
from rlhf_ray.sampler.vllm_rows import ROW, DrawnTokens, processor_class
from rlhf_ray.storage.files import sha256_tensors

TRIED = "0.30"
"""The version that the tests run (`make test-vllm`)."""
CPU_CACHE_GB = 1.0
"""Of keys and values on a CPU, where nobody says."""
FIRST_ADAPTER = 1000
"""Numbers of adapters; those below are of adapters that vLLM makes for itself while it starts."""


@dataclass(frozen=True)
class VLLMOptions:
    """model: a folder.  longest: tokens of prompt and reply together.  adapters: how many there may be at once.

    kv_cache_bytes: None takes what `gpu_memory_utilization`, a share of the GPU, leaves.  step_tokens: of prompts and replies that
    a step reads at most, longer prompts in pieces; None leaves it to vLLM.  where: the field that chose vLLM, for errors."""

    model: str
    dtype: str
    device: torch.device
    longest: int
    max_rows: int
    max_rank: int
    adapters: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    enforce_eager: bool = False
    enable_sleep_mode: bool = False
    step_tokens: int | None = None
    where: str = "rollout.engine"


class VLLMEngine:
    """The decode engine (`requests.DecodeEngine`) over vLLM. Raises ResourceError without vLLM, or if its memory does not suffice;
    ConfigError for a model that it cannot run with adapters."""

    def __init__(self, options: VLLMOptions) -> None:
        if not is_installed("vllm"):
            raise vllm_missing("this machine", options.where)
        self.options, self.max_rows = options, options.max_rows
        self._shared = DrawnTokens()
        self._numbers = itertools.count()
        self._adapter_numbers = itertools.count(FIRST_ADAPTER)
        self._adapters: dict[str, tuple[int, Any]] = {}  # name -> its number, and vLLM's request for it
        self._waiting: set[int] = set()
        self._told: dict[int, int] = {}  # number -> tokens of it that `step` has told
        self._asleep = False
        with _undisturbed():
            _set_environment()
            self._engine = _started(options, processor_class(self._shared))
        self._vocabulary = int(self._engine.model_config.get_vocab_size())
        self._try()

    # ---- the engine, as callers see it ------------------------------------------------------------------------------------

    def run(
        self,
        requests: Sequence[DecodeRequest],
        keep_stepping: KeepStepping | None = None,
        idle_adapter: str | None = None,
    ) -> list[DecodeResult]:
        """See `DecodeEngine.run`. keep_stepping and idle_adapter: not needed, its base is its own and whole."""
        if self.busy:
            raise RuntimeError("VLLMEngine.run: the engine still has submitted requests")
        self._check(requests)
        self._engine.reset_prefix_cache()  # what was read for other chunks would change the last bits of this one
        numbers = [self._queue(request) for request in requests]
        drawn: dict[int, list[DecodeEvent]] = {number: [] for number in numbers}
        while self.busy:
            for event in self.step():
                drawn[event.request_id].append(event)
        for index, number in enumerate(numbers):
            _refuse_broken(index, requests[index], drawn[number])
        return [_result(request, drawn[number]) for request, number in zip(requests, numbers)]

    def submit(self, request: DecodeRequest) -> int:
        """See `DecodeEngine.submit`."""
        self._check([request])
        return self._queue(request)

    def step(self) -> list[DecodeEvent]:
        """See `DecodeEngine.step`."""
        try:
            breaks = self._shared.breaks
            outputs = self._engine.step() if self._waiting else []
            if self._shared.breaks > breaks:  # before other rows get the blocks of those that are broken
                self._in_worker(_clear_broken)
            return [event for output in outputs for event in self._events(output)]
        except BaseException:
            self._forget(list(self._waiting))
            raise

    def cancel(self, request_id: int) -> bool:
        """See `DecodeEngine.cancel`."""
        if request_id not in self._waiting:
            return False
        self._forget([request_id])
        return True

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else has its model."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Nothing: its memory is taken when it starts."""

    @property
    def busy(self) -> bool:
        """See `DecodeEngine.busy`."""
        return bool(self._waiting)

    @property
    def free_slots(self) -> int:
        """See `DecodeEngine.free_slots`."""
        return max(0, self.max_rows - len(self._waiting))

    # ---- adapters ---------------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Have `name` stand for these weights from now on, under a number that was never used; the old ones are dropped.

        config: r, lora_alpha, use_rslora, target_modules.   tensors: plain PEFT key -> f32 on the CPU.
        ConfigError for what vLLM cannot adapt; InvariantError if it does not then hold them. `name` is then without weights."""
        if any(row.request.adapter == name for row in self._shared.rows.values()):
            raise RuntimeError(f"VLLMEngine.load_adapter: rows under {name} are under way")
        self.drop_adapter(name)
        self.put_adapter(name, *self.ready_adapter(name, config, tensors))

    def check_adapter(self, name: str, config: Mapping[str, Any], keys: Iterable[str]) -> None:
        """ConfigError for an adapter that `load_adapter` would refuse.   keys: of its tensors."""
        self._in_worker(vllm_lora.check, config, tuple(keys), name, self.options.where)

    def ready_adapter(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, Any]:
        """The first half of `load_adapter`: a number, and the adapter in vLLM's form. On any thread, with rows under way."""
        number = next(self._adapter_numbers)
        with self._known_vllm():
            return number, self._in_worker(vllm_lora.ready, number, config, tensors, name, self.options.where)

    def put_adapter(self, name: str, number: int, adapter: Any) -> None:
        """The second half, between two steps. `name` must have no weights."""
        from vllm.lora.request import LoRARequest

        try:
            with self._known_vllm():
                self._in_worker(vllm_lora.put, number, adapter)
        except BaseException:
            self._in_worker(vllm_lora.take, number)
            raise
        # Should it be gone when a row asks for it, vLLM looks for this folder, finds none and raises.
        request = LoRARequest(lora_name=f"{name}@{number}", lora_int_id=number, lora_path=f"/memory/{number}")
        self._adapters[name] = number, request

    @contextlib.contextmanager
    def _known_vllm(self) -> Iterator[None]:
        try:
            yield
        except AttributeError as error:
            where = self.options.where
            what = f"vLLM {vllm_version()} keeps adapters in another way than {TRIED}: {error}"
            raise ConfigError.at(where, what, f"vLLM {TRIED}", fix=f"or set {where}: builtin") from error

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; nothing if it is not there."""
        if name in self._adapters:
            number, _ = self._adapters.pop(name)
            self._in_worker(vllm_lora.take, number)

    def layers_sha256(self, name: str) -> str:
        """Hash of what the layers hold for adapter `name`, in their own form; of nothing if they hold none."""
        number = self._adapters[name][0] if name in self._adapters else 0
        held = self._in_worker(vllm_lora.layers_of, number)
        return sha256_tensors({key: tensor.detach().to("cpu", torch.float32) for key, tensor in held.items()})

    # ---- memory -----------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give GPU memory back until `wake`: weights go to the host, keys and values are forgotten. Nothing where
        `enable_sleep_mode` is off."""
        if self.options.enable_sleep_mode and not self._asleep:
            self._engine.reset_prefix_cache()
            self._engine.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End the engine and free its memory.

        Its parts are ended one by one: vLLM's own end of all takes the process group with it, which is the learner's."""
        self._forget(list(self._waiting))
        engine, self._engine = self._engine, None
        if engine is not None:
            core = engine.engine_core.engine_core
            core.structured_output_manager.clear_backend()
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            del engine, core
        gc.unfreeze()
        gc.collect()
        free_cached_memory(self.options.device)

    # ---- within -----------------------------------------------------------------------------------------------------------

    def _try(self) -> None:
        """Decode two tokens: what its kernels cannot do is seen where they first run. An engine that starts is one that works."""
        try:
            self.run([DecodeRequest((0,), 0, 2, ())])
        except RlhfRayError:
            raise
        except Exception as error:
            raise _translated(error, self.options.where) from error

    def _check(self, requests: Sequence[DecodeRequest]) -> None:
        check_requests(requests, Limits(self._vocabulary, self.options.longest, self._adapters))

    def _in_worker(self, function: Any, *args: Any) -> Any:
        return self._engine.collective_rpc(function, args=args)[0]

    def _queue(self, request: DecodeRequest) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        params = SamplingParams(
            temperature=0.0,  # of the one token that the processor leaves
            max_tokens=request.max_new_tokens - len(request.begun),
            stop_token_ids=list(request.stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={ROW: number},
        )
        text: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids + request.begun)}
        if self._shared.breaks:  # what was read before may have been cleared: it is not found under another salt
            text["cache_salt"] = str(self._shared.breaks)
        [prompt] = self._engine.renderer.render_cmpl([text])
        lora = None if request.adapter is None else self._adapters[request.adapter][1]
        self._shared.add(number, request)
        self._engine.add_request(str(number), prompt, params, lora_request=lora)
        self._waiting.add(number)
        self._told[number] = 0
        return number

    def _events(self, output: Any) -> Iterator[DecodeEvent]:
        number, completion = int(output.request_id), output.outputs[0]
        drawn, tokens, told = self._shared.drawn[number], list(completion.token_ids), self._told[number]
        mine = drawn[told : told + len(tokens)]
        if [token for token, *_ in mine] != tokens:
            raise InvariantError.at(
                self.options.where,
                f"vLLM {vllm_version()} took other tokens than were drawn for it",
                str([token for token, *_ in mine]),
                str(tokens),
                f"use vLLM {TRIED}, or set {self.options.where}: builtin",
            )
        self._told[number] += len(tokens)
        for i, (token, logprob, top) in enumerate(mine):
            last = output.finished and i + 1 == len(mine)
            if number in self._shared.broken:
                self._forget([number], abort=not output.finished)
                yield DecodeEvent(number, token, logprob, "error")
                return
            yield DecodeEvent(number, token, logprob, completion.finish_reason if last else None, top)
        if output.finished:
            self._forget([number], abort=False)

    def _forget(self, numbers: Sequence[int], abort: bool = True) -> None:
        if abort and numbers and self._engine is not None:
            self._engine.abort_request([str(number) for number in numbers])
        for number in numbers:
            self._waiting.discard(number)
            self._told.pop(number, None)
            self._shared.drop(number)


def _refuse_broken(index: int, request: DecodeRequest, events: Sequence[DecodeEvent]) -> None:
    if events and events[-1].end == "error":
        raise InvariantError.at(
            f"request {index} of the sampler, adapter {request.adapter or 'none'}",
            "the model's logits are not finite",
            "finite numbers",
            f"nan or inf at reply token {len(request.begun) + len(events) - 1}",
            "look at the adapter's weights and at the base model's precision",
        )


def _clear_broken(worker: Any) -> None:
    """Zero keys and values that are not finite: of rows that are over, or will be with their next token. A kernel multiplies what a
    row may not see by 0, which leaves nan what is nan."""
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, (list, tuple)) else (cache,):
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)


def _result(request: DecodeRequest, events: Sequence[DecodeEvent]) -> DecodeResult:
    tokens = request.begun + tuple(event.token_id for event in events)
    return DecodeResult(tokens, tuple(event.logprob for event in events), events[-1].end == "stop")


def _set_environment() -> None:
    """Before vLLM is imported, which reads some of it then."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the second one takes no logits processors
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would tell its makers of every start
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _started(options: VLLMOptions, processor: type) -> Any:
    """vLLM's engine, in this process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    _refuse_device(options, str(current_platform.device_type))
    values: dict[str, Any] = {
        "model": options.model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": options.dtype,
        "enable_lora": True,
        "max_loras": options.adapters
        + (options.device.type == "cpu"),  # rows without an adapter take the last slot there: kept zero
        "max_lora_rank": options.max_rank,
        "max_num_seqs": options.max_rows,
        "max_model_len": options.longest,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager or options.device.type == "cpu",
        "enable_sleep_mode": options.enable_sleep_mode,
        "logits_processors": [processor],
        "async_scheduling": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    if options.step_tokens is not None:
        values |= {"max_num_batched_tokens": options.step_tokens, "enable_chunked_prefill": True}
    try:
        return LLMEngine.from_engine_args(EngineArgs(**values))
    except Exception as error:
        raise _translated(error, options.where) from error


def _refuse_device(options: VLLMOptions, built: str) -> None:
    """ResourceError unless vLLM, made for `built`, would take the device that is ours."""
    ours, where = options.device, options.where
    if built != ours.type:
        raise ResourceError.at(
            where,
            f"vLLM {vllm_version()} here is made for {built}, and whoever samples has {ours.type}",
            ours.type,
            built,
            "install the vLLM of that device, or give the process one (generator.num_gpus, learner.num_gpus,"
            " replicas.num_gpus)",
        )
    if ours.index:
        fix = "let CUDA_VISIBLE_DEVICES show this process its own alone"
        raise ResourceError.at(where, "vLLM takes the first GPU that its process sees", "cuda:0", str(ours), fix)


def _translated(error: Exception, where: str) -> Exception:
    """What vLLM says of a model or a machine that it cannot use, in a line.   where: the field that chose vLLM."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= 300 else said[:300] + " ..."
    memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "memory" in said.lower()
    if memory or "kv cache" in said.lower():
        fix = (
            "raise rollout.gpu_memory_utilization or rollout.kv_cache_gb, or lower max_prompt_length and response_length"
            if where == "rollout.engine"
            else "raise vllm.gpu_memory_utilization or vllm.kv_cache_gb, or lower limits.max_context"
        )
        return ResourceError.at(where, f"vLLM {vllm_version()} has not enough memory: {said}", fix=fix)
    if isinstance(error, (ValueError, NotImplementedError, RuntimeError, KeyError, TypeError, AssertionError)):
        fix = f"set {where}: builtin"
        return ConfigError.at(where, f"vLLM {vllm_version()} cannot run this model: {said}", fix=fix)
    return error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what vLLM changes in the process that it starts in: the generators, which it seeds; torch's threads, which on a CPU
    it does not let anybody set any more; the garbage collector, which it keeps from everything that there is."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        gc.unfreeze()
