"""Does a debate help a judge of few pixels to the right label? One seed of the question.

A judge is trained on one part of the digits that come with scikit-learn; games are about images of
the other part. Whatever the games, the judge compares logits of claims, and it is right where the
true label's is the higher one. What the liar claims is decided in one of three ways, by which alone
accuracies can be compared:

  random  a false label drawn beforehand, the mean over all nine: the judge decides between two
  first   the false label that is best for the liar, chosen before any pixel is revealed. It is what
          the paper calls pre-commitment: "the liar wins if any lie wins"
  last    the false label that is best for the liar, chosen at the end: the judge is right only if
          the true label has the highest logit of all ten, as a classifier is
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from karploop.errors import UserError
from karploop.oversight.debate_game import Outcomes, Tables, levels, make_tables, play, solve
from karploop.oversight.sparse_judge import SparseJudge, train
from karploop.rng import folded

CLASSES = 10
LARGEST = 16  # a pixel's value
EXAMPLES = 3  # of each outcome
CLAIMS = ("random", "first", "last")
RANDOM, CONSULTANCY, DEBATE = "random pixels", "consultancy", "debate"
HONEST_FIRST, HONEST_LAST = "debate, honest first", "debate, honest last"
HONEST, LYING = "consultant honest", "consultant lying"
PROTOCOLS = (RANDOM, CONSULTANCY, HONEST, LYING, HONEST_FIRST, HONEST_LAST, DEBATE)
MAX_PIXELS = 6  # C(42, 6) is 5.2 million ends of a game, C(42, 8) 118 million


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a judge and of the games it decides."""

    pixels: int  # revealed in all; even, so that both players have as many turns
    images: int = 300  # held out, of 1,797
    steps: int = 5000
    batch: int = 128
    width: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 0.01

    def __post_init__(self):
        if not 2 <= self.pixels <= MAX_PIXELS or self.pixels % 2:
            raise UserError(
                f"--pixels={self.pixels}: both players reveal as many, all games are worked out "
                f"to the end, so it is an even number from 2 to {MAX_PIXELS}"
            )
        for name in ("images", "steps", "batch", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.images > 1700:
            raise UserError(f"--images={self.images} of 1,797 leaves too few to train a judge on")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of a seed, values between 0 and 1, labels 0 … 9; P = 64 pixels in reading order."""

    train_NxP: np.ndarray
    train_labels_N: np.ndarray
    held_out_BxP: np.ndarray
    held_out_labels_B: np.ndarray


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    values_NxP, labels_N = load_digits(return_X_y=True)
    return (values_NxP / LARGEST).astype(np.float32), labels_N.astype(np.int32)


@functools.lru_cache(maxsize=1)  # 200 MB of those for 6 pixels
def digit_tables(pixels: int) -> Tables:
    """Tables that serve every image."""
    return make_tables(int((_digits()[0] > 0).sum(axis=1).max()), pixels)


def split(seed: int, images: int) -> Split:
    """Holds out so many images at random."""
    values_NxP, labels_N = _digits()
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    held_out, rest = order_N[:images], order_N[images:]
    return Split(values_NxP[rest], labels_N[rest], values_NxP[held_out], labels_N[held_out])


def trained(settings: Settings, data: Split, seed: int) -> tuple[SparseJudge, dict]:
    """A judge for so many pixels, and its parameters."""
    judge = SparseJudge(data.train_NxP.shape[1], CLASSES, settings.width)
    params, _ = train(
        judge,
        folded([seed, settings.pixels]),
        jnp.asarray(data.train_NxP),
        jnp.asarray(data.train_labels_N),
        revealed=settings.pixels,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    return judge, params


def measure(settings: Settings, seed: int) -> dict[str, Any]:
    """Trains a judge, plays every game about every held-out image, and says how often it is right.

    Returns:
      "accuracy": protocol → claim → share of images; "nonzero": pixels of a held-out image that
      are not 0, on average; "ends": sets of pixels judged of an image, on average; "examples".
    """
    data = split(seed, settings.images)
    judge, params = trained(settings, data, seed)
    tables = digit_tables(settings.pixels)
    outcomes = solve(judge, params, tables, data.held_out_BxP, data.held_out_labels_B)
    nonzero_B = (data.held_out_BxP > 0).sum(axis=1)
    return {
        "accuracy": accuracies(outcomes, data.held_out_labels_B),
        "nonzero": float(nonzero_B.mean()),
        "ends": float(np.mean([math.comb(n, settings.pixels) for n in nonzero_B])),
        "examples": examples(judge, params, tables, outcomes, data),
    }


def examples(
    judge: SparseJudge, params: dict, tables: Tables, outcomes: Outcomes, data: Split
) -> list[dict[str, Any]]:
    """Debates to look at: the first images on which honesty beats every lie, and not every one.

    Honesty begins. The lie is the one with which the judge is deceived most, by a debate or else
    by random pixels.
    """
    won_BxL = np.asarray(outcomes.honest_first_BxA)[:, :CLASSES]
    share_BxL = np.asarray(outcomes.random_BxA)[:, :CLASSES]
    false_BxL = np.arange(CLASSES)[None] != data.held_out_labels_B[:, None]
    lie_B = np.where(false_BxL, won_BxL + share_BxL, np.inf).argmin(axis=1)
    won_B = won_BxL[np.arange(len(lie_B)), lie_B]
    picked = [*np.flatnonzero(won_B)[:EXAMPLES], *np.flatnonzero(~won_B)[:EXAMPLES]]
    rng, found = np.random.default_rng(0), []
    for row in picked:
        values_P, label = data.held_out_BxP[row], data.held_out_labels_B[row]
        words, _, _ = levels(judge, params, tables, values_P, label)
        (shown_N,) = np.nonzero(values_P)
        words = jax.device_get(words)
        moves = play(words, tables, len(shown_N), int(lie_B[row]), True, rng)
        found.append(
            {
                "image": (values_P * LARGEST).astype(int).tolist(),
                "label": int(label),
                "lie": int(lie_B[row]),
                "moves": shown_N[moves].tolist(),  # honesty, the liar, honesty …
                "honest_wins": bool(won_B[row]),
            }
        )
    return found


def accuracies(outcomes: Outcomes, labels_B: np.ndarray) -> dict[str, dict[str, float]]:
    """How often the judge is right: protocol → claim → mean over images.

    A consultant is one player who reveals all pixels, honest or lying with equal probability.
    Random pixels are not sampled: it is the mean over all sets of an image.
    """
    by_name = {
        RANDOM: outcomes.random_BxA,
        HONEST: outcomes.honest_alone_BxA,
        LYING: outcomes.liar_alone_BxA,
        HONEST_FIRST: outcomes.honest_first_BxA,
        HONEST_LAST: outcomes.liar_first_BxA,
    }
    found = {name: _by_claim(np.asarray(won), labels_B) for name, won in by_name.items()}
    pairs = {CONSULTANCY: (HONEST, LYING), DEBATE: (HONEST_FIRST, HONEST_LAST)}
    for name, (one, other) in pairs.items():
        found[name] = {c: (found[one][c] + found[other][c]) / 2 for c in CLAIMS}
    return {name: found[name] for name in PROTOCOLS}


def _by_claim(won_BxA: np.ndarray, labels_B: np.ndarray) -> dict[str, float]:
    classes = won_BxA.shape[1] - 1
    false_BxC = np.arange(classes)[None] != labels_B[:, None]
    # Each image has classes − 1 false labels.
    won_BxL = won_BxA[:, :classes][false_BxC].reshape(-1, classes - 1).astype(np.float64)
    best_B = won_BxL.min(axis=1)
    last_B = won_BxA[:, classes].astype(np.float64)
    return dict(
        zip(CLAIMS, map(float, (won_BxL.mean(), best_B.mean(), last_B.mean())), strict=True)
    )
