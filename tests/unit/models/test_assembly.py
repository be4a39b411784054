"""The models of a job put together: how many bases are in memory, and whose weights each role reads (F17, F38)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.config import DPOConfig, EvaluateConfig, LoraConfig, PPOConfig, SFTConfig
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import BIAS_KEY, HEAD_KEY
from rlhf_ray.models.assembly import Assembly, load_options
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.merge import merge_run
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.specs import policy_source, reward_source
from rlhf_ray.supervised.start import copy_of

from .conftest import IDS

Make = Callable[..., Path]
Save = Callable[..., str]
ROLES = ("policy", "reference", "value", "reward")
LORA = LoraConfig(r=4, lora_alpha=8.0)


def start(base: Path) -> Assembly:
    job = PPOConfig(
        output_dir="run",
        model_name_or_path=str(base),
        data={"train": "rows.jsonl"},  # type: ignore[arg-type]
        rewards=[{"function": "f.py:score"}],  # type: ignore[arg-type]
    )
    return Assembly(job, torch.device("cpu"), seed=0)


@pytest.fixture
def one_base(tiny_llama: Make, save_trained: Save, tmp_path: Path) -> Assembly:
    """Policy and reference from an SFT adapter, a reward adapter, and the value model from the reward: all on one base."""
    base = tiny_llama()
    save_trained(base, tmp_path / "sft", lora_dropout=0.5)
    save_trained(base, tmp_path / "reward", head=torch.linspace(-1, 1, 64)[None], seed=9)
    assembly = start(base)
    assembly.add_trained_policy(policy_source(str(tmp_path / "sft")), LORA)
    assembly.add_reward("reward", reward_source(str(tmp_path / "reward")))
    assembly.add_value("reward", "own", None)
    return assembly


def sequences() -> Sequences:
    mask = torch.ones_like(IDS, dtype=torch.bool)
    return Sequences(IDS, mask, mask[:, 2:])


def logprobs(models: RoleModels, role: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = models("logprobs", role, sequences(), 1.0)[0]
    return found


def base_weights(models: RoleModels) -> dict[str, Tensor]:
    return {n: p for n, p in models.named_parameters() if ".lora_" not in n and ".heads." not in n}


def test_four_roles_read_one_copy_of_the_base(one_base: Assembly, load: Callable[..., Any], tiny_llama: Make) -> None:
    """F17: the ancestor held four full copies. By pointer: every role's trunk is the same storage, and there is no second one."""
    models = one_base.finish()
    read = {role: trunk(models.stack_of(role).backbone.model) for role in ROLES}
    assert len(set(map(id, read.values()))) == 1
    held = {p.data_ptr() for p in base_weights(models).values()}
    assert {p.data_ptr() for n, p in read["policy"].named_parameters() if ".lora_" not in n} <= held
    plain = sum(p.numel() for p in load(tiny_llama()).model.parameters())
    assert sum(p.numel() for p in base_weights(models).values()) == plain
    assert len(held) == len(base_weights(models))
    assert "1 loaded (all roles are adapters on it)" in one_base.describe()[-1]


def test_the_roles_differ_where_they_should_and_only_there(one_base: Assembly) -> None:
    """F38: before any update the policy is its reference, to the bit, and neither is the base. F5: no dropout in either."""
    models = one_base.finish()
    models.train()
    assert torch.equal(logprobs(models, "policy"), logprobs(models, "reference"))
    stage = models.bindings["reward"]
    models.bindings["base"] = type(stage)(stage.stack, None)
    assert (logprobs(models, "policy") - logprobs(models, "base")).abs().max() > 1e-2
    assert not models("values", sequences())[0].any()  # the value model's head starts at zero
    assert models("rewards", "reward", sequences()).std() > 0
    trained = {n for n, p in models.named_parameters() if p.requires_grad}
    assert trained and all(".policy." in n or ".value." in n or ".heads.value." in n for n in trained)


def test_without_an_sft_adapter_the_reference_is_the_base(tiny_llama: Make, load: Callable[..., Any]) -> None:
    """F38, the other mode: a fresh policy has B = 0, and adapters off is what it starts as."""
    assembly = start(tiny_llama())
    assembly.add_trained_policy(None, LORA)
    models = assembly.finish()
    assert torch.equal(logprobs(models, "policy"), logprobs(models, "reference"))
    plain = load(tiny_llama()).model
    with torch.no_grad():
        expected = plain(IDS).logits.log_softmax(-1)[:, 1:-1].gather(-1, IDS[:, 2:, None])[..., 0]
    torch.testing.assert_close(logprobs(models, "reference"), expected, rtol=1e-5, atol=1e-5)


def test_a_reward_model_is_no_policy(tiny_llama: Make, save_trained: Save, tmp_path: Path) -> None:
    """Its head was left out without a word, in PPO where it was given as `sft`, and in DPO and SFT; the reward stage tells it."""
    save_trained(tiny_llama(), tmp_path / "reward", head=torch.linspace(-1, 1, 64)[None])
    source, assembly = policy_source(str(tmp_path / "reward")), start(tiny_llama())
    for add in (lambda: assembly.add_trained_policy(source, LORA), lambda: assembly.add_policy("reference", source)):
        with pytest.raises(ArtifactError, match="is a reward model; expected a policy"):
            add()
    told: list[str] = []
    session = SimpleNamespace(is_main=True, console=SimpleNamespace(warn=told.append))
    how: Any = (str(tmp_path / "reward"), assembly.base, load_template("none"), "copied", session)
    with pytest.raises(ArtifactError, match="is a reward model; expected a policy"):
        copy_of(*how)
    assert copy_of(*how, for_reward=True).parents and "its adapter is copied, its head is not" in told[0]


def test_a_reward_adapter_of_two_labels_with_biases(tiny_llama: Make, save_trained: Save, tmp_path: Path) -> None:
    """By others: a score is the difference of both logits, and the run says so. Biases of 0.5 and 2: 1.5 above that of weights."""
    base, head, found = tiny_llama(), torch.linspace(-1, 1, 64)[None], []
    save_trained(base, tmp_path / "reward", head=head)
    file = tmp_path / "reward" / "adapter_model.safetensors"
    for _ in range(2):
        assembly = start(base)
        assembly.add_reward("reward", reward_source(str(tmp_path / "reward")))
        found.append(assembly.finish()("rewards", "reward", sequences()))
        two = {HEAD_KEY: torch.cat([head, 2 * head]), BIAS_KEY: torch.tensor([0.5, 2.0])}
        save_file({**load_file(file), **two}, file)
    torch.testing.assert_close(found[1], found[0] + 1.5)
    assert ["two labels" in note for note in assembly.base.notes] == [True]


@pytest.mark.parametrize(("kind", "trains"), [(SFTConfig, True), (DPOConfig, True), (EvaluateConfig, False)])
def test_what_trains_says_so_to_the_loader(kind: Any, trains: bool) -> None:
    """DPO did not, and so trained in float16, which is refused."""
    job = kind.model_construct(**dict.fromkeys(("model_name_or_path", "dtype", "attn_implementation")))
    assert load_options(job, torch.device("cpu"))["trains"] is trains


def test_a_merged_reward_model_is_a_second_base_loaded_once(
    tiny_llama: Make, save_trained: Save, tmp_path: Path
) -> None:
    save_trained(tiny_llama(), tmp_path / "reward", head=torch.linspace(-1, 1, 64)[None])
    merged = str(merge_run(tmp_path / "reward"))
    assembly = start(tiny_llama())
    assembly.add_trained_policy(None, LORA)
    for name in ("one", "two"):
        assembly.add_reward(name, reward_source(merged))
    assembly.add_value("one", "own", LORA)
    models = assembly.finish()
    assert len(models.stacks) == 2 and models.bindings["one"].stack == models.bindings["two"].stack
    assert models.bindings["value"].stack == models.bindings["one"].stack != models.bindings["policy"].stack


def test_a_whole_checkpoint_is_no_sft_adapter(tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match="is a whole checkpoint, not an adapter"):
        start(tiny_llama()).add_trained_policy(policy_source(str(tiny_llama(seed=3))), LORA)
