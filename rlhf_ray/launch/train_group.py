"""Ray Train's worker group, started without waiting for what could go on meanwhile.

Two things of Ray Train's cost seconds before the first worker has a process: its `TorchConfig` brings torch into the driver, and
into the controller before that does anything; and the controller waits for an actor that it starts itself, for autoscaling. Here
the controller imports torch while it waits for its workers, and that actor is begun by the driver.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ray.train.backend import Backend, BackendConfig

from rlhf_ray.runtime.imports import begin_imports


class TorchGroup(BackendConfig):
    """What `ray.train.torch.TorchConfig` is, by name. backend: nccl or gloo.  timeout_s: the longest that a rank waits for another
    one."""

    def __init__(self, backend: str, timeout_s: int) -> None:
        self.backend, self.timeout_s = backend, timeout_s

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the controller, which has time: its workers are yet to be started."""
        self.__dict__.update(state)
        begin_imports("torch:Tensor")

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchBackend

    @property
    def train_func_context(self) -> Any:
        return _worker_context

    def theirs(self) -> tuple[Backend, BackendConfig]:
        """Ray Train's own, which does the work."""
        from ray.train.torch import TorchConfig

        config = TorchConfig(backend=self.backend, timeout_s=self.timeout_s)
        return config.backend_cls(), config


class _TorchBackend(Backend):
    share_cuda_visible_devices = True  # as theirs

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        backend, config = _theirs(backend_config)
        backend.on_start(worker_group, config)

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        backend, config = _theirs(backend_config)
        backend.on_training_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        backend, config = _theirs(backend_config)
        backend.on_shutdown(worker_group, config)


def _theirs(config: BackendConfig) -> tuple[Backend, BackendConfig]:
    assert isinstance(config, TorchGroup)
    return config.theirs()


def _worker_context() -> Any:
    """Around the train function, in a worker."""
    from ray.train.torch import TorchConfig

    return TorchConfig().train_func_context()


def begin_coordinator() -> None:
    """Have the actor started for which the controller would wait, on a Ray of our own. Ray Train makes it if this cannot."""
    with contextlib.suppress(ImportError):
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()
