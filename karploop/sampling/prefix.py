"""Tokens that stand before every row of a batch, few-shot examples as a rule, read once for all."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from karploop.models.decoder import Cache, Decoder, init_cache, packed_mask


def shared_beginning(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all texts begin with, before their last."""
    return tuple(os.path.commonprefix([list(ids[:-1]) for ids in texts]))


def read_prefix(model: Decoder, params, prefix_L: jax.Array | None, rows: int, room: int) -> Cache:
    """A cache of `rows` rows that begins with the prefix and has room for `room` columns more."""
    length = 0 if prefix_L is None else len(prefix_L)
    cache = init_cache(model.config, rows, length + room)
    if not length:
        return cache
    one = init_cache(model.config, 1, length)
    mask_1xLxL = packed_mask(jnp.ones((1, length), jnp.int32))
    positions_1xL = jnp.arange(length)[None]
    _, one = model.apply(params, prefix_L[None], mask_1xLxL, positions_1xL, one, 0)
    return Cache(
        *(
            jax.lax.dynamic_update_slice(whole, jnp.repeat(part, rows, axis), (0,) * whole.ndim)
            for whole, part, axis in zip(cache, one, (1, 1, 0), strict=True)
        )
    )


def see_prefix(mask_BxLxL: jax.Array, real_BxL: jax.Array, length: int) -> jax.Array:
    """The mask of rows behind a prefix of `length` tokens, which their real tokens see."""
    shape = (*real_BxL.shape, length)
    sees_BxLxP = jnp.broadcast_to(real_BxL[:, :, None], shape)
    return jnp.concatenate([sees_BxLxP, mask_BxLxL], axis=2)


def prefill(model: Decoder, params, prompts_PxL, lengths_P, prefix_L):
    """Cache over prefix and prompts, and the logits_PxV of each prompt's first new token.

    Args:
      prompts_PxL: token ids, padded on the left; P prompts.
      lengths_P: real tokens in each row (at least 1).
      prefix_L: tokens that stand before every prompt, or None.
    """
    rows, length = prompts_PxL.shape
    prefix_length = 0 if prefix_L is None else len(prefix_L)
    cache = read_prefix(model, params, prefix_L, rows, length)
    positions_PxL = jnp.arange(length)[None] - (length - lengths_P)[:, None]  # < 0 on padding
    real_PxL = positions_PxL >= 0
    # One segment a row. A padding query sees itself alone, and no real query sees it.
    mask_PxLxS = see_prefix(packed_mask(real_PxL.astype(jnp.int32)), real_PxL, prefix_length)
    positions_PxL = prefix_length + jnp.maximum(positions_PxL, 0)
    hidden_PxLxE, cache = model.apply(
        params, prompts_PxL, mask_PxLxS, positions_PxL, cache, prefix_length
    )
    return cache, model.apply(params, hidden_PxLxE[:, -1], method="logits")
