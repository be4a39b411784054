from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.errors import ArtifactError
from rlhf_ray.storage.files import (
    atomic_replace_folder,
    atomic_save_tensors,
    atomic_write_json,
    atomic_write_text,
    describe_files,
    read_json,
    sha256_file,
    sha256_tensors,
)


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "state.json"
    atomic_write_json(target, {"step": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_json(target, {"step": 2})
    assert read_json(target) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_write_never_follows_a_link_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("keep")
    link = tmp_path / "link.txt"
    link.symlink_to(outside)
    atomic_write_text(link, "new")
    assert outside.read_text() == "keep" and not link.is_symlink() and link.read_text() == "new"


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    """An error that quotes a reply, say: writing why a trial failed must not fail."""
    atomic_write_json(tmp_path / "x.json", {"error": "half \ud83d"})
    assert read_json(tmp_path / "x.json") == {"error": "half \ud83d"}


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("content", ["{", "[1]", "\xff\xfe", ""])
def test_damaged_json_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ArtifactError) as e:
        read_json(path)
    assert len(e.value.lines()) == 1 and str(path) in str(e.value)


def test_tensor_hash_is_the_one_of_the_definition() -> None:
    w = torch.tensor([[1.0, 2.0]], dtype=torch.float32)
    expected = hashlib.sha256(b"w\0float32\0(1, 2)\0" + bytes.fromhex("0000803f00000040")).hexdigest()
    assert sha256_tensors({"w": w}) == expected


def test_tensor_hash_sees_name_shape_dtype_and_bits_and_not_layout() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    base = sha256_tensors({"a": w, "b": w + 1})
    assert base == sha256_tensors({"b": w + 1, "a": w.t().contiguous().t()})
    flipped = w.clone()
    flipped[0, 0] = -0.0
    others = [
        {"a": w + 1, "b": w},
        {"a": w.reshape(3, 2), "b": w + 1},
        {"a": w.double(), "b": w + 1},
        {"a": flipped, "b": w + 1},
    ]
    assert base not in {sha256_tensors(o) for o in others}
    scalars = {"s": torch.tensor(3), "e": torch.empty(0), "h": torch.ones(2, dtype=torch.bfloat16)}
    assert len(sha256_tensors(scalars)) == 64


def test_tensors_survive_and_the_file_hash_is_of_its_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3)}
    atomic_save_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    found = load_file(tmp_path / "t.safetensors")
    assert sha256_tensors(found) == sha256_tensors(tensors)
    assert (
        sha256_file(tmp_path / "t.safetensors") == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    )


def test_replacing_a_folder_leaves_exactly_the_new_one(tmp_path: Path) -> None:
    for name, text in (("adapter", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{text}.txt").write_text(text)
    atomic_replace_folder(tmp_path / "new", tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["new.txt"]


def test_only_plain_files_are_described(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("abc")
    assert describe_files(tmp_path) == {"sub/a.txt": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}}
    assert json.dumps(describe_files(tmp_path))
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="plain files"):
        describe_files(tmp_path)
