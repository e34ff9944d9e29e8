"""Objectives of rewards: advantages, what a token counts for, policy gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from karploop.errors import UserError
from karploop.training.advantages import (
    ALONE,
    COMPARED,
    NO_REWARD,
    dr_grpo,
    grpo,
    penalised,
    rloo,
)
from karploop.training.policy_losses import AGGREGATES, kl_estimates, policy_loss, token_shares

# -- advantages ------------------------------------------------------------------------------------

MISSING = np.nan
# Prompt 7 has three rewards and a missing one, 2 has equal ones, 5 has one, 9 has none.
GROUPS = np.array([7, 2, 7, 5, 7, 2, 7, 9])
REWARDS = np.array([1.0, 0.1, 0.0, 3.0, MISSING, 0.1, 0.5, MISSING])
REASONS = [COMPARED, COMPARED, COMPARED, ALONE, NO_REWARD, COMPARED, COMPARED, NO_REWARD]


@pytest.mark.parametrize(
    "compare, expected",
    [
        (rloo, (1 - 0.25, 0 - 0.75, 0.5 - 0.5)),
        (dr_grpo, (0.5, -0.5, 0.0)),
        (grpo, (0.5 / 0.5001, -0.5 / 0.5001, 0.0)),  # deviation √((0.25 + 0.25 + 0) / 2) = 0.5
    ],
)
def test_advantages_by_hand(compare, expected):
    found = compare(REWARDS, GROUPS)
    first, third, last = expected
    np.testing.assert_allclose(
        found.values_S, [first, 0, third, 0, 0, 0, last, 0], rtol=1e-6, atol=1e-7
    )
    assert found.values_S.dtype == found.weights_S.dtype == np.float32
    assert found.reasons == REASONS
    assert found.weights_S.tolist() == [float(reason == COMPARED) for reason in REASONS]


@pytest.mark.parametrize("compare", [rloo, dr_grpo, grpo])
def test_a_missing_reward_is_no_reward_of_0(compare):
    """What is known gets the advantages that it would have by itself."""
    known = ~np.isnan(REWARDS)
    alone = compare(REWARDS[known], GROUPS[known])
    np.testing.assert_array_equal(compare(REWARDS, GROUPS).values_S[known], alone.values_S)
    assert not np.allclose(compare(np.nan_to_num(REWARDS), GROUPS).values_S[known], alone.values_S)


@pytest.mark.parametrize("compare", [rloo, dr_grpo, grpo])
def test_equal_rewards_have_no_advantage_however_they_round(compare):
    """The mean of three times 0.1 is not 0.1, and a deviation of 1e-17 is not 0."""
    found = compare(np.full(3, 0.1), np.zeros(3, int))
    assert found.values_S.tolist() == [0, 0, 0] and found.weights_S.tolist() == [1, 1, 1]
    nearly = compare(np.array([0.3, 0.1 + 0.2]), np.zeros(2, int))
    assert np.abs(nearly.values_S).max() < 1e-10


def test_advantages_that_are_one_another():
    rng = np.random.default_rng(0)
    groups_S = np.repeat(np.arange(50), 8)
    rewards_S = rng.normal(size=400)
    order = rng.permutation(400)
    plain, loo = dr_grpo(rewards_S, groups_S), rloo(rewards_S, groups_S)
    np.testing.assert_allclose(loo.values_S, plain.values_S * 8 / 7, rtol=1e-5, atol=1e-6)
    mixed = rloo(rewards_S[order], groups_S[order])
    np.testing.assert_allclose(mixed.values_S, loo.values_S[order], rtol=1e-6)
    spread = grpo(rewards_S, groups_S).values_S.reshape(50, 8).std(axis=1, ddof=1)
    np.testing.assert_allclose(spread, 1, atol=1e-3)


def test_nothing_to_compare():
    for compare in (rloo, dr_grpo, grpo):
        assert compare(np.array([]), np.array([], int)).values_S.shape == (0,)
        assert not compare(np.full(3, MISSING), np.zeros(3, int)).weights_S.any()


def test_an_infinite_reward_is_refused():
    with pytest.raises(UserError, match="reward of sample 1 is -inf: a reward is a finite number"):
        rloo(np.array([1.0, -np.inf]), np.zeros(2, int))


def test_rewards_less_divergence():
    found = penalised(np.array([1.0, MISSING]), np.array([-3.0, -4]), np.array([-5.0, -4]), 0.1)
    np.testing.assert_allclose(found, [0.8, MISSING])


# -- what a token counts for -----------------------------------------------------------------------

WANTED = jnp.array([[0, 1, 1, 1, 0], [1, 0, 1, 0, 0]], bool)
SEQUENCES = jnp.array([[0, 0, 0, 0, 1], [2, 1, 1, 1, 3]])


def test_shares_by_hand():
    shares = functools.partial(token_shares, WANTED, SEQUENCES, 4)
    by_token, by_sequence = shares("token"), shares("sequence")
    np.testing.assert_allclose(by_token, np.array(WANTED) / 5)
    third = [[0, 1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 1 / 3, 0, 0]]  # completion 3 has no token
    np.testing.assert_allclose(by_sequence, third, rtol=1e-6)
    np.testing.assert_allclose(shares("constant", 8), np.array(WANTED) / 8)
    assert by_sequence.dtype == jnp.float32


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_nothing_wanted_has_shares_of_0(aggregate):
    shares_T = token_shares(jnp.zeros(3, bool), jnp.zeros(3, int), 2, aggregate, 4)
    assert shares_T.tolist() == [0, 0, 0]


def test_aggregates_that_cannot_be():
    with pytest.raises(UserError, match="there is no aggregate 'mean': it is one of token"):
        token_shares(WANTED, SEQUENCES, 4, "mean")
    with pytest.raises(UserError, match="has the constant None"):
        token_shares(WANTED, SEQUENCES, 4, "constant")


# -- policy gradients ------------------------------------------------------------------------------

LOGPROBS = np.array([-1.0, -0.5, -2.0, -3.0, -0.1, -1.5])
SAMPLER = np.array(
    [-1.5, -0.4, -2.0, -2.0, -0.7, -1.6]
)  # ratios e^½, e^−0.1, 1, e^−1, e^0.6, e^0.1
ADVANTAGES = np.array([1.0, -1.0, 2.0, -0.5, -2.0, 0.0])
REFERENCE = np.array([-1.2, -0.5, -1.0, -4.0, -0.2, -1.0])
SHARES = np.array([0.1, 0.2, 0.3, 0.15, 0.2, 0.05])
REST = (SAMPLER, ADVANTAGES, SHARES, REFERENCE)


def hand_kl(logprobs, estimator):
    r = np.exp(REFERENCE - logprobs)
    return {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r)}[estimator]


def hand_ppo(logprobs, low, high, coefficient=0.0, estimator="k3"):
    ratio = np.exp(logprobs - SAMPLER)
    held = np.minimum(np.maximum(ratio, 1 - low), 1 + high)
    gained = np.minimum(ratio * ADVANTAGES, held * ADVANTAGES)
    return float(np.sum(SHARES * (-gained + coefficient * hand_kl(logprobs, estimator))))


def hand_truncated(logprobs, limit):
    weights = np.minimum(np.exp(LOGPROBS - SAMPLER), limit)  # of the point, whatever is varied
    return -float(np.sum(SHARES * weights * ADVANTAGES * logprobs))


inf = float("inf")
POLICY = {
    "reinforce": ({}, functools.partial(hand_ppo, low=inf, high=inf)),
    "ppo": (dict(clip_low=0.2, clip_high=0.2), functools.partial(hand_ppo, low=0.2, high=0.2)),
    "higher": (dict(clip_low=0.2, clip_high=0.7), functools.partial(hand_ppo, low=0.2, high=0.7)),
    "truncated": (dict(truncate=1.3), functools.partial(hand_truncated, limit=1.3)),
    "k2": (
        dict(kl_coefficient=0.3, kl_estimator="k2"),
        functools.partial(hand_ppo, low=inf, high=inf, coefficient=0.3, estimator="k2"),
    ),
    "k3": (
        dict(clip_low=0.2, clip_high=0.28, kl_coefficient=0.3),
        functools.partial(hand_ppo, low=0.2, high=0.28, coefficient=0.3),
    ),
}
policies = pytest.mark.parametrize("name", POLICY)


def run_policy(logprobs_T, rest, settings):
    sampler_T, advantages_T, shares_T, reference_T = rest
    return policy_loss(
        logprobs_T, sampler_T, advantages_T, shares_T, reference_T=reference_T, **settings
    )


@functools.cache
def compiled(name):
    run = functools.partial(run_policy, settings=POLICY[name][0])
    return jax.jit(jax.value_and_grad(run, has_aux=True))


def tokens(dtype=jnp.float32):
    return jnp.array(LOGPROBS, dtype), [jnp.array(x, dtype) for x in REST]


@policies
def test_the_policy_loss_and_its_gradient_by_hand(name):
    (value, _), gradient_T = compiled(name)(*tokens())
    hand = POLICY[name][1]
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(hand(LOGPROBS), rel=1e-5)
    for i in range(len(LOGPROBS)):
        step = np.zeros(len(LOGPROBS))
        step[i] = 1e-6
        expected = (hand(LOGPROBS + step) - hand(LOGPROBS - step)) / 2e-6
        assert float(gradient_T[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in POLICY if name != "truncated"])
def test_the_policy_gradient_in_float64_by_finite_differences(name):
    with jax.enable_x64(True):
        logprobs_T, rest = tokens(jnp.float64)
        loss = jax.jit(lambda x_T: run_policy(x_T, rest, POLICY[name][0])[0])
        assert loss(logprobs_T).dtype == jnp.float64
        check_grads(loss, (logprobs_T,), order=1, modes=["rev"], rtol=1e-6)


@policies
def test_padded_tokens_make_no_difference(name):
    logprobs_T, rest = tokens()
    (value, metrics), gradient_T = compiled(name)(logprobs_T, rest)
    for rubbish in (jnp.nan, jnp.inf, -1e30):
        sampler_T, advantages_T, shares_T, reference_T = (
            jnp.append(x_T, jnp.full(2, rubbish)) for x_T in rest
        )
        shares_T = jnp.where(jnp.arange(8) < 6, shares_T, 0.0)
        padded = [sampler_T, advantages_T, shares_T, reference_T]
        (again, as_well), padded_T = compiled(name)(
            jnp.append(logprobs_T, jnp.full(2, rubbish)), padded
        )
        np.testing.assert_allclose([again, *as_well], [value, *metrics], rtol=1e-6)
        np.testing.assert_allclose(padded_T, [*gradient_T, 0, 0], rtol=1e-6)


def test_metrics_of_a_policy_by_hand():
    ratio = np.exp(LOGPROBS - SAMPLER)
    (_, metrics), _ = compiled("higher")(*tokens())
    # Clipped are e^−1 and no other: e^0.6 has a negative advantage, and e^½ is below 1.7.
    expected = [1 / 6, ratio.mean(), (ratio - 1 - np.log(ratio)).mean()]
    expected += [hand_kl(LOGPROBS, "k3").mean(), -LOGPROBS.mean()]
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
    (_, metrics), _ = compiled("ppo")(*tokens())
    assert float(metrics.clipped) == pytest.approx(2 / 6)
    (_, metrics), _ = compiled("truncated")(*tokens())
    assert float(metrics.clipped) == pytest.approx(2 / 6)
    (_, metrics), _ = compiled("k2")(*tokens())
    assert float(metrics.clipped) == 0
    assert float(metrics.kl_reference) == pytest.approx(hand_kl(LOGPROBS, "k2").mean())


def test_without_a_reference_there_is_no_divergence_from_it():
    ones = jnp.ones(2)
    _, metrics = policy_loss(-ones, -ones, ones, ones)
    assert metrics.kl_reference is None
    assert [float(x) for x in (metrics.ratio, metrics.kl_sampler, metrics.surprise)] == [1, 0, 1]


def test_no_token_no_loss():
    def loss(x_T):
        return policy_loss(x_T, x_T - 1, x_T, jnp.zeros(3), clip_low=0.2, clip_high=0.2)

    (value, metrics), gradient_T = jax.jit(jax.value_and_grad(loss, has_aux=True))(-jnp.ones(3))
    assert float(value) == 0 and gradient_T.tolist() == [0, 0, 0]
    assert np.isnan([x for x in metrics if x is not None]).all()


@pytest.mark.parametrize("settings", [{}, dict(clip_low=0.2, clip_high=0.2), dict(truncate=2.0)])
def test_without_advantage_nothing_is_learnt(settings):
    def loss(x_T):
        sampler_T, none_T = jnp.array(SAMPLER, jnp.float32), jnp.zeros(6)
        return policy_loss(x_T, sampler_T, none_T, jnp.full(6, 1 / 6), **settings)[0]

    assert not np.any(jax.jit(jax.grad(loss))(jnp.array(LOGPROBS, jnp.float32)))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("far", [500.0, -500.0])
def test_ratios_that_overflow_are_numbers(advantage, far):
    def loss(x_T):
        others = x_T - far, jnp.full(1, advantage), jnp.ones(1)
        others = (jax.lax.stop_gradient(others[0]), *others[1:])
        return policy_loss(
            x_T, *others, clip_low=0.2, clip_high=0.2, reference_T=others[0], kl_coefficient=1.0
        )

    (value, metrics), gradient_T = jax.jit(jax.value_and_grad(loss, has_aux=True))(-jnp.ones(1))
    assert np.isfinite(value) and np.isfinite(gradient_T).all() and np.isfinite(metrics).all()


def test_settings_that_exclude_each_other():
    ones = jnp.ones(1)
    given = (-ones, -ones, ones, ones)
    with pytest.raises(UserError, match="truncated at 2.0 and clipped .*: choose one"):
        policy_loss(*given, truncate=2.0, clip_high=0.2)
    with pytest.raises(UserError, match="counts 0.1 and there is no reference"):
        policy_loss(*given, kl_coefficient=0.1)
    with pytest.raises(UserError, match="by k1 has a gradient of 0 in expectation"):
        policy_loss(*given, kl_coefficient=0.1, kl_estimator="k1", reference_T=-ones)
    with pytest.raises(UserError, match="no estimator 'k4': it is one of k1, k2, k3"):
        policy_loss(*given, kl_estimator="k4", reference_T=-ones)


# -- in expectation, over every token that one distribution can draw -------------------------------

LOGITS, OTHER = jnp.array([0.5, -1.0, 1.5, 0.0]), jnp.array([1.0, 0.3, -0.5, 0.2])


def exact_kl(p_V, q_V):
    return jnp.sum(jnp.exp(p_V) * (p_V - q_V))


def expected_gradient(loss_of_tokens):
    """By the logits, of the mean loss of tokens drawn from them; the draw has no gradient."""
    shares_V = jax.nn.softmax(LOGITS)
    loss = jax.jit(lambda z_V: loss_of_tokens(jax.nn.log_softmax(z_V), shares_V))
    return jax.jit(jax.grad(loss))(LOGITS)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimators_do_what_they_are_said_to(estimator):
    reference_V = jax.nn.log_softmax(OTHER)

    def loss(logprobs_V, shares_V):
        return jnp.sum(shares_V * kl_estimates(logprobs_V, reference_V, estimator))

    divergence = exact_kl(jax.nn.log_softmax(LOGITS), reference_V)
    value = loss(jax.nn.log_softmax(LOGITS), jax.nn.softmax(LOGITS))
    assert (abs(float(value - divergence)) < 1e-6) == (estimator != "k2")
    directions = {
        "k1": lambda z_V: 0.0 * z_V.sum(),
        "k2": lambda z_V: exact_kl(jax.nn.log_softmax(z_V), reference_V),
        "k3": lambda z_V: exact_kl(reference_V, jax.nn.log_softmax(z_V)),
    }
    expected_V = jax.jit(jax.grad(directions[estimator]))(LOGITS)
    np.testing.assert_allclose(expected_gradient(loss), expected_V, atol=1e-6)


def test_a_policy_gradient_ascends_the_expected_reward():
    rewards_V = jnp.array([1.0, 0.0, -2.0, 0.5])

    def loss(logprobs_V, shares_V, **settings):
        sampler_V = jax.nn.log_softmax(LOGITS)
        return policy_loss(logprobs_V, sampler_V, rewards_V, shares_V, **settings)[0]

    expected_V = jax.grad(lambda z_V: -jnp.sum(jax.nn.softmax(z_V) * rewards_V))(LOGITS)
    for settings in ({}, dict(clip_low=0.2, clip_high=0.3), dict(truncate=1.0)):
        found_V = expected_gradient(functools.partial(loss, **settings))
        np.testing.assert_allclose(found_V, expected_V, atol=1e-6)
