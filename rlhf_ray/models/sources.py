"""From what a job file calls its model to a folder of safetensors, JSON and a tokenizer: found, or refused in one line.

Code that a checkpoint brings along is never run; pickled weights are read by torch's weights-only loader, which makes tensors and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from rlhf_ray.errors import ArtifactError, ConfigError, Problem, RlhfRayError
from rlhf_ray.storage.files import read_json, sha256_text
from rlhf_ray.storage.hash_cache import cached_sha256

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_NOT_WANTED = ["*/*", "consolidated*"]
_PICKLED_WANTED = ["pytorch_model*.bin"]
"""Of a repository without safetensors; training_args.bin and the like are never fetched."""
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises for a config.json that it cannot read."""
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that change when the same model is saved again, without changing what it computes."""


@dataclass(frozen=True)
class ModelSource:
    """folder: where the files are.  name: what to record, an absolute path or a Hub id.  revision: commit of a Hub model."""

    folder: Path
    name: str
    revision: str | None = None


def resolve_source(path: str, revision: str | None = None) -> ModelSource:
    """The folder of model `path`, a local folder or a Hub id; Hub files come from the cache or are fetched.

    ConfigError if there is no such model or it is no base model, with the way out."""
    where = "model_name_or_path"
    if path.rstrip("/").endswith("-wdiff"):
        raise ConfigError.at(
            where,
            f"{path} holds weight differences, not weights",
            "a base model",
            fix="recover the model first: rlhf-ray import weight-diff",
        )
    local = Path(path).expanduser()
    if local.exists():
        folder = local.resolve()
        _refuse_what_is_no_model(where, path, folder)
        return ModelSource(folder, str(folder))
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or not _HUB_ID.fullmatch(path):
        raise ConfigError.at(where, f"{path}: not found locally" + _offline_note())
    return _from_hub(where, path, revision)


def _offline_note() -> str:
    return "; offline mode (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""


def _refuse_what_is_no_model(where: str, path: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError.at(where, f"{path} is a file", "the folder of a model, or a Hub id")
    has_config = (folder / "config.json").exists()
    if (folder / "adapter_config.json").exists():
        base = _adapter_base(folder)
        raise ConfigError.at(
            where,
            f"{path} holds an adapter, not a base model",
            "the base that the adapter was trained on",
            fix=f"set model_name_or_path={base or '<its base>'}, and give the adapter as sft, a policy or a reward;"
            " or merge it: rlhf-ray merge",
        )
    if has_config:
        return
    if (folder / "params.json").exists() and any(folder.glob("consolidated.*.pth")):
        raise ConfigError.at(
            where,
            f"{path} is a raw Meta checkpoint (params.json, consolidated.*.pth)",
            "a folder in transformers' format",
            fix="convert it with transformers' convert_llama_weights_to_hf.py, or use the Hub's converted copy",
        )
    if (folder / "manifest.json").exists() and (folder / "adapter").is_dir():
        raise ConfigError.at(
            where,
            f"{path} is a run, whose result is an adapter",
            "a base model",
            fix=f"name its base here and give the run as sft, or merge it: rlhf-ray merge {path}",
        )
    raise ConfigError.at(where, f"{path} is not a model", "a folder with config.json and *.safetensors")


def _adapter_base(folder: Path) -> str | None:
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except ArtifactError:
        return None
    return base if isinstance(base, str) else None


def _from_hub(where: str, name: str, revision: str | None) -> ModelSource:
    """Download (or find in the cache) the files a model needs, and nothing else of the repository: pickled weights only where there
    are no others."""
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED)
        if not any(Path(folder).glob("*.safetensors")):
            commit = Path(folder).name
            snapshot_download(name, revision=commit, allow_patterns=_PICKLED_WANTED, ignore_patterns=_NOT_WANTED)
    except GatedRepoError as e:
        raise ConfigError.at(
            where,
            f"{name} is a gated repository",
            fix=f"accept its terms at {constants.ENDPOINT}/{name}, then log in: hf auth login",
        ) from e
    except RevisionNotFoundError as e:
        raise ConfigError.at("revision", f"{name} has no revision {revision!r}", "a branch, tag or commit") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise ConfigError.at(
            where,
            f"{name}: not found, neither as a local folder nor on {constants.ENDPOINT}",
            fix="check the name; a private repository needs: hf auth login",
        ) from e
    except LocalEntryNotFoundError as e:
        note = _offline_note() or f"; and {constants.ENDPOINT} does not answer"
        raise ConfigError.at(where, f"{name}: not found locally{note}") from e
    except OSError as e:
        raise ConfigError.at(where, f"{name}: cannot be fetched: {e}") from e
    # The cache names a snapshot's folder after its commit; a revision such as "main" is thereby pinned.
    return ModelSource(Path(folder), name, Path(folder).name)


def check_files(source: ModelSource) -> dict[str, Any]:
    """The model's config.json, after checking that its files are complete and safe to load.

    ArtifactError if the model needs code of its own (auto_map, of a type that transformers does not know: otherwise transformers'
    code is used), points at other weight files, or lacks a shard."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = source.folder
    config = read_json(folder / "config.json")
    own_code = [] if config.get("model_type") in CONFIG_MAPPING else ["auto_map"]
    problems = [
        Problem(str(folder / "config.json"), f"{key} is refused: a model may not choose code or files to load")
        for key in (*own_code, "transformers_weights")
        if config.get(key)
    ]
    tokenizer_config = folder / "tokenizer_config.json"
    if own_code and tokenizer_config.exists() and read_json(tokenizer_config).get("auto_map"):
        problems.append(Problem(str(tokenizer_config), "auto_map is refused: a tokenizer may not bring its own code"))
    ArtifactError.raise_all(problems)
    if (folder / GENERATION).exists():
        read_json(folder / GENERATION)  # a damaged one, and the stop tokens in it, transformers leaves out in silence
    weight_files(folder)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order, as transformers chooses them: safetensors, or pytorch_model.bin where there are
    none; one file rather than shards. ArtifactError if one is missing."""
    for index, whole in ((INDEX, "model.safetensors"), (PICKLED_INDEX, PICKLED)):
        if (folder / whole).exists():
            return [folder / whole]
        if (folder / index).exists():
            table = read_json(folder / index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise ArtifactError.at(str(folder / index), "weight_map is missing or empty")
            names = sorted({str(name) for name in table.values()})
            ArtifactError.raise_all(_shard_problems(folder, index, names))
            return [folder / name for name in names]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    expected = f"model.safetensors, or {INDEX} with its shards; or {PICKLED}"
    raise ArtifactError.at(str(folder), "no weights", expected, ", ".join(others[:3]) or "none")


def are_pickled(folder: Path) -> bool:
    """Whether the weights are in the format that torch.save writes."""
    return weight_files(folder)[0].suffix == ".bin"


def _shard_problems(folder: Path, index: str, names: list[str]) -> list[Problem]:
    problems, suffix = [], ".safetensors" if index == INDEX else ".bin"
    for name in names:
        if os.sep in name or not name.endswith(suffix):
            problems.append(Problem(str(folder / index), f"refused weight file {name!r}", f"a {suffix} file here"))
        elif not (folder / name).exists():
            problems.append(Problem(str(folder / name), "shard is missing"))
    return problems


_weights_seen: dict[tuple[tuple[str, int, int, int], ...], str] = {}


def weights_sha256(folder: Path) -> str:
    """Hash over the weight files, in order of their names. Computed once per process and state of the files, for large files once
    per machine (storage/hash_cache.py)."""
    files = weight_files(folder)
    stats = ((str(f.resolve()), f.stat()) for f in files)
    key = tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)
    if key not in _weights_seen:
        digest = hashlib.sha256()
        for file in files:
            digest.update(bytes.fromhex(cached_sha256(file)))
        _weights_seen[key] = digest.hexdigest()
    return _weights_seen[key]


def config_sha256(folder: Path) -> str:
    """Hash of config.json in canonical form, without the keys that only say who saved it when and how."""
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in _VOLATILE}
    return sha256_text(json.dumps(config, sort_keys=True))


def one_line(error: Exception) -> str:
    """First line of a library's error message, with the one below it that it announces."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def load_error(source: ModelSource, error: Exception) -> RlhfRayError:
    """A library's complaint about the files of `source`, as one line."""
    return ArtifactError.at(str(source.folder), f"cannot be loaded: {one_line(error)}")
