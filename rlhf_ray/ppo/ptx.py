"""The rows of the supervised loss that PPO mixes in (ptx_data): read and tokenised as SFT's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import TokenisedRow, require_batch, tokenise_sft
from rlhf_ray.data.load import load_ptx_rows
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.roles.ptx import rows_of_minibatch


@dataclass(frozen=True)
class PtxData:
    """rows: tokenised, empty without such a loss.  lines, warnings: for the header.  manifest: of the data files."""

    rows: Sequence[TokenisedRow] = ()
    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    manifest: tuple[dict[str, Any], ...] = ()


def load_ptx(config: PPOConfig, backbone: Backbone, template: Template, held_out: Sequence[Row]) -> PtxData:
    """Replies and their end of turn are learnt, in conversations all of the assistant's turns, of bare texts everything. At most as
    long as a prompt and its reply.

    held_out: prompts that the run is evaluated on. Raises DataError if there are fewer rows than an optimizer step takes."""
    if config.ptx_data is None or not config.ptx_coef:
        return PtxData()
    rows = load_ptx_rows(config.ptx_data, held_out)
    done = tokenise_sft(
        rows.train,
        template,
        backbone.tokenizer,
        max_length=min(config.max_length or backbone.context_length, backbone.context_length),
        too_long=config.ptx_data.too_long,
        train_on_inputs=False,
        train_on_turns="all",
        add_eos_token=True,
        on_bad_row=config.ptx_data.on_bad_row,
        special_tokens=config.ptx_data.special_tokens,
    )
    fix = "add rows, or raise num_mini_batches"
    require_batch(len(done.examples), rows_of_minibatch(config), ", ".join(config.ptx_data.train), fix)
    lines = [f"ptx_data: {line}" for line in (*rows.summary, *map(str, done.tallies))]
    warnings = [f"ptx_data: {line}" for line in (*rows.warnings, *done.warnings)]
    return PtxData(done.examples, lines, warnings, rows.manifest)
