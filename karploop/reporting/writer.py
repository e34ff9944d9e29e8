"""Metrics of a run on disk: JSON lines for programs, TensorBoard events for people."""

import json
import math
import numbers
import pathlib
import sys
import time
from typing import Any

from etils import epath

from karploop.files import write_atomic

# It would import torch where that is installed, seconds of every start, to take its tensors too.
_torch, sys.modules["torch"] = sys.modules.get("torch"), None
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event  # noqa: E402
from tensorboardX.summary import scalar  # noqa: E402

del sys.modules["torch"]
if _torch is not None:
    sys.modules["torch"] = _torch


def jsonable(value: Any) -> Any:
    """Copies `value` into plain JSON types; NaN and infinities, which JSON lacks, become None.

    Raises:
      TypeError: a value is no number, string, bool, None, list, tuple or dict.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def write_json_atomic(path: epath.PathLike, obj: Any) -> None:
    """Writes `obj` as JSON so that a reader, or a crash, finds the old file or the new, whole.

    Missing parent directories are made.
    """
    text = json.dumps(jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(epath.Path(path), (text + "\n").encode())


class RunWriter:
    """Appends a run's metrics to `metrics.jsonl` and to events under `tensorboard/`.

    A new writer replaces what an earlier process left in the directory: a resumed run writes the
    metrics of its committed stages again, so nothing is doubled and nothing is lost.
    """

    def __init__(self, directory: pathlib.Path | str):
        directory = pathlib.Path(directory)
        events = directory / "tensorboard"
        events.mkdir(parents=True, exist_ok=True)
        for stale in events.glob("events.out.tfevents.*"):
            stale.unlink()
        self._metrics = (directory / "metrics.jsonl").open("w", encoding="utf-8")
        # Not its SummaryWriter, which hands every number of every step to a thread by a queue.
        self._events: EventsWriter | None = EventsWriter(str(events / "events"))

    def write(self, kind: str, step: int, values: dict[str, float | None], **tags: Any) -> None:
        """Writes one record, which readers see when the call returns (events after `flush`).

        Args:
          kind: what was measured ("train", "eval", "round", …); prefixes the TensorBoard tags.
          step: the horizontal axis in TensorBoard; make it grow within a kind.
          values: metric name -> number on the host, or None where there is none to give. NaN and
            infinities become null.
          **tags: what else the JSON record says (round=2, stage="train"); not in TensorBoard.

        Raises:
          ValueError: a metric has the name of another field of the record.
        """
        record = {"kind": kind, "step": step, **tags}
        taken = record.keys() & values.keys()
        if taken:
            raise ValueError(f"metric names taken by other fields of the record: {sorted(taken)}")
        line = json.dumps(jsonable(record | values), allow_nan=False)
        self._metrics.write(line + "\n")
        self._metrics.flush()
        event = Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            if value is not None:
                event.summary.MergeFrom(scalar(f"{kind}/{name}", float(value)))
        self._events.write_event(event)

    def flush(self) -> None:
        """Shows TensorBoard what has been written."""
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both; a second call does nothing."""
        self._metrics.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
