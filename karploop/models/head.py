"""What the output matrix says of given tokens, by blocks of the vocabulary, forwards and backwards.

Neither the logits of all positions nor two gradients of the matrix exist at once: every pass goes
once over blocks of its rows, and within a block over those positions that anybody wants. The
gradient of a log-probability by its hidden state is the target's row less the mean of all rows,
weighted with their probabilities. Where it will be asked for, the forward pass takes that mean as
it goes, as attention by blocks does (arXiv 2112.05682): products with a matrix that is frozen are
two and not three. For a matrix that learns the backward pass makes the logits again, from the
logarithm of each position's sum of exponentials, and each block's gradient is finished before the
next begins.

Where devices split the batch into parts, each part has the matrix to itself, and sums its gradient
by itself; what crosses the network does so before and behind the loops.

Shape suffixes: P parts of the batch, N positions (of a group, inside the loops), T parts of the
vocabulary (tensor parallelism), V rows of the matrix in one part of the vocabulary, C rows of a
block, E model width. Of a matrix that is no embedding E comes before T and V.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits at once, and most columns of them: on a CPU as many as its caches hold.
_ON_CPU, _ELSEWHERE = (1 << 19, 1 << 10), (1 << 22, 1 << 12)
_FINER = 8  # small groups in a whole one
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
    given = hidden_PxNxE, matrix, targets_PxN, count
    return _for_platform(_forward, form, False)(*given)[:2]


def _keep(form, *given):
    hidden, matrix, targets, count = (x.value for x in given)
    logprobs_PxN, best_PxN, lse_PxN, mean_PxNxE = _for_platform(_forward, form, True)(
        hidden, matrix, targets, count
    )
    ahead_PxNxE = _rows_of(form, matrix, targets).astype(jnp.float32)
    if form.softcap:
        ahead_PxNxE *= _flattened(form, logprobs_PxN + lse_PxN)[..., None]
    # () and None are no arrays: a matrix that is frozen is known when this is traced.
    learns = () if given[1].perturbed else None
    kept = (hidden, matrix, targets, count, lse_PxN, ahead_PxNxE - mean_PxNxE, learns)
    return (logprobs_PxN, best_PxN), kept


def _back(form, kept, slopes):
    hidden, matrix, targets, count, lse_PxN, ahead_PxNxE, learns = kept
    slopes_PxN = slopes[0]
    if isinstance(slopes_PxN, jax.custom_derivatives.SymbolicZero):
        slopes_PxN = jnp.zeros(slopes_PxN.shape, slopes_PxN.dtype)
    back_PxNxE = (slopes_PxN[..., None] * ahead_PxNxE).astype(hidden.dtype)
    if learns is None:
        return back_PxNxE, None, None, None
    given = hidden, matrix, targets, count, lse_PxN, slopes_PxN
    return back_PxNxE, _for_platform(_of_matrix, form)(*given), None, None


_read.defvjp(_keep, _back, symbolic_zeros=True)


def _rows_of(form, matrix, targets_PxN):
    """The matrix's row of each target, (P, N, E)."""
    matrix = matrix.astype(form.dtype)
    if form.tied:
        rows_PxVxE = matrix.reshape(matrix.shape[0], -1, matrix.shape[-1])
        return jnp.take_along_axis(rows_PxVxE, targets_PxN[..., None], axis=1, mode="clip")
    columns_PxExV = matrix.reshape(*matrix.shape[:2], -1)
    taken_PxExN = jnp.take_along_axis(columns_PxExV, targets_PxN[:, None], axis=2, mode="clip")
    return jnp.moveaxis(taken_PxExN, 1, 2)


def _flattened(form, logits):
    """The slope of the soft cap where it gives these logits."""
    return 1.0 - jnp.square(jnp.maximum(logits / form.softcap, -1.0))  # _LOW is below the cap


def _for_platform(function, *fixed):
    """`function` with the sizes of blocks that suit what it is compiled for."""
    return functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(function, *fixed, _ON_CPU),
        default=functools.partial(function, *fixed, _ELSEWHERE),
    )


class _Group(NamedTuple):
    """Positions that are read together."""

    start: jax.Array
    size: int

    def of(self, x, axis: int = 1):
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def put(self, x_PxTxN, value):
        return jax.lax.dynamic_update_slice_in_dim(x_PxTxN, value, self.start, 2)


class _Blocks:
    """How positions and rows are cut."""

    def __init__(self, form: Form, sizes, hidden_PxNxE, matrix, count):
        logits, columns = sizes
        self.form = form
        self.parts, self.positions = hidden_PxNxE.shape[:2]
        self.shards, self.rows = matrix.shape[1:3] if form.tied else matrix.shape[2:]
        self.columns = min(columns, self.rows)
        self.group = min(self.positions, max(1, logits // self.columns))
        self.fine = -(-self.group // _FINER)
        self.number = -(-self.rows // self.columns)
        self.count = jnp.minimum(count, self.positions).astype(jnp.int32)
        self.axis = 2 if form.tied else 3  # of the matrix: its rows
        self.weight = "ptce" if form.tied else "petc"

    def over_groups(self, function, found):
        """`function` of a group and what was found in those before, until all that is wanted is
        read: in whole groups and, if that is less than half of one, the rest in small ones."""
        whole = (self.count + (self.group - 1) // 2) // self.group
        rest = jnp.maximum(0, -(-(self.count - whole * self.group) // self.fine))

        def loop(found, first, size, times):
            def one(k, found):
                return function(_Group(first + k * size, size), found)

            return jax.lax.fori_loop(0, times, one, found)

        return loop(loop(found, 0, self.group, whole), whole * self.group, self.fine, rest)

    def filled(self, x_PxN):
        """With zeros, as far as a group may reach that begins among the positions."""
        return jnp.pad(x_PxN, [(0, 0), (0, self.group - 1)] + [(0, 0)] * (x_PxN.ndim - 2))

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

    def summed(self, shares_PxTxNxC, rows):
        """A block's rows, each times its share, in sum: (P, T, N, E)."""
        shares, equation = shares_PxTxNxC.astype(self.form.dtype), f"ptnc,{self.weight}->ptne"
        return jnp.einsum(equation, shares, rows, preferred_element_type=jnp.float32)

    def hits(self, targets_PxN, start):
        """offsets_PxTxN of targets in a block, and which lie in it."""
        first_T = jnp.arange(self.shards, dtype=jnp.int32) * self.rows + start
        offsets = targets_PxN[:, None] - first_T[None, :, None]
        return offsets, (offsets >= 0) & (offsets < self.columns)


def _forward(form, means, sizes, hidden_PxNxE, matrix, targets_PxN, count):
    """logprobs_PxN, best_PxN, the logarithms lse_PxN of sums of exponentials and, for `means`, the
    rows' mean_PxNxE, each weighted with its probability and the slope of its logit (else ())."""
    cut = _Blocks(form, sizes, hidden_PxNxE, matrix, count)
    hidden_PxNxE, targets_PxN = cut.filled(hidden_PxNxE), cut.filled(targets_PxN)

    def over_block(i, found):
        rows, start, fresh_C = cut.block(matrix, i)

        def over_group(group, found):
            most, whole, picked, sums = jax.tree.map(lambda x: group.of(x, 2), found)
            logits_PxTxNxC = cut.logits(group.of(hidden_PxNxE), rows, fresh_C)
            more = jnp.maximum(most, logits_PxTxNxC.max(-1))
            less, shares_PxTxNxC = jnp.exp(most - more), jnp.exp(logits_PxTxNxC - more[..., None])
            whole = whole * less + shares_PxTxNxC.sum(-1)
            if means:
                if form.softcap:
                    shares_PxTxNxC *= _flattened(form, logits_PxTxNxC)
                sums = sums * less[..., None] + cut.summed(shares_PxTxNxC, rows)
            offsets, inside = cut.hits(group.of(targets_PxN), start)
            at = jnp.clip(offsets, 0, cut.columns - 1)[..., None]
            here = jnp.take_along_axis(logits_PxTxNxC, at, axis=-1)[..., 0]
            # The last block may hold it a second time, as very low.
            picked = jnp.where(inside, jnp.maximum(picked, here), picked)
            return jax.tree.map(group.put, found, (more, whole, picked, sums))

        return cut.over_groups(over_group, found)

    none = jnp.zeros((cut.parts, cut.shards, hidden_PxNxE.shape[1]), jnp.float32)
    wide = jnp.zeros((*none.shape, hidden_PxNxE.shape[-1]), jnp.float32) if means else ()
    start = (none + _LOW, none, none + _LOW, wide)
    found = jax.lax.fori_loop(0, cut.number, over_block, start)
    most, whole, picked, sums = jax.tree.map(lambda x: x[:, :, : cut.positions], found)
    top = most.max(1)
    less = jnp.exp(most - top[:, None])
    # Nothing is NaN where nothing is wanted.
    whole, picked = jnp.maximum(jnp.sum(whole * less, axis=1), 1e-30), picked.max(1)
    lse = top + jnp.log(whole)
    mean = jnp.sum(sums * less[..., None], axis=1) / whole[..., None] if means else ()
    return picked - lse, picked >= top, lse, mean


def _of_matrix(form, sizes, hidden_PxNxE, matrix, targets_PxN, count, lse_PxN, slopes_PxN):
    """The matrix's gradient."""
    cut = _Blocks(form, sizes, hidden_PxNxE, matrix, count)
    given = (hidden_PxNxE, targets_PxN, lse_PxN, slopes_PxN)
    hidden_PxNxE, targets_PxN, lse_PxN, slopes_PxN = map(cut.filled, given)

    def over_block(i, whole):
        rows, start, fresh_C = cut.block(matrix, i)

        def over_group(group, block):
            hidden, targets, lse, slopes = (
                group.of(x) for x in (hidden_PxNxE, targets_PxN, lse_PxN, slopes_PxN)
            )
            logits = cut.logits(hidden, rows, fresh_C)
            offsets, _ = cut.hits(targets, start)
            columns_1x1x1xC = jnp.arange(cut.columns)[None, None, None]
            picked = (columns_1x1x1xC == offsets[..., None]) & fresh_C[None, None, None]
            shares = jnp.exp(logits - lse[:, None, :, None])
            slopes_PxTxNxC = slopes[:, None, :, None] * (picked.astype(jnp.float32) - shares)
            if form.softcap:
                slopes_PxTxNxC *= _flattened(form, logits)
            return block + jnp.einsum(
                f"ptnc,pne->{cut.weight}",
                slopes_PxTxNxC.astype(form.dtype),
                hidden,
                preferred_element_type=jnp.float32,
            )

        none = jnp.zeros(rows.shape, jnp.float32)
        block = cut.over_groups(over_group, none)
        if cut.rows % cut.columns:
            block += jax.lax.dynamic_slice_in_dim(whole, start, cut.columns, cut.axis)
        return jax.lax.dynamic_update_slice_in_dim(whole, block, start, cut.axis)

    none = jnp.zeros(matrix.shape, jnp.float32)
    return jax.lax.fori_loop(0, cut.number, over_block, none).astype(matrix.dtype)
