"""Merging adapters into checkpoints (F25, F26, F35, F39; parity P8)."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.errors import ArtifactError, ConfigError, RlhfRayError
from rlhf_ray.models import merge
from rlhf_ray.models.adapters import read_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.heads import ScalarHead, scalar_head
from rlhf_ray.models.merge import fixture_difference, merge_run
from rlhf_ray.models.sources import weights_sha256
from rlhf_ray.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf_ray.storage.run_folder import RunFolder, create_run, write_checkpoint

from .conftest import IDS, hidden, logits

Load = Callable[..., Backbone]
Make = Callable[..., Path]
HEAD = torch.linspace(-1, 1, 64)[None]
SMALL = 200_000
"""Bytes: more than an adapter has here, less than a model."""


@pytest.fixture
def small_files(tiny_llama: Make) -> Iterator[None]:
    """No file of this process may be longer than SMALL."""
    assert (tiny_llama() / "model.safetensors").stat().st_size > SMALL
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


TEMPLATE = {"name": "alpaca", "sha256": "ab" * 32}


@pytest.fixture
def make_run(load: Load, save_trained: Callable[..., str], tmp_path: Path) -> Callable[..., RunFolder]:
    """make_run(stage, base, head=None): a finished run with a trained adapter, and one checkpoint of another adapter."""

    def make(stage: str, base: Path, head: torch.Tensor | None = None, **fields: Any) -> RunFolder:
        run = create_run(tmp_path / stage, stage, {"seed": 0}, "never")
        identity = load(base, **fields).identity
        save_trained(base, run.adapter_dir, head=head)
        write_checkpoint(run, 3, lambda folder: save_trained(base, folder / "adapter", head=head, seed=9) and None, 3)
        run.update_manifest(base=identity.manifest(), tokenizer_sha256=identity.tokenizer_sha256, template=TEMPLATE)
        run.seal()
        return run

    return make


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rlhf_ray.json").read_text())


class TestPolicies:
    def test_merged_equals_unmerged_equals_reloaded(
        self, load: Load, tiny_llama: Make, make_run: Callable[..., RunFolder]
    ) -> None:
        """F25, on the real path: reloaded logits == merged logits == base + adapter; the weights differ from the base's."""
        base = tiny_llama()
        run = make_run("sft", base)
        lines: list[str] = []
        merged = merge_run(run.path, log=lines.append)
        assert merged == run.path.with_name("sft-adapter-merged")
        unmerged = logits(wrap(load(base).model, read_adapter(run.adapter_dir), "policy"))
        torch.testing.assert_close(logits(load(merged).model), unmerged, rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(
                AutoModelForCausalLM.from_pretrained(merged)(IDS).logits, unmerged, rtol=1e-5, atol=1e-4
            )
        assert weights_sha256(merged) != weights_sha256(base)
        assert any("differ from the unmerged ones" in line for line in lines)

    def test_the_weights_are_w_plus_alpha_over_r_b_a(
        self, tiny_llama: Make, tiny_gpt2: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """By hand, on a Linear and on a transposed Conv1D; everything else is bit for bit the base's."""
        cases = [
            (tiny_llama(), ("up_proj",), "model.layers.1.mlp.up_proj", False),
            (tiny_gpt2(), ("c_fc",), "transformer.h.1.mlp.c_fc", True),
        ]
        for base, targets, module, transposed in cases:
            folder = tmp_path / module
            save_trained(base, folder, target_modules=targets, r=4, lora_alpha=6.0)
            adapter = read_adapter(folder).tensors
            a, b = (adapter[f"base_model.model.{module}.lora_{h}.weight"] for h in "AB")
            before, after = (load_file(f / "model.safetensors") for f in (base, merge_run(folder)))
            delta = 6 / 4 * (b @ a)
            expected = before[f"{module}.weight"] + (delta.T if transposed else delta)
            torch.testing.assert_close(after[f"{module}.weight"], expected)
            untouched = [n for n in before if targets[0] not in n]
            assert len(untouched) > 10 and all(torch.equal(before[n], after[n]) for n in untouched)

    def test_it_is_complete_and_can_be_a_base(
        self, load: Load, tiny_llama: Make, make_run: Callable[..., RunFolder]
    ) -> None:
        """F39: tokenizer, template and lineage travel along; the merged checkpoint loads wherever a base does."""
        base = tiny_llama()
        run = make_run("ppo", base)
        merged = merge_run(run.path)
        manifest = manifest_of(merged)
        assert (manifest["kind"], manifest["task_type"], manifest["stage"]) == ("merged", "CAUSAL_LM", "ppo")
        assert manifest["template"] == TEMPLATE
        assert manifest["parents"] == [
            {"role": "ppo", "path": str(run.adapter_dir), "sha256": read_adapter(run.adapter_dir).sha256}
        ]
        assert manifest["base"]["weights_sha256"] == weights_sha256(base)
        assert tokenizer_sha256(load_tokenizer(str(merged))) == tokenizer_sha256(load_tokenizer(str(base)))
        moved = Path(shutil.copytree(merged, merged.with_name("moved")))
        backbone = load(moved)
        assert backbone.eos_ids == (2,) and fixture_difference(moved, backbone) == 0.0
        assert fixture_difference(base, backbone) is None

    def test_a_base_that_has_moved_is_named(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        base = Path(shutil.copytree(tiny_llama(), tmp_path / "base"))
        save_trained(base, tmp_path / "adapter")
        expected = load_file(merge_run(tmp_path / "adapter") / "model.safetensors")
        base.rename(tmp_path / "moved")
        with pytest.raises(RlhfRayError, match="name the base where it lies now: --model"):
            merge_run(tmp_path / "adapter", tmp_path / "again")
        merged = load_file(
            merge_run(tmp_path / "adapter", tmp_path / "again", model=str(tmp_path / "moved")) / "model.safetensors"
        )
        assert all(torch.equal(expected[name], tensor) for name, tensor in merged.items())

    def test_a_regular_expression_as_target_merges_what_it_matched(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        save_trained(tiny_llama(), tmp_path / "names", target_modules=("q_proj", "v_proj"))
        shutil.copytree(tmp_path / "names", tmp_path / "regex")
        file = tmp_path / "regex" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": r".*self_attn\.(q|v)_proj"}))
        by_name, by_regex = (load_file(merge_run(tmp_path / n) / "model.safetensors") for n in ("names", "regex"))
        assert all(torch.equal(by_name[name], tensor) for name, tensor in by_regex.items())

    def test_one_checkpoint_of_a_run(self, load: Load, tiny_llama: Make, make_run: Callable[..., RunFolder]) -> None:
        run = make_run("ppo", tiny_llama())
        merged = merge_run(f"{run.path}@3")
        assert merged.name == "ppo-step_000003-adapter-merged"
        expected = logits(wrap(load(tiny_llama()).model, read_adapter(run.checkpoints()[0].adapter_dir), "policy"))
        torch.testing.assert_close(logits(load(merged).model), expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_half_precision_base_stays_one(
        self, dtype: str, load: Load, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """On the CPU too, where such a base would otherwise load as float32, and float16 not at all."""
        base = tiny_llama(dtype=dtype)
        save_trained(base, tmp_path / "a")
        merged = merge_run(tmp_path / "a")
        stored = load_file(merged / "model.safetensors")
        assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"} and manifest_of(merged)["dtype"] == dtype
        adapter = read_adapter(tmp_path / "a").tensors
        name = "model.layers.0.mlp.up_proj"
        a, b = (adapter[f"base_model.model.{name}.lora_{h}.weight"] for h in "AB")
        weight = load_file(base / "model.safetensors")[f"{name}.weight"]
        expected = (weight.float() + 8 * (b @ a)).to(weight.dtype)  # alpha 32, r 4; rounded once
        assert torch.equal(stored[f"{name}.weight"], expected)
        wide = merge_run(tmp_path / "a", tmp_path / "wide", "float32")
        assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}

    def test_dropout_rates_of_the_base_survive(
        self, tiny_gpt2: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """Dropout is off while we work; the checkpoint handed on is the architecture as its authors made it."""
        base = tiny_gpt2(attn_pdrop=0.25)
        save_trained(base, tmp_path / "a")
        merged = json.loads((merge_run(tmp_path / "a") / "config.json").read_text())
        assert merged["attn_pdrop"] == 0.25 and merged["resid_pdrop"] == 0.1


class TestRewardModels:
    @pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
    def test_the_score_head_survives(
        self,
        family: str,
        load: Load,
        load_reward: Load,
        make_run: Callable[..., RunFolder],
        request: pytest.FixtureRequest,
    ) -> None:
        """F26, lost reward head: scores before the merge, after it, and reloaded, ours and plain transformers', to 1e-5."""
        base = request.getfixturevalue(family)()
        run = make_run("reward", base, head=HEAD)
        before = ScalarHead(64, HEAD)(
            hidden(wrap(load(base).model, read_adapter(run.adapter_dir), "reward"))[:, -1]
        ).detach()
        merged = merge_run(run.path)
        assert manifest_of(merged)["task_type"] == "SEQ_CLS"
        loaded = load_reward(merged)
        score: Any = loaded.model.score  # type: ignore[union-attr]
        after = ScalarHead(64, score.weight.detach())(hidden(loaded.model)[:, -1]).detach()
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            plain = AutoModelForSequenceClassification.from_pretrained(merged)(IDS).logits
        assert plain.shape == (2, 1)
        torch.testing.assert_close(plain[:, 0], before, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("labels", [1, 2])
    def test_heads_by_others(
        self, labels: int, tiny_llama: Make, load: Load, load_reward: Load, tmp_path: Path
    ) -> None:
        """With a bias, and of two labels: the checkpoint scores as the adapter does, and says what it leaves to say."""
        base = AutoModelForSequenceClassification.from_pretrained(tiny_llama(), num_labels=labels, pad_token_id=0)
        base.score = torch.nn.Linear(64, labels)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
        files = read_adapter(tmp_path / "theirs")
        expected = files.scalar_head(64)(hidden(wrap(load(tiny_llama()).model, files, "reward"))[:, -1])
        merged = merge_run(tmp_path / "theirs", model=str(tiny_llama()))
        loaded = load_reward(merged)
        found = scalar_head(loaded.model.score)(hidden(loaded.model)[:, -1])  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        notes = " ".join(manifest_of(merged)["notes"])
        assert "score.bias" in notes and ("two labels" in notes) is (labels == 2) and loaded.notes == ()

    def test_a_merged_reward_model_is_no_causal_lm(
        self, load: Load, tiny_llama: Make, make_run: Callable[..., RunFolder]
    ) -> None:
        merged = merge_run(make_run("reward", tiny_llama(), head=HEAD).path)
        with pytest.raises(ArtifactError, match=r"missing lm_head\.weight"):
            load(merged)

    def test_a_drift_in_precision_is_measured(
        self, load_reward: Load, tiny_llama: Make, make_run: Callable[..., RunFolder]
    ) -> None:
        """F35: a reward model trained in float32 and scored in another precision scores otherwise; the artefact tells."""
        merged = merge_run(make_run("reward", tiny_llama(), head=HEAD).path)
        assert fixture_difference(merged, load_reward(merged)) == 0.0
        drift = fixture_difference(merged, load_reward(merged, dtype="bfloat16"))
        assert drift is not None and 1e-4 < drift < 1


class TestRefusals:
    def test_a_merge_that_changes_nothing(
        self, load: Load, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """F25, merge that changes nothing: the ancestor merged an empty adapter, returned the base and reported nothing."""
        base = tiny_llama()
        save_trained(base, tmp_path / "a")
        weights = tmp_path / "a" / "adapter_model.safetensors"
        from safetensors.torch import save_file

        save_file({k: t * ("lora_A" in k) for k, t in load_file(weights).items()}, weights)
        with pytest.raises(ArtifactError, match="changes not one weight") as e:
            merge_run(tmp_path / "a")
        assert e.value.exit_code == 5
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]

    def test_an_effect_lost_in_rounding_is_told(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        save_trained(tiny_llama(dtype="bfloat16"), tmp_path / "a", lora_alpha=0.002)
        lines: list[str] = []
        merged = merge_run(tmp_path / "a", log=lines.append)
        assert any("dtype=float32" in line for line in lines) and "dtype=float32" in manifest_of(merged)["notes"][-1]
        lines.clear()
        wide = merge_run(tmp_path / "a", tmp_path / "wide", "float32", log=lines.append)
        assert manifest_of(wide)["notes"] == [] and len(lines) == 1

    def test_a_wrong_merge_is_caught_before_it_is_saved(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """F25, merged != unmerged: a fold that forgets a layer, or the scale, does not answer as the unmerged model."""
        save_trained(tiny_llama(), tmp_path / "a")
        plain = merge._fold
        seen: list[int] = []

        def forgetful(layer: Any) -> bool:
            seen.append(1)
            return True if len(seen) == 3 else plain(layer)

        monkeypatch.setattr(merge, "_fold", forgetful)
        with pytest.raises(ArtifactError, match="does not answer as the unmerged one"):
            merge_run(tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]

    def test_a_save_that_loses_weights_is_caught_on_reading_back(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import PreTrainedModel

        save_trained(tiny_llama(), tmp_path / "a")
        plain = PreTrainedModel.save_pretrained

        def lossy(self: Any, folder: Path) -> None:
            with torch.no_grad():
                self.model.norm.weight.mul_(1.01)
            plain(self, folder)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
        with pytest.raises(ArtifactError, match="read back, gives other outputs"):
            merge_run(tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]

    def test_a_disk_without_room(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path, small_files: None
    ) -> None:
        """safetensors has an error of its own for what the disk refuses; nothing is left of the attempt."""
        save_trained(tiny_llama(), tmp_path / "a")
        with pytest.raises(OSError, match="File too large") as e:
            merge_run(tmp_path / "a")
        assert e.value.errno == errno.EFBIG and "adapter-merged" in e.value.filename
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]

    def test_another_base_than_the_run_s(
        self, tiny_llama: Make, make_run: Callable[..., RunFolder], tmp_path: Path
    ) -> None:
        """F35, fault 48: the folder the run names now holds other weights."""
        base = Path(shutil.copytree(tiny_llama(), tmp_path / "base"))
        run = make_run("sft", base)
        shutil.copy(tiny_llama(seed=1) / "model.safetensors", base)
        with pytest.raises(ArtifactError, match="another base") as e:
            merge_run(run.path)
        assert weights_sha256(tiny_llama()) in str(e.value) and weights_sha256(base) in str(e.value)

    def test_what_is_there_already(self, tiny_llama: Make, make_run: Callable[..., RunFolder]) -> None:
        run = make_run("sft", tiny_llama())
        merged = merge_run(run.path)
        written = (merged / "model.safetensors").stat().st_mtime_ns
        assert merge_run(run.path) == merged and (merged / "model.safetensors").stat().st_mtime_ns == written
        with pytest.raises(ConfigError, match="is not this merge"):
            merge_run(run.path, dtype="bfloat16")
        with pytest.raises(ConfigError, match="is not this merge"):
            merge_run(run.path, run.path)
        data = bytearray((merged / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (merged / "model.safetensors").write_bytes(data)
        with pytest.raises(ArtifactError, match="has changed"):
            merge_run(run.path)

    def test_no_adapter_and_no_base(self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no adapter to merge"):
            merge_run(tiny_llama())
        base = Path(shutil.copytree(tiny_llama(), tmp_path / "base"))
        save_trained(base, tmp_path / "a")
        shutil.rmtree(base)
        with pytest.raises(ConfigError, match="not found locally"):
            merge_run(tmp_path / "a")

    def test_a_base_beside_a_plain_adapter(
        self, tiny_llama: Make, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """F37: a relative base path means the folder beside the adapter, whatever the working directory."""
        shutil.copytree(tiny_llama(), tmp_path / "base")
        save_trained(tmp_path / "base", tmp_path / "a")
        config = tmp_path / "a" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../base"}))
        assert merge_run(tmp_path / "a").is_dir()


class TestMoreThanLora:
    """Adapters that no role can have, saved by PEFT: their merge answers as they do."""

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"target_modules": r".*self_attn\.(q|v)_proj", "use_dora": True},
        ],
        ids=["DoRA", "saved modules", "embeddings", "DoRA by expression"],
    )
    def test_they_merge(
        self, tiny_llama: Make, saved_by_peft: Make, tmp_path: Path, load: Load, options: dict[str, Any]
    ) -> None:
        theirs = saved_by_peft(tiny_llama(), tmp_path / "theirs", **options)
        merged = load(merge_run(tmp_path / "theirs", model=str(tiny_llama())))
        torch.testing.assert_close(logits(merged.model), logits(theirs), atol=1e-4, rtol=1e-4)
        with pytest.raises(ArtifactError):
            read_adapter(tmp_path / "theirs")
