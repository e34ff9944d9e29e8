"""Tasks from TensorFlow Datasets: "tfds/NAME[/CONFIG][:SPLIT]?prompt=FIELD&answer=FIELD".

Read through `tfds.data_source`, which does without TensorFlow for data sets that were prepared in a
format with random access (array_record, parquet). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from karploop.data.tasks.address import FIELDS, check_known, parse, problems
from karploop.data.tasks.dataset import DatasetTask
from karploop.errors import UserError

PREFIX = "tfds/"
_INSTALL = "pip install tensorflow-datasets array_record"


def tfds_task(name: str) -> DatasetTask:
    """The problems of a prepared data set, read when first needed; the split is "train" by default.

    A class label is read as its name, other numbers as they are. Further parameters: `data_dir`,
    where data sets are prepared; `conflicts`, see `DatasetTask`; and `name`, the task's name in
    metrics, which also salts the held-out split.

    Raises:
      UserError: the name or a parameter is missing or unknown. When first read: the package is not
        installed, the data set is not prepared, or its fields are others.
    """
    address, parameters = parse(name.removeprefix(PREFIX))
    check_known(name, parameters, (*FIELDS, "data_dir", "conflicts", "name"))
    dataset, colon, split = address.partition(":")
    if not dataset or (colon and not split) or "prompt" not in parameters:
        raise UserError(
            f"task {name!r}: write 'tfds/NAME[/CONFIG][:SPLIT]?prompt=FIELD&answer=FIELD'"
        )
    fields = {role: parameters[role] for role in FIELDS if role in parameters}
    data_dir = parameters.get("data_dir")
    return DatasetTask(
        parameters.get("name", name),
        load=lambda: problems(name, _rows(name, dataset, split or "train", data_dir), fields),
        conflicts=parameters.get("conflicts", "refuse"),
    )


def _rows(
    name: str, dataset: str, split: str, data_dir: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import array_record  # noqa: F401  What reads the files: found missing here, not inside.
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"task {name!r}: the package '{error.name}' is missing; install it with: {_INSTALL}"
        ) from error
    try:
        rows = tfds.data_source(dataset, split=split, data_dir=data_dir, download=False)
        features = rows.dataset_info.features
        length = len(rows)
    except Exception as error:  # The kinds are many, from a typing mistake to a format.
        reason = str(error).strip().partition("\n")[0]
        where = f"'{data_dir}'" if data_dir else "the default folder (~/tensorflow_datasets)"
        raise UserError(
            f"task {name!r}: no split {split!r} of {dataset!r} can be read in {where}: {reason} "
            f"({type(error).__name__}). Prepare it once where there is a network: "
            f"tfds.builder({dataset!r}, file_format='array_record', data_dir=…)"
            ".download_and_prepare()"
        ) from error
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    for i in range(length):
        row = {key: _plain(value) for key, value in rows[i].items()}
        for key in labels:  # -1 stands for an unknown label, as in a test split without them
            row[key] = features[key].int2str(row[key]) if row[key] >= 0 else None
        yield f"row {i}", row


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's, bytes as text; anything else as it is."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    return value.decode() if isinstance(value, bytes) else value
