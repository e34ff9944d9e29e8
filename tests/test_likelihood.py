"""Log-probabilities in chunks are those of the whole."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from karploop.config import MeshConfig, OptimizerConfig
from karploop.mesh import batch_sharding, make_mesh
from karploop.models import head, likelihood
from karploop.models.if_wanted import if_wanted
from karploop.models.weights import Weights
from karploop.training.packing import Tokenized, pack
from karploop.training.trainer import Trainer


@pytest.mark.parametrize("wanted", [(1, 4, 5, 10), (), range(14), range(9)])
@pytest.mark.parametrize("columns, at_once", [(1, 1), (3, 2), (4, 3), (100, 5), (5, 14)])
@pytest.mark.parametrize("shape", [{}, dict(tied=True), dict(tied=True, logit_softcap=0.7)])
def test_blocks_change_neither_value_nor_gradient(
    make_weights, make_params, monkeypatch, shape, columns, at_once, wanted
):
    weights = make_weights(**shape)
    model, params = weights.model, make_params(weights)
    columns = min(columns, model.vocabulary)
    wanted_2x7 = jnp.isin(jnp.arange(14).reshape(2, 7), jnp.array(wanted, jnp.int32))
    hidden_2x7xE = jax.random.normal(jax.random.key(0), (2, 7, 16))
    targets_2x7 = jax.random.randint(jax.random.key(1), (2, 7), 0, model.vocabulary)

    def found():
        def total(params, hidden_BxLxE):
            logprobs_BxL, best_BxL = likelihood.token_logprobs(
                model, params, hidden_BxLxE, targets_2x7, wanted_2x7
            )
            return (logprobs_BxL * jnp.arange(7.0)[None]).sum(), (logprobs_BxL, best_BxL)

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, hidden_2x7xE)

    def plainly():
        def total(params, hidden_BxLxE):
            logits_BxLxV = model.apply(params, hidden_BxLxE, method="logits")
            all_BxLxV = jax.nn.log_softmax(logits_BxLxV)
            logprobs_BxL = jnp.take_along_axis(all_BxLxV, targets_2x7[..., None], axis=-1)[..., 0]
            logprobs_BxL = jnp.where(wanted_2x7, logprobs_BxL, 0.0)
            right_BxL = (jnp.argmax(logits_BxLxV, -1) == targets_2x7) & wanted_2x7
            return (logprobs_BxL * jnp.arange(7.0)[None]).sum(), (logprobs_BxL, right_BxL)

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, hidden_2x7xE)

    monkeypatch.setattr(head, "_ON_CPU", (columns * at_once, columns))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found(), plainly())


@pytest.mark.parametrize("vocabulary", [15, 16])  # 15 does not divide over `tensor`
@pytest.mark.parametrize("tied", [False, True])
def test_devices_together_find_what_one_does(make_weights, make_params, tied, vocabulary):
    config = make_weights(tied=tied).model.config
    wanted_4x6 = jax.random.bernoulli(jax.random.key(2), 0.6, (4, 6))
    hidden_4x6xE = jax.random.normal(jax.random.key(0), (4, 6, 16))
    targets_4x6 = jax.random.randint(jax.random.key(1), (4, 6), 0, vocabulary)
    params = make_params(Weights(config, vocabulary, make_mesh(MeshConfig(data=1))))

    def found(mesh):
        weights = Weights(config, vocabulary, make_mesh(mesh))
        rows = batch_sharding(weights.mesh) if weights.mesh.size > 1 else None
        model = weights.model.clone(rows=rows)

        def total(params, hidden_BxLxE):
            found = likelihood.token_logprobs(model, params, hidden_BxLxE, targets_4x6, wanted_4x6)
            return (found[0] * jnp.arange(6.0)[None]).sum(), found

        given = jax.device_put(jax.device_get(params), weights.shardings), hidden_4x6xE
        return jax.device_get(jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*given))

    one, together = found(MeshConfig(data=1)), found(MeshConfig(data=2, fsdp=2, tensor=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, together)


def test_a_matrix_that_is_frozen_has_no_gradient(make_weights, make_params):
    """By the program: with an adapter no array of the matrix's size is made."""
    weights = make_weights(tied=True)
    weights = Weights(weights.model.config, 3001, weights.mesh)
    model, params = weights.model, make_params(weights)
    ones_1x4 = jnp.ones((1, 4), jnp.int32)

    def total(hidden_BxLxE):
        found, _ = likelihood.token_logprobs(model, params, hidden_BxLxE, ones_1x4, ones_1x4 > 0)
        return found.sum()

    hidden = jax.random.normal(jax.random.key(0), (1, 4, 16))
    frozen = str(jax.make_jaxpr(jax.grad(total))(hidden))
    assert "f32[1,1,3001,16] = mul" not in frozen
    assert "f32[1,1,3001,16] = broadcast_in_dim[broadcast_dimensions=()" not in frozen
    np.testing.assert_array_less(0.0, jnp.abs(jax.grad(total)(hidden)).sum())


def test_no_step_holds_logits_of_a_batch_or_a_matrix_of_the_vocabulary_twice(
    make_weights, monkeypatch
):
    """By the compiled step: beside the state there are the embedding's gradient as the input's
    matrix and as the output's, and one block of logits."""
    batch, length, vocabulary = 4, 64, 16384
    weights = Weights(
        make_weights(layers=1, width=64, tied=True, max_length=64).model.config,
        vocabulary,
        make_mesh(MeshConfig(data=1)),
    )
    columns, at_once = 512, 33
    monkeypatch.setattr(head, "_ON_CPU", (columns * at_once, columns))
    trainer = Trainer(weights, OptimizerConfig())
    text = Tokenized(np.ones(40, np.int32), 20)
    given, _ = next(pack([(text,)], iter([0] * 4), batch, length))
    compiled = trainer._step.lower(trainer.abstract, (), (), given, jnp.float32(1)).compile()
    sizes = {
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    }
    assert columns * at_once in sizes, "a block's logits are found"
    assert max(sizes) <= vocabulary * weights.model.config.width < batch * length * vocabulary
    matrix = 4 * vocabulary * weights.model.config.width
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * matrix


@pytest.mark.parametrize("by", [(0, 1), (1,), (0,)])
def test_a_conditional_without_memory_has_the_gradients_of_one_with(by):
    given = jax.random.normal(jax.random.key(0), (3, 5)), jax.random.normal(jax.random.key(1), (5,))
    flags = jnp.array([True, False])

    def total(conditional, matrix, x):
        def one(flag):
            found, number = conditional(lambda x: (jnp.tanh(matrix @ x), jnp.argmax(x)), flag, x)
            return found.sum() * (1.0 + number.astype(jnp.float32))

        return jax.lax.map(one, flags).sum()

    def plain(look, flag, x):
        nothing = lambda x: (jnp.zeros(3), jnp.zeros((), jnp.int32))  # noqa: E731
        return jax.lax.cond(flag, look, nothing, x)

    found, expected = (
        jax.value_and_grad(functools.partial(total, c), by)(*given) for c in (if_wanted, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
