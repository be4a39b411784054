"""Named adapters on one base (F5, F16-F19, F25, F38; faults 35, 36, 49, 50)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, ConfigError, InvariantError
from rlhf_ray.models.adapters import (
    HEAD_KEY,
    AdapterFiles,
    adapter_config,
    adapter_parameters,
    adapter_sha256,
    adapter_tensors,
    add_fresh,
    add_from_files,
    copy_adapter,
    gradient_checkpointing,
    load_adapter_tensors,
    read_adapter,
    resolve_targets,
    save_adapter,
    set_trainable,
    use_adapter,
    wrap,
)
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.heads import ScalarHead

from .conftest import IDS, hidden, logits

Load = Callable[..., Backbone]
Make = Callable[..., Path]
LORA = LoraConfig(r=4, lora_alpha=8.0)


@pytest.fixture
def llama(load: Load, tiny_llama: Make) -> nn.Module:
    return load(tiny_llama()).model


@pytest.fixture
def two(llama: nn.Module, train: Callable[..., None]) -> PeftModel:
    """A policy and a value adapter, both trained and training, and a frozen reference."""
    model = wrap(llama, LORA, "policy", seed=1)
    add_fresh(model, "value", LORA, seed=2)
    add_fresh(model, "reference", LoraConfig(r=2, target_modules=("q_proj",)), seed=3, trainable=False)
    for seed, name in enumerate(("policy", "value", "reference")):
        train(model, name, seed)
    return model


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


class TestFresh:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_fresh_adapter_is_the_base_bit_for_bit(self, load: Load, tiny_llama: Make, dtype: str) -> None:
        """F19: B = 0. F16: A and B are float32 on any base."""
        model = load(tiny_llama(), dtype=dtype).model
        before = logits(model)
        wrapped = wrap(model, LORA, "policy", seed=1)
        assert torch.equal(logits(wrapped), before)
        parameters = adapter_parameters(wrapped, "policy")
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(bool(p.any()) == k.endswith("lora_A.weight") for k, p in parameters.items())
        add_fresh(wrapped, "value", LORA, seed=2)
        assert {p.dtype for p in adapter_parameters(wrapped, "value").values()} == {torch.float32}

    def test_exactly_the_adapter_trains(self, llama: nn.Module) -> None:
        """F19: trainable names, not substrings."""
        model = wrap(llama, LORA, "policy", seed=1)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        sites = [
            f"base_model.model.model.layers.{i}.{m}"
            for i in range(2)
            for m in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        ]
        assert trainable == {f"{s}.lora_{half}.policy.weight" for s in sites for half in "AB"}
        assert list(adapter_parameters(model, "policy")) == [f"{s}.lora_{h}.weight" for s in sites for h in "AB"]

    def test_equal_seeds_build_equal_adapters_whatever_was_drawn_before(self, load: Load, tiny_llama: Make) -> None:
        """F19: two builds have equal hashes, and building draws nothing from the global generator."""
        found = []
        for noise in (0, 5):
            model = load(tiny_llama()).model
            torch.manual_seed(noise)
            expected_next = torch.rand(1, generator=torch.Generator().manual_seed(noise))
            wrapped = wrap(model, LORA, "policy", seed=11)
            assert torch.equal(torch.rand(1), expected_next)
            found.append(adapter_sha256(adapter_tensors(wrapped, "policy")))
        other = wrap(load(tiny_llama()).model, LORA, "policy", seed=12)
        assert found[0] == found[1] != adapter_sha256(adapter_tensors(other, "policy"))

    def test_dropout_zero_stays_zero_and_dropout_is_kept(self, llama: nn.Module) -> None:
        """F5: `or` defaulting turned dropout 0 into 0.1."""
        model = wrap(llama, LORA, "policy", seed=1)
        add_fresh(model, "sft", LoraConfig(r=2, lora_dropout=0.25), seed=1)
        assert adapter_config(model, "policy")["lora_dropout"] == 0.0
        assert adapter_config(model, "sft")["lora_dropout"] == 0.25
        model.train()
        assert torch.equal(logits(model), logits(model))

    def test_the_scale_is_the_paper_s(self, llama: nn.Module, train: Callable[..., None]) -> None:
        """y = W x + (alpha / r) B A x, by hand on one layer; rsLoRA divides by the square root of r."""
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        model = wrap(llama, LoraConfig(r=4, lora_alpha=8.0, target_modules=("q_proj",)), "policy", seed=1)
        add_fresh(model, "rs", LoraConfig(r=4, lora_alpha=8.0, target_modules=("q_proj",), use_rslora=True), seed=1)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        for name, scale in (("policy", 8 / 4), ("rs", 8 / 2)):
            train(model, name)
            tensors = adapter_tensors(model, name)
            a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{h}.weight"] for h in "AB")
            expected = x @ layer.weight.T + scale * (x @ a.T @ b.T)
            with use_adapter(model, name), torch.no_grad():
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_small_steps_add_up(self, load: Load, tiny_llama: Make) -> None:
        """F16: with bf16 adapters 1,000 equal steps of 1e-5 stop moving on the way; here they arrive."""
        model = wrap(load(tiny_llama(), dtype="bfloat16").model, LORA, "policy", seed=1)
        b = next(p for k, p in adapter_parameters(model, "policy").items() if k.endswith("lora_B.weight"))
        optimizer = torch.optim.SGD([b], lr=1e-5)
        b.grad = -torch.ones_like(b)
        for _ in range(1000):
            optimizer.step()
        torch.testing.assert_close(b.detach(), torch.full_like(b, 0.01), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("name", ["", "a.b", "a", "lora", "keys", "items", "forward"])
    def test_names_that_peft_or_torch_trip_over(self, llama: nn.Module, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be called"):
            wrap(llama, LORA, name)

    def test_a_name_is_taken_once(self, two: PeftModel) -> None:
        with pytest.raises(InvariantError, match="one of this name"):
            add_fresh(two, "value", LORA)


class TestTargets:
    def test_all_linear_is_every_linear_layer_of_the_trunk(self, llama: nn.Module, load: Load, tiny_gpt2: Make) -> None:
        names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert resolve_targets(llama, "all-linear") == names
        assert resolve_targets(wrap(llama, LORA, "policy"), "all-linear") == names
        assert resolve_targets(load(tiny_gpt2()).model, "all-linear") == ["c_attn", "c_fc", "c_proj"]

    def test_one_of_two_targets_that_matches_nothing_is_named(self, llama: nn.Module) -> None:
        """Faults 35, 36."""
        with pytest.raises(ConfigError, match=r"c_attn matches no linear layer.*q_proj") as e:
            resolve_targets(llama, ("q_proj", "c_attn"))
        assert len(e.value.problems) == 1
        for name in ("lm_head", "embed_tokens", "input_layernorm", "proj"):
            with pytest.raises(ConfigError, match=name):
                resolve_targets(llama, (name,))

    def test_names_with_a_path(self, llama: nn.Module) -> None:
        model = wrap(llama, LoraConfig(r=2, target_modules=("layers.1.mlp.up_proj", "self_attn.q_proj")), "policy")
        modules = {
            k.split(".lora_")[0].removeprefix("base_model.model.model.") for k in adapter_parameters(model, "policy")
        }
        assert modules == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}


class TestUseAdapter:
    def test_each_adapter_answers_as_if_it_were_alone(self, two: PeftModel, load: Load, tiny_llama: Make) -> None:
        expected = {}
        for name in ("policy", "value", "reference"):
            files = AdapterFiles(adapter_config(two, name), adapter_tensors(two, name), None, "", name)
            expected[name] = logits(wrap(load(tiny_llama()).model, files, "only"))
        expected[None] = logits(load(tiny_llama()).model)
        for name in ("value", None, "reference", "policy", None, "value"):
            with use_adapter(two, name):
                assert torch.equal(logits(two), expected[name]), name
        assert torch.equal(logits(two), expected["policy"])
        assert len({float(x.sum()) for x in expected.values()}) == 4

    def test_it_nests_and_restores_after_an_exception(self, two: PeftModel) -> None:
        policy = logits(two)
        with use_adapter(two, "value"):
            value = logits(two)
            with pytest.raises(RuntimeError), use_adapter(two, None):
                raise RuntimeError
            assert torch.equal(logits(two), value)
        assert torch.equal(logits(two), policy)

    def test_which_adapters_train_never_changes(self, two: PeftModel) -> None:
        before = flags(two)
        assert {n.split(".")[-2] for n, on in before.items() if on} == {"policy", "value"}
        for name in ("value", None, "reference", "policy"):
            with use_adapter(two, name):
                assert flags(two) == before
            assert flags(two) == before

    def test_two_adapters_train_from_one_joint_loss(self, two: PeftModel) -> None:
        """As the PPO update does it: a policy pass, a value pass, one backward."""
        with use_adapter(two, "policy"):
            policy_loss = two(input_ids=IDS, labels=IDS).loss
        with use_adapter(two, "value"):
            value_loss = trunk(two)(input_ids=IDS).last_hidden_state.square().mean()
        (policy_loss + value_loss).backward()
        for name, wanted in (("policy", True), ("value", True), ("reference", False)):
            grads = [p.grad for p in adapter_parameters(two, name).values()]
            assert all((g is not None and bool(g.any())) == wanted for g in grads), name
        assert all(p.grad is None for n, p in two.named_parameters() if ".lora_" not in n)

    def test_peft_s_own_switch_sees_the_same(self, two: PeftModel) -> None:
        """The sampler switches through PEFT: both must agree on what is active, inside and outside."""
        with use_adapter(two, "value"):
            assert two.active_adapters == ["value"]
            value = logits(two)
        two.set_adapter("value")
        assert torch.equal(logits(two), value)
        with use_adapter(two, "policy"):
            assert not torch.equal(logits(two), value)
        assert torch.equal(logits(two), value)
        with two.disable_adapter():
            base = logits(two)
        with use_adapter(two, None):
            assert torch.equal(logits(two), base)

    def test_an_unknown_adapter(self, two: PeftModel) -> None:
        with pytest.raises(InvariantError, match="no such adapter"):
            use_adapter(two, "polcy")

    def test_one_base_is_shared(self, two: PeftModel) -> None:
        """F17: three adapters, one set of base weights."""
        base = [p for n, p in two.named_parameters() if ".lora_" not in n]
        plain = sum(p.numel() for p in AutoModelForCausalLM.from_config(two.get_base_model().config).parameters())
        assert sum(p.numel() for p in base) == plain

    @pytest.mark.parametrize("recompute", [False, True])
    def test_a_base_is_free_when_its_last_user_is(
        self, load: Callable[..., Any], tiny_llama: Callable[..., Path], recompute: bool
    ) -> None:
        """Without waiting for the garbage collector, which does not know of a GPU's memory."""
        gc.collect()
        gc.disable()
        try:
            backbone = load(tiny_llama())
            model = wrap(backbone.model, LoraConfig(r=2), "policy", seed=1)
            if recompute:
                gradient_checkpointing(model)
                model.train()
            model(input_ids=IDS).logits.sum().backward()
            weight = weakref.ref(model.get_base_model().get_input_embeddings().weight)
            del backbone, model
            assert weight() is None
        finally:
            gc.enable()

    def test_gradient_checkpointing_recomputes_under_the_right_adapter(self, two: PeftModel) -> None:
        """Without the adapter being remembered per pass, the policy's layers would be recomputed under whatever is active
        at backward time, and its gradients would be wrong without a word."""

        def gradients() -> dict[str, Tensor]:
            two.zero_grad()
            with use_adapter(two, "policy"):
                first = two(input_ids=IDS, labels=IDS).loss
            with use_adapter(two, "value"):
                second = trunk(two)(input_ids=IDS).last_hidden_state.square().mean()
            with use_adapter(two, "reference"):
                (first + second).backward()
            return {n: p.grad.clone() for n, p in two.named_parameters() if p.grad is not None}

        plain = gradients()
        gradient_checkpointing(two)
        two.train()
        recomputed = gradients()
        assert plain.keys() == recomputed.keys() and len(plain) == 2 * 28
        for name in plain:
            torch.testing.assert_close(recomputed[name], plain[name], msg=name)


class TestStrictLoading:
    @pytest.fixture
    def files(self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path) -> AdapterFiles:
        save_trained(tiny_llama(), tmp_path / "sft", lora_dropout=0.1)
        return read_adapter(tmp_path / "sft")

    def with_tensors(self, files: AdapterFiles, tensors: dict[str, Tensor], **config: Any) -> AdapterFiles:
        return AdapterFiles({**files.config, **config}, tensors, files.head, files.sha256, files.path)

    def test_every_tensor_arrives_and_dropout_is_off(self, files: AdapterFiles, llama: nn.Module) -> None:
        model = wrap(llama, files, "policy")
        add_from_files(model, "reference", files, trainable=False)
        for name in ("policy", "reference"):
            assert adapter_sha256(adapter_tensors(model, name)) == files.sha256
            assert adapter_config(model, name)["lora_dropout"] == 0.0
        trains = {n.split(".")[-2] for n, on in flags(model).items() if on}
        assert trains == {"policy"}
        policy = logits(model)
        with use_adapter(model, "reference"):
            assert torch.equal(logits(model), policy)  # F38: the reference of step 0 is the policy

    def test_a_missing_key(self, files: AdapterFiles, llama: nn.Module) -> None:
        """F18, fault 50: PEFT warns and leaves the fresh tensor, so a whole adapter can silently be nothing."""
        tensors = dict(files.tensors)
        gone = [k for k in tensors if "layers.1.mlp.up_proj" in k]
        for key in gone:
            del tensors[key]
        with pytest.raises(ArtifactError) as e:
            wrap(llama, self.with_tensors(files, tensors), "policy")
        assert [p.what for p in e.value.problems] == [f"lacks tensor {k}" for k in gone] and e.value.exit_code == 5

    def test_a_renamed_key(self, files: AdapterFiles, llama: nn.Module) -> None:
        """F18: a name that matches nothing is an error, never a tensor that is silently not there."""
        tensors = {k.replace("layers.0.self_attn.q_proj", "layers.0.attention.wq"): t for k, t in files.tensors.items()}
        with pytest.raises(ArtifactError, match=r"attention\.wq.* has no place in this model"):
            wrap(llama, self.with_tensors(files, tensors), "policy")

    def test_a_target_the_file_does_not_claim(self, files: AdapterFiles, llama: nn.Module) -> None:
        with pytest.raises(ArtifactError, match="has no place"):
            wrap(llama, self.with_tensors(files, files.tensors, target_modules=["q_proj"]), "policy")

    def test_another_shape(self, files: AdapterFiles, load: Load, tiny_llama: Make) -> None:
        """Fault 49: one line a tensor, not a RuntimeError of a page."""
        with pytest.raises(ArtifactError, match=r"wrong shape of .*expected \(4, 128\); got \(4, 64\)"):
            wrap(load(tiny_llama(hidden=128)).model, files, "policy")

    def test_a_refused_adapter_leaves_the_model_as_it_was(self, files: AdapterFiles, two: PeftModel) -> None:
        before, on = logits(two), flags(two)
        with pytest.raises(ArtifactError):
            add_from_files(two, "sft", self.with_tensors(files, dict(list(files.tensors.items())[:2])), trainable=True)
        assert list(two.peft_config) == ["policy", "value", "reference"]
        assert torch.equal(logits(two), before) and flags(two) == on

    def test_weights_of_a_resumed_run_are_put_back_strictly(self, two: PeftModel, files: AdapterFiles) -> None:
        load_adapter_tensors(two, "policy", files.tensors)
        assert adapter_sha256(adapter_tensors(two, "policy")) == files.sha256
        with pytest.raises(ArtifactError, match="lacks tensor"):
            load_adapter_tensors(two, "policy", dict(list(files.tensors.items())[1:]))
        with pytest.raises(ArtifactError, match="wrong shape"):
            load_adapter_tensors(two, "policy", {k: torch.zeros(1, 1) for k in files.tensors})

    def test_a_copy_is_equal_and_apart(self, two: PeftModel) -> None:
        copy_adapter(two, "policy", "critic")
        assert adapter_sha256(adapter_tensors(two, "critic")) == adapter_sha256(adapter_tensors(two, "policy"))
        assert flags(two)["base_model.model.model.layers.0.mlp.up_proj.lora_A.critic.weight"]
        with torch.no_grad():
            next(iter(adapter_parameters(two, "critic").values())).add_(1)
        assert adapter_sha256(adapter_tensors(two, "critic")) != adapter_sha256(adapter_tensors(two, "policy"))
        copy_adapter(two, "value", "critic")
        assert adapter_sha256(adapter_tensors(two, "critic")) == adapter_sha256(adapter_tensors(two, "value"))

    def test_sharded_tensors_are_not_taken_for_an_adapter(self, two: PeftModel) -> None:
        """F25: under ZeRO-3 a parameter that was not gathered is an empty tensor."""
        next(iter(adapter_parameters(two, "policy").values())).data = torch.empty(0)
        with pytest.raises(InvariantError, match="partitioned by ZeRO-3"):
            adapter_tensors(two, "policy")


class TestAcrossClasses:
    @pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
    def test_a_classifier_s_adapter_sits_on_the_causal_lm_s_trunk(
        self, family: str, load: Load, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """An adapter that plain PEFT trained on a sequence classifier, on the one base that all roles share, scores the same.

        GPT-2 has another trunk name and Conv1D layers, whose weights are stored transposed."""
        base = request.getfixturevalue(family)()
        torch.manual_seed(3)
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        names = resolve_targets(classifier, "all-linear")
        lora = peft.LoraConfig(r=4, target_modules=names, task_type="SEQ_CLS", fan_in_fan_out=family == "tiny_gpt2")
        plain = peft.get_peft_model(classifier, lora)
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        plain.save_pretrained(tmp_path / "reward")
        with torch.no_grad():
            expected = plain.eval()(IDS).logits[:, 0]

        files = read_adapter(tmp_path / "reward")
        model = wrap(load(base).model, files, "reward")
        assert files.head is not None
        head = ScalarHead(64, files.head)
        with torch.no_grad():
            torch.testing.assert_close(head(hidden(model)[:, -1]), expected)
            with use_adapter(model, None):
                assert (head(hidden(model)[:, -1]) - expected).abs().max() > 1e-2

        # And back: saved by us, it is still the adapter of a classifier.
        tensors, config = adapter_tensors(model, "reward"), adapter_config(model, "reward")
        save_adapter(tmp_path / "again", tensors, config, "SEQ_CLS", files.head, str(base))
        classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        again = PeftModel.from_pretrained(classifier, str(tmp_path / "again"))
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits[:, 0], expected)

    def test_an_adapter_of_the_bare_trunk_fits_too(self, load: Load, tiny_llama: Make, llama: nn.Module) -> None:
        given = wrap(load(tiny_llama()).model, LORA, "policy", seed=5)
        tensors = {
            k.replace("model.model.layers", "model.layers"): t for k, t in adapter_tensors(given, "policy").items()
        }
        files = AdapterFiles(adapter_config(given, "policy"), tensors, None, "", "bare")
        model = wrap(llama, files, "policy")
        assert adapter_sha256(adapter_tensors(model, "policy")) == adapter_sha256(adapter_tensors(given, "policy"))

    def test_a_value_adapter_on_a_full_reward_model(self, load_reward: Load, tiny_llama: Make, tmp_path: Path) -> None:
        torch.manual_seed(0)
        folder = tmp_path / "rm"
        AutoModelForSequenceClassification.from_pretrained(tiny_llama(), num_labels=1).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny_llama() / file).read_bytes())
        base = load_reward(folder)
        model = wrap(base.model, LORA, "value", seed=1)
        assert len(adapter_parameters(model, "value")) == 28 and HEAD_KEY not in adapter_tensors(model, "value")
        assert trunk(model) is base.model.model  # type: ignore[union-attr]
        set_trainable(model, ())
        assert not any(flags(model).values())
