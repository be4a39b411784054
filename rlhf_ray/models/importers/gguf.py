"""GGUF, llama.cpp's one-file checkpoints: weights (often quantised), settings and vocabulary, turned into a plain checkpoint.

transformers reads weights and settings; here is what it leaves out in silence. Its byte-level tokenizers cut words as GPT-2 does
unless the file names one of some twenty other ways; a digit or a blank line is then cut otherwise than the model learnt. Llama 3's
scaled rotary frequencies (the tensor `rope_freqs`) are dropped, and so is every tensor that its class has no place for. What cannot
be taken over is refused, and nothing is written until the new checkpoint answers as the file does.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.data.encode import own_end_of_turn
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ResourceError
from rlhf_ray.models.importers.pickles import filled_at_once, new_folder
from rlhf_ray.models.loading import DTYPES, quiet
from rlhf_ray.models.sources import ModelSource, one_line
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.storage.files import atomic_write_json, disk_errors, sha256_file

MAGIC = b"GGUF"
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Tensor types that hold numbers as they are."""

CONTROL = 3
"""Of `tokenizer.ggml.token_type`: a token that is no text."""

GPT2_WORDS = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
"""Values of `tokenizer.ggml.pre` that cut text by GPT-2's own rule, in llama.cpp's table (src/llama-vocab.cpp)."""

SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""The same after every digit has been cut off by itself: \\p{N} first, then GPT-2's rule."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QUESTION = "Give three tips for staying healthy."
REPLY_TOKENS = 32


@dataclass(frozen=True)
class GgufFile:
    """path: the file.  fields: its settings, by their names.  types: how many tensors there are of each type.
    numbers: in all tensors that are weights.  rope_freqs: f32[head_dim / 2], divisors of the rotary frequencies; None: all 1."""

    path: Path
    fields: Mapping[str, Any]
    types: Mapping[str, int]
    numbers: int
    rope_freqs: Tensor | None

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])

    @property
    def quantised(self) -> bool:
        return not self.types.keys() <= PLAIN.keys()

    @property
    def dtype(self) -> str:
        """The format that most weights are in; bfloat16 where they are quantised."""
        if self.quantised:
            return "bfloat16"
        return next(PLAIN[name] for name in ("BF16", "F16", "F32") if name in self.types)


def import_gguf(
    file: Path | str,
    output_dir: Path | str,
    dtype: str | None = None,
    tokenizer: Path | str | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model in `file` as safetensors, config, tokenizer, chat template and generation config; return the folder.

    dtype: number format of the weights; default: the file's, bfloat16 where it is quantised.   tokenizer: a folder with the
    model's tokenizer.json, for files whose tokenizer cannot be made again.   log: called with what was dequantised and the reply.
    The checkpoint must answer, greedily and token for token, as the file does in transformers.
    ResourceError without the package gguf; ArtifactError, with nothing written, for what is no GGUF, is cut off, is a part of a
    split file, or would come out as another model."""
    target, source = new_folder(output_dir), read_gguf(Path(file))
    chosen = dtype or source.dtype
    config = _config(source)
    made = _tokenizer(source, Path(tokenizer) if tokenizer is not None else None)
    model = _model(source, config, DTYPES[chosen])
    ends = end_ids(source, made)
    with filled_at_once(target) as folder, disk_errors(folder):
        _save(folder, model, made, ends)
        prompt, reply = _check_reply(folder, source, model, made, ends)
        text = made.decode(reply, skip_special_tokens=True)
        story = {
            "from": "gguf",
            "source": str(source.path.absolute()),
            "sha256": sha256_file(source.path),
            "architecture": source.architecture,
            "name": source.fields.get("general.name"),
            "license": source.fields.get("general.license"),
            "dequantised": source.quantised,
            "tensor_types": dict(sorted(source.types.items())),
            "dtype": chosen,
            "checked": {"prompt": prompt, "greedy_reply": text, "tokens": len(reply)},
        }
        atomic_write_json(folder / "import.json", story)
    if source.quantised:
        kinds = ", ".join(f"{n} {name}" for name, n in sorted(source.types.items()) if name not in PLAIN)
        log(f"dequantised to {chosen}: {kinds} tensors")
    log(f"greedy reply to {prompt!r}: {text!r}")
    return target


def read_gguf(path: Path) -> GgufFile:
    """Settings and tensor table of a whole, unsplit model. ArtifactError for anything else; ResourceError without the package."""
    where = str(path)
    if not path.is_file():
        raise ArtifactError.at(where, "no such file", "a .gguf file")
    with path.open("rb") as stream:
        begins = stream.read(4)
    if begins != MAGIC:
        raise ArtifactError.at(where, "is not a GGUF file", "a file that begins with GGUF", repr(begins))
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        raise ResourceError.at(
            "import gguf", "the package gguf is not installed", fix="pip install 'rlhf_ray[gguf]'"
        ) from None
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = list(reader.tensors)
    except Exception as error:  # whatever a table that leads outside the file makes of it
        raise ArtifactError.at(
            where, f"is cut off or damaged: {one_line(error)}", "a whole GGUF file", f"{path.stat().st_size} bytes"
        ) from error
    parts, kind = int(fields.get("split.count", 1) or 1), str(fields.get("general.type", "model"))
    if parts > 1:
        raise ArtifactError.at(
            where,
            f"is part {int(fields.get('split.no', 0)) + 1} of {parts} of a split model",
            "one file",
            fix="join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
        )
    if kind != "model" or "general.architecture" not in fields:
        raise ArtifactError.at(where, "holds no model", "general.type model, with an architecture", kind)
    if long := [t.name for t in tensors if t.name.startswith("rope_factors")]:
        raise ArtifactError.at(where, f"holds {long[0]}, rotary factors that transformers does not read")
    freqs = next((torch.tensor(t.data.copy()).float() for t in tensors if t.name == "rope_freqs.weight"), None)
    numbers = sum(int(t.n_elements) for t in tensors if t.name != "rope_freqs.weight")
    return GgufFile(path, fields, Counter(t.tensor_type.name for t in tensors), numbers, freqs)


def _config(source: GgufFile) -> Any:
    """The settings as transformers reads them, with Llama 3's rotary scaling. ArtifactError for what it cannot read."""
    from transformers import AutoConfig

    where, architecture = str(source.path), source.architecture
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except Exception as error:
        raise ArtifactError.at(
            where, f"architecture {architecture} cannot be read by this transformers: {one_line(error)}"
        ) from error
    rope = dict(getattr(config, "rope_parameters", None) or {})
    scaling = source.fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and rope.get("rope_type", "default") == "default":
        raise ArtifactError.at(where, "scales its rotary positions, which transformers does not read", "none", scaling)
    if source.rope_freqs is not None:
        config.rope_parameters = {**rope, **llama3_scaling(source.rope_freqs, float(rope["rope_theta"]), where)}
    return config


def llama3_scaling(divisors: Tensor, theta: float, where: str) -> dict[str, Any]:
    """Llama 3's scaling (transformers' rope_type "llama3") that divides the rotary frequencies by `divisors`, f32[head_dim / 2].

    llama.cpp stores the divisors, not the four numbers that they come from: the factor is the largest, the others are the same in
    all of Llama 3.1 to 3.3. ArtifactError if that does not give these divisors."""
    factor, half = float(divisors.max()), len(divisors)
    wavelengths = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(expected, divisors.double(), rtol=1e-3):
        raise ArtifactError.at(where, "its rope_freqs are not those of Llama 3", "a factor over 8192 positions")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _tokenizer(source: GgufFile, given: Path | None) -> Any:
    """The tokenizer: `given`, if its vocabulary is the file's; else made from the file. ArtifactError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if given is not None:
        found = tokenizer_of(ModelSource(given, str(given)))
        _same_vocabulary(found, source, str(given))
        return found
    try:
        with quiet():
            read = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
        backend = read.backend_tokenizer
    except Exception as error:
        raise ArtifactError.at(
            str(source.path),
            f"its tokenizer cannot be read: {one_line(error)}",
            fix="--tokenizer FOLDER with its tokenizer.json",
        ) from error
    _cut_words(backend, source)
    names = {name: getattr(read, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=source.fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def _cut_words(backend: Any, source: GgufFile) -> None:
    """Have a byte-level tokenizer cut text as the file says. ArtifactError if it says nothing, or nothing that is known."""
    from tokenizers import pre_tokenizers

    if source.fields.get("tokenizer.ggml.model") != "gpt2":
        return
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # transformers knows the rule
    rule = source.fields.get("tokenizer.ggml.pre")
    if rule in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule not in GPT2_WORDS:
        raise ArtifactError.at(
            str(source.path),
            "its tokenizer cuts text into words by a rule that is not known here (tokenizer.ggml.pre)",
            ", ".join(sorted(GPT2_WORDS | SINGLE_DIGITS)) + ", or one that transformers knows",
            str(rule),
            "--tokenizer FOLDER with the model's tokenizer.json",
        )


def _same_vocabulary(tokenizer: Any, source: GgufFile, where: str) -> None:
    """ArtifactError at the first id that means something else; ids that only one of the two has are fill."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    for i, token in enumerate(source.fields["tokenizer.ggml.tokens"]):
        if by_id.get(i, token) != token:
            raise ArtifactError.at(where, f"is another vocabulary: token {i}", repr(token), repr(by_id[i]))


def end_ids(source: GgufFile, tokenizer: Any) -> list[int]:
    """What ends a reply: the file's end of text, of turn and of message, and what its chat template puts after an answer."""
    named = [source.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = [int(i) for i in named if i is not None]
    if tokenizer.chat_template is not None:
        end = own_end_of_turn(tokenizer, load_template("chat", tokenizer))
        found += [] if end is None else [end]
    if not found:
        raise ArtifactError.at(str(source.path), "names no end-of-sequence token, so no reply could ever end")
    return list(dict.fromkeys(found))


def _model(source: GgufFile, config: Any, dtype: torch.dtype) -> Any:
    """The model in `dtype`. ArtifactError unless its weights and the file's tensors are the same in number."""
    from transformers import AutoModelForCausalLM

    where = str(source.path)
    auto: Any = AutoModelForCausalLM
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its progress bar
            model, info = auto.from_pretrained(
                str(source.path.parent),
                gguf_file=source.path.name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:
        raise ArtifactError.at(where, f"cannot be loaded as a causal language model: {one_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    held = {t.data_ptr(): t.numel() for t in model.state_dict().values()}  # tied weights once
    if missing or sum(held.values()) != source.numbers:
        raise ArtifactError.at(
            where,
            f"the file's tensors are not the weights of {type(model).__name__}",
            f"{source.numbers} numbers",
            f"{sum(held.values())}, missing {', '.join(missing[:3]) or 'none'}",
            "another file of the model, or its safetensors",
        )
    model.hf_quantizer, model.is_quantized = None, False  # the weights are plain numbers by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def _save(folder: Path, model: Any, tokenizer: Any, ends: list[int]) -> None:
    from transformers import GenerationConfig

    model.config.architectures = [type(model).__name__]
    model.config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=model.config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_reply(folder: Path, source: GgufFile, model: Any, tokenizer: Any, ends: list[int]) -> tuple[str, list[int]]:
    """Load `folder` afresh and compare tokenizer and greedy reply, both in float32. Returns the prompt and the reply's ids.

    ArtifactError if either differs."""
    from rlhf_ray.models.backbone import load_in_float32

    template = load_template("chat" if tokenizer.chat_template is not None else "none", tokenizer)
    text = template.render(Prompt(QUESTION))
    ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None, return_tensors="pt").input_ids
    expected = _greedy(model.float(), ids, ends)
    saved = load_in_float32(str(folder))
    if saved.identity.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise ArtifactError.at(str(source.path), "its tokenizer, saved and read back, is another one")
    got = _greedy(saved.model, ids, list(saved.eos_ids))
    if got != expected:
        raise ArtifactError.at(
            str(source.path), "the checkpoint made of it does not answer as it does", repr(expected), repr(got)
        )
    return QUESTION, got


def _greedy(model: Any, ids: Tensor, ends: list[int]) -> list[int]:
    """The likeliest tokens, one after the other, up to an end token."""
    with quiet():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=REPLY_TOKENS,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    return [int(i) for i in found[0, ids.shape[1] :]]
