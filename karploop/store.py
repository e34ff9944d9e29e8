"""Content-addressed storage of finished stages, on a local disk or an object store.

    WORKDIR/store/<stage>/<key>/       what a stage wrote, and manifest.json
    WORKDIR/provenance/<stage>/<key>.json   seconds, versions, hardware: never part of a hash
    WORKDIR/partial/<stage>/<key>/     chunks and checkpoints of a stage under way
    WORKDIR/tmp/, WORKDIR/locks/       unfinished writes, and who works on what (workspace.py)

An entry is complete exactly when its manifest can be read. On a file system the directory is
written under `tmp/`, flushed to disk and renamed, so that it appears whole or not at all. Object
stores have no such rename: there the files are uploaded first and the manifest last.

Everything under `store/` is a function of the stage's inputs alone, byte for byte; what varies
from one execution to the next (times, hosts) is kept beside it under `provenance/`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from karploop.errors import UserError
from karploop.files import (
    copy,
    file_sha256,
    fsync_directory,
    fsync_tree,
    is_local,
    probe,
    read_whole,
    remove,
    remove_torn,
    write_atomic,
    writing,
)
from karploop.manifest import MANIFEST, Corrupt, Manifest
from karploop.manifest import digest as digest  # its users know it from here
from karploop.workspace import Workspace

COLLECTED = "collected.json"  # marks an entry whose files `experiments.gc` removed

_REMOTE = ("gs", "s3", "az", "hf")  # what etils.epath speaks


class Store:
    """Committed stages of one workdir. Methods may be called by several processes at once."""

    def __init__(self, workdir: str, say: Callable[[str], None] = print):
        """Touches nothing yet. Raises UserError for a kind of address that is not known."""
        scheme = workdir.split("://")[0]
        if not is_local(workdir) and scheme not in _REMOTE:
            known = ", ".join(f"{name}://…" for name in _REMOTE)
            raise UserError(f"--workdir={workdir}: no store of that kind; a path, or {known}")
        self.root = epath.Path(workdir)
        self.local = is_local(workdir)
        self.say = say
        self.workspace = Workspace(self.root, say)
        self._verified: set[tuple] = set()
        self._reported: set[str] = set()

    def open(self) -> None:
        """Makes the workdir ready, and sweeps up what killed processes left in `tmp/`.

        Raises:
          UserError: the workdir cannot be written.
        """
        here = self.workspace.directory
        needed = [here / "tmp", here / "locks"]
        if self.local:
            needed += [here / name for name in ("partial", "store", "provenance", "runs")]
            needed += [path for path in (here / "store").glob("*") if path.is_dir()]
        for directory in needed:
            with writing(self.root, directory):
                directory.mkdir(parents=True, exist_ok=True)
                probe(directory)
        if not self.local:
            self._probe_remote()
        self.workspace.sweep()

    # -- reading ---------------------------------------------------------------------------

    def entry(self, stage: str, key: str) -> epath.Path:
        return self.root / "store" / stage / key

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a committed stage; its files are not looked at. None: there is none.

        Raises:
          Corrupt: it is damaged, or stands in the wrong folder.
        """
        path = self.entry(stage, key) / MANIFEST
        try:
            manifest = Manifest.parse(read_whole(path).decode())
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise Corrupt(f"{path}: a file stands in place of one of its folders") from None
        except (ValueError, IsADirectoryError) as error:
            raise Corrupt(f"{path}: damaged ({error})") from error
        if (manifest.stage, manifest.key) != (stage, key):
            raise Corrupt(f"{path}: belongs to {manifest.stage}/{manifest.key}")
        return manifest

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a committed stage whose files are all whole; None where there is none.

        A damaged entry is reported and counts as absent: the stage runs again, and `commit` puts
        its result in the entry's place. Files that were collected on purpose are not missed.
        """
        try:
            manifest = self.manifest(stage, key)
            if manifest is None:
                if self.local and os.path.lexists(self.entry(stage, key)):
                    raise Corrupt(f"{self.entry(stage, key) / MANIFEST}: missing")
                return None
            for name in manifest.files:
                if not self.gone(manifest, name):
                    self.verify(manifest, name)
            return manifest
        except Corrupt as error:
            self.report(error)
            return None

    def complete(self, stage: str, key: str) -> Manifest | None:
        """The same, but None also where a file has been collected."""
        manifest = self.find(stage, key)
        if manifest is None or any(self.gone(manifest, name) for name in manifest.files):
            return None
        return manifest

    def report(self, error: Corrupt) -> None:
        """Names a damaged file, once."""
        if str(error) not in self._reported:
            self._reported.add(str(error))
            self.say(f"store: damaged stage found, computing it again: {error}")

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
          UserError: it may not be read.
        """
        path = self.entry(manifest.stage, manifest.key) / name
        with _reading(path):
            identity = _identity(path)
            if identity not in self._verified:
                _compare(path, file_sha256(path), manifest.files[name])
                self._verified.add(identity)
        return path

    def fetch(self, manifest: Manifest, name: str) -> pathlib.Path:
        """A local path to a committed, verified file; from an object store, a copy made once.

        Raises:
          Corrupt: the file is missing or differs.
          UserError: it may not be read.
        """
        if self.local:
            return pathlib.Path(self.verify(manifest, name))
        path = self.entry(manifest.stage, manifest.key) / name
        copied = self._downloads / manifest.files[name]["sha256"] / name
        if not copied.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            torn = copied.with_name(f"{copied.name}.torn")
            with _reading(path):
                _compare(path, copy(path, torn), manifest.files[name])
            torn.rename(copied)
        return copied

    @functools.cached_property
    def _downloads(self) -> pathlib.Path:
        """Where copies of remote files are until the process ends."""
        return self.workspace.scratch_until_exit()

    # -- writing ---------------------------------------------------------------------------

    def commit(self, directory: pathlib.Path, **identity: Any) -> Manifest:
        """Makes the files under `directory` the stage `identity` (a Manifest's fields but files).

        A whole twin is left in place, a damaged one replaced. For the holder of the stage's lock.

        Raises:
          UserError: the store may not be written.
        """
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            files[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        manifest = Manifest(**identity, files=files)
        twin = self.complete(manifest.stage, manifest.key)
        if twin is not None and twin.files == files:
            return twin
        (directory / MANIFEST).write_text(manifest.text())
        with writing(self.root, self.entry(manifest.stage, manifest.key)):
            put = self._put_local if self.local else self._put_remote
            put(directory, manifest)
        return manifest

    def _put_local(self, directory: pathlib.Path, manifest: Manifest) -> None:
        stage, key = manifest.stage, manifest.key
        target = self.entry(stage, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_tree(directory)
        if os.path.lexists(target):
            twin = self.find(stage, key)
            if twin is not None and twin.files == manifest.files:
                _put_back(directory, target, manifest.files)  # what was collected of it
                return
            self.discard(stage, key)
        os.rename(directory, target)
        fsync_directory(target.parent)

    def _put_remote(self, directory: pathlib.Path, manifest: Manifest) -> None:
        target = self.entry(manifest.stage, manifest.key)
        (target / MANIFEST).unlink(missing_ok=True)
        for name in manifest.files:
            copy(directory / name, target / name)
        write_atomic(target / MANIFEST, manifest.text().encode())
        (target / COLLECTED).unlink(missing_ok=True)

    def discard(self, stage: str, key: str) -> None:
        """Removes an entry; a kill half-way leaves nothing that reads as committed."""
        entry = self.entry(stage, key)
        if self.local:
            with self.scratch() as aside, contextlib.suppress(FileNotFoundError):
                os.rename(entry, aside / key)
        else:
            (entry / MANIFEST).unlink(missing_ok=True)
            remove(entry)

    def record(self, stage: str, key: str, provenance: dict[str, Any]) -> None:
        """Keeps what is worth knowing of an execution but must not enter a hash."""
        path = self.root / "provenance" / stage / f"{key}.json"
        with writing(self.root, path):
            remove_torn(path.parent, path.name)
            write_atomic(path, (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())

    # -- stages under way ------------------------------------------------------------------

    def partial(self, stage: str, key: str) -> epath.Path:
        """Where a stage under way keeps what it can go on from after a kill."""
        return self.root / "partial" / stage / key

    def make_partial(self, stage: str, key: str) -> epath.Path:
        """The same, made: another process may be removing its parent, then empty, meanwhile."""
        path = self.partial(stage, key)
        while self.local and not path.exists():
            with writing(self.root, path), contextlib.suppress(FileNotFoundError):
                path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_partial(self, stage: str, key: str) -> None:
        """For the holder of the stage's lock."""
        path = self.partial(stage, key)
        remove(path)
        if self.local:
            with contextlib.suppress(OSError):  # others of its kind may be under way
                os.rmdir(path.parent)

    def tidy(self, stage: str, key: str) -> None:
        """Removes what a kill between a stage's commit and the end of its cleaning-up left."""
        if self.partial(stage, key).exists():
            with self.workspace.try_lock(f"{stage}-{key}") as free:
                if free:
                    self.remove_partial(stage, key)
        elif self.local:  # the kill came before its parent, then empty, was removed too
            with contextlib.suppress(OSError):
                os.rmdir(self.partial(stage, key).parent)

    # -- locks and scratch directories: see `workspace.py` ---------------------------------

    def lock(self, name: str, *, wait: bool, meanwhile: Callable[[], None] = lambda: None):
        return self.workspace.lock(name, wait=wait, meanwhile=meanwhile)

    def gate(self, *, exclusive: bool, create: bool = True):
        return self.workspace.gate(exclusive=exclusive, create=create)

    def held(self, name: str) -> bool:
        return self.workspace.held(name)

    def scratch(self):
        return self.workspace.scratch()

    def abandoned(self) -> list[pathlib.Path]:
        return self.workspace.abandoned()

    def _probe_remote(self) -> None:
        """Raises UserError unless an object can be put under the root."""
        try:
            write_atomic(self.root / "partial" / ".writable", b"writable")
            (self.root / "partial" / ".writable").unlink()
        except Exception as error:  # each store's library has its own kinds
            raise UserError(
                f"cannot write to the workdir '{self.root}': {error}. Check that the bucket exists "
                "and that the environment has its endpoint and credentials (s3:// needs `pip "
                "install s3fs`, gs:// needs gcsfs)"
            ) from error


def _identity(path: epath.Path) -> tuple:
    """What changes when a file does; for an object, little more than its name."""
    if is_local(path):
        stat = os.stat(path)
        return os.fspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino
    return os.fspath(path), path.stat().length


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns what the operating system says of a committed file into Corrupt or UserError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{path}: missing") from None
    except PermissionError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:  # of the copy that is being made
            raise
        raise Corrupt(f"{path}: cannot be read ({error})") from error


def _compare(path: epath.Path, sha256: str, expected: dict[str, Any]) -> None:
    if sha256 != expected["sha256"]:
        raise Corrupt(f"{path}: its SHA-256 is not the manifest's")


def _put_back(directory: pathlib.Path, target: epath.Path, names: Iterable[str]) -> None:
    """Moves into a collected entry the files it lacks; the marker goes last."""
    for name in names:
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(directory / name, target / name)
            fsync_directory((target / name).parent)
    (target / COLLECTED).unlink(missing_ok=True)
    fsync_directory(target)


def abandoned(directory: pathlib.Path) -> list[pathlib.Path]:
    """The scratch directories in the `tmp/` of a local workdir whose processes no longer live."""
    return Workspace(epath.Path(directory).parent, print).abandoned()
