"""Runs a stage, or finds that it has been run.

A stage is a function of its own sub-config, its inputs and a PRNG key. `Stages.run` names the
result by the hash of exactly those (and of the code), looks it up in the store, and only calls the
function when it is not there. Resuming a run, sharing prefixes between the arms of a sweep and
tracing a row to its origins are all this one look-up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from karploop import mesh as mesh_lib
from karploop.errors import RunFailed, UserError
from karploop.files import write_atomic
from karploop.fingerprint import fingerprint, remember
from karploop.manifest import Corrupt, Manifest, digest
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.store import Store


class Stopped(Exception):
    """The user asked for a stop (SIGTERM, Ctrl-C); everything up to a stage's chunk is kept."""


@dataclass(frozen=True)
class Artifact:
    """A handle on a committed stage; its files are read when asked for."""

    manifest: Manifest
    store: Store
    recompute: Callable[[], None] = field(repr=False)
    inputs: Mapping[str, Artifact] = field(default_factory=dict, repr=False, compare=False)

    @property
    def content(self) -> str:
        return self.manifest.content

    @property
    def reference(self) -> dict[str, str]:
        m = self.manifest
        return {"stage": m.stage, "key": m.key, "content": m.content}

    def path(self, name: str) -> pathlib.Path:
        """A local, verified file; computed again if it was collected, or damaged meanwhile.

        Raises:
          UserError: computed again it is another file (on other hardware or versions), so that
            what was made from the old one no longer follows from it.
          RunFailed: it was damaged meanwhile, and this is one of several processes.
        """
        m = self.manifest
        if self.store.gone(m, name):
            self.store.say(f"store: {m.stage} {m.key[:12]} was collected: computing it again")
            self._again()
        try:
            return self.store.fetch(m, name)
        except Corrupt as error:
            if jax.process_count() > 1:  # the others may not have seen it, and go on without us
                raise RunFailed(f"{error}: run the same command again to repair it") from error
            self.store.report(error)
            self._again()
            return self.store.fetch(m, name)

    def _again(self) -> None:
        m = self.manifest
        self.recompute()
        if self.store.manifest(m.stage, m.key).content != m.content:
            raise UserError(
                f"the stage {m.stage}/{m.key} came out different when computed again, probably on "
                "other hardware or versions (they are recorded under "
                f"'{self.store.root / 'provenance' / m.stage}'): run the same command again to "
                "compute all that follows from it anew"
            )

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A file's rows; with `columns`, no more of it is read than these."""
        with pq.ParquetFile(self.path(name)) as file:  # half the time of a dataset of one file
            return file.read(columns=columns)

    def metadata(self, name: str) -> pq.FileMetaData:
        """How many rows and which columns a table has, which is not read."""
        return pq.read_metadata(self.path(name))


@dataclass
class StageContext:
    """What a running stage sees of the world."""

    inputs: Mapping[str, Artifact]
    rng: Rng
    stage: str
    directory: pathlib.Path  # files left here are committed
    partial: epath.Path  # survives kills until the commit
    progress: Callable[..., Any]  # (total, unit) → context manager with advance()
    stop_requested: Callable[[], bool]
    say: Callable[[str], None]

    @functools.cached_property
    def key(self) -> jax.Array:
        return self.rng.key(self.stage)

    @property
    def numpy_rng(self) -> np.random.Generator:
        return self.rng.numpy(self.stage)

    def check_stop(self) -> None:
        """Raises Stopped, on every process alike, if any was asked to stop."""
        if mesh_lib.any_process(self.stop_requested()):
            raise Stopped

    def write_table(self, name: str, table: pa.Table) -> None:
        pq.write_table(table, self.directory / name, compression="zstd", **_encodings(table.schema))

    def chunk(self, part: range, compute: Callable[[], pa.Table]) -> pa.Table:
        """A part of a long stage: read if an earlier attempt kept it, else computed and kept."""
        (table,) = self.chunks([part], lambda _: mesh_lib.Begun((), compute))
        return table

    def chunks(
        self, parts: Iterable[range], begin: Callable[[range], mesh_lib.Begun[pa.Table]]
    ) -> Iterator[pa.Table]:
        """The parts of a long stage in turn, each as `chunk` gives it.

        While the devices are at a part, the host is at the one before it: as they are done with
        one, the next is begun, and only then is what they left read, packed and kept. There is
        never more than one on the devices.

        A part's file has a name that says which part it is, so that it is not taken for one of
        another size, and that ends in its SHA-256: one that is torn or damaged is computed again.

        Raises:
          Stopped: a stop was asked for; whatever was begun is kept first.
        """
        before: _Part | None = None
        for part in parts:
            prefix, found, kept = self._kept(part)
            if before and before.begun:
                before.begun.wait()
            if mesh_lib.agree(lambda: kept is not None):  # noqa: B023
                now = _Part(prefix, found, kept, None)
            elif mesh_lib.any_process(self.stop_requested()):
                if before:
                    yield self._whole(before)
                raise Stopped
            else:
                now = _Part(prefix, found, None, begin(part))
            if before:
                yield self._whole(before)
            before = now
        if before:
            yield self._whole(before)

    def _kept(self, part: range) -> tuple[str, list[epath.Path], bytes | None]:
        """How the names of a part's files begin, those that are there, and the bytes of a whole
        one."""
        prefix = f"chunk-{part.start:09d}-{part.stop:09d}-"
        found = sorted(self.partial.glob(f"{prefix}*")) if self.partial.exists() else []
        whole = (data for path in found if (data := _read_named(path, prefix)) is not None)
        return prefix, found, next(whole, None)

    def _whole(self, part: _Part) -> pa.Table:
        """A part's table, which is kept once it is whole."""
        data = part.kept
        if part.begun:
            data = _to_arrow(part.begun.read())
            if mesh_lib.is_main():
                for path in part.found:
                    self.say(f"store: damaged chunk found, computing it again: {path}")
                    path.unlink(missing_ok=True)
                write_atomic(self.partial / f"{part.prefix}{_sha256(data)}.arrow", data)
            mesh_lib.barrier(f"{self.stage} {part.prefix}")
        return pa.ipc.open_stream(data).read_all()  # the same by either way


class _Part(NamedTuple):
    """A part of a long stage: `kept` by an earlier attempt, or `begun`."""

    prefix: str
    found: list[epath.Path]
    kept: bytes | None
    begun: mesh_lib.Begun[pa.Table] | None


class Stages:
    """Executes stages against one store."""

    def __init__(
        self,
        store: Store,
        progress: Progress,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.store = store
        self.progress = progress
        self.stop_requested = stop_requested
        remember()

    def run(
        self,
        stage: str,
        function: Callable[[StageContext], None],
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        rng: Rng,
        modules: tuple[str, ...] = (),
        keyed: bool = True,
    ) -> Artifact:
        """The artifact of `function`, from the store when it is there.

        Args:
          stage: name of the stage, and folder in the store.
          function: writes its files into `context.directory`; may be a `functools.partial`.
          config: JSON-able settings that the result depends on, all of them.
          inputs: earlier artifacts; their *content* enters the key, so that a stage recomputed to
            the same bytes invalidates nothing.
          rng: identity of the randomness. It enters the key unless `keyed` is false, which is for
            stages without randomness (the same measurement under another seed is the same).
          modules: further modules whose code decides the result (a user's own task or filter).
        """
        version = fingerprint(_module(function), *modules)
        identity = {
            "stage": stage,
            "version": version,
            "config": dict(config),
            "inputs": {name: artifact.reference for name, artifact in inputs.items()},
            "rng": dataclasses.asdict(rng) if keyed else None,
        }
        contents = {name: artifact.content for name, artifact in inputs.items()}
        key = digest(identity | {"inputs": contents})[:32]
        identity["key"] = key

        def compute() -> None:
            self._compute(function, identity, inputs, rng)

        if mesh_lib.agree(lambda: self.store.find(stage, key) is not None):
            if mesh_lib.is_main():
                self.store.tidy(stage, key)
            self.progress.reused(rng.round, stage, key)
        else:
            self._check_stop()
            compute()
        return Artifact(self.store.manifest(stage, key), self.store, compute, inputs)

    def _check_stop(self) -> None:
        if mesh_lib.any_process(self.stop_requested()):
            raise Stopped

    @contextlib.contextmanager
    def _workplace(self, name: str) -> Iterator[pathlib.Path]:
        """A directory for a stage's files, under the stage's lock on the process that commits them.

        The other processes compute the same files; theirs are thrown away.
        """
        if not mesh_lib.is_main():
            with tempfile.TemporaryDirectory() as directory:
                yield pathlib.Path(directory)
            return

        def check_stop() -> None:  # not asking the others, who wait for this one's decision
            if jax.process_count() == 1 and self.stop_requested():
                raise Stopped

        lock = self.store.lock(name, wait=True, meanwhile=check_stop)
        with lock, self.store.scratch() as directory:
            yield directory

    def _compute(self, function, identity: dict[str, Any], inputs, rng: Rng) -> None:
        stage, key = identity["stage"], identity["key"]
        with self._workplace(f"{stage}-{key}") as workplace:
            # Another run may have committed it while this one waited for the lock.
            if mesh_lib.agree(lambda: self.store.complete(stage, key) is not None):
                self.progress.reused(rng.round, stage, key)
                return
            directory = workplace / "files"
            directory.mkdir()
            context = StageContext(
                inputs=inputs,
                rng=rng,
                stage=stage,
                directory=directory,
                partial=self.store.make_partial(stage, key),
                progress=lambda total, unit: self.progress.stage(rng.round, stage, total, unit),
                stop_requested=self.stop_requested,
                say=self.progress.say,
            )
            started = time.time()
            function(context)
            if mesh_lib.is_main():
                self.store.record(stage, key, provenance(time.time() - started))
                self.store.commit(directory, **identity)
                self.store.remove_partial(stage, key)
            mesh_lib.barrier(f"{stage} {key} committed")


def provenance(seconds: float) -> dict[str, Any]:
    """Versions, hardware and cost of what was just computed."""
    device = jax.devices()[0]
    return {
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "peak_host_bytes": peak_host_bytes(),
    }


def peak_host_bytes() -> int:
    """The most memory that this process has held at once so far (resident; 0 where unknown).

    On a CPU that is all there is; an accelerator's own memory is not in it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _module(function: Callable) -> str:
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    return function.__module__


def _encodings(schema: pa.Schema) -> dict[str, list[str]]:
    """Of a table's columns: real numbers hardly repeat, and their bytes one by one take less room
    and time than a dictionary of them."""
    leaves = [
        (f"{field.name}.list.element", field.type.value_type)
        if pa.types.is_list(field.type)
        else (field.name, field.type)
        for field in schema
    ]
    real = [name for name, kind in leaves if pa.types.is_floating(kind)]
    others = [name for name, _ in leaves if name not in real]
    return {"use_byte_stream_split": real, "use_dictionary": others}


def _to_arrow(table: pa.Table) -> bytes:
    """The table as a stream: a fifteenth of the time that Parquet takes, for a file of minutes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _read_named(path: epath.Path, prefix: str) -> bytes | None:
    """The bytes of a file whose name ends in their SHA-256; None if they are others."""
    try:
        data = path.read_bytes()
    except OSError:  # removed meanwhile, or unreadable
        return None
    return data if path.name == f"{prefix}{_sha256(data)}.arrow" else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
