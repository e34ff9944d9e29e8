"""Three tiny finished runs in one workdir, made once for all tests that look at such a thing.

plain    filter `none`, no judge
voted    filter `vote`: shares seed data, warm-up and round 0's samples with `plain`
members  two members, votes over them; its first member shares the warm-up
"""

import dataclasses
import functools
import pathlib
import shutil
import signal
from unittest import mock

import jax

from karploop import launch, loop
from karploop.bindings import Round
from karploop.config import Config
from karploop.filtering.filters import get_filter
from karploop.machinery import Machinery, prepare
from karploop.manifest import Manifest
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Stages
from karploop.store import Store

RUNS = ("plain", "voted", "members")
_OPTIMIZER = dict(name="adamw", learning_rate=1e-3)
_TRAIN = dict(steps=6, checkpoint_every=3, rows=4, row_length=32, optimizer=_OPTIMIZER)
_SETTINGS = dict(
    name="tiny",
    rounds=2,
    mesh=dict(data=1),
    task=dict(name="reverse_addition", seed_difficulty=2, seed_problems=100),
    model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
    warmup=_TRAIN,
    train=_TRAIN,
    generate=dict(prompts=16, samples=2, batch=8),
    evaluate=dict(problems=8, difficulties=(1, 2), batch=8),
    retention=dict(last=1, best=0),
)
_OWN = {
    "plain": {"filter.name": "none"},
    "voted": {"filter.name": "vote", "filter.agreement": "0.4"},
    "members": {
        "members": "2",
        "judge.voters": "members",
        "filter.name": "vote",
        "filter.agreement": "0.2",
    },
}


def config(run: str, **overrides: str) -> Config:
    """The config of one of the runs; `filter__name="none"` overrides `filter.name`."""
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(_SETTINGS, {"filter.on_empty": "skip"} | _OWN[run] | changed)


def promotion():
    """Ordinary type promotion, which optax relies on."""
    return jax.numpy_dtype_promotion("standard")


def start(workdir: pathlib.Path, run: str, name: str | None = None, **overrides: str) -> None:
    """Runs or resumes in this process, which keeps its own signal handlers."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        # What one run compiled serves the others.
        with promotion(), mock.patch.object(launch, "prepare", _prepare):
            assert launch.launch(config(run, **overrides), str(workdir), name or run) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@functools.cache
def _compiled() -> Machinery:
    return prepare(config("plain", rounds="3"))  # the longest that a test runs


def _prepare(settings: Config) -> Machinery:
    shared = _compiled()
    shared.weights._live.clear()  # a process of its own would have nothing on its devices
    return dataclasses.replace(shared, config=settings, chosen=get_filter(settings.filter.name))


def rounds(workdir: pathlib.Path, run: str) -> list[Round]:
    """The artifacts of a run, found in the store or computed, without a run directory."""
    found: list[Round] = []
    stages = Stages(Store(str(workdir)), Progress(quiet=True))
    with promotion():
        loop.run(_prepare(config(run)), stages, found.append)
    return found


@functools.cache
def finished(directory: pathlib.Path) -> pathlib.Path:
    """The workdir with all three runs; not to be changed."""
    for run in RUNS:
        start(directory, run)
    return directory


def copy(workdir: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(workdir, to / "workdir"))


def edit_manifest(path: pathlib.Path, **changes) -> None:
    """Rewrites a stage's manifest with other fields and the checksum that goes with them."""
    manifest = Manifest.parse(path.read_text())
    path.write_text(dataclasses.replace(manifest, **changes).text())
