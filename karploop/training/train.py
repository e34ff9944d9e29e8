"""The training stages: `warmup` on seed data from scratch, `train` on all that has been kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from karploop.config import RegimeConfig, TrainConfig
from karploop.data.prompting import Prompting
from karploop.errors import RunFailed
from karploop.mesh import barrier, to_host
from karploop.records import Examples
from karploop.stages import StageContext
from karploop.training.checkpoints import Checkpoints, RemoteCheckpoints, open_checkpoints
from karploop.training.mixture import mix
from karploop.training.moments import restored, save_moments
from karploop.training.optimizer import learning_rate
from karploop.training.packing import pack, stream, tokenize
from karploop.training.trainer import Metrics, Trainer

STEPS_FILE, ROWS_FILE = "steps.parquet", "rows.parquet"


class Diverged(RunFailed):
    """The loss is not a number; the last good state is kept."""


def train(
    context: StageContext,
    *,
    trainer: Trainer,
    prompting: Prompting,
    config: TrainConfig,
    regime: RegimeConfig,
) -> None:
    """Supervised fine-tuning; writes parameters, metrics by step, and how often each row was used.

    Starts from inputs['params'], or from fresh parameters where there is no such input; an adapter
    found there is trained further, and with `regime.optimizer=keep` the optimiser's state found
    there is, too. Trains on inputs['seed'] and inputs['kept_0'] … 'kept_r' (see `mix`).

    Raises:
      Diverged: the loss became NaN or infinite; names the step and the batch's examples.
      Stopped: the user asked to stop; a checkpoint has been written.
    """
    mixture = mix(context.inputs, config, regime, context.numpy_rng)
    examples = tokenize(
        prompting, mixture.examples.prompts, mixture.examples.completions, config.row_length
    )
    order = stream(mixture.weights_N, context.numpy_rng)
    batches = pack(examples, order, config.rows, config.row_length)
    checkpoints = open_checkpoints(context.partial, context.say)
    given = context.inputs.get("params")
    found = checkpoints.restore(trainer.abstract)
    frozen = trainer.parts.frozen(given)
    if found:
        start, state, log = found[0], found[1], list(found[2])
    else:
        start, log = 0, []
        state = trainer.start(trainer.parts.begin(given, context.key))
        if given and regime.optimizer == "keep":
            state = restored(trainer, state, given)
    seen_N = np.zeros(len(examples), np.int64)
    for _, rows in itertools.islice(batches, start):  # the same stream as before the interruption
        np.add.at(seen_N, rows, 1)

    pending: tuple[int, Metrics, list[int]] | None = None

    def settle() -> str:
        """Reads the metrics of the step before, while the device works on the current one."""
        if pending is None:
            return ""
        step, metrics, rows = pending
        values = [float(x) for x in to_host(metrics)]
        if not all(map(math.isfinite, values)):
            kept = checkpoints.discard(step)  # the parameters that this step began with, if saved
            raise Diverged(_blame(step, Metrics(*values), mixture.examples, rows, kept))
        tokens = sum(len(examples[row].tokens) - 1 for row in rows)
        log.append([step, *values, learning_rate(config.optimizer, step, config.steps), tokens])
        return f"loss {values[0]:.4f}"

    with context.progress(config.steps, "steps") as progress:
        progress.advance(start)
        for step in range(start, config.steps):
            batch, rows = next(batches)
            np.add.at(seen_N, rows, 1)
            rate = learning_rate(config.optimizer, step, config.steps)
            state, metrics = trainer.step(state, batch, rate, frozen)
            note = settle()
            pending = (step, metrics, rows)
            progress.advance(1, tokens=int((batch.segments_BxL > 0).sum()), note=note)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                settle()
                pending = None
                checkpoints.save(step + 1, state, np.array(log))
                _stop_if_asked(context, checkpoints)
        settle()
    checkpoints.wait()
    checkpoints.close()
    barrier("training finished")
    trainer.parts.save(state.params, given, context.directory)
    if regime.optimizer == "keep":
        save_moments(state.opt_state, context.directory)
    names = ["step", *Metrics._fields, "learning_rate", "tokens"]
    columns = np.array(log).T
    context.write_table(STEPS_FILE, pa.table(dict(zip(names, columns, strict=True))))
    context.write_table(ROWS_FILE, _usage(mixture.examples, seen_N))


def _stop_if_asked(context: StageContext, checkpoints: Checkpoints | RemoteCheckpoints) -> None:
    try:
        context.check_stop()
    except BaseException:
        checkpoints.wait()
        raise


def _usage(examples: Examples, seen_N: np.ndarray) -> pa.Table:
    """Which rows entered an update, and how often; what lineage is traced by."""
    used = np.flatnonzero(seen_N)
    return pa.table(
        {
            "source": [examples.source[i] for i in used],
            "row": examples.row[used],
            "times": seen_N[used],
        }
    )


def _blame(
    step: int, metrics: Metrics, examples: Examples, rows: Sequence[int], kept: int | None
) -> str:
    shown = ", ".join(f"{examples.source[r][:12]}:{examples.row[r]}" for r in rows[:5])
    state = (
        "there is no earlier checkpoint" if kept is None else f"the state of step {kept} is kept"
    )
    return (
        f"the loss is {metrics.loss} and its gradient {metrics.grad_norm} at step {step}: training "
        f"stops here; {state}. The batch holds {len(rows)} examples, first {shown}. Lower the "
        "learning rate or the gradient's clip_norm, then run again"
    )
