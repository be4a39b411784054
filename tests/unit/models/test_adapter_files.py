"""The gate that adapters pass, and the save that checks itself (F18, F25, F39; faults 31, 33-37, 49, 50; section 5)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.errors import ArtifactError, InvariantError
from rlhf_ray.models.adapter_files import BIAS_KEY, HEAD_KEY, adapter_sha256, read_adapter, save_adapter
from rlhf_ray.models.adapter_pool import AdapterPool
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, wrap
from rlhf_ray.models.merge_by_peft import read_for_merge

from .conftest import IDS, hidden, logits

Make = Callable[..., Path]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
CONFIG = {
    "r": 2,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
    "target_parameters": [],
    "use_rslora": False,
    "fan_in_fan_out": False,
}


def tensors(value: float = 0.5) -> dict[str, Tensor]:
    return {A: torch.full((2, 6), 0.25), B: torch.full((4, 2), value)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", tensors(), CONFIG, "CAUSAL_LM", None, "/models/base", "abc123")
    return tmp_path / "adapter"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    found = load_file(folder / "adapter_model.safetensors")
    edit(found)
    save_file(found, folder / "adapter_model.safetensors")


class TestReading:
    def test_what_was_saved_is_read(self, folder: Path) -> None:
        files = read_adapter(folder)
        assert files.config == {
            **CONFIG,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "/models/base",
            "revision": "abc123",
        }
        assert files.tensors.keys() == {A, B} and files.head is None
        assert files.sha256 == adapter_sha256(tensors()) and files.path == str(folder)

    def test_the_hash_is_of_values_not_of_the_number_format(self, folder: Path) -> None:
        before = read_adapter(folder).sha256
        change_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        files = read_adapter(folder)
        assert files.sha256 == before and files.tensors[A].dtype is torch.float32

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("r", 0),
            ("r", -1),
            ("r", 8.5),
            ("r", True),
            ("r", 100_000),
            ("lora_alpha", -4),
            ("lora_alpha", float("nan")),
            ("lora_alpha", "16"),
            ("lora_dropout", -1),
            ("lora_dropout", 1),
            ("peft_type", "LOHA"),
            ("task_type", "SEQ_2_SEQ_LM"),
            ("target_modules", ["(a+)+$"]),
            ("target_modules", ["q_proj", "(a|a)*"]),
            ("target_modules", []),
            ("target_modules", None),
            ("bias", "all"),
            ("modules_to_save", ["embed_tokens"]),
            ("modules_to_save", ["score"]),
            ("base_model_name_or_path", 7),
            ("use_dora", True),
            ("init_lora_weights", "pissa"),
            ("init_lora_weights", "olora"),
            ("rank_pattern", {"q_proj": -4}),
            ("rank_pattern", ["q_proj"]),
            ("alpha_pattern", {"(a+)+q_proj": 4}),
            ("trainable_token_indices", [1]),
            ("megatron_config", {"a": 1}),
            ("loftq_config", {"loftq_bits": 4}),
            ("some_future_option", {"on": True}),
        ],
    )
    def test_a_configuration_outside_the_schema(self, folder: Path, field: str, value: Any) -> None:
        change_config(folder, **{field: value})
        start = time.monotonic()
        with pytest.raises(ArtifactError) as e:
            read_adapter(folder)
        assert len(e.value.problems) == 1 and field in e.value.problems[0].where and e.value.exit_code == 5
        assert e.value.problems[0].fix
        assert time.monotonic() - start < 1  # a hostile regular expression is never run

    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": r".*self_attn\.(q|v)_proj"},
            {"target_modules": "(a+)+$"},  # never run: the tensors tell
            {"target_modules": "." * 5_000},
            {"layers_to_transform": [0]},
            {"exclude_modules": "lm_head"},
        ],
        ids=["regex", "hostile", "long", "layers", "excluded"],
    )
    def test_which_modules_are_meant_is_read_off_the_tensors(self, folder: Path, fields: dict[str, Any]) -> None:
        """As PEFT's users write them (issue 16, inputs 19); the whole names stand for what the pattern matched."""
        modules = sorted(
            {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in read_adapter(folder).tensors}
        )
        change_config(folder, **fields)
        start = time.monotonic()
        assert read_adapter(folder).config["target_modules"] == modules
        assert time.monotonic() - start < 1

    def test_all_problems_at_once(self, folder: Path) -> None:
        change_config(folder, r=0, lora_alpha=-1, use_dora=True)
        with pytest.raises(ArtifactError) as e:
            read_adapter(folder)
        assert len(e.value.problems) == 3

    @pytest.mark.parametrize(
        ("option", "reason"),
        [
            ({"use_dora": True}, "DoRA makes a token's result depend on the whole weight"),
            ({"init_lora_weights": "pissa"}, "expected one that leaves the base unchanged; got 'pissa'"),
        ],
    )
    def test_dora_and_pissa_are_refused_with_the_reason(
        self, folder: Path, option: dict[str, Any], reason: str
    ) -> None:
        change_config(folder, **option)
        with pytest.raises(ArtifactError, match=reason):
            read_adapter(folder)

    def test_the_form_of_older_peft_is_read(self, folder: Path) -> None:
        """What peft 0.11 wrote, as the ancestors' folders hold it."""
        (folder / "adapter_config.json").write_text(
            json.dumps(
                {
                    "alpha_pattern": {},
                    "auto_mapping": None,
                    "base_model_name_or_path": "meta/llama",
                    "bias": "none",
                    "fan_in_fan_out": False,
                    "inference_mode": True,
                    "init_lora_weights": True,
                    "layer_replication": None,
                    "layers_pattern": None,
                    "layers_to_transform": None,
                    "loftq_config": {},
                    "lora_alpha": 16,
                    "lora_dropout": 0.05,
                    "megatron_config": None,
                    "megatron_core": "megatron.core",
                    "modules_to_save": None,
                    "peft_type": "LORA",
                    "r": 2,
                    "rank_pattern": {},
                    "revision": None,
                    "target_modules": ["v_proj", "q_proj"],
                    "task_type": "CAUSAL_LM",
                    "use_dora": False,
                    "use_rslora": False,
                }
            )
        )
        config = read_adapter(folder).config
        assert (config["lora_alpha"], config["lora_dropout"], config["target_modules"]) == (
            16.0,
            0.05,
            ["q_proj", "v_proj"],
        )

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.clear(), "the adapter is empty"),
            (lambda t: t.pop(B), "lora_B is missing"),
            (lambda t: t.update({A: torch.zeros(3, 6)}), r"wrong shape; expected \(2, in\)"),
            (lambda t: t.update({B: torch.zeros(2, 4)}), r"wrong shape; expected \(out, 2\)"),
            (lambda t: t.update({A: torch.zeros(2, 0)}), "wrong shape"),
            (lambda t: t.update({A: torch.zeros(2)}), "wrong shape"),
            (lambda t: t.update({B: torch.full((4, 2), torch.nan)}), "not finite"),
            (lambda t: t.update({A: torch.full((2, 6), torch.inf)}), "not finite"),
            (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(2)}), "unexpected tensor"),
            (lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): torch.ones(4)}), "unexpected tensor"),
            (lambda t: t.update({HEAD_KEY: torch.ones(1, 6)}), "unexpected tensor"),
            (lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int64)}), "wrong number format"),
        ],
    )
    def test_wrong_tensors(self, folder: Path, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
        change_tensors(folder, edit)
        with pytest.raises(ArtifactError, match=message):
            read_adapter(folder)

    def test_a_damaged_file(self, folder: Path) -> None:
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[:-1])
        with pytest.raises(ArtifactError, match="is damaged"):
            read_adapter(folder)

    def test_links_pickles_and_strangers(self, folder: Path, tmp_path: Path) -> None:
        outside = tmp_path / "w.safetensors"
        shutil.move(folder / "adapter_model.safetensors", outside)
        (folder / "adapter_model.safetensors").symlink_to(outside)
        with pytest.raises(ArtifactError, match="plain file"):
            read_adapter(folder)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ArtifactError, match="file is missing"):
            read_adapter(folder)
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
        with pytest.raises(ArtifactError, match="a pickle can run code"):
            read_adapter(folder)
        (folder / "adapter_model.bin").unlink()
        shutil.move(outside, folder / "adapter_model.safetensors")
        (folder / "install.sh").write_text("rm")
        with pytest.raises(ArtifactError, match=r"install\.sh"):
            read_adapter(folder)

    def test_a_trainer_s_folder_is_an_adapter_folder(self, folder: Path) -> None:
        before = read_adapter(folder).sha256
        for name in (
            "README.md",
            "optimizer.pt",
            "rng_state_0.pth",
            "training_args.bin",
            "latest",
            "zero_to_fp32.py",
            "events.out.tfevents.1764412345.host.17.0",
            "tokenizer.json",
            "chat_template.jinja",
            "qwen.tiktoken",
            "optimizer.bin",
            "scheduler.bin",
            "sampler.bin",
            "sampler_1.bin",
            "dl_state_dict.bin",
            "random_states_0.pkl",
            "custom_checkpoint_0.pkl",
            "training_loss.png",
            "logo.svg",
            "debug.log",
            "dpo_metrics.csv",
            ".gitignore",
            ".gitattributes",
        ):
            (folder / name).write_bytes(b"never opened")
        assert read_adapter(folder).sha256 == before


class TestAdaptersByOthers:
    """Saved by PEFT itself; they answer here as they do there."""

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": r".*self_attn\.(q|v)_proj"},
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}},
            {
                "target_modules": ["q_proj", "v_proj"],
                "alpha_pattern": {r".*\.q_proj": 4, "^model.layers.1.self_attn.v_proj": 3},
            },
            {"target_modules": "all-linear", "rank_pattern": {r"layers\.0\.mlp\.up_proj": 9}, "use_rslora": True},
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.(0|5)\.self_attn\.[qk]_proj": 4}},
            {
                "target_modules": ["q_proj", "v_proj"],
                "alpha_pattern": {"^v_proj": 32, "^layers.0.self_attn.v_proj": 64, "self.attn.q_proj": 3, "no_such": 5},
            },
            {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 32, "v_proj$": 5}},
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
            {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        ],
        ids=[
            "expression",
            "ranks",
            "alphas",
            "ranks, rsLoRA",
            "ranks by an expression",
            "anchored",
            "first counts",
            "layers",
            "layer 0",
            "excluded",
        ],
    )
    def test_modules_and_scales_of_their_own(
        self, tiny_llama: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama())
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **options)).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        theirs.save_pretrained(tmp_path / "theirs")
        expected = logits(theirs)
        files = read_adapter(tmp_path / "theirs")
        ours = wrap(AutoModelForCausalLM.from_pretrained(tiny_llama()), files, "policy").eval()
        torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-4)
        sha256 = save_adapter(
            tmp_path / "ours",
            adapter_tensors(ours, "policy"),
            adapter_config(ours, "policy"),
            "CAUSAL_LM",
            None,
            "base",
        )
        assert sha256 == files.sha256
        again = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama()), str(tmp_path / "ours")
        )
        torch.testing.assert_close(logits(again.eval()), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(("labels", "has_bias"), [(1, False), (1, True), (2, False), (2, True)])
    def test_reward_heads_of_one_label_or_two(
        self, tiny_llama: Callable[..., Path], tmp_path: Path, labels: int, has_bias: bool
    ) -> None:
        """What PEFT and transformers answer: the logit, or that of label 1 minus that of label 0."""
        base = AutoModelForSequenceClassification.from_pretrained(tiny_llama(), num_labels=labels, pad_token_id=0)
        base.score = torch.nn.Linear(base.config.hidden_size, labels, bias=has_bias)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        theirs = peft.get_peft_model(base, config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or name.endswith("score.modules_to_save.default.bias"):
                torch.nn.init.normal_(parameter, std=0.05)
        theirs.save_pretrained(tmp_path / "theirs")
        with torch.no_grad():
            found = theirs(IDS).logits
        expected = found[:, 0] if labels == 1 else found[:, 1] - found[:, 0]
        files = read_adapter(tmp_path / "theirs")
        model = wrap(AutoModelForCausalLM.from_pretrained(tiny_llama()), files, "reward").eval()
        ours = files.scalar_head(64)(hidden(model)[:, -1])
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        assert ("two labels" in "".join(files.notes)) is (labels == 2)
        assert (files.sha256 != adapter_sha256(files.tensors, files.head)) is has_bias  # another bias, another reward
        AdapterPool(model).pack(files)  # as a service packs it, and compares it with the hash

    @pytest.mark.parametrize(
        ("head", "bias", "message"),
        [
            (torch.ones(3, 6), None, "has several labels; expected one label, or two; got 3; fix: .*Python reward"),
            (torch.ones(6), None, r"score.weight: wrong shape; expected \(labels, hidden size\)"),
            (torch.ones(2, 6), torch.ones(1), r"score.bias: wrong shape; expected \(2,\); got \(1,\)"),
            (None, torch.ones(1), "score.bias: unexpected tensor"),
            (torch.ones(1, 6), torch.tensor([torch.nan]), "score.bias: holds values that are not finite"),
        ],
        ids=["three labels", "shape", "two and one", "alone", "nan"],
    )
    def test_other_heads_are_refused(
        self, folder: Path, head: Tensor | None, bias: Tensor | None, message: str
    ) -> None:
        change_config(folder, task_type="SEQ_CLS")
        named = {key: t for key, t in ((HEAD_KEY, head), (BIAS_KEY, bias)) if t is not None}
        change_tensors(folder, lambda t: t.update(named))
        with pytest.raises(ArtifactError, match=message):
            read_adapter(folder)

    def test_a_hostile_expression_is_not_run(self, folder: Path) -> None:
        change_config(folder, target_modules="(a+)+$" * 20, rank_pattern={"(a+)+q_proj": 2})
        assert read_adapter(folder).config["target_modules"] == [A.split(".lora_")[0].removeprefix("base_model.model.")]


OUR_MERGE = r"use the result as model_name_or_path: rlhf-ray merge, or PEFT's merge_and_unload"
PEFT_MERGE = r"merge it into its base with PEFT's merge_and_unload, and use the result as model_name_or_path"
REWARD_MERGE = r"merge it into its base with PEFT's merge_and_unload, and give the result as a reward's model"
PLAIN_LORA = r"train (plain|a) LoRA( adapter)?: PEFT cannot merge"


class TestWaysOut:
    """Whatever PEFT saves and is not read here says what to do with it."""

    @pytest.mark.parametrize(
        ("fields", "fix"),
        [
            ({"use_dora": True}, OUR_MERGE),
            ({"modules_to_save": ["embed_tokens", "lm_head"]}, OUR_MERGE),
            ({"trainable_token_indices": [1, 2]}, OUR_MERGE),
            ({"use_dora": True, "task_type": "SEQ_CLS"}, REWARD_MERGE),
            ({"modules_to_save": ["score", "embed_tokens"], "task_type": "SEQ_CLS"}, REWARD_MERGE),
            ({"peft_type": "LOHA", "r": 8, "alpha": 8, "target_modules": ["q_proj"]}, PEFT_MERGE),
            ({"peft_type": "IA3", "r": None, "lora_alpha": None, "feedforward_modules": ["down_proj"]}, PEFT_MERGE),
            ({"peft_type": "IA3", "task_type": "SEQ_CLS"}, REWARD_MERGE),
            ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8}, PLAIN_LORA),
            ({"bias": "all"}, PEFT_MERGE),
            ({"bias": "lora_only"}, PEFT_MERGE),
            ({"init_lora_weights": "pissa"}, PEFT_MERGE),
            ({"init_lora_weights": "pissa_niter_4"}, PEFT_MERGE),
            ({"init_lora_weights": "olora"}, PEFT_MERGE),
            ({"init_lora_weights": "loftq", "task_type": "SEQ_CLS"}, REWARD_MERGE),
            ({"lora_bias": True}, PEFT_MERGE),
            ({"layer_replication": [[0, 2], [1, 2]]}, PLAIN_LORA),
            ({"alora_invocation_tokens": [5, 6]}, PLAIN_LORA),
            ({"alpha_pattern": {r"layers\.(0|1)\.self_attn\.q_proj": 4}}, PEFT_MERGE),
            ({"target_parameters": ["mlp.experts.gate_up_proj"], "rank_pattern": {"q_proj": 4}}, PEFT_MERGE),
            ({"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ".*q_proj"}, PEFT_MERGE),
            ({"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": None}, PEFT_MERGE),
            ({"r": 2048}, PEFT_MERGE),
            ({"task_type": "FEATURE_EXTRACTION"}, "write CAUSAL_LM there"),
        ],
        ids=str,
    )
    def test_of_a_configuration(self, folder: Path, fields: dict[str, Any], fix: str) -> None:
        change_config(folder, **fields)
        with pytest.raises(ArtifactError, match=rf"fix: [^\n]*{fix}[^\n]*$") as e:
            read_adapter(folder)
        assert len(e.value.problems) == 1

    @pytest.mark.parametrize(
        ("key", "task", "fix"),
        [
            ("base_model.model.model.embed_tokens.lora_embedding_A", "CAUSAL_LM", OUR_MERGE),
            ("base_model.model.model.embed_tokens.weight", "CAUSAL_LM", PEFT_MERGE),
            ("base_model.model.classifier.weight", "SEQ_CLS", REWARD_MERGE),
        ],
    )
    def test_of_tensors(self, folder: Path, key: str, task: str, fix: str) -> None:
        change_config(folder, task_type=task)
        change_tensors(folder, lambda t: t.update({key: torch.ones(2, 6)}))
        with pytest.raises(ArtifactError, match=f"unexpected tensor.*{fix}"):
            read_adapter(folder)

    @pytest.mark.parametrize("pattern", [{"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}])
    def test_of_what_our_merge_refuses(self, folder: Path, pattern: dict[str, Any]) -> None:
        change_config(folder, use_dora=True, **pattern)
        with pytest.raises(ArtifactError, match=f"is not merged here; fix: {PEFT_MERGE}"):
            read_for_merge(folder)

    def test_it_leads_out(self, tiny_llama: Callable[..., Path], load: Callable[..., Any], tmp_path: Path) -> None:
        """PiSSA by the way out: PEFT merges it, and the result is a base that answers as the adapter does there."""
        base = AutoModelForCausalLM.from_pretrained(tiny_llama())
        config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(base, config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.05
        theirs.save_pretrained(tmp_path / "theirs")
        with pytest.raises(ArtifactError, match=PEFT_MERGE):
            read_adapter(tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama()), str(tmp_path / "theirs")
        )
        shutil.copytree(tiny_llama(), tmp_path / "merged")
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(load(tmp_path / "merged").model), logits(theirs), atol=1e-4, rtol=1e-4)


class TestSaving:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "the adapter is empty"),
            ({A: torch.empty(0), B: torch.empty(0)}, "wrong shape"),
            ({A: torch.ones(2, 6), B: torch.full((4, 2), torch.nan)}, "not finite"),
            ({A: torch.ones(2, 6)}, "lora_B is missing"),
        ],
    )
    def test_nothing_is_written_that_could_not_be_loaded(
        self, tmp_path: Path, given: dict[str, Tensor], message: str
    ) -> None:
        """F25, empty adapter: the ancestor saved 0 tensors and said nothing. Empty [0] tensors are what ZeRO-3 leaves."""
        with pytest.raises(InvariantError, match=message):
            save_adapter(tmp_path / "a", given, CONFIG, "CAUSAL_LM", None, "/models/base")
        assert not list(tmp_path.iterdir())

    def test_training_must_have_changed_it(self, tmp_path: Path) -> None:
        sha = adapter_sha256(tensors())
        with pytest.raises(InvariantError, match="unchanged"):
            save_adapter(tmp_path / "a", tensors(), CONFIG, "CAUSAL_LM", None, "/b", must_differ_from=sha)
        with pytest.raises(InvariantError, match="every lora_B at zero"):
            save_adapter(tmp_path / "a", tensors(0.0), CONFIG, "CAUSAL_LM", None, "/b", must_differ_from=sha)
        assert save_adapter(tmp_path / "a", tensors(0.1), CONFIG, "CAUSAL_LM", None, "/b", must_differ_from=sha) != sha

    def test_a_bad_save_leaves_the_good_one(self, folder: Path) -> None:
        before = read_adapter(folder).sha256
        with pytest.raises(InvariantError):
            save_adapter(
                folder, {A: torch.ones(2, 6), B: torch.full((4, 2), torch.inf)}, CONFIG, "CAUSAL_LM", None, "/b"
            )
        assert read_adapter(folder).sha256 == before
        sha = save_adapter(folder, tensors(0.75), CONFIG, "CAUSAL_LM", None, "/b")
        assert read_adapter(folder).sha256 == sha != before
        assert [p.name for p in folder.parent.iterdir()] == ["adapter"]

    def test_what_is_on_disk_is_compared_with_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """F25: the reload check. A writer that loses bits does not get away with it."""
        from rlhf_ray.models import adapter_files

        plain = adapter_files.save_tensors

        def lossy(path: Path, given: dict[str, Tensor]) -> None:
            plain(path, {k: v + 1e-3 for k, v in given.items()})

        monkeypatch.setattr(adapter_files, "save_tensors", lossy)
        with pytest.raises(InvariantError, match="not the one in memory"):
            save_adapter(tmp_path / "a", tensors(), CONFIG, "CAUSAL_LM", None, "/b")
        assert not list(tmp_path.iterdir())

    def test_the_head_is_part_of_a_reward_adapter(self, tmp_path: Path) -> None:
        head = torch.tensor([[1.0, 2.0, 3.0]])
        sha = save_adapter(tmp_path / "a", tensors(), CONFIG, "SEQ_CLS", head, "/b")
        files = read_adapter(tmp_path / "a")
        assert files.head is not None and torch.equal(files.head, head) and files.sha256 == sha
        assert sha != adapter_sha256(tensors()) and HEAD_KEY not in files.tensors
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
base, policy, reward, out = sys.argv[1:]
torch.set_num_threads(1)
ids = load_file(out + "/ids.safetensors")["ids"]
with torch.no_grad():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), policy)
    found = {"logits": model(ids).logits}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    found["scores"] = PeftModel.from_pretrained(model, reward)(ids).logits
save_file(found, out + "/found.safetensors")
assert not any(name.startswith("rlhf_ray") for name in sys.modules)
"""


def test_plain_peft_loads_our_adapters_without_us(
    tiny_llama: Make, load: Callable[..., Any], save_trained: Callable[..., str], tmp_path: Path
) -> None:
    """F25, F26, F39: policy and reward adapter, loaded by PEFT alone in a fresh process, answer as they do here."""
    from rlhf_ray.models.adapters import wrap
    from rlhf_ray.models.heads import ScalarHead

    base, head = tiny_llama(), torch.linspace(-1, 1, 64)[None]
    save_trained(base, tmp_path / "policy", use_rslora=True)
    save_trained(base, tmp_path / "reward", head=head)
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    arguments = [str(base), str(tmp_path / "policy"), str(tmp_path / "reward"), str(tmp_path)]
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", PLAIN_PEFT, *arguments], check=True, timeout=300)
    found = load_file(tmp_path / "found.safetensors")
    policy = wrap(load(base).model, read_adapter(tmp_path / "policy"), "policy")
    reward = wrap(load(base).model, read_adapter(tmp_path / "reward"), "reward")
    torch.testing.assert_close(logits(policy), found["logits"])
    with torch.no_grad():
        torch.testing.assert_close(ScalarHead(64, head)(hidden(reward)[:, -1:]), found["scores"])
    assert (logits(load(base).model) - found["logits"]).abs().max() > 0.1
