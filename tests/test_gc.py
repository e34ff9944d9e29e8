"""Garbage collection on real runs: what goes, what stays, and that runs do not notice."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import finished_runs
import pytest

from experiments.gc import collect
from karploop import launch, retention
from karploop.catalogue import read_catalogue
from karploop.errors import UserError
from karploop.reporting.progress import Progress
from karploop.retention import Policy
from karploop.stages import Rng, Stages
from karploop.store import COLLECTED, Store

ROOT = pathlib.Path(__file__).parent.parent
PARAMS, SAMPLES = "params.safetensors", "samples.parquet"
NOTHING = Policy(last=0, best=0)  # keep the parameters of no finished run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return finished_runs.finished(tmp_path_factory.getbasetemp() / "finished_runs")


@pytest.fixture
def workdir(finished, tmp_path):
    return finished_runs.copy(finished, tmp_path)


def gc(workdir, policy=Policy(), dry_run=False):  # noqa: B008 - frozen
    return collect(Store(str(workdir)), policy, dry_run=dry_run)


def tree(folder):
    """Every file and folder below, with its bytes' hash and its time."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    }


def contents(folder):
    return {name: sha256 for name, (sha256, _) in tree(folder).items() if sha256}


def summary(workdir, run):
    return json.loads((workdir / "runs" / run / "summary.json").read_text())


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def stages(workdir, run, *rounds):
    """The stages that a run's summary names, of all rounds or of some."""
    return {
        (stage.split(".")[0], key)
        for entry in summary(workdir, run)["rounds"]
        if not rounds or entry["round"] in rounds
        for stage, key in entry["stages"].items()
    }


def trained(workdir, run, *rounds):
    return {name for name in stages(workdir, run, *rounds) if name[0] in ("warmup", "train")}


def holding(workdir, file):
    """The stages that still have this file."""
    return {path.parts[-3:-1] for path in workdir.glob(f"store/*/*/{file}")}


def entries(workdir):
    return {path.parts[-2:] for path in workdir.glob("store/*/*")}


def orphan(workdir, key="0" * 32):
    """An entry that no run refers to, with its provenance: a stage of a run with another seed."""
    source = min((workdir / "store/train").iterdir())
    shutil.copytree(source, workdir / "store/train" / key)
    path = workdir / "store/train" / key / "manifest.json"
    finished_runs.edit_manifest(path, key=key, rng={"seed": 7, "member": 0, "round": 0})
    (workdir / "provenance/train" / f"{key}.json").write_text("{}")
    return "train", key


class held:
    """A run's lock, held by another process for the length of a `with` block."""

    def __init__(self, workdir, name):
        code = (
            "import sys; from karploop.store import Store\n"
            "with Store(sys.argv[1]).lock(sys.argv[2], wait=False):\n"
            "    print('held', flush=True); sys.stdin.read()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(workdir), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "held\n"

    def __exit__(self, *unused):
        self.process.communicate()


# What goes and what stays


def test_the_last_rounds_of_every_run_stay_for_all_members(workdir):
    before = contents(workdir / "store")
    gc(workdir)  # the configs say last=1, best=0
    kept = set().union(*(trained(workdir, run, 1) for run in finished_runs.RUNS))
    everything = set().union(*(trained(workdir, run) for run in finished_runs.RUNS))
    assert len(kept) == 4 and len(everything) == 10
    assert holding(workdir, PARAMS) == kept
    assert holding(workdir, COLLECTED) == everything - kept
    gone = {f"{stage}/{key}/{PARAMS}" for stage, key in everything - kept}
    marks = {f"{stage}/{key}/{COLLECTED}" for stage, key in everything - kept}
    after = contents(workdir / "store")
    assert before.keys() - after.keys() == gone
    assert after.keys() - before.keys() == marks
    assert all(after[name] == before[name] for name in before.keys() - gone)


def test_the_best_round_stays_and_of_equals_the_newest(workdir):
    def score(value):
        scores = value["rounds"][1]["evals"]
        scores |= {name: 0.5 for name in scores if name.endswith("exact_match")}

    edit(workdir / "runs/plain/summary.json", score)
    gc(workdir, Policy(last=0, best=1))
    equal = trained(workdir, "voted", 1) | trained(workdir, "members", 1)
    assert holding(workdir, PARAMS) == trained(workdir, "plain", 0) | equal


def test_what_one_run_keeps_stays_though_another_would_let_it_go(workdir):
    edit(workdir / "runs/plain/config.json", lambda c: c["retention"].update(last=3))
    assert trained(workdir, "plain", -1) < trained(workdir, "voted")
    gc(workdir)
    others = trained(workdir, "voted", 1) | trained(workdir, "members", 1)
    assert holding(workdir, PARAMS) == trained(workdir, "plain") | others


def test_a_round_that_trained_nothing_ends_with_the_parameters_before(workdir):
    edit(workdir / "runs/plain/summary.json", lambda s: s["rounds"][2]["stages"].pop("train"))
    for run in ("voted", "members"):
        shutil.rmtree(workdir / "runs" / run)
    gc(workdir, Policy(last=1, best=0))
    assert holding(workdir, PARAMS) == trained(workdir, "plain", 0)


def test_samples_go_on_request_only(workdir):
    everything = holding(workdir, SAMPLES)
    gc(workdir, NOTHING)
    assert holding(workdir, SAMPLES) == everything
    gc(workdir, Policy(last=1, best=0, samples=True))
    newest = {n for run in finished_runs.RUNS for n in stages(workdir, run, 1)}
    assert holding(workdir, SAMPLES) == newest & everything != everything


def test_a_dry_run_changes_nothing_and_plans_the_same(workdir, capsys):
    orphan(workdir)
    (workdir / "partial/train/some").mkdir(parents=True)
    before = tree(workdir)
    planned = gc(workdir, dry_run=True)
    assert tree(workdir) == before
    assert "nothing was removed" in capsys.readouterr().out
    assert planned == gc(workdir)
    assert planned.collect and planned.remove and planned.folders


def test_the_report_adds_up(workdir, capsys):
    def size():
        return sum(p.stat().st_size for p in (workdir / "store").rglob("*") if p.is_file())

    orphan(workdir)
    store = Store(str(workdir))
    plan = gc(workdir, dry_run=True)
    before, freed = retention.disk_use(store), retention.freed(store, plan)
    assert sum(use.size for use in before.values()) == size()
    assert {name: use.entries for name, use in before.items() if "/" not in name} == {
        folder.name: len(list(folder.iterdir())) for folder in (workdir / "store").iterdir()
    }
    gc(workdir)
    markers = [path.stat().st_size for path in workdir.glob(f"store/*/*/{COLLECTED}")]
    assert sum(use.size for use in freed.values()) == (
        sum(use.size for use in before.values()) - size() + sum(markers)
    )
    assert freed["train"].entries == 1
    out = capsys.readouterr().out
    assert "plain    keeps parameters of 1 (last)" in out
    assert "remove   train/" + "0" * 32 in out


# Runs do not notice


def test_a_collected_run_resumes_to_the_same_parameters(workdir, finished, tmp_path):
    untouched = finished_runs.copy(finished, tmp_path / "untouched")
    gc(workdir)
    collected = holding(workdir, COLLECTED)
    before = contents(workdir / "store")
    finished_runs.start(workdir, "plain")
    assert contents(workdir / "store") == before  # nothing was computed
    assert summary(workdir, "plain")["params_sha256"] == summary(finished, "plain")["params_sha256"]
    for where in (workdir, untouched):
        finished_runs.start(where, "plain", rounds="3")
    assert summary(workdir, "plain")["rounds"][3]["round"] == 2
    for key in ("params_sha256", "params_sha256_by_member"):
        assert summary(workdir, "plain")[key] == summary(untouched, "plain")[key]
    assert holding(workdir, COLLECTED) == collected


def test_what_is_needed_again_comes_back_to_the_same_bytes(workdir, finished):
    """Another measurement needs every round's parameters, and samples for the curriculum."""
    gc(workdir, Policy(last=0, best=0, samples=True))
    assert not holding(workdir, PARAMS) and not holding(workdir, SAMPLES)
    finished_runs.start(workdir, "plain", "again", evaluate__problems="4")
    before, after = contents(finished / "store"), contents(workdir / "store")
    for name in stages(finished, "plain"):
        assert not (workdir / "store" / "/".join(name) / COLLECTED).exists()
        for path in (finished / "store" / "/".join(name)).iterdir():
            file = path.relative_to(finished / "store").as_posix()
            assert after[file] == before[file]
    assert holding(workdir, PARAMS) == trained(finished, "plain")


def test_a_chain_of_collected_inputs_is_computed_from_its_beginning(workdir, finished):
    last = finished_runs.rounds(workdir, "voted")[-1].stages["train"]
    gc(workdir, Policy(last=0, best=0, samples=True))
    finished_runs._compiled().weights._live.clear()
    with finished_runs.promotion():
        path = last.path(PARAMS)
    name = f"train/{last.manifest.key}/{PARAMS}"
    assert path == workdir / "store" / name
    assert contents(workdir / "store")[name] == contents(finished / "store")[name]
    assert holding(workdir, PARAMS) == trained(finished, "voted")
    assert not holding(workdir, SAMPLES)  # the filters' files, which it trains on, are all there


FLIP = {"text": "a", "calls": 0}


def flip(context):
    FLIP["calls"] += 1
    (context.directory / "large").write_text(FLIP["text"])
    (context.directory / "small").write_text("s")


def test_only_a_collected_file_is_computed_again_and_only_to_the_same_bytes(tmp_path, capsys):
    store = Store(str(tmp_path), say=print)
    store.open()
    FLIP.update(text="a", calls=0)
    run = Stages(store, Progress(quiet=True)).run
    artifact = run("flip", flip, config={}, inputs={}, rng=Rng(0, 0, 0))
    name = ("flip", artifact.manifest.key)

    def lose():
        retention.execute(store, retention.Plan({}, {name: ["large"]}, [], []))

    lose()
    assert run("flip", flip, config={}, inputs={}, rng=Rng(0, 0, 0)).manifest == artifact.manifest
    assert artifact.path("small").read_text() == "s"
    assert FLIP["calls"] == 1 and store.collected(*name)
    assert artifact.path("large").read_text() == "a"
    assert FLIP["calls"] == 2 and not store.collected(*name)
    assert "was collected: computing it again" in capsys.readouterr().out
    lose()
    FLIP["text"] = "b"
    with pytest.raises(UserError, match="came out different"):
        artifact.path("large")
    assert (
        run("flip", flip, config={}, inputs={}, rng=Rng(0, 0, 0)).path("large").read_text() == "b"
    )


def test_damage_in_a_collected_stage_is_found(workdir):
    gc(workdir, NOTHING)
    store = Store(str(workdir), say=lambda text: None)
    (name,) = trained(workdir, "plain", 0)
    assert store.find(*name)
    (workdir / "store" / "/".join(name) / "steps.parquet").write_bytes(b"torn")
    assert store.find(*name) is None


def test_a_kill_half_way_leaves_nothing_broken(workdir, finished, tmp_path, monkeypatch):
    whole = finished_runs.copy(finished, tmp_path / "whole")
    gc(whole, NOTHING)
    write, writes = retention.write_atomic, []

    def killed(path, data):
        write(path, data)
        writes.append(path)
        if len(writes) == 3:  # the marker is there, the file as well
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            gc(workdir, NOTHING)
    assert (writes[-1].parent / PARAMS).exists()
    before = contents(workdir / "store")
    finished_runs.start(workdir, "plain")
    finished_runs.start(workdir, "voted")
    assert contents(workdir / "store") == before
    gc(workdir, NOTHING)
    assert contents(workdir / "store") == contents(whole / "store")


# Live and unfinished runs


@pytest.mark.parametrize("known", [True, False], ids=["summary", "no-summary"])
def test_nothing_that_a_live_run_needs_is_removed(workdir, known):
    own = stages(workdir, "plain")
    only_voted = trained(workdir, "voted") - own
    lost = orphan(workdir)
    (workdir / "partial/train/under_way").mkdir(parents=True)
    if not known:  # as in a run that has just begun, over stages that others had made
        (workdir / "runs/plain/summary.json").unlink()
    before = contents(workdir / "store")
    with held(workdir, "run-plain-0"):
        plan = gc(workdir, NOTHING)
        after = contents(workdir / "store")
        for name in own:
            files = {file for file in before if file.startswith("/".join(name))}
            assert files and all(after.get(file) == before[file] for file in files)
            assert (workdir / "store" / "/".join(name)).is_dir()
        assert not holding(workdir, PARAMS) & only_voted
        assert lost in entries(workdir) and (workdir / "partial/train/under_way").exists()
        assert "plain is live" in plan.notes[0]
    if known:
        gc(workdir, NOTHING)
        assert not holding(workdir, PARAMS)
        assert lost not in entries(workdir) and not list(workdir.glob("partial/*/*"))


def test_a_live_run_nobody_knows_stops_everything(workdir):
    before = contents(workdir / "store")
    with held(workdir, "run-a-0-0"):
        plan = gc(workdir, NOTHING)
    assert "a-0 is live" in plan.notes[0]
    assert contents(workdir / "store") == before


@pytest.mark.parametrize("killed", ["before the base was measured", "in the last round"])
def test_an_unfinished_run_keeps_all_that_it_can_go_on_from(workdir, killed):
    own = trained(workdir, "members")
    only_voted = trained(workdir, "voted") - own
    path = workdir / "runs/members/summary.json"
    everything = stages(workdir, "members")
    if killed == "in the last round":
        edit(path, lambda s: (s.update(complete=False), s["rounds"].pop()))
    else:
        path.unlink()
    lost = orphan(workdir)
    for name in ("train/under_way", f"train/{sorted(own)[0][1]}"):
        (workdir / "partial" / name).mkdir(parents=True)
    gc(workdir, NOTHING)
    assert own <= holding(workdir, PARAMS)
    assert everything <= entries(workdir)
    assert not holding(workdir, PARAMS) & only_voted
    assert lost not in entries(workdir)
    assert [p.name for p in workdir.glob("partial/*/*")] == ["under_way"]
    before = contents(workdir / "store")
    finished_runs.start(workdir, "members")
    assert contents(workdir / "store") == before


def test_reach_is_all_of_a_run_and_not_much_more(finished):
    """Guards `Catalogue.reach` against a binding that passes a stage something of its own."""
    catalogue = read_catalogue(Store(str(finished)))
    for run in catalogue.runs:
        reach = catalogue.reach(run.config)
        assert catalogue.ancestors(stages(finished, run.name)) <= reach
        foreign = set().union(*(trained(finished, r, 0, 1) for r in finished_runs.RUNS))
        assert not reach & (foreign - trained(finished, run.name))
        changed = run.config | {"seed": run.config["seed"] + 1}
        assert not any(catalogue.manifests[name].rng for name in catalogue.reach(changed))
    assert catalogue.reach({}) == set(catalogue.manifests)


def test_a_run_waits_for_a_collection_and_is_live_before_it_does_anything(workdir, monkeypatch):
    store, waiting, seen = Store(str(workdir)), threading.Event(), {}
    gate = store.gate(exclusive=True)
    gate.__enter__()

    def say(text):
        if "waiting for gc to end" in text:
            waiting.set()

    def release():
        seen["waited"] = waiting.wait(60)
        seen["live while waiting"] = retention.live_runs(store)
        gate.__exit__(None, None, None)

    def run(*arguments):
        seen["live at work"] = retention.live_runs(store)
        seen["config"] = (workdir / "runs/late/config.json").exists()
        with store.gate(exclusive=True):  # not held by the run while it works
            return loop_run(*arguments)

    loop_run = launch.loop.run
    monkeypatch.setattr(launch.loop, "run", run)
    monkeypatch.setattr(launch, "Store", lambda path, unused: Store(path, say))
    thread = threading.Thread(target=release)
    thread.start()
    finished_runs.start(workdir, "plain", "late")
    thread.join()
    assert seen == {
        "waited": True,
        "live while waiting": set(),
        "live at work": {"late"},
        "config": True,
    }


# Entries of no run


def test_a_deleted_run_takes_only_what_was_its_own(workdir, finished):
    shutil.rmtree(workdir / "runs/voted")
    others = stages(workdir, "plain") | stages(workdir, "members")
    own = stages(finished, "voted") - others
    before = contents(workdir / "store")
    plan = gc(workdir, Policy(last=3, best=0))
    assert set(plan.remove) == own and not plan.collect
    assert entries(workdir) == others
    for name in own:
        assert not (workdir / "provenance" / f"{name[0]}/{name[1]}.json").exists()
    assert {f: before[f] for f in contents(workdir / "store")} == contents(workdir / "store")
    after = contents(workdir / "store")
    for run in ("plain", "members"):
        finished_runs.start(workdir, run)
    assert contents(workdir / "store") == after
    finished_runs.start(workdir, "voted")
    assert contents(workdir / "store") == contents(finished / "store")
    assert summary(workdir, "voted")["params_sha256"] == summary(finished, "voted")["params_sha256"]


def test_a_stage_that_no_summary_names_stays_as_an_input_of_one_that_is(workdir):
    noise = dict(noise__rate="1.0", noise__structure="drop")
    finished_runs.start(workdir, "plain", "noisy", rounds="1", **noise)
    (noisy,) = (name for name in entries(workdir) if name[0] == "corrupt")
    path = workdir / "runs/noisy/summary.json"
    told = json.loads(path.read_text())
    for done in told["rounds"]:
        done["stages"].pop("corrupt", None)
    path.write_text(json.dumps(told))
    assert noisy not in stages(workdir, "noisy")
    assert not gc(workdir).remove
    assert noisy in entries(workdir)
    shutil.rmtree(workdir / "runs/noisy")
    assert noisy in gc(workdir).remove


def test_damaged_entries_go_unless_a_run_refers_to_them(workdir):
    lost = orphan(workdir)
    (referred,) = trained(workdir, "plain", 1)
    for stage, key in (lost, referred):
        (workdir / "store" / stage / key / "manifest.json").write_text("{")
    assert gc(workdir, Policy(last=3)).remove == [lost]
    assert referred in entries(workdir)


def test_leftovers_of_dead_processes_go(workdir):
    with Store(str(workdir)).scratch() as alive:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        host = alive.name.split(".")[0]
        leftover = workdir / "tmp" / f"{host}.{dead.pid}.abc"
        leftover.mkdir()
        foreign = workdir / "tmp" / f"{host}.elsewhere.{dead.pid}.abc"
        foreign.mkdir()
        gc(workdir)
        assert alive.exists() and foreign.exists() and not leftover.exists()


# Sweeps


def arms(workdir, sweep, **status):
    path = workdir / "sweeps" / sweep / "arms.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"name": run, "run": run, "status": value} for run, value in status.items()]
    path.write_text(json.dumps({"sweep": sweep, "arms": found}))


def test_a_sweep_keeps_the_runs_of_all_its_arms_until_it_is_done(workdir):
    arms(workdir, "s", plain="done", later="pending")
    plan = gc(workdir, NOTHING)
    assert holding(workdir, PARAMS) == trained(workdir, "plain")
    assert "sweep s is not done (1 of 2 arms left)" in plan.kept["plain"]
    arms(workdir, "s", plain="done", later="done")
    gc(workdir, NOTHING)
    assert not holding(workdir, PARAMS)


def test_one_sweep_alone(workdir):
    arms(workdir, "s", plain="done")
    lost = orphan(workdir)
    with pytest.raises(UserError, match="no sweep 't'.*did you mean|known: s"):
        gc(workdir, Policy(sweep="t"))
    gc(workdir, Policy(last=0, best=0, sweep="s"))
    others = trained(workdir, "voted") | trained(workdir, "members")
    assert holding(workdir, PARAMS) == others | {lost}


def test_a_sweep_that_cannot_be_read_keeps_everything(workdir):
    arms(workdir, "s")
    (workdir / "sweeps/s/arms.json").write_text("{torn")
    before = contents(workdir / "store")
    gc(workdir, NOTHING)
    assert contents(workdir / "store") == before


# Mistakes, object stores, the entry point


def test_unreadable_runs_and_missing_stores_are_messages(workdir, tmp_path):
    before = contents(workdir / "store")
    (workdir / "runs/plain/summary.json").write_text("{torn")
    with pytest.raises(UserError, match="summary.json' cannot be read"):
        gc(workdir, NOTHING)
    assert contents(workdir / "store") == before
    with pytest.raises(UserError, match="no store in"):
        gc(tmp_path)
    assert not (tmp_path / "locks").exists()


def test_an_object_store_is_collected_without_locks(workdir):
    store = Store(str(workdir))
    store.local = False  # the same bytes through the code for object stores
    lost = orphan(workdir)
    collect(store, Policy(), dry_run=False)
    kept = set().union(*(trained(workdir, run, 1) for run in finished_runs.RUNS))
    assert holding(workdir, PARAMS) == kept
    assert lost not in entries(workdir)
    again = orphan(workdir)
    (workdir / "runs/plain/summary.json").unlink()
    plan = collect(store, NOTHING, dry_run=False)
    assert again in entries(workdir)
    assert "plain is live" in plan.notes[0]


def test_the_command_says_what_it_would_do(workdir):
    before = tree(workdir)
    command = [sys.executable, "-m", "experiments.gc", f"--workdir={workdir}", "--dry_run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (name,) = trained(workdir, "plain", 0)
    assert f"collect  train/{name[1]}: {PARAMS}" in result.stdout
    assert tree(workdir) == before
