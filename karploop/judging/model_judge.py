"""Judges by name, made from a config: what they ask, of whom, and by which texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from karploop.chains.rendering import (
    Templates,
    load_templates,
    preferred,
    read_lines,
    read_text,
)
from karploop.config import GOLD, MODELS, SIMULATED, TALLIES, JudgeConfig
from karploop.data.tasks import Task
from karploop.errors import UserError
from karploop.judging.chance import chance
from karploop.judging.constitution import constitution
from karploop.judging.debate import debate
from karploop.judging.ensemble import Member, calibrated, combine, read_members
from karploop.judging.equivalence import Mathematics, identity
from karploop.judging.opinion import TEMPLATES, Opinion, Pair, Place, Reply
from karploop.judging.pairwise import pairwise
from karploop.judging.person import COMPARE, Review, wait
from karploop.judging.ranking import Group, rank
from karploop.judging.reading import Reading
from karploop.judging.rubric import read_criteria, rubric
from karploop.judging.simulated_annotators import Annotators
from karploop.judging.verifier import verified
from karploop.judging.vote import poll

DEBATER = "debater"

_DECIDE = {  # by judge, the keys that do, besides those of reasons
    "rubric": ("levels",),
    "pairwise": (),
    "constitution": ("principles", "clamp"),
    "debate": ("turns", "max_new_tokens"),
    "reward": (),
    "person": ("people",),
    SIMULATED: ("people", "annotators", "error"),
    "random": (),
    "ensemble": ("members", "combine"),
    "verifier": (),
    "vote": ("voters",),
}

Roles = Mapping[str, Any]  # of each seat: a Role, or a RewardModel


@dataclass(frozen=True)
class ModelJudge:
    """What rates replies, compares pairs, counts votes, or is made of others that do.

    Attributes:
      seats: names of the roles that it asks, and for what: text, probabilities, or reward.
      settings: what decides its verdicts, of the config's keys.
      files: the texts that decide them, by name.
      expect: of people, see `wait`.
    """

    name: str
    seats: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any]
    files: Mapping[str, str]
    rate: Callable[[Sequence[Reply], Roles], list[Opinion]] | None = None
    compare: Callable[[Sequence[Pair], Sequence[Place], Roles], list[Opinion]] | None = None
    count: Callable[[Sequence[Group]], list[list[Opinion]]] | None = None
    members: Sequence[tuple[Member, ModelJudge]] = ()
    expect: Callable[[Sequence[Group], str, int], None] | None = None
    how: str = "mean"

    @property
    def compares(self) -> bool:
        """Whether it wants two completions of a prompt, or more."""
        return not self.rate and (
            self.compare is not None
            or self.count is not None
            or any(judge.compares for _, judge in self.members)
        )

    @property
    def by_itself(self) -> ModelJudge | None:
        """What is left without gold and without votes; None: nothing that decides.

        Who sees gold is right whatever it is shown, votes tell nothing of two texts, and people
        are shown no other texts than a round's samples.
        """
        if self.name in (*TALLIES, *GOLD) or self.expect:
            return None
        if not self.members:
            return self
        left = [(member, judge) for member, judge in self.members if judge.by_itself]
        return replace(self, members=left) if any(m.weight for m, _ in left) else None

    def wait(self, groups: Sequence[Group], method: str, seed: int) -> None:
        """Raises RunFailed where people are asked and have not said all that is wanted for
        `judge`, with the same arguments; what they are to say is written for them then."""
        for _, judge in self.members:
            judge.wait(groups, method, seed)
        if self.expect:
            self.expect([replace(g, met={}) for g in groups], method, seed)

    def judge(
        self, groups: Sequence[Group], roles: Roles, method: str, seed: int
    ) -> list[list[Opinion]]:
        """An opinion on every completion: its rating, or its rank among those of its prompt.

        A text that a prompt has several times is judged once.
        """
        if self.members:
            found = [
                judge.judge([replace(g, met={}) for g in groups], roles, method, seed)
                for _, judge in self.members
            ]
            members = [member for member, _ in self.members]
            return [
                [combine(members, of_text, self.how) for of_text in zip(*of_group, strict=True)]
                for of_group in zip(*found, strict=True)
            ]
        if self.count:
            return self.count(groups)
        if not self.rate:
            ask = self.compare
            return rank(groups, lambda pairs, places: ask(pairs, places, roles), method, seed)
        entries = [(g, i) for g in groups for i in g.entries]
        found = self.rate([(g.prompt, g.completions[i]) for g, i in entries], roles)
        by_text = {
            (g.number, g.completions[i]): opinion
            for (g, i), opinion in zip(entries, found, strict=True)
        }
        return [[by_text[g.number, text] for text in g.completions] for g in groups]


def make_judge(
    config: JudgeConfig, seed: int, seat: str = "", task: Task | None = None
) -> ModelJudge:
    """The judge called `config.name`.

    Args:
      seat: the role that it asks, of an ensemble's member; else `config.role`.
      task: what the replies are answers to; None: nobody knows, as of the rows of a file.

    Raises:
      UserError: there is no such judge, a file of it is missing or malformed, or it wants a task.
    """
    seat = seat or config.role
    settings = {key: value for key, value in asdict(config).items() if key in _DECIDE[config.name]}
    if config.name == "person":
        return _person(config, settings, in_loop=task is not None)
    if config.name == "random":
        return ModelJudge(
            "random", {}, settings, {},
            rate=lambda replies, _: chance(replies, seed),
        )  # fmt: skip
    if config.name == "reward":
        return ModelJudge(
            "reward", {seat: ("reward",)}, settings, {},
            rate=lambda replies, roles: roles[seat].scores(replies),
            compare=lambda pairs, _, roles: roles[seat].pairs(pairs),
        )  # fmt: skip
    if config.name == "ensemble":
        return _ensemble(config, seed, settings, task)
    if config.name in GOLD and task is None:
        raise UserError(
            f"the judge '{config.name}' reads the gold answers of a task, and the rows of a file "
            "belong to none: leave it out"
        )
    if config.name == "verifier":
        return _verifier(settings, task)
    if config.name == SIMULATED:
        return _simulated(config, seed, settings, task)
    if config.name == "vote":
        return _vote(config, settings, task)
    if config.rationale:
        settings |= {"rationale": True, "max_new_tokens": config.max_new_tokens}
    names = [f"{config.name}.jinja", *(["debate_argument.jinja"] * (config.name == "debate"))]
    paths = {name: preferred(name, config.templates, TEMPLATES) for name in names}
    loaded = load_templates(paths.values(), TEMPLATES)
    common = dict(
        name=config.name,
        seats={seat: ("text" if config.rationale else "probabilities",)},
        settings=settings,
        files={name: read_text(path, TEMPLATES) for name, path in paths.items()},
    )
    templates = {name: loaded[path] for name, path in paths.items()}
    return _ASKING[config.name](config, seed, seat, templates, common)


def _person(config: JudgeConfig, settings: Mapping[str, Any], in_loop: bool) -> ModelJudge:
    by_pair = config.people == COMPARE
    review = Review.read(config.review, config.people, to_come=in_loop)
    return ModelJudge(
        # What gold labels said in the place of people is not called theirs.
        f"person+{SIMULATED}" if review.simulated else "person",
        {}, settings, {"review": repr(sorted(review.said.items()))},
        rate=None if by_pair else lambda replies, _: review.rate(replies),
        compare=(lambda pairs, *_: review.compare(pairs)) if by_pair else None,
        expect=functools.partial(wait, config.review, config.people, review),
    )  # fmt: skip


def _verifier(settings: Mapping[str, Any], task: Task) -> ModelJudge:
    return ModelJudge(
        "verifier", {}, {**settings, "task": task.identity}, {},
        rate=lambda replies, _: verified(replies, task),
    )  # fmt: skip


def _simulated(
    config: JudgeConfig, seed: int, settings: Mapping[str, Any], task: Task
) -> ModelJudge:
    annotators = Annotators(task, config.annotators, config.error, seed)
    by_pair = config.people == "compare"
    return ModelJudge(
        SIMULATED, {}, {**settings, "task": task.identity}, {},
        rate=None if by_pair else lambda replies, _: annotators.rate(replies),
        compare=(lambda pairs, *_: annotators.compare(pairs)) if by_pair else None,
    )  # fmt: skip


def _vote(config: JudgeConfig, settings: Mapping[str, Any], task: Task | None) -> ModelJudge:
    if task is None and config.voters == "members":
        raise UserError(
            "'config.judge.voters' is members, and nobody knows which model wrote the completions "
            "in a file: leave it at samples"
        )
    settings = {**settings, **identity(config.equivalence)}
    mathematics = Mathematics() if config.equivalence == "math" else None
    normalise = task.normalise if task else str.strip
    return ModelJudge(
        "vote", {}, settings | ({"task": task.identity} if task else {}), {},
        count=lambda groups: poll(groups, normalise, config.voters, mathematics),
    )  # fmt: skip


def _ensemble(
    config: JudgeConfig, seed: int, settings: Mapping[str, Any], task: Task | None
) -> ModelJudge:
    known = [name for name in (*TALLIES, *MODELS) if name != "ensemble"]
    named = read_members(config.members, known)
    if config.calibration:
        named = calibrated(named, config.calibration)
        settings = {**settings, "weights": [member.weight for member in named]}
    members = [
        (member, make_judge(replace(config, name=member.name), seed, member.seat, task))
        for member in named
    ]
    judges = [judge for _, judge in members]
    seats = {seat for judge in judges for seat in judge.seats}
    return ModelJudge(
        # Who reads gold says so by its name, also among others.
        "+".join(["ensemble", *(n for n in GOLD if any(n in judge.name for judge in judges))]),
        {
            seat: tuple(dict.fromkeys(w for judge in judges for w in judge.seats.get(seat, ())))
            for seat in sorted(seats)
        },
        dict(settings) | {member.label: judge.settings for member, judge in members},
        {f"{m.label}/{name}": text for m, judge in members for name, text in judge.files.items()},
        members=members,
        how=config.combine,
    )


def _debate(config: JudgeConfig, seed: int, seat: str, templates: Templates, common) -> ModelJudge:
    verdict, argument = templates["debate.jinja"], templates["debate_argument.jinja"]
    reading = Reading(config.rationale, config.max_new_tokens, seed)
    return ModelJudge(
        **common | {"seats": common["seats"] | {DEBATER: ("text",)}},
        rate=lambda replies, roles: debate(
            *(replies, roles[seat], roles[DEBATER], argument, verdict, config.turns, reading)
        ),
    )


def _rubric(config: JudgeConfig, seed: int, seat: str, templates: Templates, common) -> ModelJudge:
    criteria = read_criteria(config.criteria)
    reading = Reading(config.rationale, config.max_new_tokens, seed)
    return ModelJudge(
        **common | {"files": common["files"] | {"criteria": repr(criteria)}},
        rate=lambda replies, roles: rubric(
            *(replies, roles[seat], templates["rubric.jinja"], criteria, config.levels, reading)
        ),
    )


def _pairwise(config: JudgeConfig, seed: int, seat: str, templates: Templates, common):
    reading = Reading(config.rationale, config.max_new_tokens, seed)
    return ModelJudge(
        **common,
        compare=lambda pairs, _, roles: pairwise(
            pairs, roles[seat], templates["pairwise.jinja"], reading
        ),
    )


def _constitution(config: JudgeConfig, seed: int, seat: str, templates: Templates, common):
    principles = read_lines(config.constitution or "constitution.txt")
    if config.principles > len(principles):
        raise UserError(
            f"'config.judge.principles' is {config.principles}, and the constitution has "
            f"{len(principles)}: lower it"
        )
    reading = Reading(config.rationale, config.max_new_tokens, seed)
    clamp = config.clamp if config.rationale else 0.0
    template, count = templates["constitution.jinja"], config.principles
    return ModelJudge(
        **common | {"files": common["files"] | {"constitution": "\n".join(principles)}},
        compare=lambda pairs, places, roles: constitution(
            pairs, roles[seat], template, principles, count, places, seed, reading, clamp
        ),
    )


_ASKING = {
    "rubric": _rubric,
    "debate": _debate,
    "pairwise": _pairwise,
    "constitution": _constitution,
}
