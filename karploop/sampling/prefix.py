"""Tokens that stand before every row of a batch, few-shot examples as a rule, read once for all."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from karploop.config import ModelConfig
from karploop.models.cache import Cache, init_cache
from karploop.models.decoder import Decoder, packed_mask


def shared_beginning(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all texts begin with, before their last."""
    return tuple(os.path.commonprefix([list(ids[:-1]) for ids in texts]))


def read_prefix(model: Decoder, params, prefix_L: jax.Array | None) -> Cache | None:
    """The prefix as one row of a cache that has no room for more."""
    if prefix_L is None:
        return None
    length = len(prefix_L)
    mask_1xLxL = packed_mask(jnp.ones((1, length), jnp.int32))
    positions_1xL = jnp.arange(length)[None]
    empty = init_cache(model.config, 1, length)
    return model.apply(params, prefix_L[None], mask_1xLxL, positions_1xL, empty, 0)[1]


def columns_of(prefix: Cache | None) -> int:
    return 0 if prefix is None else prefix.positions_BxS.shape[1]


def room_behind(config: ModelConfig, prefix: Cache | None, rows: int, room: int) -> Cache:
    """A cache of `rows` rows that begins with the prefix and has room for `room` columns more."""
    cache = init_cache(config, rows, columns_of(prefix) + room)
    if prefix is None:
        return cache
    return Cache(
        *(
            jax.lax.dynamic_update_slice(whole, jnp.repeat(part, rows, axis), (0,) * whole.ndim)
            for whole, part, axis in zip(cache, prefix, (1, 1, 0), strict=True)
        )
    )


def see_prefix(mask_BxLxL: jax.Array, real_BxL: jax.Array, length: int) -> jax.Array:
    """The mask of rows behind a prefix of `length` tokens, which their real tokens see."""
    shape = (*real_BxL.shape, length)
    sees_BxLxP = jnp.broadcast_to(real_BxL[:, :, None], shape)
    return jnp.concatenate([sees_BxLxP, mask_BxLxL], axis=2)


def prefill(model: Decoder, params, prompts_PxL, lengths_P, prefix: Cache | None):
    """Cache over prefix and prompts, and the logits_PxV of each prompt's first new token.

    Args:
      prompts_PxL: token ids, padded on the left; P prompts.
      lengths_P: real tokens in each row (at least 1).
      prefix: what stands before every prompt, as `read_prefix` gives it.
    """
    rows, length = prompts_PxL.shape
    before = columns_of(prefix)
    cache = room_behind(model.config, prefix, rows, length)
    positions_PxL = jnp.arange(length)[None] - (length - lengths_P)[:, None]  # < 0 on padding
    real_PxL = positions_PxL >= 0
    # One segment a row. A padding query sees itself alone, and no real query sees it.
    mask_PxLxS = see_prefix(packed_mask(real_PxL.astype(jnp.int32)), real_PxL, before)
    positions_PxL = before + jnp.maximum(positions_PxL, 0)
    hidden_PxLxE, cache = model.apply(params, prompts_PxL, mask_PxLxS, positions_PxL, cache, before)
    return cache, model.apply(params, hidden_PxLxE[:, -1], method="logits")
