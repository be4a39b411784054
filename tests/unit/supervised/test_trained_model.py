"""The loss of SFT and the score of a reward model, against transformers' own figures and under every kind of padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_ray.batches import Sequences
from rlhf_ray.config import LoraConfig
from rlhf_ray.data.collate import IGNORE_INDEX, pad_left, pad_right
from rlhf_ray.models.adapters import adapter_parameters, wrap
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.forward import after_last_token, response_states
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.packing import packing_of
from rlhf_ray.supervised import trained_model
from rlhf_ray.supervised.trained_model import LanguageModel, PreferenceModel, RewardModel, token_loss_sum

ROWS = [[1, 40, 41, 42, 2], [1, 50, 51, 52, 53, 54, 55, 2], [1, 60, 2]]
PROMPTS = [2, 4, 1]


def with_adapter(backbone: Backbone) -> LanguageModel:
    model = LanguageModel(backbone, wrap(backbone.model, LoraConfig(r=4), "sft", seed=0))
    randomise(model)
    return model


def reward_model(backbone: Backbone) -> RewardModel:
    head = ScalarHead(
        backbone.hidden_size, torch.randn(1, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    )
    model = RewardModel(backbone, wrap(backbone.model, LoraConfig(r=4), "reward", seed=0), head)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    """B is 0 in a fresh adapter; give it weight, so that the adapter matters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def sft_batch(pad: int = 0, extra: int = 0) -> dict[str, Tensor]:
    ids, mask = pad_right(ROWS, pad)
    labels = ids.clone()
    labels[~mask] = IGNORE_INDEX
    for i, n in enumerate(PROMPTS):
        labels[i, :n] = IGNORE_INDEX
    if extra:
        ids, labels = F.pad(ids, (0, extra), value=pad), F.pad(labels, (0, extra), value=IGNORE_INDEX)
        mask = F.pad(mask, (0, extra), value=False)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def test_the_loss_is_transformers_loss_summed_over_tokens(make_backbone: Callable[..., Backbone]) -> None:
    model = with_adapter(make_backbone())
    batch = sft_batch()
    tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    theirs = model.peft_model(**batch).loss
    assert float(model(**batch).detach()) == pytest.approx(float(theirs.detach()) * tokens, rel=1e-5)


def test_pad_columns_and_the_pad_id_change_nothing(make_backbone: Callable[..., Backbone]) -> None:
    """Seeds F12, F24."""
    model = with_adapter(make_backbone())
    plain = float(model(**sft_batch()).detach())
    assert float(model(**sft_batch(extra=5))) == pytest.approx(plain, rel=1e-6)
    assert float(model(**sft_batch(pad=77, extra=5))) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_packed_rows_and_the_masked_rows_of_older_runs_have_the_same_loss_and_gradient(
    make_backbone: Callable[..., Backbone], kernel: str
) -> None:
    """Rows of unequal lengths, one of a single token. A row's last token does not predict the next row's first."""
    model = with_adapter(make_backbone())
    model.backbone.model.set_attn_implementation(kernel)
    batch = sft_batch(extra=3)
    batch = {name: torch.cat([rows, rows[:1]]) for name, rows in batch.items()}
    batch["attention_mask"][-1, 1:], batch["labels"][-1] = 0, IGNORE_INDEX
    batch["labels"][:-1, 0] = batch["input_ids"][:-1, 0]  # learnt in no layout: nothing comes before it
    parameters = list(adapter_parameters(model.peft_model, "sft").values())

    def learnt() -> tuple[float, list[Tensor]]:
        loss = model(**batch)
        return float(loss.detach()), list(torch.autograd.grad(loss, parameters))

    expected, gradients = learnt()
    largest = max(float(g.abs().max()) for g in gradients)
    assert largest > 1e-3
    apart = packing_of(trunk(model.peft_model), kernel)
    assert (apart is None) == (kernel == "eager")
    ways = ((True, True, None), (False, False, None), (True, True, apart))
    for model.packing, model.contiguous, model.backbone.packing in ways:
        loss, others = learnt()
        assert loss == pytest.approx(expected, rel=1e-6)
        for other, gradient in zip(others, gradients):
            torch.testing.assert_close(other, gradient, atol=1e-6 * largest, rtol=1e-5)


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_packed_pairs_have_the_scores_logprobs_and_gradients_of_rows_side_by_side(
    make_backbone: Callable[..., Backbone], skips: bool, left: bool
) -> None:
    """Reward models and DPO, on rows that a backbone with `packing` reads as one."""
    ids, mask = pad_left(ROWS, 0) if left else pad_right(ROWS, 0)
    score = reward_model(make_backbone())
    score.backbone.model.set_attn_implementation("sdpa")
    policy = PreferenceModel(score.backbone, score.peft_model, None)
    starts = torch.tensor(PROMPTS)[:, None] + (ids.shape[1] - mask.sum(1, keepdim=True) if left else 0)
    replies = (torch.arange(ids.shape[1])[None] >= starts) & mask
    parameters = list(adapter_parameters(score.peft_model, "reward").values())

    def found() -> list[list[Tensor]]:
        values = [score(ids, mask.long()), policy(ids, mask.long(), replies)]
        weights = torch.tensor([1.0, -0.5, 2.0])
        return [[v.detach(), *torch.autograd.grad((v * weights).sum(), parameters)] for v in values]

    expected = found()
    calls = seen_tokens(score)
    score.backbone.packing = packing_of(trunk(score.peft_model), "sdpa", skips)
    calls.clear()
    packed = found()
    assert calls == [(1, 16), (1, 16)], "16 real tokens, of 3 x 8"
    for others, values in zip(packed, expected):
        for other, value in zip(others, values):
            torch.testing.assert_close(other, value, atol=5e-6 * max(float(value.abs().max()), 1.0), rtol=1e-5)


def seen_tokens(model: RewardModel) -> list[tuple[int, ...]]:
    """Grows by the shape of the ids of every forward of the trunk."""
    seen: list[tuple[int, ...]] = []
    trunk(model.peft_model).get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args: seen.append(tuple(args[0].shape))
    )
    return seen


def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary(make_backbone: Callable[..., Backbone]) -> None:
    model = with_adapter(make_backbone())
    batch = sft_batch()
    logp = model.peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    expected = 0.0
    for i, n in enumerate(PROMPTS):
        for t in range(n, len(ROWS[i])):
            row = logp[i, t - 1]
            expected += float(-0.9 * row[ROWS[i][t]] - 0.1 * row.mean())
    assert float(model(**batch, label_smoothing=0.1)) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_a_label_has_loss_and_gradient_zero(make_backbone: Callable[..., Backbone]) -> None:
    """Seeds F30."""
    model = with_adapter(make_backbone())
    batch = sft_batch()
    batch["labels"][:] = IGNORE_INDEX
    loss = model(**batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    for parameter in adapter_parameters(model.peft_model, "sft").values():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_chunks_change_neither_loss_nor_gradient(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 11, bias=False)
    hidden = torch.randn(7, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), hidden)
    monkeypatch.setattr(trained_model, "LOGITS_AT_ONCE", 11 * at_once)
    loss = token_loss_sum(hidden, head, targets)
    (found,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_score_ignores_padding_side_and_amount_batch_order_and_inner_eos(
    family: str, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F11: pooling that trusts left padding, or the first pad or eos id; positions that count padding."""
    model = reward_model(make_backbone(family))
    rows = [[1, 40, 2, 41, 42], [1, 50, 51], [1, 60, 61, 62, 2, 2]]  # eos inside and at the end
    alone = torch.stack([model(torch.tensor([row]), torch.ones(1, len(row)))[0] for row in rows])
    assert alone.std() > 1e-3
    for pad in (0, 2):
        for padded in (pad_left(rows, pad), pad_right(rows, pad), pad_right([*rows, [1] * 11], pad)):
            scores = model(*padded)[: len(rows)]
            torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
        backwards = model(*pad_right(rows[::-1], pad))
        torch.testing.assert_close(backwards.flip(0), alone, atol=1e-5, rtol=1e-5)


def test_the_score_sees_the_eos(make_backbone: Callable[..., Backbone]) -> None:
    """Seeds F10: a finished and a cut reply must not look alike."""
    model = reward_model(make_backbone())
    scores = model(*pad_right([[1, 40, 41], [1, 40, 41, 2]], 0))
    assert abs(float(scores[0] - scores[1])) > 1e-4


def test_ppo_reads_the_same_score_from_a_left_padded_rollout(make_backbone: Callable[..., Backbone]) -> None:
    model = reward_model(make_backbone())
    prompts, responses = [[1, 40], [1, 50, 51, 52]], [[60, 61, 62, 2], [70]]
    trained = model(*pad_right([p + r for p, r in zip(prompts, responses)], 0))
    (prompt_ids, prompt_mask), (response_ids, reply_mask) = pad_left(prompts, 0), pad_right(responses, 0)
    seq = Sequences.trim(torch.cat([prompt_ids, response_ids], 1), prompt_mask, reply_mask)
    every = model.head(response_states(trunk(model.peft_model), seq))
    torch.testing.assert_close(after_last_token(every, seq), trained, atol=1e-5, rtol=1e-5)
