"""A reward model as a judge: a trained head on what a frozen model makes of a reply.

Only differences of rewards mean something: r₁ − r₂ is the log-odds that the first is preferred. The
score of a pair is σ(r₁ − r₂). That of one reply is σ(r): how probable it is that it is preferred to
one of the mean reward in training, which is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karploop.asking import Asked
from karploop.judging.opinion import Opinion
from karploop.models.reward_head import RewardHead

Reply = tuple[Asked, str]  # a prompt and its completion
Pair = tuple[Asked, str, str]  # a prompt and its two completions
# The hidden states of those that the context has room for, and for each reply why it has none ("").
Read = Callable[[Sequence[Reply]], tuple[np.ndarray, list[str]]]


@dataclass(frozen=True)
class RewardModel:
    """A head, and what reads replies for it."""

    head: RewardHead
    read: Read
    known_by: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What decides its rewards, as hashes."""
        return dict(self.known_by)

    def scores(self, replies: Sequence[Reply]) -> list[Opinion]:
        """Scores 0 … 1, with the reward itself as the criterion "reward"."""
        return [
            Opinion(None, reason, {"reward": None})
            if reason
            else Opinion(_sigmoid(reward), "", {"reward": reward})
            for reward, reason in self._rewards(replies)
        ]

    def pairs(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """How probable it is that the first is better. Nothing is shown first, so that there is no
        order to prefer: forward and backward are the same."""
        found = self._rewards([(prompt, text) for prompt, *two in pairs for text in two])
        opinions = []
        for (one, reason), (other, its_reason) in zip(found[::2], found[1::2], strict=True):
            criteria = {"reward of the first": one, "reward of the second": other}
            if reason or its_reason:
                opinions.append(Opinion(None, reason or its_reason, criteria))
            else:
                score = _sigmoid(one - other)
                opinions.append(Opinion(score, "", criteria, score, score))
        return opinions

    def _rewards(self, replies: Sequence[Reply]) -> list[tuple[float | None, str]]:
        """The raw reward of each reply, or why there is none."""
        hidden_NxE, reasons = self.read(replies)
        rewards = iter(self.head.rewards(hidden_NxE).tolist())
        return [(None, reason) if reason else (next(rewards), "") for reason in reasons]


def _sigmoid(x: float) -> float:
    return float(0.5 + 0.5 * np.tanh(x / 2))
