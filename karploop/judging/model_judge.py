"""Judges that are models, made from a config: what they ask, of whom, and by which texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from karploop.asking import Role
from karploop.chains.rendering import load_templates, read_lines, read_text
from karploop.config import JudgeConfig
from karploop.errors import UserError
from karploop.judging.constitution import constitution
from karploop.judging.debate import debate
from karploop.judging.opinion import TEMPLATES, Opinion, Pair, Place, Reply
from karploop.judging.pairwise import pairwise
from karploop.judging.ranking import Group, rank
from karploop.judging.reading import Reading
from karploop.judging.rubric import read_criteria, rubric

JUDGE, DEBATER = "judge", "debater"

_DECIDE = {  # by judge, the keys that do, besides those of reasons
    "rubric": ("levels",),
    "pairwise": (),
    "constitution": ("principles", "clamp"),
    "debate": ("turns", "max_new_tokens"),
}

Roles = Mapping[str, Role]


@dataclass(frozen=True)
class ModelJudge:
    """One of `rate` and `compare`.

    Attributes:
      seats: names of the roles that it asks.
      scores: whether it reads probabilities, for which a role's weights are needed.
      settings: what decides its verdicts, of the config's keys.
      files: the texts that decide them, by name.
    """

    name: str
    seats: tuple[str, ...]
    scores: bool
    settings: Mapping[str, Any]
    files: Mapping[str, str]
    rate: Callable[[Sequence[Reply], Roles], list[Opinion]] | None = None
    compare: Callable[[Sequence[Pair], Sequence[Place], Roles], list[Opinion]] | None = None

    def judge(
        self, groups: Sequence[Group], roles: Roles, method: str, seed: int
    ) -> list[list[Opinion]]:
        """An opinion on every completion: its rating, or its rank among those of its prompt.

        A text that a prompt has several times is judged once.
        """
        if self.compare:
            ask = self.compare
            return rank(groups, lambda pairs, places: ask(pairs, places, roles), method, seed)
        entries = [(g, i) for g in groups for i in g.entries]
        found = self.rate([(g.prompt, g.completions[i]) for g, i in entries], roles)
        by_text = {
            (g.number, g.completions[i]): opinion
            for (g, i), opinion in zip(entries, found, strict=True)
        }
        return [[by_text[g.number, text] for text in g.completions] for g in groups]


def make_judge(config: JudgeConfig, seed: int) -> ModelJudge:
    """The judge called `config.name`.

    Raises:
      UserError: there is no such judge, or a file of it is missing or malformed.
    """
    reading = Reading(config.rationale, config.max_new_tokens, seed)
    name = f"{config.name}.jinja"
    settings = {key: value for key, value in asdict(config).items() if key in _DECIDE[config.name]}
    if config.rationale:
        settings |= {"rationale": True, "max_new_tokens": config.max_new_tokens}
    common = dict(name=config.name, seats=(JUDGE,), scores=not config.rationale, settings=settings)
    if config.name == "debate":
        more = "debate_argument.jinja"
        templates = load_templates([name, more], TEMPLATES)
        return ModelJudge(
            **common | {"seats": (JUDGE, DEBATER)},
            files={n: read_text(n, TEMPLATES) for n in (name, more)},
            rate=lambda replies, roles: debate(
                replies,
                *(roles[JUDGE], roles[DEBATER], templates[more], templates[name]),
                *(config.turns, reading),
            ),
        )
    template = load_templates([name], TEMPLATES)[name]
    files = {name: read_text(name, TEMPLATES)}
    if config.name == "rubric":
        criteria = read_criteria(config.criteria)
        return ModelJudge(
            **common,
            files=files | {"criteria": repr(criteria)},
            rate=lambda replies, roles: rubric(
                replies, roles[JUDGE], template, criteria, config.levels, reading
            ),
        )
    if config.name == "pairwise":
        return ModelJudge(
            **common,
            files=files,
            compare=lambda pairs, _, roles: pairwise(pairs, roles[JUDGE], template, reading),
        )
    principles = read_lines(config.constitution or "constitution.txt")
    if config.principles > len(principles):
        raise UserError(
            f"'config.judge.principles' is {config.principles}, and the constitution has "
            f"{len(principles)}: lower it"
        )
    return ModelJudge(
        **common,
        files=files | {"constitution": "\n".join(principles)},
        compare=lambda pairs, places, roles: constitution(
            *(pairs, roles[JUDGE], template, principles, config.principles, places, seed),
            *(reading, config.clamp if config.rationale else 0.0),
        ),
    )
