"""Replies that came, and what was spent on them, in one SQLite file that outlives the process."""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import sqlite3
from dataclasses import asdict

from karploop.endpoints.calls import Reply
from karploop.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (call TEXT PRIMARY KEY, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spending (job TEXT NOT NULL, dollars REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_job ON spending (job);
"""


class Ledger:
    """A cache of replies by the hash of their whole request, and the spending of one job.

    A reply and its cost are written together or not at all; several processes may share a file.
    """

    def __init__(self, path: pathlib.Path, job: str):
        """Raises UserError: the file cannot be used."""
        self._job = job
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Used by one thread at a time: the caller's, then the client's.
            self._file = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot keep replies in '{path}': {error}") from error

    def find(self, call: str) -> Reply | None:
        """The reply to a call that had this identity."""
        row = self._file.execute("SELECT reply FROM replies WHERE call = ?", (call,)).fetchone()
        return Reply(**json.loads(row[0])) if row else None

    def keep(self, call: str, reply: Reply) -> None:
        text = json.dumps(asdict(reply), ensure_ascii=False)
        with self._transaction():
            self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (call, text))
            self._charge(reply.cost)

    def charge(self, dollars: float) -> None:
        """Money that may have been spent on a reply that never came."""
        with self._transaction():
            self._charge(dollars)

    def spent(self) -> float:
        """Dollars that this job has spent, in this process and in those before it."""
        query = "SELECT TOTAL(dollars) FROM spending WHERE job = ?"
        return self._file.execute(query, (self._job,)).fetchone()[0]

    def close(self) -> None:
        self._file.close()

    def _charge(self, dollars: float) -> None:
        if dollars:
            self._file.execute("INSERT INTO spending VALUES (?, ?)", (self._job, dollars))

    @contextlib.contextmanager
    def _transaction(self):
        """Commits what is written in it, or rolls it back; raises OSError for a full disk."""
        try:
            with self._file:
                yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
