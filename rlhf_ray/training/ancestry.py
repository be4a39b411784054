"""What the models that a stage starts from, or is scored by, were trained on: is it evaluated on prompts that they have seen?

A run's manifest names its parents, so the whole chain is walked: PPO's policy, its SFT run, its reward runs and what those started
from. Training rows may be shared. A held-out prompt that an ancestor trained on is another matter: what is measured there is partly
remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import DataConfig
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.load import HeldOutRule, StageRows, load_ptx_rows, load_rows
from rlhf_ray.data.records import Row
from rlhf_ray.data.splits import Half, Overlap, overlap
from rlhf_ray.errors import ConfigError, RlhfRayError
from rlhf_ray.models.lineage import merged_manifest, promoted_manifest
from rlhf_ray.models.specs import split_step
from rlhf_ray.storage.run_folder import RunFolder, is_run, open_run

READS: dict[str, tuple[RowKind, Half | None]] = {
    "sft": ("sft", None),
    "dpo": ("preference", "reward"),
    "reward": ("preference", "reward"),
    "ppo": ("prompt", "ppo"),
}
"""Stage -> the rows it trains on."""


@dataclass(frozen=True)
class Ancestor:
    """A run. role: whose it is for the stage that asks, e.g. `sft` or `reward:helpful`."""

    role: str
    run: RunFolder

    @property
    def data(self) -> DataConfig:
        """Raises KeyError or a ValueError if the run's configuration has none that this version reads."""
        return DataConfig(**self.run.config()["data"])

    @property
    def ptx_data(self) -> DataConfig | None:
        """Of the supervised loss that PPO mixed in, if it did."""
        config = self.run.config()
        return DataConfig(**config["ptx_data"]) if config.get("ptx_coef") and config.get("ptx_data") else None

    def __str__(self) -> str:
        return f"{self.role} ({self.run.path})"


def ancestors(sources: Iterable[tuple[str, str]]) -> list[Ancestor]:
    """The runs behind `sources`, (role, path) each, and behind those; each once. What is no run of ours is passed over.

    path: a run, RUN@STEP, an adapter in a run, a merged checkpoint or an adapter of the registry."""
    found: dict[str, Ancestor] = {}
    waiting = list(sources)
    while waiting:
        role, path = waiting.pop(0)
        run = _run_of(path)
        if run is None:
            waiting += [(role, parent["path"]) for parent in _parents_of_files(path)]
        elif str(run.path) not in found:
            found[str(run.path)] = Ancestor(role, run)
            waiting += [(f"{parent['role']} of {role}", parent["path"]) for parent in run.manifest().get("parents", ())]
    return [ancestor for ancestor in found.values() if ancestor.run.stage in READS]


def _run_of(path: str) -> RunFolder | None:
    place = Path(split_step(path)[0])
    places = [place]
    if place.name == "adapter":  # RUN/adapter, RUN/checkpoints/step_000010/adapter
        places += [place.parent, place.parent.parent.parent]
    return next((open_run(folder, verify=False) for folder in places if is_run(folder)), None)


def _parents_of_files(path: str) -> Iterable[Mapping[str, Any]]:
    if (merged := merged_manifest(path)) is not None:
        return list(merged.get("parents", ()))
    if (promoted := promoted_manifest(path)) is not None:
        return [{"path": promoted["source"]["run_dir"]}]
    return ()


def check_ancestors(
    rows: StageRows, sources: Iterable[tuple[str, str]], refuse: bool = True
) -> tuple[list[str], list[str]]:
    """Header lines and warnings about `rows` of a stage and what the ancestors among `sources` trained on.

    Raises ConfigError, naming both rules, if prompts are held out here by their hash, and an ancestor held out otherwise and
    trained on some of them. refuse: false warns of it, where a run that was begun with these rows is resumed."""
    lines: list[str] = []
    warnings: list[str] = []
    for ancestor in ancestors(sources):
        try:
            trained = _trained_rows(ancestor)
            rules = [HeldOutRule.of(data) for data in (ancestor.data, ancestor.ptx_data) if data is not None]
        except (RlhfRayError, OSError, ValueError, KeyError):
            lines.append(f"{ancestor.role}: its training rows can no longer be read: overlap unknown")
            continue
        if "held_out" not in ancestor.run.manifest() and any(r.key.question() != r.key.canonical() for r in trained):
            lines.append(f"{ancestor.role}: an older version held out whole conversations: overlap unknown")
            continue
        shared, leaked = overlap(rows.train, trained), overlap(rows.held_out, trained)
        if shared.count or leaked.count:
            lines.append(
                f"{_of(shared, 'training')} and {_of(leaked, 'held-out')} are training rows of {ancestor.role}"
            )
        rule = next((rule for rule in rules if rule != rows.rule), rows.rule)
        if leaked.count and rule != rows.rule and not rows.rule.files and refuse:
            raise ConfigError.at(
                "data.held_out_fraction",
                f"{ancestor} held out by {rule}, this stage by {rows.rule}: {_of(leaked, 'held-out')} were trained on there"
                f" (first {leaked.first})",
                "one rule along the chain",
                fix="use the ancestor's rule here, or train it again with this one",
            )
        if leaked.count:
            warnings.append(
                f"{_of(leaked, 'held-out')} were trained on by {ancestor} (first {leaked.first}): what is measured on them will"
                " look too good"
            )
    return lines, warnings


def _of(found: Overlap, kind: str) -> str:
    return f"{found.count:,} of {found.total:,} {kind} prompts"


def _trained_rows(ancestor: Ancestor) -> Sequence[Row]:
    kind, half = READS[ancestor.run.stage]
    rows, mixed = load_rows(ancestor.data, kind, half), ancestor.ptx_data
    return rows.train if mixed is None else (*rows.train, *load_ptx_rows(mixed, rows.held_out).train)
