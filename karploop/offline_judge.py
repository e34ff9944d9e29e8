"""A judge over the rows of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from karploop.asking import Role, transcript
from karploop.chains.rendering import load_templates, read_lines, read_text
from karploop.config import JudgingConfig, MeshConfig
from karploop.data.rows import located_rows, to_prompt
from karploop.errors import UserError
from karploop.files import cache_folder
from karploop.jobs import Output, Row, identity_of
from karploop.judging.constitution import constitution
from karploop.judging.opinion import TEMPLATES, Opinion
from karploop.judging.pairwise import pairwise
from karploop.judging.rubric import read_criteria, rubric
from karploop.mesh import check_batch, make_mesh
from karploop.reporting.progress import Progress
from karploop.roles.bind import Bound

Item = tuple[str, ...]  # a prompt and one completion, or two
Judge = Callable[[list[Item], Role, list[int]], list[Opinion]]
ROLE = "judge"


def run_file(config: JudgingConfig, source: str, target: str, progress: Progress) -> None:
    """Adds a verdict to every row of `source`.

    Rows are {"prompt", "completion"} for the rubric, {"prompt", "completions": [one, two]} for the
    others. They gain `judge`, `score` (null: no verdict, and `reason` says why), `criteria`,
    `length` and, for a pair, `forward`, `backward` and `winner`; `sample` is the row's number where
    it has none. `experiments.calibrate` reads them.

    Raises:
      UserError: anything wrong with judge, role or rows, before anything is compiled.
    """
    judge, files = make_judge(config)
    rows, items = [], []
    for where, row in located_rows(source):
        items.append(_item(config, row, where))
        rows.append({"sample": len(rows), **row})
    free = ("roles", "rows", "batch")  # without effect, or told apart by what they are bound to
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    bound = Bound(
        [ROLE], config.roles, cache_folder() / "responses.sqlite", "judge", dtype=config.dtype
    )
    identity = identity_of(settings, files, bound.identity())
    mesh = make_mesh(MeshConfig())
    check_batch(config.batch, mesh, "config.batch")
    with Output(target, identity_of(identity, rows)) as out:
        if out.done == len(rows):
            return
        role = bound.load(mesh, config.batch)[ROLE]
        with progress.stage(None, config.judge, len(rows), "rows", start=out.done) as stage:
            for start in range(out.done, len(rows), config.rows):
                part = range(start, min(start + config.rows, len(rows)))
                opinions = judge([items[i] for i in part], role, list(part))
                for i, opinion in zip(part, opinions, strict=True):
                    name = f"{config.judge}-{identity[:8]}"
                    out.write(rows[i] | {"judge": name} | _verdict(items[i], opinion))
                out.flush()
                stage.advance(len(part))


def make_judge(config: JudgingConfig) -> tuple[Judge, dict[str, str]]:
    """The judge, and the texts of the files that it is made of.

    Raises:
      UserError: a file is missing or malformed.
    """
    name = f"{config.judge}.jinja"
    template = load_templates([name], TEMPLATES)[name]
    files = {name: read_text(name, TEMPLATES)}
    if config.judge == "rubric":
        criteria = read_criteria(config.criteria)
        files["criteria"] = repr(criteria)
        judge = lambda items, role, _: rubric(items, role, template, criteria, config.levels)  # noqa: E731
        return judge, files
    if config.judge == "pairwise":
        return lambda items, role, _: pairwise(items, role, template), files
    principles = read_lines(config.constitution or "constitution.txt")
    if config.principles > len(principles):
        raise UserError(
            f"'config.principles' is {config.principles}, and the constitution has "
            f"{len(principles)}: lower it"
        )
    files["constitution"] = "\n".join(principles)
    return (
        lambda items, role, ids: constitution(
            items, role, template, principles, config.principles, ids, config.seed
        ),
        files,
    )


def _item(config: JudgingConfig, row: Row, where: str) -> Item:
    prompt = to_prompt(row, where)
    if prompt.tokens is not None:
        raise UserError(f"{where}: a judge takes 'prompt' or 'messages', and not 'tokens'")
    text = prompt.text if prompt.text is not None else transcript(prompt.messages)
    if config.judge == "rubric":
        found, wanted = [row.get("completion")], "a 'completion'"
    else:
        found, wanted = row.get("completions"), "'completions', a list of two texts"
    size = 1 if config.judge == "rubric" else 2
    if not isinstance(found, list) or len(found) != size:
        raise UserError(f"{where}: the judge '{config.judge}' wants {wanted}")
    if not all(isinstance(one, str) for one in found):
        raise UserError(f"{where}: the judge '{config.judge}' wants {wanted}, as text")
    return (text, *found)


def _verdict(item: Item, opinion: Opinion) -> Row:
    _, first, *second = item
    verdict: dict[str, Any] = {"score": opinion.score, "reason": opinion.reason}
    if opinion.criteria:
        verdict["criteria"] = dict(opinion.criteria)
    if second:
        verdict |= {"forward": opinion.forward, "backward": opinion.backward}
        verdict |= {"winner": opinion.winner}
    return verdict | {"length": len(first) - sum(map(len, second))}
