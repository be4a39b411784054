"""Bases that several runs share: loaded once, adapters by run, equal frozen ones once, and nothing left of a run that is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import LoraConfig, PPOConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapters import (
    adapter_config,
    adapter_tensors,
    add_fresh,
    remove_adapter,
    rest_on_base,
    save_adapter,
    use_adapter,
    wrap,
)
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.shared_base import Place, SharedBase
from rlhf_ray.models.specs import ModelSpec

LORA = LoraConfig(r=2, lora_alpha=4)


@pytest.fixture
def saved(make_backbone: Callable[..., Any], tmp_path: Path) -> ModelSpec:
    """A saved adapter that does something."""
    model = wrap(make_backbone().model, LORA, "policy", seed=3)
    tensors = {k: torch.full_like(t, 0.02) if "lora_B" in k else t for k, t in adapter_tensors(model, "policy").items()}
    save_adapter(tmp_path / "saved", tensors, adapter_config(model, "policy"), "CAUSAL_LM", None, "base")
    return ModelSpec("adapter", str(tmp_path / "saved"))


def models_on(place: Place | None, path: Path, saved: ModelSpec, seed: int = 0) -> tuple[Assembly, RoleModels]:
    job = PPOConfig(output_dir="x", model_name_or_path=str(path), data={"train": "p"}, rewards=[{"function": "f.py:g"}])
    assembly = Assembly(job, torch.device("cpu"), seed, place=place)
    assembly.add_trained_policy(saved, LORA)
    assembly.add_value("policy", "own", None)
    return assembly, assembly.finish()


def test_runs_share_the_base_and_equal_frozen_adapters(tiny_llama: Callable[..., Path], saved: ModelSpec) -> None:
    shared = SharedBase()
    first, second = shared.place("a"), shared.place("b")
    one, models = models_on(first, tiny_llama(), saved)
    first.pause()
    two, others = models_on(second, tiny_llama(), saved)
    assert one.base is two.base and models.stack_of("policy").model is others.stack_of("policy").model
    peft = models.stack_of("policy").peft
    assert list(peft.peft_config) == ["a_policy", "frozen1", "a_value", "b_policy", "b_value"]
    assert models.bindings["reference"].adapter == others.bindings["reference"].adapter == "frozen1"
    assert models.head_of("value") is not others.head_of("value")
    # each is, bit for bit, what it would be on a base of its own
    _, apart = models_on(None, tiny_llama(), saved)
    own = adapter_tensors(apart.stack_of("policy").peft, "policy")
    for name in ("a_policy", "b_policy", "frozen1"):
        assert all(torch.equal(t, own[k]) for k, t in adapter_tensors(peft, name).items())
    # only the run whose turn it is wants gradients
    wants = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert wants and all(".b_policy." in n or ".b_value." in n for n in wants)
    second.pause()
    first.resume()
    wants = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert wants and all(".a_policy." in n or ".a_value." in n for n in wants)
    # what one leaves is gone; what others need stays
    first.leave()
    assert list(peft.peft_config) == ["frozen1", "b_policy", "b_value"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), use_adapter(peft, "b_policy"):
        peft(input_ids=ids)  # although the adapter that the PEFT model was made with is gone
    second.leave()
    assert len(peft.peft_config) == 1
    third = shared.place("c")
    models_on(third, tiny_llama(), saved)
    assert list(peft.peft_config) == ["c_policy", "frozen2", "c_value"]


def test_at_rest_a_shared_model_is_its_base(make_backbone: Callable[..., Any]) -> None:
    backbone, ids = make_backbone(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = backbone.model(input_ids=ids).logits
        model = wrap(backbone.model, LORA, "one", seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(model(input_ids=ids).logits, plain)
        rest_on_base(model)
        add_fresh(model, "two", LoraConfig(r=4, lora_alpha=4, target_modules=("q_proj", "up_proj")), seed=1)
        assert torch.equal(model(input_ids=ids).logits, plain), "an adapter that came later woke one up"
        remove_adapter(model, "one")
        assert torch.equal(model(input_ids=ids).logits, plain)
        with pytest.raises(InvariantError, match="is the only one"):
            remove_adapter(model, "two")
