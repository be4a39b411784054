"""The frozen base: a transformers model with its tokenizer, and everything about it that a run records and later compares.

Any causal language model that the Auto classes know; dropout 0, eval mode, no gradients. Adapters come on top (adapters.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_ray.data.encode import own_end_of_turn
from rlhf_ray.data.templates import ChatTemplate, Template
from rlhf_ray.errors import ArtifactError, InvariantError
from rlhf_ray.models.context import context_length, context_notes, encoder_context
from rlhf_ray.models.coverage import quantisation_notes
from rlhf_ray.models.heads import check_labels, logits_head, score_layer, two_labels_note
from rlhf_ray.models.loading import (
    DTYPES,
    LoadPlan,
    bits_of,
    causal_class,
    checkpoint_dtype,
    classifier_config,
    from_pretrained,
    is_encoder,
    no_classifier,
    no_dropout,
    plan_load,
    quiet,
    read_tensor,
    refuse_unreadable_merge,
    without_placeholders,
)
from rlhf_ray.models.lora_compute import compute_adapters_in
from rlhf_ray.models.packing import Packing
from rlhf_ray.models.quantisation import dequantised, keep_trainable
from rlhf_ray.models.recurrent import one_recurrence
from rlhf_ray.models.sources import GENERATION, ModelSource, config_sha256, resolve_source, weights_sha256
from rlhf_ray.models.tokenizer import (
    PadChoice,
    choose_pad,
    eos_ids,
    load_tokenizer,
    tokenizer_of,
    tokenizer_sha256,
    vocabulary_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "Backbone",
    "BaseIdentity",
    "PadChoice",
    "choose_pad",
    "eos_ids",
    "load_backbone",
    "load_classifier",
    "load_exact",
    "load_tokenizer",
    "no_dropout",
    "tokenizer_sha256",
    "trunk",
]


@dataclass(frozen=True)
class BaseIdentity:
    """What makes a base the same base. path: absolute path or Hub id.  revision: commit of a Hub model.
    precision: the number format it was loaded in, "float32", "bfloat16", "float16", "8bit" or "4bit"."""

    path: str
    revision: str | None
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str
    precision: str = "float32"

    def manifest(self) -> dict[str, Any]:
        """The manifest's "base" entry; the tokenizer has an entry of its own."""
        return {k: v for k, v in asdict(self).items() if k != "tokenizer_sha256"}


@dataclass
class Backbone:
    """A loaded base. model: frozen, in eval mode.  eos_ids: what ends a reply, whatever the template (see `stop_ids`).
    dtype: of the weights that are not quantised.  context_length: tokens it was made for.  head: of a causal language model.
    stop_token_ids: those that the job names, None where it leaves them to model and template.
    packing: how it reads rows packed into one; None where it cannot, or nobody tried.
    is_encoder: of a classifier that reads prompt and reply as a pair of texts, in both directions.
    notes: what a run should say of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    pad: PadChoice
    eos_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    identity: BaseIdentity
    context_length: int
    attn_implementation: str
    head: nn.Module | None = None
    stop_token_ids: tuple[int, ...] | None = None
    packing: Packing | None = None
    notes: tuple[str, ...] = ()
    is_encoder: bool = False

    def stop_ids(self, template: Template) -> tuple[int, ...]:
        """What ends a reply under `template`: its end of turn, which also ends training data, and `eos_ids`. If the job names stop
        tokens: those alone."""
        end = own_end_of_turn(self.tokenizer, template)
        return (
            self.eos_ids
            if end is None or self.stop_token_ids is not None
            else tuple(dict.fromkeys((end, *self.eos_ids)))
        )

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states [..., D] -> logits [..., V]. InvariantError for a classifier."""
        if self.head is None:
            raise InvariantError.at(self.identity.path, "is a classifier and has no language-model head")
        return self.head

    @property
    def marks_second_text(self) -> bool:
        """Of an encoder: whether tokens of the second text of a pair are of another kind, as its tokenizer says."""
        names = getattr(self.tokenizer, "model_input_names", ("token_type_ids",))
        return int(getattr(self.model.config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in names

    @property
    def pad_id(self) -> int:
        return self.pad.id

    @property
    def hidden_size(self) -> int:
        """Width of the trunk's states: of what the head reads, which in OPT-350M is not what the layers have."""
        head = self.model.get_output_embeddings() if self.head is not None else getattr(self.model, "score", None)
        if getattr(self.head, "transform", None) is not None:  # which reads the states, and may make them narrower
            head = None
        return int(getattr(head, "in_features", None) or self.model.config.get_text_config().hidden_size)


def load_backbone(
    *,
    path: str,
    revision: str | None,
    dtype: str,
    attn_implementation: str,
    load_in_8bit: bool,
    load_in_4bit: bool,
    cpu_offload: bool,
    device: torch.device | str,
    trains: bool = False,
    stop_token_ids: tuple[int, ...] | None = None,
    lora_compute_dtype: str = "float32",
) -> Backbone:
    """Load the causal language model `path` (folder or Hub id) onto `device`, with the meanings of the job fields of these names.

    trains: adapters will be trained on it.
    Raises ConfigError if there is no such model, ResourceError for what this machine cannot do (flash-attn, half precision on the
    CPU, bitsandbytes), ArtifactError if the model is damaged, incomplete or does not fit its tokenizer."""
    source = resolve_source(path, revision)
    bits = bits_of(load_in_8bit, load_in_4bit)
    plan = plan_load(source, dtype, attn_implementation, bits, cpu_offload, device, trains)
    model, info = from_pretrained(causal_class(plan.config), source, plan)
    without_placeholders(model.config)
    compute_adapters_in(model, lora_compute_dtype, plan.dtype)
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise ArtifactError.at(
            str(source.folder),
            "the weights of a causal language model are not all there",
            got=f"missing {_some(missing)}",
        )
    backbone = _finish(model, source, plan, stop_token_ids)
    backbone.head = logits_head(model, trunk(model))
    backbone.notes += tuple(unused_notes(info["unexpected_keys"], model))
    return backbone


def load_classifier(
    path: str,
    *,
    revision: str | None,
    dtype: str,
    attn_implementation: str,
    load_in_8bit: bool,
    load_in_4bit: bool,
    cpu_offload: bool,
    device: torch.device | str,
    trains: bool = False,
) -> Backbone:
    """Load a sequence-classification model of one or two labels, a reward model, like `load_backbone`.

    Of a decoder, `score` is a linear layer D -> 1 (`heads.score_layer`), with the bias that the checkpoint may have. An encoder
    keeps its own head, and is not quantised: it is small, and its head would be.
    ArtifactError if its score head is not among its weights (a causal language model given as a reward model would score at
    random), if it has more labels, or if it is neither an encoder nor a decoder with a linear head called `score`."""
    source = resolve_source(path, revision)
    bits = bits_of(load_in_8bit, load_in_4bit)
    plan = plan_load(source, dtype, attn_implementation, bits, cpu_offload, device, trains)
    from transformers import AutoModelForSequenceClassification

    if is_encoder(plan.config):
        plan = plan_load(source, dtype, "auto", None, False, device, trains)

    model, info = from_pretrained(AutoModelForSequenceClassification, source, plan)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ArtifactError.at(
            str(source.folder),
            "score head newly initialised: this is not a reward model",
            "a sequence-classification checkpoint of one label, or two",
            f"{plan.config.architectures or 'no architecture'}, without {_some(missing)}",
            "give a reward run, or a merged one (rlhf-ray merge)",
        )
    labels = int(model.config.num_labels or 0)
    two = [two_labels_note(source.name)] if labels == 2 else []
    if is_encoder(plan.config):
        check_labels(labels)
        backbone = _finish(model, source, plan, None, encoder=True)
        backbone.notes += (*unused_notes(info["unexpected_keys"], model), *two)
        return backbone
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ArtifactError.at(
            str(source.folder),
            "no score head that can be read",
            "an encoder, or a decoder with a linear layer `score`",
            type(model).__name__,
            "give it as a Python reward function",
        )
    unexpected = set(info["unexpected_keys"])
    model.score = _score_of(model, source, unexpected)
    backbone = _finish(model, source, plan, None)
    backbone.notes += (*unused_notes(unexpected - {SCORE_BIAS}, model), *two)
    return backbone


SCORE_BIAS = "score.bias"
"""Tensor of a checkpoint that transformers' classes have no place for, and drop."""


def _score_of(model: Any, source: ModelSource, unexpected: Collection[str]) -> nn.Linear:
    """The score head of a decoder's checkpoint as one linear layer D -> 1, with the bias that the checkpoint may have.

    unexpected: the tensors of the checkpoint that `model` has no place for."""
    head = model.score
    bias = read_tensor(source.folder, SCORE_BIAS) if SCORE_BIAS in unexpected else head.bias
    return score_layer(head.weight.detach(), None if bias is None else bias.detach())


def unused_notes(keys: Iterable[str], model: nn.Module) -> list[str]:
    """A line if tensors of a checkpoint have no place in the model that was made of it."""
    names = sorted(str(key) for key in keys)
    if not names:
        return []
    return [f"{type(model).__name__} does not use {len(names)} of the checkpoint's tensors: {_some(names)}"]


def load_in_float32(path: str, attn_implementation: str = "auto") -> Backbone:
    """`load_backbone` of a local folder on the CPU, whole and in float32: to compare with, whatever a job would load."""
    return load_backbone(
        path=path,
        revision=None,
        dtype="float32",
        attn_implementation=attn_implementation,
        load_in_8bit=False,
        load_in_4bit=False,
        cpu_offload=False,
        device="cpu",
    )


def load_exact(
    *,
    path: str,
    revision: str | None,
    dtype: str | None,
    classifier: bool,
    head: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Backbone, dict[str, float]]:
    """Load `path` on the CPU in its own number format, for a merge, which must work where running it would be too slow or refused.

    dtype: None is the checkpoint's own.   classifier: as a one-label sequence-classification model; its score head must be among
    the weights, unless `head` [1, D] is given, and its `offset`.   The backbone's notes are of tensors that were not used, and of
    nothing else.   Also returns the dropout rates of its config, to be restored before saving."""
    from transformers import AutoModelForSequenceClassification

    source = resolve_source(path, revision)
    plan = plan_load(source, "float32", "auto", None, False, "cpu")
    plan.dtype = DTYPES[dtype] if dtype else checkpoint_dtype(source.folder, plan.config)
    if classifier:
        plan.config = classifier_config(plan.config, str(source.folder))
    else:
        refuse_unreadable_merge(plan.config, str(source.folder))
    auto = AutoModelForSequenceClassification if classifier else causal_class(plan.config)
    model, info = from_pretrained(auto, source, plan)
    if head is not None and not isinstance(
        getattr(model, "score", None), nn.Linear
    ):  # ModernBERT's decoder has a prediction head
        raise no_classifier(plan.config, str(source.folder))
    missing = set(info["missing_keys"]) - ({"score.weight"} if head is not None else set())
    if missing:
        raise ArtifactError.at(str(source.folder), "weights are missing", got=_some(sorted(missing)))
    if getattr(model, "is_quantized", False):
        model = dequantised(model, plan.dtype, str(source.folder))
    unexpected = set(info["unexpected_keys"])
    if head is not None:
        given: Any = model.score
        model.score = score_layer(head.to(given.weight.dtype), torch.tensor([offset]) if offset else None)
        unexpected -= {"lm_head.weight", "embed_out.weight"}  # a classifier has none
    elif classifier:
        model.score = _score_of(model, source, unexpected)
        unexpected -= {SCORE_BIAS}
    backbone = _finish(model, source, plan, None)
    backbone.notes = tuple(unused_notes(unexpected, model))
    return backbone, plan.dropout


def trunk(model: nn.Module) -> nn.Module:
    """The module whose output is `last_hidden_state`: the model without its head, LoRA layers and all. Of a model that also sees
    or hears, its text decoder.

    `model` may be wrapped by PEFT; pass a DeepSpeed engine's `.module`."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    body: Any = base.base_model if base.config.get_text_config() is base.config else base.get_decoder()
    if body.get_output_embeddings() is None:
        return body  # type: ignore[no-any-return]
    # A language model inside a wrapper, or one whose class gives its trunk another name (Llama 4).
    return next(child for child in body.children() if hasattr(child, "get_input_embeddings"))  # type: ignore[no-any-return]


def _finish(
    model: PreTrainedModel,
    source: ModelSource,
    plan: LoadPlan,
    stop_token_ids: tuple[int, ...] | None,
    encoder: bool = False,
) -> Backbone:
    """Freeze, move, and compare with the tokenizer. An encoder writes no replies, so nothing ends them."""
    bits = plan.bits or bits_of(*(bool(getattr(model, f"is_loaded_in_{n}bit", False)) for n in (8, 4)))
    if getattr(model, "is_quantized", False):
        keep_trainable(model)
    else:
        model.to(plan.device)  # type: ignore[arg-type]
    one_recurrence(model)
    model.requires_grad_(False)
    model.eval()
    tokenizer = tokenizer_of(source)
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    needed = vocabulary_rows(tokenizer)
    if needed > rows:
        raise ArtifactError.at(
            str(source.folder),
            "the tokenizer has more tokens than the model has embeddings",
            f"at most {rows} tokens",
            str(needed),
            "use the tokenizer that belongs to this model",
        )
    ends = () if encoder else eos_ids(tokenizer, getattr(model, "generation_config", None), stop_token_ids, rows)
    identity = _identity(source, tokenizer, f"{bits}bit" if bits else str(plan.dtype).removeprefix("torch."))
    text = model.config.get_text_config()
    notes = quantisation_notes(trunk(model), bits) if bits else []
    notes += [] if encoder else context_notes(text)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        pad=_pad(tokenizer, ends),
        eos_ids=ends,
        device=plan.device,
        dtype=plan.dtype,
        identity=identity,
        context_length=encoder_context(model, tokenizer) if encoder else context_length(text, tokenizer),
        attn_implementation=plan.attn,
        stop_token_ids=stop_token_ids,
        notes=tuple(notes),
        is_encoder=encoder,
    )


@dataclass(frozen=True)
class BaseFiles:
    """A base that another engine loads from its folder. plan: how a job would load it.  eos_ids: as of a Backbone."""

    source: ModelSource
    plan: LoadPlan
    tokenizer: PreTrainedTokenizerFast
    eos_ids: tuple[int, ...]
    identity: BaseIdentity
    context_length: int

    @property
    def dtype(self) -> torch.dtype:
        """The number format that a job has it in."""
        return self.plan.dtype

    @property
    def pad(self) -> PadChoice:
        return _pad(self.tokenizer, self.eos_ids)

    def without_weights(self) -> Backbone:
        """What `load_backbone` makes of it, but on the meta device: shapes to compare with, nothing to compute with."""
        with torch.device("meta"), quiet():
            model = causal_class(self.plan.config).from_config(self.plan.config, dtype=self.dtype)
        model.requires_grad_(False)
        model.eval()
        return Backbone(
            model=model,
            tokenizer=self.tokenizer,
            pad=self.pad,
            eos_ids=self.eos_ids,
            device=torch.device("meta"),
            dtype=self.dtype,
            identity=self.identity,
            context_length=self.context_length,
            attn_implementation=self.plan.attn,
            head=logits_head(model, trunk(model)),
        )


def base_files(
    path: str, revision: str | None, dtype: str, device: torch.device | str, stop_token_ids: tuple[int, ...] | None
) -> BaseFiles:
    """What `load_backbone` would say of a base, without loading it; raises what it would raise before it reads weights."""
    from transformers import GenerationConfig

    source = resolve_source(path, revision)
    plan = plan_load(source, dtype, "auto", None, False, device)
    tokenizer = tokenizer_of(source)
    has_own = (source.folder / GENERATION).is_file()
    generation: Any = GenerationConfig
    how = generation.from_pretrained(str(source.folder)) if has_own else generation.from_model_config(plan.config)
    text = plan.config.get_text_config()
    ends = eos_ids(tokenizer, how, stop_token_ids, int(text.vocab_size))
    identity = _identity(source, tokenizer, str(plan.dtype).removeprefix("torch."))
    return BaseFiles(source, plan, tokenizer, ends, identity, context_length(text, tokenizer))


def _identity(source: ModelSource, tokenizer: PreTrainedTokenizerFast, precision: str) -> BaseIdentity:
    return BaseIdentity(
        source.name,
        source.revision,
        config_sha256(source.folder),
        weights_sha256(source.folder),
        tokenizer_sha256(tokenizer),
        precision,
    )


def _pad(tokenizer: PreTrainedTokenizerFast, ends: tuple[int, ...]) -> PadChoice:
    return choose_pad(tokenizer, (*ends, *_end_of_chat(tokenizer)))


def _end_of_chat(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """What ends a turn of the tokenizer's chat template, whether the job uses that or not: it must not pad either."""
    end = None if tokenizer.chat_template is None else own_end_of_turn(tokenizer, ChatTemplate(tokenizer))
    return () if end is None else (end,)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
