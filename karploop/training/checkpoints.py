"""Mid-stage checkpoints, written while training goes on.

On a disk (that all processes share) Orbax writes them, each process its part. An object store
cannot rename, which Orbax needs, so there each checkpoint is one object, which appears whole or not
at all.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from karploop.files import file_sha256, is_local, remove, write_atomic
from karploop.mesh import barrier, is_main, put, to_host

SEAL = "sha256.json"  # in a checkpoint's folder: file name → SHA-256


def open_checkpoints(
    partial: epath.Path, say: Callable[[str], None] = print
) -> Checkpoints | RemoteCheckpoints:
    """The checkpoints of a stage under its partial directory; `say` is told of damage."""
    return (Checkpoints if is_local(partial) else RemoteCheckpoints)(partial, say)


class Checkpoints:
    """The last two states of one training stage, on a disk.

    Orbax writes each to a temporary name and renames it when it is whole. A thread then seals it
    with the SHA-256 of every file: a checkpoint without a seal is one that a kill interrupted, and
    one that differs from its seal is damaged. Neither is restored.
    """

    def __init__(self, partial: epath.Path, say: Callable[[str], None]):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_of_orbax)
        self._say = say
        self._directory = partial / "checkpoints"
        if is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_torn()
        barrier(f"checkpoints {partial}")
        self._manager = ocp.CheckpointManager(
            os.path.abspath(self._directory),
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
        """Seals the checkpoint being written, once it is whole."""
        self._manager.wait_until_finished()
        if is_main():
            folder = self._directory / str(step)
            write_atomic(folder / SEAL, json.dumps(_hashes(folder), indent=1).encode())

    def _remove_torn(self) -> None:
        """Leaves whole checkpoints only, and names what is damaged."""
        for folder in self._directory.iterdir():
            if not folder.name.isdecimal():  # Orbax was writing it when it was killed
                remove(folder)
            elif damage := _damage(folder):
                self._say(_DAMAGED + damage)
                remove(folder)


class RemoteCheckpoints:
    """The same on an object store, for processes that have no disk in common.

    The main process uploads the whole state, gathered on its host, as one object whose name ends in
    its SHA-256. A thread does so while training goes on.
    """

    def __init__(self, partial: epath.Path, say: Callable[[str], None]):
        self._partial, self._say = partial, say
        self._sender = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future | None = None

    def restore(self, abstract: Any) -> tuple[int, Any, np.ndarray] | None:
        """(steps done, state, metrics so far) of the newest whole checkpoint, if there is one."""
        for path in reversed(self._objects()):
            data = path.read_bytes()
            if path.name != f"{_prefix(_step(path))}{hashlib.sha256(data).hexdigest()}.npz":
                self._say(f"{_DAMAGED}{path}")
                continue
            arrays = np.load(io.BytesIO(data))
            leaves, structure = jax.tree.flatten(abstract)
            leaves = [put(arrays[f"arr_{i}"], leaf.sharding) for i, leaf in enumerate(leaves)]
            return _step(path), jax.tree.unflatten(structure, leaves), arrays["metrics"]
        return None

    def save(self, step: int, state: Any, metrics: np.ndarray) -> None:
        """Starts to upload; returns once the state has been copied off the devices.

        Raises:
          OSError: the upload before this one failed.
        """
        self.wait()
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(to_host(state))]
        if is_main():
            self._sending = self._sender.submit(self._upload, step, leaves, metrics)

    def discard(self, step: int) -> int | None:
        """Removes the checkpoint of `step`, if there is one; returns the newest that is left."""
        self.wait()
        left = [path for path in self._objects() if _step(path) != step]
        barrier(f"about to discard {step} of {self._partial}")
        if is_main():
            for path in self._objects():
                if _step(path) == step:
                    path.unlink(missing_ok=True)
        return max(map(_step, left), default=None)

    def wait(self) -> None:
        """Returns when the last upload is whole; raises what went wrong with it."""
        if self._sending is not None:
            self._sending.result()
            self._sending = None

    def close(self) -> None:
        """Waits for the last upload."""
        self.wait()
        self._sender.shutdown()

    def _upload(self, step: int, leaves: list[np.ndarray], metrics: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, *leaves, metrics=metrics)
        data = buffer.getvalue()
        new = self._partial / f"{_prefix(step)}{hashlib.sha256(data).hexdigest()}.npz"
        write_atomic(new, data)
        others = [path for path in self._objects() if path.name != new.name]
        same = [path for path in others if _step(path) == step]  # damaged, and written anew
        for old in {*others[:-1], *same}:
            old.unlink(missing_ok=True)

    def _objects(self) -> list[epath.Path]:
        """By step."""
        if not self._partial.exists():
            return []
        return sorted(self._partial.glob("checkpoint-*.npz"), key=lambda path: path.name)


_DAMAGED = "store: damaged checkpoint found, going back to the one before: "


def _prefix(step: int) -> str:
    """How the name of a checkpoint's object begins."""
    return f"checkpoint-{step:09d}-"


def _step(path: epath.Path) -> int:
    return int(path.name.split("-")[1])


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax's failures reach us as exceptions; logged, they bury the line that says what to do.

    Of many writes that fail together it raises one, and asyncio logs the others.
    """
    logged_by = record.getMessage() if record.name == "asyncio" else record.pathname
    return "orbax" not in logged_by


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
