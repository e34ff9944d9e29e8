"""A judge's error is measured: against judges whose faults are known because they are put in."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics

from karploop.errors import UserError
from karploop.judging.calibration import (
    MEASURES,
    Judged,
    agreement,
    calibrate,
    recalibrated,
    reliability,
)
from karploop.oversight.calibration import read_verdicts, report

ROOT = pathlib.Path(__file__).parent.parent
FAULTS = dict(position=0.8, length=0.6, noise=0.7, invalid=0.1, own=0.5)


def simulated(count: int, seed: int, repeats: int = 1, **faults: float) -> Judged:
    """Verdicts of a judge of pairs with given faults, in logits; of `count` pairs.

    The first of a pair is better where its quality is higher. Both orders are asked and averaged.
    """
    rng = np.random.default_rng(seed)
    quality, length = rng.normal(size=(2, count))
    own = rng.integers(2, size=count).astype(float)
    columns = []
    for _ in range(repeats):

        def asked(sign: float) -> np.ndarray:
            logit = 1.5 * quality + sign * faults.get("position", 0.0)
            logit += faults.get("length", 0.0) * length + faults.get("own", 0.0) * own
            logit += faults.get("noise", 0.0) * rng.normal(size=count)
            return 1 / (1 + np.exp(-logit))

        forward, backward = asked(1.0), asked(-1.0)
        lost = rng.random(count) < faults.get("invalid", 0.0)
        forward[lost] = np.nan
        score = (forward + backward) / 2  # one lost order is a lost verdict
        gold = (quality > 0).astype(float)
        columns.append((np.arange(count), score, gold, length, own, forward, backward))
    return Judged(*(np.concatenate(parts) for parts in zip(*columns, strict=True)))


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    """What the measures are of the judge with all faults, on many pairs."""
    rows = simulated(200_000, seed=1, repeats=2, **FAULTS)
    return {name: measure(rows, 0.5) for name, measure in MEASURES.items()}


def test_intervals_hold_what_was_put_in(truth):
    """Of 95% intervals over many small sets, about so many hold the value."""
    held = {name: 0 for name in MEASURES}
    trials = 40
    for trial in range(trials):
        rows = simulated(150, seed=100 + trial, repeats=2, **FAULTS)
        for name, found in calibrate(rows, resamples=120, seed=trial).items():
            held[name] += found.low <= truth[name] <= found.high
    # An error of calibration is biased upward in small sets, for noise in a bin is a distance too;
    # the better of two rates likewise.
    for name in held.keys() - {"ece", "base_rate"}:
        assert held[name] / trials >= 0.85, name


def test_each_fault_shows_in_its_own_measure():
    """A judge with one fault has that one and not the others."""
    clean = calibrate(simulated(3000, 0, repeats=2, noise=0.3), resamples=150)
    for fault, measure in (
        ("position", "position_bias"),
        ("length", "length_bias"),
        ("own", "self_preference"),
        ("invalid", "coverage"),
    ):
        faulty = calibrate(
            simulated(3000, 0, repeats=2, noise=0.3, **{fault: FAULTS[fault]}), resamples=150
        )
        healthy = 1.0 if measure == "coverage" else 0.0
        assert clean[measure].low <= healthy <= clean[measure].high
        assert not faulty[measure].low <= healthy <= faulty[measure].high
        for other in {"position_bias", "length_bias", "self_preference"} - {measure}:
            assert faulty[other].low <= 0.0 <= faulty[other].high, (fault, other)


def test_both_orders_remove_what_one_order_has():
    rows = simulated(20_000, 2, position=1.5)
    one = dataclasses.replace(rows, score_N=rows.forward_N)
    assert np.nanmean(one.score_N) - rows.gold_N.mean() > 0.1
    assert abs(np.nanmean(rows.score_N) - rows.gold_N.mean()) < 0.01
    both, single = (MEASURES["accuracy"](x, 0.5) for x in (rows, one))
    assert both > 0.99 and single < 0.85
    assert MEASURES["order_consistency"](rows, 0.5) < 0.6


def test_a_missing_verdict_is_no_label():
    """Whatever is missing, and whatever its gold is: no measure but coverage moves."""
    rows = simulated(500, 3, noise=0.5)
    before = {name: measure(rows, 0.5) for name, measure in MEASURES.items()}
    more = simulated(500, 4, noise=0.5)
    lost = np.full(500, np.nan)
    more = dataclasses.replace(
        more, sample_N=more.sample_N + 500, score_N=lost, forward_N=lost, backward_N=lost
    )
    both = Judged(*(
        np.concatenate([getattr(r, f.name) for r in (rows, more)])
        for f in dataclasses.fields(Judged)
    ))  # fmt: skip
    for name, measure in MEASURES.items():
        if name == "coverage":
            assert measure(both, 0.5) == 0.5
        else:
            assert measure(both, 0.5) == pytest.approx(before[name], nan_ok=True), name


def test_measures_equal_those_of_a_library():
    rows = simulated(400, 5, noise=1.0)
    decided = (rows.score_N > 0.5).astype(int)
    for name, expected in (
        ("accuracy", metrics.accuracy_score(rows.gold_N, decided)),
        ("kappa", metrics.cohen_kappa_score(rows.gold_N, decided)),
        ("auc", metrics.roc_auc_score(rows.gold_N, rows.score_N)),
    ):
        assert MEASURES[name](rows, 0.5) == pytest.approx(expected)
    other = simulated(400, 6, noise=1.0)
    expected = metrics.cohen_kappa_score(decided, (other.score_N > 0.5).astype(int))
    assert agreement(rows, other) == pytest.approx(expected)


def test_recalibration_mends_a_judge_that_is_too_sure():
    """And by maps that have not seen the sample: on random labels nothing is gained."""
    rows = simulated(3000, 7, noise=2.0)
    sure = dataclasses.replace(rows, score_N=np.clip(2 * rows.score_N - 0.5, 0.001, 0.999))
    before = MEASURES["ece"](sure, 0.5)
    for method in ("platt", "isotonic"):
        mended = recalibrated(sure, method)
        assert MEASURES["ece"](mended, 0.5) < 0.5 * before
        assert MEASURES["auc"](mended, 0.5) == pytest.approx(MEASURES["auc"](sure, 0.5), abs=0.02)
    random = dataclasses.replace(rows, gold_N=np.random.default_rng(0).permutation(rows.gold_N))
    assert abs(MEASURES["auc"](recalibrated(random, "isotonic"), 0.5) - 0.5) < 0.05


def test_edges():
    empty = Judged(*(np.array([np.nan]) if i else np.array([0]) for i in range(7)))
    assert list(calibrate(empty, resamples=10)) == ["coverage"]
    tie = Judged(np.arange(2), np.array([0.5, 0.5]), np.array([0.0, 1.0]), *np.full((4, 2), np.nan))
    assert MEASURES["accuracy"](tie, 0.5) == 0.5 and MEASURES["kappa"](tie, 0.5) == 0.0
    assert reliability(dataclasses.replace(tie, score_N=np.array([1.0, 5.0]))) == []
    assert math.isnan(MEASURES["ece"](dataclasses.replace(tie, score_N=np.array([1.0, 5.0])), 3))


def write(folder: pathlib.Path, judges: dict[str, Judged]) -> str:
    path = folder / "verdicts.jsonl"
    with path.open("w") as file:
        for name, rows in judges.items():
            for i in range(len(rows)):
                row = {"judge": name, "sample": f"s{rows.sample_N[i]}"}
                for field in dataclasses.fields(Judged)[1:]:
                    value = float(getattr(rows, field.name)[i])
                    row[field.name.removesuffix("_N")] = None if math.isnan(value) else value
                file.write(json.dumps(row) + "\n")
    return str(path)


def test_the_command_reports_every_judge(tmp_path):
    judges = {"clean": simulated(120, 8, noise=0.3), "faulty": simulated(120, 8, **FAULTS)}
    source = write(tmp_path, judges)
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.calibrate", f"--input={source}",
            f"--output={tmp_path / 'out'}", "--resamples=100",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/calibration.json").read_text())
    assert found["faulty"]["missing"] == int(np.isnan(judges["faulty"].score_N).sum()) > 0
    assert found["clean"]["measures"]["accuracy"]["mean"] > 0.9
    assert found["clean"]["agreement"]["faulty"] == found["faulty"]["agreement"]["clean"] > 0.5
    assert "ece after isotonic" in found["clean"]["recalibrated"]
    assert (tmp_path / "out/table.md").read_text().strip() in done.stdout
    assert (tmp_path / "out/reliability.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"sample": 1, "gold": 1},
            "line 1: a verdict has 'sample', 'gold' and 'score', no 'score'",
        ),
        ({"sample": 1, "gold": 2, "score": 1}, "'gold' is 2, and 0 or 1 is wanted"),
        ({"sample": 1, "gold": 1, "score": "yes"}, "'score' is 'yes', and a number or null"),
        ({"sample": 1, "gold": 1, "score": float("nan")}, "'score' is nan"),
    ],
)
def test_rows_that_are_no_verdicts_are_refused(tmp_path, row, message):
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        read_verdicts(str(tmp_path / "v.jsonl"))
    assert message in str(caught.value)


def test_the_same_verdicts_give_the_same_report(tmp_path):
    source = write(tmp_path, {"a": simulated(60, 9, **FAULTS)})
    texts = {report(source, tmp_path / name, 0.5, 50, 0) for name in ("one", "two")}
    assert len(texts) == 1
