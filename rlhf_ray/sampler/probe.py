"""Whether a model of this kind is sampled and scored right here, tried on a tiny copy of its config before anything is loaded.

Attention alone needs no trial: a mask says there what is padding. What a layer with a state does with padding, with a row that
joins a batch and with a cache that it is handed differs from family to family, so it is measured: random weights, float32, a
second or less. So it is for encoders that can be language models (BERT): whether they look ahead, and what their head is.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import warning_once

from rlhf_ray.errors import ConfigError, RlhfRayError
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.heads import logits_head
from rlhf_ray.models.loading import no_dropout, quiet
from rlhf_ray.models.recurrent import hidden_states, layer_types, one_recurrence
from rlhf_ray.models.sources import CONFIG_ERRORS, one_line
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

TOLERANCE = 1e-3
"""Largest difference of log-probabilities, nats. Sums in another order differ by 1e-5, a state with padding in it by 0.1 to 10."""
PROMPTS = (5, 1, 9, 5)
REPLY = 6
ROWS = 3
"""Fewer than there are prompts, so that one joins rows that are under way."""

VOCABULARY = 64
WIDTH = 128
"""Widths are halved together until the hidden size is no more than this, as long as all of them stay whole."""
CHUNK = 4
"""Tokens that a recurrence takes at once: so that the rows here are several chunks long."""
_WIDTHS = re.compile(r"(hidden|embedding)_(size|dim)$|head_?dim$|d_head$|d_ssm$|lru_width$|lora_rank$|kv_channels$")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def check_config(file: Path) -> bool:
    """`check_family` of a config.json; True if it could not be read, which is told by whoever loads the model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    except CONFIG_ERRORS:
        return True
    return check_family(config)


def check_family(config: Any, where: str = "model_name_or_path") -> bool:
    """ConfigError if models of this config's kind would be sampled or scored wrong.   where: the job field that names the model.

    config: a transformers config. False, and no more, of one whose tiny copy cannot be built: nobody knows. What a model shows of
    itself is checked again where it is loaded and where it decodes."""
    layer_types(config)
    may_look_ahead = hasattr(config, "is_decoder")
    got, is_tried = "", True
    try:
        with quiet():
            model = tiny_model(config)
            is_tried = model is not None
            found = {} if model is None else differences(model)
            if model is not None and may_look_ahead:
                logits_head(model, trunk(model))
        off = {what: value for what, value in found.items() if not value <= TOLERANCE}
        got = "; ".join(f"{what}: off by {value:.2g}" for what, value in off.items())
    except RlhfRayError as error:
        got = error.problems[0].what.removeprefix("cannot be decoded here: ")
    except Exception as error:  # whatever a model does with a cache that it does not know
        got = f"{type(error).__name__}: {one_line(error)}"
    warning_once.cache_clear()  # what was kept quiet here is told where the model itself is slow
    if got and may_look_ahead and not config.is_decoder:
        got += " (is_decoder: false: an encoder, which sees the tokens that follow)"
    if got:
        raise ConfigError.at(
            where,
            f"models of type {config.model_type} cannot be used here (tried on a tiny copy of its config)",
            "log-probabilities of sampler and padded rows as in a plain forward pass",
            got,
            "choose a model of another family",
        )
    return is_tried


@torch.no_grad()
def differences(model: Any) -> dict[str, float]:
    """How far log-probabilities are from those of a plain forward pass over the whole row, without padding and without cache:
    the sampler's, and those of rows padded as the learner's are. The largest difference of each, nats; inf if not finite."""
    draw = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()) for n in PROMPTS]
    requests = [DecodeRequest(p, i, REPLY - i, ()) for i, p in enumerate(prompts)]  # they leave one after the other
    results = Sampler(model, 0, max_rows=ROWS).run(requests)
    rows = [torch.tensor(r.prompt_ids + s.token_ids) for r, s in zip(requests, results)]
    plain = [model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in rows]
    sampled = [
        _largest(
            torch.tensor(s.logprobs) - every[-len(s.logprobs) - 1 : -1].gather(1, row[-len(s.logprobs) :, None])[:, 0]
        )
        for s, row, every in zip(results, rows, plain)
    ]
    left, right = max(PROMPTS), REPLY
    ids = torch.zeros(len(rows), left + right, dtype=torch.int64)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        ids[i, left - len(prompt) : left - len(prompt) + len(row)] = row
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        mask[i, left - len(prompt) : left - len(prompt) + len(row)] = True
    states = hidden_states(trunk(model), ids, mask, length=int(mask.sum(dim=1).max()))
    alone = [trunk(model)(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    padded = [_largest(states[i][mask[i]] - state) for i, state in enumerate(alone)]
    return {"the sampler": max(sampled), "padded rows": max(padded)}


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max().nan_to_num(float("inf"), float("inf")))


def tiny_model(config: Any, vocabulary: int = VOCABULARY) -> nn.Module | None:
    """A model of the same family, layers and settings with few and narrow layers, random weights, float32, on the CPU; None if
    none can be made of this config."""
    from transformers import AutoModelForCausalLM

    for width, of_each in ((WIDTH, 1), (WIDTH, 2), (WIDTH * 4, 1)):
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            try:
                model = AutoModelForCausalLM.from_config(
                    tiny_config(config, width, of_each, vocabulary), dtype=torch.float32, attn_implementation="eager"
                )
            except Exception:  # a rule of some family that tiny_config does not know
                continue
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and name.endswith("weight") and "norm" not in name:
                    nn.init.normal_(parameter, std=0.1)  # logits far from uniform
        one_recurrence(model)
        return model.eval()
    return None


def tiny_config(config: Any, width: int = WIDTH, of_each: int = 1, vocabulary: int = VOCABULARY) -> Any:
    """A copy with the fewest layers that are `of_each` of each kind, a small vocabulary, and all widths divided by the same
    power of two: so heads times their dimension, or expansion times hidden size, stay what they were to each other."""
    text = copy.deepcopy(config.get_text_config())
    no_dropout(text)
    values = text.to_dict()
    count = int(text.num_hidden_layers)
    layers = _layers_needed(text, count, of_each)
    sizes = {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v}
    widths = {k: v for k, v in sizes.items() if _WIDTHS.search(k)}
    factor = 1
    # Heads stay of an even dimension, which rotary positions turn in pairs.
    parts = {k: 4 if "head" in k else 2 for k in widths}
    parts["hidden_size"] = 8  # rows of 16 bytes, as grouped products of experts want them
    heads = int(values.get("num_attention_heads") or 1)
    if not any("head" in k for k in widths) and text.hidden_size % (4 * heads) == 0:
        parts["hidden_size"] = 4 * heads
    while text.hidden_size // factor > width and all(v % (parts[k] * factor) == 0 for k, v in widths.items()):
        factor *= 2
    changed: dict[str, Any] = {name: value // factor for name, value in widths.items()}
    # Between layers nothing depends on these; grouped products of experts want multiples of 16 bytes.
    changed |= {k: max(v // factor // 16, 1) * 16 for k, v in sizes.items() if k.endswith("intermediate_size")}
    changed |= {k: min(v, CHUNK) for k, v in sizes.items() if k.endswith("chunk_size")}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == count and name != "architectures":
            changed[name] = value[:layers]
        elif name.endswith(("_idxs", "_indices", "layer_ids")) and isinstance(value, list):
            changed[name] = [i for i in value if i < layers]
        elif name in _TOKENS and value is not None:
            changed[name] = _TOKENS[name]
    changed |= {"num_hidden_layers": layers, "vocab_size": vocabulary}
    changed |= {k: vocabulary for k in sizes if k.startswith("vocab_size_")}
    if "num_kv_shared_layers" in sizes:  # Gemma 3n: the last ones take keys and values of one of their kind before them
        kinds = (values.get("layer_types") or [""] * count)[:layers]
        own = next(n for n in range(1, layers + 1) if set(kinds[:n]) == set(kinds))
        changed["num_kv_shared_layers"] = min(sizes["num_kv_shared_layers"], layers - own)
    if "per_layer_config" in values:  # Gemma 4: what single layers have instead
        changed["per_layer_config"] = {
            i: {k: v // factor if k in widths else v for k, v in own.items()}
            for i, own in values["per_layer_config"].items()
            if int(i) < layers
        }
    for name in ("quantization_config", "architectures", "dtype"):
        values.pop(name, None)
    return type(text).from_dict({**values, **changed})


def _layers_needed(text: Any, count: int, of_each: int) -> int:
    """Length of the shortest beginning that has `of_each` layers of every kind, or all there are, and two layers."""
    kinds = list(zip(*(k for k in (getattr(text, "layer_types", None), getattr(text, "mlp_layer_types", None)) if k)))
    places = [[i for i, kind in enumerate(kinds) if kind == wanted][:of_each] for wanted in set(kinds)]
    return min(count, max(2, 1 + max((found[-1] for found in places), default=0)))
