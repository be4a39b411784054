"""The data of a PPO run: which prompts train, which are held out, which its ancestors were trained on; and the rows of ptx_data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.defaults import EVAL_MAX_ROWS
from rlhf_ray.data.collate import TokenisedPrompt, TokenisedRow, tokenise_prompts
from rlhf_ray.data.load import HeldOutRule, load_rows
from rlhf_ray.data.schedule import PromptSchedule
from rlhf_ray.data.splits import confirms, prompt_hash
from rlhf_ray.data.templates import Template
from rlhf_ray.errors import DataError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.context import usable_length
from rlhf_ray.ppo.ptx import load_ptx
from rlhf_ray.training.ancestry import check_ancestors


@dataclass(frozen=True)
class Prompts:
    """What the run samples replies to.  confirming: of each held-out prompt whether it is reported apart; empty if none is.
    lines, warnings: for the header.  manifest: of the data files.  rule: how prompts were held out.  ptx: rows of the supervised
    loss that is mixed in; empty without one."""

    schedule: PromptSchedule[TokenisedPrompt]
    held_out: list[TokenisedPrompt]
    confirming: list[bool]
    lines: list[str]
    warnings: list[str]
    manifest: tuple[dict[str, Any], ...]
    rule: HeldOutRule
    ptx: Sequence[TokenisedRow] = ()


def load_prompts(config: PPOConfig, backbone: Backbone, template: Template, is_resumed: bool = False) -> Prompts:
    """Read, cut, tokenise. Raises ConfigError if no prompt could fit or an ancestor held out otherwise (a run that is resumed only
    says so), DataError if none is left."""
    rows = load_rows(config.data, "prompt", "ppo")
    text = backbone.model.config.get_text_config()
    limit, shortened = usable_length(config.max_length, backbone.context_length, text, config.response_length)
    notes = [*rows.warnings, *shortened]
    shared, leaks = check_ancestors(rows, sources_of(config), refuse=not is_resumed)
    lines, sides, noted = [*rows.summary], [], list[str]()
    for side in (tuple(rows.train), rows.held_out[: config.data.eval_max_rows or EVAL_MAX_ROWS]):
        done = tokenise_prompts(
            side,
            template,
            backbone.tokenizer,
            max_length=limit,
            response_length=config.response_length,
            max_prompt_length=config.max_prompt_length,
            too_long=config.data.too_long,
            on_bad_row=config.data.on_bad_row,
            special_tokens=config.data.special_tokens,
        )
        lines += map(str, done.tallies)
        noted += done.warnings
        sides.append(done.examples)
    if not sides[0]:
        raise DataError.at(", ".join(config.data.train), "no prompt is left to train on", got="; ".join(lines))
    schedule = PromptSchedule(sides[0], config.rollout_batch_size, config.num_generations, config.seed)
    ptx = load_ptx(config, backbone, template, rows.held_out)
    confirming, told, missing = confirming_half(sides[1]) if config.confirm_held_out else ([], [], [])
    return Prompts(
        schedule,
        sides[1],
        confirming,
        [*lines, *ptx.lines, *shared, *told],
        [*notes, *noted, *ptx.warnings, *leaks, *missing],
        (*rows.manifest, *ptx.manifest),
        rows.rule,
        ptx.rows,
    )


def confirming_half(held_out: Sequence[TokenisedPrompt]) -> tuple[list[bool], list[str], list[str]]:
    """(whether each prompt is set apart, header lines, warnings). None is if that would leave a half without prompts."""
    apart = [confirms(prompt_hash(prompt.row.key)) for prompt in held_out]
    count = sum(apart)
    if 0 < count < len(apart):
        return apart, [f"{len(apart) - count} held-out prompts choose (eval/*), {count} confirm (eval/confirm/*)"], []
    told = f"confirm_held_out: {len(apart)} held-out prompts are too few to set some apart: nothing confirms what they choose"
    return [], [], [told] if apart else []


def sources_of(config: PPOConfig) -> list[tuple[str, str]]:
    """(role, path) of the models that the run starts from or is scored by."""
    sft = [("sft", config.sft)] if config.sft is not None else []
    models = [model for r in config.rewards for model in r.models(f"reward:{r.name}").items()]
    return [("base", config.model_name_or_path), *sft, *models]
