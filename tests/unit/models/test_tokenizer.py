"""Pad, end and identity of tokenizers (F11, F12, F27; faults 51-53)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.tokenizer import choose_pad, eos_ids, load_tokenizer, tokenizer_sha256, vocabulary_rows


def words(*tokens: str, special: tuple[str, ...] = (), **names: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `names`: eos_token, pad_token, ..."""
    vocabulary = {t: i for i, t in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=names.get("unk_token", tokens[0])))
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


class TestPad:
    def test_the_tokenizer_s_own_pad_where_it_is_not_the_end(self) -> None:
        choice = choose_pad(words("a", "<p>", "</s>", eos_token="</s>", pad_token="<p>"))
        assert (choice.id, choice.token) == (1, "<p>")

    def test_pad_equal_to_eos_is_never_taken(self) -> None:
        """F12, pad = eos. The unknown token stands in, and the reason is told."""
        choice = choose_pad(words("<unk>", "a", "</s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"))
        assert (choice.id, choice.token) == (0, "<unk>") and "its pad is its end token" in choice.why

    def test_a_pad_that_the_generation_config_ends_on_is_not_taken_either(self) -> None:
        choice = choose_pad(
            words("<unk>", "<p>", "</s>", eos_token="</s>", pad_token="<p>", unk_token="<unk>"), eos=(1,)
        )
        assert choice.token == "<unk>"

    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [
            (("<unk>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
            (("<unk>", "<|reserved_special_token_3|>", "[PAD]"), "[PAD]"),
            (("<unk>", "<|reserved_special_token_0|>", "pad"), "<|reserved_special_token_0|>"),
            (("<unk>", "a", "padding"), "<unk>"),
        ],
    )
    def test_order_of_preference(self, tokens: tuple[str, ...], expected: str) -> None:
        assert choose_pad(words(*tokens, "</s>", eos_token="</s>", unk_token="<unk>")).token == expected

    def test_without_any_candidate_an_ordinary_token_is_masked(self) -> None:
        choice = choose_pad(words("<s>", "</s>", "b", "c", bos_token="<s>", eos_token="</s>"))
        assert (choice.id, choice.token) == (2, "b") and "always masked" in choice.why

    def test_nothing_left(self) -> None:
        with pytest.raises(ArtifactError, match="every token"):
            choose_pad(words("a", "b", eos_token="b"), eos=(0,))

    def test_the_vocabulary_is_never_resized(self, tiny_llama: Callable[..., Path]) -> None:
        tokenizer = load_tokenizer(str(tiny_llama(pad="</s>")))
        before = len(tokenizer)
        choice = choose_pad(tokenizer)
        assert choice.token == "<pad>" and choice.id < before == len(tokenizer)


class TestEnd:
    TOKENS = words("<unk>", "<s>", "</s>", "a", eos_token="</s>", bos_token="<s>")

    def test_tokenizer_first_then_generation_config(self) -> None:
        """F27, and the trap of a model that ends its texts with <s>."""
        assert eos_ids(self.TOKENS, GenerationConfig(eos_token_id=[1, 2]), None) == (2, 1)
        assert eos_ids(self.TOKENS, GenerationConfig(eos_token_id=1), None) == (2, 1)
        assert eos_ids(self.TOKENS, None, None) == (2,)

    def test_an_override_replaces_both(self) -> None:
        assert eos_ids(self.TOKENS, GenerationConfig(eos_token_id=1), (3, 3)) == (3,)

    @pytest.mark.parametrize("override", [(100_000,), (-1,), (4,), ()])
    def test_a_foreign_stop_id_is_rejected(self, override: tuple[int, ...]) -> None:
        """F27, eos id wrong: 100000 is somebody else's end token, and an ordinary word here."""
        with pytest.raises(ConfigError, match="stop_token_ids"):
            eos_ids(self.TOKENS, None, override)

    def test_a_foreign_id_in_the_generation_config_is_an_artefact_s_fault(self) -> None:
        with pytest.raises(ArtifactError, match="not in the vocabulary"):
            eos_ids(self.TOKENS, GenerationConfig(eos_token_id=100_000), None)

    @pytest.mark.parametrize("found", ["x", ["2"], [[2]], 2.0, True])
    def test_an_end_token_is_a_whole_number(self, found: Any) -> None:
        """As a damaged file may have it; it was a TypeError, and 2.0 an id."""
        with pytest.raises(ArtifactError, match=r"generation_config\.json.*whole numbers below 4"):
            eos_ids(self.TOKENS, SimpleNamespace(eos_token_id=found), None)  # type: ignore[arg-type]

    def test_no_end_at_all(self) -> None:
        with pytest.raises(ArtifactError, match="no end-of-sequence"):
            eos_ids(words("a", "b"), GenerationConfig(), None)


class TestIdentity:
    def test_pad_is_aside(self, tiny_llama: Callable[..., Path]) -> None:
        own, eos, none = (load_tokenizer(str(tiny_llama(pad=p))) for p in ("<pad>", "</s>", None))
        assert tokenizer_sha256(own) == tokenizer_sha256(eos) == tokenizer_sha256(none)

    def test_an_appended_pad_is_aside_and_any_other_appended_token_is_not(self) -> None:
        plain = words("a", "b", eos_token="b")
        assert tokenizer_sha256(words("a", "b", special=("[PAD]",), eos_token="b")) == tokenizer_sha256(plain)
        assert tokenizer_sha256(words("a", "b", special=("[SYS]",), eos_token="b")) != tokenizer_sha256(plain)

    def test_what_changes_ids_changes_the_hash(self, tiny_llama: Callable[..., Path]) -> None:
        plain = words("a", "b", "c", eos_token="b")
        swapped = words("b", "a", "c", eos_token="b")
        other_end = words("a", "b", "c", eos_token="c")
        lower = words("a", "b", "c", eos_token="b")
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        hashes = {tokenizer_sha256(t) for t in (plain, swapped, other_end, lower)}
        assert len(hashes) == 4
        with_bos, without = (load_tokenizer(str(tiny_llama(bos=b))) for b in (True, False))
        assert tokenizer_sha256(with_bos) != tokenizer_sha256(without)

    def test_using_a_tokenizer_does_not_change_it(self, tiny_llama: Callable[..., Path]) -> None:
        tokenizer = load_tokenizer(str(tiny_llama()))
        before = tokenizer_sha256(tokenizer)
        tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
        assert tokenizer_sha256(tokenizer) == before

    def test_saving_does_not_change_it(self, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
        tokenizer = load_tokenizer(str(tiny_llama()))
        tokenizer.save_pretrained(tmp_path)
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)


def test_bos_stays_as_the_tokenizer_was_made(tiny_llama: Callable[..., Path]) -> None:
    with_bos, without = (load_tokenizer(str(tiny_llama(bos=b))) for b in (True, False))
    assert with_bos("hi").input_ids == [1, *without("hi").input_ids]
    assert vocabulary_rows(with_bos) == 260


def test_a_folder_without_tokenizer(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_llama() / name).read_bytes())
    with pytest.raises(ArtifactError) as e:
        load_tokenizer(str(tmp_path))
    assert len(e.value.lines()) == 1 and e.value.exit_code == 5


def test_a_folder_without_a_tokenizer_is_told_so(tiny_llama: Any, tmp_path: Path) -> None:
    """transformers only lists what it cannot make one of."""
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        ArtifactError, match=r"model: has no tokenizer; expected one of tokenizer.json, .*; fix: save the model's own"
    ):
        load_tokenizer(str(folder))
