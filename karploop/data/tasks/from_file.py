"""Tasks from files: "file:PATH[?prompt=FIELD&answer=FIELD&difficulty=FIELD]"."""

from __future__ import annotations

from karploop.data.rows import located_rows
from karploop.data.tasks.address import FIELDS, check_known, parse, problems
from karploop.data.tasks.dataset import DatasetTask
from karploop.errors import UserError

PREFIX = "file:"


def file_task(name: str) -> DatasetTask:
    """The problems of a JSONL, JSON or Parquet file, read when first needed.

    PATH may be on an object store; it holds no "?". Further parameters: `conflicts`, see
    `DatasetTask`, and `name`, the task's name in metrics. The name also salts the held-out split:
    with one, the split stays when the file moves, and without one it is drawn anew.

    Raises:
      UserError: the path or a parameter is missing or unknown.
    """
    path, parameters = parse(name.removeprefix(PREFIX))
    check_known(name, parameters, (*FIELDS, "conflicts", "name"))
    if path in ("", "-"):
        raise UserError(f"task {name!r}: write the path of a .jsonl, .json or .parquet file")
    fields = {role: parameters[role] for role in FIELDS if role in parameters}
    return DatasetTask(
        parameters.get("name", name),
        load=lambda: problems(name, located_rows(path), fields),
        conflicts=parameters.get("conflicts", "refuse"),
    )
