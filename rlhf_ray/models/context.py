"""How many tokens a model can read: what it was made for, or less where a row's positions depend on its neighbours."""

from __future__ import annotations

from typing import Any

from rlhf_ray.errors import ConfigError

NO_LIMIT = 1 << 20
"""Context of a model that states none."""

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def context_length(config: Any, tokenizer: Any = None) -> int:
    """Tokens that a model was made for, by its config, else by its tokenizer; NO_LIMIT if neither says. No more than
    `rope_limit`."""
    limit, _ = rope_limit(config)
    stated = [getattr(config, name, None) for name in _NAMES]
    lengths = [n for n in stated if isinstance(n, int) and n > 0]
    if lengths:
        return min(lengths[0], limit)
    return min(getattr(tokenizer, "model_max_length", NO_LIMIT), limit)


def encoder_context(model: Any, tokenizer: Any = None) -> int:
    """Tokens that an encoder reads: what it was made for, by config and tokenizer, and no more than it has positions, which RoBERTa
    counts from behind its padding index."""
    table = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    rows = int(getattr(table, "num_embeddings", NO_LIMIT))
    first = getattr(table, "padding_idx", None)
    own = context_length(model.config)
    return min(own, rows if first is None else rows - first - 1, getattr(tokenizer, "model_max_length", NO_LIMIT))


def rope_limit(config: Any) -> tuple[int, str]:
    """(tokens, rope type) up to which a row's rotary frequencies are its own; (NO_LIMIT, "") where they always are.

    transformers chooses those of `longrope` and `dynamic` by the longest row of a batch: with a longer neighbour a short row would
    give another reply, and a rollout other log-probabilities than the learner's pass over it."""
    given = getattr(config, "rope_parameters", None) or {}
    limits = [(NO_LIMIT, "")]
    for one in [given, *(v for v in given.values() if isinstance(v, dict))]:
        kind = one.get("rope_type")
        if kind == "longrope" and one.get("long_factor") != one.get("short_factor"):
            original = one.get("original_max_position_embeddings") or config.original_max_position_embeddings
            limits.append((int(original), kind))
        if kind == "dynamic" and not one.get("alpha"):  # Hunyuan's alpha scales them once and for all
            limits.append((int(config.max_position_embeddings), kind))
    return min(limits)


def rope_note(config: Any) -> str:
    """ " (rope_type ...)" for a message about the context of a model that `rope_limit` limits; else nothing."""
    limit, kind = rope_limit(config)
    return f" (rope_type {kind}: beyond {limit} tokens positions depend on the longest row of a batch)" if kind else ""


def context_notes(config: Any) -> list[str]:
    """A line where the model states a longer context than it is used with here."""
    limit, stated = rope_limit(config)[0], int(getattr(config, "max_position_embeddings", 0) or 0)
    return [f"{limit} of the model's {stated} tokens of context are used{rope_note(config)}"] if limit < stated else []


def shortened_note(max_length: int, limit: int, config: Any) -> str:
    """What a stage says that uses `limit`, the model's context, instead of the job's max_length."""
    return f"max_length {max_length} is over the model's context{rope_note(config)}; {limit} is used"


def usable_length(
    max_length: int | None, context: int, config: Any, response_length: int | None = None
) -> tuple[int, list[str]]:
    """(tokens of prompt and reply together, what is to be warned of) of a job on a model of `context` tokens.   max_length: the
    job's, if it has one.   response_length: of the replies that PPO samples.   Raises ConfigError if these leave no room for a
    prompt."""
    limit = min(max_length or context, context)
    if response_length is not None and response_length >= limit:
        expected = f"below {limit} (the model's context{rope_note(config)})"
        fix = f"response_length={max(limit // 2, 1)}, say"
        raise ConfigError.at("response_length", "leaves no room for a prompt", expected, str(response_length), fix)
    return limit, [shortened_note(max_length, limit, config)] if max_length and limit < max_length else []
