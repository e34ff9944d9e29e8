"""Lineage against the files themselves: every row that was trained on, followed both ways."""

import collections
import json
import pathlib
import shutil
import subprocess
import sys

import finished_runs
import pyarrow.parquet as pq
import pytest

from experiments.trace import as_text
from karploop import retention
from karploop.catalogue import read_catalogue
from karploop.errors import UserError
from karploop.lineage import trace_params, trace_sample
from karploop.store import Store

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The finished runs, `plain` with a round more, so that descent has several steps."""
    finished = finished_runs.finished(tmp_path_factory.getbasetemp() / "finished_runs")
    where = finished_runs.copy(finished, tmp_path_factory.mktemp("lineage"))
    finished_runs.start(where, "plain", rounds="3")
    return where


@pytest.fixture(scope="module")
def catalogue(workdir):
    return read_catalogue(Store(str(workdir)))


class Files:
    """The same facts, read off the store without the code under test."""

    def __init__(self, workdir):
        self.workdir = workdir
        paths = workdir.glob("store/*/*/manifest.json")
        self.manifests = {(p.parts[-3], p.parts[-2]): json.loads(p.read_text()) for p in paths}
        self._tables = {}

    def rows(self, stage, key, file):
        path = self.workdir / "store" / stage / key / file
        if path not in self._tables:
            self._tables[path] = pq.read_table(path).to_pylist()
        return self._tables[path]

    def input(self, name, role):
        reference = self.manifests[name]["inputs"][role]
        return reference["stage"], reference["key"]

    def sha256(self, name):
        return self.manifests[name]["files"]["params.safetensors"]["sha256"]

    def of(self, *stages):
        return [name for name in self.manifests if name[0] in stages]

    def trained_on(self):
        """(source, row) → {training stage: times}; of a seed row the source is its stage's key."""
        found = collections.defaultdict(dict)
        for name in self.of("warmup", "train"):
            for used in self.rows(*name, "rows.parquet"):
                source = used["source"]
                if source == "seed":
                    source = self.input(name, "seed")[1]
                found[source, used["row"]][name] = used["times"]
        return found

    def below(self, names):
        """Every parameter set on a path of 'params' inputs from one of these."""
        found = set()
        for name in self.of("train"):
            above = name
            while "params" in self.manifests[above]["inputs"]:
                above = self.input(above, "params")
                if above in names:
                    found.add(name)
        return found

    def runs(self, name):
        found = set()
        for path in self.workdir.glob("runs/*/summary.json"):
            for entry in json.loads(path.read_text())["rounds"]:
                for stage, key in entry["stages"].items():
                    if (stage.split(".")[0], key) == name:
                        found.add((path.parent.name, entry["round"]))
        return found


@pytest.fixture(scope="module")
def files(workdir):
    return Files(workdir)


def name_of(entry):
    return entry["stage"], entry["key"]


def runs_of(entry):
    return {(run["run"], run["round"]) for run in entry["runs"]}


def all_samples(files):
    return [
        (n, r) for n in files.of("generate") for r in range(len(files.rows(*n, "samples.parquet")))
    ]


def offset(files, reader, name):
    """Rows that stand before a generate stage's own, where members lie end to end."""
    before = 0
    for member in range(9):
        other = files.input(reader, f"samples_{member}")
        if other == name:
            return before
        before += len(files.rows(*other, "samples.parquet"))
    raise AssertionError


def test_the_runs_under_test_have_what_the_tests_look_for(files):
    """Shared and own stages, kept and dropped rows, scores and missing ones, descent alone."""
    assert len(files.of("warmup")) == 2 and len(files.of("generate")) == 7
    kept = {
        row["kept_S"] for n in files.of("filter") for row in files.rows(*n, "selection.parquet")
    }
    scores = [r["scores"] for n in files.of("judge") for r in files.rows(*n, "verdicts.parquet")]
    assert kept == {True, False} and None in scores and max(s or 0 for s in scores) > 0
    trained = files.trained_on()
    assert any(source != "seed" for source, _ in trained)
    of_samples = [set(d) for (key, _), d in trained.items() if ("generate", key) in files.manifests]
    assert len(of_samples) > 10
    assert any(len(files.below(direct) - direct) > 1 for direct in of_samples)


def test_every_sample_is_traced_to_prompt_weights_verdict_and_decision(catalogue, files):
    for name, row in all_samples(files):
        trace = trace_sample(catalogue, f"{name[1]}:{row}")
        sample = files.rows(*name, "samples.parquet")[row]
        prompts, weights = files.input(name, "prompts"), files.input(name, "params")
        assert trace["sample"]["completion"] == sample["completions"]
        assert trace["sample"]["finished"] == sample["finished_S"]
        assert trace["sample"]["round"] == files.manifests[name]["rng"]["round"]
        assert trace["sample"]["member"] == sample["member_S"]
        assert runs_of(trace["sample"]) == files.runs(name)
        prompt = files.rows(*prompts, "prompts.parquet")[sample["prompt_id_S"]]
        assert trace["prompt"]["text"] == sample["prompts"] == prompt["prompt"]
        assert name_of(trace["prompt"]) == prompts
        assert name_of(trace["weights"]) == weights
        assert trace["weights"]["params_sha256"] == files.sha256(weights)
        readers = {
            reader
            for reader in files.of("filter")
            if name in [files.input(reader, r) for r in files.manifests[reader]["inputs"]]
        }
        assert {name_of(d) for d in trace["decisions"]} == readers
        for decision in trace["decisions"]:
            reader = name_of(decision)
            at = offset(files, reader, name) + row
            selection = files.rows(*reader, "selection.parquet")[at]
            assert (decision["kept"], decision["reason"]) == (
                selection["kept_S"],
                selection["reasons"],
            )
            assert runs_of(decision) == files.runs(reader)
            if "verdicts" not in files.manifests[reader]["inputs"]:
                assert decision["verdict"] is None
                continue
            judge = files.input(reader, "verdicts")
            verdict = files.rows(*judge, "verdicts.parquet")[at]
            assert name_of(decision["verdict"]) == judge
            assert decision["verdict"]["judge"] == "vote"
            assert decision["verdict"]["score"] == verdict["scores"]
            assert decision["verdict"]["reason"] == verdict["reasons"]


def test_every_sample_is_followed_to_exactly_what_it_trained(catalogue, files):
    trained_on = files.trained_on()
    for name, row in all_samples(files):
        trace = trace_sample(catalogue, f"{name[1]}:{row}")
        direct = trained_on.get((name[1], row), {})
        assert {name_of(t): t["times"] for t in trace["trained"]} == direct
        below = files.below(set(direct))
        assert {name_of(t) for t in trace["trained"] if t["descends_too"]} == below & set(direct)
        assert {name_of(t) for t in trace["descended"]} == below - set(direct)
        for entry in [*trace["trained"], *trace["descended"]]:
            assert entry["params_sha256"] == files.sha256(name_of(entry))
            assert runs_of(entry) == files.runs(name_of(entry))
        assert all(t["completion"] == trace["sample"]["completion"] for t in trace["trained"])


def test_seed_rows_are_followed_too(catalogue, files):
    [seed] = files.of("seed")
    trained_on = files.trained_on()
    for row in range(0, len(files.rows(*seed, "examples.parquet")), 7):
        trace = trace_sample(catalogue, f"seed:{row}")
        assert trace["prompt"]["text"] == files.rows(*seed, "examples.parquet")[row]["prompts"]
        assert {name_of(t): t["times"] for t in trace["trained"]} == trained_on[seed[1], row]
    assert trace == trace_sample(catalogue, f"{seed[1][:6]}:{row}")


def test_every_parameter_set_is_traced_to_the_base(catalogue, files):
    for name in files.of("warmup", "train"):
        trace = trace_params(catalogue, files.sha256(name)[:10])
        assert trace == trace_params(catalogue, name[1])
        assert trace["chain_complete"]
        above = [name]
        while "params" in files.manifests[above[-1]]["inputs"]:
            above.append(files.input(above[-1], "params"))
        assert [name_of(link) for link in trace["chain"]] == above
        assert above[-1][0] == "warmup"
        for link in trace["chain"]:
            used = files.rows(*name_of(link), "rows.parquet")
            distinct = collections.Counter(u["source"] for u in used)
            assert {r["source"]: r["distinct"] for r in link["rows"]} == distinct
            assert sum(r["times"] for r in link["rows"]) == sum(u["times"] for u in used)
            assert link["steps"] == 6
            assert runs_of(link) == files.runs(name_of(link))
            for rows in link["rows"]:
                if rows["source"] != "seed":
                    rng = files.manifests["generate", rows["source"]]["rng"]
                    assert (rows["round"], rows["member"]) == (rng["round"], rng["member"])
            filters = [
                i for r, i in files.manifests[name_of(link)]["inputs"].items() if "kept" in r
            ]
            assert {f["key"] for f in link["filters"]} == {i["key"] for i in filters}
        generated = {n for n in files.of("generate") if files.input(n, "params") == name}
        assert {name_of(g) for g in trace["generated"]} == generated
        assert all(g["samples"] == 32 for g in trace["generated"])


@pytest.mark.parametrize("run", finished_runs.RUNS)
def test_every_round_goes_on_from_what_the_round_before_left(workdir, files, run):
    """It samples, trains and measures those very parameters, on all that has been kept so far, and
    learns as fast as the first: neither the base over and over nor a schedule that has run out."""
    base, *rounds = json.loads((workdir / "runs" / run / "summary.json").read_text())["rounds"]
    followed = 0
    for suffix in [name.removeprefix("warmup") for name in base["stages"] if "warmup" in name]:
        params, kept, rates = ("warmup", base["stages"][f"warmup{suffix}"]), [], []
        assert suffix or files.input(("evaluate", base["stages"]["evaluate"]), "params") == params
        for entry in rounds:
            stages = entry["stages"]
            assert files.input(("generate", stages[f"generate{suffix}"]), "params") == params
            if "train" in stages:
                trained = ("train", stages[f"train{suffix}"])
                assert files.input(trained, "params") == params
                kept.append(("filter", stages["filter"]))
                assert [files.input(trained, f"kept_{i}") for i in range(len(kept))] == kept
                assert f"kept_{len(kept)}" not in files.manifests[trained]["inputs"]
                steps = files.rows(*trained, "steps.parquet")
                rates.append([step["learning_rate"] for step in steps])
                params, followed = trained, followed + 1
            assert suffix or files.input(("evaluate", stages["evaluate"]), "params") == params
        assert all(rate == rates[0] for rate in rates) and max(rates[0]) > 0
    assert followed >= 2


def test_kept_counts_are_the_filters(catalogue, files):
    name = next(n for n in files.of("train") if files.manifests[n]["rng"]["round"] == 1)
    for entry in trace_params(catalogue, name[1])["chain"][0]["filters"]:
        selection = files.rows(*name_of(entry), "selection.parquet")
        assert (entry["kept"], entry["of"]) == (sum(r["kept_S"] for r in selection), len(selection))


def test_stages_of_equal_bytes_are_one(workdir, files, tmp_path):
    """A second generate stage that wrote the same bytes shares all that followed from the first."""
    where = finished_runs.copy(workdir, tmp_path)
    name, row = next((n, r) for (n, r) in all_samples(files) if files.trained_on()[n[1], r])
    twin = "f" * 32
    shutil.copytree(where / "store/generate" / name[1], where / "store/generate" / twin)
    path = where / "store/generate" / twin / "manifest.json"
    finished_runs.edit_manifest(path, key=twin)
    catalogue = read_catalogue(Store(str(where)))
    one = trace_sample(catalogue, f"{name[1]}:{row}")
    other = trace_sample(catalogue, f"{twin}:{row}")
    assert other["sample"]["same_content"] == [name[1]]
    assert one["trained"] and one["trained"] == other["trained"]
    assert one["decisions"] == other["decisions"]


def test_a_parent_that_came_out_different_is_not_taken_for_the_old_one(workdir, files, tmp_path):
    where = finished_runs.copy(workdir, tmp_path)
    name = next(n for n in files.of("generate") if files.input(n, "params")[0] == "warmup")
    weights = files.input(name, "params")
    path = where / "store" / "/".join(weights) / "manifest.json"
    written = files.manifests[weights]["files"]
    changed = {"params.safetensors": {"sha256": "0" * 64, "bytes": 1}}
    finished_runs.edit_manifest(path, files=written | changed)
    catalogue = read_catalogue(Store(str(where)))
    trace = trace_sample(catalogue, f"{name[1]}:0")
    assert trace["weights"] is None
    assert "no longer in the store" in as_text(trace)
    trained = next(n for n in files.of("train") if files.input(n, "params") == weights)
    trace = trace_params(catalogue, trained[1])
    assert not trace["chain_complete"] and len(trace["chain"]) == 1


def test_noise_between_filter_and_training_shows(tmp_path, workdir):
    where = finished_runs.copy(workdir, tmp_path)
    noise = dict(noise__rate="1.0", noise__structure="drop")
    finished_runs.start(where, "plain", "noisy", rounds="1", **noise)
    files = Files(where)
    [noisy] = files.of("corrupt")
    given = {(e["source"], e["row"]): e for e in files.rows(*noisy, "examples.parquet")}
    trained = next(n for n in files.of("train") if noisy in _inputs(files, n))
    used = {(u["source"], u["row"]) for u in files.rows(*trained, "rows.parquet")}
    catalogue = read_catalogue(Store(str(where)))
    altered = 0
    for source, row in used & given.keys():
        trace = trace_sample(catalogue, f"{source}:{row}")
        entry = next(t for t in trace["trained"] if name_of(t) == trained)
        assert entry["completion"] == given[source, row]["completions"]
        shown = f"{trained[1][:12]} (round 0), params {files.sha256(trained)[:12]}"
        [line] = [line for line in as_text(trace).splitlines() if shown in line]
        assert ("altered to" in line) == (entry["completion"] != trace["sample"]["completion"])
        altered += "altered to" in line
    assert altered
    [kept] = trace_params(catalogue, trained[1])["chain"][0]["filters"]
    assert kept["filter"] == "none" and kept["altered_by"] == ["/".join(noisy)]


def _inputs(files, name):
    return [files.input(name, role) for role in files.manifests[name]["inputs"]]


# After garbage collection


def test_what_was_collected_is_named_and_the_rest_is_told(workdir, files, tmp_path):
    where = finished_runs.copy(workdir, tmp_path)
    store = Store(str(where))
    policy = retention.Policy(last=0, best=0, samples=True)
    retention.execute(store, retention.plan(read_catalogue(store), policy, set()))
    assert not list(where.glob("store/generate/*/samples.parquet"))
    before, after = read_catalogue(Store(str(workdir))), read_catalogue(store)
    for name, row in all_samples(files)[::3]:
        old = trace_sample(before, f"{name[1]}:{row}")
        new = trace_sample(after, f"{name[1]}:{row}")
        kept = any(d["kept"] for d in old["decisions"])
        assert new["sample"]["collected"] == ["samples.parquet"]
        assert new["weights"]["collected"] == ["params.safetensors"]
        assert new["prompt"] == old["prompt"]
        assert new["sample"]["completion"] == (old["sample"]["completion"] if kept else None)
        assert _without_marks(new["decisions"]) == _without_marks(old["decisions"])
        assert _without_marks(new["trained"]) == _without_marks(old["trained"])
        assert _without_marks(new["descended"]) == _without_marks(old["descended"])
        assert "[collected: params.safetensors]" in as_text(new)
    for name in files.of("train"):
        old, new = trace_params(before, name[1]), trace_params(after, name[1])
        assert _without_marks(old) == _without_marks(new)


def _without_marks(value):
    if isinstance(value, dict):
        return {k: _without_marks(v) for k, v in value.items() if k != "collected"}
    return [_without_marks(v) for v in value] if isinstance(value, list) else value


def test_a_damaged_file_is_a_message(workdir, files, tmp_path):
    where = finished_runs.copy(workdir, tmp_path)
    name, row = all_samples(files)[0]
    (where / "store/generate" / name[1] / "samples.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="samples.parquet.*computed anew"):
        trace_sample(read_catalogue(Store(str(where))), f"{name[1]}:{row}")


# Ids


def test_ids_that_name_nothing_or_too_much(workdir, files, tmp_path):
    catalogue = read_catalogue(Store(str(workdir)))
    key = files.of("generate")[0][1]
    for identity, message in [
        ("no colon", "wants KEY:ROW"),
        (f"{key}:x", "wants KEY:ROW"),
        (f"{key}:-1", "wants KEY:ROW"),
        (f"{key}:32", "rows 0 to 31"),
        (f"{key[:5]}:0", "at least 6"),
        ("000000000:0", "no generate or rationalise or seed stage.*another --workdir"),
        (
            f"{files.of('filter')[0][1]}:0",
            "is filter/.* the key of a generate or rationalise or seed stage",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            trace_sample(catalogue, identity)
    for identity, message in [
        ("abc", "at least 6"),
        ("000000000", "no warmup or import or train or reward stage.*params_sha256_by_member"),
        (key, "is generate/.* wants the key of a warmup or import or train or reward stage"),
    ]:
        with pytest.raises(UserError, match=message):
            trace_params(catalogue, identity)
    with pytest.raises(UserError, match="no store in"):
        read_catalogue(Store(str(tmp_path)))


def test_ambiguous_ids(workdir, files, tmp_path):
    where = finished_runs.copy(workdir, tmp_path)
    # Samples of the base: what is looked up below, of a later round, does not read their damage.
    inputs = {name: files.manifests[name]["inputs"] for name in files.of("generate")}
    generate = next(n for n in inputs if inputs[n]["params"]["stage"] == "warmup")
    for stage, key in (generate, files.of("train")[0], files.of("seed")[0]):
        other = key[:10] + "x" * 22
        shutil.copytree(where / "store" / stage / key, where / "store" / stage / other)
        written = files.manifests[stage, key]["files"]
        changed = {
            file: about | {"sha256": about["sha256"][:10] + "x" * 54}
            for file, about in written.items()
        }
        path = where / "store" / stage / other / "manifest.json"
        finished_runs.edit_manifest(path, key=other, files=changed)
    catalogue = read_catalogue(Store(str(where)))
    with pytest.raises(UserError, match="fits several.*more characters"):
        trace_sample(catalogue, f"{generate[1][:10]}:0")
    with pytest.raises(UserError, match="not one stage"):
        trace_sample(catalogue, "seed:0")
    train = files.of("train")[0]
    for identity in (train[1][:10], files.sha256(train)[:10]):
        with pytest.raises(UserError, match="fits several.*more characters"):
            trace_params(catalogue, identity)
    assert trace_params(catalogue, train[1])["params"]["key"] == train[1]


# The entry point, and stores that are not on a disk


def test_an_object_store_is_read_the_same_way(workdir, files, catalogue):
    remote = Store(str(workdir))
    remote.local = False  # the same bytes through the code for object stores
    for name, row in all_samples(files)[::20]:
        trace = trace_sample(read_catalogue(remote), f"{name[1]}:{row}")
        assert trace == trace_sample(catalogue, f"{name[1]}:{row}")


def test_the_command_prints_json(workdir, files, catalogue):
    name, row = all_samples(files)[0]
    command = [sys.executable, "-m", "experiments.trace", f"--workdir={workdir}"]
    command += [f"--sample={name[1][:8]}:{row}", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == trace_sample(catalogue, f"{name[1]}:{row}")


def test_the_tree_tells_a_person_the_same(catalogue, files):
    name, row = next((n, r) for (n, r) in all_samples(files) if files.trained_on()[n[1], r])
    trace = trace_sample(catalogue, f"{name[1]}:{row}")
    text = as_text(trace)
    assert json.dumps(trace["prompt"]["text"]) in text
    assert trace["weights"]["params_sha256"][:12] in text
    for entry in [*trace["trained"], *trace["descended"], *trace["decisions"]]:
        assert f"{entry['stage']}/{entry['key'][:12]}" in text
        assert entry["runs"][0]["run"] in text
    before, after = text.split("only descend from those")
    assert all(t["key"][:12] in before for t in trace["trained"])
    assert all(t["key"][:12] in after for t in trace["descended"])
    assert not any(t["key"][:12] in after for t in trace["trained"])
