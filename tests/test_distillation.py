"""Objectives with a teacher: scores of sampled tokens, and divergences of whole distributions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from karploop.errors import UserError
from karploop.training.distillation import (
    DIVERGENCES,
    distillation_loss,
    divergences,
    reverse_kl_advantages,
)
from karploop.training.policy_losses import policy_loss

STUDENT, TEACHER = (np.random.default_rng(seed).normal(size=(3, 7)) * 2 for seed in (1, 2))


def hand_divergence(student, teacher, divergence, beta):
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))

    def kl(a, b):
        return np.sum(a * np.log(a / b), axis=-1)

    if divergence != "jsd":
        return kl(p, q) if divergence == "forward_kl" else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def log_softmaxes(dtype=jnp.float32):
    return (jax.nn.log_softmax(jnp.array(x, dtype)) for x in (STUDENT, TEACHER))


every_divergence = pytest.mark.parametrize("divergence, beta", [*((d, 0.3) for d in DIVERGENCES)])


@every_divergence
def test_divergences_by_hand(divergence, beta):
    found_T = divergences(*log_softmaxes(), divergence, beta)
    assert found_T.dtype == jnp.float32
    expected_T = hand_divergence(STUDENT, TEACHER, divergence, beta)
    np.testing.assert_allclose(found_T, expected_T, rtol=1e-5)
    loss = distillation_loss(*log_softmaxes(), jnp.array([0.5, 0.2, 0.3]), divergence, beta)
    assert float(loss) == pytest.approx(float(expected_T @ [0.5, 0.2, 0.3]), rel=1e-5)


@every_divergence
def test_the_gradient_of_divergences_in_float64(divergence, beta):
    with jax.enable_x64(True):
        _, teacher_TxV = log_softmaxes(jnp.float64)
        shares_T = jnp.array([0.5, 0.0, 0.5])

        @jax.jit
        def loss(logits_TxV):
            student_TxV = jax.nn.log_softmax(logits_TxV)
            return distillation_loss(student_TxV, teacher_TxV, shares_T, divergence, beta)

        logits_TxV = jnp.array(STUDENT)
        check_grads(loss, (logits_TxV,), order=1, modes=["rev"], rtol=1e-6)
        assert not np.any(jax.grad(loss)(logits_TxV)[1])


@every_divergence
def test_masked_and_impossible_tokens_are_numbers(divergence, beta):
    """The teacher never says token 2; of the second position nothing is known."""
    student_TxV, teacher_TxV = log_softmaxes()
    teacher_TxV = jax.nn.log_softmax(teacher_TxV.at[0, 2].set(-jnp.inf))
    lost_TxV, masked_TxV = (x.at[1].set(jnp.nan) for x in (student_TxV, teacher_TxV))
    shares_T = jnp.array([0.5, 0.0, 0.5])

    @jax.jit
    def compute(student_TxV, teacher_TxV):
        return jax.value_and_grad(distillation_loss)(
            student_TxV, teacher_TxV, shares_T, divergence, beta
        )

    value, gradient_TxV = compute(student_TxV, teacher_TxV)
    again, padded_TxV = compute(lost_TxV, masked_TxV)
    assert np.isfinite(value) and float(again) == pytest.approx(float(value))
    np.testing.assert_allclose(padded_TxV, gradient_TxV, rtol=1e-6)
    assert not np.any(padded_TxV[1])
    if divergence != "reverse_kl":  # that one is infinite here, the others are what they are
        known = np.array(TEACHER)
        known[0, 2] = -60
        expected_T = hand_divergence(STUDENT, known, divergence, beta)
        assert float(value) == pytest.approx(float(0.5 * (expected_T[0] + expected_T[2])), rel=1e-5)


@every_divergence
def test_parts_of_the_vocabulary_add_up(divergence, beta):
    student_TxV, teacher_TxV = log_softmaxes()
    parts = (
        divergences(student_TxV[:, part], teacher_TxV[:, part], divergence, beta)
        for part in (slice(0, 3), slice(3, 7))
    )
    whole_T = divergences(student_TxV, teacher_TxV, divergence, beta)
    np.testing.assert_allclose(sum(parts), whole_T, rtol=1e-5)


@every_divergence
def test_equal_distributions_do_not_diverge(divergence, beta):
    student_TxV, _ = log_softmaxes()

    def loss(x_TxV):
        return divergences(jax.nn.log_softmax(x_TxV), student_TxV, divergence, beta).sum()

    value, gradient_TxV = jax.jit(jax.value_and_grad(loss))(student_TxV)
    assert float(value) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient_TxV, 0, atol=1e-6)


def test_jsd_nears_the_two_others():
    given = tuple(log_softmaxes())
    with jax.enable_x64(True):
        given = tuple(log_softmaxes(jnp.float64))
        for beta, scale, limit in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
            near_T = divergences(*given, "jsd", beta) / scale
            np.testing.assert_allclose(near_T, divergences(*given, limit), rtol=1e-4)


def test_divergences_that_cannot_be():
    given = tuple(log_softmaxes())
    with pytest.raises(UserError, match="there is no divergence 'kl': it is one of forward_kl"):
        divergences(*given, "kl")
    with pytest.raises(UserError, match="beta is 1.0: 'jsd' needs one between 0 and 1"):
        divergences(*given, "jsd", 1.0)


def test_a_teacher_that_excludes_a_token_says_so_in_numbers():
    found_T = reverse_kl_advantages(jnp.array([-1.0, -2.0]), jnp.array([-3.0, -jnp.inf]))
    assert found_T[0] == -2 and np.isfinite(found_T[1]) and found_T[1] < -9000


def test_what_a_teacher_says_of_a_token_has_no_gradient():
    """In expectation it would be 0; of the tokens at hand it would be noise."""

    def total(logprobs_T, teacher_T):
        return reverse_kl_advantages(logprobs_T, teacher_T).sum()

    given = jnp.array([-1.0, -2.0]), jnp.array([-3.0, -0.5])
    assert not np.any(jax.grad(total, argnums=(0, 1))(*given))


def test_a_teacher_of_sampled_tokens_is_approached_by_reverse_kl():
    """In expectation, over every token that the student may draw."""
    logits_V, teacher_V = (
        jnp.array(STUDENT[0], jnp.float32),
        jax.nn.log_softmax(jnp.array(TEACHER[0], jnp.float32)),
    )

    @jax.jit
    def loss(z_V):
        logprobs_V = jax.nn.log_softmax(z_V)
        shares_V = jax.lax.stop_gradient(jnp.exp(logprobs_V))
        sampler_V = jax.lax.stop_gradient(logprobs_V)
        advantages_V = reverse_kl_advantages(logprobs_V, teacher_V)
        return policy_loss(logprobs_V, sampler_V, advantages_V, shares_V)[0]

    def exact(z_V):
        student_V = jax.nn.log_softmax(z_V)
        return jnp.sum(jnp.exp(student_V) * (student_V - teacher_V))

    np.testing.assert_allclose(jax.grad(loss)(logits_V), jax.grad(exact)(logits_V), atol=1e-6)
