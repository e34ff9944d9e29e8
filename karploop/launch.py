"""From a resolved config and a workdir to a finished run directory.

    WORKDIR/runs/R/config.json      the resolved config, versions, git state, hardware
    WORKDIR/runs/R/summary.json     rounds, held-out measurements, stage keys; final when complete
    WORKDIR/runs/R/metrics.jsonl, tensorboard/, accuracy.png, accuracy.txt

Everything in a run directory can be made again from the store: a resumed run writes it anew, from
the first round on, so that nothing in it is doubled or missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time

import jax

from karploop import cli, loop
from karploop.config import Config, to_dict
from karploop.machinery import prepare
from karploop.mesh import is_main
from karploop.models.weights import FILE
from karploop.reporting.progress import Progress
from karploop.run_directory import RunDirectory
from karploop.stages import Stages, Stopped
from karploop.store import Store, digest


def launch(config: Config, workdir: str, run_name: str | None, *, dry_run: bool = False) -> int:
    """Runs `config` in `workdir`; returns the process's exit code."""
    started = time.time()
    machinery = prepare(config)
    if dry_run:
        print(json.dumps(to_dict(config), indent=1))
        return 0
    run_name = run_name or f"{config.name}-{digest(to_dict(config))[:8]}"
    progress = Progress(rounds=config.rounds, quiet=not is_main())
    stop = cli.StopRequest()
    stop.install()
    store = Store(workdir, progress.say)
    store.open()
    _use_compilation_cache()
    with contextlib.ExitStack() as running:
        with store.gate(exclusive=False):  # once past it, garbage collection sees this run
            running.enter_context(store.lock(f"run-{run_name}-{jax.process_index()}", wait=False))
            run = RunDirectory(store, run_name, config)
        try:
            params = loop.run(machinery, Stages(store, progress, stop), run.add_round)
        except Stopped:
            progress.say(f"stopped; resume with: {cli.command()}")
            return 0
        hashes = [artifact.manifest.files[FILE]["sha256"] for artifact in params.values()]
        run.finish(hashes, time.time() - started)
    return 0


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, so that a resumed run starts at once."""
    if not jax.config.jax_compilation_cache_dir:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "karploop" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
