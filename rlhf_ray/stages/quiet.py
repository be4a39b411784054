"""Warnings that libraries give each other about their own future; a user can do nothing about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """FutureWarnings are not shown inside; other warnings are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
