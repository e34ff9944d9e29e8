"""Runs an entry point and lets the operating system fail it at a chosen moment.

python tests/faults.py ROOT FAULT MATCH NUMBER -- MODULE ARGUMENTS…

Counts this process's writes under ROOT (files opened for writing, renames, directories made and
removed; see `sys.audit`). Just before the NUMBER-th whose description matches the pattern MATCH,
  kill    kills the process, as `kill -9` would
  full    lets this write and all later ones fail: the disk is full
  stop    sends the process SIGTERM
  pause   stops the process, as Ctrl-Z would
  list    does nothing; the descriptions of all writes go to standard output
"""

import errno
import os
import re
import runpy
import signal
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATHS = {"os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "shutil.rmtree": 1}


def describe(event: str, arguments: tuple, root: str) -> str | None:
    """A write in words, as in `open partial/x`, paths relative to `root`; None for all else."""
    if event == "open":
        path, _, flags = arguments
        if not flags & _WRITING:
            return None
        paths = [path]
    elif event in _PATHS:
        paths = arguments[: _PATHS[event]]
    else:
        return None
    if not all(isinstance(path, str | os.PathLike) for path in paths):
        return None  # a file descriptor
    paths = [os.path.abspath(os.fspath(path)) for path in paths]
    if not any(path.startswith(f"{root}/") for path in paths):
        return None
    return " ".join([event, *(os.path.relpath(path, root) for path in paths)])


def install(root: str, fault: str, match: str, number: int) -> None:
    """Watches this process from now on; the hook cannot be taken away."""
    pattern, seen = re.compile(match), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event != "open" and event not in _PATHS:
            return
        write = describe(event, arguments, root)
        if write is None:
            return
        if fault == "list":
            os.write(1, f"{write}\n".encode())
        if not pattern.search(write):
            return
        seen += 1
        if fault == "full" and seen >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if seen == number and fault in ("kill", "stop", "pause"):
            os.write(2, f"faults: {fault} before {write}\n".encode())
            number_of = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "pause": signal.SIGSTOP}
            os.kill(os.getpid(), number_of[fault])

    sys.addaudithook(hook)


if __name__ == "__main__":
    root, fault, match, number, _, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    sys.path[0] = os.getcwd()
    install(os.path.abspath(root), fault, match, int(number))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
