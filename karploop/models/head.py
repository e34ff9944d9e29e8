"""What the output matrix says of given tokens, by blocks of the vocabulary, forwards and backwards.

Neither the logits of all positions nor, on the way back, two gradients of the matrix exist at once:
every pass goes once over blocks of its rows, and within a block over those positions that anybody
wants. The forward pass keeps the logarithm of each position's sum of exponentials; the backward
pass makes the logits again, and each block's gradient is finished before the next begins.

Where devices split the batch into parts, each part has the matrix to itself, and sums its gradient
by itself; what crosses the network does so before and behind the loops.

Shape suffixes: P parts of the batch, K groups of positions, N positions of a group, T parts of the
vocabulary (tensor parallelism), V rows of the matrix in one part of the vocabulary, C rows of a
block, E model width. Of a matrix that is no embedding E comes before T and V.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits at once, and most columns of them: on a CPU as many as its caches hold.
_ON_CPU, _ELSEWHERE = (1 << 18, 1 << 10), (1 << 22, 1 << 12)
_LOW = -1e30  # instead of −inf, of which differences are NaN


class Form(NamedTuple):
    """What is known when the program is traced.

    Attributes:
      tied: the matrix is the embedding, …VE; else …E…V.
      softcap: of logits; 0 without.
      dtype: of products; they are summed in float32.
    """

    tied: bool
    softcap: float
    dtype: str


def read_targets(
    form: Form, hidden_PxNxE: jax.Array, matrix: jax.Array, targets_PxN: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of targets, and whether none is more probable.

    Both arrays have a gradient.

    Args:
      matrix: (P, T, V, E), or (P, E, T, V) where it is not tied.
      targets_PxN: rows of the matrix, T first: below T · V.
      count: how many of a part's positions are wanted, which are its first: an integer, the most of
        any part. The others' results are arbitrary.

    Returns:
      logprobs_PxN in nats, float32, and best_PxN.
    """
    return _read(form, hidden_PxNxE, matrix, targets_PxN, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(form, hidden_PxNxE, matrix, targets_PxN, count):
    return _forward(form, hidden_PxNxE, matrix, targets_PxN, count)[:2]


def _keep(form, *given):
    hidden, matrix, targets, count = (x.value for x in given)
    logprobs_PxN, best_PxN, lse_PxN = _forward(form, hidden, matrix, targets, count)
    # () and None are no arrays: a matrix that is frozen is known when this is traced.
    learns = () if given[1].perturbed else None
    return (logprobs_PxN, best_PxN), (hidden, matrix, targets, count, lse_PxN, learns)


def _back(form, kept, slopes):
    *given, learns = kept
    slopes_PxN = slopes[0]
    if isinstance(slopes_PxN, jax.custom_derivatives.SymbolicZero):
        slopes_PxN = jnp.zeros(slopes_PxN.shape, slopes_PxN.dtype)
    hidden, matrix = _for_platform(_backward, form, learns is not None)(*given, slopes_PxN)
    return hidden, matrix if learns is not None else None, None, None


_read.defvjp(_keep, _back, symbolic_zeros=True)


def _for_platform(function, *fixed):
    """`function` with the sizes of blocks that suit what it is compiled for."""
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(function, *fixed, _ON_CPU),
        default=functools.partial(function, *fixed, _ELSEWHERE),
    )


def _forward(form, *given):
    return _for_platform(_sums, form)(*given)


class _Blocks:
    """How positions and rows are cut."""

    def __init__(self, form: Form, sizes, hidden_PxNxE, matrix, count):
        logits, columns = sizes
        self.form = form
        self.parts, self.positions = hidden_PxNxE.shape[:2]
        self.shards, self.rows = matrix.shape[1:3] if form.tied else matrix.shape[2:]
        self.columns = min(columns, self.rows)
        self.group = min(self.positions, max(1, logits // self.columns))
        self.number = -(-self.rows // self.columns)
        self.groups = -(-self.positions // self.group)
        self.wanted = jnp.minimum(-(-count // self.group), self.groups).astype(jnp.int32)
        self.axis = 2 if form.tied else 3  # of the matrix: its rows
        self.weight = "ptce" if form.tied else "petc"

    def grouped(self, x_PxN):
        """(P, N, …) → (K, P, n, …), filled up with zeros."""
        spare = self.groups * self.group - self.positions
        x_PxN = jnp.pad(x_PxN, [(0, 0), (0, spare)] + [(0, 0)] * (x_PxN.ndim - 2))
        shape = (self.parts, self.groups, self.group, *x_PxN.shape[2:])
        return jnp.moveaxis(x_PxN.reshape(shape), 1, 0)

    def joined(self, x_KxPxN):
        x_PxKxN = jnp.moveaxis(x_KxPxN, 0, 1)
        shape = (self.parts, self.groups * self.group, *x_PxKxN.shape[3:])
        return x_PxKxN.reshape(shape)[:, : self.positions]

    def block(self, matrix, i):
        """Its rows in the dtype of products, where they begin, and which of them no block before
        had: the last one ends where the matrix ends."""
        start = jnp.minimum(i * self.columns, self.rows - self.columns)
        taken = jax.lax.dynamic_slice_in_dim(matrix, start, self.columns, self.axis)
        fresh_C = start + jnp.arange(self.columns) >= i * self.columns
        return taken.astype(self.form.dtype), start, fresh_C

    def logits(self, hidden_PxNxE, rows, fresh_C):
        """logits_PxTxNxC; very low in columns that are not fresh."""
        equation = f"pne,{self.weight}->ptnc"
        logits = jnp.einsum(equation, hidden_PxNxE, rows, preferred_element_type=jnp.float32)
        if self.form.softcap:
            logits = self.form.softcap * jnp.tanh(logits / self.form.softcap)
        return (
            logits
            if self.rows % self.columns == 0
            else jnp.where(fresh_C[None, None, None], logits, _LOW)
        )

    def hits(self, targets_PxN, start):
        """offsets_PxTxN of targets in a block, and which lie in it."""
        first_T = jnp.arange(self.shards, dtype=jnp.int32) * self.rows + start
        offsets = targets_PxN[:, None] - first_T[None, :, None]
        return offsets, (offsets >= 0) & (offsets < self.columns)


def _sums(form, sizes, hidden_PxNxE, matrix, targets_PxN, count):
    """logprobs_PxN, best_PxN, and the logarithms lse_PxN of sums of exponentials."""
    cut = _Blocks(form, sizes, hidden_PxNxE, matrix, count)
    hidden_KxPxNxE, targets_KxPxN = cut.grouped(hidden_PxNxE), cut.grouped(targets_PxN)

    def over_block(i, found):
        rows, start, fresh_C = cut.block(matrix, i)

        def over_group(k, found):
            most, whole, picked = (x[k] for x in found)
            logits_PxTxNxC = cut.logits(hidden_KxPxNxE[k], rows, fresh_C)
            more = jnp.maximum(most, logits_PxTxNxC.max(-1))
            whole = whole * jnp.exp(most - more) + jnp.exp(logits_PxTxNxC - more[..., None]).sum(-1)
            offsets, inside = cut.hits(targets_KxPxN[k], start)
            at = jnp.clip(offsets, 0, cut.columns - 1)[..., None]
            here = jnp.take_along_axis(logits_PxTxNxC, at, axis=-1)[..., 0]
            # The last block may hold it a second time, as very low.
            picked = jnp.where(inside, jnp.maximum(picked, here), picked)
            now = more, whole, picked
            return tuple(x.at[k].set(value) for x, value in zip(found, now, strict=True))

        return jax.lax.fori_loop(0, cut.wanted, over_group, found)

    none = jnp.zeros((cut.groups, cut.parts, cut.shards, cut.group), jnp.float32)
    start = (none + _LOW, none, none + _LOW)
    most, whole, picked = jax.lax.fori_loop(0, cut.number, over_block, start)
    top = most.max(2)
    lse = top + jnp.log(jnp.sum(whole * jnp.exp(most - top[:, :, None]), axis=2))
    picked = picked.max(2)
    return tuple(map(cut.joined, (picked - lse, picked >= top, lse)))


def _backward(form, learns, sizes, hidden_PxNxE, matrix, targets_PxN, count, lse_PxN, slopes_PxN):
    """Gradients by hidden states and, where it `learns`, by the matrix."""
    cut = _Blocks(form, sizes, hidden_PxNxE, matrix, count)
    given = (hidden_PxNxE, targets_PxN, lse_PxN, slopes_PxN)
    hidden_KxPxNxE, targets_KxPxN, lse_KxPxN, slopes_KxPxN = map(cut.grouped, given)

    def over_block(i, found):
        rows, start, fresh_C = cut.block(matrix, i)
        back_KxPxTxNxE, whole = found

        def over_group(k, found):
            back_KxPxTxNxE, block = found
            hidden_PxNxE = hidden_KxPxNxE[k]
            logits = cut.logits(hidden_PxNxE, rows, fresh_C)
            offsets, _ = cut.hits(targets_KxPxN[k], start)
            columns_1x1x1xC = jnp.arange(cut.columns)[None, None, None]
            picked = (columns_1x1x1xC == offsets[..., None]) & fresh_C[None, None, None]
            shares = jnp.exp(logits - lse_KxPxN[k][:, None, :, None])
            slopes_PxTxNxC = slopes_KxPxN[k][:, None, :, None] * (
                picked.astype(jnp.float32) - shares
            )
            if form.softcap:
                squashed = jnp.maximum(logits / form.softcap, -1.0)  # lower where not fresh
                slopes_PxTxNxC *= 1.0 - jnp.square(squashed)
            slopes_PxTxNxC = slopes_PxTxNxC.astype(form.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            back = product(f"ptnc,{cut.weight}->ptne", slopes_PxTxNxC, rows)
            back_KxPxTxNxE = back_KxPxTxNxE.at[k].add(back)
            if learns:
                block += product(f"ptnc,pne->{cut.weight}", slopes_PxTxNxC, hidden_PxNxE)
            return back_KxPxTxNxE, block

        block = jnp.zeros(rows.shape if learns else (), jnp.float32)
        found = jax.lax.fori_loop(0, cut.wanted, over_group, (back_KxPxTxNxE, block))
        back_KxPxTxNxE, block = found
        if learns:
            if cut.rows % cut.columns:
                block += jax.lax.dynamic_slice_in_dim(whole, start, cut.columns, cut.axis)
            whole = jax.lax.dynamic_update_slice_in_dim(whole, block, start, cut.axis)
        return back_KxPxTxNxE, whole

    none = jnp.zeros((cut.groups, cut.parts, cut.shards, *hidden_KxPxNxE.shape[2:]), jnp.float32)
    whole = jnp.zeros(matrix.shape if learns else (), jnp.float32)
    back, whole = jax.lax.fori_loop(0, cut.number, over_block, (none, whole))
    back_PxNxE = cut.joined(back.sum(2)).astype(hidden_PxNxE.dtype)
    return back_PxNxE, whole.astype(matrix.dtype)
