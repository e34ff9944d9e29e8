"""From a resolved config and a workdir to a finished run directory.

    WORKDIR/runs/R/config.json      the resolved config, versions, git state, hardware
    WORKDIR/runs/R/summary.json     rounds, held-out measurements, stage keys; final when complete
    WORKDIR/runs/R/metrics.jsonl, tensorboard/, accuracy.png, accuracy.txt

Everything in a run directory can be made again from the store: a resumed run writes it anew, from
the first round on, so that nothing in it is doubled or missing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable

import jax

from karploop import cli, loop
from karploop.bindings import BASE, Round
from karploop.compiling import keep_compiled
from karploop.config import Config
from karploop.errors import RunFailed, UserError
from karploop.forecast import loop_forecast
from karploop.machinery import Machinery, prepare
from karploop.mesh import any_process, is_main, main_first
from karploop.models.weights import params_sha256
from karploop.reporting.progress import Progress
from karploop.run_directory import RunDirectory
from karploop.schema import to_dict
from karploop.stages import Stages, Stopped
from karploop.store import Store, digest


def join_cluster(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of other machines that run the same command, before any device is used.

    From then on `jax.devices()` are those of all processes, and the main one alone writes.

    Args:
      coordinator: HOST:PORT on which the main process (number 0) listens.
      processes: how many there are.
      process: this one's number. On TPU pods and under Slurm or Open MPI all three may be None.

    Raises:
      UserError: there is nothing to join by these arguments.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes: {error}. Outside TPU pods, Slurm and Open MPI give "
            "each --coordinator_address=HOST:PORT, --num_processes and its own --process_id"
        ) from error


def launch(config: Config, workdir: str, run_name: str | None, *, dry_run: bool = False) -> int:
    """Runs `config` in `workdir`; returns the process's exit code."""
    started = time.time()
    machinery = prepare(config)
    if dry_run:
        if is_main():
            print(json.dumps(to_dict(config), indent=1))
        return 0
    run_name = run_name or f"{config.name}-{digest(to_dict(config))[:8]}"
    progress = Progress(rounds=config.rounds, quiet=not is_main())
    stop = cli.StopRequest()
    stop.install()
    store = Store(workdir, progress.say)
    keep_compiled()
    with contextlib.ExitStack() as running:
        run = main_first(lambda: _start(store, run_name, machinery, running))
        running.callback(run.close)
        _check_shared(store)
        _check_endpoints(machinery, progress.say)
        for line in loop_forecast(machinery):
            progress.say(line)
        running.callback(gc.unfreeze)
        _set_aside()

        def after_round(done: Round) -> None:
            run.add_round(done)
            if done.index == BASE:  # most of what will be compiled has been
                _set_aside()

        try:
            params = loop.run(machinery, Stages(store, progress, stop), after_round)
        except Stopped:
            progress.say(f"stopped; resume with: {cli.command()}")
            return 0
        hashes = [params_sha256(artifact.manifest) for artifact in params.values()]
        run.finish(hashes, time.time() - started)
    return 0


def _set_aside() -> None:
    """Spares the garbage collector what will live as long as the process: modules and programs.

    It would walk these 400,000 objects once or twice a round, in 0.17 seconds each time. Garbage is
    collected first, that none of it is kept.
    """
    gc.collect()
    gc.freeze()


def _start(
    store: Store, run_name: str, machinery: Machinery, running: contextlib.ExitStack
) -> RunDirectory:
    """The run's directory; on the main process in a workdir made ready and under the run's lock.

    Raises:
      UserError: the workdir cannot be written, or the run's name is in use or means another config.
    """
    if not is_main():
        return RunDirectory(store, run_name, machinery.config, machinery.simulates)
    store.open()
    with store.gate(exclusive=False):  # once past it, garbage collection sees this run
        running.enter_context(store.lock(f"run-{run_name}-{jax.process_index()}", wait=False))
        return RunDirectory(store, run_name, machinery.config, machinery.simulates)


def _check_shared(store: Store) -> None:
    """Raises UserError, on every process, unless all see the workdir that the main one opened."""
    if any_process(not store.root.exists()):
        raise UserError(
            f"the processes do not share the workdir '{store.root}': give --workdir a disk that "
            "all machines mount, or an object store (gs://…, s3://…)"
        )


def _check_endpoints(machinery: Machinery, say: Callable[[str], None]) -> None:
    """Raises UserError: an endpoint is to give probabilities, and gives none.

    One that is down may be back when it is asked; and what is in the store asks for nothing.
    """
    try:
        for phase in machinery.phases.values():
            machinery.roles.probe(phase.judge.seats if phase.judge else {})
    except RunFailed as down:
        say(f"{down}. Until it is asked, the run goes on")
