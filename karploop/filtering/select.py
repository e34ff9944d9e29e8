"""The `filter` stage: verdicts to training rows."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from karploop.config import FilterConfig
from karploop.errors import UserError
from karploop.filtering.registry import Filter, Said
from karploop.records import (
    EXAMPLES_FILE,
    SELECTION_FILE,
    Examples,
    Samples,
    Selection,
    Verdicts,
    read_verdicts,
)
from karploop.stages import StageContext


def select(
    context: StageContext, *, chosen: Filter, matched: Filter | None, config: FilterConfig
) -> None:
    """Writes `selection.parquet`, aligned with the samples, and the kept rows as examples.

    With `matched`, the number of rows that this other filter would keep is the `count` of the
    chosen one. Only that number passes from one to the other.
    """
    samples = Samples.gather(context.inputs)
    said = Said(_verdicts(context, "verdicts"), _verdicts(context, "gold"))
    if said.verdicts is not None and config.missing == "stop":
        _check_all_judged(samples, said.verdicts)
    with context.progress(len(samples), "samples") as progress:
        if matched is not None:
            other = matched.select(samples, said, config, context.numpy_rng)
            config = dataclasses.replace(config, count=int(other.kept_S.sum()))
        selection = chosen.select(samples, said, config, context.numpy_rng)
        progress.advance(len(samples), note=f"kept {int(selection.kept_S.sum())}")
    context.write_table(SELECTION_FILE, selection.to_table())
    context.write_table(EXAMPLES_FILE, _kept(context, samples, selection).to_table())


def _verdicts(context: StageContext, name: str) -> Verdicts | None:
    return read_verdicts(context.inputs[name]) if name in context.inputs else None


def _check_all_judged(samples: Samples, verdicts: Verdicts) -> None:
    """Raises UserError: a sample that ended has no verdict, and the config wants one for each."""
    missing = np.flatnonzero(samples.finished_S & np.isnan(verdicts.score_S))
    if len(missing):
        reasons = Counter(verdicts.reasons[row] for row in missing)
        reason, count = reasons.most_common(1)[0]
        raise UserError(
            f"{len(missing)} of {int(samples.finished_S.sum())} samples have no verdict ({count} "
            f"times: {reason}), and 'config.filter.missing' is stop: set it to drop, and the run "
            "goes on without them"
        )


def _kept(context: StageContext, samples: Samples, selection: Selection) -> Examples:
    sources = Samples.origins(context.inputs)
    rows = np.flatnonzero(selection.kept_S).tolist()
    return Examples(
        prompts=[samples.prompts[r] for r in rows],
        completions=[samples.completions[r] for r in rows],
        difficulty=samples.difficulty_S[rows],
        source=[sources[r][0] for r in rows],
        row=np.array([sources[r][1] for r in rows], np.int64),
    )
