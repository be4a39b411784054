"""PEFT adapters of older days, `adapter_model.bin`: the same tensors, out of the pickle and into safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.importers.pickles import filled_at_once, new_folder, read_pickled_tensors
from rlhf_ray.storage.files import atomic_save_tensors


def import_peft(adapter: Path | str, output_dir: Path | str) -> Path:
    """Write the adapter in folder `adapter` anew and return the new folder; the strict gate of `read_adapter` decides.

    ArtifactError, with nothing written, if the pickle holds more than tensors or the adapter does not pass."""
    source, target = Path(adapter), new_folder(output_dir)
    if not (source / "adapter_config.json").is_file():
        raise ArtifactError.at(str(source), "no adapter_config.json", "the folder of a PEFT adapter")
    tensors = read_pickled_tensors(source / "adapter_model.bin")
    with filled_at_once(target) as folder:
        shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
        atomic_save_tensors(folder / "adapter_model.safetensors", tensors)
        read_adapter(folder)
    return target
