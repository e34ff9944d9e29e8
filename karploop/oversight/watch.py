"""The `watch` stage: what a round did, in numbers that nothing in the loop reads.

Gold is used here, for the log only: no stage takes a watch's file as an input.
"""

from __future__ import annotations

import json
import math

import numpy as np

from karploop.data.tasks import Task
from karploop.filtering.registry import NO_VERDICT
from karploop.records import SELECTION_FILE, Samples, Selection
from karploop.stages import StageContext

WATCH_FILE = "watch.json"


def watch(context: StageContext, *, task: Task) -> None:
    """Writes `watch.json`: metric → number, or null where there is nothing to average."""
    samples, hinted_S = Samples.gather(context.inputs), Samples.by_hint(context.inputs)
    selection = Selection.from_table(context.inputs["selection"].table(SELECTION_FILE))
    own = np.flatnonzero(~hinted_S)
    found = round_metrics(samples.take(own), selection.take(own), task)
    if any(artifact.manifest.stage == "rationalise" for artifact in context.inputs.values()):
        rows = np.flatnonzero(hinted_S)
        found += hint_metrics(samples.take(rows), selection.take(rows), task)
    metrics = {k: None if math.isnan(v) else v for k, v in found}
    (context.directory / WATCH_FILE).write_text(json.dumps(metrics, indent=1) + "\n")


def round_metrics(samples: Samples, selection: Selection, task: Task) -> list[tuple[str, float]]:
    """Yield, label precision and the shape of a round's samples.

    `label_precision` is the share of kept rows that are right by gold, `sample_accuracy` that of
    all rows; both are missing for a task that cannot judge. `distinct_answers` counts different
    completions a prompt, over the samples a prompt. What else a task measures of completions comes
    under the names that it gives.
    """
    right_S = _right(samples, task)
    kept_S = selection.kept_S
    pairs = zip(samples.prompts, samples.completions, strict=True)
    measured = [task.measures(prompt, text) for prompt, text in pairs]
    lengths_S = np.array([len(tokens) for tokens in samples.tokens])
    ids = samples.prompt_id_S.tolist()
    distinct = len(set(zip(ids, samples.completions, strict=True)))
    names = dict.fromkeys(name for found in measured for name in found)
    by_difficulty = [
        (f"{name}/{difficulty}", _mean(values))
        for difficulty in np.unique(samples.difficulty_S)
        for at_S in [samples.difficulty_S == difficulty]
        for name, values in (
            ("yield", kept_S[at_S]),
            ("label_precision", right_S[at_S & kept_S]),
            ("sample_accuracy", right_S[at_S]),
        )
    ]
    return [
        ("samples", float(len(samples))),
        ("kept", float(kept_S.sum())),
        ("yield", _mean(kept_S)),
        ("label_precision", _mean(right_S[kept_S])),
        ("sample_accuracy", _mean(right_S)),
        ("finished", _mean(samples.finished_S)),
        ("no_verdict", float(sum(reason == NO_VERDICT for reason in selection.reasons))),
        ("mean_length", _mean(lengths_S)),
        ("kept_mean_length", _mean(lengths_S[kept_S])),
        ("entropy", _mean(samples.entropy_S)),
        ("distinct_answers", distinct / len(samples)),
        ("tokens/generate", float(lengths_S.sum())),
        *by_difficulty,
        *((name, _mean(np.array([m[name] for m in measured if name in m]))) for name in names),
    ]


def hint_metrics(samples: Samples, selection: Selection, task: Task) -> list[tuple[str, float]]:
    """Of the rows that were written with the gold answer as a hint, which no other metric counts:
    how many there are, are right and were kept, and the share that is right by difficulty."""
    right_S, difficulty_S = _right(samples, task), samples.difficulty_S
    return [
        ("hinted", float(len(samples))),
        ("hinted_right", float(right_S.sum())),
        ("hinted_kept", float(selection.kept_S.sum())),
        *(
            (f"hinted_accuracy/{d}", _mean(right_S[difficulty_S == d]))
            for d in np.unique(difficulty_S)
        ),
    ]


def _right(samples: Samples, task: Task) -> np.ndarray:
    """1 or 0 by gold, right_S; NaN for a task that cannot judge."""
    rows = zip(samples.prompts, samples.completions, samples.finished_S, strict=True)
    right_S = np.full(len(samples), math.nan)
    if task.verifiable:
        right_S[:] = [bool(ended) and task.verify(prompt, text) for prompt, text, ended in rows]
    return right_S


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else math.nan
