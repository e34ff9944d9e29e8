"""Prompts from files: JSON lines, a JSON list, Parquet, or standard input.

The shapes that data sets come in are taken as they are:

  {"prompt": "…"}, {"prompt": "…", "answer": "…"}   text; the answer is gold, for verifiers and logs
  {"messages": [{"role": …, "content": …}, …]}      a chat; a last message of an assistant's is the
                                                    answer
  {"prompt": [{"role": …, "content": …}, …]}        the same
  {"tokens": [1, 2, …]}                             ids of the model's own tokenizer
"""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from karploop.data.messages import check_messages
from karploop.errors import UserError

_SHAPES = '{"prompt": text}, {"prompt": text, "answer": text}, {"messages": […]} or {"tokens": […]}'
_KINDS = ("prompt", "messages", "tokens")  # of several in one row, the first counts
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """What to ask, in exactly one of three forms."""

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None  # ends with what is to be answered
    tokens: tuple[int, ...] | None = None
    answer: str | None = None  # gold
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other fields


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """Rows of a '.jsonl', '.json' (a list) or '.parquet' file; '-' reads JSON lines from stdin.

    Blank lines are skipped. Paths may be on object stores.

    Raises:
      UserError: the file is missing, of another kind, or empty; a line or row is malformed, not an
        object or not Unicode (the message has file and line).
    """
    return [row for _, row in located_rows(path)]


def read_prompts(path: epath.PathLike) -> list[Prompt]:
    """The rows of a file as prompts; see `read_rows`, whose errors are raised too.

    Raises:
      UserError: a row is of no shape that is known (the message has file and line).
    """
    return [to_prompt(row, where) for where, row in located_rows(path)]


def to_prompt(row: Mapping[str, Any], where: str = "row") -> Prompt:
    """One row as a prompt; a field that is null counts as absent.

    Of several forms in one row the first of prompt, messages and tokens counts, and the others stay
    among the extra fields. An answer may be a number; it is kept as it is written in JSON. A chat
    that ends with an assistant's message is asked without it, whether or not the row has an answer
    besides.

    Args:
      where: file and line, for errors.

    Raises:
      UserError: the row is of no shape that is known.
    """
    kind = next((k for k in _KINDS if row.get(k) is not None), None)
    if kind is None:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise UserError(
            f"{where}: no prompt in this row. Its keys: {keys}. Shapes that are read: {_SHAPES}; "
            "rename the field that holds the prompt"
        )
    value, answer = row[kind], row.get("answer")
    if answer is not None and not isinstance(answer, str):
        if isinstance(answer, bool) or not isinstance(answer, int | float):
            raise UserError(f"{where}: 'answer' must be text or a number, not {_short(answer)}")
        answer = json.dumps(answer)
    extra = {key: v for key, v in row.items() if key not in (kind, "answer")}
    if kind == "tokens":
        if not (
            isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value)
        ):
            raise UserError(
                f"{where}: 'tokens' must be a list of ids, at least one, not {_short(value)}"
            )
        return Prompt(tokens=tuple(value), answer=answer, extra=extra)
    if kind == "prompt" and isinstance(value, str):
        if not value:
            raise UserError(f"{where}: 'prompt' is empty")
        return Prompt(text=value, answer=answer, extra=extra)
    if kind == "prompt" and not isinstance(value, list):
        raise UserError(f"{where}: 'prompt' must be text or a chat, not {_short(value)}")
    messages = check_messages(value, f"{where}: '{kind}'")
    if messages[-1]["role"] == "assistant":
        said = messages.pop().get("content")
        answer = said if answer is None else answer
    if not messages:
        raise UserError(f"{where}: '{kind}' has nothing but an assistant's answer")
    return Prompt(messages=tuple(messages), answer=answer, extra=extra)


def located_rows(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file and where it is; see `read_rows`, whose errors are raised as they come."""
    if str(path) == "-":
        rows, name = _lines(sys.stdin.buffer.read(), "standard input"), "standard input"
    else:
        name = f"'{path}'"
        suffix = epath.Path(path).suffix.lower()
        if suffix not in _READERS:
            raise UserError(
                f"{name}: cannot tell what kind of file this is; name it .jsonl, .json or .parquet"
            )
        rows = _READERS[suffix](_read(path), name)
    empty = True
    for where, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: {_short(row)} is no object; write each row like {_SHAPES.split(',')[0]}"
            )
        yield where, row
    if empty:
        raise UserError(f"{name}: no rows; there is nothing to ask")


def _read(path: epath.PathLike) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, None):
            raise  # a failing disk, the network
        reason = error.strerror or str(error)
        raise UserError(f"cannot read prompts from '{path}': {reason}") from error


def _lines(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    # Split at "\n" alone: strings in JSON may contain the other line breaks of Unicode.
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _parse(line, where)


def _list(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    rows = _parse(data.removeprefix(_BOM), name)
    if not isinstance(rows, list):
        raise UserError(
            f"{name}: a .json file of prompts is one list of rows; this is {_short(rows)}. One "
            "object a line makes a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _table(data: bytes, name: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is no Parquet file, or a broken one: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


_READERS = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _list,
    ".parquet": _table,
}


def _parse(data: bytes, where: str) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}); convert the file "
            "with: iconv -f ENCODING -t UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        hint = ". One object a line makes a .jsonl file" if error.msg == "Extra data" else ""
        raise UserError(f"{where}: malformed JSON: {error.msg} at {at}{hint}") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    if "\\u" in text:  # the one way to write half a surrogate pair, which no tokenizer takes
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(
                f"{where}: half a surrogate pair ({half!r}) is no Unicode; half an emoji, perhaps"
            ) from error
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
