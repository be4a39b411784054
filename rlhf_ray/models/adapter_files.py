"""Adapter folders in plain PEFT form: the gate that every adapter passes before PEFT sees it, and the save that checks itself.

PEFT trusts adapter files: a regular expression as target can hang the process, and NaN, missing tensors or a foreign base load with
a warning at most. So files are read here, strictly, no expression is run, and PEFT only ever gets a configuration made from checked
values.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from rlhf_ray.errors import ArtifactError, InvariantError, Problem
from rlhf_ray.storage.files import (
    atomic_replace_folder,
    read_json,
    save_tensors,
    sha256_tensors,
    temporary_beside,
    write_json,
)

if TYPE_CHECKING:  # torch is imported where tensors are looked at: a command that is refused must not wait for it
    from torch import Tensor

    from rlhf_ray.models.heads import ScalarHead

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEAD_KEY = "base_model.model.score.weight"
"""Where PEFT keeps the score head of a sequence-classification adapter."""
BIAS_KEY = "base_model.model.score.bias"
"""That of one whose head has a bias; ours have none."""

KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,256})\.lora_(?P<half>[AB])\.weight")
MAX_R = 1024
MAX_TARGETS = 1024
MAX_REGEX = 10_000
MAX_CONFIG_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")
_DTYPES = {"F32", "F16", "BF16"}
_REFUSED = {
    "use_dora": "DoRA makes a token's result depend on the whole weight, which mixed-adapter batches cannot do",
    "layer_replication": "it changes the base",
    "trainable_token_indices": "it changes the base's embeddings",
    "megatron_config": "it belongs to another trainer",
}
WAY_OUT = "merge it into its base, and use the result as model_name_or_path: rlhf-ray merge, or PEFT's merge_and_unload"
"""Of what `merge_by_peft` takes. For everything else there is `by_peft`."""
MALFORMED = "the file is damaged or was edited: save the adapter again with PEFT"
_PROMPTS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
}
"""Kinds of adapters that PEFT cannot merge: tokens or keys of their own before each prompt."""
_UNMERGED = {"layer_replication", "alora_invocation_tokens", "arrow_config"}
"""Options of LoRA that PEFT does not merge either."""
BY_TENSORS = "the modules that have tensors"
"""`target_modules` of a configuration that chooses modules otherwise than by a list of names: by a regular expression, which is not
run, or by layers. What it chose has tensors in the file."""
_CHOICES = ("layers_to_transform", "layers_pattern", "exclude_modules")
_INIT = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base alone. PiSSA, OLoRA, CorDA and LoftQ rewrite it, and all adapters here share one base."""

_CHECKED = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
    "modules_to_save",
    "base_model_name_or_path",
    "revision",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    *_CHOICES,
}
_WITHOUT_MEANING = {
    "peft_version",
    "inference_mode",
    "auto_mapping",
    "megatron_core",
    "qalora_group_size",
    "eva_config",  # how A was chosen before training
}

_BYSTANDERS = re.compile(
    r".*\.(md|txt|json|jsonl|csv|jinja|model|tiktoken|ya?ml|log|png|jpe?g|gif|svg|webp)|\.git(attributes|ignore)|\.DS_Store"
    r"|LATEST|latest|zero_to_fp32\.py|events\.out\.tfevents\..*|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
    r"|training_args\.bin|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|(random_states|custom_checkpoint)_\d+\.pkl"
)
"""Files that may lie beside an adapter (a model card with its images, a tokenizer, the state of a Trainer, of accelerate or of
DeepSpeed, events of TensorBoard, logs) and are never opened."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter that has passed the gate.

    config: checked values r, lora_alpha, lora_dropout, target_modules, use_rslora, fan_in_fan_out, task_type,
    base_model_name_or_path, revision.   tensors: plain PEFT key -> float32 on the CPU, of one rank and one scale (`_uniform`).
    head: f32[1, D] of a reward adapter.   sha256: over the tensors, head and offset included.   offset: what the head adds to each
    score: the bias of an adapter by others.   notes: what a run should say of it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: Tensor | None
    sha256: str
    path: str
    offset: float = 0.0
    notes: tuple[str, ...] = ()

    def scalar_head(self, hidden_size: int) -> ScalarHead:
        """The head of a reward adapter, on the CPU. ArtifactError if there is none, or it is of another width."""
        from rlhf_ray.models.heads import ScalarHead

        if self.head is None:
            raise ArtifactError.at(self.path, "has no reward head", "the adapter of a reward run", "a policy adapter")
        return ScalarHead(hidden_size, self.head.float().cpu(), self.offset)


def read_adapter(folder: Path | str) -> AdapterFiles:
    """Read and check the adapter in `folder`.

    ArtifactError, with every problem found, for: files that are not plain files, pickled weights, unknown files, a configuration
    outside the schema, no tensors, unexpected or unpaired tensors, wrong shapes or dtypes, values that are not finite.

    The head of a classifier of two labels becomes that of their difference, as in a whole checkpoint (`heads.score_layer`)."""
    from rlhf_ray.models.heads import score_layer, two_labels_note

    folder = Path(folder)
    check_folder(folder)
    config = check_config(read_json(folder / CONFIG), str(folder / CONFIG))
    alphas = config.pop("alphas")
    tensors = _read_tensors(folder / WEIGHTS, config)
    head, bias, offset = tensors.pop(HEAD_KEY, None), tensors.pop(BIAS_KEY, None), 0.0
    notes = (two_labels_note(str(folder)),) if head is not None and len(head) == 2 else ()
    if head is not None and (bias is not None or len(head) > 1):
        score = score_layer(head, bias, f"{folder / WEIGHTS}: {HEAD_KEY}")
        head, offset = score.weight.detach(), 0.0 if score.bias is None else float(score.bias.detach())
    config["target_modules"] = _resolved(config["target_modules"], tensors)
    _uniform(tensors, config, alphas)
    return AdapterFiles(config, tensors, head, adapter_sha256(tensors, head, offset), str(folder), offset, notes)


def policy_files(files: AdapterFiles, where: str) -> AdapterFiles:
    """`files`. ArtifactError if they are a reward model's, whose head no policy has.   where: what the job calls them."""
    if files.head is not None and not files.head.is_meta:  # a plan's adapters have one, whatever they will be
        raise ArtifactError.at(where, "is a reward model", "a policy", "an adapter with a reward head")
    return files


def adapter_sha256(tensors: Mapping[str, Tensor], head: Tensor | None = None, offset: float = 0.0) -> str:
    """Identity of an adapter: over its float32 tensors, its score head if it has one, and the offset of that if it is not 0."""
    import torch

    named = dict(tensors) if head is None else {**tensors, HEAD_KEY: head}
    if offset:
        named[BIAS_KEY] = torch.tensor([offset])
    return sha256_tensors({name: t.float() for name, t in named.items()})


def check_folder(folder: Path) -> None:
    """ArtifactError unless `folder` holds an adapter's two files, plain ones, and nothing that does not belong beside them."""
    if not folder.is_dir():
        raise ArtifactError.at(str(folder), "is not a folder", "an adapter folder")
    problems = []
    for path in sorted(folder.iterdir()):
        if path.name in (CONFIG, WEIGHTS):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                fix = f"copy the folder with what its links point at: cp -rL {folder} COPY"
                problems.append(Problem(str(path), "is not a plain file", fix=fix))
        elif path.name.startswith("adapter_model."):
            problems.append(
                Problem(
                    str(path), "pickled weights are refused: a pickle can run code", WEIGHTS, fix="rlhf-ray import peft"
                )
            )
        elif not path.is_dir() and not _BYSTANDERS.fullmatch(path.name):
            what = "does not belong in an adapter folder"
            problems.append(Problem(str(path), what, f"{CONFIG} and {WEIGHTS}", fix="move it elsewhere"))
    missing = [n for n in (CONFIG, WEIGHTS) if not (folder / n).exists()]
    if not problems:
        problems = [Problem(str(folder / n), "file is missing") for n in missing]
    ArtifactError.raise_all(problems)
    if (folder / CONFIG).stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError.at(str(folder / CONFIG), "is too large to be an adapter's configuration")


def check_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `raw` that matter here, checked. ArtifactError, all problems at once, for what would be read differently.

    target_modules may be BY_TENSORS.   ranks_differ, alphas: by `rank_pattern`, and the keys of `alpha_pattern` as they are."""
    problems = _value_problems(raw, where)
    if raw.get("peft_type") == "LORA":
        problems += _meaning_problems(raw, where)
    ArtifactError.raise_all(problems)
    targets = raw["target_modules"]
    if _chooses(raw) or (isinstance(targets, str) and targets != "all-linear"):
        targets = BY_TENSORS
    return {
        "r": raw["r"],
        "ranks_differ": bool(raw.get("rank_pattern")),
        "alphas": {key: float(alpha) for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        "lora_alpha": float(raw["lora_alpha"]),
        "lora_dropout": float(raw.get("lora_dropout", 0.0)),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "target_parameters": sorted(raw.get("target_parameters") or ()),
        "use_rslora": bool(raw.get("use_rslora", False)),
        "fan_in_fan_out": bool(raw.get("fan_in_fan_out", False)),
        "task_type": raw.get("task_type"),
        "base_model_name_or_path": raw.get("base_model_name_or_path"),
        "revision": raw.get("revision"),
    }


def by_peft(raw: Mapping[str, Any]) -> str:
    """The way out of an adapter that neither a job nor `rlhf-ray merge` takes, by its adapter_config.json."""
    if raw.get("peft_type") in _PROMPTS:
        return "train a LoRA adapter: PEFT cannot merge one of this kind into its base"
    use = "give the result as a reward's model" if _is_reward(raw) else "use the result as model_name_or_path"
    return f"merge it into its base with PEFT's merge_and_unload, and {use}"


def _way_out(raw: Mapping[str, Any], option: str) -> str:
    """The same of one option of LoRA."""
    if option in _UNMERGED:
        return "train plain LoRA: PEFT cannot merge such an adapter into its base"
    taken = option in ("use_dora", "modules_to_save", "trainable_token_indices")  # by `merge_by_peft`
    return WAY_OUT if taken and not _is_reward(raw) else by_peft(raw)


def _is_reward(raw: Mapping[str, Any]) -> bool:
    return raw.get("task_type") == "SEQ_CLS"


def _value_problems(raw: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []

    def check(name: str, good: bool, expected: str, fix: str) -> None:
        if not good:
            problems.append(Problem(f"{where}: {name}", "bad value", expected, repr(raw.get(name))[:80], fix))

    kind, alpha, dropout = raw.get("peft_type"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    if kind != "LORA":  # its other fields are of that kind
        check("peft_type", False, "LORA", by_peft(raw) if isinstance(kind, str) else MALFORMED)
        return problems
    given = raw.get("r")
    r = given if isinstance(given, int) and not isinstance(given, bool) else 0
    check("r", 1 <= r <= MAX_R, f"a whole number from 1 to {MAX_R}", by_peft(raw) if r > MAX_R else MALFORMED)
    check("lora_alpha", _is_number(alpha) and alpha > 0, "a finite number above 0", MALFORMED)  # type: ignore[operator]
    check("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "from 0 up to, not including, 1", MALFORMED)
    task = "write CAUSAL_LM there if its base is a causal language model"
    check("task_type", raw.get("task_type") in (None, "CAUSAL_LM", "SEQ_CLS"), "CAUSAL_LM or SEQ_CLS", task)
    check("bias", raw.get("bias", "none") == "none", "none", by_peft(raw))
    initial = raw.get("init_lora_weights", True)
    check("init_lora_weights", initial in _INIT, "one that leaves the base unchanged", by_peft(raw))
    for name in ("base_model_name_or_path", "revision"):
        check(name, raw.get(name) is None or isinstance(raw.get(name), str), "a string", MALFORMED)
    for name in ("use_rslora", "fan_in_fan_out"):
        check(name, isinstance(raw.get(name, False), bool), "true or false", MALFORMED)
    saved = raw.get("modules_to_save") or []
    allowed = {"score", "classifier"} if _is_reward(raw) else set()
    good = isinstance(saved, list) and set(map(str, saved)) <= allowed
    check("modules_to_save", good, "score, for SEQ_CLS only", _way_out(raw, "modules_to_save"))
    _check_targets(raw, check)
    return problems


def _check_targets(raw: Mapping[str, Any], check: Callable[[str, bool, str, str], None]) -> None:
    """The fields that choose modules, and ranks and scales of some of them. No expression is run: of `rank_pattern` nothing is
    needed, since tensors have ranks."""
    targets = raw.get("target_modules")
    is_list = isinstance(targets, list) and 0 < len(targets) <= MAX_TARGETS
    names = is_list and all(isinstance(t, str) and _NAME.fullmatch(t) for t in targets)  # type: ignore[union-attr]
    is_regex = isinstance(targets, str) and 0 < len(targets) <= MAX_REGEX and targets != "all-linear"
    expected = "a list of module names, or a regular expression"
    check("target_modules", names or is_regex or targets == "all-linear", expected, by_peft(raw))
    ranks, alphas = (_numbers_by_name(raw.get(name)) for name in ("rank_pattern", "alpha_pattern"))
    check("rank_pattern", ranks is not None, "numbers above 0 by module name", MALFORMED)
    check("alpha_pattern", alphas is not None, "numbers above 0 by module name", MALFORMED)
    if not all(map(_plain_name, alphas or ())):
        check("alpha_pattern", False, "module names (other regular expressions are not run)", by_peft(raw))
    stacked = raw.get("target_parameters") or []
    plain = isinstance(stacked, list) and all(isinstance(t, str) and _NAME.fullmatch(t) for t in stacked)
    alone = not (_chooses(raw) or ranks or alphas or is_regex)
    expected = "a list of names, beside a list of target_modules alone"
    check("target_parameters", plain and (alone or not stacked), expected, by_peft(raw))


def _numbers_by_name(pattern: Any) -> dict[str, Any] | None:
    """The pattern, {} where there is none; None if it is anything else than numbers above 0 by strings."""
    found = pattern or {}
    is_one = isinstance(found, dict) and all(isinstance(k, str) and _is_number(v) and v > 0 for k, v in found.items())
    return found if is_one else None


def _chooses(raw: Mapping[str, Any]) -> bool:
    """Whether modules are chosen by layer, too: 0 is one."""
    return any(raw.get(name) not in (None, [], "") for name in _CHOICES)


def _meaning_problems(raw: Mapping[str, Any], where: str) -> list[Problem]:
    """Options of PEFT that are not off: an adapter that uses them is not the plain LoRA it would be read as."""
    import peft

    defaults = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig)}
    problems = []
    for name, value in raw.items():
        if (
            name in _CHECKED
            or name in _WITHOUT_MEANING
            or not value
            or value == defaults.get(name, dataclasses.MISSING)
        ):
            continue
        reason = _REFUSED.get(name, "not a plain LoRA option")
        what, got = f"is not supported: {reason}", repr(value)[:80]
        problems.append(Problem(f"{where}: {name}", what, "null", got, _way_out(raw, name)))
    return problems


def is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _plain_name(key: str) -> str | None:
    """The module name that a key of PEFT's patterns stands for, by itself or as a regular expression: `q_proj`,
    `.*\\.self_attn\\.q_proj`, `^model\\.layers\\.0\\.mlp\\.up_proj`. None for any other expression."""
    name = re.sub(r"^\^?(\(\.\*\\\.\)\?|\.\*\\?\.)?", "", key.removesuffix("$")).replace("\\.", ".")
    return name if _NAME.fullmatch(name) else None


def _resolved(targets: str | list[str], tensors: Mapping[str, Any]) -> str | list[str]:
    """`targets`, or the full names of the modules that have tensors."""
    if targets != BY_TENSORS:
        return targets
    return sorted({match["module"] for key in tensors if (match := KEY.fullmatch(key)) is not None})


def targets_of(folder: Path, targets: str | list[str]) -> str | list[str]:
    """`target_modules` of a checked configuration, with BY_TENSORS resolved from the header of the weights in `folder`."""
    if targets != BY_TENSORS:
        return targets
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return _resolved(targets, dict.fromkeys(file.keys()))


def _uniform(tensors: dict[str, Tensor], config: dict[str, Any], alphas: Mapping[str, float]) -> None:
    """Bring modules of different ranks and scales to one rank and one scale, in place: B A is the same.

    A and B are filled up with zeros to the largest rank R; B is multiplied by the module's own scale over that of all,
    lora_alpha / R (rsLoRA: / sqrt(R))."""
    import torch

    downs = {match["module"]: key for key in tensors if (match := KEY.fullmatch(key)) and match["half"] == "A"}
    ranks = {module: len(tensors[key]) for module, key in downs.items()}
    if not config.pop("ranks_differ") and not alphas:
        return
    largest, alpha, rslora = max(ranks.values()), config["lora_alpha"], config["use_rslora"]
    for module, key in downs.items():
        # As PEFT matches them; expressions they are, but no other than a name with dots (`_plain_name`).
        own = next((a for name, a in alphas.items() if re.match(rf"(.*\.)?({name})$", module)), alpha)
        up, missing = key.replace("lora_A", "lora_B"), largest - ranks[module]
        factor = lora_scale(own, ranks[module], rslora) / lora_scale(alpha, largest, rslora)
        tensors[key] = torch.nn.functional.pad(tensors[key], (0, 0, 0, missing))
        tensors[up] = torch.nn.functional.pad(tensors[up], (0, missing)) * factor
    config["r"] = largest


def lora_scale(alpha: float, r: int, use_rslora: bool) -> float:
    """What B A is multiplied by: lora_alpha / r (arXiv:2106.09685); rsLoRA: lora_alpha / sqrt(r) (arXiv:2312.03732)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Names, dtypes and shapes are checked from the header before any tensor is read."""
    import torch

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: s.get_dtype() for name, s in slices.items()}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            r = None if config["ranks_differ"] else config["r"]
            stacked = bool(config["target_parameters"])
            problems = tensor_problems(shapes, r, str(path), _is_reward(config), stacked, by_peft(config))
            problems += [
                Problem(f"{path}: {n}", "wrong number format", "F32, BF16 or F16", k)
                for n, k in kinds.items()
                if k not in _DTYPES
            ]
            ArtifactError.raise_all(problems)
            tensors = {name: file.get_tensor(name).float() for name in slices}
    except (SafetensorError, OSError) as e:
        raise ArtifactError.at(str(path), f"is damaged: {e}") from e
    sums = torch.stack(
        [t.sum() for t in tensors.values()]
    )  # finite ones mean finite values; others may be sums too large
    bad = [] if sums.isfinite().all() else [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    ArtifactError.raise_all(Problem(f"{path}: {name}", "holds values that are not finite") for name in bad)
    return tensors


def tensor_problems(
    shapes: Mapping[str, tuple[int, ...]],
    r: int | None,
    where: str,
    allow_head: bool,
    stacked: bool = False,
    way_out: str = "",
) -> list[Problem]:
    """What is wrong with the names and shapes of an adapter's tensors: A is [r, in], B is [out, r], in pairs.

    r: None where modules have ranks of their own, the same in both halves.   stacked: some are on weights of E experts, whose
    factors have r E rows and columns; how many is known by the model alone.   allow_head: score.weight [labels, D], and score.bias
    [labels] beside it.   way_out: of an adapter that has other tensors."""
    halves: dict[str, set[str]] = {}
    problems = []
    for name, shape in shapes.items():
        key = KEY.fullmatch(name)
        if name == HEAD_KEY and allow_head:
            if len(shape) != 2 or 0 in shape:
                problems.append(Problem(f"{where}: {name}", "wrong shape", "(labels, hidden size)", str(shape)))
        elif name == BIAS_KEY and allow_head and HEAD_KEY in shapes:
            if shape != shapes[HEAD_KEY][:1]:
                problems.append(Problem(f"{where}: {name}", "wrong shape", str(shapes[HEAD_KEY][:1]), str(shape)))
        elif key is None:
            fix = WAY_OUT if way_out and ".lora_embedding_" in name and not allow_head else way_out
            problems.append(Problem(f"{where}: {name}", "unexpected tensor", "lora_A and lora_B weights", fix=fix))
        else:
            halves.setdefault(key["module"], set()).add(key["half"])
            rank = shape[0 if key["half"] == "A" else 1] if len(shape) == 2 else None
            down = shapes.get(f"base_model.model.{key['module']}.lora_A.weight", ())
            wanted = r if r is not None else min(down[0], MAX_R) if down else 0
            if rank is not None and stacked and wanted:
                rank = wanted if rank and rank % wanted == 0 else rank
            if rank != wanted or 0 in shape:
                form = f"({wanted}, in)" if key["half"] == "A" else f"(out, {wanted})"
                problems.append(Problem(f"{where}: {name}", "wrong shape", form, str(shape)))
    for module, found in halves.items():
        for half in sorted({"A", "B"} - found):
            problems.append(Problem(f"{where}: {module}", f"lora_{half} is missing"))
    if not halves and not problems:
        problems.append(Problem(where, "the adapter is empty: it holds no LoRA tensors"))
    return problems


def save_adapter(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"],
    head: Tensor | None,
    base_path: str,
    revision: str | None = None,
    must_differ_from: str | None = None,
    flush: bool = True,
) -> str:
    """Write an adapter that plain PEFT loads, replacing the one in `folder`, and return its sha256.

    tensors: as `adapter_tensors` gives them.   config: as in `AdapterFiles.config`.   head: [1, D] of a reward or value model.
    base_path, revision: what the adapter belongs on.   must_differ_from: sha256 before training; the adapter must have moved.
    flush: to disk; not into a folder that is flushed as a whole.
    InvariantError, with nothing written, if the adapter is empty, not finite, unchanged or, after training, has only zero B; or
    if the file read back is not what was to be saved."""
    import torch

    folder = Path(folder)
    named = {name: t.detach().to("cpu", torch.float32) for name, t in tensors.items()}
    weight = None if head is None else head.detach().to("cpu", torch.float32)
    sha256 = adapter_sha256(named, weight)
    _check_saveable(folder, named, weight, config, sha256, must_differ_from)
    temporary = temporary_beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        write_json(temporary / CONFIG, peft_json(config, task_type, weight is not None, base_path, revision))
        save_tensors(temporary / WEIGHTS, named if weight is None else {**named, HEAD_KEY: weight})
        found = read_adapter(temporary).sha256
        if found != sha256:
            raise InvariantError.at(str(folder), "the adapter on disk is not the one in memory", sha256, found)
        atomic_replace_folder(temporary, folder, flush)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sha256


def _check_saveable(
    folder: Path,
    tensors: dict[str, Tensor],
    head: Tensor | None,
    config: Mapping[str, Any],
    sha256: str,
    must_differ_from: str | None,
) -> None:
    import torch

    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    problems = tensor_problems(shapes, config["r"], str(folder), False, bool(config.get("target_parameters")))
    bad = [
        n for n, t in {**tensors, **({} if head is None else {HEAD_KEY: head})}.items() if not torch.isfinite(t).all()
    ]
    problems += [Problem(f"{folder}: {name}", "is not finite") for name in bad]
    if must_differ_from is not None and not problems:
        if sha256 == must_differ_from:
            problems.append(Problem(str(folder), "training left the adapter unchanged", "other weights", sha256))
        elif not any(bool(t.any()) for n, t in tensors.items() if n.endswith("lora_B.weight")):
            problems.append(Problem(str(folder), "training left every lora_B at zero: the adapter does nothing"))
    InvariantError.raise_all(problems)


def peft_json(
    config: Mapping[str, Any], task_type: str, has_head: bool, base_path: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    values = peft_config(config).to_dict()
    values |= {
        "peft_type": "LORA",
        "task_type": task_type,
        "inference_mode": True,
        "base_model_name_or_path": base_path,
        "revision": revision,
        "modules_to_save": ["score"] if has_head else None,
    }
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(values.items())}


def peft_config(config: Mapping[str, Any]) -> Any:
    """PEFT's own LoraConfig from checked values, without a task type: heads are kept outside of PEFT here."""
    import peft

    alpha, targets = config["lora_alpha"], config["target_modules"]
    return peft.LoraConfig(
        r=config["r"],
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config["lora_dropout"],
        target_modules=targets if isinstance(targets, str) else list(targets),
        target_parameters=list(config.get("target_parameters") or ()) or None,
        use_rslora=config["use_rslora"],
        fan_in_fan_out=config["fan_in_fan_out"],
    )
