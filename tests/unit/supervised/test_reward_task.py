"""The pairwise objective on hand-made pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import RewardConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import TokenisedPair
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.runtime.session import process_session
from rlhf_ray.supervised.reward import RewardTask, initial_head

PAIRS = [
    TokenisedPair([1, 40, 50, 51, 2], [1, 40, 60, 2], 2, "a"),
    TokenisedPair([1, 41, 52, 2], [1, 41, 61, 62, 63, 2], 2, "b"),
    TokenisedPair([1, 42, 53, 54, 2], [1, 42, 64, 65, 2], 2, "c"),
]


@pytest.fixture
def task(tmp_path: Path, make_backbone: Callable[..., Backbone]) -> RewardTask:
    config = RewardConfig(
        output_dir=str(tmp_path / "run"),
        model_name_or_path="unused",
        data={"train": "unused.jsonl"},  # type: ignore[arg-type]
        init_from="base",
        learner={"num_workers": 0},  # type: ignore[arg-type]
        per_device_eval_batch_size=2,
    )
    session = process_session(NullConsole(), num_threads=1)
    return RewardTask(config, make_backbone(), load_template("none"), session)


def alone(task: RewardTask, ids: list[int]) -> float:
    with torch.no_grad():
        return float(task.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0])


def test_the_loss_is_bradley_terry_over_real_pairs(task: RewardTask) -> None:
    """-log sigmoid(chosen - rejected), summed; a filler pair adds nothing to loss, count or log."""
    batch = task.collate([(PAIRS[0], True), (PAIRS[1], True), (PAIRS[2], False)])
    loss, sums = task.loss_sum(task.model, batch)
    margins = [alone(task, p.chosen_ids) - alone(task, p.rejected_ids) for p in PAIRS[:2]]
    expected = -sum(float(torch.nn.functional.logsigmoid(torch.tensor(m))) for m in margins)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert task.count(batch) == 2
    logged = task.log({name: float(value) for name, value in sums.items()}, 2.0)
    assert logged["margin"] == pytest.approx(sum(margins) / 2, rel=1e-3)
    assert logged["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 2)


def test_one_step_downhill_widens_the_margins(task: RewardTask) -> None:
    batch = task.collate([(p, True) for p in PAIRS])
    before, sums = task.loss_sum(task.model, batch)
    before.backward()
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    after, then = task.loss_sum(task.model, batch)
    assert float(after.detach()) < float(before.detach()) and then["margin"] > sums["margin"]


def test_scores_come_back_in_row_order_with_reply_lengths(task: RewardTask) -> None:
    session = process_session(NullConsole(), num_threads=1)
    with torch.no_grad():
        scored = task.score_pairs(PAIRS, session)
    expected = [[alone(task, p.chosen_ids), alone(task, p.rejected_ids)] for p in PAIRS]
    torch.testing.assert_close(scored.scores, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert scored.lengths.tolist() == [[3, 2], [2, 4], [3, 3]]


def test_gradient_reaches_the_adapter_from_the_first_step(task: RewardTask) -> None:
    """From a head of zeros it would not, and training would lose its first steps."""
    task.loss_sum(task.model, task.collate([(p, True) for p in PAIRS]))[0].backward()
    grads = [p.grad for n, p in task.model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and bool(g.any()) for g in grads)


def test_the_head_is_drawn_by_the_seed_with_unit_scores_in_mind() -> None:
    head = initial_head(4096, seed=3)
    assert head.shape == (1, 4096) and torch.equal(head, initial_head(4096, 3))
    assert not torch.equal(head, initial_head(4096, 4))
    assert float(head.std()) == pytest.approx(4097**-0.5, rel=0.05)
