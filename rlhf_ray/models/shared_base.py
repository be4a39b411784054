"""Loaded bases on which several runs of one process stand, each with adapters and heads of its own.

A base is loaded by the first run that asks for it. Adapters that a run trains or copies have names that begin with the run's;
frozen ones that are equal, such as the reference and the reward of all trials of a sweep, are there once. Outside of `use_adapter`
no adapter is active, and outside of a run's turn (roles/turns.py) none of its parameters wants a gradient: a pass or an optimizer
step of another run finds nothing of it. Nothing here is for several threads at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from peft import PeftModel
from torch import nn

from rlhf_ray.models.adapters import AdapterFiles, remove_adapter, rest_on_base
from rlhf_ray.models.backbone import Backbone


@dataclass
class _Frozen:
    """A frozen adapter. users: the runs that need it."""

    name: str
    users: set[str] = field(default_factory=set)


class SharedBase:
    """The bases of one process."""

    def __init__(self) -> None:
        self._backbones: dict[str, Backbone] = {}
        self._wrapped: dict[int, PeftModel] = {}  # by the id of the backbone
        self._frozen: dict[tuple[int, str, str], _Frozen] = {}
        self._named = 0
        self._last: dict[
            int, tuple[PeftModel, str]
        ] = {}  # by the id of the model: its only adapter, to go when another comes

    def _remove(self, model: PeftModel, name: str) -> None:
        """Take an adapter away; the last one of a model when another one is there, since PEFT cannot be without any."""
        if list(model.peft_config) == [name]:
            self._last[id(model)] = model, name
        elif name in model.peft_config:
            remove_adapter(model, name)

    def place(self, run: str) -> Place:
        """A place for one more run. run: what its adapters' names begin with."""
        return Place(self, run)


class Place:
    """One run's part of a `SharedBase`: what an `Assembly` builds on."""

    def __init__(self, shared: SharedBase, run: str) -> None:
        self.shared, self.run = shared, run
        self._own: list[tuple[PeftModel, str]] = []
        self._trained: list[nn.Parameter] = []

    def adapter(self, role: str) -> str:
        """The name of this run's adapter for `role`."""
        return f"{self.run}_{role}"

    def backbone(self, key: str, load: Callable[[], Backbone]) -> Backbone:
        """The base `key`, loaded if nobody has yet. key: all that decides what is loaded."""
        if key not in self.shared._backbones:
            self.shared._backbones[key] = load()
        return self.shared._backbones[key]

    def model(self, backbone: Backbone) -> PeftModel | None:
        """The PEFT model around a base, None while it has had no adapter."""
        return self.shared._wrapped.get(id(backbone))

    def frozen(self, backbone: Backbone, files: AdapterFiles) -> tuple[str, bool]:
        """(name of the frozen adapter that `files` holds, whether it has to be loaded under that name)."""
        key = id(backbone), files.sha256, json.dumps(files.config, sort_keys=True, default=str)
        is_new = key not in self.shared._frozen
        if is_new:
            self.shared._named += 1
            self.shared._frozen[key] = _Frozen(f"frozen{self.shared._named}")
        found = self.shared._frozen[key]
        found.users.add(self.run)
        return found.name, is_new

    def added(self, backbone: Backbone, model: PeftModel, name: str) -> None:
        """An adapter is there, by whichever way it came."""
        self.shared._wrapped[id(backbone)] = model
        rest_on_base(model)
        if id(model) in self.shared._last:
            self.shared._remove(*self.shared._last.pop(id(model)))
        if name.startswith(f"{self.run}_"):
            self._own.append((model, name))

    def trains(self, models: nn.Module) -> None:
        """What wants gradients in `models` is this run's, and does so in its turns."""
        self._trained = [p for p in models.parameters() if p.requires_grad]

    def pause(self) -> None:
        """Others run now."""
        for parameter in self._trained:
            parameter.requires_grad_(False)

    def resume(self) -> None:
        """This run runs again."""
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def leave(self) -> None:
        """Take this run's adapters away, and the frozen ones that nobody needs any more. The bases stay for who comes next."""
        self.pause()
        self._trained = []
        for model, name in self._own:
            self.shared._remove(model, name)
        self._own = []
        for key, frozen in list(self.shared._frozen.items()):
            frozen.users.discard(self.run)
            if not frozen.users:
                del self.shared._frozen[key]
                wrapped = self.shared._wrapped.get(key[0])
                if wrapped is not None:
                    self.shared._remove(wrapped, frozen.name)
