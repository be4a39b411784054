"""The two real tiny Llamas, with their traps: pad = </s> = eos, stories that end with <s>, a head dimension of 8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.merge import merge_run

from .conftest import logits

pytestmark = pytest.mark.data
Load = Callable[..., Backbone]


@pytest.mark.parametrize(("name", "context", "rows"), [("stories260K", 512, 512), ("babyllama105", 256, 105)])
def test_traps_are_seen_at_load(data_dir: Path, load: Load, name: str, context: int, rows: int) -> None:
    """F12, F27: the pad is not the end token, both tokens that end a text are known, the vocabulary is not resized."""
    base = load(data_dir / "models" / name)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2
    assert base.eos_ids == (2, 1) and base.pad_id not in base.eos_ids and base.pad.token == "<unk>"
    assert base.context_length == context
    assert base.model.get_input_embeddings().num_embeddings == rows == len(base.tokenizer)  # type: ignore[arg-type]
    assert base.tokenizer("Once").input_ids[0] == base.tokenizer.bos_token_id


def test_the_story_teller_tells_stories(data_dir: Path, load: Load) -> None:
    """The weights are the real ones and the forward pass is right: a real text is far likelier than noise."""
    base = load(data_dir / "models" / "stories260K")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = torch.tensor([base.tokenizer(text).input_ids])
    noise = torch.randint(3, 512, ids.shape, generator=torch.Generator().manual_seed(0))

    def loss(tokens: torch.Tensor) -> float:
        scores = logits(base.model, tokens)[0, :-1].log_softmax(-1)
        return float(-scores.gather(1, tokens[0, 1:, None]).mean())

    assert loss(ids) < 1.5 < 6 < loss(noise)


def test_a_trained_adapter_merges_and_tied_embeddings_stay_tied(data_dir: Path, load: Load, tmp_path: Path) -> None:
    folder = data_dir / "models" / "stories260K"
    base = load(folder)
    model = wrap(base.model, LoraConfig(r=8), "policy", seed=1)
    ids = torch.tensor([base.tokenizer("The cat sat on the mat and the dog sat on the log.").input_ids])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    save_adapter(
        tmp_path / "a",
        adapter_tensors(model, "policy"),
        adapter_config(model, "policy"),
        "CAUSAL_LM",
        None,
        str(folder),
    )
    merged = load(merge_run(tmp_path / "a"))
    torch.testing.assert_close(logits(merged.model, ids), logits(model, ids), rtol=1e-4, atol=1e-3)
    embeddings, output = merged.model.get_input_embeddings(), merged.lm_head
    assert output.weight is embeddings.weight and merged.eos_ids == (2, 1)
