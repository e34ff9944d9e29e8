"""The decoder-only transformer that plays every role on the mesh.

Pre-norm (RMSNorm), causal self-attention with query/key normalisation by choice, and a GELU or
SwiGLU feed-forward block. Positions are either absent (NoPE, arXiv 2305.19466: causal masking
alone lets a decoder count) or rotary (RoPE, arXiv 2104.09864).

The module knows nothing of sampling or training: callers hand it tokens, a boolean attention mask
and, when decoding, a key-value cache, and get hidden states back. The head is a separate method so
that a caller pays for logits only at the positions it wants.

Shape suffixes: B batch, L query length, S key length, N layers, H heads, D head width, E model
width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from karploop.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of every layer, stacked so that a decode loop carries two arrays."""

    k_NxBxSxHxD: jax.Array
    v_NxBxSxHxD: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` positions of `batch` rows."""
    shape = (config.layers, batch, length, config.heads, config.head_width)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def packed_mask(segments_BxL: jax.Array) -> jax.Array:
    """Causal attention within each segment; segment 0 is padding and is seen by nobody.

    Returns a boolean mask_BxLxL, true where the query (second axis) may look at the key (third).
    """
    length = segments_BxL.shape[1]
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None, :]
    causal_1xLxL = jnp.tril(jnp.ones((1, length, length), bool))
    self_1xLxL = jnp.eye(length, dtype=bool)[None]
    # A padding query may look at itself: a softmax over nothing would be NaN and poison gradients.
    return jnp.where(segments_BxL[:, :, None] == 0, self_1xLxL, same_BxLxL & causal_1xLxL)


def _weight(axes: tuple[str, ...], fan_in: int, scale: float = 1.0):
    """A normal initialiser of standard deviation scale/sqrt(fan_in), with its logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(scale * fan_in**-0.5), axes)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rotate(x_BxLxHxD: jax.Array, positions_BxL: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864, eq. 34), pairing the two halves of each head."""
    half = x_BxLxHxD.shape[-1] // 2
    frequency_1x1x1xD = base ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, None, None]
    angle_BxLx1xD = positions_BxL[:, :, None, None].astype(jnp.float32) * frequency_1x1x1xD
    sin, cos = jnp.sin(angle_BxLx1xD), jnp.cos(angle_BxLx1xD)
    first, second = jnp.split(x_BxLxHxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxD.dtype)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxE, mask_BxLxS, positions_BxL, cache: Cache | None, layer: int, offset):
        c = self.config
        heads = (c.width, c.heads, c.head_width)
        q_w, k_w, v_w = (
            self.param(n, _weight(("embed", "heads", "head_width"), c.width), heads, jnp.float32)
            for n in ("query", "key", "value")
        )
        q, k, v = (jnp.einsum("ble,ehd->blhd", x_BxLxE, w.astype(c.dtype)) for w in (q_w, k_w, v_w))
        if c.qk_norm:
            q, k = RMSNorm(name="query_norm")(q), RMSNorm(name="key_norm")(k)
        if c.positions == "rope":
            q, k = (rotate(a, positions_BxL, c.rope_base) for a in (q, k))
        if cache is not None:
            start = (layer, 0, offset, 0, 0)
            cache = Cache(
                jax.lax.dynamic_update_slice(cache.k_NxBxSxHxD, k[None], start),
                jax.lax.dynamic_update_slice(cache.v_NxBxSxHxD, v[None], start),
            )
            k, v = cache.k_NxBxSxHxD[layer], cache.v_NxBxSxHxD[layer]
        out_BxLxHxD = jax.nn.dot_product_attention(q, k, v, mask=mask_BxLxS[:, None])
        out_w = self.param(
            "out",
            _weight(("heads", "head_width", "embed"), c.heads * c.head_width),
            (c.heads, c.head_width, c.width),
            jnp.float32,
        )
        return jnp.einsum("blhd,hde->ble", out_BxLxHxD, out_w.astype(c.dtype)), cache


class FeedForward(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxLxE):
        c = self.config

        def matrix(name, n_in, n_out, axes):
            return self.param(name, _weight(axes, n_in), (n_in, n_out), jnp.float32).astype(c.dtype)

        hidden_BxLxF = x_BxLxE @ matrix("up", c.width, c.mlp_width, ("embed", "mlp"))
        if c.activation == "swiglu":
            gate_BxLxF = x_BxLxE @ matrix("gate", c.width, c.mlp_width, ("embed", "mlp"))
            hidden_BxLxF = jax.nn.silu(gate_BxLxF) * hidden_BxLxF
        else:
            hidden_BxLxF = jax.nn.gelu(hidden_BxLxF)
        return hidden_BxLxF @ matrix("down", c.mlp_width, c.width, ("mlp", "embed"))


class Decoder(nn.Module):
    """See the module docstring. `config.vocabulary` counts the tokenizer's ids."""

    config: ModelConfig
    vocabulary: int

    def setup(self):
        c = self.config
        embed = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", embed, (self.vocabulary, c.width), jnp.float32)
        head = _weight(("embed", "vocab"), c.width, scale=0.1)  # first predictions near uniform
        self.head = self.param("head", head, (c.width, self.vocabulary), jnp.float32)
        self.attention_norms = [RMSNorm(name=f"attention_norm_{i}") for i in range(c.layers)]
        self.attentions = [Attention(c, name=f"attention_{i}") for i in range(c.layers)]
        self.mlp_norms = [RMSNorm(name=f"mlp_norm_{i}") for i in range(c.layers)]
        self.mlps = [FeedForward(c, name=f"mlp_{i}") for i in range(c.layers)]
        self.final_norm = RMSNorm()

    def __call__(
        self,
        tokens_BxL: jax.Array,
        mask_BxLxS: jax.Array,
        positions_BxL: jax.Array,
        cache: Cache | None = None,
        offset: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values.

        With a cache, keys and values are written at columns offset … offset+L−1 and attention
        reads the whole cache (S = its length); without one S = L.
        """
        x_BxLxE = jnp.take(self.embedding, tokens_BxL, axis=0).astype(self.config.dtype)
        for layer in range(self.config.layers):
            normed = self.attention_norms[layer](x_BxLxE)
            update, cache = self.attentions[layer](
                normed, mask_BxLxS, positions_BxL, cache, layer, offset
            )
            x_BxLxE = x_BxLxE + update
            x_BxLxE = x_BxLxE + self.mlps[layer](self.mlp_norms[layer](x_BxLxE))
        return self.final_norm(x_BxLxE), cache

    def logits(self, hidden_BxLxE: jax.Array) -> jax.Array:
        """Next-token logits_BxLxV, accumulated in float32 (works on any leading shape)."""
        head = self.head.astype(self.config.dtype)
        return jnp.einsum("...e,ev->...v", hidden_BxLxE, head, preferred_element_type=jnp.float32)

    def init_all(self, tokens_BxL, mask_BxLxS, positions_BxL):
        """Touches every parameter once; used to initialise."""
        hidden_BxLxE, _ = self(tokens_BxL, mask_BxLxS, positions_BxL)
        return self.logits(hidden_BxLxE)
