"""Mid-stage checkpoints through Orbax, written while training goes on."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from karploop.files import copy, file_sha256, is_local, remove, write_atomic
from karploop.mesh import barrier, is_main

SEAL = "sha256.json"  # in a checkpoint's folder: file name → SHA-256


class Checkpoints:
    """The last two states of one training stage, under the stage's partial directory.

    Orbax writes each to a temporary name and renames it when it is whole. A thread then seals it
    with the SHA-256 of every file: a checkpoint without a seal is one that a kill interrupted, and
    one that differs from its seal is damaged. Neither is restored.

    On an object store, which cannot rename, Orbax writes to this machine's disk and each sealed
    checkpoint is uploaded as one archive (a single object appears whole or not at all). Several
    processes have no disk in common, so there Orbax writes to the store itself, by its own means
    of telling whole checkpoints from torn ones.
    """

    def __init__(
        self,
        partial: epath.Path,
        scratch: pathlib.Path | None = None,
        say: Callable[[str], None] = print,
    ):
        """
        Args:
          partial: what outlives the process.
          scratch: a directory of this machine, empty at first, if `partial` is on an object store.
          say: is told of damage.
        """
        logging.get_absl_logger().addFilter(_not_of_orbax)
        self._say = say
        self._archives = None
        self._directory = partial / "checkpoints"
        if not is_local(partial) and jax.process_count() == 1:
            self._archives = partial
            self._directory = epath.Path(scratch) / "checkpoints"
            self._download()
        if is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_torn()
        barrier(f"checkpoints {partial}")
        self._manager = ocp.CheckpointManager(
            os.path.abspath(self._directory) if is_local(self._directory) else self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2,
                create=False,
                # Else Orbax's threads wait ten minutes for a directory that a full disk denies.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )
        self._sealer = concurrent.futures.ThreadPoolExecutor(1)
        self._sealing: concurrent.futures.Future | None = None

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
        """Starts writing; returns once the state has been copied off the devices.

        Raises:
          OSError: the save before this one failed, for want of space for example.
        """
        self.wait()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                metrics=ocp.args.JsonSave({"rows": metrics.tolist()}),
            ),
        )
        self._sealing = self._sealer.submit(self._finish, step)

    def discard(self, step: int) -> int | None:
        """Removes the checkpoint of `step`, if there is one; returns the newest that is left."""
        self.wait()
        if step in self._manager.all_steps():
            self._manager.delete(step)
        for archive in self._sorted_archives():
            if archive.name.startswith(_prefix(step)):
                archive.unlink(missing_ok=True)
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when the last save is whole and sealed; raises what went wrong with it."""
        if self._sealing is not None:
            self._sealing.result()
            self._sealing = None

    def close(self) -> None:
        """Waits for the last save and lets go of everything."""
        self.wait()
        self._sealer.shutdown()
        self._manager.close()

    def _finish(self, step: int) -> None:
        """Seals the checkpoint being written, once it is whole, and uploads it."""
        self._manager.wait_until_finished()
        if not is_main():
            return
        folder = self._directory / str(step)
        write_atomic(folder / SEAL, json.dumps(_hashes(folder), indent=1).encode())
        if self._archives is not None:
            self._upload(folder)

    def _remove_torn(self) -> None:
        """Leaves whole checkpoints only, and names what is damaged."""
        for folder in self._directory.iterdir():
            if not folder.name.isdecimal():  # Orbax was writing it when it was killed
                remove(folder)
            elif damage := _damage(folder):
                self._report(damage)
                remove(folder)

    def _report(self, damage: str) -> None:
        self._say(f"store: damaged checkpoint found, going back to the one before: {damage}")

    def _upload(self, folder: epath.Path) -> None:
        archive = shutil.make_archive(
            os.path.join(folder.parent.parent, folder.name), "tar", folder.parent, folder.name
        )
        name = f"{_prefix(int(folder.name))}{file_sha256(archive)}.tar"
        copy(archive, self._archives / name)
        os.unlink(archive)
        others = [path for path in self._sorted_archives() if path.name != name]
        same = [path for path in others[-1:] if path.name.startswith(_prefix(int(folder.name)))]
        for old in [*others[:-1], *same]:
            old.unlink(missing_ok=True)

    def _download(self) -> None:
        """Fetches the newest archive that is whole."""
        self._directory.mkdir(parents=True)
        for archive in reversed(self._sorted_archives()):
            local = self._directory.parent / archive.name
            if f"-{copy(archive, local)}.tar" in archive.name:
                shutil.unpack_archive(local, self._directory, filter="data")
                local.unlink()
                return
            self._report(str(archive))

    def _sorted_archives(self) -> list[epath.Path]:
        """By step; none where Orbax's own folders outlive the process."""
        if self._archives is None or not self._archives.exists():
            return []
        return sorted(self._archives.glob("checkpoint-*.tar"), key=lambda path: path.name)


def _prefix(step: int) -> str:
    """How the name of an archive begins; it ends in the archive's SHA-256."""
    return f"checkpoint-{step:09d}-"


def _not_of_orbax(record) -> bool:
    """Orbax's failures reach us as exceptions; logged, they bury the line that says what to do."""
    return "orbax" not in record.pathname


def _hashes(folder: epath.Path) -> dict[str, str]:
    """The SHA-256 of every file under `folder` but the seal, by relative name."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            hashes |= {f"{path.name}/{name}": value for name, value in _hashes(path).items()}
        elif path.name != SEAL:
            hashes[path.name] = file_sha256(path)
    return hashes


def _damage(folder: epath.Path) -> str:
    """What is wrong with a checkpoint; '' if it is as it was sealed."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        found = _hashes(folder)
        names = [str(folder / name) for name in sealed if found.get(name) != sealed[name]]
        return f"{', '.join(names)}: not as it was sealed" if names else ""
    except FileNotFoundError:
        return f"{folder / SEAL}: missing, so a kill came before the checkpoint was whole"
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return f"{folder / SEAL}: {error}"
