"""Files that survive: atomic writes, hashes, flushes to disk, on local paths and object stores."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath

from karploop.errors import UserError

# Object stores are written by other machines too: what was listed a minute ago may be wrong now.
for _protocol in ("s3", "gcs", "gs", "az", "hf"):
    fsspec.config.conf.setdefault(_protocol, {})["use_listings_cache"] = False

_BLOCK = 1 << 24  # bytes
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


def cache_folder() -> pathlib.Path:
    """Where what can be made or fetched again outlives a run: XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "karploop"


def file_sha256(path: epath.PathLike) -> str:
    with epath.Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def copy(source: epath.PathLike, target: epath.PathLike) -> str:
    """Copies a file to or from an object store, block by block; returns its SHA-256."""
    sha256 = hashlib.sha256()
    with epath.Path(source).open("rb") as reader, epath.Path(target).open("wb") as writer:
        while block := reader.read(_BLOCK):
            sha256.update(block)
            writer.write(block)
    return sha256.hexdigest()


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part.

    Missing parent directories are made. A kill may leave a temporary file beside the target, for
    `remove_torn` to find.
    """
    path = epath.Path(path)
    if not is_local(path):
        path.write_bytes(data)  # a single object is put whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk: give back what was taken of it
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def read_whole(path: epath.PathLike) -> bytes:
    """What `write_atomic` wrote: of an object, which others may replace, in a single request.

    Opened as a file, one is asked for twice, first its size and then its content, and a change in
    between is an error.
    """
    if is_local(path):
        return pathlib.Path(path).read_bytes()
    filesystem, name = fsspec.core.url_to_fs(os.fspath(path))
    return filesystem.cat_file(name)


def remove_torn(directory: epath.PathLike, name: str = "*") -> None:
    """Deletes the temporary files that killed `write_atomic`s left for the file `name`.

    For whoever is the only one to write these files.
    """
    if is_local(directory):
        for path in pathlib.Path(directory).glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def remove(path: epath.PathLike) -> None:
    """Deletes a file or a whole directory, if it is there."""
    if not is_local(path):
        epath.Path(path).rmtree(missing_ok=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        pathlib.Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(root: epath.PathLike, path: epath.PathLike) -> Iterator[None]:
    """Turns the operating system's refusal to write at `path`, in the workdir `root`, into one
    that a person can act on.

    Raises:
      UserError: no permission, a read-only disk, or a file where there should be a folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise  # a full disk, a failing one, the network
        raise UserError(
            f"cannot write to the workdir '{root}': '{error.filename or path}': {error.strerror}. "
            "Give --workdir a directory that exists or can be made, that this user may write to, "
            "on a disk that is not read-only"
        ) from error


def probe(directory: epath.PathLike) -> None:
    """Raises OSError unless a file can be made in `directory`, where it never has a name."""
    with tempfile.TemporaryFile(dir=directory):
        pass


@contextlib.contextmanager
def whole_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that becomes `target` when the block ends well, and vanishes when it does not.

    Raises:
      UserError: nothing can be written beside `target`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error}") from error
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's is closed to others
        os.replace(scratch, target)  # an empty folder gives way
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fsync_directory(path: epath.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: pathlib.Path) -> None:
    """Flushes every file under `directory`, and the directories that name them, to disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        else:
            fsync_directory(path)
    fsync_directory(directory)
