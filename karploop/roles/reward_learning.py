"""A reward model learnt on a checkpoint: its head alone, or what lies below it, too."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from karploop.config import RewardConfig
from karploop.models.checkpoint import save_checkpoint
from karploop.models.peft import save_peft
from karploop.models.reward_head import RewardHead
from karploop.models.weights import Weights
from karploop.reporting.progress import Progress
from karploop.rng import folded
from karploop.roles.local import LocalModel
from karploop.roles.reward import ADAPTER, MODEL, Replies, Spelling
from karploop.training.reward import bradley_terry
from karploop.training.reward_head import Pairs, fit_head
from karploop.training.reward_tuning import Tuned, tune

Texts = tuple[list[int], list[int]]  # tokens of the better and the worse, prompts included


@dataclass(frozen=True)
class Learnt:
    """A reward model, and what it makes of all comparisons.

    Attributes:
      pairs: hidden states and weights, of those held out, too.
      reached: the loss on those that it was trained on, and what else is known of the end.
      tuned: None where the head alone was trained.
    """

    head: RewardHead
    pairs: Pairs
    reached: dict[str, float]
    weights: Weights
    tuned: Tuned | None

    def save(self, model: LocalModel, base: str, folder: pathlib.Path) -> None:
        """Writes what was trained beside the head.

        Args:
          base: the checkpoint's path, for those who load an adapter elsewhere.
        """
        tuned = self.tuned
        if tuned.adapter is not None:
            (folder / ADAPTER).mkdir()
            save_peft(folder / ADAPTER, tuned.adapter, tuned.lora, self.weights, base=base)
        else:
            (folder / MODEL).mkdir()
            config = model.checkpoint.config
            save_checkpoint(folder / MODEL, tuned.params, self.weights, config=config)


def learn(
    config: RewardConfig,
    model: LocalModel,
    spelling: Spelling,
    mesh: Mesh,
    texts: Sequence[Texts],
    weights_N: np.ndarray,
    trains_N: np.ndarray,
    progress: Progress,
) -> Learnt:
    """Trains what `config.tune` says.

    Args:
      texts, weights_N: of N comparisons.
      trains_N: which of them are trained on; the others are read alone.

    Raises:
      UserError: two texts do not fit into a batch together.
      Diverged: the loss became NaN or infinite.
    """
    weights, params = model.load(mesh)
    training, tuned = np.flatnonzero(trains_N), None
    if config.tune != "head":
        given = [texts[i] for i in training]
        tuned = tune(weights, params, given, weights_N[training], config, progress)
        params = tuned.params
    replies = Replies(weights, params, spelling, model.tokenizer.pad_id, config.batch)
    pairs = _read(replies, texts, weights_N, progress)
    seen = Pairs(*(x[training] for x in pairs))
    if tuned:
        head, loss = _centred(tuned.weights_E, seen, config.centring)
        return Learnt(head, pairs, {"loss": loss}, weights, tuned)
    key = folded([config.seed])
    settings = {"l2": config.l2, "centring": config.centring, "steps": config.steps}
    fitted = fit_head(seen, **settings, key=key, mesh=mesh)
    reached = {"loss": fitted.loss, "gradient": fitted.gradient}
    return Learnt(fitted.head, pairs, reached, weights, None)


def _centred(weights_E: np.ndarray, seen: Pairs, centring: float) -> tuple[RewardHead, float]:
    """The head under which these pairs have a mean reward of 0, and their loss with it."""
    head = RewardHead(weights_E, 0.0)
    rewards_2xN = np.stack([head.rewards(x) for x in (seen.chosen_NxE, seen.rejected_NxE)])
    mean = float(np.average(rewards_2xN.mean(0), weights=seen.weights_N))
    loss = bradley_terry(*(rewards_2xN - mean), seen.weights_N, centring)
    return head._replace(offset=-mean), float(loss)


def _read(
    replies: Replies, texts: Sequence[Texts], weights_N: np.ndarray, progress: Progress
) -> Pairs:
    """The hidden states of all texts; one that stands in several comparisons is read once."""
    flat = [text for pair in texts for text in pair]
    with progress.stage(None, "read", len({tuple(text) for text in flat}), "replies") as stage:
        hidden_NxE = replies.hidden(flat, stage.advance)
    return Pairs(hidden_NxE[::2], hidden_NxE[1::2], weights_N)
