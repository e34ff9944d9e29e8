"""Who may work on what: locks between processes of one file system, leases on object stores.

A lock is a file held with `flock`: the kernel drops it when its holder dies, however it dies. Its
file is removed on release; one that a killed process left behind means nothing.

Object stores have no such thing. A lease is an object that says who holds it and when that holder
last gave a sign of life; one without a sign for `LAPSE_SECONDS` may be taken over. It relies on
the machines' clocks agreeing to within half of that. Two machines that take a lapsed lease in the
same instant are told apart by who wrote last; a holder that was suspended for so long that it lost
its lease finds out at its next beat, and stops as if asked to by SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from etils import epath

from karploop.errors import UserError
from karploop.files import read_whole, write_atomic

GATE = "gate"  # the one lock whose file stays

BEAT_SECONDS = 10.0
LAPSE_SECONDS = 60.0
_SETTLE_SECONDS = 1.0  # between writing a lease and believing that nobody else did
_POLL_SECONDS = 0.1


class Busy(Exception):
    """Somebody else holds the lock or lease; the message says who."""


def _patient(holder: str) -> None:
    """Waits without a word."""


@contextlib.contextmanager
def exclusive(
    path: pathlib.Path,
    *,
    patience: float = math.inf,
    meanwhile: Callable[[str], None] = _patient,
) -> Iterator[None]:
    """Holds the lock whose file is `path`.

    Args:
      patience: seconds to wait for it.
      meanwhile: called again and again with a description of the holder while waiting; what it
        raises ends the wait.

    Raises:
      Busy: somebody else held it all the while.
      UserError: the file system has no locks.
    """
    with _wait(lambda: _open_locked(path, fcntl.LOCK_EX), path, patience, meanwhile) as f:
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        f.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def gate(
    path: pathlib.Path, *, exclusive: bool, meanwhile: Callable[[str], None] = _patient
) -> Iterator[None]:
    """Holds the lock at `path` alone or, not `exclusive`, together with others; its file stays."""
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _wait(lambda: _open_locked(path, kind), path, math.inf, meanwhile):
        yield


def held(path: pathlib.Path) -> bool:
    """Whether some process holds the lock at `path`; leaves no trace."""
    try:
        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def sweep(directory: pathlib.Path) -> None:
    """Removes the lock files of processes that are no more."""
    for path in directory.glob("*"):
        if path.name != GATE:
            with contextlib.suppress(Busy, OSError), exclusive(path, patience=0.0):
                pass


def _wait(attempt: Callable[[], IO | None], path, patience: float, meanwhile) -> IO:
    deadline = time.monotonic() + patience
    while (found := attempt()) is None:
        holder = _holder(path)
        if time.monotonic() >= deadline:
            raise Busy(holder)
        meanwhile(holder)
        time.sleep(_POLL_SECONDS)
    return found


def _open_locked(path: pathlib.Path, kind: int) -> IO | None:
    """The file, open and locked; None if it is held in a way that excludes that."""
    while True:
        f = open(path, "a+")
        try:
            fcntl.flock(f, kind | fcntl.LOCK_NB)
            if os.fstat(f.fileno()).st_ino == path.stat().st_ino:
                return f
        except BlockingIOError:
            f.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            f.close()
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
                raise UserError(
                    f"the file system of '{path.parent}' has no file locks ({error.strerror}), "
                    "without which two processes could spoil each other's work: mount it with "
                    "locks (Lustre: -o flock), or give --workdir another one"
                ) from error
            raise
        f.close()  # its holder removed the file between our opening and our locking it


def _holder(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def lease(path: epath.Path, scope: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lease at `path`, giving signs of life from a thread, and removes it at the end.

    Args:
      scope: names what a local lock of the same meaning covers, which the caller holds: a lease
        taken under that lock by an earlier process is taken over at once, its holder being dead.

    Raises:
      Busy: another holder has given a sign of life lately.
    """
    me = {
        "owner": uuid.uuid4().hex,
        "holder": f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}",
        "scope": scope,
    }

    def beat() -> None:
        write_atomic(path, json.dumps(me | {"beat": time.time()}).encode())

    def mine() -> bool:
        found = _read_lease(path)
        return found is not None and found["owner"] == me["owner"]

    def keep_alive(ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                if not mine():
                    say(f"store: '{path}' was taken over by another process: stopping this one")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                beat()
            except Exception as error:  # whatever the network says: the next beat tries again
                say(f"store: cannot renew '{path}': {error}")

    found = _read_lease(path)
    if found is not None and found["scope"] != scope:
        left = found["beat"] + LAPSE_SECONDS - time.time()
        if left > 0:
            raise Busy(f"{found['holder']} (if that is dead, its claim ends in {left:.0f} s)")
    beat()
    time.sleep(_SETTLE_SECONDS)
    if not mine():
        raise Busy("another process that started at the same time")
    ended = threading.Event()
    thread = threading.Thread(target=keep_alive, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if mine():
            path.unlink(missing_ok=True)


def lease_held(path: epath.Path) -> bool:
    """Whether the holder of the lease at `path` has given a sign of life lately."""
    found = _read_lease(path)
    return found is not None and found["beat"] + LAPSE_SECONDS > time.time()


def _read_lease(path: epath.Path) -> dict | None:
    try:
        found = json.loads(read_whole(path))
        return found if {"owner", "holder", "scope", "beat"} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def scope(directory: pathlib.Path) -> str:
    """A name for the processes that see the same locks: of one running machine, in one folder."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    stat = directory.stat()
    return f"{socket.gethostname()} {boot} {stat.st_dev}:{stat.st_ino}"
