"""Live progress of a run on stderr.

On a terminal one line is rewritten in place and a permanent line is left when a stage ends.
Elsewhere (a log file, a pipe) there are plain lines: one as a stage starts, unless it was quick the
last time, at most one every ten seconds while it runs, and one as it ends.

The rate and the time left of a stage are averages over the whole stage so far, compilation
included. The time left of the run takes every later round to last as long as the latest one that
was computed whole; before there is one, no such time is shown.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_REDRAW_SECONDS = 0.1  # on a terminal
_LINE_SECONDS = 10.0  # elsewhere
_FALLBACK_COLUMNS = 80


def format_duration(seconds: float) -> str:
    """Renders a duration in seconds: `0.4s`, `45s`, `3m20s`, `2h05m`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_rate(per_second: float) -> str:
    """Renders a rate with three digits at most: `7.5`, `950`, `12.3k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if per_second >= size:
            return f"{per_second / size:.1f}{unit}"
    return f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.1f}"


class Stage:
    """Counts the units of one running stage; made by `Progress.stage`."""

    def __init__(
        self,
        total: int,
        unit: str,
        start: int,
        clock: Callable[[], float],
        redraw: Callable[["Stage"], None],
    ):
        self.total, self.unit, self.start, self.done = total, unit, start, start
        self.tokens, self.note = 0, ""
        self._clock, self._redraw, self._began = clock, redraw, clock()

    def advance(self, n: int = 1, tokens: int = 0, note: str = "") -> None:
        """Adds `n` finished units and `tokens` processed; `note` stays until the next one."""
        self.done += n
        self.tokens += tokens
        self.note = note or self.note
        self._redraw(self)

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    def seconds_left(self) -> float | None:
        """Seconds to the end of the stage at its rate so far; None before the first unit."""
        finished = self.done - self.start
        if finished <= 0 or self.total <= 0:
            return None
        return self.seconds / finished * max(self.total - self.done, 0)


class Progress:
    """Shows which stage of which round runs, how far it is, how fast, and the time left.

    Args:
      stream: where to write; None is stderr.
      rounds: rounds the run will make, for "of how many" and for the run's time left; the work
        before them is round -1, shown as "base".
      quiet: writes nothing at all.
      clock: seconds, monotonic.
      columns: terminal width; None asks the terminal at each line.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        rounds: int = 0,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        columns: int | None = None,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._rounds, self._quiet, self._clock, self._columns = rounds, quiet, clock, columns
        self._live = self._stream.isatty()
        self._shown = 0  # characters of the line now standing on the terminal
        self._next_line = 0.0  # the clock's time before which no line is due
        self._stage_seconds: dict[str, float] = {}  # by stage name, the latest whole one
        self._round_seconds: float | None = None  # the latest round that was computed whole
        self._round: int | None = None
        self._round_began = 0.0
        self._round_whole = False  # nothing of the current round came from the store

    @contextmanager
    def stage(
        self, round: int | None, name: str, total: int, unit: str = "steps", start: int = 0
    ) -> Iterator[Stage]:
        """Shows one stage from here to the end of the `with` block.

        Args:
          round: round index, -1 for what comes before the first round, None outside of a loop.
          name: stage name.
          total: units in the whole stage; 0 where unknown.
          unit: what is counted, in the plural.
          start: units that an earlier process finished.
        """
        self._enter(round, computed=start == 0)
        stage = Stage(total, unit, start, self._clock, lambda s: self._tick(round, name, s))
        self._next_line = self._clock() + _LINE_SECONDS
        if self._live:
            self._rewrite(self._describe(round, name, stage))
        elif self._stage_seconds.get(name, _LINE_SECONDS) >= _LINE_SECONDS:
            self._print(f"{self._place(round, name)}  started")
        try:
            yield stage
        except BaseException:
            self._print(
                f"{self._place(round, name)}  stopped at {_count(stage)}"
                f" after {format_duration(stage.seconds)}"
            )
            raise
        if start == 0:  # a stage taken up half-way says nothing about a whole one
            self._stage_seconds[name] = stage.seconds
        parts = [_count(stage), f"in {format_duration(stage.seconds)}", _rate(stage), stage.note]
        self._print("  ".join([self._place(round, name), *filter(None, parts)]))

    def reused(self, round: int, name: str, key: str) -> None:
        """Shows that a stage was found in the store under `key` and not computed."""
        self._enter(round, computed=False)
        self._print(f"{self._place(round, name)}  reused {key[:12]}")

    def say(self, text: str) -> None:
        """Writes a permanent line."""
        self._print(text)

    def run_seconds_left(self, stage_left: float | None) -> float | None:
        """Seconds to the end of the run, while the current stage has `stage_left` to go.

        None before the first round, and until a round has been computed whole.
        """
        if self._round_seconds is None or self._round is None or self._round < 0:
            return None
        of_this_round = self._round_seconds - (self._clock() - self._round_began)
        later_rounds = max(self._rounds - 1 - self._round, 0)
        return max(of_this_round, stage_left or 0.0) + later_rounds * self._round_seconds

    def _enter(self, round: int | None, computed: bool) -> None:
        """Notes which round the run is in, and times the one that ends."""
        if round != self._round:
            now = self._clock()
            if self._round is not None and self._round >= 0 and self._round_whole:
                self._round_seconds = now - self._round_began
            self._round, self._round_began, self._round_whole = round, now, True
        self._round_whole = self._round_whole and computed

    def _place(self, round: int | None, name: str) -> str:
        if round is None:
            return name
        where = "base" if round < 0 else f"round {round} ({round + 1} of {self._rounds})"
        return f"{where}  {name}"

    def _describe(self, round: int | None, name: str, stage: Stage) -> str:
        left = stage.seconds_left()
        if left is None and name in self._stage_seconds:
            left = max(self._stage_seconds[name] - stage.seconds, 0.0)
        run_left = self.run_seconds_left(left)
        parts = [
            _count(stage),
            _rate(stage),
            "" if left is None else f"{format_duration(left)} left",
            "" if run_left is None else f"run {format_duration(run_left)} left",
            stage.note,
        ]
        return "  ".join([self._place(round, name), *filter(None, parts)])

    def _tick(self, round: int | None, name: str, stage: Stage) -> None:
        now = self._clock()
        if now < self._next_line:
            return
        if self._live:
            self._rewrite(self._describe(round, name, stage))
        else:
            self._print(self._describe(round, name, stage))
            self._next_line = now + _LINE_SECONDS

    def _rewrite(self, line: str) -> None:
        line = line[: self._width() - 1]  # the last column would make the terminal wrap
        self._write("\r" + line.ljust(self._shown))
        self._shown = len(line)
        self._next_line = self._clock() + _REDRAW_SECONDS

    def _print(self, line: str) -> None:
        """Writes a permanent line over whatever stands on the terminal's current one."""
        self._write(("\r" + line.ljust(self._shown) if self._shown else line) + "\n")
        self._shown = 0

    def _write(self, text: str) -> None:
        if not self._quiet:
            self._stream.write(text)
            self._stream.flush()

    def _width(self) -> int:
        if self._columns is not None:
            return self._columns
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _FALLBACK_COLUMNS
        except (OSError, ValueError):
            return _FALLBACK_COLUMNS


def _count(stage: Stage) -> str:
    if stage.total <= 0:
        return f"{stage.done} {stage.unit}"
    return f"{stage.done}/{stage.total} {stage.unit}"


def _rate(stage: Stage) -> str:
    if not stage.tokens or stage.seconds <= 0:
        return ""
    return f"{format_rate(stage.tokens / stage.seconds)} tok/s"
