"""A run that goes on elsewhere says why it does not go on to the same bits: once, and only what differs."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.console import LocalConsole
from rlhf_ray.runtime.session import Session, process_session
from rlhf_ray.training.environment import environment, warn_of_differences

BACKBONE: Any = SimpleNamespace(identity=SimpleNamespace(precision="float32"), attn_implementation="sdpa")


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def session(said: io.StringIO) -> Session:
    return process_session(LocalConsole(file=said), num_threads=1)


def test_what_bits_depend_on_is_stored(session: Session) -> None:
    found = environment(session, BACKBONE)
    assert (found["world size"], found["threads"], found["dtype"], found["attention"]) == (1, 1, "float32", "sdpa")
    assert {"device", "python", "torch", "transformers", "peft", "deepspeed", "ray", "rlhf_ray"} <= found.keys()


def test_one_line_names_what_differs(session: Session, said: io.StringIO) -> None:
    now = environment(session, BACKBONE)
    warn_of_differences({"environment": now}, session, BACKBONE)
    assert said.getvalue() == ""
    saved = {**now, "threads": 2, "torch": "2.0", "dtype": "bfloat16", "gone": "1.2"} | {"attention": "eager"}
    del saved["peft"]
    warn_of_differences({"environment": saved}, session, BACKBONE)
    assert said.getvalue() == (
        f"warning: resumes, not bit-exact: threads 2 -> 1, dtype bfloat16 -> float32, attention eager -> sdpa, "
        f"torch 2.0 -> {now['torch']}, gone 1.2 -> none, peft none -> {now['peft']}\n"
    )
    warn_of_differences({"environment": saved}, replace(session, rank=1), BACKBONE)
    assert said.getvalue().count("\n") == 1


def test_a_gpu_repeats_no_bits_and_says_so(
    session: Session, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-exactness is a claim about the CPU: on a GPU each resumed run says why it is not, also on the same one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    on_gpu = replace(session, device=torch.device("cuda", 0))
    now = environment(on_gpu, BACKBONE)
    assert now["device"] == "NVIDIA H200"
    warn_of_differences({"environment": now}, on_gpu, BACKBONE)
    assert said.getvalue() == (
        "warning: resumes, not bit-exact: the backward pass of attention adds in no fixed order on a GPU\n"
    )


def test_an_older_checkpoint_knows_ranks_and_threads(session: Session, said: io.StringIO) -> None:
    warn_of_differences({}, session, BACKBONE)
    warn_of_differences({"world_size": 1, "num_threads": 1}, session, BACKBONE)
    assert said.getvalue() == ""
    warn_of_differences({"world_size": 2, "num_threads": 1}, session, BACKBONE)
    assert said.getvalue() == "warning: resumes, not bit-exact: world size 2 -> 1\n"
