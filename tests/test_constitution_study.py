"""The ablation of Constitutional AI: what it reads of replies and of policies, and its tables."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import promotion

from experiments import constitution
from karploop.errors import UserError

PROMPT = "not hot, big, old?"


def sample(*replies):
    """A reply and its revisions, as the chain records them."""
    steps = [{"step": "output", "role": "policy", "prompt": PROMPT, "text": replies[0]}]
    for text in replies[1:]:
        steps.append({"step": "critique", "role": "critic", "prompt": "", "text": " oaf"})
        steps.append({"step": "output", "role": "policy", "prompt": "", "text": text})
    return {"prompts": PROMPT, "steps": json.dumps(steps)}


def test_replies_are_counted_after_each_revision(tmp_path):
    rows = [
        sample("icy, wee, new oaf 7!", " icy, wee, new 7!", " icy, wee, new 7"),
        sample("icy, wee, new!", " icy, wee!", " icy, wee"),
        sample("icy!"),  # failed before its revisions
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "samples.parquet")
    found = constitution.revision_metrics(tmp_path / "samples.parquet")
    assert [list(arm.values()) for arm in found.values()] == [
        [2.0, 0.0, 1.0],
        [1.5, 0.0, 0.5],
        [0.5, 0.5, 0.5],
    ]
    assert list(found) == [f"replies, revised {n} times" for n in range(3)]


def test_policies_are_measured_on_requests_and_on_what_else_they_learnt():
    evals = {f"manners/{kind}/nll": kind / 10 for kind in (1, 2, 3, 4)}
    evals |= {f"manners/1/{name}": 0.25 for name in ("violations", "harmless", "pass@1")}
    found = constitution.policy_metrics(evals)
    assert found.pop(constitution.LOSS) == pytest.approx(0.3)
    assert set(found.values()) == {0.25} and len(found) == 3


def test_folders_and_numbers_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        constitution.study(str(tmp_path), str(tmp_path), 0)
    with pytest.raises(UserError, match="--output=gs://there: wants a directory"):
        constitution.study(str(tmp_path), "gs://there", 1)


@pytest.mark.slow
def test_both_ways_are_run_and_tabulated(tmp_path):
    with promotion():
        text = constitution.study(str(tmp_path / "w"), str(tmp_path / "out"), 1, "tiny")
    for arm in ("base", "replies, revised 1 times", "then by DPO", "then by reward model"):
        assert arm in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.tex", "table.csv", "table.png"}
    assert len(list((tmp_path / "w/store/warmup").iterdir())) == 1, "both begin alike"
