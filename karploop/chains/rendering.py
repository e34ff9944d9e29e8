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


def read_text(name: str) -> str:
    """The text of a shipped file, or of one at a path.

    Raises UserError: there is none.
    """
    path = SHIPPED / name if (SHIPPED / name).is_file() else pathlib.Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(p.name for p in SHIPPED.iterdir()))
        raise UserError(
            f"no template '{name}' ({error}): name a file, or one of {shipped}"
        ) from error


def load_templates(names: Iterable[str]) -> Templates:
    """Raises UserError: a file is missing, or is no template (with its line)."""
    loaded = {}
    for name in set(names):
        try:
            loaded[name] = _ENVIRONMENT.from_string(read_text(name))
        except TemplateSyntaxError as error:
            raise UserError(f"template '{name}', line {error.lineno}: {error.message}") from error
    return loaded
