"""The training stages: `warmup` on labelled rows from scratch, `train` on what has been kept."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from karploop.training.length import length_of, tokens_of
from karploop.training.lessons import RECORDS, Lesson, Origin, lesson_of, with_reference
from karploop.training.mixture import mix
from karploop.training.moments import restored, save_moments
from karploop.training.objectives import DIVERGENCES, REWARDS
from karploop.training.optimizer import learning_rate
from karploop.training.packing import Batch, pack, stream
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
    lesson, objective = _lesson(context, trainer, prompting, config, regime), trainer.objective
    given = context.inputs.get("params")
    frozen = trainer.parts.frozen(given)

    def begin() -> TrainState:
        state = trainer.start(trainer.parts.begin(given, context.key))
        return restored(trainer, state, given) if given and regime.optimizer == "keep" else state

    load = functools.partial(teacher, context.inputs) if objective.reads == DIVERGENCES else None
    state, log, seen_N = descend(context, trainer, lesson, config, frozen, begin, load)
    trainer.parts.save(state.params, given, context.directory)
    if objective.reads == REWARDS:
        head = centred_head(trainer, state.params, frozen, lesson.units, lesson.weights_N, config)
        head.save(context.directory / HEAD)
    if regime.optimizer == "keep":
        save_moments(state.opt_state, context.directory)
    names, columns = [*_COLUMNS, *objective.measures], np.array(log).T
    context.write_table(STEPS_FILE, pa.table(dict(zip(names, columns, strict=True))))
    context.write_table(ROWS_FILE, _usage(lesson.origins, seen_N))


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
    checkpoints = open_checkpoints(context.partial, context.say)
    course = _Course(trainer, config, lesson, checkpoints, context.numpy_rng)
    found = checkpoints.restore(trainer.abstract)
    if found:
        course.resume(*found)
    else:
        course.state = begin()
    # Behind what is trained, which gives up its buffers: the loop's own weights may teach.
    taught = teacher() if teacher else ()
    with context.progress(course.length.total, course.length.unit) as progress:
        progress.advance(course.done)
        while not course.over:
            before = course.done
            tokens, note = course.step(frozen, taught)
            progress.advance(course.done - before, tokens=tokens, note=note)
            if course.steps % config.checkpoint_every == 0 and not course.over:
                course.save()
                _stop_if_asked(context, checkpoints)
        course.settle()
    checkpoints.wait()
    checkpoints.close()
    barrier("training finished")
    return course.state, course.log, course.seen_N


def _lesson(context, trainer, prompting, config, regime) -> Lesson:
    objective = trainer.objective
    kind, file = RECORDS[objective.lesson]
    mixture = mix(context.inputs, kind, file, config, regime, context.numpy_rng)
    lesson = lesson_of(mixture.rows, mixture.weights_N, prompting, objective.config, config)
    if objective.reference:
        params = trainer.weights.load(context.inputs["reference"])
        found = logprobs_of(lesson.units, functools.partial(trainer.logprobs, params), config)
        told = with_reference(lesson.units, found, objective.reference)
        lesson = lesson._replace(units=told)
    return lesson


class _Course:
    """A training stage under way.

    Attributes:
      state: to be set before the first step, by the caller or by `resume`.
      steps, done: steps taken, and how much that is of `length`.
      log: for each step that is settled, the columns of `steps.parquet`.
      seen_N: how often each unit was trained on.
    """

    state: TrainState

    def __init__(
        self,
        trainer: Trainer,
        config: TrainConfig,
        lesson: Lesson,
        checkpoints: Checkpoints | RemoteCheckpoints,
        rng: np.random.Generator,
    ):
        self._trainer, self._config, self._lesson = trainer, config, lesson
        self._checkpoints = checkpoints
        self.length = length_of(config, len(lesson.units))
        order = self.length.cut(stream(lesson.weights_N, rng))
        shape = config.rows, config.row_length, config.accumulation, config.share_prompts
        self._batches = pack(lesson.units, order, *shape)
        self.steps, self.done, self.log = 0, 0, []
        self.seen_N = np.zeros(len(lesson.units), np.int64)
        self._pending: tuple[Metrics, float, int, list[int]] | None = None

    @property
    def over(self) -> bool:
        return self.done >= self.length.total

    def resume(self, steps: int, state: TrainState, log: np.ndarray) -> None:
        """Goes on behind a checkpoint, with the same stream as before the interruption."""
        self.state, self.log = state, list(log)
        for batch, taken in itertools.islice(self._batches, steps):
            self._count(batch, taken)

    def step(self, frozen: Any, taught: Any) -> tuple[int, str]:
        """One update; how many tokens it read, and what to show of the step before."""
        batch, taken = next(self._batches)
        tokens, size = tokens_of(batch), self.length.of(batch, taken)
        rate = learning_rate(self._config.optimizer, self.done, self.length.total, size)
        self.state, metrics = self._trainer.step(self.state, batch, rate, frozen, taught)
        note = self.settle()
        self._pending = metrics, rate, tokens, taken
        self._count(batch, taken)
        return tokens, note

    def settle(self) -> str:
        """Reads the metrics of the last step; by `step`, while the device works on the next.

        Raises:
          Diverged: they are no numbers. A checkpoint of the state behind that step is removed.
        """
        if self._pending is None:
            return ""
        (metrics, rate, tokens, taken), self._pending = self._pending, None
        step = len(self.log)
        loss, accuracy, grad_norm, more = jax.tree.map(float, to_host(metrics))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = self._checkpoints.discard(step)  # the parameters that this step began with
            blamed = [origin for unit in taken for origin in self._lesson.origins[unit]]
            raise Diverged(_blame(step, loss, grad_norm, blamed, kept))
        others = [more[name] for name in self._trainer.objective.measures]
        self.log.append([step, loss, accuracy, grad_norm, rate, tokens, *others])
        return f"loss {loss:.4f}"

    def save(self) -> None:
        """Begins to write a checkpoint of the last step, if that is settled without objection."""
        self.settle()
        self._checkpoints.save(self.steps, self.state, np.array(self.log))

    def _count(self, batch: Batch, taken: list[int]) -> None:
        self.steps += 1
        self.done += self.length.of(batch, taken)
        np.add.at(self.seen_N, taken, 1)


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
