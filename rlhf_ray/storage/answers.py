"""What servers and judges have answered, by content: asked again, it is read and not paid for twice, and a resumed run gets the
very answer that it got before.

One small file per answer, `<first two digits>/<sha256 of the question>.json`. Processes and nodes that share the folder agree: the
first answer to a question stays, and whoever comes second takes that one instead of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_ray.storage.files import fsync_path, temporary_beside

MISSING = object()


def digest(question: Any) -> str:
    """sha256 of `question`, JSON values, whatever the order of its keys."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Answers:
    """folder: made when the first answer is kept."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def get(self, key: str) -> Any:
        """The answer kept under `key` (of `digest`), or MISSING. A damaged file counts as missing."""
        try:
            found = json.loads(self._path(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return MISSING
        return found["answer"] if isinstance(found, dict) and "answer" in found else MISSING

    def keep(self, key: str, answer: Any) -> Any:
        """Keep `answer`, JSON, flushed to disk. Returns the answer that is kept: another one if somebody was faster. OSError if it
        cannot be written."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            with open(temporary, "xb") as file:
                file.write(json.dumps({"answer": answer}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename it does not replace an answer that is there
            except FileExistsError:
                if (kept := self.get(key)) is not MISSING:
                    return kept
                os.replace(temporary, path)  # a damaged one
            except OSError:  # a file system without links
                os.replace(temporary, path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return answer

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
