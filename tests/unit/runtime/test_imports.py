"""Functions by name: imported once, the garbage collector left as it was."""

from __future__ import annotations

import gc
import sys

import pytest

from rlhf_ray.runtime.imports import call_imported, imported


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = gc.get_freeze_count()
    if not enabled:
        gc.disable()
    try:
        assert imported("colorsys:rgb_to_hsv")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)
        monkeypatch.delitem(sys.modules, "colorsys")
        assert call_imported("colorsys:rgb_to_hsv", 1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
        with pytest.raises(ImportError):
            imported("no_such_module_here:run")
        assert gc.isenabled() is enabled and gc.get_freeze_count() == frozen
    finally:
        gc.enable()


def test_a_function_is_itself() -> None:
    assert imported(len) is len
