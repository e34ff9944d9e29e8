"""The record of a committed stage: what it was, and what it wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a committed stage was, and the SHA-256 of every file it wrote."""

    stage: str
    key: str
    version: str  # fingerprint of the code that ran
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # name → {stage, key, content}
    rng: dict[str, int] | None  # seed, member, round
    files: dict[str, dict[str, Any]]  # name → {sha256, bytes}

    @property
    def content(self) -> str:
        """Hash of what the stage wrote: what the keys of later stages are made from."""
        return digest({name: file["sha256"] for name, file in self.files.items()})

    def text(self) -> str:
        """As in `manifest.json`, with a checksum of itself."""
        fields = dataclasses.asdict(self)
        return json.dumps(fields | {"checksum": digest(fields)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Raises ValueError unless `text` is, to the byte, what some manifest's `text` returns."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or not fields.pop("checksum", None):
            raise ValueError("no checksum")
        try:
            manifest = cls(**fields)
        except TypeError as error:
            raise ValueError(error) from None
        if manifest.text() != text:
            raise ValueError("its checksum is not that of its text")
        return manifest


class Corrupt(Exception):
    """A committed file is missing or is not what its manifest says."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
