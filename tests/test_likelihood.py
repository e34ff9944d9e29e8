"""Log-probabilities in chunks are those of the whole."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from karploop.config import MeshConfig, OptimizerConfig
from karploop.mesh import make_mesh
from karploop.models import likelihood
from karploop.models.if_wanted import if_wanted
from karploop.models.weights import Weights
from karploop.training.packing import Tokenized, pack
from karploop.training.trainer import Trainer


@pytest.mark.parametrize("at_once", [1, 3, 5, 7])
def test_chunks_change_neither_value_nor_gradient(make_weights, make_params, monkeypatch, at_once):
    weights = make_weights()
    model, params = weights.model, make_params(weights)
    wanted_2x7 = jnp.array([[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], bool)
    hidden_2x7xE = jax.random.normal(jax.random.key(0), (2, 7, 16))
    targets_2x7 = jax.random.randint(jax.random.key(1), (2, 7), 0, model.vocabulary)

    def found():
        def total(params, hidden_BxLxE):
            logprobs_BxL, best_BxL = likelihood.token_logprobs(
                model, params, hidden_BxLxE, targets_2x7, wanted_2x7
            )
            return (logprobs_BxL * jnp.arange(7.0)[None]).sum(), (logprobs_BxL, best_BxL)

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, hidden_2x7xE)

    whole = found()
    monkeypatch.setattr(likelihood, "CHUNK", 2 * model.vocabulary * at_once)
    chunked = found()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)
    logits_2x7xV = model.apply(params, hidden_2x7xE, method="logits")
    expected = jax.nn.log_softmax(logits_2x7xV)
    expected_2x7 = jnp.take_along_axis(expected, targets_2x7[..., None], axis=-1)[..., 0]
    expected_2x7 = jnp.where(wanted_2x7, expected_2x7, 0.0)
    np.testing.assert_allclose(chunked[0][1][0], expected_2x7, atol=1e-5)
    right_2x7 = (jnp.argmax(expected, -1) == targets_2x7) & wanted_2x7
    np.testing.assert_array_equal(chunked[0][1][1], right_2x7)


def test_no_step_holds_logits_of_a_batch_or_a_matrix_of_the_vocabulary_twice(
    make_weights, monkeypatch
):
    """By the compiled step: beside the state there are one gradient of the embedding, a chunk's
    addition to it, and the copy that the loop over chunks reads."""
    batch, length, vocabulary = 4, 64, 16384
    weights = Weights(
        make_weights(layers=1, width=64, tied=True, max_length=64).model.config,
        vocabulary,
        make_mesh(MeshConfig(data=1)),
    )
    monkeypatch.setattr(likelihood, "CHUNK", 2 * batch * vocabulary)
    trainer = Trainer(weights, OptimizerConfig())
    text = Tokenized(np.ones(40, np.int32), 20)
    given, _ = next(pack([(text,)], iter([0] * 4), batch, length))
    compiled = trainer._step.lower(trainer.abstract, (), (), given, jnp.float32(1)).compile()
    sizes = {
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    }
    assert 2 * batch * vocabulary in sizes, "a chunk's logits are found"
    assert max(sizes) < batch * length * vocabulary
    matrix = 4 * vocabulary * weights.model.config.width
    logits = 4 * 2 * batch * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * matrix + 4 * logits


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
