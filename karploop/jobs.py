"""What the tools for rows of a file are asked for, and the file that they write."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

from karploop.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class GenerateJob:
    """What `experiments.generate` asks for; `n` completions of each row."""

    model: str
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    batch: int = 8
    slots: int = 0
    dtype: str = "float32"
    cache: str = "model"
    weights: str = "model"


@dataclass(frozen=True)
class ScoreJob:
    """What `experiments.score` asks for."""

    model: str
    batch: int = 8
    dtype: str = "float32"


def check_job(job: GenerateJob | ScoreJob) -> None:
    """Raises UserError: a setting out of range."""
    limits = {"n": 1, "max_new_tokens": 1, "batch": 1, "temperature": 0, "top_k": 0, "min_p": 0}
    limits["slots"] = 0
    for name, low in limits.items():
        if getattr(job, name, low) < low:
            raise UserError(f"--{name} must be at least {low}, got {getattr(job, name)}")
    for name in ("top_p", "min_p"):
        if getattr(job, name, 0) > 1:
            raise UserError(f"--{name} must be at most 1, got {getattr(job, name)}")


def identity_of(*what: Any) -> str:
    """A hash of what decides a job's result."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Output:
    """Rows on their way to a file, or to standard output.

    A file is written under a hidden name that holds a hash of the job, and takes its own name when
    it is whole. `done` rows of an earlier attempt are kept.
    """

    def __init__(self, target: str, identity: str):
        self.done = 0
        self._target = None if target == "-" else pathlib.Path(target)
        if self._target is None:
            self._file = sys.stdout
            return
        name = f".{self._target.name}.{identity[:16]}.partial"
        self._partial = self._target.with_name(name)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._partial, "a+", encoding="utf-8")  # noqa: SIM115, closed by __exit__
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind("\n") + 1]  # a kill may have torn the last line
        self.done = whole.count("\n")
        self._file.truncate(len(whole.encode()))

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind, *_) -> None:
        self.flush()
        if self._target is None:
            return
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._target)
