"""Log-probabilities of given tokens, without holding logits for a whole batch.

Logits of 8 × 1024 tokens over a vocabulary of 262,144 are 8 GiB. Positions are taken in chunks
instead, each chunk's logits made, read and dropped; the backward pass makes them again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from karploop.models.decoder import Decoder

CHUNK = 1 << 24  # most logits held at once, in numbers: 64 MiB in float32


def token_logprobs(
    model: Decoder, params: Any, hidden_BxLxE: jax.Array, targets_BxL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the model says of each position's target.

    Returns:
      logprobs_BxL: its log-probability in nats, float32.
      best_BxL: whether it is the most probable token, bool.
    """
    batch, length, width = hidden_BxLxE.shape
    at_once = max(1, CHUNK // (batch * model.vocabulary))

    def look(hidden_BxCxE, targets_BxC):
        logits_BxCxV = model.apply(params, hidden_BxCxE, method="logits")
        picked_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        logprobs_BxC = picked_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return logprobs_BxC, jnp.argmax(logits_BxCxV, axis=-1).astype(jnp.int32) == targets_BxC

    if at_once >= length:
        return look(hidden_BxLxE, targets_BxL)
    chunks = -(-length // at_once)
    padding = ((0, 0), (0, chunks * at_once - length))

    def split(x_BxLx):  # (B, L, …) → (chunks, B, C, …)
        padded = jnp.pad(x_BxLx, padding + ((0, 0),) * (x_BxLx.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, chunks, at_once, *x_BxLx.shape[2:]), 1, 0)

    def join(x_NxBxC):
        return jnp.moveaxis(x_NxBxC, 0, 1).reshape(batch, chunks * at_once)[:, :length]

    step = jax.checkpoint(lambda pair: look(*pair))
    logprobs, best = jax.lax.map(step, (split(hidden_BxLxE), split(targets_BxL)))
    return join(logprobs), join(best)
