"""Tasks from Reasoning Gym (arXiv 2505.24760): "reasoning_gym/NAME[?key=value&…]"."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import importlib.metadata
import json
import os
import random
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from karploop.data.tasks.address import check_known, nearest, parse
from karploop.data.tasks.base import ScorerFailed
from karploop.data.tasks.dataset import DatasetTask, Problem
from karploop.errors import UserError

PREFIX = "reasoning_gym/"
_SIZE, _SEED, _THRESHOLD = 20_000, 0, 1.0
_OWN = ("threshold", "allow_eval", "name")  # parameters that are not the data set's

# Of release 0.1.25. What they draw depends on the order of a set of strings, which Python shuffles
# from process to process; a test compares two processes.
_HASH_ORDERED = frozenset(
    ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)
# It runs code that is not repeatable whatever is seeded.
_UNREPEATABLE = frozenset(("codeio",))
# These score an answer by `eval`, or by SymPy's `parse_expr`, which evaluates too.
_EVALUATES = frozenset(
    (
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)
_NO_ANSWER = "this is no answer to anything"


@functools.cache
def reasoning_gym_task(name: str) -> DatasetTask:
    """A pool of `size` (20,000) entries made from `seed` (0), when first needed and once a process.

    The other parameters are the fields of the data set's own configuration; lists are written with
    commas or as JSON. `threshold` (1) is the score from which an answer is right. `name` is the
    task's name in metrics, which also salts the held-out split. Entries that repeat a prompt are
    dropped, so that a small family gives fewer than `size` problems.

    Answers are judged by the data set's own scorer. Where it fails on a text, a judge has no
    verdict, and measurements call the text wrong. A few scorers evaluate what a model wrote as
    Python code: these take `allow_eval=true`.

    Raises:
      UserError: the package is missing; nothing has that name; a parameter is unknown, of the wrong
        type or refused by the data set; or the data set needs what the comments above tell.
    """
    registry = _registry(name)
    dataset, parameters = parse(name.removeprefix(PREFIX))
    if dataset not in registry:
        raise UserError(
            f"task {name!r}: Reasoning Gym has no {dataset!r}{nearest(dataset, registry)} It has: "
            f"{', '.join(sorted(registry))}."
        )
    _check_usable(name, dataset, parameters.get("allow_eval", "false"))
    config_class = registry[dataset][1]
    kinds = typing.get_type_hints(config_class)
    fields = {f.name: kinds[f.name] for f in dataclasses.fields(config_class)}
    check_known(name, parameters, (*fields, *_OWN))
    settings = {"size": _SIZE, "seed": _SEED} | {
        key: _convert(f"task {name!r}: {key!r}", text, fields[key])
        for key, text in parameters.items()
        if key not in _OWN
    }
    if settings["seed"] is None or settings["size"] < 1:
        raise UserError(f"task {name!r}: 'seed' must be a number and 'size' at least 1")
    threshold = _convert(f"task {name!r}: 'threshold'", parameters.get("threshold", "1"), float)
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"task {name!r}: 'threshold' must lie in (0, 1], and is {threshold}")
    try:
        config = config_class(**settings)
        if hasattr(config, "validate"):
            config.validate()
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task {name!r}: {dataset} refuses these parameters: {error}") from error

    @functools.cache
    def source():
        return registry[dataset][0](config)

    def score(answer: str, entry: dict[str, Any]) -> bool:
        try:
            return bool(source().score_answer(answer, entry) >= threshold)
        except Exception as error:  # Some take it for granted that an answer can be parsed.
            raise ScorerFailed(f"the scorer failed ({type(error).__name__})") from error

    def accepts_anything(problem: Problem) -> bool:
        with contextlib.suppress(ScorerFailed):
            return score(_NO_ANSWER, problem.evidence)
        return False

    def load() -> list[Problem]:
        problems = _problems(name, source, settings["size"])
        # A guard against scorers that call everything right, such as game_of_life_halting's.
        if all(map(accepts_anything, problems[:8])):
            raise UserError(
                f"task {name!r}: the scorer of {dataset} calls any text right, so there is nothing "
                "to learn from it; choose another data set or a higher threshold"
            )
        return problems

    return DatasetTask(
        parameters.get("name", name),
        load=load,
        scorer=lambda problem, completion: score(completion, problem.evidence),
        version=f"reasoning_gym {_release()} {dataset} {threshold}",
        # The scorer knows which answers are right to the entry that is kept.
        conflicts="first",
    )


def _problems(name: str, source, size: int) -> list[Problem]:
    with _seeded():
        try:
            dataset = source()
            entries = [dataset[i] for i in range(size)]
        except Exception as error:
            raise UserError(
                f"task {name!r}: Reasoning Gym cannot make {size} entries with these parameters: "
                f"{type(error).__name__}: {error}"
            ) from error
    return [
        Problem(e["question"], _text(e["answer"]), where=f"entry {i}", evidence=e)
        for i, e in enumerate(entries)
    ]


def _text(answer: Any) -> str | None:
    return None if answer is None else str(answer)  # None where any valid solution will do


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Fixes the global generators, which a few data sets use besides their own, and restores them.

    In release 0.1.25 list_functions draws from `random`, and pool_matrix seeds NumPy's.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _registry(name: str) -> dict[str, tuple[type, type]]:
    try:
        import reasoning_gym  # noqa: F401  Its import fills the registry.
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"task {name!r}: the package '{error.name}' is missing; install it with: "
            "pip install reasoning-gym"
        ) from error
    return DATASETS


def _release() -> str:
    # Not the module's __version__, which has stayed behind the releases.
    return importlib.metadata.version("reasoning-gym")


def _check_usable(name: str, dataset: str, allow_eval: str) -> None:
    allowed = _convert(f"task {name!r}: 'allow_eval'", allow_eval, bool)
    if dataset in _EVALUATES and not allowed:
        raise UserError(
            f"task {name!r}: Reasoning Gym scores answers to {dataset} by evaluating them as "
            "Python code, so that a model's text could do anything on this machine, or never "
            "return. If that is acceptable where this runs, add 'allow_eval=true'"
        )
    if dataset in _UNREPEATABLE:
        raise UserError(
            f"task {name!r}: {dataset} gives other problems in every process, so that no run could "
            "be resumed. Write its entries to a file once, and use 'file:PATH'"
        )
    shuffled = os.environ.get("PYTHONHASHSEED", "random") == "random"
    if dataset in _HASH_ORDERED and (shuffled or sys.flags.ignore_environment):
        raise UserError(
            f"task {name!r}: the problems of {dataset} depend on Python's hash seed, which differs "
            "from process to process, so that no run could be resumed. Set PYTHONHASHSEED=0 in the "
            "environment before Python starts"
        )


def _convert(what: str, text: str, kind: Any) -> Any:
    """`text` as a value of the annotation `kind`. Raises UserError if it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return _convert(what, text, next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        if text not in map(str, arguments):
            raise UserError(f"{what} is one of {', '.join(map(str, arguments))}, not {text!r}")
        return next(a for a in arguments if str(a) == text)
    if kind in (list, tuple) or origin in (list, tuple, Sequence):
        item = arguments[0] if arguments else str
        values = [_convert(what, part, item) for part in _items(what, text)]
        return tuple(values) if tuple in (kind, origin) else values
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _convert_enum(what, text, kind)
    if kind not in _FROM_TEXT:
        raise UserError(
            f"{what} cannot be given in a name: it is of type {kind}. Make a DatasetTask of your "
            "own, with the data set that you want"
        )
    try:
        return _FROM_TEXT[kind](text)
    except (KeyError, ValueError) as error:
        raise UserError(f"{what} must be of type {kind.__name__}, and is {text!r}") from error


def _items(what: str, text: str) -> list[str]:
    if not text.startswith("["):
        return text.split(",")
    try:
        return [v if isinstance(v, str) else json.dumps(v) for v in json.loads(text)]
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is no JSON list: {text!r} ({error.msg})") from error


def _convert_enum(what: str, text: str, kind: type[enum.Enum]) -> enum.Enum:
    known = {str(member.value): member for member in kind}
    if text not in known:
        raise UserError(f"{what} is one of {', '.join(known)}, not {text!r}")
    return known[text]


_FROM_TEXT = {
    bool: lambda text: {"true": True, "false": False, "1": True, "0": False}[text.lower()],
    int: int,
    float: float,
    str: str,
    datetime.date: datetime.date.fromisoformat,
    datetime.time: datetime.time.fromisoformat,
}
