"""What a learner rank does with rollouts of an adapter that is not the one it published, and how it names the wrong tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.errors import InvariantError
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.files import sha256_tensors

pytestmark = pytest.mark.integration
OURS = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
PUBLISHED = PublishedAdapter(3, sha256_tensors(OURS), OURS)


class Liar:
    """A generator that answers with the adapter it likes: version 2 for prompts of two tokens, else another hash."""

    def generate_with(self, prompts: Any, adapter: ActiveAdapter, tensors: Any, *_: Any) -> Rollout:
        b, p = prompts.prompt_ids.shape
        honest = Rollout(
            tokens=torch.cat([prompts.prompt_ids, torch.full((b, 1), 7)], dim=1),
            prompt_mask=prompts.prompt_mask,
            response_mask=torch.ones(b, 1, dtype=torch.bool),
            sample_logprobs=torch.zeros(b, 1),
            finished=torch.zeros(b, dtype=torch.bool),
            row_id=prompts.row_id,
            adapter_version=adapter.version,
            adapter_sha256=adapter.sha256,
        )
        if p == 1:
            return honest
        return replace(honest, adapter_version=2) if p == 2 else replace(honest, adapter_sha256="f" * 64)

    def tensors(self) -> dict[str, Tensor]:
        return {"a": torch.zeros(3), "b": torch.tensor([[1.0, 1.0], [1.0, 1.5]])}


class Judge:
    def score_at(self, rollout: Rollout, rows: Sequence[Row], temperature: float) -> Scores:
        n = len(rollout)
        return Scores(reward=torch.ones(n), ref_logprobs=torch.zeros(n, 1), row_id=rollout.row_id)


@pytest.fixture
def collector(two_gpus: Any) -> Iterator[Any]:
    from ray.util.placement_group import placement_group, remove_placement_group

    from rlhf_ray.roles.actor_collector import ActorCollector, RemoteRoles
    from rlhf_ray.roles.actor_pool import ActorSpec, start, stop

    two_gpus.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    group = placement_group([{"CPU": 0.1}] * 2)
    assert group.wait(20)
    specs = [
        ActorSpec(r, c, {"CPU": 0.1}, 1, [i], 60.0) for i, (r, c) in enumerate([("generator", Liar), ("scorer", Judge)])
    ]
    actor_handles = start(specs, group, False, "rlhf-ray resume X")
    session = Session(0, 1, torch.device("cpu"), 1, NullConsole(), actor_handles)
    yield ActorCollector(RemoteRoles(actor_handles, session), session, chunk_size=2, pad_id=0)
    stop(actor_handles)
    remove_placement_group(group)


def collect(collector: Any, adapter: ActiveAdapter, width: int, rows: int = 4) -> Any:
    prompts = [TokenisedPrompt((5,) * width, Row("f:1", Prompt("x"))) for _ in range(rows)]
    return collector.collect(prompts, [1] * rows, adapter, Decoding((2,)), "rollout", 9)


def test_a_chunk_costs_the_same_however_many_there_are(collector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in references that Ray is asked about: those to what each actor has to do first. They were those of all chunks, for
    each chunk: in a step of 65,536 replies two million, and as many calls."""
    import ray

    looked: list[int] = []
    wait = ray.wait

    def counted(refs: Any, **how: Any) -> Any:
        found = wait(refs, **how)
        if found[0]:  # a look that finds nothing, every half second, is the waiting itself
            looked.append(len(refs))
        return found

    monkeypatch.setattr(ray, "wait", counted)
    collector.remote_roles.publish(PUBLISHED)
    named = ActiveAdapter("policy", 3, PUBLISHED.sha256)
    for chunks in (10, 40):
        looked.clear()
        found = collect(collector, named, 1, 2 * chunks)
        assert found.rollout.row_id.tolist() == list(range(2 * chunks))
        assert max(looked) <= 2, "one generator, one scorer"
        assert sum(looked) <= 2 * 4 * chunks, "two looks, of two references each, at either half of a chunk"


def test_wrong_adapters_are_caught_by_name(collector: Any) -> None:
    named = ActiveAdapter("policy", 3, PUBLISHED.sha256)
    with pytest.raises(InvariantError, match="step 9: an adapter was requested that was not handed over"):
        collect(collector, named, 1)
    assert collector.remote_roles.publish(PUBLISHED) == 7 * 4, "bytes of the adapter, and of nothing else"
    assert collect(collector, named, 1).rollout.row_id.tolist() == [0, 1, 2, 3]
    with pytest.raises(InvariantError, match=r"step 9: replies were sampled by another adapter \(version 2, not 3\)"):
        collect(collector, named, 2)
    both = rf"expected sha256 {PUBLISHED.sha256}; got sha256 {'f' * 64}"
    with pytest.raises(InvariantError, match=both):
        collect(collector, named, 3)

    # sampler and learner disagree although the hashes were right: the tensor is named
    plain = InvariantError.at("step 9", "sampler and learner disagree", "at most 0.001", "0.3", "look")
    told = str(collector.explain(plain, PUBLISHED))
    assert told.startswith(
        "step 9: sampler and learner disagree; expected at most 0.001; got 0.3; fix: generator 0 differs most in b (by 0.5;"
    )
