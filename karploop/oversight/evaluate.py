"""The `evaluate` stage: greedy answers to held-out problems, by difficulty."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from karploop.config import EvaluateConfig
from karploop.data.prompting import Prompting
from karploop.data.tasks import Task
from karploop.models.weights import Weights
from karploop.records import HELD_OUT_FILE, Problems
from karploop.sampling.distributions import GREEDY
from karploop.sampling.sampler import Sampler, batches
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

    The file maps "TASK/DIFFICULTY/METRIC" to a number; the metrics are `exact_match` (share of
    greedy answers that the gold verifier accepts), `nll` (mean negative log-likelihood of the gold
    answer, stop token included, nats a token) and `problems` (how many were asked). What a task
    without answers or verifier cannot tell is left out.
    """
    problems = Problems.from_table(context.inputs["held_out"].table(HELD_OUT_FILE))
    params = weights.load(context.inputs["params"])
    answers, right, nll = [], [], []
    with context.progress(len(problems), "problems") as progress:
        for rows in batches(len(problems), config.batch):
            context.check_stop()
            prompts = problems.prompts[rows.start : rows.stop]
            gold = [prompting.gold(a) for a in problems.answers[rows.start : rows.stop]]
            asked = [prompting.prompt(prompt) for prompt in prompts]
            completions = sampler.complete(
                params,
                asked,
                list(rows),
                context.key,
                samples=1,
                sampling=GREEDY,
                limits=[limit(task.difficulty(prompt)) for prompt in prompts],
                batch=config.batch,
            )
            logprobs = sampler.score(params, asked, gold, config.batch)
            texts = [prompting.completion(c.tokens, c.finished) for [c] in completions]
            answers += [text for text, _ in texts]
            right += [
                finished and task.verify(prompt, text) if task.verifiable else None
                for prompt, (text, finished) in zip(prompts, texts, strict=True)
            ]
            nll += [-float(np.mean(row, dtype=np.float64)) for row in logprobs]
            progress.advance(len(rows), tokens=sum(len(c.tokens) for [c] in completions))
    by_difficulty: dict[int, list[int]] = defaultdict(list)
    for row, difficulty in enumerate(problems.difficulty_S.tolist()):
        by_difficulty[difficulty].append(row)
    evals = {}
    for difficulty, rows in sorted(by_difficulty.items()):
        prefix = f"{task.name}/{difficulty}"
        if task.verifiable:
            evals[f"{prefix}/exact_match"] = float(np.mean([right[r] for r in rows]))
        if task.answered:
            evals[f"{prefix}/nll"] = float(np.mean([nll[r] for r in rows]))
        evals[f"{prefix}/problems"] = len(rows)
    (context.directory / EVALS_FILE).write_text(json.dumps(evals, indent=1) + "\n")
    table = pa.table({"prompt": problems.prompts, "answer": answers, "right": right, "nll": nll})
    context.write_table(ANSWERS_FILE, table)
