"""Artefacts of the two systems this one replaces, and of llama.cpp, turned into safetensors that every stage takes."""

from rlhf_ray.models.importers.gguf import import_gguf
from rlhf_ray.models.importers.loralib import import_loralib
from rlhf_ray.models.importers.pickled_peft import import_peft
from rlhf_ray.models.importers.weight_diff import import_weight_diff

__all__ = ["import_gguf", "import_loralib", "import_peft", "import_weight_diff"]
