"""The `pairs` stage: what was kept, beside what was judged to be worse."""

from __future__ import annotations

import numpy as np

from karploop.config import PreferenceConfig
from karploop.filtering.preferences import preferences
from karploop.records import (
    PAIRS_FILE,
    SELECTION_FILE,
    Contrasts,
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
