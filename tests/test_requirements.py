"""What installing brings along: no accelerator's build, and no two pins that exclude each other."""

import importlib.metadata
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
FILES = ("requirements.txt", "requirements-dev.txt", "requirements-gemma3.txt")
# Builds for one kind of device, and frameworks that bring gigabytes of them along.
ACCELERATED = r"libtpu|jax-(cuda|rocm)|jaxlib-|nvidia-|triton|torch|tensorflow|tf-|tpu-|cupy"


def written(name: str) -> list[Requirement]:
    """The lines of a requirements file, those of the files it names included.

    A line that is no requirement (another index, a link, an option) does not parse.
    """
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found += written(line[3:].strip())
        elif line:
            found.append(Requirement(line))
    return found


def all_asked(first: list[Requirement]) -> list[tuple[str, Requirement]]:
    """Every requirement that follows from these on this machine, with who asks for it."""
    asked: list[tuple[str, Requirement]] = []
    waiting = [("a requirements file", requirement, "") for requirement in first]
    seen = set()
    while waiting:
        who, requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        asked.append((who, requirement))
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                further = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [(name, Requirement(text), wanted) for text in further]
    return asked


def test_installing_forces_no_accelerator_and_no_second_framework():
    """Plain jax runs anywhere; who has an accelerator adds its plug-in (the README says how)."""
    names = {canonicalize_name(r.name): who for who, r in all_asked(written("requirements.txt"))}
    assert {"jax", "flax", "numpy"} <= names.keys()
    assert {n: who for n, who in names.items() if re.match(ACCELERATED, n)} == {}


def test_requirements_leave_room_for_other_packages():
    """A range and no single version: an exact pin clashes with the next package's."""
    for requirement in written("requirements.txt"):
        operators = {one.operator for one in requirement.specifier}
        assert ">=" in operators and not operators & {"==", "===", "~="}, requirement


@pytest.mark.parametrize("name", FILES)
def test_no_two_pins_exclude_each_other(name):
    """What is installed satisfies everybody who asks for it, through all dependencies."""
    checked = 0
    for who, requirement in all_asked(written(name)):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a file that is not installed here
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{who} wants {requirement}, and {version} is installed"
        )
        checked += 1
    assert checked > 50


def test_files_do_not_ask_for_different_versions_of_one_package():
    pins: dict[str, set[str]] = {}
    for name in FILES:
        for requirement in written(name):
            pins.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement))
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
