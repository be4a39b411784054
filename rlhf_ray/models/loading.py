"""How a model will be loaded: number format, attention kernel, quantisation. Decided, and refused, before any weight is read."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from rlhf_ray.errors import ArtifactError, ConfigError, ResourceError
from rlhf_ray.models.quantisation import quantised_kwargs
from rlhf_ray.models.sources import (
    CONFIG_ERRORS,
    ModelSource,
    are_pickled,
    check_files,
    load_error,
    one_line,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLASH_ATTN_WHEELS = "https://github.com/Dao-AILab/flash-attention/releases"
"""By versions of CUDA, torch and Python. No extra asks for flash-attn: without the right wheel pip would compile it for hours."""
_PLACEHOLDER = re.compile("(image|video|audio)_token_(id|index)")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def no_dropout(config: Any) -> dict[str, float]:
    """Set every dropout probability of a transformers config, and of the configs inside it, to 0; return what they were, to be
    restored before saving (`restore_dropout`), as text_config.attention_dropout."""
    from transformers import PreTrainedConfig

    before: dict[str, float] = {}
    per_layer = getattr(config, "per_layer_attributes", None) or ()  # Gemma 4's head_dim: no number of the whole model
    for name in [key for key in config.to_dict() if key not in per_layer]:
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            before |= {f"{name}.{inner}": rate for inner, rate in no_dropout(value).items()}
        is_rate = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
        if is_rate and value and (name.endswith(("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_p"))):
            before[name] = value
            setattr(config, name, 0.0)
    return before


def restore_dropout(config: Any, rates: Mapping[str, float]) -> None:
    """Put back what `no_dropout` gave, into a copy of that config or of its text_config, as far as that has a place for it."""
    for name, rate in rates.items():
        *inside, last = name.split(".")
        found = config
        for part in inside:
            found = getattr(found, part, found if part == "text_config" else None)
        if found is not None:
            setattr(found, last, rate)


def without_placeholders(config: Any) -> None:
    """Let no token stand for an image, a video or a sound in the model of this config.

    Gemma 4 reads such a token as padding, its text decoder alone as itself; a policy that writes one would be sampled as one model
    and trained as another. Nothing that is loaded for a job is saved."""
    if config.get_text_config() is not config:
        for name in config.to_dict():
            if _PLACEHOLDER.fullmatch(name):
                setattr(config, name, -1)


@dataclass
class LoadPlan:
    """attn: the attention kernel.  may_be_eager: sdpa was not asked for by name, so a model that has none gets eager.
    extra: further arguments of from_pretrained.  dropout: the config's own rates, which are set to 0."""

    config: Any
    dtype: torch.dtype
    attn: str
    may_be_eager: bool
    bits: int | None
    device: torch.device
    extra: dict[str, Any]
    dropout: dict[str, float]


def bits_of(load_in_8bit: bool, load_in_4bit: bool) -> int | None:
    return 8 if load_in_8bit else 4 if load_in_4bit else None


def config_of(source: ModelSource) -> Any:
    """The transformers config of a model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)
    except CONFIG_ERRORS as e:
        raise load_error(source, e) from e


def plan_load(
    source: ModelSource,
    dtype: str,
    attn: str,
    bits: int | None,
    cpu_offload: bool,
    device: torch.device | str,
    trains: bool = False,
) -> LoadPlan:
    """Everything that can be decided, and refused, before any weight is read. trains: adapters will be trained on it."""
    check_files(source)
    where, config = torch.device(device), config_of(source)
    config.__dict__.pop("auto_map", None)  # transformers knows the type, else check_files would have refused it
    dropout = no_dropout(config)
    chosen = _dtype(source, config, dtype, where, trains)
    kernel = _attention(attn, where, chosen)
    extra: dict[str, Any] = {"device_map": {"": str(where)}} if where.type == "cuda" else {}
    if bits:
        extra = quantised_kwargs(bits, where, cpu_offload)
    return LoadPlan(config, chosen, kernel, attn == "auto", bits, where, extra, dropout)


def _dtype(source: ModelSource, config: Any, name: str, device: torch.device, trains: bool = False) -> torch.dtype:
    """auto: on CUDA the checkpoint's own, bfloat16 in place of float16 where the GPU computes in it; float32 on the CPU."""
    if name != "auto":
        chosen = DTYPES[name]
    elif device.type != "cuda":
        chosen = torch.float32
    else:
        chosen = checkpoint_dtype(source.folder, config)
        if chosen is torch.float16 and torch.cuda.is_bf16_supported(including_emulation=False):
            chosen = torch.bfloat16
    if device.type != "cuda" and chosen is torch.float16:
        raise ResourceError.at("dtype", "float16 needs a GPU", "bfloat16 or float32 on the CPU", "float16")
    if trains and chosen is torch.float16:
        # The loss is not scaled here: most gradients of logits are below 6e-8, the smallest float16.
        what = "float16 is not trained: gradients that small are 0 in it"
        raise ResourceError.at("dtype", what, "bfloat16 or float32", "float16", "set dtype=bfloat16, or float32")
    if device.type == "cuda" and chosen is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ResourceError.at("dtype", "this GPU has no bfloat16", "float16 or float32", "bfloat16")
    return chosen


def checkpoint_dtype(folder: Path, config: Any) -> torch.dtype:
    """What config.json says, else the number format of the largest tensor in the first weight file, from its header."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    path = weight_files(folder)[0]
    if path.suffix == ".bin":
        return torch.float32
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            largest = max(slices, key=lambda s: math.prod(s.get_shape()))
            return DTYPES[_STORED.get(largest.get_dtype(), "float32")]
    except (SafetensorError, ValueError) as e:
        raise ArtifactError.at(str(path), f"is damaged: {one_line(e)}") from e


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, which has been loaded before. ArtifactError if none of its files has it."""
    for path in weight_files(folder):
        if path.suffix == ".bin":
            pickled = torch.load(path, map_location="cpu", weights_only=True)
            if name in pickled:
                return pickled[name]
        else:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return file.get_tensor(name)
    raise ArtifactError.at(str(folder), f"{name} cannot be read", "weight files that hold it")


def _attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """auto: torch's own scaled dot product attention, and eager where a model has none (`from_pretrained`). In decoding flash-attn
    would take the padding out of the whole cache, in every layer and at every token."""
    if name == "auto":
        return "sdpa"
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not (fits and installed):
        lack = "flash-attn is not installed" if fits else "it needs CUDA and half precision"
        fix = f"use auto, sdpa or eager{f', or install a wheel: {FLASH_ATTN_WHEELS}' if fits else ''}"
        raise ResourceError.at("attn_implementation", f"flash_attention_2: {lack}", fix=fix)
    return name


def causal_class(config: Any) -> Any:
    """The Auto class of language models for this config; models that also see are image-text models where there is no other.

    ConfigError if its tokens see those that follow (PaliGemma, EmbeddingGemma): no cache can hold what changes later."""
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise ConfigError.at(
            "model_name_or_path",
            f"models of type {config.model_type} cannot be used here: each of their tokens sees those that follow it",
            "a causal language model",
            "use_bidirectional_attention in its config",
            "choose a model of another family",
        )
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def refuse_unreadable_merge(config: Any, where: str) -> None:
    """ArtifactError, before any weight is read, if what `causal_class` makes of this config cannot be loaded again once it is
    saved: the decoder alone, of a type of which transformers has no language model (Mllama)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    saved = None if causal is None else causal.config_class
    if saved is not None and saved not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ArtifactError.at(
            where,
            f"models of type {config.model_type} cannot be merged: their decoder alone would be saved, and transformers loads no"
            f" language model of type {saved.model_type}",
            "a model type whose decoder can be loaded by itself",
            config.model_type,
            "use the adapter unmerged (serve, generate)",
        )


def classifier_config(config: Any, where: str) -> Any:
    """The config of a one-label sequence classifier with the trunk of the causal language model that `config` stands for: `config`,
    or that of its text decoder where the language model is one (Qwen3.5).

    ArtifactError, before any weight is read, if transformers has no sequence-classification class for it."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    text = config.get_text_config()
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is not config and causal is not None and causal.config_class is type(text):
        config = text
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise no_classifier(config, where)
    config.num_labels = 1
    return config


def no_classifier(config: Any, where: str) -> ArtifactError:
    """Of a model type whose sequence classifier cannot hold a reward adapter's head, or that has none."""
    return ArtifactError.at(
        where,
        f"transformers has no sequence-classification class for model type {config.model_type} with a linear head on its decoder",
        "a model type that has one, for a reward model with weights of its own",
        fix="use the reward run itself, an adapter with a head, wherever a reward is asked for",
    )


def is_encoder(config: Any) -> bool:
    """Whether a sequence classifier of this config is an encoder (BERT, DeBERTa, ModernBERT): it reads a text as a whole, and its
    head is of a kind of its own."""
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    found: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if found is None or config.is_encoder_decoder or issubclass(found, GenericForSequenceClassification):
        return False
    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_decoder", None) is False


def from_pretrained(auto: Any, source: ModelSource, plan: LoadPlan) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as an Auto class makes it, and its report of missing and unexpected weights (`unexpected_keys`: all that the model
    has no place for). A library's errors become ours. plan.attn becomes eager where a model has no sdpa, and need not."""
    arguments: dict[str, Any] = {
        "config": copy.deepcopy(plan.config),
        "dtype": plan.dtype,
        "use_safetensors": not are_pickled(source.folder),
        "weights_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **plan.extra,
    }
    try:
        with quiet(), _all_unexpected():
            try:
                model, info = auto.from_pretrained(str(source.folder), attn_implementation=plan.attn, **arguments)
            except (ValueError, ImportError) as e:
                if not plan.may_be_eager or re.search("attention|sdpa", str(e), re.IGNORECASE) is None:
                    raise
                plan.attn = "eager"
                model, info = auto.from_pretrained(str(source.folder), attn_implementation=plan.attn, **arguments)
        return model, {**info, "unexpected_keys": {*info["unexpected_keys"], *model.__dict__.pop(_UNEXPECTED, ())}}
    except torch.cuda.OutOfMemoryError as e:
        raise ResourceError.at(str(source.folder), f"does not fit into GPU memory: {one_line(e)}") from e
    except pickle.UnpicklingError as e:
        raise ArtifactError.at(
            str(source.folder), "the pickled weights hold more than tensors", "tensors alone", one_line(e)
        ) from e
    except (*CONFIG_ERRORS, RuntimeError, ImportError, SafetensorError) as e:
        raise load_error(source, e) from e


_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|(attn|attention)\.bias|relative_position_index|\.version)$")
"""Tensors of older checkpoints that a model computes by itself, of those that transformers leaves out of its report."""


_UNEXPECTED = "_rlhf_ray_unexpected"


@contextmanager
def _all_unexpected() -> Iterator[None]:
    """Models that are loaded meanwhile have an attribute _UNEXPECTED: names of tensors that they have no place for, also of those
    that transformers leaves out of its report because the class says so (`_keys_to_ignore_on_load_unexpected`: a vision tower,
    layers that predict further tokens)."""
    from transformers import PreTrainedModel

    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def note_and_adjust(self: Any, loading_info: Any) -> None:
        self.__dict__[_UNEXPECTED] = {name for name in loading_info.unexpected_keys if not _COMPUTED.search(name)}
        adjust(self, loading_info)

    PreTrainedModel._adjust_missing_and_unexpected_keys = note_and_adjust  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no tables of missing weights from transformers: what is wrong is told by our own errors."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
