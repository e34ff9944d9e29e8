"""Templates of prompts: jinja files, read and checked before anything is asked."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping

from jinja2 import StrictUndefined, Template, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from karploop.errors import UserError

SHIPPED = pathlib.Path(__file__).parent / "templates"

Templates = Mapping[str, Template]

# Sandboxed, for a template may be someone else's; strict, for a prompt with a hole in it misleads.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def read_text(name: str, shipped: pathlib.Path = SHIPPED) -> str:
    """The text of a file in the folder `shipped`, or of one at a path.

    Raises UserError: there is none.
    """
    path = shipped / name if (shipped / name).is_file() else pathlib.Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(p.name for p in shipped.iterdir()))
        raise UserError(f"no file '{name}' ({error}): name one, or one of {known}") from error


def preferred(name: str, folder: str, shipped: pathlib.Path = SHIPPED) -> str:
    """The file of that name in `folder`, where it has one; else the shipped one.

    Args:
      folder: one of those in `shipped`, such as `short`, or a path; empty: none.

    Raises:
      UserError: there is no such folder.
    """
    if not folder:
        return name
    if not (shipped / folder).is_dir() and not pathlib.Path(folder).is_dir():
        raise UserError(
            f"'templates' names '{folder}', which is no folder: write the path of one with "
            f"{name}, or 'short'"
        )
    own = f"{folder}/{name}"
    return own if (shipped / own).is_file() or pathlib.Path(own).is_file() else name


def read_lines(name: str, shipped: pathlib.Path = SHIPPED) -> tuple[str, ...]:
    """The lines of such a file that are neither empty nor begin with '#'.

    Raises UserError: there is no file, or no line in it.
    """
    lines = [line.strip() for line in read_text(name, shipped).splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise UserError(f"'{name}' has no lines but empty ones and remarks")
    return found


def load_templates(names: Iterable[str], shipped: pathlib.Path = SHIPPED) -> Templates:
    """Raises UserError: a file is missing, or is no template (with its line)."""
    loaded = {}
    for name in set(names):
        try:
            loaded[name] = _ENVIRONMENT.from_string(read_text(name, shipped))
        except TemplateSyntaxError as error:
            raise UserError(f"template '{name}', line {error.lineno}: {error.message}") from error
    return loaded
