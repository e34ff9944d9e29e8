"""Records as tables and back, and the samples of several members laid end to end."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hand_made import samples

from karploop.records import SAMPLES_FILE, Examples, HintedSamples, Samples
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.stages import Artifact, Stages
from karploop.store import Store

ONE = samples([(0, 0, "3", True), (1, 0, "", False)], difficulty=[4, 5])
TWO = samples([(0, 1, "27", True)], difficulty=[6])


class Kept(Artifact):
    """A file in a folder, without the store around it."""

    def path(self, name):
        return self.store / name


def kept(folder, table) -> Artifact:
    folder.mkdir()
    pq.write_table(table, folder / SAMPLES_FILE)
    return Kept(manifest=None, store=folder, recompute=lambda: None)


@pytest.fixture
def inputs(tmp_path):
    hinted = HintedSamples(**vars(TWO), hinted=["02=27 02="])
    own, other = kept(tmp_path / "0", ONE.to_table()), kept(tmp_path / "1", hinted.to_table())
    return {"samples_0": own, "samples_1": other, "selection": own}


def same(one, other):
    for f in dataclasses.fields(one):
        ours, theirs = getattr(one, f.name), getattr(other, f.name)
        assert type(ours) is type(theirs) and len(ours) == len(theirs), f.name
        assert all(a == b for a, b in zip(ours, theirs, strict=True)), f.name


@pytest.mark.parametrize("record", [ONE, TWO, Samples.empty(), Examples.empty()])
def test_a_record_is_what_its_table_says(record):
    same(type(record).from_table(record.to_table()), record)


def test_numbers_in_lists_are_those_of_arrow_also_in_parts_of_a_table():
    table = pa.concat_tables([ONE.to_table(), TWO.to_table(), ONE.to_table()])
    for part in (table, table.slice(1, 2), table.slice(2), table.slice(4)):
        found = Samples.from_table(part)
        assert found.tokens == part.column("tokens").to_pylist()
        assert found.logprobs == part.column("logprobs").to_pylist()
    assert {type(n) for row in found.tokens + ONE.tokens for n in row} == {int}


def test_a_stage_keeps_real_numbers_byte_by_byte_and_the_rest_by_dictionary(tmp_path):
    table = ONE.to_table().append_column("score", pa.array([None, math.nan], pa.float64()))
    stages = Stages(Store(str(tmp_path), print), Progress(quiet=True))
    stages.store.open()
    made = stages.run(
        "generate",
        lambda context: context.write_table(SAMPLES_FILE, table),
        config={},
        inputs={},
        rng=Rng(0, 0, 0),
    )
    found = made.table(SAMPLES_FILE)
    same(Samples.from_table(found), ONE)
    assert found["score"][0].as_py() is None and math.isnan(found["score"][1].as_py())
    group = made.metadata(SAMPLES_FILE).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    split = {c.path_in_schema for c in columns if "BYTE_STREAM_SPLIT" in c.encodings}
    assert split == {"logprobs.list.element", "entropy_S", "score"}
    by_dictionary = {c.path_in_schema for c in columns if c.has_dictionary_page}
    assert {"prompts", "tokens.list.element"} <= by_dictionary and not by_dictionary & split


def test_members_are_gathered_in_order_with_hints_or_without(inputs):
    same(Samples.gather(inputs), Samples.concatenate([ONE, TWO]))
    assert Samples.by_hint(inputs).tolist() == [False, False, True]
    np.testing.assert_array_equal(Samples.difficulties(inputs), [4, 5, 6])
