"""Compiled programs: kept from one process to the next, and made while something else is read."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.sharding import Mesh

from karploop.config import MeshConfig
from karploop.files import cache_folder
from karploop.mesh import check_batch, make_mesh

_SWITCH_SECONDS = 5e-4


def keep_compiled() -> None:
    """Compiled programs outlive the process, so that its like starts at once.

    They lie where JAX_COMPILATION_CACHE_DIR says or, if it does not, in the cache folder.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones add up


def command_mesh(batches: Mapping[str, int]) -> Mesh:
    """All devices, for a command over a file in place of a run; what it compiles is kept.

    Args:
      batches: rows at once, by the flag or key that says how many.

    Raises:
      UserError: as `check_batch`.
    """
    keep_compiled()
    mesh = make_mesh(MeshConfig())
    for where, size in batches.items():
        check_batch(size, mesh, where)
    return mesh


@contextlib.contextmanager
def compiling(lower: Callable[[], jax.stages.Lowered]) -> Iterator[None]:
    """Compiles a program in a thread while the block does something else, and waits for it.

    Who calls the program afterwards finds it compiled, as long as shapes and settings are the same;
    what goes wrong here, it meets again.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            lower().compile()

    thread = threading.Thread(target=work, name="compiling")
    # Whoever reads tensors gives the interpreter up in each call, and would wait the usual 5 ms to
    # get it back from the thread that traces.
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        sys.setswitchinterval(usual)
