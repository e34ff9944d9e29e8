"""The `pairs` stage: what was kept, or is gold, beside what is worse."""

from __future__ import annotations

import numpy as np

from karploop.config import PreferenceConfig
from karploop.filtering.preferences import preferences
from karploop.records import (
    EXAMPLES_FILE,
    PAIRS_FILE,
    SELECTION_FILE,
    Contrasts,
    Examples,
    Samples,
    Selection,
    read_verdicts,
)
from karploop.stages import StageContext


def pairs(context: StageContext, *, config: PreferenceConfig) -> None:
    """Writes `pairs.parquet`: a better and a worse completion a row, with where they come from.

    Raises:
      UserError: verdicts in both orders are wanted, and there are none.
    """
    samples = Samples.gather(context.inputs)
    sources = Samples.origins(context.inputs)
    with context.progress(len(samples), "samples") as progress:
        found = preferences(
            samples,
            read_verdicts(context.inputs["verdicts"]),
            config,
            Selection.from_table(context.inputs["selection"].table(SELECTION_FILE)),
        )
        progress.advance(len(samples), note=f"{len(found)} pairs")
    better, worse = found.chosen_P.tolist(), found.rejected_P.tolist()
    contrasts = Contrasts(
        prompts=found.prompts,
        chosen=[samples.completions[i] for i in better],
        rejected=[samples.completions[i] for i in worse],
        difficulty=found.difficulty_P,
        margin=found.margin_P,
        chosen_source=[sources[i][0] for i in better],
        chosen_row=np.array([sources[i][1] for i in better], np.int64),
        rejected_source=[sources[i][0] for i in worse],
        rejected_row=np.array([sources[i][1] for i in worse], np.int64),
    )
    context.write_table(PAIRS_FILE, contrasts.to_table())


def labelled_pairs(context: StageContext) -> None:
    """Writes `pairs.parquet`: of labelled problems, the gold completion and a sample a row.

    That is self-play (SPIN, arXiv 2401.01335, eq. 4.7): what people wrote is to be likelier than
    what the model writes in its place. Takes inputs['seed'] and the samples that the filter kept;
    those that say the same as the gold completion are left out, and so is any that did not end.
    There is no verdict, and no margin.
    """
    samples = Samples.gather(context.inputs)
    sources = Samples.origins(context.inputs)
    kept_S = Selection.from_table(context.inputs["selection"].table(SELECTION_FILE)).kept_S
    gold = Examples.from_table(context.inputs["seed"].table(EXAMPLES_FILE))
    row_of = {prompt: row for row, prompt in enumerate(gold.prompts)}
    worse, better = [], []
    with context.progress(len(samples), "samples") as progress:
        for i in np.flatnonzero(kept_S & samples.finished_S).tolist():
            row = row_of[samples.prompts[i]]
            if samples.completions[i] != gold.completions[row]:
                worse.append(i)
                better.append(row)
        progress.advance(len(samples), note=f"{len(worse)} pairs")
    contrasts = Contrasts(
        prompts=[samples.prompts[i] for i in worse],
        chosen=[gold.completions[row] for row in better],
        rejected=[samples.completions[i] for i in worse],
        difficulty=samples.difficulty_S[worse],
        margin=np.full(len(worse), np.nan),
        chosen_source=["seed"] * len(worse),
        chosen_row=np.array(better, np.int64),
        rejected_source=[sources[i][0] for i in worse],
        rejected_row=np.array([sources[i][1] for i in worse], np.int64),
    )
    context.write_table(PAIRS_FILE, contrasts.to_table())
