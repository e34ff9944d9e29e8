"""Mid-stage checkpoints through Orbax, written while training goes on."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from karploop.store import is_local


class Checkpoints:
    """The last two states of one training stage, under the stage's partial directory.

    Orbax writes each to a temporary name and renames it when it is whole. On an object store,
    which cannot rename, Orbax writes to this machine's disk and each whole checkpoint is then
    uploaded as one archive (a single object appears whole or not at all).
    """

    def __init__(self, partial: epath.Path):
        self.remote = None if is_local(partial) else partial
        if self.remote is None:
            directory = pathlib.Path(partial) / "checkpoints"
        else:
            name = hashlib.sha256(os.fspath(partial).encode()).hexdigest()[:16]
            directory = pathlib.Path(tempfile.gettempdir()) / "karploop-checkpoints" / name
            self._download(directory)
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True),
        )
        self._unsent: int | None = None

    def restore(self, abstract: Any) -> tuple[int, Any, np.ndarray] | None:
        """(steps done, state, metrics so far) of the newest whole checkpoint, if there is one."""
        step = self._manager.latest_step()
        if step is None:
            return None
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), metrics=ocp.args.JsonRestore()
            ),
        )
        return step, found.state, np.array(found.metrics["rows"], np.float64)

    def save(self, step: int, state: Any, metrics: np.ndarray) -> None:
        """Starts writing; returns once the state has been copied off the devices."""
        self._upload()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                metrics=ocp.args.JsonSave({"rows": metrics.tolist()}),
            ),
        )
        self._unsent = step

    def discard(self, step: int) -> int | None:
        """Removes the checkpoint of `step`, if there is one; returns the newest that is left."""
        self._manager.wait_until_finished()
        if step in self._manager.all_steps():
            self._manager.delete(step)
        if self.remote is not None:
            self._unsent = None if self._unsent == step else self._unsent
            self._upload()
            (self.remote / f"checkpoint-{step:09d}.tar").unlink(missing_ok=True)
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when the last save is whole."""
        self._manager.wait_until_finished()
        self._upload()

    def close(self) -> None:
        self._manager.close()
        if self.remote is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _upload(self) -> None:
        if self.remote is None or self._unsent is None:
            return
        self._manager.wait_until_finished()
        step, self._unsent = self._unsent, None
        with tempfile.TemporaryDirectory() as scratch:
            archive = shutil.make_archive(f"{scratch}/{step}", "tar", self._directory, str(step))
            self.remote.mkdir(parents=True, exist_ok=True)
            (self.remote / f"checkpoint-{step:09d}.tar").write_bytes(
                pathlib.Path(archive).read_bytes()
            )
        for old in sorted(self.remote.glob("checkpoint-*.tar"))[:-2]:
            old.unlink()

    def _download(self, directory: pathlib.Path) -> None:
        archives = sorted(self.remote.glob("checkpoint-*.tar")) if self.remote.exists() else []
        if directory.exists() or not archives:
            return
        with tempfile.TemporaryDirectory() as scratch:
            local = pathlib.Path(scratch) / archives[-1].name
            local.write_bytes(archives[-1].read_bytes())
            shutil.unpack_archive(local, directory, filter="data")
