"""A job that fails before its first step leaves no run behind."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator

from rlhf_ray.models.artifact import RunFolder


@contextlib.contextmanager
def discarded_on_error(folder: RunFolder, is_new: bool, kept: Callable[[], bool] = bool) -> Iterator[None]:
    """Leave no new run behind that has not taken a step: the job is mended and started again under the same name.

    kept: asked at an error whether there is something in it to keep; default: there is not."""
    try:
        yield
    except BaseException:
        if is_new and not kept():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
