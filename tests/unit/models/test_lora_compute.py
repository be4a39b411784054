"""`lora_compute_dtype: bfloat16`: adapters are multiplied as torch.autocast multiplies them, in learner and sampler, and learn in
float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import adapter_parameters, adapter_tensors, add_fresh, copy_adapter, use_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler import stacked_lora
from rlhf_ray.sampler.stacked_lora import Stacks

from .conftest import IDS, logits

Load = Callable[..., Backbone]
LORA = LoraConfig(r=4, lora_alpha=12.0)


@pytest.fixture
def models(load: Load, tiny_llama: Callable[..., Path], train: Callable[..., None]) -> dict[str, Any]:
    """The same base in bfloat16 under the same adapter, by the precision of its products."""
    found = {}
    for precision in ("float32", "bfloat16"):
        base = load(tiny_llama(), dtype="bfloat16", lora_compute_dtype=precision)
        found[precision] = wrap(base.model, LORA, "policy", seed=1).eval()
        train(found[precision], "policy", std=0.1)
    return found


def layer(model: Any) -> Any:
    return model.get_base_model().model.layers[0].mlp.up_proj


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in adapter_parameters(model, "policy").items() if p.grad is not None}


def test_a_product_is_that_of_rounded_weights(models: dict[str, Any]) -> None:
    up = layer(models["bfloat16"])
    a, b = (half["policy"].weight for half in (up.lora_A, up.lora_B))
    x = torch.randn(3, 5, a.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    added = (x @ a.bfloat16().t()) @ b.bfloat16().t() * (12.0 / 4)
    assert a.dtype is torch.float32
    torch.testing.assert_close(up(x), up.base_layer(x) + added, atol=0, rtol=0)


def test_it_is_what_autocast_does(models: dict[str, Any]) -> None:
    """Of PEFT's own layer. Gradients are float32, and equal."""
    plain, rounded = layer(models["float32"]), layer(models["bfloat16"])
    x = torch.randn(2, 7, plain.in_features, generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    found = rounded(x)
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not torch.equal(found, plain(x)), "in float32 it is another number"
    for out in (expected, found):
        (out.float() ** 2).sum().backward()
    for half in ("lora_A", "lora_B"):
        theirs, ours = (getattr(one, half)["policy"].weight.grad for one in (plain, rounded))
        assert ours.dtype is torch.float32 and ours.any()
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_the_update_learns_the_same_and_keeps_less(models: dict[str, Any]) -> None:
    kept: dict[str, int] = {}
    found = {}
    for name, model in models.items():
        bytes_of: dict[int, int] = {}

        def keep(tensor: Tensor, bytes_of: dict[int, int] = bytes_of) -> Tensor:
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found[name] = loss_and_gradients(model)
        kept[name] = sum(bytes_of.values())
    assert kept["bfloat16"] < kept["float32"]
    (loss, gradients), (other, others) = found["float32"], found["bfloat16"]
    assert abs(loss.item() - other.item()) < 0.01
    a, b = (torch.cat([g.flatten() for g in one.values()]) for one in (gradients, others))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99


def test_adapters_that_come_later_follow_too(models: dict[str, Any]) -> None:
    model = models["bfloat16"]
    copy_adapter(model, "policy", "reference", trainable=False)
    add_fresh(model, "value", LORA, seed=2)
    with torch.no_grad():
        with use_adapter(model, "reference"):
            copied = logits(model)
        with use_adapter(model, "policy"):
            assert torch.equal(copied, logits(model))
    assert {t.dtype for t in adapter_tensors(model, "reference").values()} == {torch.float32}
    for name in ("reference", "value"):
        assert type(layer(model).lora_A[name]) is type(layer(model).lora_A["policy"]) is not nn.Linear


@pytest.mark.parametrize("form", [stacked_lora._SharedFactors, stacked_lora._RowFactors])
def test_the_sampler_multiplies_alike(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, form: type) -> None:
    """Its factors are rounded as the learner's are: what is left between them is the order of bfloat16 sums."""
    monkeypatch.setattr(stacked_lora, "form_of", lambda *args: form)
    stacks, said = {}, {}
    with torch.no_grad():
        for name, model in models.items():
            stacks[name] = Stacks(model)
            said[name] = stacks[name].forward(["policy", "policy"])(input_ids=IDS).logits
        apart = {name: logits(model) for name, model in models.items()}
        with use_adapter(models["bfloat16"], None):
            effect = (apart["bfloat16"] - logits(models["bfloat16"])).abs().mean()
    for name in models:
        gap = (said[name] - apart[name]).abs().mean()
        assert gap < 0.03 * effect
        assert {t.dtype for t in stacks[name]._get("policy")._tensors()} == {getattr(torch, name)}


def test_a_base_in_another_precision_is_refused(load: Load, tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"lora_compute_dtype: bfloat16 follows the base") as refused:
        load(tiny_llama(), lora_compute_dtype="bfloat16")
    assert "got a base in float32" in str(refused.value) and "set dtype=bfloat16" in str(refused.value)
