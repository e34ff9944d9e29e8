"""A workload in a process of its own: what it is told goes in a file, and its answer comes back."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from karploop.config import Config
from karploop.errors import RunFailed, UserError

DEFAULT_CONFIG = "configs/gemma3_270m_shape.py"
_GEMMA = 262_144  # its vocabulary


def vocabulary_of(file: str, config: Config, given: int | None) -> int | None:
    """Rows of a random model's embedding, where they are `given` or known; else None."""
    if given is None and file == DEFAULT_CONFIG and not config.policy.path:
        return _GEMMA
    return given


def check_output(output: str, machine: str) -> None:
    """Raises UserError: results are to be kept, and nobody said of which machine."""
    if output and not machine:
        raise UserError("--output keeps results by machine: say which this is by --machine='…'")


def call(
    module: str, arguments: Sequence[str], name: str, told: dict[str, Any], cache: str | None = None
) -> dict[str, Any]:
    """What `python -m module … --only=name --task=FILE` answers in that file.

    It is told the time at which it began, too, and finds no compiled programs but those in `cache`.

    Raises:
      UserError, RunFailed: as it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, log = pathlib.Path(folder, "task.json"), pathlib.Path(folder, "log")
        command = [sys.executable, "-m", module, *arguments, f"--only={name}", f"--task={file}"]
        found = {
            "JAX_COMPILATION_CACHE_DIR": cache or str(pathlib.Path(folder, "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        file.write_text(json.dumps(told | {"began": time.time()}))
        with open(log, "w") as out:
            child = subprocess.run(command, env=os.environ | found, stdout=out, stderr=out)
        said = log.read_text().strip()
        if child.returncode == 2:
            raise UserError(said.rpartition("error: ")[2])
        if child.returncode:
            raise RunFailed(f"the workload '{name}' failed:\n{said[-4000:]}")
        return json.loads(file.read_text())
