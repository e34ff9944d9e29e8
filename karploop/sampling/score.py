"""Log-probabilities of given continuations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from karploop.models.decoder import Decoder, packed_mask
from karploop.models.likelihood import token_logprobs


def score(model: Decoder, params, tokens_BxL: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Log-probability of each token given those before it, logprobs_BxL in float32 (nats).

    Rows are padded on the right. The first token has nothing before it: its entry is 0, as are
    those of the padding.
    """
    length = tokens_BxL.shape[1]
    positions_BxL = jnp.broadcast_to(jnp.arange(length)[None], tokens_BxL.shape)
    real_BxL = positions_BxL < lengths_B[:, None]
    mask_BxLxL = packed_mask(real_BxL.astype(jnp.int32))
    hidden_BxLxE, _ = model.apply(params, tokens_BxL, mask_BxLxL, positions_BxL)
    taken_BxL, _ = token_logprobs(model, params, hidden_BxLxE[:, :-1], tokens_BxL[:, 1:])
    return jnp.where(real_BxL, jnp.pad(taken_BxL, ((0, 0), (1, 0))), 0.0)
