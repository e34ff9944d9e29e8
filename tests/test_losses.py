"""Objectives of preferences: by hand, by finite differences, and what padding must not do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from karploop.training.kto import KtoMetrics, kl_baseline, kto
from karploop.training.preference_losses import (
    PairLogprobs,
    PreferenceMetrics,
    dpo,
    ipo,
    orpo,
    simpo,
)
from karploop.training.reward import bradley_terry

# Four pairs of unequal lengths and weights; the better one is the likelier in some alone.
CHOSEN, REJECTED = [-4.0, -9.0, -2.5, -30.0], [-6.0, -7.5, -12.0, -28.0]
CHOSEN_LENGTHS, REJECTED_LENGTHS = [4.0, 6.0, 1.0, 20.0], [3.0, 5.0, 8.0, 25.0]
WEIGHTS = [1.0, 0.5, 2.0, 0.25]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-5.0, -8.0, -3.0, -29.0], [-5.5, -9.0, -10.0, -33.0]
PAIRS = PairLogprobs(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, WEIGHTS)
REFERENCES = (REFERENCE_CHOSEN, REFERENCE_REJECTED)
DESIRABLE = [True, False, False, True]


# -- in float64, straight from the formulas --------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mean(values, weights=WEIGHTS):
    return float(np.sum(np.asarray(weights) * values) / np.sum(weights))


def hand_dpo(w, l, label_smoothing=0.0, sft=0.0):  # noqa: E741, as in the papers
    margin = 0.3 * (w - np.array(REFERENCE_CHOSEN)) - 0.3 * (l - np.array(REFERENCE_REJECTED))
    losses = -(1 - label_smoothing) * np.log(sigmoid(margin))
    losses -= label_smoothing * np.log(sigmoid(-margin))
    return mean(losses - sft * w / np.array(CHOSEN_LENGTHS))


def hand_ipo(w, l, by_token):  # noqa: E741
    better, worse = w - np.array(REFERENCE_CHOSEN), l - np.array(REFERENCE_REJECTED)
    if by_token:
        better, worse = better / np.array(CHOSEN_LENGTHS), worse / np.array(REJECTED_LENGTHS)
    return mean((better - worse - 1 / (2 * 0.3)) ** 2)


def hand_simpo(w, l):  # noqa: E741
    better, worse = 2.5 * w / np.array(CHOSEN_LENGTHS), 2.5 * l / np.array(REJECTED_LENGTHS)
    return mean(-np.log(sigmoid(better - worse - 1.4)))


def hand_orpo(w, l):  # noqa: E741
    better, worse = np.exp(w / np.array(CHOSEN_LENGTHS)), np.exp(l / np.array(REJECTED_LENGTHS))
    ratio = (better / (1 - better)) / (worse / (1 - worse))
    return mean(-np.log(better) - 0.4 * np.log(sigmoid(np.log(ratio))))


def hand_kto(w, l):  # noqa: E741, the second argument is the mismatched completions
    z0 = max(0.0, mean(l - np.array(REFERENCE_REJECTED) + 2))
    gained = 0.3 * (w - np.array(REFERENCE_CHOSEN) - z0)
    losses = np.where(DESIRABLE, 0.8 * (1 - sigmoid(gained)), 1.7 * (1 - sigmoid(-gained)))
    return mean(losses)


# -- the same by the module, of (pairs, (reference chosen, rejected)) ------------------------------


def run_kto(pairs, references):
    baseline = kl_baseline(pairs.rejected_P, references[1] - 2, pairs.weights_P)
    desirable_P = jnp.resize(jnp.array(DESIRABLE), pairs.chosen_P.shape)
    return kto(
        pairs.chosen_P,
        references[0],
        desirable_P,
        pairs.weights_P,
        baseline,
        beta=0.3,
        desirable_weight=0.8,
        undesirable_weight=1.7,
    )


CASES = {
    "dpo": (lambda p, r: dpo(p, *r, beta=0.3), hand_dpo),
    "cdpo": (
        lambda p, r: dpo(p, *r, beta=0.3, label_smoothing=0.2),
        functools.partial(hand_dpo, label_smoothing=0.2),
    ),
    "dpo+sft": (lambda p, r: dpo(p, *r, beta=0.3, sft=0.5), functools.partial(hand_dpo, sft=0.5)),
    "ipo": (
        lambda p, r: ipo(p, *r, beta=0.3, by_token=False),
        functools.partial(hand_ipo, by_token=False),
    ),
    "ipo by token": (
        lambda p, r: ipo(p, *r, beta=0.3, by_token=True),
        functools.partial(hand_ipo, by_token=True),
    ),
    "simpo": (lambda p, r: simpo(p, beta=2.5, margin=1.4), hand_simpo),
    "orpo": (lambda p, r: orpo(p, odds_weight=0.4), hand_orpo),
    "kto": (run_kto, hand_kto),
}
every = pytest.mark.parametrize("run, hand", CASES.values(), ids=CASES)


def arrays(dtype=jnp.float32):
    to = lambda x: jnp.array(x, dtype)  # noqa: E731
    return PairLogprobs(*map(to, PAIRS)), tuple(map(to, REFERENCES))


@functools.cache
def compiled(run):
    def loss(chosen_P, rejected_P, pairs, references):
        return run(pairs._replace(chosen_P=chosen_P, rejected_P=rejected_P), references)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def slopes(run, pairs, references):
    """The loss, its metrics, and its gradients by the log-probabilities of both completions."""
    compute = compiled(run)
    (value, metrics), gradients = compute(pairs.chosen_P, pairs.rejected_P, pairs, references)
    return value, metrics, gradients


@every
def test_the_loss_and_its_gradient_by_hand(run, hand):
    value, _, gradients = slopes(run, *arrays())
    sides = np.array([CHOSEN, REJECTED])
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(hand(*sides), rel=1e-5)
    for side in (0, 1):
        for i in range(len(CHOSEN)):
            step = np.zeros_like(sides)
            step[side, i] = 1e-5
            expected = (hand(*(sides + step)) - hand(*(sides - step))) / 2e-5
            if hand is hand_kto and side == 1:
                expected = 0.0  # no gradient goes through the reference point
            assert float(gradients[side][i]) == pytest.approx(expected, abs=2e-5)


@every
def test_the_gradient_in_float64_by_finite_differences(run, hand):
    with jax.enable_x64(True):
        pairs, references = arrays(jnp.float64)

        @jax.jit
        def loss(*sides):
            changed = dict(zip(("chosen_P", "rejected_P"), sides, strict=False))
            return run(pairs._replace(**changed), references)[0]

        # KTO's gradient through its reference point is stopped, and not that of the value.
        sides = pairs[:1] if hand is hand_kto else pairs[:2]
        assert loss(*sides).dtype == jnp.float64
        check_grads(loss, sides, order=1, modes=["rev"], rtol=1e-6)


@every
@pytest.mark.parametrize("rubbish", [0.0, jnp.nan, -jnp.inf, 1e30])
def test_padding_makes_no_difference(run, hand, rubbish):
    pairs, references = arrays()

    def pad(x_P, by):
        return jnp.concatenate([x_P, jnp.full(2, by, x_P.dtype)])

    padded = PairLogprobs(*(pad(x_P, rubbish) for x_P in pairs))
    padded = padded._replace(weights_P=pad(pairs.weights_P, 0.0))
    value, metrics, gradients = slopes(run, pairs, references)
    far = tuple(pad(x_P, rubbish) for x_P in references)
    again, as_well, padded_gradients = slopes(run, padded, far)
    np.testing.assert_allclose([again, *as_well], [value, *metrics], rtol=1e-6)
    for gradient_P, padded_P in zip(gradients, padded_gradients, strict=True):
        np.testing.assert_allclose(padded_P, [*gradient_P, 0, 0], rtol=1e-6)


@every
def test_nothing_but_padding_has_no_loss_no_gradient_and_no_metrics(run, hand):
    pairs, references = arrays()
    value, metrics, gradients = slopes(
        run, pairs._replace(weights_P=jnp.zeros_like(pairs.weights_P)), references
    )
    assert float(value) == 0
    assert not np.any(gradients)
    assert np.isnan(metrics).all()


@every
def test_half_precision_is_computed_in_full(run, hand):
    pairs, references = arrays(jnp.bfloat16)
    value, metrics, _ = slopes(run, pairs, references)
    assert {x.dtype for x in (value, *metrics)} == {jnp.dtype(jnp.float32)}
    # These numbers are exact in bfloat16, but for a few, which are a little off.
    assert float(value) == pytest.approx(hand(np.array(CHOSEN), np.array(REJECTED)), rel=0.05)


@every
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_log_probabilities_far_apart_overflow_nothing(run, hand, far):
    pairs, references = arrays()
    pairs = pairs._replace(chosen_P=jnp.minimum(pairs.chosen_P + far, 0.0))
    value, metrics, gradients = slopes(run, pairs, references)
    assert np.isfinite(value) and np.isfinite(metrics).all() and np.isfinite(gradients).all()


# -- what each of them is for ----------------------------------------------------------------------


def test_at_the_reference_dpo_is_log_2_and_ipo_knows_its_margin():
    pairs, _ = arrays()
    here = (pairs.chosen_P, pairs.rejected_P)
    loss, metrics = dpo(pairs, *here, beta=0.1)
    assert float(loss) == pytest.approx(np.log(2))
    assert metrics == PreferenceMetrics(0.5, 0.0, 0.0, 0.0)  # ties: neither right nor wrong
    assert float(ipo(pairs, *here, beta=0.1, by_token=False)[0]) == pytest.approx(25)


def test_dpo_is_bradley_terry_of_its_rewards():
    pairs, references = arrays()
    rewards = (0.3 * (x - y) for x, y in zip(pairs[:2], references, strict=True))
    expected = bradley_terry(*rewards, pairs.weights_P)
    assert float(dpo(pairs, *references, beta=0.3)[0]) == pytest.approx(float(expected))


def test_metrics_by_hand():
    pairs, references = arrays()
    better = 0.3 * (np.array(CHOSEN) - REFERENCE_CHOSEN)
    worse = 0.3 * (np.array(REJECTED) - REFERENCE_REJECTED)
    right = [1.0, 0.0, 1.0, 0.0]  # by the log-ratios 1 > −0.5, −1 < 1.5, 0.5 > −2 and −1 < 5
    expected = [mean(x) for x in (right, better - worse, better, worse)]
    np.testing.assert_allclose(dpo(pairs, *references, beta=0.3)[1], expected, rtol=1e-5)
    np.testing.assert_allclose(
        ipo(pairs, *references, beta=0.3, by_token=False)[1], expected, rtol=1e-5
    )


def test_doubted_preferences_and_ipo_stop_at_a_margin():
    """Where the gradient is 0: at log((1 − ε)/ε) and at 1/(2β)."""
    zero = jnp.zeros(1)

    def one(chosen_P):
        return PairLogprobs(chosen_P, zero, zero + 1, zero + 1, zero + 1)

    def doubted(chosen_P):
        return dpo(one(chosen_P), zero, zero, beta=0.5, label_smoothing=0.1)[0]

    def squared(chosen_P):
        return ipo(one(chosen_P), zero, zero, beta=0.2, by_token=False)[0]

    for loss, margin in ((doubted, np.log(9) / 0.5), (squared, 2.5)):
        slope = jax.jit(jax.grad(loss))
        at, beyond = (float(slope(jnp.full(1, m))[0]) for m in (margin, margin + 1))
        assert at == pytest.approx(0, abs=1e-6) and beyond > 0.01


def test_simpo_does_not_see_length():
    pairs, _ = arrays()
    twice = pairs._replace(chosen_P=2 * pairs.chosen_P, chosen_lengths_P=2 * pairs.chosen_lengths_P)
    settings = dict(beta=2.0, margin=0.5)
    assert float(simpo(pairs, **settings)[0]) == pytest.approx(float(simpo(twice, **settings)[0]))


def test_orpo_of_a_certain_completion_is_a_number():
    """Odds of 1 are infinite; the loss and its slope are not."""
    pairs, references = arrays()
    certain = pairs._replace(chosen_P=jnp.zeros(4), rejected_P=jnp.zeros(4))
    value, metrics, gradients = slopes(CASES["orpo"][0], certain, references)
    assert float(value) == pytest.approx(0.4 * np.log(2), rel=1e-5)
    assert np.isfinite(metrics).all() and np.isfinite(gradients).all()


def test_kto_needs_no_good_ones_and_no_bad_ones():
    pairs, references = arrays()

    def of(desirable):
        given = (pairs.chosen_P, references[0], jnp.full(4, desirable), pairs.weights_P)
        return kto(*given, jnp.float32(0), beta=0.3)

    good, bad = of(True), of(False)
    assert float(good[0]) + float(bad[0]) == pytest.approx(1)  # σ(x) + σ(−x)
    assert np.isnan(good[1].undesirable) and np.isnan(bad[1].desirable)
    assert np.isnan(good[1].margin) and not np.isnan(good[1].desirable)


def test_metrics_of_kto_by_hand():
    pairs, references = arrays()
    _, metrics = run_kto(pairs, references)
    # Log-ratios 1, −1, 0.5, −1, all below the reference point, which is 4/3.
    good, bad = (1.0 - 0.25) * 0.3 / 1.25, (-0.5 + 1.0) * 0.3 / 2.5
    right = mean([0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(metrics, KtoMetrics(right, good - bad, good, bad), rtol=1e-5)


def test_the_reference_point_is_never_below_0():
    ones = jnp.ones(3)
    assert float(kl_baseline(jnp.array([-3.0, -2.0, -4.0]), -ones, ones)) == 0
    above = kl_baseline(jnp.array([2.0, -1.0, jnp.nan]), -ones, jnp.array([1.0, 2.0, 0.0]))
    assert float(above) == pytest.approx(1)
    assert float(kl_baseline(ones, -ones, jnp.zeros(3))) == 0


# -- Bradley–Terry ---------------------------------------------------------------------------------


def test_pairs_without_weight_do_not_move_a_reward_model():
    chosen_N, rejected_N, weights_N = (jnp.array(x) for x in (CHOSEN, REJECTED, WEIGHTS))
    compute = jax.jit(jax.value_and_grad(bradley_terry, argnums=(0, 1)))
    loss, gradients = compute(chosen_N, rejected_N, weights_N, 0.1)
    for far in (0.0, 1e4, -1e4):
        padded = (jnp.append(x_N, y) for x_N, y in ((chosen_N, far), (rejected_N, -far)))
        again, as_well = compute(*padded, jnp.append(weights_N, 0.0), 0.1)
        assert float(again) == pytest.approx(float(loss))
        for gradient_N, padded_N in zip(gradients, as_well, strict=True):
            np.testing.assert_allclose(padded_N, [*gradient_N, 0], rtol=1e-6)
