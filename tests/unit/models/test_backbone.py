"""Loading bases and reward models (F5, F11, F12, F26, F36; faults 44, 47, 52-54)."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    CTRLConfig,
    Gemma2Config,
    GraniteConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    PhimoeConfig,
    PixtralVisionConfig,
)

from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError, InvariantError, ResourceError
from rlhf_ray.models import loading
from rlhf_ray.models.backbone import Backbone, base_files, trunk
from rlhf_ray.models.heads import LogitsHead, ScalarHead, scalar_head
from rlhf_ray.models.loading import LoadPlan, no_dropout, plan_load, restore_dropout
from rlhf_ray.models.sources import resolve_source

from .conftest import IDS, hidden, logits

Load = Callable[..., Backbone]
Make = Callable[..., Path]


_SMALL: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
RANDOM_IN_TRAINING: dict[str, Any] = {
    "phimoe": PhimoeConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2, input_jitter_noise=0.1),
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**_SMALL, head_dim=16, attention_dropout=0.1),
        vision_config=PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32
        ),
        image_token_index=10,
    ),
}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestLoading:
    def test_frozen_in_eval_mode_and_complete(self, load: Load, tiny_llama: Make) -> None:
        folder = tiny_llama()
        base = load(folder)
        assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
        assert (base.dtype, base.attn_implementation, base.context_length) == (torch.float32, "sdpa", 256)
        assert (base.pad_id, base.eos_ids, base.hidden_size) == (0, (2,), 64)
        identity = base.identity
        assert (identity.path, identity.revision, identity.precision) == (str(folder), None, "float32")
        assert set(identity.manifest()) == {"path", "revision", "config_sha256", "weights_sha256", "precision"}

    def test_equal_to_plain_transformers(self, load: Load, tiny_llama: Make) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama())
        assert torch.equal(logits(load(tiny_llama()).model), logits(plain))

    def test_dropout_is_off_even_in_training_mode(self, load: Load, tiny_gpt2: Make) -> None:
        """F5: a stray .train() must not make two passes over one batch differ."""
        model = load(tiny_gpt2(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)).model
        expected = logits(model)
        model.train()
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("family", sorted(RANDOM_IN_TRAINING))
    def test_no_family_is_random_in_training(self, load: Load, tiny_llama: Make, tmp_path: Path, family: str) -> None:
        """Dropout in a config inside the config, jitter of routers: DPO did not begin at ln 2, nor PPO with a ratio of 1."""
        model = AutoModelForImageTextToText if family == "mistral3" else AutoModelForCausalLM
        torch.manual_seed(0)
        model.from_config(RANDOM_IN_TRAINING[family]).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama() / file, tmp_path)
        base = load(tmp_path).model
        expected = logits(base)
        base.train()
        assert torch.equal(logits(base), expected) and torch.equal(logits(base), expected)

    def test_dropout_inside_a_config_is_put_back(self) -> None:
        """Into a copy of the whole, or of its text config, which is what a wrapper's reward model is merged as."""
        config = copy.deepcopy(RANDOM_IN_TRAINING["mistral3"])
        config.vision_config.attention_dropout = 0.2
        rates = no_dropout(config)
        assert rates == {"text_config.attention_dropout": 0.1, "vision_config.attention_dropout": 0.2}
        whole, text = copy.deepcopy(config), copy.deepcopy(config.text_config)
        assert (whole.text_config.attention_dropout, whole.vision_config.attention_dropout) == (0, 0)
        for each in (whole, text):
            restore_dropout(each, rates)
        assert (whole.text_config.attention_dropout, whole.vision_config.attention_dropout) == (0.1, 0.2)
        assert text.attention_dropout == 0.1

    @pytest.mark.parametrize("stored", ["float32", "bfloat16"])
    def test_auto_precision_on_the_cpu_is_float32(self, load: Load, tiny_llama: Make, stored: str) -> None:
        assert load(tiny_llama(dtype=stored)).model.dtype is torch.float32
        half = load(tiny_llama(dtype=stored), dtype="bfloat16")
        assert half.model.dtype is torch.bfloat16 and half.identity.precision == "bfloat16"

    def test_auto_precision_on_cuda_is_the_checkpoint_s(self, tiny_llama: Make, tmp_path: Path) -> None:
        """The rule alone; no device is touched. A config that does not say is settled by the largest tensor."""
        folder = Path(shutil.copytree(tiny_llama(dtype="float16"), tmp_path / "m"))
        source = loading.ModelSource(folder, str(folder))
        config = AutoModelForCausalLM.from_pretrained(folder).config
        assert loading._dtype(source, config, "auto", torch.device("cuda")) is torch.float16
        silent = copy.deepcopy(config)
        silent.dtype = None
        assert loading._dtype(source, silent, "auto", torch.device("cuda")) is torch.float16

    def test_stop_token_ids_replace_the_model_s(self, load: Load, tiny_llama: Make) -> None:
        assert load(tiny_llama(), stop_token_ids=(7, 2)).eos_ids == (7, 2)
        with pytest.raises(ConfigError, match="stop_token_ids"):
            load(tiny_llama(), stop_token_ids=(260,))

    def test_a_reply_ends_with_the_turn_of_the_chat_template(self, load: Load, chat_llama: Make) -> None:
        """ChatML on a base whose eos is another token: <|im_end|> (261) first, it ends training data; then eos (2)."""
        base = load(chat_llama())
        chat = load_template("chat", base.tokenizer)
        assert base.eos_ids == (2,) and base.stop_ids(chat) == (261, 2)
        assert base.stop_ids(load_template("none")) == base.stop_ids(load_template("alpaca")) == (2,)
        assert load(chat_llama(), stop_token_ids=(7,)).stop_ids(chat) == (7,)

    def test_what_ends_a_turn_does_not_pad(self, load: Load, chat_llama: Make, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(chat_llama(), tmp_path / "m"))
        edit(folder / "tokenizer_config.json", pad_token="<|im_end|>")
        base = load(folder)
        assert base.tokenizer.pad_token_id == 261 and base.pad_id == 0

    def test_the_class_follows_the_config_not_the_path(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        """F36: a folder called GPT-NeoX that holds a Llama is a Llama."""
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "GPT-NeoX"))
        assert type(load(folder).model).__name__ == "LlamaForCausalLM"


class TestRefusals:
    def test_more_tokens_than_embeddings(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        """Fault 53: otherwise an IndexError in the middle of a run."""
        folder = Path(shutil.copytree(tiny_llama(vocab_size=256), tmp_path / "m"))
        with pytest.raises(ArtifactError, match="at most 256 tokens; got 260") as e:
            load(folder)
        assert e.value.exit_code == 5

    def test_fewer_tokens_than_embeddings_are_fine(self, load: Load, tiny_llama: Make) -> None:
        assert load(tiny_llama(vocab_size=320)).pad_id == 0

    def test_a_model_without_end(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_llama(eos_token_id=None), tmp_path / "m"))
        edit(folder / "tokenizer_config.json", eos_token=None)
        with pytest.raises(ArtifactError, match="no end-of-sequence"):
            load(folder)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"dtype": "float16"}, "float16 needs a GPU"),
            ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
            ({"load_in_8bit": True, "cpu_offload": True}, "cpu_offload"),
        ],
    )
    def test_what_a_cpu_cannot_do(self, load: Load, tiny_llama: Make, fields: dict[str, Any], message: str) -> None:
        """Fault 44: refused before weights are read, exit 3."""
        with pytest.raises(ResourceError, match=message) as e:
            load(tiny_llama(), **fields)
        assert e.value.exit_code == 3

    @pytest.mark.parametrize(
        ("stored", "dtype", "has_bf16", "trains", "expected"),
        [
            (torch.float16, "auto", True, True, torch.bfloat16),
            (torch.float16, "auto", True, False, torch.bfloat16),  # served as it was trained
            (torch.float16, "auto", False, False, torch.float16),
            (torch.float16, "auto", False, True, None),
            (torch.bfloat16, "auto", True, True, torch.bfloat16),
            (torch.float32, "auto", True, True, torch.float32),
            (torch.float32, "float16", True, True, None),
            (torch.float32, "float16", True, False, torch.float16),
        ],
    )
    def test_float16_is_not_trained(
        self, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, dtype: str,
        has_bf16: bool, trains: bool, expected: Any,
    ) -> None:  # fmt: skip
        """Without a scaled loss most gradients are below its smallest number: nothing would be learnt, in silence. By device: CUDA
        is asked for nothing before weights are read."""
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        edit(folder / "config.json", dtype=str(stored).removeprefix("torch."))

        def planned() -> LoadPlan:
            return plan_load(resolve_source(str(folder)), dtype, "auto", None, False, "cuda:0", trains)

        if expected is None:
            with pytest.raises(ResourceError, match=r"dtype: float16 is not trained.*set dtype=bfloat16, or float32"):
                planned()
        else:
            assert (planned().dtype, planned().attn) == (expected, "sdpa")

    def test_a_model_without_sdpa_is_eager_unless_sdpa_is_asked_for(
        self, load: Load, tiny_llama: Make, tmp_path: Path
    ) -> None:
        """Gemma 2 caps its attention scores, which sdpa cannot: transformers refuses it."""
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(Gemma2Config(**_SMALL, head_dim=16)).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama() / file, tmp_path)
        base = load(tmp_path)
        assert (base.attn_implementation, base.model.config._attn_implementation) == ("eager", "eager")
        with pytest.raises(ArtifactError, match=r"does not support .*scaled_dot_product_attention"):
            load(tmp_path, attn_implementation="sdpa")

    def test_missing_and_damaged_weights(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        edit(folder / "config.json", num_hidden_layers=3)
        with pytest.raises(ArtifactError, match=r"missing model\.layers\.2"):
            load(folder)
        edit(folder / "config.json", num_hidden_layers=2, hidden_size=32)
        with pytest.raises(ArtifactError) as e:
            load(folder)
        assert len(e.value.lines()) == 1
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        edit(folder / "config.json", hidden_size=64)
        with pytest.raises(ArtifactError, match="cannot be loaded"):
            load(folder)

    def test_a_damaged_tokenizer(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text[: len(text) // 2])
        with pytest.raises(ArtifactError) as e:
            load(folder)
        assert len(e.value.lines()) == 1

    def test_an_unknown_architecture(self, load: Load, tiny_llama: Make, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        edit(folder / "config.json", model_type="no_such_type", architectures=["NoSuchForCausalLM"])
        with pytest.raises(ArtifactError) as e:
            load(folder)
        assert len(e.value.lines()) == 1

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"hidden_size": "32"}, "hidden_size"),
            ({"num_hidden_layers": None}, "num_hidden_layers"),
            ({"num_attention_heads": 3, "head_dim": None}, "number of attention heads"),
            ({"layer_types": ["full_attention"]}, "layer_types"),
            ({"eos_token_id": "x"}, "eos_token_id"),
            ({"rope_parameters": [1]}, "rope_parameters"),
            ({"max_position_embeddings": 256.0}, "max_position_embeddings"),
        ],
    )
    def test_a_config_that_transformers_refuses(
        self, load: Load, tiny_llama: Make, tmp_path: Path, values: dict[str, Any], named: str
    ) -> None:
        """Its own kind of error, of no kind that Python has: it was told as a bug of ours."""
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        edit(folder / "config.json", **values)
        with pytest.raises(ArtifactError, match=named) as e:
            load(folder)
        assert e.value.exit_code == 5 and len(e.value.lines()) == 1 and "Error: " in str(e.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"eos_token_id": [2, 7]', "cannot be read as JSON"),
            ('{"eos_token_id": "x"}', "whole numbers below 260"),
            ("[]", "a JSON object"),
        ],
    )
    def test_a_damaged_generation_config(
        self, load: Load, tiny_llama: Make, tmp_path: Path, text: str, message: str
    ) -> None:
        """transformers passes over it in silence, and with it over the stop tokens that it names."""
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "m"))
        (folder / "generation_config.json").write_text(text)
        for read in (load, lambda path: base_files(str(path), None, "auto", "cpu", None)):
            with pytest.raises(ArtifactError, match=f"generation_config.json.*{message}"):
                read(folder)


class TestHeads:
    @pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
    def test_trunk_and_head_make_the_logits(self, load: Load, family: str, request: pytest.FixtureRequest) -> None:
        base = load(request.getfixturevalue(family)())
        with torch.no_grad():
            assert torch.equal(base.lm_head(hidden(base.model)), logits(base.model))

    def test_capped_and_scaled_logits(self, tiny_llama: Make, load: Load, tmp_path: Path) -> None:
        """Gemma 2 caps its logits and Granite divides them: log-probabilities from the bare output layer would be wrong."""
        shape: dict[str, Any] = {
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        }
        configs = {
            "gemma": Gemma2Config(**shape, final_logit_softcapping=2.0, initializer_range=0.5),
            "granite": GraniteConfig(**shape, logits_scaling=8.0, initializer_range=0.5),
        }
        for name, config in configs.items():
            folder = tmp_path / name
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_llama() / file, folder)
            base = load(folder)
            assert isinstance(base.lm_head, LogitsHead) and base.lm_head.out_features == 260
            with torch.no_grad():
                found, bare = base.lm_head(hidden(base.model)), base.lm_head.output_layer(hidden(base.model))
            torch.testing.assert_close(found, logits(base.model))
            assert (bare - found).abs().max() > 0.1

    def test_an_unknown_treatment_of_logits_is_refused(self, load: Load, tiny_llama: Make, monkeypatch: Any) -> None:
        from transformers import LlamaForCausalLM

        plain = LlamaForCausalLM.forward

        def squared(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, *args, **kwargs)
            out.logits = out.logits**2
            return out

        monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
        with pytest.raises(ArtifactError, match="its logits are not its output layer"):
            load(tiny_llama())

    def test_the_scalar_head_is_zero_or_a_copy_and_float32(self) -> None:
        assert ScalarHead(4)(torch.randn(2, 3, 4)).eq(0).all()
        head = ScalarHead(4, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        out = head(torch.ones(2, 3, 4, dtype=torch.bfloat16))
        assert out.shape == (2, 3) and out.dtype is torch.float32 and out.eq(10).all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            third = head(torch.full((1, 4), 1 / 3)).detach()
        assert third.dtype is torch.float32 and abs(float(third) - 10 / 3) < 1e-6
        with pytest.raises(ArtifactError, match="wrong shape"):
            ScalarHead(4, torch.ones(1, 5))


class TestClassifiers:
    @pytest.fixture
    def reward_model(self, tiny_llama: Make, tmp_path: Path) -> Callable[..., Path]:
        def make(**config: Any) -> Path:
            folder = tmp_path / "reward"
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(), **{"num_labels": 1, **config})
            model.save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_llama() / file, folder)
            return folder

        return make

    def test_a_reward_model_loads_with_its_head(self, load_reward: Load, reward_model: Make) -> None:
        base = load_reward(reward_model(pad_token_id=0))
        assert base.head is None and base.model.score.weight.shape == (1, 64)  # type: ignore[union-attr]
        with pytest.raises(InvariantError, match="no language-model head"):
            _ = base.lm_head
        plain = AutoModelForSequenceClassification.from_pretrained(reward_model(pad_token_id=0))
        with torch.no_grad():
            expected = plain(IDS).logits[:, 0]
            head = ScalarHead(64, base.model.score.weight.detach())  # type: ignore[union-attr]
            torch.testing.assert_close(head(hidden(base.model)[:, -1]), expected)
        assert trunk(base.model) is base.model.model  # type: ignore[union-attr]

    def test_a_causal_lm_is_no_reward_model(self, load_reward: Load, tiny_llama: Make) -> None:
        """Fault 54, F26: transformers would make a random score head and warn."""
        with pytest.raises(ArtifactError, match="score head newly initialised") as e:
            load_reward(tiny_llama())
        assert e.value.exit_code == 5 and "score.weight" in str(e.value)

    def test_two_labels_are_the_log_odds_of_the_second(self, load_reward: Load, reward_model: Make) -> None:
        """F26: reading label 0 of two was the ancestors' random reward."""
        folder = reward_model(num_labels=2, pad_token_id=0)
        base = load_reward(folder)
        with torch.no_grad():
            both = AutoModelForSequenceClassification.from_pretrained(folder)(IDS).logits
            found = scalar_head(base.model.score)(hidden(base.model)[:, -1])  # type: ignore[arg-type]
        torch.testing.assert_close(found, both[:, 1] - both[:, 0])
        assert "the logit of label 1 minus that of label 0" in base.notes[0]

    def test_three_labels_are_no_reward(self, load_reward: Load, reward_model: Make) -> None:
        with pytest.raises(ArtifactError, match=r"several labels; expected one label, or two; got 3.*reward function"):
            load_reward(reward_model(num_labels=3))

    @pytest.mark.parametrize("pickled", [False, True])
    def test_a_bias_counts_and_what_is_not_used_is_told(
        self, load_reward: Load, reward_model: Make, pickled: bool
    ) -> None:
        """transformers drops a bias that its class does not have, and says so in its log alone."""
        folder = reward_model(pad_token_id=0)
        stored = load_file(folder / "model.safetensors")
        plain = scalar_head(load_reward(folder).model.score)  # type: ignore[arg-type]
        stored |= {"score.bias": torch.tensor([1.5]), "critic.weight": torch.ones(2)}
        if pickled:
            (folder / "model.safetensors").unlink()
            torch.save(stored, folder / "pytorch_model.bin")
        else:
            save_file(stored, folder / "model.safetensors")
        base = load_reward(folder)
        states = hidden(base.model)[:, -1]
        torch.testing.assert_close(scalar_head(base.model.score)(states), plain(states) + 1.5)  # type: ignore[arg-type]
        assert base.notes == (
            "LlamaForSequenceClassification does not use 1 of the checkpoint's tensors: critic.weight",
        )

    def test_a_decoder_with_another_head_has_a_way_out(
        self, load_reward: Load, tiny_llama: Make, tmp_path: Path
    ) -> None:
        config = CTRLConfig(vocab_size=260, n_embd=32, dff=32, n_layer=1, n_head=2, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama() / file, tmp_path)
        with pytest.raises(ArtifactError, match=r"no score head.*CTRLForSequence.*as a Python reward function"):
            load_reward(tmp_path)
