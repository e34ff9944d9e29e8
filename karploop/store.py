"""Content-addressed storage of finished stages, on a local disk or an object store.

    WORKDIR/store/<stage>/<key>/       what a stage wrote, and manifest.json
    WORKDIR/provenance/<stage>/<key>.json   seconds, versions, hardware: never part of a hash
    WORKDIR/partial/<stage>/<key>/     chunks and checkpoints of a stage under way
    WORKDIR/tmp/, WORKDIR/locks/       this machine's unfinished writes and its locks

An entry is complete exactly when its manifest can be read. On a file system the directory is
written under `tmp/`, flushed to disk and renamed, so that it appears whole or not at all. Object
stores have no such rename: there the files are uploaded first and the manifest last.

Everything under `store/` is a function of the stage's inputs alone, byte for byte; what varies
from one execution to the next (times, hosts) is kept beside it under `provenance/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from etils import epath

from karploop.errors import UserError

MANIFEST = "manifest.json"
COLLECTED = "collected.json"  # marks an entry whose files `experiments.gc` removed


@dataclass(frozen=True)
class Manifest:
    """What a committed stage was, and the SHA-256 of every file it wrote."""

    stage: str
    key: str
    version: str  # fingerprint of the code that ran
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # name → {stage, key, content}
    rng: dict[str, int] | None  # seed, member, round
    files: dict[str, dict[str, Any]]  # name → {sha256, bytes}

    @property
    def content(self) -> str:
        """Hash of what the stage wrote: what the keys of later stages are made from."""
        return digest({name: file["sha256"] for name, file in self.files.items()})


class Corrupt(Exception):
    """A committed file is missing or is not what its manifest says."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: epath.PathLike) -> str:
    with epath.Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)  # a single object is put whole
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


class Store:
    """Committed stages of one workdir. Methods may be called by several processes at once."""

    def __init__(self, workdir: str, say: Callable[[str], None] = print):
        self.root = epath.Path(workdir)
        self.local = is_local(workdir)
        self.say = say
        self._verified: set[tuple[str, int, int]] = set()
        self._scratch = pathlib.Path(self.root if self.local else tempfile.gettempdir())

    def open(self) -> None:
        """Makes the workdir ready, and sweeps up what killed processes left in `tmp/`.

        Raises:
          UserError: the workdir cannot be written.
        """
        try:
            for name in ("store", "provenance", "partial"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / "partial" / ".writable", b"")
        except OSError as error:
            raise UserError(
                f"cannot write to the workdir '{self.root}': {error.strerror or error}. Give "
                "--workdir a directory that exists or can be made, on a disk that is not read-only"
            ) from error
        if self.local:
            for path in abandoned(self._scratch / "tmp"):
                shutil.rmtree(path, ignore_errors=True)

    # -- reading ---------------------------------------------------------------------------

    def entry(self, stage: str, key: str) -> epath.Path:
        return self.root / "store" / stage / key

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a committed stage, unverified; None where there is none."""
        path = self.entry(stage, key) / MANIFEST
        try:
            return Manifest(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise UserError(f"'{path.parent}' is a file, not a stage's folder") from error
        except (ValueError, TypeError) as error:
            raise Corrupt(f"{path}: not a manifest ({error})") from error

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a committed stage whose files are all whole; None where there is none.

        A damaged entry is named, set aside under `tmp/` and reported as absent, so that the stage
        runs again. Files that were collected on purpose are not missed.
        """
        try:
            manifest = self.manifest(stage, key)
            if manifest is None:
                if self.local and self.entry(stage, key).exists():
                    raise Corrupt(f"{self.entry(stage, key) / MANIFEST}: missing")
                return None
            for name in manifest.files:
                if not self.gone(manifest, name):
                    self.verify(manifest, name)
            return manifest
        except Corrupt as error:
            self.say(f"store: damaged stage found, computing it again: {error}")
            self.discard(stage, key)
            return None

    def collected(self, stage: str, key: str) -> bool:
        return (self.entry(stage, key) / COLLECTED).exists()

    def gone(self, manifest: Manifest, name: str) -> bool:
        """Whether garbage collection has removed this file of a committed stage."""
        entry = self.entry(manifest.stage, manifest.key)
        return not (entry / name).exists() and (entry / COLLECTED).exists()

    def verify(self, manifest: Manifest, name: str) -> epath.Path:
        """The path of a committed file, after comparing it with its SHA-256 (once a process).

        Raises:
          Corrupt: the file is missing or differs.
        """
        path = self.entry(manifest.stage, manifest.key) / name
        expected = manifest.files[name]
        try:
            stat = path.stat()
            seen = (os.fspath(path), stat.length, stat.mtime)
            if seen in self._verified:
                return path
            if stat.length != expected["bytes"]:
                raise Corrupt(f"{path}: {stat.length} bytes instead of {expected['bytes']}")
            if file_sha256(path) != expected["sha256"]:
                raise Corrupt(f"{path}: its SHA-256 is not the manifest's")
        except (FileNotFoundError, NotADirectoryError):
            raise Corrupt(f"{path}: missing") from None
        self._verified.add(seen)
        return path

    def fetch(self, manifest: Manifest, name: str) -> pathlib.Path:
        """A local path to a committed, verified file (downloaded once if the store is remote)."""
        path = self.verify(manifest, name)
        if self.local:
            return pathlib.Path(path)
        cached = self._scratch / "karploop-cache" / manifest.files[name]["sha256"] / name
        if not cached.exists():
            write_atomic(epath.Path(cached), path.read_bytes())
        return cached

    # -- writing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def scratch(self) -> Iterator[pathlib.Path]:
        """A local directory for files on their way to `commit`; gone afterwards."""
        owner = f"{socket.gethostname()}.{os.getpid()}."
        parent = self._scratch / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        directory = pathlib.Path(tempfile.mkdtemp(prefix=owner, dir=parent))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def commit(self, directory: pathlib.Path, **identity: Any) -> Manifest:
        """Makes the files under `directory` the stage `identity` (a Manifest's fields but files).

        A twin committed meanwhile by another process is left in place.
        """
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            files[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        manifest = Manifest(**identity, files=files)
        text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True)
        (directory / MANIFEST).write_text(text + "\n")
        target = self.entry(manifest.stage, manifest.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.local:
            _fsync_tree(directory)
            if target.exists() and self.collected(manifest.stage, manifest.key):
                if self.manifest(manifest.stage, manifest.key).files == files:
                    _put_back(directory, target, files)
                    return manifest
                shutil.rmtree(target)
            try:
                os.rename(directory, target)
            except OSError:
                if not target.exists():
                    raise
            _fsync_directory(target.parent)
        else:
            for name in files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes((directory / name).read_bytes())
            (target / MANIFEST).write_bytes((directory / MANIFEST).read_bytes())
            (target / COLLECTED).unlink(missing_ok=True)
        return manifest

    def record(self, stage: str, key: str, provenance: dict[str, Any]) -> None:
        """Keeps what is worth knowing of an execution but must not enter a hash."""
        path = self.root / "provenance" / stage / f"{key}.json"
        write_atomic(path, (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())

    def partial(self, stage: str, key: str) -> epath.Path:
        """Where a stage under way keeps what it can go on from after a kill."""
        return self.root / "partial" / stage / key

    def discard(self, stage: str, key: str) -> None:
        """Removes an entry; a kill half-way leaves nothing that reads as committed."""
        entry = self.entry(stage, key)
        if not self.local:
            (entry / MANIFEST).unlink(missing_ok=True)
            entry.rmtree(missing_ok=True)
            return
        with self.scratch() as aside:
            os.rename(entry, aside / key)

    def remove_partial(self, stage: str, key: str) -> None:
        self.partial(stage, key).rmtree(missing_ok=True)

    # -- locks -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def gate(self, *, exclusive: bool, create: bool = True) -> Iterator[None]:
        """Held alone by garbage collection while it works, and shared by a run while it starts.

        So no run starts under a collection, and one that has passed the gate has its lock and its
        config in place: a collection sees it and spares what it may need (`retention.py`). A
        program that writes to the store outside a run holds the gate, shared, while it works.

        Args:
          create: makes the lock's file where there is none yet; without one there is no lock.
        """
        path = self._scratch / "locks" / "gate"
        if not self.local or not (create or path.exists()):
            yield
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        with open(path, "a") as f:
            try:
                fcntl.flock(f, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say("store: waiting for " + ("writers" if exclusive else "gc to end"))
                fcntl.flock(f, kind)
            yield

    def held(self, name: str) -> bool:
        """Whether a process of this machine holds the lock `name`; leaves no trace."""
        try:
            with open(self._scratch / "locks" / name, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[None]:
        """Exclusive use of `name` among the processes of one machine; ends with the process.

        The kernel drops the lock when its holder dies, however it dies. On an object store
        there is nothing to lock: two processes that compute one stage write the same bytes.

        Raises:
          UserError: the lock is held and `wait` is false.
        """
        if not self.local:
            yield
            return
        path = self._scratch / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.seek(0)
                holder = f.read().strip() or "another process"
                if not wait:
                    raise UserError(
                        f"{name} in '{self.root}' is in use by {holder}: wait until it ends, or "
                        "give this one another --run_name or --workdir"
                    ) from None
                self.say(f"store: waiting for {name}, held by {holder}")
                fcntl.flock(f, fcntl.LOCK_EX)
            f.truncate(0)
            f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
            f.flush()
            yield


def _fsync_directory(path: epath.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: pathlib.Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        else:
            _fsync_directory(path)
    _fsync_directory(directory)


def abandoned(directory: pathlib.Path) -> list[pathlib.Path]:
    """The temporary directories of processes of this host that no longer live."""
    found = []
    for path in sorted(directory.glob(f"{socket.gethostname()}.*")):
        pid = path.name[len(socket.gethostname()) + 1 :].split(".")[0]
        if not pid.isdecimal():
            continue  # of another host, whose name begins like this one's
        try:
            os.kill(int(pid), 0)  # signal 0 asks whether the process is there
        except ProcessLookupError:
            found.append(path)
        except PermissionError:
            pass  # it is, and belongs to somebody else
    return found


def _put_back(directory: pathlib.Path, target: epath.Path, names: Iterable[str]) -> None:
    """Moves into a collected entry the files it lacks; the marker goes last."""
    for name in names:
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(directory / name, target / name)
            _fsync_directory((target / name).parent)
    (target / COLLECTED).unlink()
    _fsync_directory(target)
