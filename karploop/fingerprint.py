"""A hash of the code behind a stage, so that changed code never meets an old result.

The fingerprint of a module covers its own source and that of every karploop module it imports,
directly or through others. Comments, docstrings and layout do not count. What carries values
rather than behaviour does not count either: a config's values are in the stage's key already, and
the store, the stage runner and the reports cannot change what a stage computes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util

NEUTRAL = (
    "karploop.config",
    "karploop.errors",
    "karploop.fingerprint",
    "karploop.reporting",
    "karploop.stages",
    "karploop.store",
)


@functools.cache
def fingerprint(*modules: str) -> str:
    """SHA-256 over the behaviour of `modules` and of all they import from karploop."""
    sources = {name: _behaviour(name) for name in sorted(closure(modules))}
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def closure(modules: tuple[str, ...]) -> set[str]:
    """The modules whose code can change what `modules` compute."""
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen or _neutral(name):
            continue
        seen.add(name)
        waiting += [n for n in imports(name) if n.startswith("karploop")]
    return seen


def imports(module: str) -> set[str]:
    """Every module that `module` imports, at any depth of its code (absolute imports only)."""
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            if node.module.split(".")[0] == "karploop":
                candidates = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {c for c in candidates if _origin(c)}
    return names


def _neutral(name: str) -> bool:
    return any(name == n or name.startswith(n + ".") for n in NEUTRAL)


@functools.cache
def _origin(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent is a module, not a package
        return None
    return spec.origin if spec else None


@functools.cache
def _tree(module: str) -> ast.Module:
    origin = _origin(module)
    if origin is None:
        raise ModuleNotFoundError(module)
    with open(origin, encoding="utf-8") as f:
        return ast.parse(f.read())


def _behaviour(module: str) -> str:
    """The module's syntax tree without docstrings and positions."""

    class DropDocstrings(ast.NodeTransformer):
        def generic_visit(self, node):
            super().generic_visit(node)
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                    node.body = body[1:] or [ast.Pass()]
            return node

    with open(_origin(module), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    return ast.dump(DropDocstrings().visit(tree))
