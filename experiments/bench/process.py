"""What both benchmarks share: their flags, and a workload in a process of its own.

What the process is told goes in a file, and its answer comes back in it.
"""

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

from absl import flags

from karploop.config import Config
from karploop.errors import RunFailed, UserError

_DEFAULT = "configs/gemma3_270m_shape.py"
_GEMMA = 262_144  # its vocabulary
FLAGS = flags.FLAGS
flags.DEFINE_string("config", _DEFAULT, "Whose model is measured, path/to/file.py[:ARG].")
flags.DEFINE_integer("repeats", 3, "Calls that are timed, of which the median counts.", 1)
flags.DEFINE_integer(
    "vocabulary",
    None,
    "Rows of a random model's embedding; default: Gemma's 262144 of the default config, else those "
    "of its task's characters.",
    2,
)
flags.DEFINE_string("output", "", "Folder to add the results to; empty: none is written.")
flags.DEFINE_string("machine", "", "What the results are called there, in words.")
flags.DEFINE_string("only", "", "What is measured in this process (set by this program).")
flags.DEFINE_string("task", "", "JSON file that it is told in and answers in (likewise).")


def vocabulary_of(config: Config) -> int | None:
    """Rows of a random model's embedding, where they are given or known; else None."""
    if FLAGS.vocabulary is None and FLAGS.config == _DEFAULT and not config.policy.path:
        return _GEMMA
    return FLAGS.vocabulary


def check_output() -> None:
    """Raises UserError: results are to be kept, and nobody said of which machine."""
    if FLAGS.output and not FLAGS.machine:
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
