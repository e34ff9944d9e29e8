"""From next-token logits to the distribution that is sampled: temperature, top-k, top-p, min-p.

Each filter looks at the tempered distribution by itself, and a token stays if all let it. So the
order of filters means nothing, and the most probable token always stays. Tokens of equal
probability stay or go together: top-k keeps more than k where several tie for the last place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn (static: a change compiles a new program)."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off

    @classmethod
    def of(cls, settings) -> Sampling:
        """Of whatever has settings of these names."""
        return cls(*(getattr(settings, name) for name in cls._fields))


GREEDY = Sampling(temperature=0.0)


def filtered_logits(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits_BxV with −inf on the tokens that may not be drawn (temperature > 0).

    top-p keeps the smallest set of most probable tokens whose mass reaches p (arXiv 1904.09751);
    min-p keeps tokens at least min_p times as probable as the best one (arXiv 2407.01082).
    """
    logits_BxV = logits_BxV / sampling.temperature
    kept_BxV = jnp.ones(logits_BxV.shape, bool)
    if 0 < sampling.top_k < logits_BxV.shape[-1]:
        lowest_Bx1 = jnp.min(logits_BxV, axis=-1, keepdims=True)
        floor_Bx1 = _floor(logits_BxV, jnp.ones_like, sampling.top_k, lowest_Bx1)
        kept_BxV &= logits_BxV >= floor_Bx1
    if sampling.top_p < 1.0:
        mass_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
        whole_Bx1 = jnp.sum(mass_BxV, axis=-1, keepdims=True)
        # All that is less probable than this would make up less than half of what may go.
        spare_Bx1 = 0.5 * (1 - sampling.top_p) * whole_Bx1 / mass_BxV.shape[-1]
        kept_BxV &= mass_BxV >= _floor(mass_BxV, lambda x: x, sampling.top_p * whole_Bx1, spare_Bx1)
    if sampling.min_p > 0.0:
        best_Bx1 = jnp.max(logits_BxV, axis=-1, keepdims=True)
        kept_BxV &= logits_BxV >= best_Bx1 + jnp.log(sampling.min_p)
    return jnp.where(kept_BxV, logits_BxV, -jnp.inf)


def _floor(x_BxV: jax.Array, weigh, goal: jax.Array | float, low_Bx1: jax.Array) -> jax.Array:
    """The smallest number above which the entries of a row weigh less than `goal`, or its largest.

    By bisection, on float32 in the order of their bits, which ends exactly and after at most 32
    passes over the row: to sort a vocabulary of 262,144 takes a CPU as long as ten decode steps.

    Args:
      weigh: from entries to what they count.
      low_Bx1: a number which is not above the one that is looked for.
    """

    def halve(bounds):
        below_Bx1, at_most_Bx1 = bounds
        # Their mean, without overflow.
        middle_Bx1 = (below_Bx1 & at_most_Bx1) + ((below_Bx1 ^ at_most_Bx1) >> 1)
        above_BxV = x_BxV > _number(middle_Bx1)
        weight_Bx1 = jnp.sum(jnp.where(above_BxV, weigh(x_BxV), 0.0), axis=-1, keepdims=True)
        enough = weight_Bx1 < goal
        return (
            jnp.where(enough, below_Bx1, middle_Bx1),
            jnp.where(enough, middle_Bx1, at_most_Bx1),
        )

    bounds = _order(low_Bx1) - 1, _order(jnp.max(x_BxV, axis=-1, keepdims=True))
    apart = lambda bounds: jnp.any(bounds[0] < bounds[1] - 1)  # noqa: E731
    return _number(jax.lax.while_loop(apart, halve, bounds)[1])


def _order(x: jax.Array) -> jax.Array:
    """float32 as int32 that compare alike."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _number(order: jax.Array) -> jax.Array:
    """What `_order` was made of."""
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def draw(keys_B: jax.Array, logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row, int32_B, each row from its own key."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    if sampling == Sampling():
        return categorical(keys_B, logits_BxV)
    return categorical(keys_B, filtered_logits(logits_BxV, sampling))


def categorical(keys_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    """One index a row, int32_B, with probability softmax(logits); −inf is never drawn.

    By inversion: first a block of neighbouring tokens, then a token of the block. That takes two
    random numbers a row where the Gumbel trick takes one a token, which for a vocabulary of 262,144
    is most of the time of sampling on a CPU, and sums of at most a block keep float32 exact enough.
    """
    rows, vocabulary = logits_BxV.shape
    block = min(_BLOCK, vocabulary)
    blocks = -(-vocabulary // block)
    mass_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    mass_BxV = jnp.pad(mass_BxV, ((0, 0), (0, blocks * block - vocabulary)))
    mass_BxNxT = mass_BxV.reshape(rows, blocks, block)
    uniform_Bx2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _invert(mass_BxNxT.sum(axis=-1), uniform_Bx2[:, 0])
    mass_BxT = jnp.take_along_axis(mass_BxNxT, block_B[:, None, None], axis=1)[:, 0]
    return block_B * block + _invert(mass_BxT, uniform_Bx2[:, 1])


_BLOCK = 512


def _invert(mass_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index at which the cumulative mass exceeds its share `uniform_B` of the whole."""
    cumulative_BxN = jnp.cumsum(mass_BxN, axis=-1)
    whole_B = cumulative_BxN[:, -1]
    # Below the whole even where the product rounds up to it.
    target_B = jnp.minimum(uniform_B * whole_B, jnp.nextafter(whole_B, jnp.zeros_like(whole_B)))
    return jnp.sum(cumulative_BxN <= target_B[:, None], axis=-1).astype(jnp.int32)
