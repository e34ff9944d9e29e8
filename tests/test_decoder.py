"""The decoder: what may look at what, and that every way of running it gives the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from karploop.config import ModelConfig
from karploop.models.cache import init_cache
from karploop.models.decoder import Decoder, packed_mask
from karploop.models.rope import rotate, rotations

MODELS = {
    "plain": dict(positions="none", activation="gelu"),
    "rotary": dict(positions="rope", activation="swiglu", qk_norm=True),
}
BOTH_MODELS = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture
def made(kind, make_weights, make_params):
    """A model and its parameters."""
    weights = make_weights(**MODELS[kind])
    return weights.model, make_params(weights)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(3, 16, shape, dtype=np.int32)


def columns(tokens_BxL):
    return jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1])[None], tokens_BxL.shape)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens_BxL, mask_BxLxS, positions_BxL, cache=None, offset=0):
    hidden_BxLxE, cache = model.apply(
        params, tokens_BxL, mask_BxLxS, positions_BxL, cache=cache, offset=offset
    )
    return model.apply(params, hidden_BxLxE, method="logits"), cache


def full_forward(model, params, tokens_BxL):
    """Logits of whole rows without padding."""
    mask_BxLxL = packed_mask(jnp.ones_like(tokens_BxL))
    return logits_of(model, params, tokens_BxL, mask_BxLxL, columns(tokens_BxL))[0]


@BOTH_MODELS
def test_a_position_depends_on_no_later_one(made):
    """Causality by gradient, through the embeddings of the tokens read: one id per position."""
    model, params = made
    tokens_1x8 = jnp.arange(3, 11)[None]

    @jax.jit
    def sensitivity(params, where):
        """How much the logits at position `where` change with each token's embedding."""

        def summary(params):
            return jnp.sum(jnp.sin(full_forward(model, params, tokens_1x8)[0, where]))

        return jnp.abs(jax.grad(summary)(params)["params"]["embedding"]).sum(axis=1)

    for where in range(8):
        seen = np.asarray(sensitivity(params, where))[3:11] > 0
        assert seen.tolist() == [column <= where for column in range(8)]


@BOTH_MODELS
def test_packed_rows_equal_separate_rows(made):
    tokens_2x5 = random_tokens((2, 5))
    packed_1x13 = np.concatenate([*tokens_2x5, np.zeros(3, np.int32)])[None]
    mask_1x13x13 = packed_mask(jnp.array([[1] * 5 + [2] * 5 + [0] * 3]))
    positions_1x13 = jnp.array([[*range(5), *range(5), 0, 0, 0]])
    packed, _ = logits_of(*made, packed_1x13, mask_1x13x13, positions_1x13)
    separate = full_forward(*made, tokens_2x5)
    np.testing.assert_allclose(packed[0, :10], np.concatenate(separate), atol=2e-5)
    assert np.isfinite(packed).all(), "padding must not make NaN, not even on itself"


def test_rotation_sees_relative_positions_only():
    """(R_m q) · (R_n k) depends on m − n, and on nothing else of m and n."""
    q_1x1xHxD, k_1x1xHxD = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 8))
    config = ModelConfig(positions="rope", head_width=8)

    @jax.jit
    def product(m, n):
        q = rotate(q_1x1xHxD, rotations(config, jnp.full((1, 1), m))[0])
        k = rotate(k_1x1xHxD, rotations(config, jnp.full((1, 1), n))[0])
        return jnp.sum(q * k, axis=-1)

    np.testing.assert_allclose(product(5, 2), product(105, 102), atol=1e-4)
    np.testing.assert_allclose(product(0, 0), np.sum(q_1x1xHxD * k_1x1xHxD, axis=-1), atol=1e-6)
    assert np.abs(product(5, 2) - product(5, 3)).max() > 1e-2
    assert np.abs(product(5, 2) - product(2, 5)).max() > 1e-2


@pytest.mark.parametrize("kind", ["rotary"])
def test_a_rotary_model_sees_relative_positions_only(made):
    tokens_1x6 = random_tokens((1, 6))
    mask_1x6x6 = packed_mask(jnp.ones_like(tokens_1x6))
    near, far, apart = (
        logits_of(*made, tokens_1x6, mask_1x6x6, jnp.array([positions]))[0]
        for positions in ([*range(6)], [*range(50, 56)], [*range(5), 55])
    )
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(near - apart)[0, 5].max() > 1e-2


@BOTH_MODELS
def test_order_matters_with_and_without_rotation(made):
    """Without positions the causal mask alone tells orders apart, from the second layer on."""
    one, other = full_forward(*made, jnp.array([[4, 5, 6, 7, 3], [5, 4, 6, 7, 3]]))
    assert np.abs(one[-1] - other[-1]).max() > 1e-2


@BOTH_MODELS
def test_decoding_from_the_cache_equals_a_full_forward(made):
    """Prefill of 4 tokens, then one by one, against one pass over all 9."""
    model, params = made
    tokens_2x9 = random_tokens((2, 9))
    cache, got = init_cache(model.config, 2, 12), []
    for start, stop in [(0, 4), *((i, i + 1) for i in range(4, 9))]:
        positions_2xL = columns(tokens_2x9)[:, start:stop]
        mask_2xLx12 = jnp.arange(12)[None, None] <= positions_2xL[:, :, None]
        logits, cache = logits_of(
            model, params, tokens_2x9[:, start:stop], mask_2xLx12, positions_2xL, cache, start
        )
        got.append(logits)
    expected = full_forward(model, params, tokens_2x9)
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["rotary"])
def test_bfloat16_computes_on_float32_parameters(made):
    model, params = made
    half = Decoder(dataclasses.replace(model.config, dtype="bfloat16"), model.vocabulary)
    tokens_2x6 = random_tokens((2, 6))
    expected = full_forward(model, params, tokens_2x6)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention promotes its logits
        got = full_forward(half, params, tokens_2x6)
        assert init_cache(half.config, 1, 1).k_NxBxKxSxD.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert got.dtype == jnp.float32
    error = np.abs(got - expected).max() / np.std(expected)
    assert 1e-4 < error < 0.1, "not below: it must really compute in bfloat16"
    rounded = np.asarray(got.astype(jnp.bfloat16), np.float32)
    assert (rounded != np.asarray(got)).any(), "logits are accumulated in float32, not rounded"


@pytest.mark.parametrize("kind", ["plain"])
def test_a_token_out_of_range_is_not_taken_for_another(made):
    assert np.isnan(full_forward(*made, jnp.array([[3, 99]]))).all()


def test_initial_parameters(make_weights):
    """The same on one device and on eight, in float32, at the scale of what they multiply."""
    weights, split = make_weights(layers=1), make_weights(layers=1, data=2, fsdp=2, tensor=2)
    params = weights.init(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, params, split.init(jax.random.key(7)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), weights.abstract
    )
    layer = params["params"]
    assert np.std(layer["layers_0"]["mlp"]["up"]) == pytest.approx(16**-0.5, rel=0.1)
    assert np.std(layer["layers_0"]["mlp"]["down"]) == pytest.approx(32**-0.5, rel=0.1)
    assert np.std(layer["layers_0"]["attention"]["query"]) == pytest.approx(16**-0.5, rel=0.1)
    assert np.abs(layer["layers_0"]["mlp"]["up"] - layer["layers_0"]["mlp"]["down"].T).max() > 0.1
    logits = full_forward(weights.model, params, random_tokens((4, 8)))
    assert np.std(logits) < 0.2, "first predictions are near uniform"
