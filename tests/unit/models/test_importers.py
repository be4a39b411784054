"""Artefacts of the ancestors, made here in their own form from known weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.cli import main
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.importers import import_loralib, import_peft, import_weight_diff, loralib
from rlhf_ray.models.importers.weight_diff import check_converted

Llama = Callable[..., Path]
IDS = torch.tensor([[1, 70, 71, 72, 73, 74]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


class TestLoralib:
    @pytest.fixture
    def base(self, tiny_llama: Llama) -> Path:
        return tiny_llama(seed=3)

    @pytest.fixture
    def flat(self, base: Path) -> dict[str, Tensor]:
        """Rank 8 on q, k, v, o of both layers, for policy and value model, and the value head, in the ancestor's names."""
        torch.manual_seed(0)
        weights = load_file(base / "model.safetensors")
        found: dict[str, Tensor] = {}
        for prefix in ("model.", "base_model.model."):
            for name, weight in weights.items():
                if "self_attn" in name and name.endswith("_proj.weight"):
                    key = prefix + name.removeprefix("model.").removesuffix(".weight")
                    found[f"{key}.lora_A"] = torch.randn(8, weight.shape[1]).bfloat16()
                    found[f"{key}.lora_B"] = 0.05 * torch.randn(weight.shape[0], 8).bfloat16()
        return {**found, "value_head": torch.randn(1, 64), "value_head_bias": torch.tensor([0.5])}

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> Path:
        folder.mkdir(exist_ok=True)
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder

    def test_the_policy_is_w_plus_8_b_a(self, base: Path, flat: dict[str, Tensor], tmp_path: Path) -> None:
        from peft import PeftModel

        out = import_loralib(self.save(tmp_path / "ck", flat), str(base), 64.0, tmp_path / "out")
        explicit = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        state = explicit.state_dict()
        for name in [n for n in flat if n.startswith("model.") and n.endswith("lora_A")]:
            a, b = flat[name].float(), flat[name.replace("lora_A", "lora_B")].float()
            state[name.removesuffix(".lora_A") + ".weight"] += 8.0 * b @ a
        wanted = logits(explicit)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert (logits(PeftModel.from_pretrained(plain, str(out / "adapter"))) - wanted).abs().max() < 1e-5
        wrong = import_loralib(tmp_path / "ck", str(base), 16.0, tmp_path / "wrong")
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert (logits(PeftModel.from_pretrained(plain, str(wrong / "adapter"))) - wanted).abs().max() > 1e-2

    def test_the_critic_is_told_apart_by_its_prefix(self, base: Path, flat: dict[str, Tensor], tmp_path: Path) -> None:
        out = import_loralib(self.save(tmp_path / "ck", flat), str(base), 64.0, tmp_path / "out")
        policy, critic = read_adapter(out / "adapter"), read_adapter(out / "value")
        assert len(policy.tensors) == len(critic.tensors) == 16 and policy.sha256 != critic.sha256
        assert critic.head is not None and torch.equal(critic.head, flat["value_head"])
        key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
        assert torch.equal(critic.tensors[key], flat["base_model.model.layers.1.self_attn.k_proj.lora_B"].float())
        assert json.loads((out / "import.json").read_text())["dropped"] == {"value_head_bias": 0.5}

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                lambda f: f.pop("model.layers.0.self_attn.q_proj.lora_A"),
                "the policy lacks base_model.model.model.layers.0",
            ),
            (lambda f: f.pop("value_head"), "value_head is missing"),
            (lambda f: f.update(extra=torch.zeros(1)), "unknown key extra"),
            (
                lambda f: f.update({"value_head": torch.zeros(1, 3)}),
                "value_head does not fit; expected 64 numbers; got 3",
            ),
            (
                lambda f: f.update({"model.layers.7.self_attn.q_proj.lora_A": torch.zeros(8, 64)}),
                "the policy has base_model.model.model.layers.7",
            ),
            (
                lambda f: f.update({"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(4, 64)}),
                "the policy has several ranks; expected one; got 4, 8",
            ),
            (
                lambda f: f.update({"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(8)}),
                r"model.layers.0.self_attn.q_proj.lora_A is not a matrix; .*; got \[8\]",
            ),
            (
                lambda f: f.update(value_head_bias=torch.zeros(2)),
                "value_head_bias is not one number; expected 1; got 2",
            ),
            (lambda f: f["value_head"].fill_(torch.nan), "value_head holds values that are not finite"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_is_written(
        self, base: Path, flat: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], says: str
    ) -> None:
        """F18: no key is matched loosely or left over."""
        change(flat)
        with pytest.raises(ArtifactError, match=says):
            import_loralib(self.save(tmp_path / "ck", flat), str(base), 64.0, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("alpha", "family", "says"),
        [
            (float("nan"), "tiny_llama", "lora_alpha: bad value"),
            (64.0, "tiny_gpt2", "has no num_hidden_layers; expected the LLaMA"),
        ],
    )
    def test_what_was_asked_for_is_looked_at_first(
        self, flat: dict[str, Tensor], tmp_path: Path, request: Any, alpha: float, family: str, says: str
    ) -> None:
        with pytest.raises(ConfigError, match=says):
            import_loralib(
                self.save(tmp_path / "ck", flat), str(request.getfixturevalue(family)()), alpha, tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()

    def test_it_is_written_whole_or_not_at_all(
        self, base: Path, flat: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fills up between the policy and the value model."""

        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(loralib, "atomic_write_json", full)
        with pytest.raises(OSError, match="No space left"):
            import_loralib(self.save(tmp_path / "ck", flat), str(base), 64.0, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ck"]

    def test_a_pickle_that_wants_more_than_tensors_is_refused(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        with pytest.raises(ArtifactError, match="is not a pickle of plain tensors"):
            import_loralib(tmp_path, str(base), 64.0, tmp_path / "out")
        assert not Path("pwned").exists()


class TestWeightDiff:
    @pytest.fixture
    def made(self, tiny_llama: Llama, tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
        """(diff folder, raw folder, tuned weights): the tuned model has one row of embeddings more."""
        raw = tmp_path / "raw"
        shutil.copytree(tiny_llama(seed=1), raw)
        config = json.loads((raw / "config.json").read_text())
        (raw / "config.json").write_text(json.dumps({**config, "transformers_version": "4.100.0"}))
        torch.manual_seed(2)
        weights = load_file(raw / "model.safetensors")
        tuned = {n: t + 0.01 * torch.randn_like(t) for n, t in weights.items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tuned[name] = torch.cat([tuned[name], tuned[name].mean(0, keepdim=True)])
        diff = tmp_path / "sft10k-wdiff"
        diff.mkdir()
        stored = {n: t - weights[n] if t.shape == weights[n].shape else t for n, t in tuned.items()}
        torch.save(stored, diff / "pytorch_model.bin")
        (diff / "config.json").write_text(json.dumps({**config, "vocab_size": 261}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(raw / name, diff / name)
        (diff / "model_sum.txt").write_text(str(sum(float(t.double().sum()) for t in tuned.values())))
        return diff, raw, tuned

    def test_what_is_recovered_is_the_tuned_model(
        self, made: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
    ) -> None:
        diff, raw, tuned = made
        out = import_weight_diff(diff, raw, tmp_path / "out")
        found = load_file(out / "model.safetensors")
        assert found.keys() == tuned.keys()
        assert all((found[n] - tuned[n]).abs().max() < 1e-6 for n in tuned)
        assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 261

    def test_a_reward_model_becomes_a_classifier(
        self, made: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
    ) -> None:
        diff, raw, tuned = made
        stored = {
            f"backbone_model.{n}": t for n, t in torch.load(diff / "pytorch_model.bin", weights_only=True).items()
        }
        head = {"reward_head.weight": torch.randn(1, 64), "reward_head.bias": torch.tensor([0.25])}
        torch.save({**stored, **head}, diff / "pytorch_model.bin")
        (diff / "config.json").write_text(json.dumps({"backbone_model_name_or_path": "/somewhere/else"}))
        total = sum(float(t.double().sum()) for t in {**tuned, **head}.values())
        (diff / "model_sum.txt").write_text(str(total))
        out = import_weight_diff(diff, raw, tmp_path / "out")
        model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(model.score.weight, head["reward_head.weight"])
        assert "/somewhere/else" not in (out / "config.json").read_text()

    def test_f22_a_wrong_sum_writes_nothing(self, made: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
        """F22: the ancestor prints the failure and saves all the same."""
        diff, raw, _ = made
        (diff / "model_sum.txt").write_text("1234.5")
        assert main(["import", "weight-diff", str(diff), "--raw", str(raw), "--output-dir", str(tmp_path / "out")]) == 5
        assert not (tmp_path / "out").exists()

    def test_f22_versions_are_numbers(self, tmp_path: Path) -> None:
        """F22: as text, "4.100.0" comes before "4.29.2"."""
        for version, is_old in (("4.28.1", True), ("4.29.2", False), ("4.100.0", False), ("5.0.0", False)):
            (tmp_path / "config.json").write_text(json.dumps({"transformers_version": version}))
            if is_old:
                with pytest.raises(
                    ArtifactError, match=r"was converted too early; expected transformers 4.29.2 or later"
                ):
                    check_converted(tmp_path)
            else:
                check_converted(tmp_path)

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda diff: (diff / "model_sum.txt").write_text("abc"), "model_sum.txt: is damaged; expected the sum"),
            (lambda diff: (diff / "model.safetensors").write_bytes(b"\x08cut"), "model.safetensors: is damaged"),
            (
                lambda diff: torch.save({"backbone_model.x": torch.ones(1)}, diff / "pytorch_model.bin"),
                "is a reward model without a head; expected reward_head.weight",
            ),
        ],
    )
    def test_a_damaged_difference(
        self, made: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, spoil: Callable[[Path], Any], says: str
    ) -> None:
        diff, raw, _ = made
        spoil(diff)
        with pytest.raises(ArtifactError, match=says):
            import_weight_diff(diff, raw, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tensor_without_a_difference_is_refused(
        self, made: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
    ) -> None:
        diff, raw, _ = made
        stored = torch.load(diff / "pytorch_model.bin", weights_only=True)
        del stored["model.norm.weight"]
        torch.save(stored, diff / "pytorch_model.bin")
        with pytest.raises(ArtifactError, match=r"has no difference for model.norm.weight"):
            import_weight_diff(diff, raw, tmp_path / "out")


def test_a_pickled_peft_adapter_becomes_safetensors(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    (old / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, 64), f"{stem}.lora_B.weight": torch.randn(64, 2)}
    torch.save(tensors, old / "adapter_model.bin")
    found = read_adapter(import_peft(old, tmp_path / "new"))
    assert all(torch.equal(found.tensors[n], tensors[n]) for n in tensors)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        import_peft(old, tmp_path / "new")
    save_file({}, old / "x.safetensors")
    torch.save({}, old / "adapter_model.bin")
    with pytest.raises(ArtifactError):
        import_peft(old, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
