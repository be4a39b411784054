"""8- and 4-bit bases on the CPU: they load, and LoRA trains on them (parity P5; the 4-bit repacking trap)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, ResourceError
from rlhf_ray.models import quantisation
from rlhf_ray.models.adapters import adapter_parameters, read_adapter, use_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.merge import merge_run
from rlhf_ray.models.quantisation import dequantised, quantised_kwargs

from .conftest import IDS, logits

Load = Callable[..., Backbone]
Make = Callable[..., Path]


@contextmanager
def cpu_with_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let bitsandbytes believe that the CPU could use repacked weights, wherever this test runs."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    with monkeypatch.context() as patch:
        patch.setattr(modules, "has_avx512bf16", lambda: True)
        yield


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_an_adapter(
    load: Load, tiny_llama: Make, train: Callable[..., None], monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    pytest.importorskip("bitsandbytes")
    full = logits(load(tiny_llama()).model)
    with cpu_with_avx512_bf16(monkeypatch):
        base = load(tiny_llama(), **{f"load_in_{bits}bit": True})
    assert base.identity.precision == f"{bits}bit"
    model = wrap(base.model, LoraConfig(r=4), "policy", seed=1)
    parameters = adapter_parameters(model, "policy")
    assert len(parameters) == 2 * 7 * 2 and {p.dtype for p in parameters.values()} == {torch.float32}

    model.eval()
    with use_adapter(model, None):
        quantised = logits(model)  # eval mode, no gradients: the pass that would repack 4-bit weights for good
    correlation = torch.corrcoef(torch.stack([full.flatten(), quantised.flatten()]))[0, 1]
    assert 0.9 < correlation < 1 and not torch.equal(full, quantised)

    train(model, "policy")
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    with_gradient = [k for k, p in parameters.items() if p.grad is not None and bool(p.grad.any())]
    assert len(with_gradient) == len(parameters)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_" not in n)


def test_the_heads_are_not_quantised(load: Load, load_reward: Load, tiny_llama: Make) -> None:
    pytest.importorskip("bitsandbytes")
    base = load(tiny_llama(), load_in_4bit=True)
    assert type(base.lm_head) is torch.nn.Linear and base.lm_head.weight.dtype is torch.float32
    assert "4bit" in type(base.model.model.layers[0].mlp.up_proj).__name__  # type: ignore[union-attr,index]


def test_without_bitsandbytes(load: Load, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = metadata.version

    def missing(name: str) -> Any:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ResourceError, match=r"rlhf_ray\[quant\]") as e:
        load(tiny_llama(), load_in_8bit=True)
    assert e.value.exit_code == 3


def test_a_checkpoint_that_is_quantised_merges_whole(
    load: Load, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
) -> None:
    """It trains like a base that is quantised on loading, and merges into its dequantised weights."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "quantised"
    load(tiny_llama(), load_in_4bit=True).model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / file, folder)
    base = load(folder)
    assert base.identity.precision == "4bit"
    save_trained(folder, tmp_path / "adapter")
    merged = load(merge_run(tmp_path / "adapter"))
    assert merged.identity.precision == "float32" and not hasattr(merged.model.config, "quantization_config")
    expected = logits(wrap(base.model, read_adapter(tmp_path / "adapter"), "policy"))
    correlation = torch.corrcoef(torch.stack([expected.flatten().float(), logits(merged.model).flatten()]))[0, 1]
    assert correlation > 0.999


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("no way back"),
        TypeError("dequantize() got an unexpected keyword argument"),
        ImportError("needs the package auto_gptq"),
    ],
    ids=["never", "another signature", "no package"],
)
def test_what_cannot_be_made_whole_is_refused_in_one_line(error: Exception) -> None:
    """Whatever a quantiser raises: packages of other formats are not installed where most people merge."""

    class Quantised(torch.nn.Module):
        config = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))

        def dequantize(self) -> torch.nn.Module:
            raise error

    with pytest.raises(
        ArtifactError, match=r"base: its weights are quantised \(gptq\).*fix: merge into the checkpoint"
    ) as e:
        dequantised(Quantised(), torch.float32, "base")
    assert len(e.value.lines()) == 1


def test_offloaded_layers_go_to_the_own_gpu_and_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device_map: auto` alone would spread the base over every GPU that the process can see, those of other ranks too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index * 10**9, 80 * 10**9))
    given = quantised_kwargs(8, torch.device("cuda", 3), cpu_offload=True)
    assert given["device_map"] == "auto" and given["max_memory"].keys() == {3, "cpu"}
    assert given["max_memory"][3] == 3 * 10**9 and given["max_memory"]["cpu"] > 10**8
    assert quantised_kwargs(4, torch.device("cuda", 3), cpu_offload=False).keys() == {
        "quantization_config",
        "device_map",
    }


def test_a_warning_of_every_layer_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation._once, "_told", set())  # other tests may have had it told
    quantised_kwargs(8, torch.device("cpu"), cpu_offload=False)
    quantised_kwargs(8, torch.device("cpu"), cpu_offload=False)
    log = logging.getLogger("bitsandbytes.autograd._functions")
    caplog.set_level(logging.WARNING, log.name)
    for name, value in (
        ("disabled", False),
        ("propagate", False),
        ("handlers", [caplog.handler]),
    ):  # whatever others have set
        monkeypatch.setattr(log, name, value)
    for dtype in ("float32", "float32", "bfloat16"):
        log.warning("inputs will be cast from %s to float16", dtype)
    log.warning("another matter")
    assert [r.getMessage() for r in caplog.records] == ["inputs will be cast from float32 to float16", "another matter"]
