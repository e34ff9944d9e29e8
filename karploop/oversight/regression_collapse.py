"""Iterated linear regression, in closed form and simulated: what learning from oneself costs.

Generation 1 fits least squares to T rows x ~ N(0, I_d) with labels y = x · w + σ ε. Every later one
fits rows with fresh x, T a generation, whose labels are the model before's, with fresh noise: those
of the last generation (replace) or of all of them, the real ones among them (accumulate; both arXiv
2404.01413), or T drawn from all (budget, arXiv 2410.16713). The test error of a model v is
E (x · v − x · w)² = |v − w|².

Each fit adds an independent error to the model before. With A_i = X_iᵀ X_i of generation i:

  replace      v_n = v_{n−1} + σ A_n⁻¹ X_nᵀ ε_n, and E tr A⁻¹ = d / (T − d − 1)
  accumulate   v_n = v_{n−1} + σ S_n⁻¹ X_nᵀ ε_n with S_n = A_1 + … + A_n, for v_{n−1} solves the
               normal equations of the rows before. As generations are alike,
               E tr S_n⁻¹ A_n S_n⁻¹ = E tr S_n⁻¹ / n = d / (n (nT − d − 1))
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from karploop.errors import UserError
from karploop.reporting.statistics import Estimate, mean_interval
from karploop.rng import folded

REGIMES = ("replace", "accumulate", "budget")
_BATCH = 256  # repetitions at a time


@dataclasses.dataclass(frozen=True)
class Regression:
    """What is simulated. The error scales with σ², and w makes no difference to it: it is 0."""

    features: int = 20  # d
    rows: int = 100  # T, of a generation
    noise: float = 1.0  # σ
    generations: int = 6  # the first is fitted to real labels
    repetitions: int = 2048

    def __post_init__(self):
        if self.features < 1 or self.rows < self.features + 2:
            raise UserError(
                f"{self.rows} rows of {self.features} features: the error of a fit has a mean only "
                "with at least two rows more than features"
            )
        if self.generations < 1 or self.repetitions < 2:
            raise UserError(
                f"{self.generations} generations, {self.repetitions} repetitions: want at least 1 "
                "and 2"
            )

    @property
    def unit(self) -> float:
        """The expected error of generation 1, σ²d / (T − d − 1)."""
        return self.noise**2 * self.features / (self.rows - self.features - 1)


def closed_form(regression: Regression, regime: str) -> list[float] | None:
    """The expected test error of each generation; None for budget, where none is known."""
    count_G = np.arange(1, regression.generations + 1)
    if regime == "replace":
        return (regression.unit * count_G).tolist()
    if regime == "accumulate":
        d = regression.features
        steps_G = regression.noise**2 * d / (count_G * (count_G * regression.rows - d - 1))
        return np.cumsum(steps_G).tolist()
    return None


def bound(regression: Regression) -> float:
    """What accumulating stays below for ever: σ²d / (T − d − 1) · π²/6 (arXiv 2404.01413)."""
    return regression.unit * math.pi**2 / 6


def simulate(regression: Regression, regime: str, seed: int = 0) -> np.ndarray:
    """Test errors of independent repetitions, error_NxG."""
    keys = jax.random.split(folded([seed, REGIMES.index(regime)]), regression.repetitions)
    run = functools.partial(_errors, regression, regime)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=_BATCH))(keys))


def measure(regression: Regression, seed: int = 0) -> dict[str, list[Estimate]]:
    """By regime, the mean test error of each generation with its 95% interval."""
    return {
        regime: [mean_interval(error_N) for error_N in simulate(regression, regime, seed).T]
        for regime in REGIMES
    }


def _errors(regression: Regression, regime: str, key: jax.Array) -> jax.Array:
    """One repetition: error_G."""
    rows, generations = regression.rows, regression.generations
    shape = (generations, rows, regression.features)
    x_key, noise_key, draw_key = jax.random.split(key, 3)
    x_GxTxD = jax.random.normal(x_key, shape)
    noise_GxT = regression.noise * jax.random.normal(noise_key, shape[:2])
    # Noise of budget's draws: its rows are those with the highest scores.
    score_GxM = jax.random.uniform(draw_key, (generations, generations * rows))
    row_generation_M = jnp.repeat(jnp.arange(generations), rows)
    x_MxD = x_GxTxD.reshape(-1, regression.features)

    def generation(carry, now):
        model_D, label_M = carry
        place, score_M = now
        label_T = x_GxTxD[place] @ model_D + noise_GxT[place]
        label_M = jax.lax.dynamic_update_slice(label_M, label_T, (place * rows,))
        if regime == "replace":
            used_M = row_generation_M == place
        else:
            used_M = row_generation_M <= place
        if regime == "budget":
            score_M = jnp.where(used_M, score_M, -1.0)
            used_M = score_M >= jax.lax.top_k(score_M, rows)[0][-1]
        model_D = _least_squares(x_MxD, label_M, used_M)
        return (model_D, label_M), jnp.sum(model_D**2)

    start = (jnp.zeros(regression.features), jnp.zeros(generations * rows))
    return jax.lax.scan(generation, start, (jnp.arange(generations), score_GxM))[1]


def _least_squares(x_MxD: jax.Array, label_M: jax.Array, used_M: jax.Array) -> jax.Array:
    """The fit to the rows that are used, by the normal equations."""
    used_MxD = jnp.where(used_M[:, None], x_MxD, 0.0)
    factor = jax.scipy.linalg.cho_factor(used_MxD.T @ used_MxD)
    return jax.scipy.linalg.cho_solve(factor, used_MxD.T @ label_M)
