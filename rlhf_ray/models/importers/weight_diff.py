"""AlpacaFarm's weight differences: tuned = difference + raw LLaMA, tensor by tensor, checked by the published sum.

A tensor whose shape differs from the raw model's (the embeddings, which gained a [PAD] row) is stored whole. A reward model's keys
carry the prefix `backbone_model.`; its head is `reward_head`. What comes out is a checkpoint that transformers loads: a causal
language model, or a one-label sequence classifier.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.importers.pickles import filled_at_once, new_folder, read_pickled_tensors
from rlhf_ray.models.sources import one_line
from rlhf_ray.storage.files import atomic_save_tensors, atomic_write_json
from rlhf_ray.storage.run_folder import read_json

PREFIX, HEAD, HEAD_BIAS = "backbone_model.", "reward_head.weight", "reward_head.bias"
OLDEST = (4, 29, 2)
"""The raw LLaMA must be converted by this transformers or a later one: earlier ones laid the rotary weights out otherwise."""
SUM_FILE = "model_sum.txt"
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def import_weight_diff(diff: Path | str, raw: Path | str, output_dir: Path | str) -> Path:
    """Recover the tuned model from folder `diff` over folder `raw` into `output_dir`, and return it.

    ArtifactError, with nothing written, if the raw model was converted too early, or the sum of all weights is not the published
    one (another raw model, or a damaged file)."""
    diff, raw, target = Path(diff), Path(raw), new_folder(output_dir)
    for folder in (diff, raw):
        if not (folder / "config.json").is_file():
            raise ConfigError.at(str(folder), "holds no config.json", "the folder of a model")
    check_converted(raw)
    tuned = recover(read_weights(diff), read_weights(raw), str(diff))
    check_sum(tuned, diff, raw)
    config, tensors, dropped = _standalone(tuned, diff, raw)
    with filled_at_once(target) as folder:
        atomic_save_tensors(folder / "model.safetensors", tensors)
        atomic_write_json(folder / "config.json", config)
        for name in COPIED:
            if (diff / name).is_file():
                shutil.copyfile(diff / name, folder / name)
        story = {"from": "weight-diff", "diff": str(diff.absolute()), "raw": str(raw.absolute()), "dropped": dropped}
        atomic_write_json(folder / "import.json", story)
    return target


def recover(diff: Mapping[str, Tensor], raw: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """diff + raw in float32 wherever the shapes agree, diff as it is elsewhere.

    ArtifactError if a raw tensor has no difference (buffers that are computed, as rotary frequencies, may lack one), or a reward
    model no head."""
    is_reward = any(name.startswith(PREFIX) for name in diff)
    if is_reward and (HEAD not in diff or (HEAD_BIAS in diff and diff[HEAD_BIAS].numel() != 1)):
        raise ArtifactError.at(where, "is a reward model without a head", f"{HEAD}, and one number {HEAD_BIAS} at most")
    tuned = {name: t.float() for name, t in diff.items()}
    missing = []
    for name, tensor in raw.items():
        key = PREFIX + name if is_reward else name
        if key not in tuned:
            missing += [] if name.endswith("inv_freq") or (is_reward and name.startswith("lm_head")) else [name]
        elif tuned[key].shape == tensor.shape:
            tuned[key] = tuned[key] + tensor.float()
    if missing:
        raise ArtifactError.at(where, f"has no difference for {missing[0]} ({len(missing)} of {len(raw)} tensors)")
    return tuned


def check_sum(tuned: Mapping[str, Tensor], diff: Path, raw: Path) -> None:
    """ArtifactError unless the sum of all values is the one in model_sum.txt, to 1e-5 relative (numpy's isclose)."""
    path = diff / SUM_FILE
    if not path.is_file():
        raise ArtifactError.at(str(diff), f"no {SUM_FILE}", "the published sum of the tuned model's weights")
    try:
        expected = float(path.read_text())
    except ValueError as error:
        raise ArtifactError.at(str(path), "is damaged", "the sum of all weights, a number") from error
    found = math.fsum(float(t.double().sum()) for t in tuned.values())
    if not math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-8):
        raise ArtifactError.at(
            str(diff),
            f"the weights recovered over {raw} do not add up",
            f"{expected:.6f}",
            f"{found:.6f}",
            "another raw model",
        )


def check_converted(raw: Path) -> None:
    """ArtifactError if the raw model was converted by a transformers before 4.29.2. Versions are compared as numbers."""
    stated = str(read_json(raw / "config.json").get("transformers_version") or "")
    digits = [part for part in stated.split(".")[:3] if part.isdigit()]
    if digits and tuple(int(part) for part in digits) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ArtifactError.at(
            str(raw), "was converted too early", f"transformers {oldest} or later", stated, "convert again"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors if there are any, else pickled shards by the weights-only reader."""
    files = sorted(folder.glob("*.safetensors"))
    found = dict(_each(files, load_file)) if files else dict(_each(sorted(folder.glob("*.bin")), read_pickled_tensors))
    if not found:
        raise ArtifactError.at(str(folder), "holds no weights", "*.safetensors or *.bin")
    return found


def _each(files: list[Path], read: Any) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.name not in ("training_args.bin", "trainer_state.bin"):
            try:
                yield from read(file).items()
            except SafetensorError as error:
                raise ArtifactError.at(str(file), f"is damaged: {one_line(error)}") from error


def _standalone(
    tuned: dict[str, Tensor], diff: Path, raw: Path
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """(config.json, tensors, what is left out) of a checkpoint that transformers loads."""
    if not any(name.startswith(PREFIX) for name in tuned):
        return read_json(diff / "config.json"), tuned, {}
    # A reward model's own config names a backbone folder on the machine it was made on; the raw model's says the same and more.
    config = read_json(raw / "config.json")
    skipped = ("inv_freq", "lm_head.weight")
    tensors = {_inner(n): t for n, t in tuned.items() if n.startswith(PREFIX) and not n.endswith(skipped)}
    tensors["score.weight"] = tuned[HEAD].reshape(1, -1)
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[0]),
    }
    # A constant shifts every reward alike: no preference and no advantage changes.
    bias = tuned.get(HEAD_BIAS, torch.zeros(1))
    return config, tensors, {HEAD_BIAS: float(bias)}


def _inner(name: str) -> str:
    bare = name.removeprefix(PREFIX)
    return bare if bare.startswith("model.") else f"model.{bare}"
