"""Merge an adapter into its base: W' = W + (lora_alpha / r) B A, saved as a checkpoint that needs neither PEFT nor us.

The class follows the adapter: a reward adapter becomes a one-label sequence-classification model with its score head, everything
else a causal language model. The result is compared with the unmerged model before it is saved and again after it is read back, and
a merge that changes nothing is refused.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from rlhf_ray.errors import ArtifactError, ConfigError, RlhfRayError
from rlhf_ray.models.adapter_files import AdapterFiles, read_adapter
from rlhf_ray.models.adapters import lora_layers, use_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_exact, trunk
from rlhf_ray.models.heads import logits_head, scalar_head
from rlhf_ray.models.lineage import MERGED, check_lineage, merged_manifest
from rlhf_ray.models.loading import quiet, restore_dropout
from rlhf_ray.models.merge_by_peft import merge_by_peft, more_than_lora, read_any
from rlhf_ray.models.sources import ModelSource, resolve_source, weights_sha256
from rlhf_ray.models.specs import ModelSpec, policy_source
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.storage.checkpoints import SCHEMA
from rlhf_ray.storage.files import disk_errors, temporary_beside
from rlhf_ray.storage.run_folder import atomic_replace_folder, atomic_write_json, describe_files, verify_files

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference allowed between merged and unmerged outputs, relative to the largest output: a few roundings of a format."""

NAME = "merge"
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def merge_run(
    run_dir: Path | str,
    output_dir: Path | str | None = None,
    dtype: str | None = None,
    *,
    model: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Merge the adapter of a run (RUN or RUN@STEP) or adapter folder into its base and return the new checkpoint's folder.

    output_dir: default `<run_dir>-adapter-merged` beside it.   dtype: number format of the result; default: the base's own.
    model: the base, where it does not lie where the adapter says; what the adapter's run recorded of it has to hold of this one.
    log: called with a line for each warning and for the measured difference.
    The same merge, already there, is verified and returned as it is. ConfigError if something else is there; ArtifactError if the
    adapter does not fit its base, changes nothing, or the merged outputs are not the unmerged ones."""
    source = policy_source(str(run_dir))
    if source.kind != "adapter":
        raise ConfigError.at(str(run_dir), "holds no adapter to merge", "a run or an adapter folder")
    files = read_any(source.path) if source.run is None else read_adapter(source.path)
    base = _base_of(source, files) if model is None else resolve_source(model, None)
    target = Path(output_dir).absolute() if output_dir is not None else _default_target(source)
    if target.exists():
        return _reuse(target, files, base, dtype)
    temporary = temporary_beside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        manifest, answers = _merge_into(temporary, source, files, base, dtype)
        _read_back(temporary, manifest, answers)
        atomic_write_json(temporary / MERGED, {**manifest, "files": describe_files(temporary, skip=(MERGED,))})
        atomic_replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for line in [
        *manifest["notes"],
        f"merged outputs differ from the unmerged ones by {manifest['max_abs_difference']:.3g}",
    ]:
        log(line)
    return target


def merge_in_memory(backbone: Backbone, files: AdapterFiles) -> None:
    """Merge an adapter that is more than plain LoRA into `backbone`, in place, and compare it with the unmerged one.

    ArtifactError if it does not fit, changes nothing, or the base is quantised, whose weights cannot hold what is added."""
    name, kind = backbone.identity.path, more_than_lora(files)
    if getattr(backbone.model, "is_quantized", False):
        raise ArtifactError.at(
            files.path,
            f"{kind}: is merged into its base, which cannot be done in {backbone.identity.precision}",
            "a base in float32, bfloat16 or float16",
            backbone.identity.precision,
            "load the base whole, or merge first (rlhf-ray merge) and use the result as model_name_or_path",
        )
    _, adapted, merged = _merge_more_than_lora(backbone, files, _fixture_ids(backbone))
    _compare(adapted, merged, backbone.dtype, files.path)
    backbone.model.requires_grad_(False)
    backbone.model.eval()
    backbone.head = logits_head(backbone.model, trunk(backbone.model))
    backbone.identity = replace(backbone.identity, path=f"{name} with {files.path} merged into it ({kind})")


def _base_of(source: ModelSpec, files: AdapterFiles) -> ModelSource:
    """The base the adapter names, by its run's manifest or its own configuration. A relative path of a plain adapter is looked up
    from here, then from the adapter's folder."""
    recorded = (source.run.manifest().get("base") or {}) if source.run else {}
    path = recorded.get("path") or files.config["base_model_name_or_path"]
    revision = recorded.get("revision") or files.config["revision"]
    if not path:
        raise ArtifactError.at(source.path, "does not record its base model", "base_model_name_or_path", fix="--model")
    beside = Path(source.path) / path
    if not Path(path).exists() and beside.is_dir():
        path = str(beside)
    try:
        return resolve_source(path, revision)
    except RlhfRayError as error:
        problem = error.problems[0]
        raise type(error)(
            [replace(problem, fix="name the base where it lies now: --model"), *error.problems[1:]]
        ) from error


def _default_target(source: ModelSpec) -> Path:
    if source.run is None:
        return _beside(Path(source.path))
    if Path(source.path) == source.run.adapter_dir:
        return _beside(source.run.path)
    return _beside(source.run.path, f"-{Path(source.path).parent.name}")


def _beside(path: Path, suffix: str = "") -> Path:
    path = path.absolute()
    return path.with_name(f"{path.name}{suffix}-adapter-merged")


def _reuse(target: Path, files: AdapterFiles, base: ModelSource, dtype: str | None) -> Path:
    manifest = merged_manifest(target) if target.is_dir() else None
    same = (
        manifest is not None
        and [p.get("sha256") for p in manifest.get("parents", [])] == [files.sha256]
        and manifest.get("base", {}).get("weights_sha256") == weights_sha256(base.folder)
        and dtype in (None, manifest.get("dtype"))
    )
    if manifest is None or not same:
        raise ConfigError.at("output_dir", f"{target} is there and is not this merge", "a new folder")
    verify_files(target, manifest)
    return target


def _merge_into(
    folder: Path, source: ModelSpec, files: AdapterFiles, base: ModelSource, dtype: str | None
) -> tuple[dict[str, Any], Tensor]:
    """Load, merge, compare, save. Returns the manifest without file hashes, and the merged model's answers to the fixture.

    The model is let go on return, so that reading back needs no second copy in memory."""
    backbone, dropout = load_exact(
        path=str(base.folder),
        revision=None,
        dtype=dtype,
        classifier=files.head is not None,
        head=files.head,
        offset=files.offset,
    )
    notes = [*files.notes, *(f"{note}; the merged checkpoint is without them" for note in backbone.notes)]
    if files.offset:
        notes.append(
            f"score.bias ({files.offset:g}) is in the checkpoint; transformers' own class leaves it out of its scores"
        )
    if not more_than_lora(files):  # others hold no hash of their base
        notes += check_lineage(source, backbone.identity, None, role=source.run.stage if source.run else "adapter")
    ids = _fixture_ids(backbone)
    before, adapted, merged = _merge(backbone, files, ids)
    difference = _compare(adapted, merged, backbone.dtype, source.path)
    notes += _rounding_note(difference, float((adapted - before).abs().max()), backbone.dtype)
    _write(folder, backbone, dropout, base)
    return _manifest(source, files, base, backbone, notes, ids, merged, difference), merged


def _fixture_ids(backbone: Backbone, rows: int = 2, width: int = 16) -> Tensor:
    """i64[2, 16]: the same token ids for every merge of a model, none of them pad or end."""
    vocabulary = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    left_out = {backbone.pad_id, *backbone.eos_ids}
    allowed = torch.tensor([i for i in range(min(vocabulary, 4096)) if i not in left_out])
    picks = torch.randint(len(allowed), (rows, width), generator=torch.Generator().manual_seed(0))
    return allowed[picks]


@torch.no_grad()
def fixture_outputs(backbone: Backbone, ids: Tensor) -> Tensor:
    """What is compared. Causal: log-probabilities f32[2, 15, V]. Classifier: the score f32[2, 16] at every position."""
    ids = ids.to(backbone.device)
    model: Any = backbone.model
    score = getattr(model, "score", None)
    if score is None:
        return model(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(-1).cpu()
    hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
    return scalar_head(score)(hidden.cpu())


def _merge(backbone: Backbone, files: AdapterFiles, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge in place. Returns the fixture's outputs of the base, of base and adapter, and of the merged model."""
    if more_than_lora(files):
        return _merge_more_than_lora(backbone, files, ids)
    peft_model = wrap(backbone.model, files, NAME)
    with use_adapter(peft_model, None):
        before = fixture_outputs(backbone, ids)
    _refuse_shared_weights(peft_model, files.path)
    adapted = fixture_outputs(backbone, ids)
    changed = sum(_fold(layer) for _, layer in lora_layers(peft_model))
    if changed == 0:
        raise ArtifactError.at(
            files.path, "merging it changes not one weight of the base", "an adapter that was trained"
        )
    _unload(peft_model)
    return before, adapted, fixture_outputs(backbone, ids)


def _refuse_shared_weights(peft_model: PeftModel, where: str) -> None:
    """ArtifactError if adapted layers have one weight in common, as in Zamba's shared blocks: it cannot hold all their updates."""
    places: defaultdict[int, list[str]] = defaultdict(list)
    for name, layer in lora_layers(peft_model):
        places[id(_weight_of(layer))].append(name.removeprefix("base_model.model."))
    shared = next((names for names in places.values() if len(names) > 1), None)
    if shared is not None:
        free, taken = (
            {n.rpartition(".")[2] for names in places.values() if (len(names) == 1) is alone for n in names}
            for alone in (True, False)
        )
        raise ArtifactError.at(
            where,
            f"cannot be merged: {len(shared)} layers have one weight and an adapter each",
            "layers with weights of their own",
            f"{shared[0]}, {shared[1]}",
            f"use the adapter unmerged (serve, generate), or train with lora.target_modules=[{', '.join(sorted(free - taken))}]",
        )


def _merge_more_than_lora(backbone: Backbone, files: AdapterFiles, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def outputs(model: Any) -> Tensor:
        return fixture_outputs(replace(backbone, model=model), ids)

    backbone.model, before, adapted, merged = merge_by_peft(backbone.model, files, outputs)
    if torch.equal(before, merged):
        raise ArtifactError.at(files.path, "merging it changes nothing", "an adapter that was trained")
    return before, adapted, merged


@torch.no_grad()
def _fold(layer: Any) -> bool:
    """Add the adapter's update to the layer's weight, in float32, rounding once. Whether any weight changed."""
    weight = _weight_of(layer)
    merged = (weight.float() + layer.get_delta_weight(NAME).float()).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ArtifactError.at("merge", "a merged weight is not finite", f"values that fit {weight.dtype}")
    changed = not torch.equal(merged, weight)
    weight.copy_(merged)
    return changed


def _weight_of(layer: Any) -> Tensor:
    """What a LoRA layer adapts: of a linear layer its weight, of stacked experts one of their parameters."""
    weight: Tensor = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    return weight


def _unload(peft_model: PeftModel) -> nn.Module:
    """Take the LoRA layers out again; the base, now merged, stays."""
    tuner: Any = peft_model.base_model
    return tuner.unload()


def _compare(adapted: Tensor, merged: Tensor, dtype: torch.dtype, where: str) -> float:
    """max |merged - adapted|. ArtifactError if it is more than rounding."""
    difference = float((merged - adapted).abs().max())
    allowed = TOLERANCE[dtype] * max(float(adapted.abs().max()), 1.0)
    if not difference <= allowed:
        raise ArtifactError.at(
            where,
            "the merged model does not answer as the unmerged one",
            f"a difference of at most {allowed:.3g}",
            f"{difference:.3g}",
        )
    return difference


def _rounding_note(difference: float, effect: float, dtype: torch.dtype) -> list[str]:
    """A line if rounding hides much of what the adapter does, as in half precision after little training."""
    if dtype is torch.float32 or difference < effect / 2:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"rounding to {name} moves outputs by {difference:.2g}, the adapter by {effect:.2g}; dtype=float32 keeps all of it"
    ]


def _manifest(
    source: ModelSpec,
    files: AdapterFiles,
    base: ModelSource,
    backbone: Backbone,
    notes: list[str],
    ids: Tensor,
    merged: Tensor,
    difference: float,
) -> dict[str, Any]:
    run = source.run.manifest() if source.run else {}
    return {
        "schema": SCHEMA,
        "kind": "merged",
        "task_type": "CAUSAL_LM" if files.head is None else "SEQ_CLS",
        "stage": run.get("stage"),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "parents": [{"role": run.get("stage", "adapter"), "path": source.path, "sha256": files.sha256}],
        "base": {**backbone.identity.manifest(), "path": base.name, "revision": base.revision},
        "tokenizer_sha256": backbone.identity.tokenizer_sha256,
        "template": run.get("template"),
        "stop_token_ids": run.get("stop_token_ids"),
        **_reading(run),
        "notes": notes,
        "max_abs_difference": difference,
        "fixture": {"input_ids": ids.tolist(), "outputs": _stored(merged, ids).tolist()},
    }


def _reading(run: dict[str, Any]) -> dict[str, Any]:
    """How a reward run's training ended replies: whoever scores texts with the merged checkpoint must do the same. And how good it
    was on held-out pairs, which PPO asks for."""
    reward = run.get("reward")
    kept = (
        {name: reward[name] for name in ("add_eos_token", "held_out") if reward.get(name) is not None} if reward else {}
    )
    return {"reward": kept} if reward else {}


def _stored(outputs: Tensor, ids: Tensor) -> Tensor:
    """The outputs small enough for JSON: scores as they are, log-probabilities of the fixture's own next tokens."""
    return outputs if outputs.ndim == 2 else outputs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def fixture_difference(folder: Path | str, backbone: Backbone) -> float | None:
    """max |difference| between what a merged checkpoint answered when it was made and what it answers as loaded now.

    Tells a reward model that scores differently at another precision, or was damaged. None if `folder` is no merged checkpoint."""
    manifest = merged_manifest(folder)
    if manifest is None:
        return None
    ids = torch.tensor(manifest["fixture"]["input_ids"])
    found = _stored(fixture_outputs(backbone, ids), ids)
    return float((found - torch.tensor(manifest["fixture"]["outputs"])).abs().max())


def _write(folder: Path, backbone: Backbone, dropout: dict[str, float], base: ModelSource) -> None:
    from transformers import GenerationConfig

    model: Any = backbone.model
    restore_dropout(model.config, dropout)
    if hasattr(model, "score"):
        model.config.pad_token_id = backbone.pad_id
    else:
        model.generation_config = GenerationConfig()  # the base's own file is copied below as it is, valid or not
    with quiet(), disk_errors(folder):
        model.save_pretrained(folder)
    for name in _COPIED:
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, folder / name)
    if tokenizer_sha256(tokenizer_of(ModelSource(folder, str(folder)))) != backbone.identity.tokenizer_sha256:
        # Of a wrapper that merges as its decoder (Qwen3.5): the model type decided what class reads the files.
        backbone.tokenizer.save_pretrained(folder)


def _read_back(folder: Path, manifest: dict[str, Any], answers: Tensor) -> None:
    """ArtifactError unless the folder, loaded afresh, has the same tokenizer and answers the same."""
    is_classifier = manifest["task_type"] == "SEQ_CLS"
    saved, _ = load_exact(path=str(folder), revision=None, dtype=manifest["dtype"], classifier=is_classifier)
    found = saved.identity.tokenizer_sha256
    if found != manifest["tokenizer_sha256"]:
        raise ArtifactError.at(str(folder), "the saved tokenizer differs", manifest["tokenizer_sha256"], found)
    difference = float((fixture_outputs(saved, torch.tensor(manifest["fixture"]["input_ids"])) - answers).abs().max())
    if not difference <= 1e-5 * max(float(answers.abs().max()), 1.0):
        raise ArtifactError.at(
            str(folder), "the saved checkpoint, read back, gives other outputs", "no difference", f"{difference:.3g}"
        )
