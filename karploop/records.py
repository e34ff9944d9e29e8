"""The records that cross stage borders: columns of equal length, stored as Parquet.

Each field has one meaning; the suffix S stands for one row a sample. A row's number within its
table is its identity: verdicts and selections are aligned with the samples they speak of, and a
sample's global name is `<generate key>:<row>`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from karploop.stages import Artifact

SAMPLES_FILE = "samples.parquet"
VERDICTS_FILE = "verdicts.parquet"
SELECTION_FILE = "selection.parquet"
EXAMPLES_FILE = "examples.parquet"
PAIRS_FILE = "pairs.parquet"
LABELLED_FILE = "labelled.parquet"
EPISODES_FILE = "episodes.parquet"
PROMPTS_FILE = "prompts.parquet"
HINTED_FILE = "hinted.parquet"
HELD_OUT_FILE = "held_out.parquet"

IntColumn = FloatColumn = BoolColumn = np.ndarray  # of int64, float64, bool

_ARROW_TYPES = {
    "IntColumn": pa.int64(),
    "FloatColumn": pa.float64(),
    "BoolColumn": pa.bool_(),
    "list[str]": pa.string(),
    "list[float | None]": pa.float64(),
    "list[list[int]]": pa.list_(pa.int64()),
    "list[list[float]]": pa.list_(pa.float64()),
}


class Record:
    """Conversion of a dataclass of columns to and from an Arrow table."""

    def __post_init__(self):
        lengths = {f.name: len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{type(self).__name__}: columns differ in length: {lengths}")

    def __len__(self) -> int:
        return len(getattr(self, dataclasses.fields(self)[0].name))

    def to_table(self) -> pa.Table:
        """Columns of fixed types, so that a table without rows still has them."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return pa.table(columns, schema=self._schema())

    @classmethod
    def empty(cls):
        """The record without rows."""
        return cls.from_table(cls._schema().empty_table())

    @classmethod
    def columns(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def _schema(cls) -> pa.Schema:
        return pa.schema([(f.name, _ARROW_TYPES[f.type]) for f in dataclasses.fields(cls)])

    def take(self, rows: np.ndarray):
        """The record of these rows alone, in the order in which they are given."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(
            **{
                name: column[rows] if isinstance(column, np.ndarray) else [column[r] for r in rows]
                for name, column in columns.items()
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table):
        columns = {}
        for f in dataclasses.fields(cls):
            column = table.column(f.name)
            if f.type.endswith("Column"):
                columns[f.name] = column.to_numpy()
            else:
                of_lists = pa.types.is_list(column.type)
                columns[f.name] = _lists(column) if of_lists else column.to_pylist()
        return cls(**columns)

    @classmethod
    def concatenate(cls, records):
        return cls.from_table(pa.concat_tables([r.to_table() for r in records]))


@dataclass(frozen=True)
class Problems(Record):
    """Prompts with gold answers: seed data and held-out sets. Filters never see one."""

    difficulty_S: IntColumn
    prompts: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Samples(Record):
    """Sampled completions."""

    prompt_id_S: IntColumn  # equal for the samples of one prompt
    sample_S: IntColumn  # 0 … samples a prompt − 1
    member_S: IntColumn  # which of the independently seeded models wrote it
    difficulty_S: IntColumn  # difficulty that was asked for
    prompts: list[str]
    completions: list[str]  # text up to the stop token
    finished_S: BoolColumn  # the stop token was reached
    tokens: list[list[int]]  # completion's token ids, stop token included
    logprobs: list[list[float]]  # unfiltered log-probability of each of them
    entropy_S: FloatColumn  # mean entropy of the next-token distribution, nats a token

    @classmethod
    def gather(cls, inputs: Mapping[str, Artifact]) -> Samples:
        """The samples of all members, laid end to end: inputs 'samples_0', 'samples_1', …"""
        tables = [a.table(SAMPLES_FILE, cls.columns()) for a in _members(inputs)]
        return cls.from_table(pa.concat_tables(tables))

    @staticmethod
    def difficulties(inputs: Mapping[str, Artifact]) -> np.ndarray:
        """difficulty_S of the gathered rows, without the rest of them."""
        tables = [a.table(SAMPLES_FILE, ["difficulty_S"]) for a in _members(inputs)]
        return pa.concat_tables(tables).column("difficulty_S").to_numpy()

    @staticmethod
    def by_hint(inputs: Mapping[str, Artifact]) -> np.ndarray:
        """Which of the gathered rows the model wrote with the gold answer as a hint, hinted_S."""
        found = [artifact.metadata(SAMPLES_FILE) for artifact in _members(inputs)]
        hinted = ["hinted" in metadata.schema.names for metadata in found]
        return np.repeat(hinted, [metadata.num_rows for metadata in found])

    @staticmethod
    def origins(inputs: Mapping[str, Artifact]) -> list[tuple[str, int]]:
        """For each gathered row, the key of the stage that wrote it and its row there."""
        return [
            (artifact.manifest.key, row)
            for artifact in _members(inputs)
            for row in range(artifact.metadata(SAMPLES_FILE).num_rows)
        ]


@dataclass(frozen=True)
class HintedSamples(Samples):
    """Completions that were sampled from other prompts than those they are filed under."""

    hinted: list[str]  # what was asked: the prompt with its gold answer as a hint


@dataclass(frozen=True)
class Verdicts(Record):
    """A judge's word on each sample. No verdict is a missing score, never a number."""

    scores: list[float | None]
    reasons: list[str]  # why there is no score; '' where there is one

    @property
    def score_S(self) -> np.ndarray:
        """Scores as float64, NaN where there is none (NaN compares false with everything)."""
        return np.array([math.nan if s is None else s for s in self.scores], np.float64)


@dataclass(frozen=True)
class Votes(Verdicts):
    """The word of a vote, with the answer that each sample was counted for."""

    answers: list[str]  # the same where two wordings are one answer; '' where there is none


@dataclass(frozen=True)
class Opinions(Verdicts):
    """The word of a judge that is a model, with what it was made of."""

    judges: list[str]  # who it was, with a hash of weights or address, of texts and of settings
    criteria: list[str]  # JSON: criterion or principle → score
    rationales: list[str]  # JSON: what was written before the answers
    forward: list[float | None]  # of comparisons: the mean score when shown first …
    backward: list[float | None]  # … and second
    tokens_in: IntColumn
    tokens_out: IntColumn
    dollars: FloatColumn
    seconds: FloatColumn  # that an endpoint took; on the mesh rows share a pass, and it is 0


def read_verdicts(artifact: Artifact) -> Verdicts:
    """What a judge said, with all that it was made of: Opinions of a model, or Votes."""
    table = artifact.table(VERDICTS_FILE)
    for kind, column in ((Opinions, "forward"), (Votes, "answers")):
        if column in table.column_names:
            return kind.from_table(table)
    return Verdicts.from_table(table)


@dataclass(frozen=True)
class Selection(Record):
    """A filter's decision on each sample, with its reason."""

    kept_S: BoolColumn
    reasons: list[str]


@dataclass(frozen=True)
class Pairs(Record):
    """Completions of one prompt by two, of which a judge calls one better; P is a row a pair."""

    prompt_id_P: IntColumn
    prompts: list[str]
    chosen_P: IntColumn  # the better one's row among the samples …
    rejected_P: IntColumn  # … and the worse one's
    difficulty_P: IntColumn
    margin_P: FloatColumn  # by how much their scores differ, above 0
    member_P: IntColumn  # which of the independently seeded models wrote the better one


@dataclass(frozen=True)
class Examples(Record):
    """Rows to train on, each with where it came from."""

    prompts: list[str]
    completions: list[str]
    difficulty: IntColumn
    source: list[str]  # 'seed', or the key of the generate stage that wrote the completion
    row: IntColumn  # the row in that stage's table


@dataclass(frozen=True)
class Contrasts(Record):
    """A better and a worse completion of one prompt, each with where it came from."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    difficulty: IntColumn
    margin: FloatColumn  # the better one's score minus the worse one's; NaN where nobody judged
    chosen_source: list[str]  # 'seed', or the key of the generate stage that wrote it
    chosen_row: IntColumn  # the row in that stage's table
    rejected_source: list[str]
    rejected_row: IntColumn


@dataclass(frozen=True)
class Labelled(Record):
    """Completions that are good or bad by themselves."""

    prompts: list[str]
    completions: list[str]
    desirable: BoolColumn
    difficulty: IntColumn
    source: list[str]  # the key of the generate stage that wrote it
    row: IntColumn  # the row in that stage's table


@dataclass(frozen=True)
class Episodes(Record):
    """Sampled tokens, and how much better each was than what else might have been."""

    prompts: list[str]
    tokens: list[list[int]]  # as sampled, the stop token included where one was drawn
    logprobs: list[list[float]]  # unfiltered log-probability of each, when it was sampled
    advantages: list[list[float]]  # of each; the same for all, where completions were compared
    difficulty: IntColumn
    source: list[str]  # the key of the generate stage that wrote it
    row: IntColumn  # the row in that stage's table


def _lists(column: pa.ChunkedArray) -> list[list]:
    """A column of lists of numbers, as lists; Arrow's own way takes ten times as long."""
    rows = []
    for chunk in column.chunks:
        numbers = chunk.values.to_numpy(zero_copy_only=False).tolist()
        borders = chunk.offsets.to_numpy().tolist()
        rows += [numbers[start:stop] for start, stop in itertools.pairwise(borders)]
    return rows


def _members(inputs: Mapping[str, Artifact]) -> list[Artifact]:
    count = sum(name.startswith("samples_") for name in inputs)
    return [inputs[f"samples_{member}"] for member in range(count)]
