"""What generations of a language model, each trained on samples, have kept of a known language.

A run of the loop on the task `zipf` is read: its base learnt from real documents, and each round
trained a new model as the regime says. The samples are those that each evaluation draws.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from karploop.data.tasks.zipf import WORDS, Zipf
from karploop.errors import UserError
from karploop.oversight.evaluate import ANSWERS_FILE
from karploop.store import Store

NLL, HALF, TENTH, REACH = "nll", "half", "tenth", "reach"
MEASURES = (NLL, HALF, TENTH, REACH)
_REAL_DRAWS = 4  # of as many words as a generation's, whose mean the language's own reach is

Transitions = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One model: its likelihood of held-out documents, and what it samples."""

    nll: float  # nats a token, as the loop measures it
    floor: float  # of the language itself on the same documents
    transitions: Transitions  # of sampled words, in their order


@dataclasses.dataclass(frozen=True)
class Language:
    """What was measured of language models.

    Attributes:
      values: regime → measure → seed → a number a generation.
      real: measure → the number of the language itself.
      words: that every reach was counted over.
    """

    values: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
    real: Mapping[str, float]
    words: int

    @property
    def generations(self) -> int:
        return len(next(iter(self._some.values())))

    @property
    def seeds(self) -> list[int]:
        return list(self._some)

    @property
    def _some(self) -> Mapping[int, Sequence[float]]:
        return next(iter(self.values.values()))[NLL]

    def at(self, regime: str, measure: str, generation: int) -> dict[int, float]:
        """By seed."""
        return {seed: v[generation] for seed, v in self.values[regime][measure].items()}


def study(
    store: Store, task: Zipf, summaries: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Language:
    """Measures finished runs of as many rounds, by regime and seed.

    Transitions are counted over as many words as every generation has sampled.
    """
    found = {arm: read_generations(store, task, summary) for arm, summary in summaries.items()}
    words = min(len(g.transitions) for generations in found.values() for g in generations)
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for (regime, seed), generations in found.items():
        measured = [measure(task, generation, words) for generation in generations]
        by_measure = values.setdefault(regime, {name: {} for name in MEASURES})
        for name in MEASURES:
            by_measure[name][seed] = [of_one[name] for of_one in measured]
    floor = next(iter(found.values()))[0].floor  # held-out documents are those of every seed
    return Language(values, of_language(task, floor, words), words)


def read_generations(store: Store, task: Zipf, summary: Mapping[str, Any]) -> list[Generation]:
    """The base and the rounds of a finished run, in their order.

    Raises:
      UserError: the run measured no samples, or other problems than the task's.
    """
    found = []
    for entry in sorted(summary["rounds"], key=lambda entry: entry["round"]):
        nll = entry["evals"].get(f"{task.name}/1/{NLL}")
        manifest = store.find("evaluate", entry["stages"]["evaluate"])
        answers = pq.read_table(store.fetch(manifest, ANSWERS_FILE)).to_pydict() if manifest else {}
        if nll is None or "samples" not in answers:
            raise UserError(
                f"the run '{summary['run']}' has no samples of task '{task.name}' in round "
                f"{entry['round']}: run it again with 'config.evaluate.samples' of 1 or more"
            )
        documents = [task.answer(prompt) for prompt in answers["prompt"]]
        floor = np.mean([-task.log_probability(d) / (len(d) + 1) for d in documents])
        texts = itertools.chain.from_iterable(answers["samples"])
        found.append(Generation(nll, float(floor), _transitions(task, texts)))
    return found


def measure(task: Zipf, generation: Generation, count: int) -> dict[str, float]:
    """By name of MEASURES: loss in nats a token, and shares.

    half, tenth  share of sampled words that are rare where they stand: of the last ranks, which
                 hold a half, or a tenth, of the probability between them, or as much as goes in
    reach        of all transitions into the rare half, the share that occurs in `count` words
    """
    return {NLL: generation.nll} | _shares(task, generation.transitions, count)


def of_language(task: Zipf, floor: float, count: int) -> dict[str, float]:
    """The same of the language itself; its reach is that of real documents."""
    documents = (task.answer(prompt) for prompt in task.prompts(1))
    words = (t for text in documents for t in task.transitions(text))
    draws = [list(itertools.islice(words, count)) for _ in range(_REAL_DRAWS)]
    mass = {
        name: float(task.probability_R[task.rare_from(share) :].sum())
        for name, share in ((HALF, 0.5), (TENTH, 0.1))
    }
    reach = float(np.mean([_reach(task, draw, count) for draw in draws]))
    return {NLL: floor} | mass | {REACH: reach}


def _shares(task: Zipf, transitions: Transitions, count: int) -> dict[str, float]:
    rank_N = np.array([rank for _, rank in transitions])
    return {
        HALF: float(np.mean(rank_N >= task.rare_from(0.5))),
        TENTH: float(np.mean(rank_N >= task.rare_from(0.1))),
        REACH: _reach(task, transitions, count),
    }


def _reach(task: Zipf, transitions: Transitions, count: int) -> float:
    first = task.rare_from(0.5)
    seen = {t for t in transitions[:count] if t[1] >= first}
    contexts = len(WORDS) + 1  # each word, and the start
    return len(seen) / (contexts * (len(WORDS) - first))


def _transitions(task: Zipf, texts: Iterable[str]) -> Transitions:
    return [transition for text in texts for transition in task.transitions(text)]
