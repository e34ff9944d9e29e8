"""A judge over the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from karploop.asking import transcript
from karploop.compiling import command_mesh
from karploop.config import GOLD, MODELS, JudgingConfig
from karploop.data.rows import located_rows, to_prompt
from karploop.endpoints.forecast import Tally
from karploop.errors import UserError
from karploop.files import cache_folder
from karploop.jobs import Output, Row, identity_of
from karploop.judging.model_judge import DEBATER, ModelJudge, Roles, make_judge
from karploop.judging.opinion import Opinion, total
from karploop.judging.ranking import Group
from karploop.reporting.progress import Progress
from karploop.roles.bind import POLICY, Bound
from karploop.roles.rehearsal import rehearse


def run_file(config: JudgingConfig, source: str, target: str, progress: Progress) -> None:
    """Adds a verdict to every row of `source`.

    Rows are {"prompt", "completion"} or {"prompt", "completions": [one, two, …]}; judges that
    compare or count votes want the latter. They gain `judge`, `reason` where there is no verdict,
    `criteria`, `rationales`, what it took (`tokens_in`, `tokens_out`, `dollars`, `seconds`) and

      of one completion, `score` and `length`;
      of two that are compared, `score` (how probable it is that the first is better), `forward`,
        `backward`, `winner` and `length`, the difference;
      of others, `scores`, one each, with `reasons`, and `best`, the place of the highest.

    What endpoints will be asked, and what their caps allow of it, is said before. No verdict is
    null and never a number. `sample` is the row's number where it has none.
    `experiments.calibrate` reads the first two kinds.

    Raises:
      UserError: anything wrong with judge, role or rows, before anything is compiled; or an
        endpoint that is to give probabilities gives none, before it is asked for verdicts.
      RunFailed: an endpoint is down or its cap is reached; the same command goes on from there.
    """
    if not config.judge.name:
        known = [name for name in (*MODELS, "vote") if name not in GOLD]
        raise UserError(f"'config.judge.name' is empty: the judges of files are {', '.join(known)}")
    judge = make_judge(config.judge, config.seed)
    rows, groups = [], []
    for where, row in located_rows(source):
        groups.append(_group(judge, row, len(rows), where))
        rows.append({"sample": len(rows), **row})
    configs = dict(config.roles)
    if POLICY not in configs and config.judge.role in configs and DEBATER in judge.seats:
        configs.setdefault(DEBATER, configs[config.judge.role])  # there is no other model to argue
    ledger = cache_folder() / "responses.sqlite"
    settings = judge.settings | {"judge": judge.name, "ranking": config.judge.ranking}
    settings |= {"seed": config.seed, "dtype": config.dtype}
    job = identity_of(settings, judge.files, rows)
    bound = Bound(judge.seats, configs, ledger, job, dtype=config.dtype)
    for seat, wanted in judge.seats.items():
        for each in wanted:
            bound.check(seat, each)
    identity = identity_of(settings, judge.files, bound.identity())
    mesh = command_mesh({"config.judge.batch": config.judge.batch})
    name = f"{judge.name}-{identity[:8]}"
    with Output(target, identity_of(identity, rows)) as out:
        if out.done == len(rows):
            return
        bound.probe(judge.seats)
        parts = [
            range(start, min(start + config.rows, len(rows)))
            for start in range(out.done, len(rows), config.rows)
        ]

        def go(stand_ins: Roles, tally: Tally) -> None:
            for part in parts:
                _verdicts([replace(groups[i], met={}) for i in part], judge, stand_ins, config)

        for line in rehearse(bound.names, bound.remote, go):
            progress.say(line)
        roles = bound.load(mesh, config.judge.batch)
        with progress.stage(None, judge.name, len(rows), "rows", start=out.done) as stage:
            for part in parts:
                found = _verdicts([groups[i] for i in part], judge, roles, config)
                for i, verdict in zip(part, found, strict=True):
                    out.write(rows[i] | {"judge": name} | verdict)
                out.flush()
                stage.advance(len(part))


def _verdicts(
    groups: Sequence[Group], judge: ModelJudge, roles: Roles, config: JudgingConfig
) -> list[Row]:
    """What the rows gain. Two that are compared are a pair; all else has a score for each."""

    def is_pair(group: Group) -> bool:
        return judge.compare is not None and len(group.completions) == 2

    pairs, others = [g for g in groups if is_pair(g)], [g for g in groups if not is_pair(g)]
    of_pairs, of_others = iter(()), iter(())
    if pairs:
        places = [(g.number, 0, 1) for g in pairs]
        asked = [(g.prompt, *g.completions) for g in pairs]
        of_pairs = iter(judge.compare(asked, places, roles))
    if others:
        of_others = iter(judge.judge(others, roles, config.judge.ranking, config.seed))
    return [_pair(g, next(of_pairs)) if is_pair(g) else _each(g, next(of_others)) for g in groups]


def _pair(group: Group, opinion: Opinion) -> Row:
    one, two = group.completions
    return _verdict(opinion) | {
        "forward": opinion.forward,
        "backward": opinion.backward,
        "winner": opinion.winner,
        "length": len(one) - len(two),
    }


def _each(group: Group, opinions: Sequence[Opinion]) -> Row:
    if len(opinions) == 1:
        return _verdict(opinions[0]) | {"length": len(group.completions[0])}
    scores = [opinion.score for opinion in opinions]
    known = [score for score in scores if score is not None]
    # A text that is there twice was judged once.
    own = {text: opinion for text, opinion in zip(group.completions, opinions, strict=True)}
    return {
        "scores": scores,
        "reasons": [opinion.reason for opinion in opinions],
        "best": scores.index(max(known)) if known else None,
    } | asdict(total(opinion.spent for opinion in own.values()))


def _verdict(opinion: Opinion) -> Row:
    verdict: dict[str, Any] = {"score": opinion.score, "reason": opinion.reason}
    if opinion.criteria:
        verdict["criteria"] = dict(opinion.criteria)
    if opinion.rationales:
        verdict["rationales"] = list(opinion.rationales)
    return verdict | asdict(opinion.spent)


def _group(judge: ModelJudge, row: Row, number: int, where: str) -> Group:
    prompt = to_prompt(row, where)
    if prompt.tokens is not None:
        raise UserError(f"{where}: a judge takes 'prompt' or 'messages', and not 'tokens'")
    text = prompt.text if prompt.text is not None else transcript(prompt.messages)
    several = judge.compares or "completion" not in row
    found = row.get("completions") if several else [row["completion"]]
    least = 2 if judge.compares else 1
    if (
        not isinstance(found, list)
        or len(found) < least
        or not all(isinstance(one, str) for one in found)
    ):
        wanted = (
            "'completions', a list of two texts or more"
            if judge.compares
            else "a 'completion', or 'completions', a list of texts"
        )
        raise UserError(f"{where}: the judge '{judge.name}' wants {wanted}")
    return Group(number, text, tuple(found))
