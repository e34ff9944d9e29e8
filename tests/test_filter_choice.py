"""Which filter a run takes, whose verdicts it reads, what makes its stage, and gold as a mark."""

import json
import pathlib
import types

import pyarrow.parquet as pq
import pytest
from finished_runs import start

from experiments import table, trace
from karploop import fingerprint as fp
from karploop.catalogue import _may_belong, read_catalogue
from karploop.config import Config
from karploop.errors import UserError
from karploop.filtering.choice import at_round, choose, judge_name, settings
from karploop.filtering.filters import decide, get_filter, register
from karploop.lineage import trace_sample
from karploop.reporting.model_card import model_card
from karploop.reporting.tables import run_table
from karploop.resolve import resolve
from karploop.schema import to_dict
from karploop.store import Store


def config(name: str, judge: str = "", **keys) -> Config:
    return resolve({"filter": {"name": name} | keys, "judge": {"name": judge}})


def judge_of(*args, **keys) -> str:
    asked = config(*args, **keys)
    return judge_name(asked, *choose(asked))


@pytest.mark.parametrize(
    "name, judge, keys, read",
    [
        ("none", "", {}, ""),
        ("verifier", "", {}, "verifier"),
        ("chain(vote, near_duplicates, cap)", "", {}, "vote"),
        ("chain(threshold, cap)", "rubric", {}, "rubric"),
        ("chain(verifier, top_k)", "verifier", {}, "verifier"),
        ("random", "", {"match": "chain(vote, cap)"}, "vote"),
        ("random", "rubric", {"match": "best"}, "rubric"),
        ("quantile", "vote", {"match": "vote"}, "vote"),
        ("chain(threshold, oracle)", "rubric", {"allow_gold": True}, "rubric"),
        ("oracle", "pairwise", {"match": "best", "allow_gold": True}, "pairwise"),
    ],
)
def test_the_one_judge_that_a_filter_reads(name, judge, keys, read):
    assert judge_of(name, judge, **keys) == read


@pytest.mark.parametrize(
    "name, judge, keys, message",
    [
        ("chain(verifier, threshold)", "rubric", {}, "take 'oracle' in place of 'verifier'"),
        ("all_of(verifier, vote)", "", {}, "judges 'verifier' and 'vote'"),
        ("quantile", "rubric", {"match": "vote"}, "judges 'rubric' and 'vote'"),
        ("chain(verifier, top_k)", "", {}, "says nobody's: set it to one of verifier"),
        ("chain(duplicates, cap)", "rubric", {}, "reads no judge"),
        ("chain(vote, cap)", "rubric", {}, "reads the judge 'vote'"),
        ("oracle", "", {}, "set 'config.filter.allow_gold=True'"),
        ("random", "", {"match": "chain(oracle, cap)"}, "set 'config.filter.allow_gold=True'"),
        ("random", "", {"match": "verifer"}, "'config.filter.match' is 'verifer': did you mean"),
        ("cap", "", {"match": "verifier"}, "'cap' does not let it"),
        ("chain(random, cap)", "", {"match": "verifier"}, "a filter by itself"),
        ("vote", "", {"votes": 3}, "is 3, and 1 vote on a prompt"),
    ],
)
def test_filters_that_do_not_go_together_are_refused(name, judge, keys, message):
    with pytest.raises(UserError, match=message):
        judge_of(name, judge, **keys)


def test_the_threshold_rises_by_round_to_its_end():
    rising = config("threshold", "rubric", threshold=0.5, threshold_step=0.1, threshold_last=0.75)
    found = [at_round(rising, index).threshold for index in range(5)]
    assert found == [0.5, 0.6, 0.7, 0.75, 0.75]
    # The third is 0.7 and not 0.7000000000000001, which a score of 0.7 would miss.
    assert at_round(config("threshold", "rubric", threshold=0.3), 4).threshold == 0.3


def test_a_number_of_votes_is_their_share_of_those_who_vote():
    keys = {"filter": {"name": "vote", "votes": 3, "agreement": 0.9}, "generate": {"samples": 5}}
    assert at_round(resolve(keys), 0).agreement == 0.6
    pooled = keys | {"members": 2, "judge": {"voters": "members"}}
    assert at_round(resolve(pooled), 0).agreement == 0.3


def made_of(name: str, judge: str = "", index: int = 0, **keys) -> dict:
    asked = config(name, judge, **keys)
    return settings(*choose(asked), at_round(asked, index))


def test_only_keys_that_are_read_make_a_stage():
    assert made_of("none", rate=0.1) == {"name": "none"}
    assert made_of("length", slack=2, cap=7) == {"name": "length", "slack": 2}
    assert made_of("chain(vote,cap)", votes=1, cap=2) == {
        "name": "chain(vote,cap)", "agreement": 1.0, "cap": 2, "missing": "drop",
    }  # fmt: skip
    matched = {"name": "best", "missing": "drop"}
    assert made_of("random", "rubric", match="best", rate=0.1, cap=3) == {
        "name": "random", "match": "best", "matched": matched,
    }  # fmt: skip
    # Rounds in which the threshold is the same share what is in the store.
    rising = dict(threshold_step=0.3, threshold_last=0.8)
    steps = [made_of("threshold", "rubric", index, **rising) for index in range(3)]
    assert steps[0] != steps[1] == steps[2]
    assert made_of("threshold", "rubric") == steps[0]


def test_a_filter_that_declares_nothing_is_made_anew_by_every_key():
    @register("undeclared")
    def undeclared(samples, verdicts, config, rng):
        return decide(samples, kept="kept")

    plain = made_of("undeclared")
    assert plain != made_of("undeclared", slack=3) and plain != made_of("undeclared", cap=3)
    assert plain == made_of("undeclared", on_empty="skip", allow_gold=True)
    assert set(plain) >= {"rate", "threshold", "missing", "similarity"}
    assert made_of("chain(undeclared, cap)", slack=3) != made_of("chain(undeclared, cap)")


def test_only_the_code_of_its_theme_is_behind_a_filters_stage():
    closure = fp.closure(["karploop.filtering.select", *get_filter("vote").modules])
    themes = {name.rpartition(".")[2] for name in closure if ".filtering." in name}
    assert themes == {"select", "registry", "by_score"}
    more = get_filter("chain(vote, near_duplicates)").modules
    assert set(more) == {f"karploop.filtering.{n}" for n in ("composition", "by_score", "by_text")}


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "chain(none,cap)"},
        {"name": "random", "match": "length"},
        {"name": "vote", "votes": 1},
        {"name": "all_of(threshold)", "threshold_step": 0.2},
    ],
)
def test_garbage_collection_finds_the_filters_of_a_run_that_goes_on(changed):
    """Also where a round's settings are not those of the config to the letter."""
    asked = config(**changed, judge="vote")
    for index in range(2):
        made = settings(*choose(asked), at_round(asked, index))
        rng = {"seed": asked.seed, "member": 0, "round": index}
        manifest = types.SimpleNamespace(stage="filter", rng=rng, config=made)
        assert _may_belong(manifest, to_dict(asked))
        manifest.config = made | {"name": "other"}
        assert not _may_belong(manifest, to_dict(asked))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A plain run, one with other settings of filters that it has not, and one that sees gold."""
    workdir = tmp_path_factory.mktemp("w")
    for run, changed in {
        "plain": {},
        "slack": {"filter__slack": "7", "filter__cap": "2"},
        "oracle": {"filter__name": "oracle", "filter__allow_gold": "true"},
    }.items():
        start(workdir, "plain", run, rounds="1", **changed)
    return workdir


def summary(workdir: pathlib.Path, run: str) -> dict:
    return json.loads((workdir / "runs" / run / "summary.json").read_text())


def test_arms_that_differ_in_a_key_that_is_not_read_share_their_stages(workdir):
    one, other = (
        [entry["stages"] for entry in summary(workdir, run)["rounds"]] for run in ("plain", "slack")
    )
    assert one == other and "filter" in one[1]


def test_a_run_that_gold_selects_for_says_so_wherever_it_is_read(workdir):
    plain, seeing = summary(workdir, "plain"), summary(workdir, "oracle")
    said = seeing["diagnostic"]
    assert "diagnostic" not in plain and "the filter 'oracle' selects by gold labels" in said
    assert said in run_table(seeing) and "gold" not in run_table(plain)
    assert said in (workdir / "runs/oracle/accuracy.txt").read_text()
    by_round = [entry["metrics"]["selected_by_gold"] for entry in seeing["rounds"]]
    assert by_round == [0.0, 1.0]
    assert "selected_by_gold" in (workdir / "runs/oracle/metrics.jsonl").read_text()
    assert "selected_by_gold" not in (workdir / "runs/plain/metrics.jsonl").read_text()
    names = [group.name for group in table.run_groups(workdir)]
    assert [name.endswith(" (selects by gold)") for name in names] == ["oracle" in n for n in names]
    card = model_card(
        config=json.loads((workdir / "runs/oracle/config.json").read_text()),
        summary=seeing, environment={}, round=0, base="b", files={}, params_sha256="0",
        adapter=False,
    )  # fmt: skip
    assert f"Not a result: {said}." in card


def test_gold_comes_from_the_verifiers_stage_and_is_in_the_trace(workdir):
    stages = summary(workdir, "oracle")["rounds"][1]["stages"]
    path = workdir / "store/filter" / stages["filter"] / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["config"] == {"name": "oracle", "count": -1, "missing": "drop"}
    assert manifest["inputs"]["gold"]["stage"] == "judge" and "verdicts" not in manifest["inputs"]
    gold = workdir / "store/judge" / manifest["inputs"]["gold"]["key"]
    right = [s == 1.0 for s in pq.read_table(gold / "verdicts.parquet")["scores"].to_pylist()]
    reasons = pq.read_table(path.parent / "selection.parquet")["reasons"].to_pylist()
    wrong = [reason in ("did not end", "wrong by gold") for reason in reasons]
    assert wrong == [not each for each in right] and "wrong by gold" in reasons
    found = trace_sample(read_catalogue(Store(str(workdir))), f"{stages['generate']}:0")
    assert "gold labels select: judge 'verifier': score" in trace.as_text(found)
    by_filter = {d["filter"]: d for d in found["decisions"]}
    assert by_filter["none"]["gold"] is None
    assert by_filter["oracle"]["gold"]["judge"] == "verifier"
    assert found["other_verdicts"] == []
