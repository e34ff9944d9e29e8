"""Log-probabilities in chunks are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from karploop.models import likelihood


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
