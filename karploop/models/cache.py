"""Keys and values of tokens that were read before, in the two forms that attention extends.

`Cache` is for reading texts: column c of all rows is written by the call whose `offset` says so.
`Ring` is for decoding: time goes on for all rows alike, one column a step, and what happened at
time t lies in column t mod W. A row may begin anew at any time, its prompt just behind now, and all
rows still write one and the same column. Layers with a sliding window keep the window alone.

Columns lie next to one another, behind the heads: so do the products of attention read them, and a
program that read them in another order would have to turn the cache around at its loop's entry.

Shape suffixes as in `decoder.py`; R rows, W columns of a ring.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.config import ModelConfig

Flag = jax.Array | bool


class Cache(NamedTuple):
    """Keys and values of every layer, stacked so that a loop carries few arrays."""

    k_NxBxKxSxD: jax.Array
    v_NxBxKxSxD: jax.Array
    positions_BxS: jax.Array  # int32, of the token in each column; a sliding window counts these

    by_kind = False  # full and sliding layers are read alike

    def extended(self, layer, sliding: Flag, k_BxLxKxD, v_BxLxKxD, offset):
        """With a call's keys and values at columns offset …; and all of the layer's."""
        start = (layer, 0, 0, offset, 0)
        k, v = (
            jax.lax.dynamic_update_slice(into, jnp.swapaxes(x_BxLxKxD, 1, 2)[None], start)
            for into, x_BxLxKxD in zip(self[:2], (k_BxLxKxD, v_BxLxKxD), strict=True)
        )
        k_BxKxSxD, v_BxKxSxD = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v)
        )
        return self._replace(k_NxBxKxSxD=k, v_NxBxKxSxD=v), k_BxKxSxD, v_BxKxSxD


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` positions of `batch` rows."""
    shape = (config.layers, batch, config.key_value_heads, length, config.head_width)
    return Cache(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        jnp.zeros((batch, length), jnp.int32),
    )


class Columns(NamedTuple):
    """Columns of some layers, as they are stored.

    Attributes:
      scales_NxRxKxW: what int8 values are to be multiplied with, of keys and of values; else None.
    """

    k_NxRxKxWxD: jax.Array
    v_NxRxKxWxD: jax.Array
    scales_NxRxKxW: tuple[jax.Array, jax.Array] | None

    @property
    def width(self) -> int:
        return self.k_NxRxKxWxD.shape[3]

    def with_step(self, layer, k_Rx1xKxD, v_Rx1xKxD, now) -> Columns:
        def put(into, x_RxKx1):
            start = (layer, 0, 0, now % self.width) + (0,) * (into.ndim - 4)
            return jax.lax.dynamic_update_slice(into, x_RxKx1[None], start)

        k_RxKx1xD, v_RxKx1xD = jnp.swapaxes(k_Rx1xKxD, 1, 2), jnp.swapaxes(v_Rx1xKxD, 1, 2)
        return jax.tree.map(put, self, stored(k_RxKx1xD, v_RxKx1xD, self.k_NxRxKxWxD.dtype))

    def read(self, layer, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer."""
        one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)
        k, v = one.k_NxRxKxWxD.astype(dtype), one.v_NxRxKxWxD.astype(dtype)
        if one.scales_NxRxKxW is None:
            return k, v
        return tuple(
            x * scale[..., None].astype(dtype)
            for x, scale in zip((k, v), one.scales_NxRxKxW, strict=True)
        )


def stored(k: jax.Array, v: jax.Array, dtype) -> Columns:
    """Keys and values (…, D) as `Columns` stores them.

    int8 is symmetric, with a scale for each token and head: its largest value is 127.
    """
    if dtype != jnp.int8:
        return Columns(k.astype(dtype), v.astype(dtype), None)

    def quantised(x):
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
        scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
        return jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8), scale

    (k, of_k), (v, of_v) = quantised(k), quantised(v)
    return Columns(k, v, (of_k, of_v))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["full", "near"], meta_fields=["places"]
)
@dataclasses.dataclass(frozen=True)
class Ring:
    """Columns of the layers with full attention and of those with a sliding window.

    Attributes:
      near: None where the two need no telling apart, as every column is within the window or all
        layers are alike: then `full` holds all layers.
      places: of each layer among those of its kind.
    """

    full: Columns
    near: Columns | None
    places: tuple[int, ...]

    @property
    def by_kind(self) -> bool:
        return self.near is not None

    def extended(self, layer, sliding: bool, k_Rx1xKxD, v_Rx1xKxD, now):
        """With the keys and values of time `now`; and all of the layer's."""
        kind = "near" if self.by_kind and sliding else "full"
        fixed = isinstance(layer, int)  # else under scan
        place = self.places[layer] if fixed else jnp.array(self.places, jnp.int32)[layer]
        columns = getattr(self, kind).with_step(place, k_Rx1xKxD, v_Rx1xKxD, now)
        return dataclasses.replace(self, **{kind: columns}), *columns.read(place, k_Rx1xKxD.dtype)

    def masks(self, now, seen_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        """masks_Rx1xW of full and of sliding layers.

        Args:
          seen_R: tokens of each row so far, the one of time `now` among them.
        """

        def mask(columns):
            return (_ages(columns.width, now)[None] < seen_R[:, None])[:, None]

        full = mask(self.full)
        return full, mask(self.near) if self.by_kind else full


def _ages(width: int, now) -> jax.Array:
    """How long ago each column was written, ages_W."""
    return (now - jnp.arange(width, dtype=jnp.int32)) % width


def init_ring(config: ModelConfig, rows: int, width: int, dtype: str) -> Ring:
    """An empty ring for rows of at most `width` tokens."""
    near_width = config.window if 0 < config.window < width else width
    apart = near_width < width and len(set(config.sliding_layers)) == 2
    counts, places = [0, 0], []
    for sliding in config.sliding_layers:
        places.append(counts[apart and sliding])
        counts[apart and sliding] += 1

    def columns(layers, width):
        shape = (layers, rows, config.key_value_heads, width, config.head_width)
        x = jnp.zeros(shape, dtype)
        scale = jnp.zeros(shape[:-1], jnp.float32)
        return Columns(x, x, (scale, scale) if x.dtype == jnp.int8 else None)

    near = columns(counts[1], near_width) if apart else None
    full_width = near_width if all(config.sliding_layers) else width
    return Ring(columns(counts[0], full_width), near, tuple(places))


def behind_now(
    config: ModelConfig, ring: Ring, cache: Cache, now, prefix: int, lengths_B: jax.Array
) -> tuple[Columns, Columns | None]:
    """What a ring holds of texts that were read into `cache`, and that end just before `now`.

    Args:
      cache: `prefix` columns, then prompts, padded on the left.
      lengths_B: of the prompts.

    Returns:
      The columns of B rows, as in `ring.full` and `ring.near`.
    """
    kinds = [False] * config.layers if ring.near is None else config.sliding_layers
    if prefix:
        cache = _without_gap(cache, prefix, lengths_B)

    def columns(into: Columns, sliding: bool) -> Columns:
        layers = [n for n, kind in enumerate(kinds) if kind == sliding]

        def turned(x_NxBxKxSxD):
            if len(layers) < config.layers:
                x_NxBxKxSxD = x_NxBxKxSxD[jnp.array(layers, jnp.int32)]
            x_NxBxKxSxD = x_NxBxKxSxD[:, :, :, -into.width :]
            missing = into.width - x_NxBxKxSxD.shape[3]
            widths = [(0, 0)] * 3 + [(missing, 0), (0, 0)]
            # All rows alike, and no gather: that would lay the columns out in another order.
            return jnp.roll(jnp.pad(x_NxBxKxSxD, widths), now, axis=3)

        return stored(*map(turned, cache[:2]), into.k_NxRxKxWxD.dtype)

    return columns(ring.full, False), None if ring.near is None else columns(ring.near, True)


def _without_gap(cache: Cache, prefix: int, lengths_B: jax.Array) -> Cache:
    """With the prefix next to each row's prompt, and the padding before both."""
    columns = cache.k_NxBxKxSxD.shape[3]
    gap_Bx1 = columns - prefix - lengths_B[:, None]
    place_1xS = jnp.arange(columns)[None]
    of_prefix_BxS = jnp.maximum(place_1xS - gap_Bx1, 0)
    source_BxS = jnp.where(place_1xS < gap_Bx1 + prefix, of_prefix_BxS, place_1xS)
    take = jax.vmap(lambda x, source: jnp.take(x, source, axis=2), (1, 0), 1)
    k, v = (take(x, source_BxS) for x in cache[:2])
    return cache._replace(k_NxBxKxSxD=k, v_NxBxKxSxD=v)
