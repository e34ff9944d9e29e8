"""A hash of the code behind a stage, so that changed code never meets an old result.

The fingerprint of a module covers its own source and that of every module it imports, directly or
through others, as far as these belong to karploop or to the user: installed packages do not count
(their versions are recorded as provenance), nor do comments, docstrings and layout. What carries
values rather than behaviour does not count either: a config's values are in the stage's key
already, and the store and the stage runner cannot change what a stage computes.

Sources are read when `remember` is called, at the start of a run, not when a stage comes up: an
edit made while the run is under way does not pass for the code that it started with.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Collection

NEUTRAL = (  # with all that is in them
    "karploop.config",
    "karploop.errors",
    "karploop.files",
    "karploop.fingerprint",
    "karploop.locks",
    "karploop.manifest",
    "karploop.reporting.progress",
    "karploop.stages",
    "karploop.store",
    "karploop.workspace",
)
ALWAYS = ("karploop.rng",)  # behind every stage, through the neutral stage runner


@functools.cache
def fingerprint(*modules: str) -> str:
    """SHA-256 over the behaviour of `modules` and of all they import of karploop's or the user's.

    Raises:
      ModuleNotFoundError: one of them cannot be found, or is not Python source.
    """
    sources = {name: behaviour(name) for name in sorted(closure((*modules, *ALWAYS)))}
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def remember() -> None:
    """Reads the sources of what is imported by now, so that later edits do not pass for them."""
    for name in list(sys.modules):
        if _followed(name, {"karploop"}) and _file(name):
            _source(name)


def closure(modules: Collection[str]) -> set[str]:
    """The modules whose code can change what `modules` compute."""
    families = {_top(name) for name in modules} | {"karploop"}
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen or _neutral(name):
            continue
        seen.add(name)
        found = imports(name) | _parents(name)
        waiting += [n for n in found if _followed(n, families) and _file(n)]
    return seen


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every module that `module` imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            names.add(base)
            if _followed(base, {_top(module)}) and _is_package(base):
                candidates = {f"{base}.{alias.name}" for alias in node.names}
                names |= {name for name in candidates if _spec(name)}
    return frozenset(names)


@functools.cache
def behaviour(module: str) -> str:
    """The module's syntax tree without docstrings and positions."""
    return ast.dump(_tree(module))


@functools.cache
def _tree(module: str) -> ast.Module:
    """The module's syntax tree without docstrings."""
    tree = ast.parse(_source(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return tree


def _neutral(name: str) -> bool:
    return name == "karploop" or any(name == n or name.startswith(n + ".") for n in NEUTRAL)


def _followed(name: str, families: Collection[str]) -> bool:
    """Whether a module is karploop's or the user's: neither Python's nor an installed package."""
    top = _top(name)
    if top in families:
        return True
    if top in sys.stdlib_module_names or top == "__main__":
        return False
    spec = _spec(top)
    if spec is None or spec.origin in ("built-in", "frozen"):
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    parts = {part for place in places for part in pathlib.Path(place).parts}
    return bool(parts) and not parts & {"site-packages", "dist-packages"}


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a `from … import` names, whether or not it is relative."""
    if not node.level:
        return node.module
    package = module if _is_package(module) else module.rpartition(".")[0]
    parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
    return f"{parent}.{node.module}" if node.module else parent


def _top(name: str) -> str:
    return name.split(".")[0]


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def _is_package(name: str) -> bool:
    spec = _spec(name)
    return spec is not None and spec.submodule_search_locations is not None


@functools.cache
def _spec(module: str):
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # no such parent; a module made by hand
        return None


def _file(module: str) -> str | None:
    """Where the module's Python source is; None for namespaces and compiled modules."""
    spec = _spec(module)
    return spec.origin if spec and (spec.origin or "").endswith(".py") else None


@functools.cache
def _source(module: str) -> bytes:
    path = _file(module)
    if path is None:
        raise ModuleNotFoundError(f"no Python source of the module '{module}'", name=module)
    return pathlib.Path(path).read_bytes()
