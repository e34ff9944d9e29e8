"""The compiled reader: whole texts in, the hidden state of each one's last token out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from karploop.mesh import batch_sharding, put, replicated, to_host
from karploop.models.weights import Weights
from karploop.sampling.prefix import shared_beginning
from karploop.sampling.sampler import batches
from karploop.sampling.score import last_hidden

_SHORTEST = 32  # tokens; lengths are compiled for this, twice this, and so on


def _silent(count: int) -> None:
    """Tells nobody how far it is."""


class Reader:
    """Reads texts in batches of neighbours in length.

    What all of them begin with is read once for a batch. Hidden states depend on neither, up to
    rounding, nor on the size of a batch.
    """

    def __init__(self, weights: Weights, pad_id: int):
        self._mesh, self._pad_id = weights.mesh, pad_id
        self._room = weights.model.config.max_length
        self._width = weights.model.config.width
        self._prefixes: list[tuple[int, ...]] = []  # longest first
        model, mesh = weights.model, weights.mesh
        rows, whole = batch_sharding(mesh), replicated(mesh)
        self._read = jax.jit(
            lambda params, tokens_BxL, lengths_B, prefix_L: last_hidden(
                model, params, tokens_BxL, lengths_B, prefix_L if len(prefix_L) else None
            ),
            in_shardings=(weights.shardings, rows, rows, whole),
            out_shardings=whole,
        )

    def read(
        self,
        params: Any,
        texts: Sequence[Sequence[int]],
        batch: int,
        advance: Callable[[int], None] = _silent,
    ) -> np.ndarray:
        """hidden_NxE, float32.

        Args:
          texts: token ids of N texts, each at least one and no more than the context holds.
          batch: texts on the device at a time, a multiple of the mesh's parts.
          advance: told after each batch how many texts it had.
        """
        prefix = self._beginning(texts)
        prefix_L = np.array(prefix, np.int32)
        hidden_NxE = np.zeros((len(texts), self._width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for part in batches(len(order), batch):
            at = [order[i] for i in part]
            rests = [texts[i][len(prefix) :] for i in at]
            hidden_NxE[at] = self._batch(params, rests, batch, prefix_L)[: len(at)]
            advance(len(at))
        return hidden_NxE

    def _batch(self, params, rests: list[Sequence[int]], batch: int, prefix_L) -> np.ndarray:
        length = _SHORTEST
        while length < max(map(len, rests)):
            length *= 2
        length = min(length, self._room - len(prefix_L))
        tokens_BxL = np.full((batch, length), self._pad_id, np.int32)
        lengths_B = np.ones(batch, np.int32)
        for row, rest in enumerate(rests):
            tokens_BxL[row, : len(rest)] = rest
            lengths_B[row] = len(rest)
        rows = batch_sharding(self._mesh)
        return to_host(self._read(params, put(tokens_BxL, rows), put(lengths_B, rows), prefix_L))

    def _beginning(self, texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """What all texts begin with, before their last token; () where that is short.

        One that was met before will do. Its length is a power of two, for each is a new program.
        """
        shared = shared_beginning(texts)
        for prefix in self._prefixes:
            if shared[: len(prefix)] == prefix:
                return prefix
        if len(texts) < 2 or len(shared) < _SHORTEST:
            return ()
        found = shared[: 1 << (len(shared).bit_length() - 1)]
        self._prefixes = sorted([*self._prefixes, found], key=len, reverse=True)
        return found
