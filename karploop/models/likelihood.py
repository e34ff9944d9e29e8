"""Log-probabilities of given tokens, without holding logits for a whole batch.

Logits of 8 × 1024 tokens over a vocabulary of 262,144 are 8 GiB. Positions are taken in chunks
instead, each chunk's logits made, read and dropped; the backward pass makes them again. Those
that somebody wants come first, and chunks in which there are none are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from karploop.models.decoder import Decoder
from karploop.models.if_wanted import if_wanted

CHUNK = 1 << 24  # most logits held at once by a device, in numbers: 64 MiB in float32


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

    predict = by_parts(model, params)

    def look(hidden_BxCxE, targets_BxC):
        logits_BxCxV = predict(hidden_BxCxE)
        picked_BxC = jnp.take_along_axis(logits_BxCxV, targets_BxC[..., None], axis=-1)[..., 0]
        logprobs_BxC = picked_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return logprobs_BxC, jnp.argmax(logits_BxCxV, axis=-1).astype(jnp.int32) == targets_BxC

    given = (hidden_BxLxE, targets_BxL)
    return by_chunks(look, given, wanted_BxL, model.vocabulary, model.parts)


def by_parts(model: Decoder, params: Any) -> Callable[[jax.Array], jax.Array]:
    """The head, hidden_BxCxE → logits_BxCxV, for a loop over chunks.

    Where devices split the batch, each part has the head's matrix to itself, laid out before the
    loop. Its gradient is then summed over chunks on the device, and over devices once behind the
    loop; of a matrix that all parts share, it would be summed over devices in every chunk.
    """
    parts = model.parts
    if parts == 1:
        return lambda hidden_BxCxE: model.apply(params, hidden_BxCxE, method="logits")
    name, axis = ("embedding", 0) if model.config.tied else ("head", 1)
    matrix = params["params"][name]
    lying = [None] * matrix.ndim
    lying[axis] = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(model.rows.spec[0], *lying)
    copies = jnp.broadcast_to(matrix, (parts, *matrix.shape))
    copies = jax.lax.with_sharding_constraint(copies, NamedSharding(model.rows.mesh, spec))

    def one(matrix, hidden_BxCxE):
        own = {"params": params["params"] | {name: matrix}}
        return model.apply(own, hidden_BxCxE, method="logits")

    def predict(hidden_BxCxE):
        batch, *rest = hidden_BxCxE.shape
        logits = jax.vmap(one)(copies, hidden_BxCxE.reshape(parts, batch // parts, *rest))
        return logits.reshape(batch, *logits.shape[2:])

    return predict


def by_chunks(
    look: Callable[..., tuple[jax.Array, ...]],
    given: tuple[jax.Array, ...],
    wanted_BxL: jax.Array,
    logits: int,
    parts: int = 1,
) -> tuple[jax.Array, ...]:
    """What `look` finds at each position, some of them at a time; 0 or false where not wanted.

    Args:
      look: from a chunk of each of `given`, (B, C, …), to arrays of one number a position, (B, C).
        What it closes over may have a gradient, too.
      given: arrays (B, L, …).
      logits: how many `look` holds of a position.
      parts: into which devices split the batch. Were chunks of the whole batch's size, there would
        be the more of them the more devices there are, each with its share of talk between them.
    """
    batch, length = wanted_BxL.shape
    at_once = max(1, CHUNK * parts // (batch * logits))

    def only_wanted(found, wanted_BxC):
        return tuple(jnp.where(wanted_BxC, x_BxC, jnp.zeros((), x_BxC.dtype)) for x_BxC in found)

    if at_once >= length:
        return only_wanted(look(*given), wanted_BxL)
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
        *part, wanted_BxC = part
        return only_wanted(if_wanted(look, jnp.any(wanted_BxC), *part), wanted_BxC)

    return tuple(map(join, jax.lax.map(step, tuple(map(split, (*given, wanted_BxL))))))
