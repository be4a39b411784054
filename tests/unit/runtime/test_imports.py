"""Functions by name: imported once, the garbage collector left as it was."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.runtime.imports import LOADING, begin_imports, call_imported, imported, importing


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


def test_the_collector_waits_while_modules_are_imported() -> None:
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_process_that_ends_does_not_walk_through_what_it_imported() -> None:
    """Its last collection finds nothing to look at: all is frozen by then."""
    code = "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()))); import rlhf_ray.runtime.imports"
    walked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(walked) < 100


def test_a_function_is_itself() -> None:
    assert imported(len) is len


def test_imports_are_begun_on_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs the module meanwhile waits for it, once imported; an error is raised where the function is asked for."""
    (tmp_path / "slow_module.py").write_text(
        "import threading, time\ntime.sleep(0.3)\nthread = threading.current_thread().name\ndef work(): return thread\n"
    )
    (tmp_path / "broken_module.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    begin_imports("slow_module:work")
    begin_imports("broken_module:work")
    while "slow_module" not in sys.modules:  # it is being imported
        time.sleep(0.01)
    assert call_imported("slow_module:work") == "imports"
    with pytest.raises(ValueError, match="broken"):
        call_imported("broken_module:work")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_why_it_is_empty_and_is_empty_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for stream, said in ((Terminal(), f"{LOADING}\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with importing():
            assert stream.getvalue() == said.partition("\r")[0]
        assert stream.getvalue() == said
    monkeypatch.setitem(sys.modules, "torch", io)
    monkeypatch.setattr(sys, "stderr", again := Terminal())
    with importing():
        assert again.getvalue() == ""
