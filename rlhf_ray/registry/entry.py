"""A promoted adapter on disk: its manifest, and the check that it still is what was promoted."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.templates import Template, template_from_manifest
from rlhf_ray.errors import ArtifactError, Problem
from rlhf_ray.models.adapter_files import CONFIG, WEIGHTS, AdapterFiles, read_adapter
from rlhf_ray.storage.checkpoints import check_schema, verify_files
from rlhf_ray.storage.files import read_json, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
FILES = (CONFIG, WEIGHTS)


@dataclass(frozen=True)
class Entry:
    """A version of an adapter. path: a plain PEFT folder, read-only.  manifest: see registry/manifest.py."""

    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """`helper@v3-1a2b3c4d`."""
        return str(self.manifest["id"])

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def version(self) -> int:
        return int(self.manifest["version"])

    @property
    def kind(self) -> str:
        """policy, sft, dpo or reward."""
        return str(self.manifest["kind"])

    @property
    def sha256(self) -> str:
        """Of the adapter's tensors, as at every hand-over."""
        return str(self.manifest["adapter"]["sha256"])

    @property
    def base(self) -> dict[str, Any]:
        """path, revision, config_sha256, weights_sha256, precision of the base it belongs on."""
        return dict(self.manifest["base"])

    @property
    def stop_token_ids(self) -> tuple[int, ...] | None:
        """What ended a reply in training; None: the end tokens of the base."""
        ids = self.manifest["stop_token_ids"]
        return None if ids is None else tuple(ids)

    def template(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
        """The prompt template it was trained with. tokenizer: of the base, for a chat template. Raises ArtifactError."""
        return template_from_manifest(self.manifest["template"], str(self.path / MANIFEST), tokenizer)

    def load(self) -> AdapterFiles:
        """The adapter through the gate of models/adapter_files.py. ArtifactError if it is not the one that was promoted."""
        files = read_adapter(self.path)
        if files.sha256 != self.sha256:
            raise ArtifactError.at(str(self.path), "is not the adapter that was promoted", self.sha256, files.sha256)
        return files


def open_entry(path: Path, recorded: dict[str, str]) -> Entry:
    """The version in folder `path`, compared byte by byte with what its alias records of it.

    recorded: {id, manifest_sha256}.   ArtifactError naming every file that is missing, changed or does not belong there."""
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        raise ArtifactError.at(str(path), "the folder of this version is missing") from None
    if not stat.S_ISDIR(kind):
        raise ArtifactError.at(str(path), "is not a folder", "the folder of this version")
    manifest = read_json(path / MANIFEST)
    found = sha256_file(path / MANIFEST)
    if found != recorded["manifest_sha256"]:
        raise ArtifactError.at(
            str(path / MANIFEST), "file has changed", f"sha256 {recorded['manifest_sha256']}", f"sha256 {found}"
        )
    check_schema(str(path / MANIFEST), manifest)
    if manifest.get("id") != recorded["id"] or not {*FILES} <= {*manifest.get("files", ())}:
        raise ArtifactError.at(str(path / MANIFEST), "is not the manifest of this version", recorded["id"])
    verify_files(path, manifest)
    known = {MANIFEST, *manifest["files"]}
    foreign = sorted(p.name for p in path.iterdir() if p.name not in known)
    ArtifactError.raise_all(Problem(str(path / name), "does not belong in a promoted adapter") for name in foreign)
    return Entry(path, manifest)
