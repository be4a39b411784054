"""Tokenizers, and files of invented rows written into an empty working directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.records import RowSet, read_rows

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that files are called by their bare names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., str]:
    """write(rows or text or bytes, name="rows.jsonl") -> name."""

    def make(content: list[Any] | str | bytes, name: str = "rows.jsonl") -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode("utf-8") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return name

    return make


@pytest.fixture
def read(write: Callable[..., str]) -> Callable[..., RowSet]:
    """read(rows or text or bytes, kind, name="rows.jsonl", **data) -> RowSet."""

    def make(content: Any, kind: str, name: str = "rows.jsonl", **data: Any) -> RowSet:
        return read_rows(DataConfig(train=(write(content, name),), **data), kind)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def load_byte_tokenizer(tiny_llama: Callable[..., Path]) -> Callable[..., Any]:
    """A new byte-level tokenizer each time: <pad> 0, <s> 1 in front, </s> 2, <unk> 3, byte b behind them."""
    from transformers import AutoTokenizer

    return lambda **options: AutoTokenizer.from_pretrained(tiny_llama(**options))


@pytest.fixture(scope="session")
def tokenizer(load_byte_tokenizer: Callable[..., Any]) -> Any:
    return load_byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer(load_byte_tokenizer: Callable[..., Any]) -> Any:
    """The byte tokenizer with a chat template; <|user|> is a special token (260), <|assistant|> an ordinary added one (261)."""
    from tokenizers import AddedToken

    made = load_byte_tokenizer()
    made.chat_template = CHAT
    made.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    made.add_tokens([AddedToken("<|assistant|>", special=False)])
    return made


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """Whole words between spaces; its vocabulary maps the very words "<s>" and "</s>" to the control tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "name", "a", "bird", "wren"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:4])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
