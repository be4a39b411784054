"""A tiny base, adapters on it that respond differently, and a service over them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_in_float32


def load_tiny(folder: Path) -> Backbone:
    return load_in_float32(str(folder))


@pytest.fixture(scope="session")
def base_dir(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Callable[..., Path]:
    """adapters(seed, head=False) -> plain PEFT folder of a random adapter; different seeds respond differently."""
    root, folders = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def make(seed: int, head: bool = False, r: int = 4) -> Path:
        folder = root / f"{'reward' if head else 'policy'}_{seed}_{r}"
        if folder.name not in folders:
            backbone = load_tiny(base_dir)
            model = wrap(backbone.model, LoraConfig(r=r, lora_alpha=2.0 * r), "ad", seed=seed)
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                k: torch.randn(t.shape, generator=generator) * 0.3 if "lora_B" in k else t
                for k, t in adapter_tensors(model, "ad").items()
            }
            weight = torch.randn(1, backbone.hidden_size, generator=generator) if head else None
            kind: Any = "SEQ_CLS" if head else "CAUSAL_LM"
            save_adapter(folder, tensors, adapter_config(model, "ad"), kind, weight, str(base_dir))
            folders[folder.name] = folder
        return folders[folder.name]

    return make


@pytest.fixture
def backbone(base_dir: Path) -> Iterator[Backbone]:
    yield load_tiny(base_dir)


class LocalBackend:
    """The backend of the API without Ray in between: one replica, in this process."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def complete(self, request: Any) -> list[dict[str, Any]]:
        return [event async for events in self.replica.events(request, whole=True) for event in events]

    def stream(self, request: Any) -> Any:
        return self.replica.events(request)

    async def score(self, request: Any, key: str) -> dict[str, Any]:
        from rlhf_ray.serve.score import score_on

        return await score_on(self.replica, request, key)

    async def models(self) -> list[dict[str, Any]]:
        return list(await self.replica.models())

    async def tokenize(self, model: str, prompt: Any) -> Any:
        return await self.replica.tokenize(model, prompt)

    async def detokenize(self, ids: list[int]) -> Any:
        return await self.replica.detokenize(ids)

    async def tokenizer_info(self) -> Any:
        return await self.replica.tokenizer_info()

    async def check_health(self) -> None:
        await self.replica.check_health()


class LiveService:
    """The real application on a real socket, its event loop on a thread. url; replica; `call` runs a coroutine on that loop."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(60)

    async def _serve(self) -> None:
        import uvicorn

        from rlhf_ray.serve.api import HttpApi
        from rlhf_ray.serve.replica import Replica

        self.loop = asyncio.get_running_loop()
        self.replica = Replica(self.config)
        await self.replica.start()
        self.api = HttpApi(self.config, LocalBackend(self.replica))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(self.api.app, log_level="warning"))
        self.ready.set()
        await self.server.serve([listening])
        await self.replica.close()

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, base_dir: Path, tiny_run: Callable[..., Path]
) -> Iterator[Callable[..., LiveService]]:
    """live(**fields of ServeConfig) -> a service with adapters `one`, `two` and `judge`; equal fields give the same one."""
    from rlhf_ray.config.serve import ServeConfig

    root, services = tmp_path_factory.mktemp("live"), dict[str, LiveService]()
    runs = {
        name: str(tiny_run(root / name, base_dir, stage=stage, seed=seed, template="none"))
        for name, stage, seed in (("one", "sft", 1), ("two", "ppo", 2), ("judge", "reward", 3))
    }

    def make(**fields: Any) -> LiveService:
        key = repr(sorted(fields.items()))
        if key not in services:
            values = {
                "output_dir": str(root / f"serve{len(services)}"),
                "model_name_or_path": str(base_dir),
                "adapters": runs,
            }
            limits = {"default_max_tokens": 16, "max_tokens": 150, **fields.pop("limits", {})}
            services[key] = LiveService(ServeConfig(**{**values, "template": "none", "limits": limits, **fields}))
        return services[key]

    yield make
    for service in services.values():
        service.close()
