"""The `corrupt` stage: wrong labels put in on purpose, to see what a loop withstands.

Only an ablation asks for it. The rows keep their origin, so that lineage and the round's log still
tell what the model had written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from karploop.config import NoiseConfig
from karploop.records import EXAMPLES_FILE, Examples
from karploop.stages import StageContext


def corrupt(context: StageContext, *, config: NoiseConfig) -> None:
    """Replaces the completions of a share `rate` of inputs['kept']'s rows by wrong ones."""
    examples = Examples.from_table(context.inputs["kept"].table(EXAMPLES_FILE))
    rng = context.numpy_rng
    count = round(config.rate * len(examples))
    rows = rng.permutation(len(examples))[:count].tolist()
    completions = list(examples.completions)
    for row, wrong in zip(rows, corrupted(examples, rows, config, rng), strict=True):
        completions[row] = wrong
    noisy = dataclasses.replace(examples, completions=completions)
    context.write_table(EXAMPLES_FILE, noisy.to_table())


def corrupted(
    examples: Examples,
    rows: Sequence[int],
    config: NoiseConfig,
    rng: np.random.Generator,
) -> list[str]:
    """A wrong completion for each of `rows`, by the structure of the noise.

    digit: one character replaced by another. random: every character drawn anew. swap: the
    completion of another row among `rows` (well formed, right for another prompt). drop: the
    last character is missing, the error that a model makes by itself on longer problems.
    Characters are drawn from those that prompts and completions use.
    """
    given = [examples.completions[row] for row in rows]
    alphabet = sorted(set("".join(examples.prompts + examples.completions)))

    def one_changed(text: str) -> str:
        if not text:  # an empty answer is made wrong by saying something
            return str(rng.choice(alphabet))
        place = int(rng.integers(len(text)))
        other = rng.choice([c for c in alphabet if c != text[place]])
        return text[:place] + other + text[place + 1 :]

    if config.structure == "digit":
        return [one_changed(text) for text in given]
    if config.structure == "random":
        return ["".join(rng.choice(alphabet, len(text))) for text in given]
    if config.structure == "swap":
        return given[1:] + given[:1]
    return [text[:-1] for text in given]
