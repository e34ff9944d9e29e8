"""Packages import what is above them in the flow or below them in the stack, never sideways."""

import pathlib
import re

import pytest

from karploop.fingerprint import imports

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first: a layer may import layers before it. The steps of the loop stand side by side.
LAYERS = [
    {"errors"},
    {"schema"},
    {"config", "phases"},
    {"resolve"},
    {"fingerprint", "mesh", "curriculum", "sweeps", "files", "manifest", "rng"},
    {"compiling", "endpoints", "jobs", "asking"},
    {"chains"},
    {"locks"},
    {"workspace"},
    {"store"},
    {"reporting"},
    {"stages"},
    {"records"},
    {"data", "models"},
    {"sampling", "judging", "filtering", "training"},
    {"oversight", "catalogue", "roles"},
    {"policy"},
    {"offline", "offline_remote", "offline_chain", "offline_judge", "offline_reward"},
    {"precision"},
    {"lineage", "retention", "export", "judge_study", "reviewing"},
    {"machinery"},
    {"bindings", "forecast"},
    {"dryrun"},
    {"loop"},
    {"cli"},
    {"run_directory"},
    {"launch"},
    {"benchmark"},
]
STEPS = {"sampling", "judging", "filtering", "training"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(folder: str) -> list[str]:
    paths = (ROOT / folder).rglob("*.py")
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    return sorted(n.removesuffix(".__init__") for n in names)


def unit(module: str) -> str:
    """The sub-package or top-level module that a karploop module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_layer():
    found = {unit(m) for m in modules("karploop")} - {""}
    assert found <= LEVEL.keys()
    assert LEVEL.keys() <= found


@pytest.mark.parametrize("module", [m for m in modules("karploop") if unit(m)])
def test_imports_go_down(module):
    for imported in imports(module):
        target = unit(imported) if imported.startswith("karploop.") else ""
        if not target or target == unit(module):
            continue
        assert LEVEL[target] < LEVEL[unit(module)], f"{module} imports {imported}"


def test_steps_of_the_loop_do_not_import_one_another():
    """They meet in bindings/; the level above already forbids it, this says so by name."""
    for module in modules("karploop"):
        if unit(module) in STEPS:
            others = {unit(i) for i in imports(module) if i.startswith("karploop.")}
            assert not (others & STEPS) - {unit(module)}, module


def test_configs_import_nothing_of_karploop():
    for path in (ROOT / "configs").glob("*.py"):
        assert not re.search(r"^\s*(import|from) karploop", path.read_text(), re.M)


def test_package_does_not_import_entry_points():
    for module in modules("karploop"):
        assert not any(i.split(".")[0] in ("experiments", "configs") for i in imports(module))
