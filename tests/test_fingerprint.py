"""What changes a stage's code version, and what does not."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

import karploop
from karploop import fingerprint as fp
from karploop.bindings import Bindings
from karploop.machinery import prepare
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Stages
from karploop.store import Store

STAGES = {
    "generate": "karploop.sampling.generate",
    "judge": "karploop.judging.judge",
    "filter": "karploop.filtering.select",
    "train": "karploop.training.train",
    "evaluate": "karploop.oversight.evaluate",
}


@pytest.fixture
def forget():
    """Makes the fingerprints see the disk anew, as another process would."""

    def forget():
        for cached in (fp.fingerprint, fp.imports, fp.behaviour, fp._tree, fp._spec, fp._source):
            cached.cache_clear()

    forget()
    yield forget
    forget()
    for name in [name for name in sys.modules if name.startswith("my_fp_")]:
        del sys.modules[name]


class Copy:
    """A copy of karploop to edit, and its stages' versions as a fresh process computes them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        source = pathlib.Path(karploop.__file__).parent
        shutil.copytree(source, folder / "karploop", ignore=shutil.ignore_patterns("__pycache__"))

    def append(self, module: str, text: str) -> None:
        path = self.folder / (module.replace(".", "/") + ".py")
        path.write_text(path.read_text() + text)

    def versions(self) -> dict[str, str]:
        code = (
            "import json, sys; from karploop.fingerprint import fingerprint; "
            "print(json.dumps({k: fingerprint(v) for k, v in json.loads(sys.argv[1]).items()}))"
        )
        line = [sys.executable, "-c", code, json.dumps(STAGES)]
        done = subprocess.run(line, cwd=self.folder, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def changed_by(self, module: str, text: str) -> set[str]:
        before = self.versions()
        self.append(module, text)
        after = self.versions()
        return {stage for stage in STAGES if before[stage] != after[stage]}


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.mark.parametrize(
    "module, stages",
    [
        ("karploop.filtering.registry", {"filter"}),
        ("karploop.judging.vote", {"judge"}),
        ("karploop.training.packing", {"train"}),
        ("karploop.sampling.rollout", {"generate", "evaluate"}),
        ("karploop.models.decoder", {"generate", "train", "evaluate"}),
        ("karploop.records", set(STAGES)),
        ("karploop.rng", set(STAGES)),
        ("karploop.store", set()),
        ("karploop.stages", set()),
        ("karploop.reporting.plots", set()),
    ],
)
def test_a_change_reaches_the_stages_that_run_it(copy, module, stages):
    assert copy.changed_by(module, "\nADDED = 1\n") == stages


def test_comments_docstrings_and_layout_do_not_count(copy):
    path = copy.folder / "karploop/filtering/registry.py"
    before = copy.versions()
    text = path.read_text().replace('"""The ', '"""THE ')
    path.write_text(f"# a comment\n{text}\n\n\n# the end\n")
    assert path.read_text().count("THE ") >= 2
    assert copy.versions() == before


@pytest.fixture
def package(tmp_path, monkeypatch):
    """write(name, source): a module of a user's own, outside karploop."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))

    return write


@pytest.mark.parametrize(
    "statement",
    [
        "import my_fp_helper",
        "from my_fp_helper import f",
        "def g():\n    import my_fp_helper",
        "from my_fp_package import deep",
        "from my_fp_package.deep import f",
        "import my_fp_package.deep as other",
    ],
)
def test_a_users_own_helpers_count(package, forget, statement):
    """At any depth: a filter imports a module, which imports the one that changes."""
    package("my_fp_filter.py", f"{statement}\n")
    package("my_fp_helper.py", "from my_fp_package import deep\n")
    package("my_fp_package/__init__.py", "")
    package("my_fp_package/deep.py", "from . import sibling\nfrom .sub.leaf import x\n")
    package("my_fp_package/sibling.py", "y = 1\n")
    package("my_fp_package/sub/__init__.py", "")
    package("my_fp_package/sub/leaf.py", "from ..sibling import y\nx = 1\n")
    before = fp.fingerprint("my_fp_filter")
    for name in ("my_fp_package/sub/leaf.py", "my_fp_package/sibling.py"):
        package(name, "x, y, z = 1, 1, 2\n")
        forget()
        after = fp.fingerprint("my_fp_filter")
        assert after != before, name
        before = after


def test_installed_packages_do_not_count(package, forget):
    package("my_fp_filter.py", "import json\nimport numpy as np\nfrom jax import numpy\n")
    assert fp.closure(["my_fp_filter"]) == {"my_fp_filter"}


def test_an_import_that_is_not_there_is_no_error(package, forget):
    package("my_fp_filter.py", "try:\n    import my_fp_absent\nexcept ImportError:\n    pass\n")
    assert fp.fingerprint("my_fp_filter")
    with pytest.raises(ModuleNotFoundError, match="my_fp_absent"):
        fp.fingerprint("my_fp_absent")


def test_an_edit_during_the_run_does_not_pass_for_what_runs(package, forget):
    """The code in memory is that of the start; so must be its fingerprint."""
    package("my_fp_filter.py", "def f():\n    return 1\n")
    __import__("my_fp_filter")
    fp.remember()
    package("my_fp_filter.py", "def f():\n    return 2\n")
    running = fp.fingerprint("my_fp_filter")
    forget()
    assert fp.fingerprint("my_fp_filter") != running


def test_values_in_a_users_file_count(package, forget, tmp_path):
    """Also where the task's class and the filter's function are karploop's own."""
    tiny = dict(
        rounds=1,
        task=dict(name="my_fp_values:TASK", seed_difficulty=1, seed_problems=20),
        filter=dict(name="my_fp_values:FILTER"),
        model=dict(layers=1, width=8, heads=2, head_width=4, mlp_width=8, max_length=32),
        warmup=dict(rows=8, row_length=32),
        train=dict(rows=8, row_length=32),
        generate=dict(batch=8),
        evaluate=dict(difficulties=(1,), problems=4, batch=8),
    )

    def versions(interleave: bool, function: str) -> tuple[str, str]:
        package(
            "my_fp_values.py",
            f"""
            from karploop.data.tasks import ReverseAddition
            from karploop.filtering.by_form import length_filter, no_filter
            from karploop.filtering.filters import Filter

            TASK = ReverseAddition(name="mine", interleave={interleave})
            FILTER = Filter("mine", {function}.function, None)
            """,
        )
        sys.modules.pop("my_fp_values", None)
        forget()
        store = Store(str(tmp_path / "workdir"))
        store.open()
        stages = Stages(store, Progress(quiet=True))
        bindings = Bindings(prepare(resolve(tiny)), stages)
        asked = []
        stages.run = lambda *args, modules, **kwargs: asked.append(modules)
        bindings.filter(0, {}, None)
        return bindings.seed.manifest.version, fp.fingerprint(*asked[0])

    task, filter_ = versions(False, "no_filter")
    assert versions(False, "no_filter") == (task, filter_)
    assert versions(True, "no_filter")[0] != task
    assert versions(False, "length_filter")[1] != filter_
