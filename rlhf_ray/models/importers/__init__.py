"""Artefacts of the two systems this one replaces, turned into safetensors that every stage takes."""

from rlhf_ray.models.importers.loralib import import_loralib
from rlhf_ray.models.importers.pickled_peft import import_peft
from rlhf_ray.models.importers.weight_diff import import_weight_diff

__all__ = ["import_loralib", "import_peft", "import_weight_diff"]
