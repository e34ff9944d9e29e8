"""Metrics of a run on disk: JSON lines for programs, TensorBoard events for people."""

import json
import math
import numbers
import pathlib
import sys
from typing import Any

from etils import epath

from karploop.files import write_atomic

# It would import torch where that is installed, seconds of every start, to take its tensors too.
_torch, sys.modules["torch"] = sys.modules.get("torch"), None
from tensorboardX import SummaryWriter  # noqa: E402

del sys.modules["torch"]
if _torch is not None:
    sys.modules["torch"] = _torch

_TENSORBOARD_FLUSH_SECONDS = 10


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
        self._events = SummaryWriter(str(events), flush_secs=_TENSORBOARD_FLUSH_SECONDS)

    def write(self, kind: str, step: int, values: dict[str, float | None], **tags: Any) -> None:
        """Writes one record, on disk when the call returns (events some seconds later).

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
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(f"{kind}/{name}", float(value), step)

    def close(self) -> None:
        """Flushes and closes both; a second call does nothing."""
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
