"""Metrics on disk: every line is JSON, a new process replaces, a crash leaves whole files."""

import json
import os
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from karploop.reporting.writer import RunWriter, jsonable, write_json_atomic


def lines(directory) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def scalars(directory) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all event files."""
    return [(v.tag, e.step, v.simple_value) for e in events(directory) for v in e.summary.value]


def events(directory) -> list[Event]:
    """Of all event files; the record format is length, crc, bytes, crc."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_records_and_events(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write("train", 7, {"loss": np.float32(0.5), "tokens": np.int64(4096)}, round=2)
        assert lines(tmp_path) == [
            {"kind": "train", "step": 7, "round": 2, "loss": 0.5, "tokens": 4096}
        ], "a record must be readable before the writer is closed"
    assert scalars(tmp_path) == [("train/loss", 7, 0.5), ("train/tokens", 7, 4096.0)]


def test_a_step_is_one_event_and_is_there_after_a_flush(tmp_path):
    before = time.time()
    with RunWriter(tmp_path) as writer:
        writer.write("train", 3, {"loss": 0.5, "tokens": 4096})
        writer.write("train", 4, {"loss": 0.25, "tokens": 4096})
        writer.flush()
        start, *steps = events(tmp_path)
    assert start.file_version, "TensorBoard tells an event file by its first record"
    assert [(e.step, len(e.summary.value)) for e in steps] == [(3, 2), (4, 2)]
    assert all(before <= e.wall_time <= time.time() for e in steps)


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    with RunWriter(tmp_path) as writer:
        writer.write("train", 0, {"loss": 1.0})
        with monkeypatch.context() as full, pytest.raises(OSError, match="disk full"):
            full.setattr(os, "fsync", fail)
            writer.flush()


def test_what_is_no_number_becomes_null(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write("round", 0, {"a": float("nan"), "b": float("inf"), "c": None})
    assert lines(tmp_path) == [{"kind": "round", "step": 0, "a": None, "b": None, "c": None}]
    assert [tag for tag, _, _ in scalars(tmp_path)] == ["round/a", "round/b"]


def test_a_new_process_replaces_what_the_last_one_wrote(tmp_path):
    for steps in (range(3), range(2)):
        writer = RunWriter(tmp_path)
        for step in steps:
            writer.write("train", step, {"loss": 1.0})
        writer.close()
        writer.close()  # harmless
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert [step for _, step, _ in scalars(tmp_path)] == [0, 1]


def test_a_metric_may_not_hide_a_field(tmp_path):
    with RunWriter(tmp_path) as writer, pytest.raises(ValueError, match="round"):
        writer.write("train", 0, {"round": 1.0}, round=3)
    assert lines(tmp_path) == []


def test_jsonable_refuses_arrays():
    with pytest.raises(TypeError):
        jsonable({"a": np.zeros(3)})


def test_write_json_atomic_round_trip(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_json_atomic(path, {"rounds": ({"round": -1, "evals": {"a/1/b": np.float64(0.25)}},)})
    assert json.loads(path.read_text()) == {"rounds": [{"round": -1, "evals": {"a/1/b": 0.25}}]}
    assert os.listdir(path.parent) == ["summary.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"rounds": 1})

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json_atomic(path, {"rounds": 2})
    assert json.loads(path.read_text()) == {"rounds": 1}
