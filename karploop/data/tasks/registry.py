"""Tasks by name: the built-in ones, registered ones, and a user's own by import path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from karploop.data.tasks.addition import ForwardAddition, ReverseAddition
from karploop.data.tasks.base import Task
from karploop.data.tasks.multiplication import Multiplication
from karploop.data.tasks.strings import Copy, Reverse
from karploop.errors import UserError

_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Copy(),
        Reverse(),
        ReverseAddition(),
        ReverseAddition(name="interleaved_addition", interleave=True),
        ForwardAddition(),
        Multiplication(),
    )
}


def task_names() -> list[str]:
    """Names that `get_task` knows, in alphabetical order."""
    return sorted(_TASKS)


def register(task: Task) -> Task:
    """Make `task` known by its name, and return it. Registering an equal task again is harmless.

    Raises:
      UserError: the name belongs to a different task or holds ":", or `task` is not a Task.
    """
    _check_task(task, "register")
    if ":" in task.name:
        raise UserError(f"register: the task name {task.name!r} holds ':'; leave it out.")
    if _TASKS.setdefault(task.name, task) != task:
        raise UserError(
            f"register: the name {task.name!r} already belongs to {_TASKS[task.name]!r}; "
            "give the new task another name."
        )
    return task


def get_task(name: str) -> Task:
    """The task called `name`: a known name, or "package.module:ATTRIBUTE" for a user's own.

    Raises:
      UserError: nothing has that name, or the import path leads to no Task.
    """
    if ":" in name:
        return _import_task(name)
    if name not in _TASKS:
        raise UserError(
            f"unknown task {name!r}{_nearest(name, _TASKS)} Known tasks: "
            f"{', '.join(task_names())}; your own is named 'package.module:ATTRIBUTE'."
        )
    return _TASKS[name]


def _import_task(path: str) -> Task:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A user's module may fail in any way, and the user can fix it.
        raise UserError(
            f"task {path!r}: importing {module_name!r} failed with {type(error).__name__}: "
            f"{error}. Run from the folder that holds it or add that folder to PYTHONPATH; "
            f'python -c "import {module_name}" shows the whole traceback.'
        ) from error
    if not hasattr(module, attribute):
        raise UserError(
            f"task {path!r}: {module_name!r} has no attribute {attribute!r}"
            f"{_nearest(attribute, vars(module))} Write the name of a Task instance after ':'."
        )
    return _check_task(getattr(module, attribute), f"task {path!r}")


def _check_task(task: object, where: str) -> Task:
    if isinstance(task, type) and issubclass(task, Task):
        raise UserError(f"{where}: {task.__name__} is a class; pass an instance of it.")
    if not isinstance(task, Task):
        raise UserError(
            f"{where}: expected an instance of karploop.data.tasks.Task, found "
            f"{type(task).__name__}; subclass Task and create an instance."
        )
    if not getattr(task, "alphabet", ""):
        raise UserError(
            f"{where}: task {task.name!r} has no alphabet; set `alphabet` in its class to all "
            "characters that prompts and completions use."
        )
    return task


def _nearest(name: str, known: Iterable[str]) -> str:
    """End of a sentence about the unknown `name`: a guess at what was meant, if there is one."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."
