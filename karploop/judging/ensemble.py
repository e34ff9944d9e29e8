"""Several judges as one. One of them without a verdict leaves none."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from karploop.config import SIMULATED, TALLIES
from karploop.errors import UserError
from karploop.judging.opinion import Opinion, total
from karploop.schema import nearest

ASK_NOBODY = ("person", SIMULATED, "random", *TALLIES)


@dataclass(frozen=True)
class Member:
    """One judge of an ensemble: its name, the role that it asks, and its weight."""

    name: str
    seat: str
    weight: float

    @property
    def label(self) -> str:
        """What tells it from the others: its name, with its role where that is not the judge's."""
        return self.name if self.seat == "judge" else f"{self.name}@{self.seat}"


def read_members(text: str, known: Sequence[str]) -> tuple[Member, ...]:
    """The judges in "rubric, debate@large*0.5": of two roles, the second with half the weight.

    Raises:
      UserError: not of that form, no such judge, a judge and role twice, or a role of one that asks
        nobody.
    """
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(\w+)(?:@(\w+))?(?:\*(\d+(?:\.\d*)?))?", part)
        if not match or match[1] not in known:
            hint = nearest(match[1], known) if match else "as in rubric, debate@large*0.5"
            raise UserError(f"'config.judge.members' has '{part}': {hint}")
        if match[2] and match[1] in ASK_NOBODY:
            raise UserError(
                f"'config.judge.members' has '{part}': '{match[1]}' asks no role, leave it out"
            )
        found.append(Member(match[1], match[2] or "judge", float(match[3] or 1.0)))
    if len({(m.name, m.seat) for m in found}) < len(found) or not any(m.weight for m in found):
        raise UserError(
            f"'config.judge.members' is '{text}': name judges, each with a role once, and some "
            "with a weight above 0, as in rubric, debate@large*0.5"
        )
    return tuple(found)


def calibrated(members: Sequence[Member], path: str) -> tuple[Member, ...]:
    """Members with weights by how often each was right where gold is known.

    That is ln(p / (1 − p)) of its accuracy p, 0 where that is no better than a coin: of judges
    whose errors are independent, votes with these weights are right most often (Nitzan and Paroush,
    International Economic Review 23(2), 1982). One right and one wrong verdict are added to each,
    so that a few verdicts without an error have a finite weight.

    Args:
      path: a calibration.json. A judge there is called as a member is (its name, "@", and its role
        where that is another than the judge's), or so with a "-" and anything behind it.

    Raises:
      UserError: the file cannot be read, or has a member not at all or twice; all are no better
        than a coin; or `members` have weights of their own.
    """
    where = f"'config.judge.calibration={path}'"
    if any(member.weight != 1 for member in members):
        raise UserError(
            f"{where} weighs the members, and 'config.judge.members' does, too: leave out its "
            "weights (*0.5), or the file"
        )
    try:
        report = json.loads(pathlib.Path(path).read_text())
        accuracies = {name: entry["measures"].get("accuracy") for name, entry in report.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is no report of experiments.calibrate ({error}): name its calibration.json"
        ) from error
    found = []
    for member in members:
        names = [n for n in accuracies if n == member.label or n.startswith(f"{member.label}-")]
        if len(names) != 1 or not accuracies[names[0]]:
            told = f"several: {', '.join(names)}" if len(names) > 1 else "none with an accuracy"
            raise UserError(
                f"{where} is to say how good '{member.label}' is, and has {told} (of "
                f"{', '.join(accuracies)})"
            )
        accuracy, count = (accuracies[names[0]][key] for key in ("mean", "n"))
        share = (accuracy * count + 1) / (count + 2)
        found.append(replace(member, weight=max(math.log(share / (1 - share)), 0.0)))
    if not any(member.weight for member in found):
        raise UserError(f"{where}: none of the members is right more often than a coin")
    return tuple(found)


def combine(members: Sequence[Member], opinions: Sequence[Opinion], how: str) -> Opinion:
    """One opinion of several on the same completion.

    Args:
      how: mean: the weighted mean; min: the least, whatever its weight; vote: the weighted share of
        those above one half, an abstention being half a vote.
    """
    names = [member.label for member in members]
    reasons = [f"{name}: {o.reason}" for name, o in zip(names, opinions, strict=True) if o.reason]
    score = None
    if all(opinion.score is not None for opinion in opinions):
        scores = np.array([opinion.score for opinion in opinions])
        score = float(_HOW[how](scores, np.array([member.weight for member in members])))
    return Opinion(
        score,
        reasons[0] if score is None else "",
        {name: opinion.score for name, opinion in zip(names, opinions, strict=True)},
        rationales=tuple(text for opinion in opinions for text in opinion.rationales),
        spent=total(opinion.spent for opinion in opinions),
    )


_HOW: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean": lambda scores, weights: np.average(scores, weights=weights),
    "min": lambda scores, weights: scores[weights > 0].min(),
    "vote": lambda scores, weights: np.average((np.sign(scores - 0.5) + 1) / 2, weights=weights),
}
