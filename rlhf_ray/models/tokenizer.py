"""Tokenizers: loading, identity, and the two choices that silently ruin a run when they are wrong, pad and end of sequence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.sources import GENERATION, ModelSource, check_files, load_error, resolve_source
from rlhf_ray.storage.files import sha256_text

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
"""Without any of them a folder has no tokenizer."""
_PAD_NAMES = re.compile(r"(?i)[<\[(|]+(finetune_right_|right_|left_)?pad(_id|ding|_token)?[|\])>]+")
_RESERVED = re.compile(r"(?i)[<\[|]+(reserved_special_token|reserved|unused|extra_id|extra|special|dummy)_?\d+[|\]>]+")


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of model `path`. It adds BOS or not, as it was made to.

    ConfigError if there is no such model; ArtifactError if it has no fast tokenizer (tokenizer.json) or brings its own code."""
    source = resolve_source(path, revision)
    check_files(source)
    return tokenizer_of(source)


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerFast:
    """The tokenizer in an already checked folder."""
    from transformers import AutoTokenizer

    tokenizer: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.folder), trust_remote_code=False)
    except Exception as e:  # a damaged tokenizer.json raises a bare Exception
        if not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
            raise ArtifactError.at(
                str(source.folder),
                "has no tokenizer",
                f"one of {', '.join(TOKENIZER_FILES)} beside the weights",
                fix="save the model's own tokenizer there: tokenizer.save_pretrained(folder)",
            ) from e
        raise load_error(source, e) from e
    if not getattr(tokenizer, "is_fast", False):
        raise ArtifactError.at(str(source.folder), "no fast tokenizer", "tokenizer.json", type(tokenizer).__name__)
    return tokenizer  # type: ignore[return-value]


def vocabulary_rows(tokenizer: Any) -> int:
    """Embedding rows the tokenizer needs: its largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identity of a tokenizer: equal hashes turn equal text into equal ids.

    Covers vocabulary, merges, normaliser, pre-tokeniser, post-processor (BOS), added tokens, special ids; pad aside, both which
    token is set as pad and an appended token that is named as a pad."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [t for t in backend.get("added_tokens") or [] if not _PAD_NAMES.fullmatch(t["content"])]
    identity = {
        "added_tokens": sorted(({k: t[k] for k in ("id", "content")} for t in added), key=lambda t: t["id"]),
        "normalizer": backend.get("normalizer"),
        "pre_tokenizer": backend.get("pre_tokenizer"),
        "post_processor": backend.get("post_processor"),
        "model": backend.get("model"),
        "special": {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "unk")},
    }
    return sha256_text(json.dumps(identity, sort_keys=True, ensure_ascii=False))


@dataclass(frozen=True)
class PadChoice:
    """The id that fills batches, always masked.  why: which rule chose it, for the run's header."""

    id: int
    token: str
    why: str


def choose_pad(tokenizer: Any, eos: tuple[int, ...] = ()) -> PadChoice:
    """Pick a pad that is no end-of-sequence token, without resizing the vocabulary.

    In order: the tokenizer's own pad; a token named as a pad; a reserved token; the unknown token; the lowest other id.
    `eos`: ids that end a reply, beside the tokenizer's own eos.   ArtifactError if every id ends a reply."""
    ends = {tokenizer.eos_token_id, *eos}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return PadChoice(tokenizer.pad_token_id, tokenizer.pad_token, "the tokenizer's own pad")
    note = "its pad is its end token" if tokenizer.pad_token_id is not None else "it has no pad"
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    free = [(token, i) for token, i in vocabulary if i not in ends]
    for pattern, name in ((_PAD_NAMES, "pad token"), (_RESERVED, "reserved token")):
        for token, i in free:
            if pattern.fullmatch(token):
                return PadChoice(i, token, f"a {name} of the vocabulary; {note}")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
        return PadChoice(tokenizer.unk_token_id, tokenizer.unk_token, f"the unknown token; {note}")
    if not free:
        raise ArtifactError.at("tokenizer", "every token of the vocabulary ends a reply; none is left to pad with")
    token, i = next(((t, i) for t, i in free if i != tokenizer.bos_token_id), free[0])
    return PadChoice(i, token, f"an ordinary token, always masked; {note}")


def eos_ids(
    tokenizer: Any,
    generation_config: GenerationConfig | None,
    override: tuple[int, ...] | None,
    rows: int | None = None,
) -> tuple[int, ...]:
    """Ids that end a reply: `override`, or the tokenizer's eos followed by those of the generation config.

    The first ends training data where no chat template has an end of its own (data/encode.py).

    rows: embedding rows of the model; default: what the tokenizer needs.
    ConfigError for an override outside the vocabulary; ArtifactError if the model names one, or names none at all."""
    rows = vocabulary_rows(tokenizer) if rows is None else rows
    if override is not None:
        foreign = [i for i in override if not 0 <= i < rows]
        if foreign or not override:
            got = ", ".join(map(str, foreign)) or "none"
            raise ConfigError.at("stop_token_ids", "not in the vocabulary", f"ids from 0 to {rows - 1}", got)
        return tuple(dict.fromkeys(override))
    from_config = getattr(generation_config, "eos_token_id", None)
    listed = from_config if isinstance(from_config, (list, tuple)) else [from_config]
    found = [i for i in (tokenizer.eos_token_id, *listed) if i is not None]
    if not found:
        raise ArtifactError.at(
            "tokenizer", "the model has no end-of-sequence token, so no reply could ever end", fix="set stop_token_ids"
        )
    strange = [i for i in found if type(i) is not int or not 0 <= i < rows]
    if strange:
        raise ArtifactError.at(
            GENERATION, "an end token is not in the vocabulary", f"whole numbers below {rows}", str(strange)
        )
    return tuple(dict.fromkeys(found))
