"""Tokens that stand before every row of a batch, few-shot examples as a rule, read once for all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from karploop.models.decoder import Cache, Decoder, init_cache, packed_mask


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
