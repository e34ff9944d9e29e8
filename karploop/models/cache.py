"""Keys and values of tokens that were read before, in the two forms that attention extends.

`Cache` is for reading texts: column c of all rows is written by the call whose `offset` says so.
`Memory` is for decoding, and holds once what several rows see: a prefix for all of them, and a
prompt for its samples (as in Hydragen, arXiv 2402.05099). What a row wrote itself lies in a ring in
time: time goes on for all rows alike, one column a step, and what happened at time t lies in column
t mod C. So a row may begin anew at any time, and all rows still write one and the same column.
Layers with a sliding window keep the window alone.

Columns lie next to one another, behind the heads: so do the products of attention read them, and a
program that read them in another order would have to turn the cache around at its loop's entry.
Unrolled layers have theirs by themselves: to take a layer out of a stack is a copy on a CPU. A ring
of one has no axis of size 1: of what is reshaped between writing and reading, XLA's CPU backend
makes three copies a step.

Shape suffixes as in `decoder.py`; R rows (of one prefix, of prompts, or of what is decoded),
C columns, N layers of a stack.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
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
        """With a call's keys and values at columns offset …; and the layer's, in one part."""
        start = (layer, 0, 0, offset, 0)
        k, v = (
            jax.lax.dynamic_update_slice(into, jnp.swapaxes(x_BxLxKxD, 1, 2)[None], start)
            for into, x_BxLxKxD in zip(self[:2], (k_BxLxKxD, v_BxLxKxD), strict=True)
        )
        k_BxKxSxD, v_BxKxSxD = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v)
        )
        return self._replace(k_NxBxKxSxD=k, v_NxBxKxSxD=v), ((k_BxKxSxD, v_BxKxSxD),)


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` positions of `batch` rows."""
    shape = (config.layers, batch, config.key_value_heads, length, config.head_width)
    return Cache(
        jnp.zeros(shape, config.dtype),
        jnp.zeros(shape, config.dtype),
        jnp.zeros((batch, length), jnp.int32),
    )


class Columns(NamedTuple):
    """Columns of a stack of layers, as they are stored.

    The ring of an unrolled layer has no axis N, and none for rows or heads if there is but one.

    Attributes:
      scales_NxRxKxC: what int8 values are to be multiplied with, of keys and of values; else None.
    """

    k_NxRxKxCxD: jax.Array
    v_NxRxKxCxD: jax.Array
    scales_NxRxKxC: tuple[jax.Array, jax.Array] | None

    @property
    def width(self) -> int:
        return self.k_NxRxKxCxD.shape[-2]

    def with_step(self, index, k_Rx1xKxD, v_Rx1xKxD, now) -> Columns:
        """With the column of time `now`, of a layer of the stack or, without an index, of all."""

        def put(into, x_RxKx1):
            axis = into.ndim - x_RxKx1.ndim + 2  # of columns
            start, shape = [0] * into.ndim, list(into.shape)
            start[axis], shape[axis] = now % self.width, 1
            if index is not None:
                start[0], shape[0] = index, 1
            return jax.lax.dynamic_update_slice(into, x_RxKx1.reshape(shape), start)

        k_RxKx1xD, v_RxKx1xD = jnp.swapaxes(k_Rx1xKxD, 1, 2), jnp.swapaxes(v_Rx1xKxD, 1, 2)
        return jax.tree.map(put, self, stored(k_RxKx1xD, v_RxKx1xD, self.k_NxRxKxCxD.dtype))

    def read(self, index, heads: int, dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, (R, K, C, D)."""
        one = self
        if index is not None:
            one = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self
            )

        def number(x, scale):
            x = x.astype(dtype)
            x = x if scale is None else x * scale[..., None].astype(dtype)
            return x.reshape(-1, heads, *x.shape[-2:])

        of_k, of_v = one.scales_NxRxKxC or (None, None)
        return number(one.k_NxRxKxCxD, of_k), number(one.v_NxRxKxCxD, of_v)


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


class Read(NamedTuple):
    """What was read before decoding began."""

    prefix: Columns | None  # of one row, which all see
    prompts: Columns  # padded on the left


class Place(NamedTuple):
    """Where a layer's columns are: in which stack, and where in it."""

    stack: int
    index: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stacks", "rings"],
    meta_fields=["places", "windows"],
)
@dataclasses.dataclass(frozen=True)
class Memory:
    """What rows see while they are decoded; as many rows of each prompt, one after the other.

    Attributes:
      stacks: of each unrolled layer; under scan of each kind, full attention or sliding window.
      rings: likewise, what rows wrote themselves.
      places: of each layer.
      windows: of each stack, most columns that are seen; 0: all.
    """

    stacks: tuple[Read, ...]
    rings: tuple[Columns, ...]
    places: tuple[Place, ...]
    windows: tuple[int, ...]

    @property
    def by_kind(self) -> bool:
        """Whether full and sliding layers keep something else."""
        return len(set(self.windows)) == 2

    def extended(self, layer, sliding: Flag, k_Rx1xKxD, v_Rx1xKxD, now):
        """With the keys and values of time `now`; and the layer's, part by part."""
        if isinstance(layer, int):
            stack, index = self.places[layer]
            in_ring = None
        else:  # under scan
            stack = int(self.by_kind and sliding)
            in_ring = index = jnp.array([at.index for at in self.places], jnp.int32)[layer]
        own = self.rings[stack].with_step(in_ring, k_Rx1xKxD, v_Rx1xKxD, now)
        rings = (*self.rings[:stack], own, *self.rings[stack + 1 :])
        heads, dtype = k_Rx1xKxD.shape[2], k_Rx1xKxD.dtype
        read = [(part, index) for part in self.stacks[stack] if part is not None]
        parts = (part.read(at, heads, dtype) for part, at in [*read, (own, in_ring)])
        return dataclasses.replace(self, rings=rings), tuple(parts)

    def masks(self, now, lengths_R: jax.Array, steps_R: jax.Array):
        """masks_Rx1xC of the parts of full layers, and of those of sliding ones.

        Args:
          lengths_R: tokens of each row's prompt, without the prefix.
          steps_R: tokens of its own so far, the one of time `now` among them.
        """

        def mask(window: int):
            index = self.windows.index(window)
            stack, ring = self.stacks[index], self.rings[index]

            def behind(width):  # how many tokens of its part stand behind a column
                return jnp.arange(width - 1, -1, -1, dtype=jnp.int32)[None]

            def near(ago_RxC):
                return ago_RxC < window if window else jnp.ones(ago_RxC.shape, bool)

            lengths_Rx1, steps_Rx1 = lengths_R[:, None], steps_R[:, None]
            prompts_1xC = behind(stack.prompts.width)
            found = [
                (prompts_1xC < lengths_Rx1) & near(prompts_1xC + steps_Rx1),
                _ages(ring.width, now)[None] < steps_Rx1,
            ]
            if stack.prefix is not None:
                prefix_1xC = behind(stack.prefix.width)
                found.insert(0, near(prefix_1xC + lengths_Rx1 + steps_Rx1))
            return tuple(each[:, None] for each in found)

        masks = [mask(window) for window in sorted(set(self.windows))]  # full attention first
        return masks[0], masks[-1]

    def with_prompts(self, prompts: Sequence[Columns]) -> Memory:
        pairs = zip(self.stacks, prompts, strict=True)
        stacks = tuple(stack._replace(prompts=new) for stack, new in pairs)
        return dataclasses.replace(self, stacks=stacks)

    def columns(self, cache: Cache, before: int) -> list[Columns]:
        """Of each stack, its columns of prompts that were read into a cache of all layers.

        Args:
          cache: `before` columns of the prefix, then prompts, padded on the left.
        """
        prompts = cache._replace(
            k_NxBxKxSxD=cache.k_NxBxKxSxD[:, :, :, before:],
            v_NxBxKxSxD=cache.v_NxBxKxSxD[:, :, :, before:],
        )
        dtype = self.rings[0].k_NxRxKxCxD.dtype
        return [
            _kept(prompts, self._layers(n), stack.prompts.width, dtype)
            for n, stack in enumerate(self.stacks)
        ]

    def _layers(self, stack: int) -> list[int]:
        return [layer for layer, at in enumerate(self.places) if at.stack == stack]


def _ages(width: int, now) -> jax.Array:
    """How long ago each column of a ring was written, ages_C."""
    return (now - jnp.arange(width, dtype=jnp.int32)) % width


def _kept(cache: Cache, layers: list[int], width: int, dtype) -> Columns:
    """The last columns of some layers, with empty ones before where there are fewer."""

    def taken(x_NxBxKxSxD):
        if len(layers) < len(x_NxBxKxSxD):
            x_NxBxKxSxD = jnp.stack([x_NxBxKxSxD[layer] for layer in layers])
        x_NxBxKxSxD = x_NxBxKxSxD[:, :, :, -width:]
        missing = width - x_NxBxKxSxD.shape[3]
        return jnp.pad(x_NxBxKxSxD, [(0, 0)] * 3 + [(missing, 0), (0, 0)])

    return stored(taken(cache.k_NxBxKxSxD), taken(cache.v_NxBxKxSxD), dtype)


def init_memory(
    config: ModelConfig,
    prefix: Cache | None,
    prompts: int,
    length: int,
    samples: int,
    new: int,
    dtype: str,
) -> Memory:
    """Room for `prompts` prompts of at most `length` tokens, and `new` tokens of each sample."""
    before = 0 if prefix is None else prefix.positions_BxS.shape[1]
    bound = config.window if 0 < config.window < before + length + new else 0
    of_layers = [bound if sliding else 0 for sliding in config.sliding_layers]
    kinds = [
        [n for n, window in enumerate(of_layers) if window == kind]
        for kind in sorted(set(of_layers))  # full attention first
    ]
    groups = kinds if config.scan else [[n] for n in range(config.layers)]

    def seen(columns, layers):
        window = of_layers[layers[0]]
        return min(columns, window) if window else columns

    def empty(lead, columns):
        x = jnp.zeros((*lead, columns, config.head_width), dtype)
        scale = jnp.zeros(x.shape[:-1], jnp.float32)
        return Columns(x, x, (scale, scale) if x.dtype == jnp.int8 else None)

    def read(layers):
        kept = prefix and _kept(prefix, layers, seen(before, layers), jnp.dtype(dtype))
        lead = (len(layers), prompts, config.key_value_heads)
        return Read(kept, empty(lead, seen(length, layers)))

    def ring(layers):
        lead = (prompts * samples, config.key_value_heads)
        lead = (len(layers), *lead) if config.scan else [size for size in lead if size > 1]
        return empty(lead, seen(new, layers))

    places = {
        layer: Place(stack, index)
        for stack, group in enumerate(groups)
        for index, layer in enumerate(group)
    }
    return Memory(
        tuple(map(read, groups)),
        tuple(map(ring, groups)),
        tuple(places[layer] for layer in range(config.layers)),
        tuple(of_layers[group[0]] for group in groups),
    )
