"""The demo's files: demonstrations, preferences and prompts of the tiny world, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.tinyworld.rows import preference_rows, prompt_rows, sft_rows

DONE = "world.json"


@dataclass(frozen=True)
class Sizes:
    """Rows of each file, and the share of preferences whose label is flipped."""

    sft: int = 3000
    preferences: int = 8000
    prompts: int = 4000
    label_noise: float = 0.05


def write_world(folder: Path | str, seed: int, sizes: Sizes = Sizes()) -> Path:
    """Write sft.jsonl, preferences.jsonl and prompts.jsonl into `folder`; files that are there, whole, are kept. Returns it."""
    from rlhf_ray.storage.files import atomic_write_json, atomic_write_text, describe_files, read_json

    folder = Path(folder)
    recipe = {"seed": seed, **asdict(sizes)}
    if (folder / DONE).is_file():
        made = read_json(folder / DONE)
        if made.get("recipe") == recipe and made.get("files") == describe_files(folder, skip=(DONE,)):
            return folder
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Sequence[Mapping[str, Any]]] = {
        "sft.jsonl": sft_rows(sizes.sft, seed),
        "preferences.jsonl": preference_rows(sizes.preferences, seed, sizes.label_noise),
        "prompts.jsonl": prompt_rows(sizes.prompts, seed),
    }
    for name, rows in files.items():
        atomic_write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    atomic_write_json(folder / DONE, {"recipe": recipe, "files": describe_files(folder, skip=(DONE,))})
    return folder
