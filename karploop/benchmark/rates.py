"""What this machine can do: matrix products at the model's shapes, and moving bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from karploop.benchmark.costs import Rates, Shape

_TOKENS = 2048  # of a product with a layer's matrix
_ROWS = 64  # of a product with the head
_COPIED = 1 << 28  # bytes; more than any cache holds


@dataclass(frozen=True)
class Found:
    """Measured on one device, the best of several calls: a limit is not what was in the way.

    Attributes:
      flops: a second, by product: `up` and `down` of a feed-forward block over 2048 tokens, `head`
        over 64.
      copied: bytes a second, read and written, of an array of 256 MiB.
      read: bytes a second of the head's matrix, in its product with one row: a read without a
        write, which many machines do faster.
    """

    flops: dict[str, float]
    copied: float
    read: float

    def best(self, devices: int = 1) -> Rates:
        """The limit: the fastest product and the faster of both movements, of so many devices."""
        return Rates(devices * max(self.flops.values()), devices * max(self.copied, self.read))


def measure_rates(shape: Shape, repeats: int) -> Found:
    """Measures on the first device; seconds and about 1.5 GB for a vocabulary of 262,144."""
    dtype, width = jnp.dtype(shape.config.dtype), shape.config.width
    head_VxE = jnp.ones((shape.vocabulary, width), dtype)

    def product(rows: int, n_in: int, n_out: int) -> float:
        given = jnp.ones((rows, n_in), dtype), jnp.ones((n_in, n_out), dtype)
        return 2.0 * rows * n_in * n_out / _seconds(jax.jit(jnp.matmul), given, repeats)

    to_head = jax.jit(lambda rows_RxE, matrix_VxE: jnp.einsum("re,ve->rv", rows_RxE, matrix_VxE))
    on_head = {
        rows: _seconds(to_head, (jnp.ones((rows, width), dtype), head_VxE), repeats)
        for rows in (1, _ROWS)
    }
    plain = jnp.ones(_COPIED // 4, jnp.float32)
    moved = _seconds(jax.jit(lambda x: x + 1.0), (plain,), repeats)
    return Found(
        flops={
            "up": product(_TOKENS, *shape.matrices["up"]),
            "down": product(_TOKENS, *shape.matrices["down"]),
            "head": 2.0 * _ROWS * shape.head / on_head[_ROWS],
        },
        copied=2.0 * _COPIED / moved,
        read=shape.head * dtype.itemsize / on_head[1],
    )


def _seconds(function: Callable, given: tuple, repeats: int) -> float:
    """The shortest of several calls, after one that compiles."""
    found = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        jax.block_until_ready(function(*given))
        found.append(time.perf_counter() - started)
    return min(found[1:])
