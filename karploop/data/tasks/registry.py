"""Tasks by name: built-in and registered ones, data by address, a user's own by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from karploop.data.tasks import from_file, from_reasoning_gym, from_tfds
from karploop.data.tasks.addition import ForwardAddition, ReverseAddition
from karploop.data.tasks.address import nearest
from karploop.data.tasks.base import Task
from karploop.data.tasks.multiplication import Multiplication
from karploop.data.tasks.scratchpad import ScratchpadAddition
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
        ScratchpadAddition(),
        Multiplication(),
    )
}

# How the name of a task begins whose problems are data → what makes it from the whole name.
_SOURCES: dict[str, Callable[[str], Task]] = {
    from_file.PREFIX: from_file.file_task,
    from_reasoning_gym.PREFIX: from_reasoning_gym.reasoning_gym_task,
    from_tfds.PREFIX: from_tfds.tfds_task,
}
_FORMS = (
    "Data: 'file:PATH', 'reasoning_gym/NAME', 'tfds/NAME[:SPLIT]?prompt=FIELD&answer=FIELD'; "
    "your own is named 'package.module:ATTRIBUTE'."
)


def task_names() -> list[str]:
    """The built-in and registered names that `get_task` knows, in alphabetical order."""
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
    """The task called `name`: a known name, an address of data, or "package.module:ATTRIBUTE".

    Addresses are described at `file_task`, `reasoning_gym_task` and `tfds_task`.

    Raises:
      UserError: nothing has that name, an address is wrong, or the import path leads to no Task.
    """
    for prefix, make in _SOURCES.items():
        if name.startswith(prefix):
            return make(name)
    if home_module(name) is not None:
        return _import_task(name)
    if name not in _TASKS:
        # Of an address only the beginning can be compared: a path resembles no name.
        head = name[: min(name.index(c) + 1 for c in ":/" if c in name)] if _address(name) else name
        raise UserError(
            f"unknown task {name!r}{nearest(head, [*_TASKS, *_SOURCES])} Known tasks: "
            f"{', '.join(task_names())}. {_FORMS}"
        )
    return _TASKS[name]


def home_module(name: str) -> str | None:
    """The module in a "package.module:ATTRIBUTE"; None for every other kind of name."""
    return None if ":" not in name or _address(name) else name.partition(":")[0]


def _address(name: str) -> bool:
    """Whether `name` looks like an address of data, of a known kind or not."""
    return name.startswith(tuple(_SOURCES)) or "/" in name


def _import_task(path: str) -> Task:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A user's module may fail in any way, and the user can fix it.
        raise UserError(
            f"task {path!r}: importing {module_name!r} failed with {type(error).__name__}: "
            f"{error}{nearest(module_name + ':', _SOURCES)} Run from the folder that holds it or "
            f'add that folder to PYTHONPATH; python -c "import {module_name}" shows the traceback.'
        ) from error
    if not hasattr(module, attribute):
        raise UserError(
            f"task {path!r}: {module_name!r} has no attribute {attribute!r}"
            f"{nearest(attribute, vars(module))} Write the name of a Task instance after ':'."
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
    return task
