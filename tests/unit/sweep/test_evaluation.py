"""What the evaluation in a DPO trial's run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.sections import SamplingConfig
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.splits import confirms, prompt_hash
from rlhf_ray.storage.rows_file import write_rows
from rlhf_ray.storage.run_folder import create_run
from rlhf_ray.sweep.evaluation import EVALUATION, STARTED_FROM, TRAINED, evaluated

ASKED = [f"Question {i}?" for i in range(12)]


def measured(folder: Path, written_out: str = "{}", output: str = "yes", hashed: bool = True, **sampling: Any) -> Path:
    """A trial's run with an evaluation that is done. Reply i of the trained policy has reward i.

    written_out: the template.   sampling: how the replies were decoded, by which each has a `kl` in any case."""
    run = create_run(folder / EVALUATION, "evaluate", {}, "never")
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(ASKED):
        reply = {"output": output, "rewards": {"rule": float(i)}, "kl": 0.1, "length": 3, "finished": True}
        row = {"row": i, "instruction": text, "input": "", "prompt": written_out.format(text)}
        kept = {"hash": f"{prompt_hash(Prompt(text)):016x}"} if hashed else {}
        rows.append({**row, **kept, "replies": {STARTED_FROM: {**reply, "rewards": {"rule": 0.0}}, TRAINED: reply}})
    write_rows(run.path / "results.jsonl", rows)
    how = {**SamplingConfig(**sampling).model_dump(mode="json"), "response_length": 8, "seed": 0}
    run.update_manifest(status="done", decoding={STARTED_FROM: how, TRAINED: how} if sampling else None)
    return folder


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path, character: str) -> None:
    found = evaluated(measured(tmp_path, output=f"one{character}two"))
    assert found is not None and found[1]["eval/rows"] + found[1]["eval/confirm/rows"] == len(ASKED)


@pytest.mark.parametrize("hashed", [True, False], ids=["this version", "an older one"])
def test_the_halves_are_those_of_what_is_asked_whatever_the_template(tmp_path: Path, hashed: bool) -> None:
    plain = evaluated(measured(tmp_path / "plain", hashed=hashed))
    wrapped = evaluated(measured(tmp_path / "wrapped", "<|user|>{}, on 2026-01-31<|assistant|>", hashed=hashed))
    assert plain is not None and plain == wrapped
    choosing = [i for i, text in enumerate(ASKED) if not confirms(prompt_hash(Prompt(text)))]
    assert 0 < len(choosing) < len(ASKED)
    assert plain[1]["eval/reward/rule"] == pytest.approx(sum(choosing) / len(choosing))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"do_sample": False}, {"top_p": 0.9}, {"top_k": 5}])
def test_replies_that_are_not_drawn_from_the_whole_distribution_have_no_kl(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    """What kl_cap, the frontier and the gates of promotion would take for one."""
    found = evaluated(measured(tmp_path, **sampling))
    assert found is not None
    names = {"eval/kl_k1_per_response", "eval/confirm/kl_k1_per_response"}
    whole = not sampling or "temperature" in sampling
    assert all(names & figures.keys() == (names if whole else set()) for figures in found)
