"""AlpacaFarm-LoRA's PPO checkpoints: `checkpoint-N/pytorch_model.bin`, a flat pickle without a word on rank, alpha or base.

    model.layers.{i}.self_attn.{w}_proj.lora_A                 policy
    base_model.model.layers.{i}.self_attn.{w}_proj.lora_A      critic: one prefix away from the names that PEFT uses
    value_head, value_head_bias                                critic

Both libraries store A as [r, in] and B as [out, r]: nothing is transposed. The rank is read off the shapes; alpha is nowhere and
has to be told (the published checkpoints: 64, with rank 8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_ray.errors import ArtifactError, ConfigError, Problem
from rlhf_ray.models.adapter_files import save_adapter
from rlhf_ray.models.importers.pickles import filled_at_once, new_folder, read_pickled_tensors
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.storage.files import atomic_write_json, sha256_file
from rlhf_ray.storage.run_folder import read_json

_KEY = re.compile(
    r"(?P<critic>base_model\.)?model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<module>[qkvo]_proj)\.(?P<part>lora_[AB])"
)
HEAD, HEAD_BIAS = "value_head", "value_head_bias"


def import_loralib(
    checkpoint: Path | str, base: str, lora_alpha: float, output_dir: Path | str, value_base: str | None = None
) -> Path:
    """Write OUTPUT/adapter (the policy) and OUTPUT/value (the value model with its head) as plain PEFT folders; return OUTPUT.

    checkpoint: the folder or its pytorch_model.bin.   base: what the policy belongs on, the recovered SFT model.   value_base: what
    the value model belongs on, the reward model's backbone; default: base.
    ArtifactError, with nothing written, if a key is unknown, missing, or does not fit the base; ConfigError if that is none."""
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ConfigError.at("lora_alpha", "bad value", "a finite number above 0", str(lora_alpha))
    target, source = new_folder(output_dir), Path(checkpoint)
    file = source / "pytorch_model.bin" if source.is_dir() else source
    tensors = read_pickled_tensors(file)
    parts, heads = sort_keys(tensors, str(file))
    config = read_json(resolve_source(base).folder / "config.json")
    if lacks := [name for name in ("num_hidden_layers", "hidden_size") if type(config.get(name)) is not int]:
        raise ConfigError.at(base, f"its config.json has no {lacks[0]}", "the LLaMA that the checkpoint was trained on")
    problems = [p for role in parts for p in _complete(parts[role], role, config, str(file))]
    if heads[HEAD].numel() != config["hidden_size"]:
        problems.append(
            Problem(str(file), "value_head does not fit", f"{config['hidden_size']} numbers", str(heads[HEAD].numel()))
        )
    ArtifactError.raise_all(problems)
    shapes = {role: _config(found, lora_alpha) for role, found in parts.items()}
    head = heads[HEAD].reshape(1, -1)
    story = {
        "from": "loralib",
        "source": str(file.absolute()),
        "sha256": sha256_file(file),
        "lora_alpha": lora_alpha,
        "dropped": {HEAD_BIAS: float(heads[HEAD_BIAS])},
    }
    with filled_at_once(target) as folder:
        save_adapter(folder / "adapter", parts["policy"], shapes["policy"], "CAUSAL_LM", None, base)
        save_adapter(folder / "value", parts["critic"], shapes["critic"], "SEQ_CLS", head, value_base or base)
        atomic_write_json(folder / "import.json", story)
    return target


def sort_keys(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({"policy", "critic"} -> PEFT key -> tensor, {head names -> tensor}). ArtifactError for what is unknown, missing, or of
    another form."""
    parts: dict[str, dict[str, Tensor]] = {"policy": {}, "critic": {}}
    heads = {name: tensors[name] for name in (HEAD, HEAD_BIAS) if name in tensors}
    problems = [Problem(where, f"{name} is missing") for name in (HEAD, HEAD_BIAS) if name not in tensors]
    if HEAD_BIAS in heads and heads[HEAD_BIAS].numel() != 1:
        problems.append(Problem(where, f"{HEAD_BIAS} is not one number", "1", str(heads[HEAD_BIAS].numel())))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            problems.append(Problem(where, f"{name} holds values that are not finite"))
        match = _KEY.fullmatch(name)
        if match:
            role = "critic" if match["critic"] else "policy"
            key = f"base_model.model.model.layers.{match['layer']}.self_attn.{match['module']}.{match['part']}.weight"
            parts[role][key] = tensor
            if tensor.ndim != 2 or 0 in tensor.shape:
                problems.append(
                    Problem(where, f"{name} is not a matrix", "[r, in] or [out, r]", str(list(tensor.shape)))
                )
        elif name not in heads:
            problems.append(Problem(where, f"unknown key {name}", "a LoRA tensor of q, k, v or o, or the value head"))
    ArtifactError.raise_all(problems)
    return parts, heads


def _complete(found: Mapping[str, Tensor], role: str, config: Mapping[str, Any], where: str) -> list[Problem]:
    """Four modules, A and B, in every layer of the base, of one rank, and of the base's width."""
    layers = int(config["num_hidden_layers"])
    expected = {
        f"base_model.model.model.layers.{i}.self_attn.{w}_proj.{part}.weight"
        for i in range(layers)
        for w in "qkvo"
        for part in ("lora_A", "lora_B")
    }
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    wanted = f"{len(expected)} tensors: q, k, v, o in {layers} layers"
    problems = []
    if missing:
        problems.append(
            Problem(where, f"the {role} lacks {missing[0]}", wanted, f"{len(found)}, {len(missing)} missing")
        )
    if extra:
        problems.append(
            Problem(where, f"the {role} has {extra[0]}, which the base does not have", wanted, f"{len(found)}")
        )
    ranks = {int(t.shape[0]) for k, t in found.items() if ".lora_A." in k}
    ranks |= {int(t.shape[1]) for k, t in found.items() if ".lora_B." in k}
    if len(ranks) > 1:
        problems.append(Problem(where, f"the {role} has several ranks", "one", ", ".join(map(str, sorted(ranks)))))
    widths = {int(t.shape[1]) for k, t in found.items() if ".lora_A." in k and ".o_proj." not in k}
    if widths and widths != {int(config["hidden_size"])}:
        got = ", ".join(map(str, sorted(widths)))
        problems.append(Problem(where, f"the {role} does not fit the base", f"width {config['hidden_size']}", got))
    return problems


def _config(found: Mapping[str, Tensor], lora_alpha: float) -> dict[str, Any]:
    rank = int(next(t for k, t in found.items() if ".lora_A." in k).shape[0])
    return {
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "use_rslora": False,
        "fan_in_fan_out": False,
    }
