"""Whether an error is what a rank sees of another rank that is gone. Ray Train then starts the group again; any other error would
come again, and is reported instead."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

from rlhf_ray.errors import RlhfRayError

_RAISED_BY_GLOO = re.compile(r"\[\S*/gloo/\S+:\d+\] ")
"""How gloo's C++ begins its messages, e.g. "[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3811."."""


def is_of_a_lost_peer(error: BaseException) -> bool:
    """By type and origin, along the chain of causes; never by words that any error may hold.

    NCCL and the store raise torch's DistError. Gloo raises a plain RuntimeError (measured in torch 2.13: a peer killed in
    all_reduce, broadcast, all_gather_object, barrier, monitored_barrier): it comes out of a function of torch.distributed, and
    names gloo's source file where an asynchronous collective is waited for elsewhere."""
    import ray.exceptions
    import torch.distributed as dist

    seen, ahead = set[int](), [error]
    while ahead:
        one = ahead.pop(0)
        if id(one) in seen:  # what a role raised has Ray's error as its cause, which holds it
            continue
        seen.add(id(one))
        if isinstance(one, RlhfRayError):
            return False
        if isinstance(
            one, ray.exceptions.RayTaskError
        ):  # of code that ran: that by itself tells of no process that is gone
            ahead += (
                [one.cause] if type(one.cause) is not ray.exceptions.RayError else []
            )  # in place of one that cannot be sent
        elif isinstance(one, (dist.DistError, ray.exceptions.RayError)):
            return True
        elif type(one) is RuntimeError:
            raised_there = _innermost(one.__traceback__).is_relative_to(Path(dist.__file__).parent)
            if raised_there or _RAISED_BY_GLOO.match(str(one)):
                return True
        ahead += [before for before in (one.__cause__ or one.__context__,) if before is not None]
    return False


def _innermost(traceback: TracebackType | None) -> Path:
    """The file of the Python frame that raised; an empty path without a traceback."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return Path(traceback.tb_frame.f_code.co_filename) if traceback is not None else Path()
