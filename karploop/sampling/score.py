"""Log-probabilities of given continuations, and what a model makes of given texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from karploop.models.decoder import Decoder, packed_mask
from karploop.models.likelihood import token_logprobs
from karploop.sampling.prefix import (
    columns_of,
    prefill,
    read_prefix,
    room_behind,
    see_prefix,
)


def hidden(
    model: Decoder,
    params,
    tokens_BxL: jax.Array,
    lengths_B: jax.Array,
    prefix_L: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states after the last norm, hidden_BxLxE, and which of them are of tokens, real_BxL.

    Arguments as of `score`.
    """
    rows, length = tokens_BxL.shape
    columns_1xL = jnp.arange(length)[None]
    real_BxL = columns_1xL < lengths_B[:, None]
    mask_BxLxS = packed_mask(real_BxL.astype(jnp.int32))
    prefix, cache = read_prefix(model, params, prefix_L), None
    before = columns_of(prefix)
    if prefix is not None:
        cache = room_behind(model.config, prefix, rows, length)
        mask_BxLxS = see_prefix(mask_BxLxS, real_BxL, before)
    positions_BxL = jnp.broadcast_to(before + columns_1xL, tokens_BxL.shape)
    hidden_BxLxE, _ = model.apply(params, tokens_BxL, mask_BxLxS, positions_BxL, cache, before)
    return hidden_BxLxE, real_BxL


def score(
    model: Decoder,
    params,
    tokens_BxL: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    prefix_L: jax.Array | None = None,
) -> jax.Array:
    """Log-probability of each token given those before it, logprobs_BxL in float32 (nats).

    Args:
      tokens_BxL: rows, padded on the right.
      starts_B: where the continuation of each row begins; the entries before it are 0.
      lengths_B: real tokens of each row; the entries behind them are 0.
      prefix_L: tokens that stand before every row.

    The first token of a row is not scored: its entry is 0.
    """
    hidden_BxLxE, real_BxL = hidden(model, params, tokens_BxL, lengths_B, prefix_L)
    columns_1xL = jnp.arange(tokens_BxL.shape[1])[None]
    wanted_BxL = (columns_1xL >= starts_B[:, None]) & real_BxL
    taken_BxL, _ = token_logprobs(
        model, params, hidden_BxLxE[:, :-1], tokens_BxL[:, 1:], wanted_BxL[:, 1:]
    )
    return jnp.pad(taken_BxL, ((0, 0), (1, 0)))


def last_hidden(
    model: Decoder,
    params,
    tokens_BxL: jax.Array,
    lengths_B: jax.Array,
    prefix_L: jax.Array | None = None,
) -> jax.Array:
    """The hidden state after the last norm at each row's last token, hidden_BxE in float32.

    It has read the whole row. Arguments as of `score`.
    """
    hidden_BxLxE, _ = hidden(model, params, tokens_BxL, lengths_B, prefix_L)
    last_Bx1x1 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden_BxLxE, last_Bx1x1, axis=1)[:, 0].astype(jnp.float32)


def score_next(
    model: Decoder,
    params,
    prompts_PxL: jax.Array,
    lengths_P: jax.Array,
    options_O: jax.Array,
    prefix_L: jax.Array | None = None,
) -> jax.Array:
    """Log-probability (nats, float32) that each of O tokens comes next, logprobs_PxO.

    One forward pass a prompt, however many options. Prompts as of `prefix.prefill`.
    """
    prefix = read_prefix(model, params, prefix_L)
    _, logits_PxV = prefill(model, params, prompts_PxL, lengths_P, prefix)
    return jax.nn.log_softmax(logits_PxV, axis=-1)[:, options_O]
