"""Adapters that are more than plain LoRA, for the one thing that can be done with them here: merge them, by PEFT itself.

DoRA, modules saved whole (`modules_to_save`), adapted embeddings and token rows: all of them change weights that the roles of a job
share, so nothing is trained from one of them. It can be a policy that answers, with a base of its own that it is merged into. The
files pass the same gate as plain adapters, these options aside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rlhf_ray.errors import ArtifactError, Problem
from rlhf_ray.models.adapter_files import (
    CONFIG,
    MALFORMED,
    WEIGHTS,
    AdapterFiles,
    by_peft,
    check_config,
    check_folder,
    is_plain_name,
    read_adapter,
    targets_of,
)
from rlhf_ray.models.sources import one_line
from rlhf_ray.storage.files import read_json, sha256_tensors

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS: dict[str, Any] = {"use_dora": False, "modules_to_save": None, "trainable_token_indices": None}
"""What PEFT has and the gate does not take, and the value that means off."""


def read_any(folder: Path | str) -> AdapterFiles:
    """A plain adapter as `read_adapter` reads it, or one that is more than that (`more_than_lora`)."""
    return read_for_merge(folder) or read_adapter(folder)


def more_than_lora(files: AdapterFiles) -> str:
    """What makes it more than plain LoRA, as PEFT calls it; "" for a plain one."""
    if files.config.keys().isdisjoint(OPTIONS):
        return ""
    return ", ".join(name for name in OPTIONS if files.config[name]) or "LoRA on embeddings"


def read_for_merge(folder: Path | str) -> AdapterFiles | None:
    """An adapter with one of OPTIONS, or on embeddings: its tensors are as stored, its config has OPTIONS besides. None for others.

    ArtifactError for everything that `read_adapter` refuses beside OPTIONS."""
    import torch
    from safetensors.torch import load_file

    folder = Path(folder)
    check_folder(folder)
    raw = read_json(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            on_embeddings = any("lora_embedding_" in key for key in file.keys())  # noqa: SIM118
    except SafetensorError:  # read_adapter says so
        return None
    is_reward = raw.get("task_type") == "SEQ_CLS"  # whose saved module is its head
    if is_reward or not (on_embeddings or any(raw.get(name) for name in OPTIONS)):
        return None
    tensors = load_file(folder / WEIGHTS)
    where = str(folder / CONFIG)
    config = check_config({**raw, **OPTIONS}, where)
    saved = raw.get("modules_to_save") or []
    problems = []
    if config["ranks_differ"] or config["alphas"]:
        what = "rank_pattern or alpha_pattern beside DoRA, saved modules or embeddings is not merged here"
        problems.append(Problem(where, what, fix=by_peft(raw)))
    if not isinstance(saved, list) or not all(map(is_plain_name, saved)):
        got = repr(saved)[:80]
        problems.append(Problem(f"{where}: modules_to_save", "bad value", "a list of module names", got, MALFORMED))
    bad = [key for key, t in tensors.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())]
    problems += [Problem(f"{folder / WEIGHTS}: {key}", "holds values that are not finite numbers") for key in bad]
    ArtifactError.raise_all(problems)
    config |= {name: raw.get(name) for name in OPTIONS}
    config["target_modules"] = targets_of(folder, config["target_modules"])
    return AdapterFiles(config, tensors, None, sha256_tensors({k: t.float() for k, t in tensors.items()}), str(folder))


def merge_by_peft(
    model: Any, files: AdapterFiles, outputs: Callable[[Any], Tensor]
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Merge into `model` by PEFT. Returns the merged model, and `outputs` of the base, of base and adapter, and of the merged one.

    ArtifactError unless every tensor of the file finds its place, and every place of the adapter its tensor."""
    import peft

    base = outputs(model)
    config = peft.LoraConfig(
        r=files.config["r"],
        lora_alpha=files.config["lora_alpha"],
        target_modules=files.config["target_modules"],
        use_rslora=files.config["use_rslora"],
        fan_in_fan_out=files.config["fan_in_fan_out"],
        task_type="CAUSAL_LM",
        **{name: files.config[name] for name in OPTIONS},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft_model = peft.PeftModel(model, config, "merge")
        except ValueError as e:
            raise ArtifactError.at(files.path, f"does not fit its base: {one_line(e)}") from e
        expected = peft.get_peft_model_state_dict(peft_model, adapter_name="merge")
        lacking, strange = (
            sorted(expected.keys() - files.tensors.keys()),
            sorted(files.tensors.keys() - expected.keys()),
        )
        problems = [Problem(files.path, f"lacks tensor {key}") for key in lacking]
        problems += [Problem(files.path, f"tensor {key} has no place in this model") for key in strange]
        ArtifactError.raise_all(problems)
        peft.set_peft_model_state_dict(peft_model, files.tensors, adapter_name="merge")
        peft_model.eval()
        adapted = outputs(peft_model)
        merged = peft_model.merge_and_unload(safe_merge=True)
    words, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    if words is not head:
        merged.config.tie_word_embeddings = False
    return merged, base, adapted, outputs(merged)
