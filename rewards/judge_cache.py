"""Answers of a judge on disk: one JSON file each, so that a repeated question costs nothing.

Several processes may use one folder at once: a file appears whole (it is written beside and renamed), and two that
write the same key write the same kind of answer. A file that cannot be read counts as missing and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """`judge` in Tandem's cache folder: `$TANDEM_CACHE`, else `~/.cache/tandem` (or under `$XDG_CACHE_HOME`)."""
    root = os.environ.get("TANDEM_CACHE")
    own = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
    return own / "judge"


def cache_key(question: dict[str, Any]) -> str:
    """A name for a question: the SHA-256 of its canonical JSON, in hexadecimal."""
    # Escaped to ASCII, so that half an emoji in a completion has a key too.
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode("ascii")).hexdigest()


class AnswerCache:
    """A folder of answers by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer, or None if there is none that can be read."""
        try:
            answer = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer. Raises OSError if the folder cannot be written."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{key}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            beside.write_text(json.dumps(answer), encoding="ascii")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        # A level of folders keeps each one small.
        return self.folder / key[:2] / f"{key}.json"
