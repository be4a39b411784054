"""The learner group writes into the run folder from whatever node it is on: every such node must see it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.ask_nodes import ask_nodes
from rlhf_ray.launch.resources import ResourceRequest

LOOK_S = 5.0
"""Longest wait until a folder that was just made is seen on another node: network file systems look again after seconds."""


def check_all_see(folder: Path, request: ResourceRequest) -> None:
    """Ask each node that could take a worker of `request` whether it sees `folder`, which is there. ConfigError if one does not."""
    for node, sees in ask_nodes(request, _sees, str(folder)):
        if not sees:
            raise unseen(folder, node)


def unseen(folder: Path, node: str) -> ConfigError:
    fix = "put output_dir on storage that all nodes share, or keep the learner on one node by learner.label_selector"
    return ConfigError.at("output_dir", f"{folder.parent} is not visible on node {node}", "a folder that is", fix=fix)


def _sees(folder: str) -> bool:
    deadline = time.monotonic() + LOOK_S
    while not os.path.isdir(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
