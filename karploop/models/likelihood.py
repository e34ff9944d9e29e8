"""Log-probabilities of given tokens, without holding logits for a whole batch.

Logits of 8 × 1024 tokens over a vocabulary of 262,144 are 8 GiB. `token_logprobs` goes over the
vocabulary by blocks (`head.py`). Whatever else needs logits takes positions in chunks, each chunk's
logits made, read and dropped; the backward pass makes them again. Either way positions that
somebody wants come first, and the others are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from karploop.models.decoder import Decoder, gathered
from karploop.models.head import Form, read_targets
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
      best_BxL: whether no token is more probable, bool; false where it is not wanted.
    """
    config, parts = model.config, model.parts
    batch, length = wanted_BxL.shape

    def by_part(x_BxLx):  # a part is what one device holds of the batch
        return x_BxLx.reshape(parts, batch // parts * length, *x_BxLx.shape[2:])

    wanted_PxN = by_part(wanted_BxL)
    order_PxN = jnp.argsort(~wanted_PxN, axis=1, stable=True)
    place_PxN = jnp.argsort(order_PxN, axis=1)
    hidden_PxNxE = jnp.take_along_axis(by_part(hidden_BxLxE), order_PxN[..., None], axis=1)
    targets_PxN = jnp.take_along_axis(by_part(targets_BxL), order_PxN, axis=1)
    found = read_targets(
        Form(config.tied, config.logit_softcap, config.dtype),
        hidden_PxNxE,
        _head(model, params),
        targets_PxN.astype(jnp.int32),
        wanted_PxN.sum(axis=1).max(),
    )

    def back(x_PxN):
        x_BxL = jnp.take_along_axis(x_PxN, place_PxN, axis=1).reshape(batch, length)
        return jnp.where(wanted_BxL, x_BxL, jnp.zeros((), x_BxL.dtype))

    return back(found[0]), back(found[1])


def _head(model: Decoder, params: Any) -> jax.Array:
    """The output matrix as `read_targets` wants it.

    Where devices split the batch, each part has it to itself, laid out before any loop. Its
    gradient is then summed over devices once; of a matrix that all parts share it would be in every
    turn of a loop.
    """
    tied = model.config.tied
    matrix = params["params"]["embedding" if tied else "head"]
    matrix = gathered(matrix, model.rows, axis=1 if tied else 0)
    parts = model.parts
    shards = model.rows.mesh.shape["tensor"] if model.rows is not None else 1
    if model.vocabulary % shards:
        shards = 1  # a vocabulary that does not divide lies whole on each device
    if tied:
        matrix = matrix.reshape(shards, -1, matrix.shape[1])
    else:
        matrix = matrix.reshape(matrix.shape[0], shards, -1)
    copies = jnp.broadcast_to(matrix, (parts, *matrix.shape))
    if model.rows is None:
        return copies
    of_rows = "tensor" if shards > 1 else None
    axes = (of_rows, None, None) if tied else (None, of_rows, None)
    spec = PartitionSpec(model.rows.spec[0], *axes)
    return jax.lax.with_sharding_constraint(copies, NamedSharding(model.rows.mesh, spec))


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
