"""The `labels` stage: completions that are good or bad by themselves."""

from __future__ import annotations

import numpy as np

from karploop.records import (
    LABELLED_FILE,
    SELECTION_FILE,
    Labelled,
    Samples,
    Selection,
    read_verdicts,
)
from karploop.stages import StageContext


def labels(context: StageContext, *, threshold: float) -> None:
    """Writes `labelled.parquet`: what was kept and scores above the threshold, and what is below.

    A score on the threshold says neither, a missing one says nothing, and completions that did not
    end are in neither half.
    """
    samples = Samples.gather(context.inputs)
    sources = Samples.origins(context.inputs)
    kept_S = Selection.from_table(context.inputs["selection"].table(SELECTION_FILE)).kept_S
    score_S = read_verdicts(context.inputs["verdicts"]).score_S
    with context.progress(len(samples), "samples") as progress:
        good_S = kept_S & (score_S > threshold)
        bad_S = samples.finished_S & (score_S < threshold)
        rows = np.flatnonzero(good_S | bad_S).tolist()
        note = f"{int(good_S.sum())} good, {int(bad_S.sum())} bad"
        progress.advance(len(samples), note=note)
    labelled = Labelled(
        prompts=[samples.prompts[i] for i in rows],
        completions=[samples.completions[i] for i in rows],
        desirable=good_S[rows],
        difficulty=samples.difficulty_S[rows],
        source=[sources[i][0] for i in rows],
        row=np.array([sources[i][1] for i in rows], np.int64),
    )
    context.write_table(LABELLED_FILE, labelled.to_table())
