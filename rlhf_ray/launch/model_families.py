"""Whether the bases of a job are of families that work here, asked before anything is loaded or started.

Most models are of attention alone and need no trial. Which ones may keep a state is read off transformers' source text, so that a
driver imports no models to find out that there is nothing to try.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_ray.config.pipeline import stages_of

_MORE = re.compile(
    r"_is_stateful = True|create_recurrent_attention_mask|(indexed|sparse|reference_sliding)_attention|_sparse\""
    r"|as a standalone, add .is_decoder=True|\(\w+, past_key_values_length=past_key_values_length\)"
)
"""What files of models with more than keys and values say (transformers 5.23): that they have a state, that its layers take a mask
of their own, that layers choose by an index what they attend to, that they are encoders unless their config says otherwise, or that
positions are counted from the cache, whatever they are told (TrOCR).
Those that make their masks themselves are tried as well."""


def check_models(config: Any) -> list[str]:
    """ConfigError if a base of a job, a pipeline or a service is of a family that would be sampled or scored wrong. Returns a line
    for each of which nobody knows."""
    models = dict.fromkeys((stage.model_name_or_path, stage.revision) for stage in stages_of(config))
    return [line for path, revision in models if (line := check_model(path, revision))]


def check_model(path: str, revision: str | None = None) -> str:
    """The same of one model, a folder or a Hub id: "", or the line. What cannot be read is told by whoever loads it."""
    file = _config_file(path, revision)
    if file is None or not may_keep_more(file):
        return ""
    from rlhf_ray.sampler.probe import check_config

    if check_config(file):
        return ""
    config = json.loads(file.read_text(encoding="utf-8"))
    decoder = config["text_config"] if _is_config(config.get("text_config")) else config
    if not _family_keeps_more(str(decoder["model_type"])):
        return ""
    return (
        f"{path}: models of type {decoder['model_type']} may keep more than keys and values, and no tiny copy of this config could"
        " be made to try whether they are sampled right here; compare some greedy replies with those of transformers' generate"
    )


def may_keep_more(config_file: Path) -> bool:
    """Whether a config.json may be of a model with more than keys and values; False if it cannot be read."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        types = [config["model_type"], *(v["model_type"] for v in config.values() if _is_config(v))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return any(_family_keeps_more(str(name)) for name in types)


def _is_config(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


@lru_cache(maxsize=64)
def _family_keeps_more(model_type: str) -> bool:
    spec = importlib.util.find_spec("transformers")
    folder = Path(str(spec.origin)).parent / "models" if spec is not None else Path()
    name = model_type.replace("-", "_")
    files = [folder / name / f"modeling_{name}.py" for name in (name, name.removesuffix("_text"))]
    found = next((file for file in files if file.is_file()), None)
    text = "" if found is None else found.read_text(encoding="utf-8")
    return "create_causal_mask" not in text or _MORE.search(text) is not None


def _config_file(path: str, revision: str | None) -> Path | None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except (HfHubHTTPError, OSError, ValueError):
        return None
