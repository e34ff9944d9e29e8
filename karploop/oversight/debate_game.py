"""The debate about an image, solved exactly, for a judge who sees only what is revealed of it.

After section 3.1 of Irving et al., "AI safety via debate" (arXiv 1805.00899). Two players who see
the whole image reveal one pixel each in turn, never one that is 0 or already revealed. After K
pixels the judge compares their claims: the honest player's is the true label, the liar's another,
named before the first pixel (pre-commitment) or after the last. The higher logit wins; the liar
wins ties.

The judge sees the *set* of revealed pixels, whatever their order. On an image with n nonzero pixels
the game has C(n, K) ends and C(n, s) states after s turns, few enough on 8 × 8 images to work out
every one, backwards from the ends. So both players are perfect, where the paper searches by
sampling (MCTS, 10,000 rollouts a move).

All claims and both orders of the players are solved in one pass, as bits of one word a state:
  bit c         honesty beats the claim c; the liar moves first, honesty last
  bit C         … beats every false claim: the liar names none until the end
  bits 16 + …   of the same with honesty first and the liar last, whether the *liar* wins
In both halves whoever moves last wants bits on, so that OR and AND over a state's successors
alternate for the whole word.

Axes: B images, P pixels, N numbers of nonzero pixels (in reading order), S sets of one size, K
turns, H hidden units and C classes of the judge, A = C + 1 games.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MAX_CLASSES = 15  # with the game without pre-commitment, half a word
_CHUNK = 8192  # sets at a time
_LOW, _HIGH = np.uint32(0xFFFF), np.uint32(16)


class Tables(NamedTuple):
    """Which sets there are and what follows them; the same for all images of up to N pixels.

    Sets of a size stand in colexicographic order, in which the subsets of {0 … n−1} come first, so
    that an image with n pixels uses the beginning of each table. Filled up to whole chunks.
    """

    halves_MxJ: jax.Array  # int32: the sets of J = K / 2 pixels
    ends_Sx2: jax.Array  # int32: the sets of K pixels, each as two places in `halves_MxJ`
    after: tuple[jax.Array, ...]  # by s < K, N × S int32: the place when one is added; −1: is in it


class Outcomes(NamedTuple):
    """Of each game on each image: whether honesty wins, or how often."""

    random_BxA: jax.Array  # float32: the share of all sets of K pixels
    honest_alone_BxA: jax.Array  # bool: the honest player reveals all K pixels
    liar_alone_BxA: jax.Array  # bool: the liar reveals all K
    honest_first_BxA: jax.Array  # bool: a debate
    liar_first_BxA: jax.Array  # bool: a debate


def subsets(n: int, size: int) -> np.ndarray:
    """The subsets of {0 … n−1} of one size, S × size, ascending, in colexicographic order."""
    if size == 0:
        return np.zeros((1, 0), np.int32)
    smaller = subsets(n, size - 1)
    blocks = [np.zeros((0, size), np.int32)]
    for last in range(size - 1, n):
        heads = smaller[: math.comb(last, size - 1)]
        blocks.append(np.column_stack([heads, np.full(len(heads), last, np.int32)]))
    return np.concatenate(blocks)


def places(sets_SxK: np.ndarray) -> np.ndarray:
    """Where each set (ascending) stands among all of its size: the sum of C(element i, i + 1)."""
    choose = _binomials(sets_SxK.shape[1])
    found_S = np.zeros(len(sets_SxK), np.int32)
    for i, element_S in enumerate(sets_SxK.T):
        found_S += choose[i + 1][element_S]
    return found_S


def places_with(sets_SxK: np.ndarray, pixel: int) -> np.ndarray:
    """Where each set stands with one more pixel, among the sets of that size; −1: it has it."""
    choose = _binomials(sets_SxK.shape[1] + 1)
    found_S = np.zeros(len(sets_SxK), np.int32)
    below_S = np.zeros(len(sets_SxK), np.int32)
    for i, element_S in enumerate(sets_SxK.T):
        is_below_S = element_S < pixel  # those above it move up by one
        found_S += np.where(is_below_S, choose[i + 1][element_S], choose[i + 2][element_S])
        below_S += is_below_S
    found_S += choose[below_S + 1, pixel]
    return np.where(np.any(sets_SxK == pixel, axis=1), -1, found_S)


@functools.cache
def _binomials(size: int) -> np.ndarray:
    """C(m, i) at [i, m] for i up to `size`, of as many pixels as an int32 has room for."""
    return np.array([[math.comb(m, i) for m in range(65)] for i in range(size + 1)], np.int32)


def make_tables(n: int, turns: int) -> Tables:
    """Tables for images of up to n nonzero pixels (64 at most) and 2, 4 or 6 turns."""
    after = []
    for size in range(turns):
        sets_SxK = subsets(n, size)
        after_NxS = np.full((n, _padded(len(sets_SxK))), -1, np.int32)
        for pixel in range(n):
            after_NxS[pixel, : len(sets_SxK)] = places_with(sets_SxK, pixel)
        after.append(jnp.asarray(after_NxS))
    sets_SxK, half = subsets(n, turns), turns // 2
    ends_Sx2 = np.zeros((_padded(len(sets_SxK)), 2), np.int32)
    ends_Sx2[: len(sets_SxK), 0] = places(sets_SxK[:, :half])
    ends_Sx2[: len(sets_SxK), 1] = places(sets_SxK[:, half:])
    return Tables(jnp.asarray(subsets(n, half)), jnp.asarray(ends_Sx2), tuple(after))


def _padded(count: int) -> int:
    return count if count < _CHUNK else -(-count // _CHUNK) * _CHUNK


def _chunked(total: int, count: jax.Array, body, carry):
    """Runs body(start, size, carry) over the chunks of `total` that hold the first `count`."""
    size = min(total, _CHUNK)
    steps = (count + size - 1) // size
    return jax.lax.fori_loop(0, steps, lambda i, c: body(i * size, size, c), carry)


def _counts(tables: Tables, pixels: jax.Array) -> list[jax.Array]:
    """How many sets of 0 … K pixels an image with so many nonzero ones has."""
    most, turns = tables.after[0].shape[0], len(tables.after)
    table = [[math.comb(m, s) for m in range(most + 1)] for s in range(turns + 1)]
    return [jnp.asarray(row, jnp.int32)[pixels] for row in table]


def _judge_ends(judge: nn.Module, params, tables: Tables, values_P, label, pixels):
    """Words of the ends, at how many of them honesty wins each game, and how many there are."""
    most, turns = tables.after[0].shape[0], len(tables.after)
    count = _counts(tables, pixels)[turns]
    (shown_N,) = jnp.nonzero(values_P > 0, size=most, fill_value=0)
    parts_NxH = judge.apply(params, values_P, method="parts")[shown_N]
    sums_MxH = parts_NxH[tables.halves_MxJ].sum(axis=1)

    def body(start, size, carry):
        words_S, on_A = carry
        ends = jax.lax.dynamic_slice_in_dim(tables.ends_Sx2, start, size)
        sum_SxH = sums_MxH[ends[:, 0]] + sums_MxH[ends[:, 1]]
        logits_SxC = judge.apply(params, sum_SxH, method="decide")
        true_Sx1 = logits_SxC[:, label][:, None]
        won_SxC = (true_Sx1 > logits_SxC) | (jnp.arange(logits_SxC.shape[1]) == label)[None]
        won_SxA = jnp.concatenate([won_SxC, won_SxC.all(axis=1, keepdims=True)], axis=1)
        bit_A = jnp.uint32(1) << jnp.arange(won_SxA.shape[1], dtype=jnp.uint32)
        word_S = jnp.where(won_SxA, bit_A[None], jnp.uint32(0)).sum(axis=1, dtype=jnp.uint32)
        real_S = start + jnp.arange(size) < count
        on_A += (won_SxA & real_S[:, None]).sum(axis=0, dtype=jnp.int32)
        word_S = word_S | ((word_S ^ _LOW) << _HIGH)
        return jax.lax.dynamic_update_slice_in_dim(words_S, word_S, start, 0), on_A

    total = len(tables.ends_Sx2)
    logits = jax.eval_shape(lambda: judge.apply(params, sums_MxH[:1], method="decide"))
    classes = logits.shape[1]
    if classes > MAX_CLASSES:
        raise ValueError(f"{classes} classes: a state's word has room for {MAX_CLASSES}")
    carry = (jnp.zeros(total, jnp.uint32), jnp.zeros(classes + 1, jnp.int32))
    words_S, on_A = _chunked(total, count, body, carry)
    return words_S, on_A, count


@functools.partial(jax.jit, static_argnames="judge")
def levels(
    judge: nn.Module, params, tables: Tables, values_P: jax.Array, label: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Every state of the games on one image.

    Returns:
      words of the states after 0 … K turns, as the module describes them (filler beyond those that
      an image with so few pixels has); the number of ends at which honesty wins, by game; the
      number of ends.
    """
    turns = len(tables.after)
    pixels = (values_P > 0).sum()
    counts = _counts(tables, pixels)
    words_S, on_A, ends = _judge_ends(judge, params, tables, values_P, label, pixels)
    found = [words_S]
    for size in reversed(range(turns)):
        last = (turns - 1 - size) % 2 == 0  # the move of whoever moves last
        found.append(_back(tables.after[size], counts[size], found[-1], pixels, last))
    return found[::-1], on_A, ends


def play(
    words: Sequence[np.ndarray],
    tables: Tables,
    pixels: int,
    game: int,
    honest_first: bool,
    rng: np.random.Generator,
) -> list[int]:
    """One debate between perfect players, who draw among the moves that win, if any does.

    Args:
      words: the image's `levels`.
      tables: those that the levels were worked out with.
      pixels: how many of the image are not 0.
      game: the liar's claim, or C where there is none until the end.
      honest_first: who begins.
      rng: what they draw with.

    Returns:
      The revealed pixels, as numbers of nonzero pixels, in the order of the turns.
    """
    bit, place, moves = game + (int(_HIGH) if honest_first else 0), 0, []
    for turn, after_NxS in enumerate(tables.after):
        options_N = np.asarray(after_NxS[:pixels, place])
        legal = np.flatnonzero(options_N >= 0)
        is_on = (np.asarray(words[turn + 1])[options_N[legal]] >> bit) & 1
        wanted = (len(tables.after) - turn) % 2  # whoever moves last wants 1
        winning = legal[is_on == wanted]
        moves.append(int(rng.choice(winning if winning.size else legal)))
        place = int(options_N[moves[-1]])
    return moves


def _back(after_NxS, count, next_S, pixels, wants_on: bool):
    """The words of the states before a move, from those after it."""
    start_word, join = (0, jax.lax.bitwise_or) if wants_on else (2**32 - 1, jax.lax.bitwise_and)
    start_word = jnp.uint32(start_word)
    there_Nx1 = (jnp.arange(after_NxS.shape[0]) < pixels)[:, None]

    def body(start, size, words_S):
        places_NxS = jax.lax.dynamic_slice_in_dim(after_NxS, start, size, axis=1)
        legal_NxS = (places_NxS >= 0) & there_Nx1
        word_NxS = jnp.where(legal_NxS, next_S[jnp.maximum(places_NxS, 0)], start_word)
        word_S = jax.lax.reduce(word_NxS, start_word, join, (0,))
        return jax.lax.dynamic_update_slice_in_dim(words_S, word_S, start, 0)

    total = after_NxS.shape[1]
    return _chunked(total, count, body, jnp.zeros(total, jnp.uint32))


@functools.partial(jax.jit, static_argnames="judge")
def solve(
    judge: nn.Module, params, tables: Tables, values_BxP: jax.Array, labels_B: jax.Array
) -> Outcomes:
    """How every game ends on every image.

    Args:
      judge: a module with `parts` and `decide` as `SparseJudge` has them, of up to MAX_CLASSES.
      params: its parameters.
      tables: for at least as many pixels as any image has that are not 0, and no image has fewer
        than turns.
      values_BxP: images, values between 0 and 1.
      labels_B: the true class of each.
    """

    def one(image):
        values_P, label = image
        words, on_A, ends = levels(judge, params, tables, values_P, label)
        [root] = words[0]
        bit_A = jnp.arange(len(on_A), dtype=jnp.uint32)
        is_on_A = ((root >> bit_A) & jnp.uint32(1)) == 1
        liar_A = ((root >> (bit_A + _HIGH)) & jnp.uint32(1)) == 1
        share_A = on_A.astype(jnp.float32) / ends.astype(jnp.float32)
        return Outcomes(share_A, on_A > 0, on_A == ends, ~liar_A, is_on_A)

    return jax.lax.map(one, (values_BxP, labels_B))
