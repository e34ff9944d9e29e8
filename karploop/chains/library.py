"""The chains that are shipped. Roles that a config does not bind are the policy."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from karploop.chains.definition import Ask, Branch, Chain, Draw, Let, Repeat, Variables
from karploop.chains.parsing import json_object, one_of
from karploop.chains.rendering import preferred, read_lines
from karploop.config import ChainOptions
from karploop.errors import UserError
from karploop.schema import nearest

_PASSED = one_of(pass_=True, fail=False)


def answer(options: ChainOptions) -> Chain:
    """Plain sampling."""
    return Chain("answer", (Ask("output"),))


def teacher(options: ChainOptions) -> Chain:
    """The role `teacher` answers in the policy's place (arXiv 1606.07947, section 3.2)."""
    return Chain("teacher", (Ask("output", role="teacher"),))


def question_answer(options: ChainOptions) -> Chain:
    """From a row's `topic` to a question about it and its answer."""
    return Chain(
        "question_answer",
        (
            Ask("question", "question.jinja"),
            Ask("answer", "answer_question.jinja"),
            Let("output", lambda v: {"question": v["question"], "answer": v["answer"]}),
        ),
    )


def reasoning(options: ChainOptions) -> Chain:
    """Step by step (arXiv 2201.11903), with the answer on a line of its own at the end."""
    return Chain("reasoning", (Ask("output", "reasoning.jinja"),))


def critique_revise(options: ChainOptions) -> Chain:
    """Constitutional AI's first stage (arXiv 2212.08073, section 3.1): each pass draws a principle,
    finds fault by it, and writes the reply anew."""
    one_pass = (
        Draw("principle", read_lines(options.constitution or "constitution.txt")),
        Ask("critique", "critique.jinja", "critic", temperature=options.judging_temperature),
        Ask("output", "revision.jinja"),
    )
    return Chain("critique_revise", (Ask("output"), Repeat(one_pass, options.passes)))


def debate(options: ChainOptions) -> Chain:
    """For and against the policy's own answer, before a judge (after arXiv 1805.00899).

    The result is {"answer", "upheld"}; `upheld` is null where the judge cannot be read.
    """

    def side(name: str) -> tuple:
        return (
            Let("side", lambda _: name),
            Let("heard", lambda v: _heard(v, name, options.hidden)),
            Ask("argument", "argument.jinja", "debater"),
            Let("said", lambda v: [*v["said"], {"side": name, "text": v["argument"]}]),
        )

    def stand(name: str) -> tuple:
        return (
            Let("side", lambda _: name),
            Ask(f"claim_{name}", "claim.jinja", "debater"),
        )

    committed = (
        *stand("for"),
        *stand("against"),
        Let("claims", lambda v: {s: v[f"claim_{s}"] for s in ("for", "against")}),
    )
    return Chain(
        "debate",
        (
            Ask("answer"),
            Let("said", lambda _: []),
            Let("claims", lambda _: {}),
            *(committed if options.precommit else ()),
            Repeat((*side("for"), *side("against")), options.turns),
            Ask(
                "upheld",
                "debate_judge.jinja",
                "judge",
                parse=one_of(right=True, wrong=False),
                temperature=options.judging_temperature,
            ),
            Let("output", lambda v: {"answer": v["answer"], "upheld": v["upheld"]}),
        ),
    )


def draft_judge_revise(options: ChainOptions) -> Chain:
    """Drafts until the judge lets one pass; the result is null where none did."""
    one_turn = (
        Ask("draft", "draft.jinja"),
        Ask("review", "review.jinja", "judge", temperature=options.judging_temperature),
        Let("passed", lambda v: _PASSED(v["review"])),
    )
    return Chain(
        "draft_judge_revise",
        (
            Repeat(one_turn, options.attempts, until=lambda v: v["passed"] is True),
            Let("output", lambda v: v["draft"] if v["passed"] is True else None),
        ),
    )


def extract_validate_repair(options: ChainOptions) -> Chain:
    """A JSON object with the wanted fields out of a row's text; null where it stays invalid."""
    fields = tuple(name.strip() for name in options.fields.split(",") if name.strip())
    if not fields:
        raise UserError("'config.options.fields' names no field to extract: write name, date")

    def problems(v: Variables) -> str:
        found = v["extraction"]
        if found is None:
            return "it is no JSON object"
        return "; ".join(f"'{name}' is missing" for name in fields if name not in found)

    one_turn = (
        Ask("extraction", "extract.jinja", parse=json_object),
        Let("problems", problems),
    )
    return Chain(
        "extract_validate_repair",
        (
            Let("fields", lambda _: list(fields)),
            Let("problems", lambda _: ""),
            Repeat(one_turn, options.attempts, until=lambda v: not v["problems"]),
            Let("output", lambda v: None if v["problems"] else v["extraction"]),
        ),
    )


def safe_reply(options: ChainOptions) -> Chain:
    """A reply, a check of it, and by its verdict the reply, a rewritten one, or a refusal.

    A verdict that cannot be read refuses.
    """
    return Chain(
        "safe_reply",
        (
            Ask("reply"),
            Ask(
                "verdict",
                "safety.jinja",
                "judge",
                parse=one_of(safe="safe", rewrite="rewrite", refuse="refuse"),
                temperature=options.judging_temperature,
            ),
            Branch(
                "verdict",
                {
                    "safe": (Let("output", lambda v: v["reply"]),),
                    "rewrite": (Ask("output", "rewrite.jinja"),),
                },
                otherwise=(Ask("output", "refusal.jinja"),),
            ),
        ),
    )


CHAINS: dict[str, Callable[[ChainOptions], Chain]] = {
    make.__name__: make
    for make in (
        *(answer, teacher, question_answer, reasoning, critique_revise, debate),
        *(draft_judge_revise, extract_validate_repair, safe_reply),
    )
}


def get_chain(name: str, options: ChainOptions, where: str = "config.chain") -> Chain:
    """A shipped chain, or the value of "package.module:ATTRIBUTE": a chain, or what makes one.

    Raises:
      UserError: there is no such chain; `where` is the key that names it.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in CHAINS:
            raise UserError(f"no chain '{name}': {nearest(name, CHAINS)}")
        return CHAINS[name](options).with_templates(lambda file: preferred(file, options.templates))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"'{where}' names '{name}', and {error}") from error
    found = found(options) if callable(found) else found
    if not isinstance(found, Chain):
        raise UserError(f"'{name}' is no chain but a {type(found).__name__}")
    return found


def _heard(v: Variables, side: str, hidden: bool) -> list:
    """The arguments that a side has heard."""
    return [said for said in v["said"] if said["side"] == side or not hidden]
