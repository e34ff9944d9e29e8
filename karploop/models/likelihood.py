"""Log-probabilities of given tokens, without holding logits for a whole batch.

Logits of 8 × 1024 tokens over a vocabulary of 262,144 are 8 GiB. Positions are taken in chunks
instead, each chunk's logits made, read and dropped; the backward pass makes them again. Those
that somebody wants come first, and chunks in which there are none are passed over.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from karploop.models.decoder import Decoder
from karploop.models.if_wanted import if_wanted

CHUNK = 1 << 24  # most logits held at once, in numbers: 64 MiB in float32


def token_logprobs(
    model: Decoder,
    params: Any,
    hidden_BxLxE: jax.Array,
    targets_BxL: jax.Array,
    wanted_BxL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the model says of each position's target, where it is wanted.

    Args:
      wanted_BxL: bool; the head, most of the work for a large vocabulary, is spent on these.

    Returns:
      logprobs_BxL: its log-probability in nats, float32; 0 where it is not wanted.
      best_BxL: whether it is the most probable token, bool; false where it is not wanted.
    """
    batch, length, width = hidden_BxLxE.shape
    at_once = max(1, CHUNK // (batch * model.vocabulary))

    def look(hidden_BxCxE, targets_BxC):
        logits_BxCxV = model.apply(params, hidden_BxCxE, method="logits")
        picked_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        logprobs_BxC = picked_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return logprobs_BxC, jnp.argmax(logits_BxCxV, axis=-1).astype(jnp.int32) == targets_BxC

    if at_once >= length:
        logprobs_BxL, best_BxL = look(hidden_BxLxE, targets_BxL)
        return jnp.where(wanted_BxL, logprobs_BxL, 0.0), best_BxL & wanted_BxL
    chunks = -(-length // at_once)
    padding = ((0, 0), (0, chunks * at_once - length))
    # Within each row, so that a batch over several devices stays where it is.
    order_BxL = jnp.argsort(~wanted_BxL, axis=1, stable=True)
    place_BxL = jnp.argsort(order_BxL, axis=1)

    def split(x_BxLx):  # (B, L, …) → (chunks, B, C, …), what is wanted first
        axes = tuple(range(2, x_BxLx.ndim))
        ordered = jnp.take_along_axis(x_BxLx, jnp.expand_dims(order_BxL, axes), axis=1)
        padded = jnp.pad(ordered, padding + ((0, 0),) * len(axes))
        return jnp.moveaxis(padded.reshape(batch, chunks, at_once, *x_BxLx.shape[2:]), 1, 0)

    def join(x_NxBxC):
        ordered_BxL = jnp.moveaxis(x_NxBxC, 0, 1).reshape(batch, chunks * at_once)
        return jnp.take_along_axis(ordered_BxL, place_BxL, axis=1)

    def step(part):
        hidden_BxCxE, targets_BxC, wanted_BxC = part
        found = if_wanted(look, jnp.any(wanted_BxC), hidden_BxCxE, targets_BxC)
        return jnp.where(wanted_BxC, found[0], 0.0), found[1] & wanted_BxC

    logprobs, best = jax.lax.map(step, tuple(map(split, (hidden_BxLxE, targets_BxL, wanted_BxL))))
    return join(logprobs), join(best)
