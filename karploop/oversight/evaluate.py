"""The `evaluate` stage: answers to held-out problems, greedy and sampled, by difficulty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from karploop.config import EvaluateConfig
from karploop.data.prompting import Prompting
from karploop.data.sources import BASELINES_FILE
from karploop.data.tasks import Task
from karploop.models.weights import Weights
from karploop.records import HELD_OUT_FILE, Problems
from karploop.sampling.distributions import GREEDY, Sampling
from karploop.sampling.sampler import Completion, Sampler, batches
from karploop.stages import StageContext

EVALS_FILE, ANSWERS_FILE = "evals.json", "answers.parquet"


def evaluate(
    context: StageContext,
    *,
    sampler: Sampler,
    weights: Weights,
    prompting: Prompting,
    task: Task,
    limit: Callable[[int], int],
    config: EvaluateConfig,
) -> None:
    """Measures inputs['params'] on inputs['held_out'] into `evals.json`.

    The file maps "TASK/DIFFICULTY/METRIC" to a number. What a task without answers or verifier
    cannot tell is left out. The metrics are

      exact_match    share of greedy answers that the gold verifier accepts
      nll            negative log-likelihood of the gold answer, its stop token included; mean over
                     tokens, then over problems, in nats
      problems       how many were asked
      majority_answer, random_answer   accuracy of answering blindly (`baselines.py`)

    and, from `config.samples` completions a problem,

      pass@1         share of them that is right
      pass@k         share of problems with a right one among all k
      distinct       different completions over completions
      solutions      different right completions a problem
      kl             divergence from inputs['base'] in nats a completion, estimated from the first
                     sample of each problem (its log-probability here minus there)

    and what the task measures of these completions or, without any, of greedy answers (`measures`).

    Every set of parameters is asked with the same random numbers.
    """
    problems = Problems.from_table(context.inputs["held_out"].table(HELD_OUT_FILE))
    params = weights.load(
        context.inputs["params"],
        meanwhile=lambda: sampler.lower_decode(config.batch, samples=1, sampling=GREEDY),
    )
    base = weights.load(context.inputs["base"]) if "base" in context.inputs else None
    asking = _Asking(sampler, prompting, task, limit, config)
    tables = []
    with context.progress(len(problems), "problems") as progress:
        for rows in batches(len(problems), config.batch):
            tables.append(
                context.chunk(rows, lambda rows=rows: asking.ask(params, base, problems, rows))
            )
            progress.advance(len(rows), tokens=sum(tables[-1]["tokens"].to_pylist()))
    answers = pa.concat_tables(tables)
    evals = summarise(task, problems.difficulty_S, answers.to_pydict(), config.samples)
    blind = json.loads(context.inputs["held_out"].path(BASELINES_FILE).read_text())
    evals |= {f"{task.name}/{name}": accuracy for name, accuracy in blind.items()}
    (context.directory / EVALS_FILE).write_text(json.dumps(evals, indent=1) + "\n")
    context.write_table(ANSWERS_FILE, answers.drop_columns("tokens"))


class _Asking:
    """How problems are put to a model; one batch at a time."""

    def __init__(self, sampler, prompting, task, limit, config: EvaluateConfig):
        self.sampler, self.prompting, self.task = sampler, prompting, task
        self.limit, self.config = limit, config

    def ask(self, params: Any, base: Any, problems: Problems, rows: range) -> pa.Table:
        """The answers to some problems, one row each."""
        prompts = problems.prompts[rows.start : rows.stop]
        asked = [self.prompting.prompt(prompt) for prompt in prompts]
        greedy = self._complete(params, prompts, asked, rows, GREEDY, 1)
        texts, right = self._judge(prompts, [c for [c] in greedy], 1)
        count = sum(len(c.tokens) for [c] in greedy)
        table = {"prompt": prompts, "answer": texts, "right": right}
        table["nll"] = [None] * len(rows)
        if self.task.answered:
            gold = problems.answers[rows.start : rows.stop]
            table["nll"] = self._nll(params, prompts, asked, gold)
        if n := self.config.samples:
            sampling = Sampling(self.config.temperature)
            drawn = self._complete(params, prompts, asked, rows, sampling, n)
            flat = [completion for of_prompt in drawn for completion in of_prompt]
            texts, right = self._judge(prompts, flat, n)
            table["samples"] = [texts[i : i + n] for i in range(0, len(texts), n)]
            table["samples_right"] = [right[i : i + n] for i in range(0, len(right), n)]
            table["kl"] = [None] * len(rows)
            if base is not None:
                table["kl"] = self._kl(base, asked, [first for first, *_ in drawn])
            count += sum(len(c.tokens) for c in flat)
        return pa.table(table | {"tokens": [count] + [0] * (len(rows) - 1)})

    def _complete(self, params, prompts, asked, rows: range, sampling: Sampling, samples: int):
        return self.sampler.complete(
            params,
            asked,
            list(rows),
            jax.random.key(0),
            samples=samples,
            sampling=sampling,
            limits=[self.limit(self.task.difficulty(prompt)) for prompt in prompts],
            batch=self.config.batch,
        )

    def _judge(self, prompts: Sequence[str], completions: Sequence[Completion], samples: int):
        """Texts, and whether each is right; None where the task cannot tell."""
        ends = [self.prompting.completion(c.text, c.finished) for c in completions]
        texts = [text for text, _ in ends]
        if not self.task.verifiable:
            return texts, [None] * len(texts)
        asked = [prompt for prompt in prompts for _ in range(samples)]
        right = [
            finished and self.task.verify(prompt, text)
            for prompt, (text, finished) in zip(asked, ends, strict=True)
        ]
        return texts, right

    def _nll(self, params, prompts: Sequence[str], asked, answers: Sequence[str]) -> list[float]:
        """Of each gold answer, in nats a token."""
        pairs = zip(prompts, answers, strict=True)
        gold = [self.prompting.example(p, self.prompting.gold(a))[1] for p, a in pairs]
        scores = self.sampler.score(params, asked, gold, self.config.batch, stop=False)
        return [-float(np.mean(row, dtype=np.float64)) for row in scores]

    def _kl(self, base, asked, first: Sequence[Completion]) -> list[float]:
        tokens = [completion.tokens for completion in first]
        scores = self.sampler.score(base, asked, tokens, self.config.batch, stop=False)
        pairs = zip(first, scores, strict=True)
        return [math.fsum(c.logprobs) - math.fsum(row.tolist()) for c, row in pairs]


def summarise(
    task: Task, difficulty_S: np.ndarray, answers: dict[str, list], samples: int
) -> dict[str, float]:
    """The metrics of `evaluate`, by "TASK/DIFFICULTY/METRIC".

    Args:
      answers: columns, one row a problem.
      samples: completions in each list of the columns 'samples' and 'samples_right'.
    """
    evals = {}
    for difficulty in np.unique(difficulty_S).tolist():
        rows = np.flatnonzero(difficulty_S == difficulty).tolist()

        def mean(name: str, of: Callable[[Any], float] = float, rows=rows) -> float:
            return float(np.mean([of(answers[name][row]) for row in rows]))

        metrics: dict[str, float] = {}
        if task.verifiable:
            metrics["exact_match"] = mean("right")
        if task.answered:
            metrics["nll"] = mean("nll")
        if samples:
            if task.verifiable:
                metrics["pass@1"] = mean("samples_right", np.mean)
                if samples > 1:
                    metrics[f"pass@{samples}"] = mean("samples_right", any)
                metrics["solutions"] = float(
                    np.mean([_solutions(task, answers, row) for row in rows])
                )
            metrics["distinct"] = mean("samples", lambda texts: len(set(texts)) / samples)
            if answers["kl"][rows[0]] is not None:
                metrics["kl"] = mean("kl")
        metrics |= _measured(task, answers, rows)
        metrics["problems"] = len(rows)
        evals |= {f"{task.name}/{difficulty}/{name}": value for name, value in metrics.items()}
    return evals


def _measured(task: Task, answers: dict[str, list], rows: Sequence[int]) -> dict[str, float]:
    """The means of what the task measures, over the samples of each problem."""
    of = answers.get("samples") or [[text] for text in answers["answer"]]
    found = [task.measures(answers["prompt"][row], text) for row in rows for text in of[row]]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _solutions(task: Task, answers: dict[str, list], row: int) -> int:
    pairs = zip(answers["samples"][row], answers["samples_right"][row], strict=True)
    return len({task.normalise(text) for text, right in pairs if right})
