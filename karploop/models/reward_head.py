"""A linear head that turns a hidden state into a reward, and its file."""

from __future__ import annotations

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from karploop.files import write_atomic

HEAD = "head.safetensors"


class RewardHead(NamedTuple):
    """One number of a hidden state of E entries: their product with a vector, plus an offset."""

    weights_E: np.ndarray  # float32
    offset: float

    def rewards(self, hidden_NxE: np.ndarray) -> np.ndarray:
        """rewards_N, float64.

        Single entries of hidden states are hundreds of times larger than the differences that
        count, so that in float32 the product would lose these.
        """
        return hidden_NxE.astype(np.float64) @ self.weights_E.astype(np.float64) + self.offset

    def save(self, path: pathlib.Path) -> str:
        """Writes a safetensors file; returns its SHA-256 (hex)."""
        arrays = {"weights": self.weights_E, "offset": np.array(self.offset, np.float64)}
        data = safetensors.numpy.save(arrays)
        write_atomic(path, data)
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: pathlib.Path) -> RewardHead:
        arrays = safetensors.numpy.load_file(path)
        return cls(arrays["weights"], float(arrays["offset"]))
