"""Random models and requests for the decode engine, and its results worked out the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.sampler.engine import DecodeRequest, DecodeResult

VOCABULARY = 97
CONTEXT = 160


def build_llama(seed: int = 0, **config: Any) -> nn.Module:
    """Head dimension 32, 4 query heads sharing 2 key-value heads, logits far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**values, **config})).eval()


def build_requests(count: int, seed: int = 0, **fields: Any) -> list[DecodeRequest]:
    """Prompts of 1 to 24 tokens, replies of up to 1 to 40, unless `fields` say otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for _ in range(count):
        prompt = tuple(draw(3, VOCABULARY) for _ in range(draw(1, 25)))
        values: dict[str, Any] = {"prompt_ids": prompt, "max_new_tokens": draw(1, 41), "row_seed": draw(0, 2**62)}
        made.append(DecodeRequest(**{"stop_ids": (), **values, **fields}))
    return made


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return build_llama()


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., nn.Module]:
    return build_llama


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., list[DecodeRequest]]:
    return build_requests


@pytest.fixture(scope="session")
def plain_logprobs() -> Callable[..., Tensor]:
    """plain_logprobs(model, request, result) -> f32[tokens, V]: one forward over prompt and reply, no cache, no padding."""

    @torch.no_grad()
    def logprobs(model: nn.Module, request: DecodeRequest, result: DecodeResult) -> Tensor:
        ids = torch.tensor([request.prompt_ids + result.token_ids])
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
        return torch.log_softmax(logits / request.temperature, dim=-1)

    return logprobs


@pytest.fixture(scope="session")
def assert_plain(plain_logprobs: Callable[..., Tensor]) -> Callable[..., None]:
    """assert_plain(model, requests, results, atol): log-probabilities as in a plain forward; greedy tokens are its argmax."""

    def check(model: nn.Module, requests: list[DecodeRequest], results: list[DecodeResult], atol: float = 1e-4) -> None:
        assert len(requests) == len(results) > 0
        for request, result in zip(requests, results):
            every = plain_logprobs(model, request, result)
            tokens = torch.tensor(result.token_ids)
            taken = every.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(result.logprobs), taken, atol=atol, rtol=0)
            if request.greedy:
                assert every.argmax(-1).tolist() == list(result.token_ids)

    return check
