"""The adapter that is published is the adapter that samples: poisoned, stale and swapped adapters are each caught by name.

Peers that tried LoRA with separate generators sampled from the wrong weights without a word (OpenRLHF #1349, verl #7495)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import prompt_batch
from rlhf_ray.errors import ArtifactError, InvariantError
from rlhf_ray.models.adapters import adapter_parameters, adapter_tensors
from rlhf_ray.ppo.actors import build_generator
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.invariants import worst_tensor
from rlhf_ray.roles.loading_generator import LoadingGenerator
from rlhf_ray.storage.files import sha256_tensors


@pytest.fixture
def generator(tiny_llama: Callable[..., Path]) -> LoadingGenerator:
    """As an actor builds it: with an adapter that changes nothing yet."""
    job = PPOConfig(
        output_dir="x",
        model_name_or_path=str(tiny_llama()),
        data={"train": "prompts.jsonl"},
        rewards=[{"model": "r"}],
        lora={"r": 4, "lora_alpha": 8},
        rollout_chunk_size=4,
        placement="split",
    )
    return build_generator(job, num_gpus=0.0)


def adapter(generator: LoadingGenerator, version: int) -> tuple[ActiveAdapter, dict[str, Tensor]]:
    """A published adapter of random weights."""
    noise = torch.Generator().manual_seed(version)
    tensors = {k: torch.randn(t.shape, generator=noise) * 0.3 for k, t in generator.tensors().items()}
    return ActiveAdapter("policy", version, sha256_tensors(tensors)), tensors


def prompts() -> PromptBatch:
    return prompt_batch([[1, 40, 41], [1, 50]], [0, 1], [6, 6], 0)


def sample(generator: LoadingGenerator, named: ActiveAdapter, tensors: dict[str, Tensor]) -> Rollout:
    return generator.generate_with(
        prompts(), named, {k: t.numpy() for k, t in tensors.items()}, Decoding((2,)), "rollout", 1
    )


def test_it_samples_with_the_adapter_named(generator: LoadingGenerator) -> None:
    """As a generator beside the learner does, whatever it held before; and it says so."""
    seen = []
    for version in (1, 2, 1):
        named, tensors = adapter(generator, version)
        rollout = sample(generator, named, tensors)
        assert (rollout.adapter_version, rollout.adapter_sha256) == (version, named.sha256)
        beside = Generator(generator.sampler, 0, 0).generate(prompts(), named, Decoding((2,)), "rollout", 1)
        assert torch.equal(rollout.sample_logprobs, beside.sample_logprobs)
        seen.append(rollout.sample_logprobs)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_an_adapter_it_has_is_not_loaded_again(generator: LoadingGenerator) -> None:
    named, tensors = adapter(generator, 1)
    sample(generator, named, tensors)
    sample(generator, named, {})  # nothing to load from


def test_a_poisoned_adapter(generator: LoadingGenerator) -> None:
    """Fault 21: refused by the name of the tensor, and the generator goes on with a good one."""
    named, tensors = adapter(generator, 1)
    victim = list(tensors)[3]
    tensors[victim][0, 0] = float("nan")
    with pytest.raises(
        InvariantError, match=rf"adapter version 1: {victim} is not finite \(1 of {len(tensors)} tensors\)"
    ):
        sample(generator, named, tensors)
    assert sample(generator, *adapter(generator, 2)).adapter_version == 2


def test_a_swapped_adapter(generator: LoadingGenerator) -> None:
    """Another adapter under the name asked for, or two tensors of one shape in each other's place: both hashes are told."""
    named, tensors = adapter(generator, 1)
    other, others = adapter(generator, 2)
    with pytest.raises(
        InvariantError,
        match=f"not the adapter that was published; expected sha256 {named.sha256}; got sha256 {other.sha256}",
    ):
        sample(generator, named, others)
    first, second = [k for k, t in tensors.items() if t.shape == tensors[next(iter(tensors))].shape][:2]
    tensors[first], tensors[second] = tensors[second], tensors[first]
    with pytest.raises(InvariantError, match=f"expected sha256 {named.sha256}; got sha256 {sha256_tensors(tensors)}"):
        sample(generator, named, tensors)


def test_after_a_refusal_the_old_adapter_is_not_taken_for_loaded(generator: LoadingGenerator) -> None:
    good, tensors = adapter(generator, 1)
    sample(generator, good, tensors)
    with pytest.raises(InvariantError):
        sample(generator, *(adapter(generator, 2)[0], adapter(generator, 3)[1]))
    assert sample(generator, good, tensors).adapter_sha256 == good.sha256


def test_an_adapter_of_another_shape(generator: LoadingGenerator) -> None:
    named, tensors = adapter(generator, 1)
    tensors.popitem()
    with pytest.raises(ArtifactError, match="lacks tensor"):
        sample(generator, named, tensors)


def test_weights_that_change_after_loading_are_echoed(generator: LoadingGenerator) -> None:
    """The rollout tells what the model holds, not what was asked for."""
    named, tensors = adapter(generator, 1)
    sample(generator, named, tensors)
    with torch.no_grad():
        next(iter(adapter_parameters(generator.adapter.model, "policy").values())).mul_(1.5)
    rollout = sample(generator, named, tensors)
    assert rollout.adapter_sha256 == sha256_tensors(adapter_tensors(generator.adapter.model, "policy")) != named.sha256


def test_the_tensor_that_differs_most_is_named() -> None:
    ours = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(2)}
    assert worst_tensor(ours, {k: t.clone() for k, t in ours.items()}) is None
    worst = worst_tensor({"a": torch.full((3,), 0.1), "b": torch.tensor([1.0, 3.0]), "c": torch.ones(2)}, ours)
    assert worst is not None and (worst.name, worst.gap) == ("b", 2.0) and worst.theirs != worst.ours
    for theirs in ({"a": torch.zeros(3), "b": torch.ones(2)}, {**ours, "c": torch.tensor([1.0, float("nan")])}):
        missing = worst_tensor(theirs, ours)
        assert missing is not None and (missing.name, missing.gap) == ("c", float("inf"))
