"""Phases: other settings from a round on, in one run."""

import json

import pytest
import tiny
from finished_runs import promotion

from karploop import launch
from karploop.catalogue import read_catalogue
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.phases import by_phase, laid
from karploop.resolve import resolve
from karploop.schema import to_dict
from karploop.store import Store

THEN_KTO = {
    "phases.1.objective.name": "kto",
    "phases.1.judge.name": "vote",
    "phases.1.train.steps": "4",
}


def settings(**groups):
    made = tiny.get_config()
    made.update({"mesh": {"data": 1}, "generate": {"samples": 4}} | groups)
    return made.to_dict()


def run(workdir, name, **overrides):
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    with promotion():
        assert launch.launch(resolve(settings(), overrides), str(workdir), name) == 0
    return json.loads((workdir / f"runs/{name}/summary.json").read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Supervised alone, and the same followed by a round of preferences, in one store."""
    folder = tmp_path_factory.mktemp("phases")
    run(folder, "plain", rounds="1")
    run(folder, "phased", **THEN_KTO)
    return folder


def rounds(workdir, name):
    return json.loads((workdir / f"runs/{name}/summary.json").read_text())["rounds"]


def test_a_phase_holds_until_the_next():
    changes = {"phases.3.generate.samples": "4", "phases.2.train.steps": "7"}
    config = resolve({"phases": {"3": {"objective": {"name": "dpo"}}}}, changes)
    found = by_phase(config)
    assert list(found) == [0, 2, 3]
    assert [c.train.steps for c in found.values()] == [300, 7, 7]
    assert [c.objective.name for c in found.values()] == ["sft", "sft", "dpo"]
    as_json = laid(json.loads(json.dumps(to_dict(config))))
    assert {start: c["train"]["steps"] for start, c in as_json.items()} == {0: 300, 2: 7, 3: 7}
    assert [c["objective"]["name"] for c in as_json.values()] == ["sft", "sft", "dpo"]
    assert as_json[3]["objective"]["beta"] == config.objective.beta


def test_values_have_the_types_of_their_keys():
    config = resolve({"phases": {"1": {"generate": {"temperature": 2}}}})
    assert config == resolve({}, {"phases.1.generate.temperature": "2.0"})
    assert isinstance(config.phases["1"]["generate"]["temperature"], float)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("phases", "3", "a group of groups"),
        ("phases.2", "x", "'config.phases.2' is a group of keys"),
        ("phases.2.train", "x", "'config.phases.2.train' is a group of keys"),
        ("phases.0.train.steps", "3", "the round that it starts at"),
        ("phases.two.train.steps", "3", "the round that it starts at"),
        ("phases.02.train.steps", "3", "the round that it starts at"),
        ("phases.2.trian.steps", "3", "'config.phases.2.trian': did you mean 'train'"),
        ("phases.2.train.stesp", "3", "'config.phases.2.train.stesp': did you mean 'steps'"),
        ("phases.2.train.steps", "0", "'config.phases.2.train.steps' must be at least 1"),
        ("phases.2.seed", "3", "'config.phases.2.seed' belongs to the whole run"),
        ("phases.2.roles.judge.path", "a", "'config.phases.2.roles' belongs to the whole run"),
        ("phases.2.train.lora.rank", "4", "set 'config.train.lora'"),
        ("phases.2.generate.difficulty_step", "0", "set 'config.generate.difficulty_step'"),
        ("phases.2.objective.name", "dpo", "from round 2 on: .*'config.generate.samples' to 2"),
    ],
)
def test_phases_that_cannot_be_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        resolve({}, {key: value})


def test_what_a_later_phase_names_is_checked_before_the_first():
    with pytest.raises(UserError, match="from round 1 on: .*'config.filter.name' is 'nobody'"):
        prepare(resolve(settings(), {"phases.1.filter.name": "nobody"}))


def test_phases_that_compile_the_same_share_a_step():
    config = resolve(
        settings(), THEN_KTO | {"phases.2.objective.name": "sft", "phases.2.judge.name": ""}
    )
    machinery = prepare(config)
    first, second, third = machinery.phases.values()
    assert machinery.at(-1) is machinery.at(0) is first
    assert machinery.at(1) is second and machinery.at(2) is machinery.at(9) is third
    assert first.trainers["train"] is third.trainers["train"] is second.trainers["warmup"]
    assert second.trainers["train"] is not first.trainers["train"]
    assert second.weights is first.weights and second.sampler is first.sampler


def test_rounds_before_a_phase_are_those_of_a_run_without_it(workdir):
    plain, phased = rounds(workdir, "plain"), rounds(workdir, "phased")
    assert [r["stages"] for r in phased[:2]] == [r["stages"] for r in plain]
    assert "labels" not in phased[1]["stages"] and "judge" not in phased[1]["stages"]


def test_a_later_phase_learns_from_its_own_kind_of_rows(workdir):
    last = rounds(workdir, "phased")[2]
    assert {"judge", "labels", "train"} <= set(last["stages"])
    manifest = workdir / "store/train" / last["stages"]["train"] / "manifest.json"
    inputs = json.loads(manifest.read_text())["inputs"]
    kept = {name: made["stage"] for name, made in inputs.items() if name.startswith("kept")}
    assert kept == {"kept_0": "labels"}
    before = rounds(workdir, "phased")[1]["stages"]["train"]
    assert inputs["params"]["key"] == before


def test_all_stages_of_all_phases_are_within_reach(workdir):
    catalogue = read_catalogue(Store(str(workdir)))
    (phased,) = (r for r in catalogue.runs if r.name == "phased")
    assert catalogue.reach(phased.config) == set(catalogue.manifests)


def test_a_phased_run_that_goes_on_ends_the_same(workdir, tmp_path):
    run(tmp_path, "phased", rounds="1", **{k.replace(".", "__"): v for k, v in THEN_KTO.items()})
    again = run(tmp_path, "phased", **{k.replace(".", "__"): v for k, v in THEN_KTO.items()})
    whole = json.loads((workdir / "runs/phased/summary.json").read_text())
    assert again["params_sha256"] == whole["params_sha256"]
