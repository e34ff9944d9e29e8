"""Typed settings: nested frozen dataclasses, what is laid over them, and how they refuse it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from karploop.errors import UserError


def option(default, *, low=None, high=None, choices=None):
    """A field with bounds (inclusive) or a closed list of values; tuples are bounded by item."""
    return dataclasses.field(
        default=default, metadata={"low": low, "high": high, "choices": choices}
    )


def lay(
    defaults: Any, settings: Mapping[str, Any], overrides: Mapping[str, str] | None = None
) -> Any:
    """`defaults` with `settings` (nested) and then `overrides` (dotted path → text) over them.

    A field of type `dict[str, dict]` holds settings of the same schema, by name: they are checked
    like the others, and laying them over is left to the caller.

    Raises:
      UserError: unknown key (with the nearest name), wrong type, or value out of range.
    """
    nested = _copy(settings)
    for path, text in (overrides or {}).items():
        _set(type(defaults), nested, path, text)
    return _build(type(defaults), nested, "config", defaults=defaults)


def overlay(settings: Any, groups: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`groups` (nested) as values of the types that the class of `settings` gives their keys.

    Raises:
      UserError: as `lay`, with keys called `where`.NAME.
    """
    return _picked(groups, _build(type(settings), groups, where, defaults=settings))


def to_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready nested dictionary of a config or sub-config."""
    return dataclasses.asdict(config)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a.b': 1}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nearest(name: str, known) -> str:
    """' Did you mean …?' for the closest known name, or the list of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in settings.items()}


def _picked(nested: Mapping[str, Any], built: Any) -> dict[str, Any]:
    """The values in `built` of the keys of `nested`."""

    def pick(value: Any, of: Any) -> Any:
        return _picked(value, of) if dataclasses.is_dataclass(of) else of

    return {name: pick(value, getattr(built, name)) for name, value in nested.items()}


def _is_overlay(kind: type) -> bool:
    return typing.get_origin(kind) is dict and typing.get_args(kind)[1] is dict


def _fields(cls) -> dict[str, tuple[type, dataclasses.Field]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f) for f in dataclasses.fields(cls)}


def _set(cls, nested: dict[str, Any], path: str, text: str, prefix: str = "config") -> None:
    """Stores an override's text, read as a value of the type that the schema gives its key."""
    target, names = nested, path.split(".")
    of_any_name = None  # the class of what may be called as one likes
    for depth, name in enumerate(names):
        where = ".".join([prefix, *names[:depth]])
        if of_any_name:
            if depth == len(names) - 1:
                raise _a_group(f"{where}.{name}", of_any_name)
            cls, of_any_name = of_any_name, None
            target = target.setdefault(name, {})
            continue
        fields = _fields(cls)
        if name not in fields:
            raise UserError(f"unknown key '{where}.{name}': {nearest(name, fields)}")
        kind = fields[name][0]
        last = depth == len(names) - 1
        if _is_overlay(kind) and not last:
            if depth + 2 == len(names):
                raise _a_group(f"{where}.{name}.{names[-1]}", cls)
            under, rest = names[depth + 1], ".".join(names[depth + 2 :])
            target = target.setdefault(name, {}).setdefault(under, {})
            return _set(cls, target, rest, text, f"{where}.{name}.{under}")
        if typing.get_origin(kind) is dict and not last:
            of_any_name, target = typing.get_args(kind)[1], target.setdefault(name, {})
        elif dataclasses.is_dataclass(kind):
            if last:
                raise _a_group(f"{where}.{name}", kind)
            cls, target = kind, target.setdefault(name, {})
        elif not last:
            raise UserError(f"'{where}.{name}' is a value, it has no key '{names[depth + 1]}'")
        else:
            target[name] = _parse(text, kind, f"{where}.{name}")


def _a_group(path: str, cls) -> UserError:
    keys = ", ".join(_fields(cls))
    return UserError(f"'{path}' is a group of keys, not a value: set one of {keys}")


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        text = text.strip("()[] ")
        return tuple(_parse(part, int, where) for part in text.split(",") if part.strip())
    lowered = text.strip().lower()
    if kind is bool and lowered in ("true", "1", "yes", "false", "0", "no"):
        return lowered in ("true", "1", "yes")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text  # not a number: the type check below says so, with the key's name


def _build(cls, nested: Any, where: str, defaults):
    if not isinstance(nested, Mapping):
        raise UserError(f"'{where}' is a group of keys, got {nested!r}")
    fields = _fields(cls)
    values = {}
    for name, value in nested.items():
        if name not in fields:
            raise UserError(f"unknown key '{where}.{name}': {nearest(name, fields)}")
        kind, field = fields[name]
        path = f"{where}.{name}"
        if typing.get_origin(kind) is dict:
            if not isinstance(value, Mapping):
                raise UserError(f"'{path}' is a group of groups of keys, got {value!r}")
            of = typing.get_args(kind)[1]
            if of is dict:
                checked = ((n, overlay(defaults, v, f"{path}.{n}")) for n, v in value.items())
                values[name] = {str(n): v for n, v in checked}
                continue
            values[name] = {n: _build(of, v, f"{path}.{n}", of()) for n, v in value.items()}
        elif dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, path, getattr(defaults, name))
        else:
            values[name] = _check(value, kind, field.metadata, path)
    return dataclasses.replace(defaults, **values)


def _check(value: Any, kind: type, limits: Mapping[str, Any], path: str) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise UserError(f"'{path}' wants a list of integers, such as 1,2,3; got {value!r}")
        return tuple(_check(item, int, limits, path) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"'{path}' wants {kind.__name__}, got {value!r} ({type(value).__name__})")
    if kind is float and not math.isfinite(value):
        raise UserError(f"'{path}' must be finite, got {value}")
    low, high, choices = (limits.get(k) for k in ("low", "high", "choices"))
    if low is not None and value < low:
        raise UserError(f"'{path}' must be at least {low}, got {value}")
    if high is not None and value > high:
        raise UserError(f"'{path}' must be at most {high}, got {value}")
    if choices is not None and value not in choices:
        raise UserError(f"'{path}' is '{value}': {nearest(value, choices)}")
    return value
