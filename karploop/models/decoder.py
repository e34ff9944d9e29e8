"""The decoder-only transformer that plays every role on the mesh.

One module covers models trained from scratch and the Llama, Qwen and Gemma families: what tells
them apart is `ModelConfig` alone (`families.py` fills it from a published checkpoint). Pre-norm
(RMSNorm), causal attention with as many key-value heads as the config says (GQA, arXiv 2305.13245),
a plain or gated feed-forward block. Positions are absent (NoPE, arXiv 2305.19466: causal masking
alone lets a decoder count) or rotary (`rope.py`).

The module knows nothing of sampling or training: callers hand it tokens, a boolean attention mask
and, when decoding, a key-value cache, and get hidden states back. The head is a separate method so
that a caller pays for logits only at the positions it wants. Beside "params" it reads an optional
collection "lora", which holds for some of the layers' matrices two factors of low rank (`lora.py`).

Layers are either unrolled (`layers_0`, `layers_1`, …: fastest to run) or, with `scan`, one compiled
body over parameters stacked on a leading axis (`layers`: compile time does not grow with depth).
Mixed patterns of full and sliding-window attention are data and not structure: every layer gets
both masks and both rotary tables and a flag that picks, so that one scan covers any pattern.

Shape suffixes: B batch, L query length, S key length, N layers, H heads, K key-value heads, D head
width, E model width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from karploop.config import ModelConfig
from karploop.models.cache import Cache, Flag, Memory
from karploop.models.for_decoding import by_outputs
from karploop.models.rope import Rotation, rotate, rotations


class Context(NamedTuple):
    """What all layers share of one call; pairs are (full attention, sliding window)."""

    masks_BxLxS: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]  # of each part that is seen
    rotations: tuple[Rotation, Rotation] | None  # none without positions
    offset: jax.Array | int  # column of the cache where this call's keys go


def packed_mask(segments_BxL: jax.Array, branches_BxL: jax.Array | None = None) -> jax.Array:
    """Causal attention within each segment; segment 0 is padding and is seen by nobody.

    Args:
      branches_BxL: of segments that fork, 1 … within a segment and 0 before they do: a branch sees
        itself and what was before all of them. None: no segment does.

    Returns:
      A boolean mask_BxLxL, true where the query (second axis) may look at the key (third).
    """
    length = segments_BxL.shape[1]
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None, :]
    if branches_BxL is not None:
        own_BxLxL = branches_BxL[:, :, None] == branches_BxL[:, None, :]
        same_BxLxL &= own_BxLxL | (branches_BxL == 0)[:, None, :]
    causal_1xLxL = jnp.tril(jnp.ones((1, length, length), bool))
    self_1xLxL = jnp.eye(length, dtype=bool)[None]
    # A padding query may look at itself: a softmax over nothing would be NaN and poison gradients.
    return jnp.where(segments_BxL[:, :, None] == 0, self_1xLxL, same_BxLxL & causal_1xLxL)


def _weight(axes: tuple[str, ...], fan_in: int, scale: float = 1.0):
    """A normal initialiser of standard deviation scale/sqrt(fan_in), with its logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(scale * fan_in**-0.5), axes)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32.

    With `offset` the learnt scale is 1 + the parameter, as in the Gemma family.
    """

    epsilon: float = 1e-6
    offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros_init() if self.offset else nn.initializers.ones_init()
        init = nn.with_logical_partitioning(start, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = jnp.expand_dims(scale + 1.0 if self.offset else scale, range(x.ndim - 1))
        return (normed * scale).astype(x.dtype)


def _norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.norm_epsilon, config.norm_offset, name=name)


class Attention(nn.Module):
    """Causal self-attention of one layer; reads and extends the cache where there is one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxE, context: Context, cache, layer, sliding: Flag):
        c = self.config
        q_BxLxHxD = self._project("query", "heads", c.heads, x_BxLxE)
        k_BxLxKxD = self._project("key", "kv_heads", c.key_value_heads, x_BxLxE)
        v_BxLxKxD = self._project("value", "kv_heads", c.key_value_heads, x_BxLxE)
        if c.qk_norm:
            q_BxLxHxD = _norm(c, "query_norm")(q_BxLxHxD)
            k_BxLxKxD = _norm(c, "key_norm")(k_BxLxKxD)
        if context.rotations:
            rotation = _pick(sliding, *context.rotations)
            q_BxLxHxD, k_BxLxKxD = rotate(q_BxLxHxD, rotation), rotate(k_BxLxKxD, rotation)

        def look(sliding: Flag, cache):
            if cache is None:
                parts = ((jnp.swapaxes(k_BxLxKxD, 1, 2), jnp.swapaxes(v_BxLxKxD, 1, 2)),)
            else:
                new = k_BxLxKxD, v_BxLxKxD
                cache, parts = cache.extended(layer, sliding, *new, context.offset)
            return attend(q_BxLxHxD, parts, _pick(sliding, *context.masks_BxLxS), c), cache

        if cache is not None and cache.by_kind and not isinstance(sliding, bool):
            kinds = (functools.partial(look, kind) for kind in (True, False))
            out_BxLxHxD, cache = jax.lax.cond(sliding, *kinds, cache)
        else:
            out_BxLxHxD, cache = look(sliding, cache)
        init = _weight(("heads", "head_width", "embed"), c.heads * c.head_width)
        out_w = self.param("out", init, (c.heads, c.head_width, c.width), jnp.float32)
        # One sum over heads and their widths: for a sum over two axes XLA's CPU backend would turn
        # the matrix round in each step.
        flat_BxLxHD = out_BxLxHxD.reshape(*out_BxLxHxD.shape[:2], -1)
        out_BxLxE = _times(self, "out", flat_BxLxHD, out_w.reshape(-1, c.width))
        out_BxLxE = _adapted(self, "out", out_BxLxHxD, out_BxLxE, inputs=2)
        if c.out_bias:
            out_BxLxE = out_BxLxE + _bias(self, "out_bias", ("embed",), (c.width,))
        return out_BxLxE, cache

    def _project(self, name: str, axis: str, heads: int, x_BxLxE: jax.Array) -> jax.Array:
        c = self.config
        init = _weight(("embed", axis, "head_width"), c.width)
        weight = self.param(name, init, (c.width, heads, c.head_width), jnp.float32)
        flat_BxLxHD = _times(self, name, x_BxLxE, weight.reshape(c.width, -1))
        projected = flat_BxLxHD.reshape(*x_BxLxE.shape[:2], heads, c.head_width)
        projected = _adapted(self, name, x_BxLxE, projected)
        if c.qkv_bias:
            shape = (heads, c.head_width)
            projected = projected + _bias(self, f"{name}_bias", (axis, "head_width"), shape)
        return projected


def attend(q_BxLxHxD, parts, masks_BxLxS, config: ModelConfig) -> jax.Array:
    """Attention of H query heads over K ≤ H key-value heads (query head h reads h // (H / K)).

    Scores and softmax are in float32. G counts the query heads that share a key-value head.

    Args:
      parts: keys and values, pairs (A, K, S, D), one part of the columns behind the other. Of each
        part, A divides B, and what it holds is seen by B / A rows in turn.
      masks_BxLxS: of each part.
    """
    batch, length, heads, width = q_BxLxHxD.shape
    kv_heads = parts[0][0].shape[1]
    grouped = (kv_heads, heads // kv_heads)
    q_BxLxKxGxD = q_BxLxHxD.reshape(batch, length, *grouped, width)

    def scores_of(k_AxKxSxD):  # n: rows of each
        q_AxnxLxKxGxD = q_BxLxKxGxD.reshape(len(k_AxKxSxD), -1, length, *grouped, width)
        scores_AxnxKxGxLxS = jnp.einsum(
            "anlkgd,aksd->ankgls",
            q_AxnxLxKxGxD,
            k_AxKxSxD,
            preferred_element_type=jnp.float32,
        )
        return scores_AxnxKxGxLxS.reshape(batch, *grouped, length, -1)

    scores_BxKxGxLxS = _joined([scores_of(k) for k, _ in parts])
    scores_BxKxGxLxS *= config.attention_scale or width**-0.5
    if config.attention_softcap:
        scores_BxKxGxLxS = softcap(scores_BxKxGxLxS, config.attention_softcap)
    # The lowest number and not −inf: a row that sees nothing would be NaN.
    hidden = jnp.finfo(jnp.float32).min
    mask_BxLxS = _joined(masks_BxLxS)
    shares_BxKxGxLxS = jax.nn.softmax(
        jnp.where(mask_BxLxS[:, None, None], scores_BxKxGxLxS, hidden)
    ).astype(q_BxLxHxD.dtype)

    def mean_of(v_AxKxSxD, start):
        columns = v_AxKxSxD.shape[2]
        shares = jax.lax.slice_in_dim(shares_BxKxGxLxS, start, start + columns, axis=4)
        shares_AxnxKxGxLxS = shares.reshape(len(v_AxKxSxD), -1, *grouped, length, columns)
        # XLA's CPU backend writes a product in its own order of axes many times faster.
        out_AxKxnxGxLxD = jnp.einsum("ankgls,aksd->akngld", shares_AxnxKxGxLxS, v_AxKxSxD)
        out_AxnxLxKxGxD = jnp.transpose(out_AxKxnxGxLxD, (0, 2, 4, 1, 3, 5))
        return out_AxnxLxKxGxD.reshape(q_BxLxHxD.shape)

    starts = itertools.accumulate((v.shape[2] for _, v in parts), initial=0)
    return functools.reduce(
        jnp.add, (mean_of(v, start) for (_, v), start in zip(parts, starts, strict=False))
    )


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squashes x smoothly into (−cap, cap) (Gemma 2, arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)


class FeedForward(nn.Module):
    """Plain (`gelu`) or gated (`swiglu`, `geglu`: arXiv 2002.05202) feed-forward block."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxE):
        c = self.config
        hidden_BxLxF = self._linear("up", x_BxLxE, c.mlp_width, ("embed", "mlp"))
        if c.activation == "gelu":
            hidden_BxLxF = jax.nn.gelu(hidden_BxLxF)
        else:
            squash = jax.nn.silu if c.activation == "swiglu" else jax.nn.gelu
            gate_BxLxF = self._linear("gate", x_BxLxE, c.mlp_width, ("embed", "mlp"))
            hidden_BxLxF = squash(gate_BxLxF) * hidden_BxLxF
        return self._linear("down", hidden_BxLxF, c.width, ("mlp", "embed"))

    def _linear(self, name: str, x: jax.Array, n_out: int, axes: tuple[str, str]) -> jax.Array:
        n_in = x.shape[-1]
        weight = self.param(name, _weight(axes, n_in), (n_in, n_out), jnp.float32)
        y = _adapted(self, name, x, _times(self, name, x, weight))
        return y + _bias(self, f"{name}_bias", axes[1:], (n_out,)) if self.config.mlp_bias else y


def _adapted(module: nn.Module, name: str, x: jax.Array, y: jax.Array, inputs: int = 1):
    """y, the product of x and a matrix, with what the low-rank factors of that matrix add to it.

    Args:
      x: (batch, length, inputs …).
      y: (batch, length, outputs …).
      inputs: how many axes of x are summed over.
    """
    if not module.has_variable("lora", name):
        return y
    factors = module.get_variable("lora", name)  # R is the rank
    low_BxLxR = jnp.tensordot(x, factors["a"].astype(x.dtype), inputs)
    b = factors["b"].astype(x.dtype)
    flat = _product(low_BxLxR, b.reshape(b.shape[0], -1))
    return y + flat.reshape(y.shape)


def _times(module: nn.Module, name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """x @ weight, a parameter of the module, (…, inputs) by (inputs, outputs)."""
    dtype = module.config.dtype
    if module.has_variable("turned", name):
        return by_outputs(x, module.get_variable("turned", name).astype(dtype))
    return _product(x, weight.astype(dtype))


@jax.custom_vjp
def _product(x, weight):
    """x @ weight, (…, inputs) by (inputs, outputs)."""
    return x @ weight


def _factors_back(factors, slopes):
    """Gradients of a product. XLA's CPU backend turns round what stands first in that of the
    weight, number by number, so the narrower one does."""
    x, weight = factors
    rows = tuple(range(x.ndim - 1))
    over_rows = ((rows, rows), ((), ()))
    if x.shape[-1] <= slopes.shape[-1]:
        of_weight = jax.lax.dot_general(x, slopes, over_rows)
    else:
        of_weight = jax.lax.dot_general(slopes, x, over_rows).T
    return slopes @ weight.T, of_weight


_product.defvjp(lambda x, weight: (x @ weight, (x, weight)), _factors_back)


def _bias(module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...]):
    """A bias parameter, zero at first, ready to add to (batch, length, …) activations."""
    init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
    bias = module.param(name, init, shape, jnp.float32)
    return bias.astype(module.config.dtype)[None, None]


def _pick(sliding: Flag, full: Any, window: Any) -> Any:
    """One of a pair of trees, by a flag that is a Python constant or, under scan, an array."""
    if isinstance(sliding, bool):
        return window if sliding else full
    return jax.tree.map(lambda x, y: jnp.where(sliding, y, x), full, window)


class Layer(nn.Module):
    """Attention and feed-forward block, each normed before and, with `post_norms`, after."""

    config: ModelConfig
    rows: NamedSharding | None = None

    @nn.compact
    def __call__(self, carry, context: Context, layer, sliding: Flag):
        c = self.config
        x_BxLxE, cache = carry
        normed = self._norm("attention_norm", x_BxLxE)
        update, cache = Attention(c, name="attention")(normed, context, cache, layer, sliding)
        update = laid(update, self.rows)
        update = self._norm("attention_post_norm", update) if c.post_norms else update
        x_BxLxE = laid(x_BxLxE + update, self.rows)
        update = laid(FeedForward(c, name="mlp")(self._norm("mlp_norm", x_BxLxE)), self.rows)
        update = self._norm("mlp_post_norm", update) if c.post_norms else update
        return (laid(x_BxLxE + update, self.rows), cache), None

    def _norm(self, name: str, x_BxLxE: jax.Array) -> jax.Array:
        return laid(_norm(self.config, name)(x_BxLxE), self.rows)


def laid(x_BxLxE: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """Activations between the parts of a layer, and their gradients, kept to one layout: left to
    itself the compiler takes that of a parameter here and there, and moves them in between."""
    return x_BxLxE if rows is None else jax.lax.with_sharding_constraint(x_BxLxE, rows)


def gathered(matrix: jax.Array, rows: NamedSharding | None, axis: int) -> jax.Array:
    """A matrix of two axes, whole along the one that fsdp splits. Its gradient is, too, before it
    crosses the network: what several uses have of it is then summed first, and sent once."""
    if rows is None:
        return matrix
    spec = [PartitionSpec.UNCONSTRAINED] * 2
    spec[axis] = None
    return jax.lax.with_sharding_constraint(matrix, NamedSharding(rows.mesh, PartitionSpec(*spec)))


def _by_rows(table_VxE: jax.Array, hidden_BxE: jax.Array) -> jax.Array:
    """Products of hidden states, of any leading shape, with the rows of a table, in float32."""

    def product(table_VxE, hidden_BxE):
        return jnp.einsum(
            "...e,ve->...v", hidden_BxE, table_VxE, preferred_element_type=jnp.float32
        )

    def on_cpu(table_VxE, hidden_BxE):
        # XLA's CPU backend packs the second operand anew each time: a large one goes first. One
        # barrier keeps it from turning that round, the other from transposing for each reader.
        logits_VxB = jnp.einsum(
            "ve,be->vb", table_VxE, hidden_BxE, preferred_element_type=jnp.float32
        )
        return jax.lax.optimization_barrier(jax.lax.optimization_barrier(logits_VxB).T)

    if hidden_BxE.ndim != 2:
        return product(table_VxE, hidden_BxE)
    return jax.lax.platform_dependent(table_VxE, hidden_BxE, cpu=on_cpu, default=product)


_FAR = jnp.iinfo(jnp.int32).max
_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nn.Module):
    """See the module docstring. `vocabulary` counts the rows of the embedding.

    `rows` is where activations of (batch, length, width) lie; None leaves it to the compiler.
    """

    config: ModelConfig
    vocabulary: int
    rows: NamedSharding | None = None

    @property
    def parts(self) -> int:
        """Into how many parts devices split a batch."""
        if self.rows is None:
            return 1
        axes = self.rows.spec[0]
        return math.prod(self.rows.mesh.shape[axis] for axis in axes)

    def setup(self):
        c = self.config
        # A tied matrix is also the head: what `embedding_scale` multiplies back starts small.
        spread = c.width**-0.5 if c.tied else 1.0
        embed = nn.with_logical_partitioning(nn.initializers.normal(spread), ("vocab", "embed"))
        self.embedding = self.param("embedding", embed, (self.vocabulary, c.width), jnp.float32)
        if not c.tied:
            head = _weight(("embed", "vocab"), c.width, scale=0.1)  # first predictions near uniform
            self.head = self.param("head", head, (c.width, self.vocabulary), jnp.float32)
        layer = Layer
        if c.remat != "none":
            # Under scan, XLA cannot merge what is recomputed with what was computed before.
            layer = nn.remat(Layer, policy=_REMAT[c.remat], prevent_cse=not c.scan)
        if c.scan:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0, 0),
                length=c.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, self.rows)
        else:
            self.layers = [layer(c, self.rows) for _ in range(c.layers)]
        self.final_norm = _norm(c)

    def __call__(
        self,
        tokens_BxL: jax.Array,
        mask_BxLxS: jax.Array | tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
        positions_BxL: jax.Array,
        cache: Cache | Memory | None = None,
        offset: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | Memory | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values.

        With a cache, keys and values are written at columns offset … offset+L−1 and attention
        reads the whole cache (S = its length); without one S = L and `offset` is not read. With a
        memory, L is 1, `offset` is the time, and the mask is a pair, `Memory.masks`.
        """
        c = self.config
        table_VxE = gathered(self.embedding, self.rows, axis=1)
        x_BxLxE = jnp.take(table_VxE, tokens_BxL, axis=0).astype(c.dtype)
        if c.embedding_scale:
            x_BxLxE = x_BxLxE * jnp.asarray(c.width**0.5, c.dtype)  # rounded, as it was trained
        x_BxLxE = laid(x_BxLxE, self.rows)
        if isinstance(cache, Memory):
            masks_BxLxS = mask_BxLxS
        else:
            key_positions_BxS = positions_BxL
            if cache is not None:
                key_positions_BxS = jax.lax.dynamic_update_slice(
                    cache.positions_BxS, positions_BxL.astype(jnp.int32), (0, offset)
                )
                cache = cache._replace(positions_BxS=key_positions_BxS)
            near_BxLxS = positions_BxL[:, :, None] - key_positions_BxS[:, None] < (c.window or _FAR)
            masks_BxLxS = ((mask_BxLxS,), (mask_BxLxS & near_BxLxS,))
        context = Context(masks_BxLxS, rotations(c, positions_BxL), offset)
        carry = (x_BxLxE, cache)
        if c.scan:
            sliding_N = jnp.array(c.sliding_layers)
            carry, _ = self.layers(carry, context, jnp.arange(c.layers), sliding_N)
        else:
            for index, layer in enumerate(self.layers):
                carry, _ = layer(carry, context, index, c.sliding_layers[index])
        x_BxLxE, cache = carry
        return laid(self.final_norm(x_BxLxE), self.rows), cache

    def logits(self, hidden_BxLxE: jax.Array) -> jax.Array:
        """Next-token logits_BxLxV, accumulated in float32 (works on any leading shape)."""
        c = self.config
        if c.tied:
            logits_BxLxV = _by_rows(self.embedding.astype(c.dtype), hidden_BxLxE)
        else:
            head = self.head.astype(c.dtype)
            logits_BxLxV = jnp.einsum(
                "...e,ev->...v", hidden_BxLxE, head, preferred_element_type=jnp.float32
            )
        return softcap(logits_BxLxV, c.logit_softcap) if c.logit_softcap else logits_BxLxV

    def init_all(self, tokens_BxL, mask_BxLxS, positions_BxL):
        """Touches every parameter once; used to initialise."""
        hidden_BxLxE, _ = self(tokens_BxL, mask_BxLxS, positions_BxL)
        return self.logits(hidden_BxLxE)
