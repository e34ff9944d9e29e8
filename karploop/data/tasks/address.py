"""Names of data: "path?key=value&…", and a table's columns as problems."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from karploop.data.rows import to_prompt
from karploop.data.tasks.dataset import Problem
from karploop.errors import UserError

FIELDS = ("prompt", "answer", "difficulty")  # parameters that name a column


def parse(name: str) -> tuple[str, dict[str, str]]:
    """What stands before the first "?", and the parameters behind it.

    Values may be percent-encoded, which "&" and "%" in them must be; "+" means itself.

    Raises:
      UserError: a parameter is not written key=value, or occurs twice.
    """
    path, mark, query = name.partition("?")
    parameters: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise UserError(f"task {name!r}: write parameters as '?key=value&…'; found {part!r}")
        if key in parameters:
            raise UserError(f"task {name!r}: the parameter {key!r} occurs twice")
        parameters[key] = unquote(value)
    return path, parameters


def check_known(name: str, parameters: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError, with the nearest known name, if a parameter is not in `known`."""
    known = sorted(known)
    for key in parameters:
        if key not in known:
            raise UserError(
                f"task {name!r}: unknown parameter {key!r}{nearest(key, known)} Parameters: "
                f"{', '.join(known)}."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """End of a sentence about the unknown `name`: a guess at what was meant, if there is one."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def problems(
    name: str, rows: Iterable[tuple[str, Mapping[str, Any]]], fields: Mapping[str, str]
) -> Iterator[Problem]:
    """The rows of a table as problems.

    A prompt is a text, or a chat of one message of the user's. An answer is a text or a number, a
    difficulty a whole number; without a field for it, it is 1.

    Args:
      name: the task's, for errors.
      rows: where each row is, for errors, and the row.
      fields: the columns by role, see FIELDS. Without one for the prompt the rows have one of the
        shapes of `karploop.data.rows`; without one for the answer it is "answer", if there is one.

    Raises:
      UserError: a row has no such prompt or difficulty, or no row has the field of the answers.
    """
    answers_missing = "answer" in fields
    seen: dict[str, None] = {}
    for where, row in rows:
        seen.update(dict.fromkeys(row))
        answers_missing &= fields.get("answer") not in row
        yield _problem(f"task {name!r}: {where}", where, row, fields)
    if answers_missing:
        raise UserError(f"task {name!r}: there is {_field_of(fields['answer'], seen)}")


def _problem(
    context: str, where: str, row: Mapping[str, Any], fields: Mapping[str, str]
) -> Problem:
    asked = dict(row)
    if "prompt" in fields:
        if row.get(fields["prompt"]) is None:
            raise UserError(f"{context} has {_field_of(fields['prompt'], row)}")
        asked = {"prompt": row[fields["prompt"]], "answer": row.get("answer")}
    if "answer" in fields:
        asked["answer"] = row.get(fields["answer"])
    prompt = to_prompt(asked, context)
    text = prompt.text
    if text is None and prompt.messages and len(prompt.messages) == 1:
        text = prompt.messages[0].get("content")
    if not isinstance(text, str):
        raise UserError(
            f"{context}: the prompt of a task is text or a single message of text; longer chats "
            "and token ids are for experiments.generate"
        )
    difficulty = 1
    if "difficulty" in fields:
        value = row.get(fields["difficulty"])
        if value is None:
            raise UserError(f"{context} has {_field_of(fields['difficulty'], row)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise UserError(
                f"{context}: the difficulty must be a whole number, and {fields['difficulty']!r} "
                f"is {value!r}"
            )
        difficulty = int(value)
    return Problem(text, prompt.answer, difficulty, where)


def _field_of(field: str, known: Iterable[str]) -> str:
    keys = list(known)
    return f"no field {field!r}{nearest(field, keys)} Its fields: {', '.join(keys) or 'none'}."
