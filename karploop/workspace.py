"""A machine's side of a workdir: directories for unfinished writes, and who works on what.

    WORKDIR/tmp/      scratch directories, each locked by the process that uses it
    WORKDIR/locks/    lock files of stages, runs and scratch directories (`locks.py`)

The two stand in the workdir itself, or, where that is on an object store, in a directory of the
machine's own. Leases on runs, which all machines must see, then stand in the workdir's `locks/`.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import os
import pathlib
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from karploop import locks
from karploop.errors import UserError
from karploop.files import is_local, remove, writing

_GRACE_SECONDS = 2.0  # a killed process of many gigabytes takes a moment to let go of its locks
_DAY_SECONDS = 86400.0


class Workspace:
    """Scratch directories and locks of one workdir."""

    def __init__(self, root: epath.Path, say: Callable[[str], None]):
        self.root, self.say = root, say
        self.local = is_local(root)
        if self.local:
            self.directory = pathlib.Path(root)
        else:
            name = hashlib.sha256(os.fspath(root).encode()).hexdigest()[:16]
            self.directory = pathlib.Path(tempfile.gettempdir()) / f"karploop-{os.getuid()}" / name

    def sweep(self) -> None:
        """Removes what killed processes left."""
        for path in self.abandoned():
            with contextlib.suppress(locks.Busy), self._lock_of(path.name):
                remove(path)
        locks.sweep(self.directory / "locks")

    # -- scratch directories ---------------------------------------------------------------

    @contextlib.contextmanager
    def scratch(self) -> Iterator[pathlib.Path]:
        """An empty local directory of this process alone; gone afterwards.

        Raises:
          UserError: it cannot be made.
        """
        name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        directory = self.directory / "tmp" / name
        with self._lock_of(name):  # held as long as the directory is in use
            with writing(self.root, directory):
                directory.mkdir(parents=True)
            try:
                yield directory
            finally:
                remove(directory)

    def scratch_until_exit(self) -> pathlib.Path:
        """The same, for as long as the process lives."""
        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        return stack.enter_context(self.scratch())

    def abandoned(self) -> list[pathlib.Path]:
        """The scratch directories whose processes no longer live.

        Where disks are shared without sharing locks, another machine's cannot be told from them;
        so they count only after a day.
        """
        found = []
        for path in sorted((self.directory / "tmp").glob("*")):
            own = path.name.rsplit(".", 2)[0] == socket.gethostname()
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, by its own process
                old = time.time() - path.stat().st_mtime > _DAY_SECONDS
                if (own or old) and not self.held(f"scratch-{path.name}"):
                    found.append(path)
        return found

    def _lock_of(self, scratch: str):
        return self._exclusive(f"scratch-{scratch}", patience=0.0)

    # -- locks -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(
        self, name: str, *, wait: bool, meanwhile: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Exclusive use of `name`; ends with the process at the latest.

        On an object store, a lock that waits covers the processes of this machine only (machines
        that compute one stage at once write the same bytes); one that does not wait covers all.

        Args:
          meanwhile: called again and again while waiting; what it raises ends the wait.

        Raises:
          UserError: somebody else holds it and `wait` is false.
        """
        announce = self._announcing(f"store: waiting for {name}, held by {{}}")

        def waiting(holder: str) -> None:
            if wait:
                announce(holder)
            meanwhile()

        patience = math.inf if wait else _GRACE_SECONDS
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._exclusive(name, patience=patience, meanwhile=waiting))
                if not self.local and not wait:
                    here = locks.scope(self.directory)
                    stack.enter_context(locks.lease(self._lease(name), here, self.say))
            except locks.Busy as busy:
                raise UserError(
                    f"{name} in '{self.root}' is in use by {busy}: wait until it ends, or give "
                    "this one another --run_name or --workdir"
                ) from None
            yield

    @contextlib.contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Holds the lock `name` if that is free on this machine; yields whether it was."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._exclusive(name, patience=0.0))
            except locks.Busy:
                yield False
                return
            yield True

    def held(self, name: str) -> bool:
        """Whether somebody holds the lock `name`; leaves no trace."""
        if locks.held(self.directory / "locks" / name):
            return True
        return not self.local and locks.lease_held(self._lease(name))

    @contextlib.contextmanager
    def gate(self, *, exclusive: bool, create: bool = True) -> Iterator[None]:
        """Held alone by garbage collection while it works, and shared by a run while it starts.

        So no run starts under a collection, and one that has passed the gate has its lock and its
        config in place: a collection sees it and spares what it may need (`retention.py`). A
        program that writes to the store outside a run holds the gate, shared, while it works.

        Args:
          create: makes the lock's file where there is none yet; without one there is no lock.
        """
        path = self.directory / "locks" / locks.GATE
        if not self.local or not (create or path.exists()):
            yield
            return
        whom = "writers" if exclusive else "gc to end"
        waiting = self._announcing(f"store: waiting for {whom}")
        with writing(self.root, path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locks.gate(path, exclusive=exclusive, meanwhile=waiting):
            yield

    def _exclusive(self, name: str, **options):
        path = self.directory / "locks" / name
        with writing(self.root, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()  # said by whom it is needed, if it cannot be made
        return locks.exclusive(path, **options)

    def _lease(self, name: str) -> epath.Path:
        return self.root / "locks" / f"{name}.json"

    def _announcing(self, text: str) -> Callable[[str], None]:
        """A function that says `text`, the holder filled in, the first time it is called."""
        said = []

        def announce(holder: str) -> None:
            if not said:
                said.append(holder)
                self.say(text.format(holder))

        return announce
