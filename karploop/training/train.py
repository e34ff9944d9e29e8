"""The training stages: `warmup` on labelled rows from scratch, `train` on what has been kept, and
`reward`, a reward model on pairs."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa

from karploop.config import RegimeConfig, TrainConfig
from karploop.data.prompting import Prompting
from karploop.errors import RunFailed
from karploop.mesh import barrier, to_host
from karploop.models.reward_head import HEAD
from karploop.stages import Artifact, StageContext
from karploop.training.centred import centred_head
from karploop.training.checkpoints import Checkpoints, RemoteCheckpoints, open_checkpoints
from karploop.training.lessons import RECORDS, Origin, origins, units, with_reference
from karploop.training.mixture import mix
from karploop.training.moments import restored, save_moments
from karploop.training.objectives import DIVERGENCES, REWARDS
from karploop.training.optimizer import learning_rate
from karploop.training.packing import Unit, pack, stream
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Metrics, Trainer, TrainState

STEPS_FILE, ROWS_FILE = "steps.parquet", "rows.parquet"
_COLUMNS = ("step", "loss", "accuracy", "grad_norm", "learning_rate", "tokens")


class Diverged(RunFailed):
    """The loss is not a number; the last good state is kept."""


def train(
    context: StageContext,
    *,
    trainer: Trainer,
    prompting: Prompting,
    config: TrainConfig,
    regime: RegimeConfig,
    teacher: Callable[[Mapping[str, Artifact]], Any] | None = None,
) -> None:
    """Minimises the trainer's objective; writes parameters, metrics by step, and how often each
    row was used; of an objective of rewards also the head, under which their mean is 0.

    Starts from inputs['params'], or from fresh parameters where there is no such input; an adapter
    found there is trained further, and with `regime.optimizer=keep` the optimiser's state found
    there is, too. Trains on inputs['seed'] and inputs['kept_0'] … 'kept_r' (see `mix`), and is held
    to inputs['reference'] by objectives that have one.

    Args:
      teacher: from the inputs to a teacher's parameters, for objectives that compare with it.

    Raises:
      Diverged: the loss became NaN or infinite; names the step and the batch's rows.
      Stopped: the user asked to stop; a checkpoint has been written.
    """
    objective = trainer.objective
    kind, file = RECORDS[objective.lesson]
    mixture = mix(context.inputs, kind, file, config, regime, context.numpy_rng)
    learnt = units(mixture.rows, prompting, objective.config, config.row_length)
    texts = origins(mixture.rows)
    if objective.reference:
        params = trainer.weights.load(context.inputs["reference"])
        found = logprobs_of(learnt, functools.partial(trainer.logprobs, params), config)
        learnt = with_reference(learnt, found, objective.reference)
        del params
    given = context.inputs.get("params")
    frozen = trainer.parts.frozen(given)

    def begin() -> TrainState:
        state = trainer.start(trainer.parts.begin(given, context.key))
        if given and regime.optimizer == "keep":
            state = restored(trainer, state, given)
        return state

    lesson = Lesson(learnt, texts, mixture.weights_N)
    load = functools.partial(teacher, context.inputs) if objective.reads == DIVERGENCES else None
    state, log, seen_N = descend(context, trainer, lesson, config, frozen, begin, load)
    trainer.parts.save(state.params, given, context.directory)
    if objective.reads == REWARDS:
        head = centred_head(trainer, state.params, frozen, learnt, mixture.weights_N, config)
        head.save(context.directory / HEAD)
    if regime.optimizer == "keep":
        save_moments(state.opt_state, context.directory)
    names, columns = [*_COLUMNS, *objective.measures], np.array(log).T
    context.write_table(STEPS_FILE, pa.table(dict(zip(names, columns, strict=True))))
    context.write_table(ROWS_FILE, _usage(texts, seen_N))


class Lesson(NamedTuple):
    """What a stage learns from."""

    units: Sequence[Unit]
    origins: Sequence[tuple[Origin, ...]]  # of each unit's texts
    weights_N: np.ndarray  # how often each unit is drawn, relative to the others


def descend(
    context: StageContext,
    trainer: Trainer,
    lesson: Lesson,
    config: TrainConfig,
    frozen: Any,
    begin: Callable[[], TrainState],
    teacher: Callable[[], Any] | None = None,
) -> tuple[TrainState, list[list[float]], np.ndarray]:
    """The steps of a stage, from its newest checkpoint on where it has one, else from `begin`.

    Returns the last state, a row of metrics for each step, and how often each unit was used.

    Raises:
      Diverged, Stopped: see `train`.
    """
    learnt, texts, weights_N = lesson
    objective = trainer.objective
    order = stream(weights_N, context.numpy_rng)
    batches = pack(learnt, order, config.rows, config.row_length)
    checkpoints = open_checkpoints(context.partial, context.say)
    found = checkpoints.restore(trainer.abstract)
    if found:
        start, state, log = found[0], found[1], list(found[2])
    else:
        start, log, state = 0, [], begin()
    # Behind what is trained, which gives up its buffers: the loop's own weights may teach.
    taught = teacher() if teacher else ()
    seen_N = np.zeros(len(learnt), np.int64)
    for _, rows in itertools.islice(batches, start):  # the same stream as before the interruption
        np.add.at(seen_N, rows, 1)

    pending: tuple[int, Metrics, list[int]] | None = None

    def settle() -> str:
        """Reads the metrics of the step before, while the device works on the current one."""
        if pending is None:
            return ""
        step, metrics, rows = pending
        loss, accuracy, grad_norm, more = jax.tree.map(float, to_host(metrics))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = checkpoints.discard(step)  # the parameters that this step began with, if saved
            blamed = [origin for row in rows for origin in texts[row]]
            raise Diverged(_blame(step, loss, grad_norm, blamed, kept))
        tokens = sum(len(text.tokens) - 1 for row in rows for text in learnt[row])
        rate = learning_rate(config.optimizer, step, config.steps)
        others = [more[name] for name in objective.measures]
        log.append([step, loss, accuracy, grad_norm, rate, tokens, *others])
        return f"loss {loss:.4f}"

    with context.progress(config.steps, "steps") as progress:
        progress.advance(start)
        for step in range(start, config.steps):
            batch, rows = next(batches)
            np.add.at(seen_N, rows, 1)
            rate = learning_rate(config.optimizer, step, config.steps)
            state, metrics = trainer.step(state, batch, rate, frozen, taught)
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
    return state, log, seen_N


def _stop_if_asked(context: StageContext, checkpoints: Checkpoints | RemoteCheckpoints) -> None:
    try:
        context.check_stop()
    except BaseException:
        checkpoints.wait()
        raise


def _usage(texts: Sequence[tuple[Origin, ...]], seen_N: np.ndarray) -> pa.Table:
    """Which rows entered an update, and how often; what lineage is traced by."""
    used: Counter[Origin] = Counter()
    for unit in np.flatnonzero(seen_N):
        used.update(dict.fromkeys(texts[unit], int(seen_N[unit])))
    return pa.table(
        {
            "source": [source for source, _ in used],
            "row": pa.array([row for _, row in used], pa.int64()),
            "times": pa.array(used.values(), pa.int64()),
        }
    )


def _blame(
    step: int, loss: float, grad_norm: float, texts: Sequence[Origin], kept: int | None
) -> str:
    shown = ", ".join(f"{source[:12]}:{row}" for source, row in texts[:5])
    state = (
        "there is no earlier checkpoint" if kept is None else f"the state of step {kept} is kept"
    )
    return (
        f"the loss is {loss} and its gradient {grad_norm} at step {step}: training stops here; "
        f"{state}. The batch holds {len(texts)} examples, first {shown}. Lower the learning rate "
        "or the gradient's clip_norm, then run again"
    )
