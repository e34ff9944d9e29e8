"""The objectives against those of trl, values and gradients, from the same log-probabilities.

trl's losses are methods of trainers. They are called here without one: on an object that has the
settings they read, and with a model that returns log-probabilities drawn at random.
"""

from __future__ import annotations

import collections
import functools
import os
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the losses are compared with trl's, in torch")
pytest.importorskip("trl", reason="the losses are compared with trl's (requirements-dev.txt)")

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that its parts may move

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402
from trl.trainer.reward_trainer import RewardTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

from karploop.training.advantages import grpo  # noqa: E402
from karploop.training.distillation import distillation_loss  # noqa: E402
from karploop.training.kto import kl_baseline, kto  # noqa: E402
from karploop.training.policy_losses import policy_loss, token_shares  # noqa: E402
from karploop.training.preference_losses import (  # noqa: E402
    PairLogprobs,
    dpo,
    ipo,
    orpo,
    simpo,
)
from karploop.training.reward import bradley_terry, metrics_of_rewards  # noqa: E402

ROWS, LENGTH, BETA = 5, 7, 0.3


def same(x):
    return x


ACCELERATOR = types.SimpleNamespace(
    device="cpu",
    num_processes=1,
    gather=same,
    gather_for_metrics=same,
    reduce=lambda x, reduction: x,
)


def trainer(**settings):
    """What trl's methods take for a trainer: these settings, and one process on the CPU."""
    shared = dict(
        accelerator=ACCELERATOR,
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=BETA,
        label_smoothing=0.0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    return types.SimpleNamespace(**(shared | settings))


@functools.cache
def drawn(rows: int, seed: int = 0):
    """Log-probabilities of tokens, of two models, and which tokens are the completion's.

    The first column is the prompt's; completions have from one token to all the rest.
    """
    rng = np.random.default_rng(seed)
    lengths = 1 + np.arange(rows) * (LENGTH - 1) // (rows - 1)
    mask = (np.arange(LENGTH + 1) >= 1) & (
        np.arange(LENGTH + 1) <= rng.permutation(lengths)[:, None]
    )
    two = [np.where(mask[:, 1:], -rng.exponential(size=(rows, LENGTH)), 0.0) for _ in range(2)]
    return (*(x.astype(np.float32) for x in two), mask)


def one_output(logprobs):
    """What the model under trl's trainers returns, as far as its losses and metrics read it."""
    zeros = torch.zeros_like(logprobs).detach()
    return types.SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def compare(theirs, logprobs, ours, *arrays):
    """Equal losses and equal gradients, by the torch tensor `logprobs`, which is `arrays[0]`."""
    theirs.backward()
    compute = jax.jit(jax.value_and_grad(ours))
    value, gradient = compute(*(jnp.array(x) for x in arrays))
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    found = logprobs.grad.numpy()
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(gradient, found, rtol=1e-4, atol=1e-6)


# -- preferences -----------------------------------------------------------------------------------


def pairs_of(logprobs_QxL, mask) -> PairLogprobs:
    """The first half of the rows is the better, as in trl's batches."""
    better, worse = jnp.split(logprobs_QxL.sum(axis=1), 2)
    lengths = np.split(mask[:, 1:].sum(axis=1).astype(np.float32), 2)
    return PairLogprobs(better, worse, *lengths, jnp.ones(len(better)))


def in_pairs(loss):
    """`loss(pairs, (reference of the better, of the worse))` as a function of token arrays."""

    def ours(logprobs_QxL, reference_QxL, mask):
        references = jnp.split(reference_QxL.sum(axis=1), 2)
        return loss(pairs_of(logprobs_QxL, mask), references)[0]

    return ours


@pytest.mark.parametrize(
    "kinds, loss",
    [
        ({"sigmoid": 1.0}, lambda p, r: dpo(p, *r, beta=BETA)),
        ({"ipo": 1.0}, lambda p, r: ipo(p, *r, beta=BETA, by_token=True)),
    ],
    ids=["dpo", "ipo"],
)
def test_dpo_and_ipo(kinds, loss):
    policy, reference, mask = drawn(2 * ROWS)
    logprobs = torch.tensor(policy, requires_grad=True)
    chosen, rejected = torch.tensor(reference).sum(1).chunk(2)
    given = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(kinds),
        loss_weights=list(kinds.values()),
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = dict(
        input_ids=torch.zeros(mask.shape, dtype=torch.long),
        attention_mask=torch.ones(mask.shape, dtype=torch.long),
        completion_mask=torch.tensor(mask).long(),
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
    )
    theirs = DPOTrainer._compute_loss(given, lambda **_: one_output(logprobs), batch, False)
    compare(theirs, logprobs, in_pairs(loss), policy, reference, mask)
    if "sigmoid" in kinds:
        references = np.split(reference.sum(axis=1), 2)
        _, metrics = dpo(pairs_of(jnp.array(policy), mask), *references, beta=BETA)
        names = ("accuracies", "margins", "chosen", "rejected")
        logged = [given._metrics["train"][f"rewards/{name}"][0] for name in names]
        np.testing.assert_allclose(metrics, logged, rtol=1e-4)


@pytest.mark.parametrize("kind", ["cdpo", "simpo"])
def test_label_smoothing_and_simpo(kind):
    """trl smooths labels in CPO alone, which is DPO where log-ratios go in."""
    policy, reference, mask = drawn(2 * ROWS, seed=1)
    lengths = mask[:, 1:].sum(axis=1).astype(np.float32)
    logprobs = torch.tensor(policy, requires_grad=True)
    if kind == "cdpo":
        given = trainer(alpha=0.0, loss_type="sigmoid", label_smoothing=0.2)
        sides = (logprobs - torch.tensor(reference)).sum(1).chunk(2)
        ours = in_pairs(lambda p, r: dpo(p, *r, beta=BETA, label_smoothing=0.2))
    else:
        given = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.5)
        sides = (logprobs.sum(1) / torch.tensor(lengths)).chunk(2)
        ours = in_pairs(lambda p, r: simpo(p, beta=BETA, margin=0.5))
    theirs = CPOTrainer.cpo_loss(given, *sides)[0].mean()
    compare(theirs, logprobs, ours, policy, reference, mask)


def test_orpo():
    """trl's supervised term has the prompt and is left out, so ours is subtracted."""
    policy, reference, mask = drawn(2 * ROWS, seed=2)
    lengths = mask[:, 1:].sum(axis=1).astype(np.float32)
    logprobs = torch.tensor(policy, requires_grad=True)
    better, worse = (logprobs.sum(1) / torch.tensor(lengths)).chunk(2)
    theirs = -ORPOTrainer.odds_ratio_loss(trainer(), better, worse)[0].mean()

    def ours(logprobs_QxL, mask):
        pairs = pairs_of(logprobs_QxL, mask)
        supervised = -jnp.mean(pairs.chosen_P / pairs.chosen_lengths_P)
        return orpo(pairs, odds_weight=BETA)[0] - supervised

    compare(theirs, logprobs, ours, policy, mask)


@pytest.mark.parametrize("seed", [3, 4])
def test_kto(seed):
    policy, reference, mask = drawn(ROWS, seed)
    mismatched, far, _ = drawn(ROWS, seed + 10)
    desirable = np.array([True, False, True, True, False])
    logprobs = torch.tensor(policy, requires_grad=True)
    given = trainer(
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        desirable_weight=0.8,
        undesirable_weight=1.7,
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: torch.tensor(mismatched).sum(1),
    )
    batch = dict(
        input_ids=torch.zeros(mask.shape, dtype=torch.long),
        attention_mask=torch.ones(mask.shape, dtype=torch.long),
        completion_mask=torch.tensor(mask).long(),
        label=torch.tensor(desirable),
        ref_logps=torch.tensor(reference).sum(1),
        ref_KL_logps=torch.tensor(far).sum(1),
    )
    theirs = KTOTrainer._compute_loss(given, lambda **_: one_output(logprobs), batch, False)
    ones = jnp.ones(ROWS)
    baseline = kl_baseline(jnp.array(mismatched).sum(1), jnp.array(far).sum(1), ones)
    assert float(baseline) == pytest.approx(given._metrics["train"]["kl"][0], rel=1e-5)

    def run(logprobs_NxL, reference_NxL):
        sums = logprobs_NxL.sum(axis=1), reference_NxL.sum(axis=1)
        weights = dict(desirable_weight=0.8, undesirable_weight=1.7)
        return kto(*sums, jnp.array(desirable), ones, baseline, beta=BETA, **weights)

    compare(theirs, logprobs, lambda *x: run(*x)[0], policy, reference)
    _, metrics = run(jnp.array(policy), jnp.array(reference))
    logged = [
        given._metrics["train"][f"rewards/{name}"][0] for name in ("margins", "chosen", "rejected")
    ]
    np.testing.assert_allclose(metrics[1:], logged, rtol=1e-4)


# -- rewards ---------------------------------------------------------------------------------------

ADVANTAGES = np.array([1.0, -0.7, 0.0, 2.0, -1.5], np.float32)


@pytest.mark.parametrize("coefficient", [0.0, 0.2])
@pytest.mark.parametrize(
    "kind, aggregate", [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_grpo(kind, aggregate, coefficient):
    policy, reference, mask = drawn(ROWS, seed=5)
    sampler = (policy + np.random.default_rng(6).normal(size=policy.shape) * 0.4).astype(np.float32)
    wanted = mask[:, 1:]
    logprobs = torch.tensor(policy, requires_grad=True)
    entropies = torch.zeros(policy.shape)
    given = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=coefficient,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type=kind,
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    batch = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones_like(ids[:, :1]),
        completion_ids=ids[:, 1:],
        completion_mask=torch.tensor(wanted).long(),
        advantages=torch.tensor(ADVANTAGES),
        old_per_token_logps=torch.tensor(sampler),
        ref_per_token_logps=torch.tensor(reference),
        num_items_in_batch=torch.tensor(wanted.sum()),
    )
    theirs = GRPOTrainer._compute_loss(given, None, batch)
    rows_RxL = jnp.broadcast_to(jnp.arange(ROWS)[:, None], wanted.shape)
    shares_RxL = token_shares(jnp.array(wanted), rows_RxL, ROWS, aggregate, ROWS * LENGTH)
    advantages_RxL = jnp.broadcast_to(jnp.array(ADVANTAGES)[:, None], wanted.shape)

    def run(logprobs_RxL, sampler_RxL, reference_RxL):
        return policy_loss(
            *(logprobs_RxL, sampler_RxL, advantages_RxL, shares_RxL),
            clip_low=0.2,
            clip_high=0.28,
            reference_T=reference_RxL,
            kl_coefficient=coefficient,
        )

    compare(theirs, logprobs, lambda *x: run(*x)[0], policy, sampler, reference)
    _, metrics = run(*map(jnp.array, (policy, sampler, reference)))
    logged = given._metrics["train"]
    assert float(metrics.clipped) == pytest.approx(logged["clip_ratio/region_mean"][0]) != 0
    if coefficient:
        assert float(metrics.kl_reference) == pytest.approx(logged["kl"][0], rel=1e-5)


def test_rloo():
    """There the action is the completion: log-probabilities are summed, all count the same."""
    policy, _, mask = drawn(ROWS, seed=7)
    sampler = policy.sum(1) + np.array([0.3, -0.4, 0.1, -0.1, 0.5], np.float32)
    logprobs = torch.tensor(policy, requires_grad=True)
    entropies = torch.zeros(policy.shape)
    given = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        epsilon_low=0.2,
        epsilon_high=0.2,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    batch = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=torch.ones_like(ids[:, :1]),
        completion_ids=ids[:, 1:],
        completion_mask=torch.tensor(mask[:, 1:]).long(),
        advantages=torch.tensor(ADVANTAGES),
        old_logps=torch.tensor(sampler),
    )
    theirs = RLOOTrainer._compute_loss(given, None, batch)

    def ours(logprobs_SxL, sampler_S):
        sums_S = jnp.sum(logprobs_SxL, axis=1, where=mask[:, 1:])
        given = (sums_S, sampler_S, jnp.array(ADVANTAGES), jnp.full(ROWS, 1 / ROWS))
        return policy_loss(*given, clip_low=0.2, clip_high=0.2)[0]

    compare(theirs, logprobs, ours, policy, sampler)


def test_the_deviation_of_a_group_with_missing_rewards():
    """trl makes advantages in the midst of sampling; what can be called is its deviation."""
    rewards = torch.tensor([[1.0, 0.0, torch.nan, 0.25], [0.5, 2.0, 1.0, 1.0]])
    theirs = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, 1, True) + 1e-4)
    ours = grpo(rewards.numpy().ravel(), np.repeat([0, 1], 4))
    np.testing.assert_allclose(ours.values_S, theirs.nan_to_num(0.0).ravel(), rtol=1e-5)


# -- rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("centring", [None, 0.05])
def test_reward_models(centring):
    rewards = np.random.default_rng(9).normal(size=2 * ROWS).astype(np.float32)
    logits = torch.tensor(rewards, requires_grad=True)
    given = trainer(
        args=types.SimpleNamespace(center_rewards_coefficient=centring),
        _total_train_tokens=0,
        _tp_size=1,
    )

    def model(**_):
        return types.SimpleNamespace(logits=logits[:, None])

    inputs = {"attention_mask": torch.ones(2 * ROWS, LENGTH)}
    theirs = RewardTrainer.compute_loss(given, model, inputs)

    def ours(rewards_T):
        return bradley_terry(*jnp.split(rewards_T, 2), jnp.ones(ROWS), centring or 0.0)

    compare(theirs, logits, ours, rewards)
    found = metrics_of_rewards(*jnp.split(jnp.array(rewards), 2), jnp.ones(ROWS))
    logged = given._metrics["train"]
    assert float(found.accuracy) == pytest.approx(logged["accuracy"][0])
    assert float(found.margin) == pytest.approx(logged["margin"][0], rel=1e-5)
    assert float(found.mean) == pytest.approx(logged["mean_reward"][0], rel=1e-5)


# -- teachers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beta, divergence", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "jsd"), (0.1, "jsd")]
)
def test_generalised_distillation(beta, divergence):
    """What trl calls β = 0 and 1 has its name here."""
    rng = np.random.default_rng(8)
    student, teacher = (rng.normal(size=(6, 11)).astype(np.float32) * 2 for _ in range(2))
    counted = np.array([1, 1, 0, 1, 0, 1])
    logits = torch.tensor(student, requires_grad=True)
    labels = torch.where(torch.tensor(counted) > 0, 3, -100)
    theirs = GKDTrainer.generalized_jsd_loss(logits, torch.tensor(teacher), labels, beta)

    def ours(student_TxV, teacher_TxV, shares_T):
        models = (jax.nn.log_softmax(x) for x in (student_TxV, teacher_TxV))
        return distillation_loss(*models, shares_T, divergence, beta)

    compare(theirs, logits, ours, student, teacher, (counted / 4).astype(np.float32))
