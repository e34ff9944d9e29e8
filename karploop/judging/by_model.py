"""The `judge` stage where the judge asks a model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from karploop.judging.model_judge import ModelJudge, Roles
from karploop.judging.opinion import Opinion
from karploop.judging.ranking import Group
from karploop.records import VERDICTS_FILE, Opinions, Samples
from karploop.stages import Artifact, StageContext

_PROMPTS = 64  # judged together; also what a kill can lose


def judge_by_model(
    context: StageContext,
    *,
    judge: ModelJudge,
    name: str,
    load: Callable[[Mapping[str, Artifact]], Roles],
    ranking: str,
    seed: int,
) -> None:
    """Writes `verdicts.parquet` (Opinions), aligned with the members' samples laid end to end.

    The completions of a prompt are judged together, whoever wrote them. Those that did not end are
    dropped by every filter; nobody is asked about them. People are waited for (RunFailed).

    Args:
      name: of the judge, with a hash of what decides its verdicts.
      load: the roles, from the stage's inputs.
    """
    samples = Samples.gather(context.inputs)
    rows_of, cut = defaultdict(list), defaultdict(list)
    for row, finished in enumerate(samples.finished_S.tolist()):
        (rows_of if finished else cut)[int(samples.prompt_id_S[row])].append(row)
    groups = [
        Group(
            prompt,
            samples.prompts[rows[0]],
            tuple(samples.completions[r] for r in rows),
            tuple(samples.member_S[rows].tolist()),
            tuple(samples.member_S[cut[prompt]].tolist()),
        )
        for prompt, rows in rows_of.items()
    ]
    judge.wait(groups, ranking, seed)
    roles = load(context.inputs)
    others = to_record(name, [Opinion(None, "did not end")])
    places, parts = np.zeros(len(samples), np.int64), []  # of each sample's row among the parts
    with context.progress(int(samples.finished_S.sum()), "samples") as progress:
        for start in range(0, len(groups), _PROMPTS):
            part = range(start, min(start + _PROMPTS, len(groups)))
            some = [groups[i] for i in part]

            def judged(some=some):
                found = judge.judge(some, roles, ranking, seed)
                return to_record(name, [o for of_group in found for o in of_group]).to_table()

            found = Opinions.from_table(context.chunk(part, judged))
            rows = [row for group in some for row in rows_of[group.number]]
            places[rows] = len(others) + sum(map(len, parts)) + np.arange(len(rows))
            parts.append(found)
            progress.advance(len(rows))
    found = Opinions.concatenate([others, *parts]).to_table().take(places)
    context.write_table(VERDICTS_FILE, found)


def to_record(name: str, opinions: Sequence[Opinion]) -> Opinions:
    """Opinions as columns."""
    return Opinions(
        scores=[o.score for o in opinions],
        reasons=[o.reason for o in opinions],
        judges=[name] * len(opinions),
        criteria=[json.dumps(dict(o.criteria)) for o in opinions],
        rationales=[json.dumps(list(o.rationales), ensure_ascii=False) for o in opinions],
        forward=[o.forward for o in opinions],
        backward=[o.backward for o in opinions],
        tokens_in=np.array([o.spent.tokens_in for o in opinions], np.int64),
        tokens_out=np.array([o.spent.tokens_out for o in opinions], np.int64),
        dollars=np.array([o.spent.dollars for o in opinions], np.float64),
        seconds=np.array([o.spent.seconds for o in opinions], np.float64),
    )
