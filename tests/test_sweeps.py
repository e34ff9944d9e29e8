"""Combinators of overrides, names of arms, and sweep files."""

import pytest

from experiments.sweep import run_command
from karploop import cli
from karploop.errors import UserError
from karploop.sweeps import (
    ABLATIONS,
    ROOT,
    Arm,
    Sweep,
    chain,
    fix,
    load_sweep,
    name_arms,
    name_overrides,
    over,
    product,
    seeds,
    sweep_name,
    zipit,
)


def make_sweep(entries) -> Sweep:
    return Sweep(config="configs/tiny.py", arms=name_arms(entries), title="Fakes", name="fakes")


def test_combinators():
    ab, xy = over("a", [1, 2]), over("x.y", ["p", "q"])
    assert product(ab, xy) == [
        {"a": 1, "x.y": "p"},
        {"a": 1, "x.y": "q"},
        {"a": 2, "x.y": "p"},
        {"a": 2, "x.y": "q"},
    ]
    assert zipit(ab, xy) == [{"a": 1, "x.y": "p"}, {"a": 2, "x.y": "q"}]
    assert chain([{}], ab) == [{}, {"a": 1}, {"a": 2}]
    assert seeds([{"a": 1}], 2) == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}]
    assert fix(ab, b=3, **{"c.d": 4}) == [
        {"a": 1, "b": 3, "c.d": 4},
        {"a": 2, "b": 3, "c.d": 4},
    ]


def test_combinators_leave_their_arguments_alone():
    entries = [{"a": 1}]
    fix(entries, b=2)[0]["a"] = 5
    chain(entries)[0]["a"] = 6
    assert entries == [{"a": 1}]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: chain(over("a", [1]), over("a", [1])), "twice"),
        (lambda: product(over("a", [1]), over("a", [2])), "'a' is set by two"),
        (lambda: zipit(over("a", [1]), over("b", [1, 2])), "lengths 1, 2"),
        (lambda: name_arms([{"a": 1, "b": 2}, {"b": 2, "a": 1}]), "twice"),
        (lambda: make_sweep([]), "no arms"),
        (lambda: Sweep("c.py", [{"a": 1}], "t"), "name_arms"),
        (lambda: Sweep("c.py", [Arm("../a", {})], "t"), "letters, digits"),
    ],
)
def test_wrong_sweeps_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


def test_names_follow_from_the_overrides_alone():
    assert name_overrides({}) == "default"
    assert name_overrides({"seed": 1, "b.c": 0.5, "a": (1, 2)}) == "a=1-2__b.c=0.5__seed=1"
    (arm,) = name_arms([{"seed": 1, "a": "x"}])
    assert (arm.name, arm.group) == ("a=x__seed=1", "a=x")


def test_names_stay_distinct_and_fit_for_files():
    texts = ["Is it right?", "Is it right!", "../../x", "a" * 300, "a" * 301]
    names = [arm.name for arm in name_arms(over("prompt", texts))]
    assert len(set(names)) == len(texts)
    assert all(len(name) <= 120 and "/" not in name and " " not in name for name in names)


def test_run_command_writes_overrides_as_flags(tmp_path):
    sweep = make_sweep([{"filter.name": "vote", "evaluate.difficulties": (1, 2), "seed": 3}])
    line = run_command(sweep, sweep.arms[0], tmp_path)
    assert line[1:] == [
        "-m",
        "experiments.run",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}",
        "--run_name=fakes__evaluate.difficulties=1-2__filter.name=vote__seed=3",
        "--config.filter.name=vote",
        "--config.evaluate.difficulties=1, 2",
        "--config.seed=3",
    ]


def write_sweep_file(directory):
    directory.mkdir()
    (directory / "sweep.py").write_text(
        "from karploop.sweeps import *\n"
        "def get_sweep(arg):\n"
        "    return Sweep('configs/tiny.py', name_arms(seeds([{}], int(arg or 2))), 'T')\n"
    )


def test_load_sweep(tmp_path):
    write_sweep_file(tmp_path / "filters")
    for location in (tmp_path / "filters", tmp_path / "filters" / "sweep.py"):
        assert [arm.name for arm in load_sweep(str(location)).arms] == ["seed=0", "seed=1"]
        three = load_sweep(f"{location}:3")
        assert (three.name, len(three.arms)) == ("filters-3", 3)
        assert three.run_name(three.arms[0]) == "filters-3__seed=0"


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "no get_sweep"),
        ("def get_sweep(arg): return [{}]", "not a karploop"),
        ("def get_sweep(arg): raise ValueError('known: a, b')", "refuses .* known: a, b"),
    ],
)
def test_load_sweep_refuses(tmp_path, text, message):
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_sweep(str(tmp_path / "odd.py"))


def test_unknown_sweep_is_refused():
    with pytest.raises(UserError, match="no sweep 'nowhere'"):
        load_sweep("nowhere:2")
    assert sweep_name("experiments/ablations/filters") == sweep_name("filters") == "filters"


SHIPPED = [
    *(f"length_generalization:{task}" for task in ("reverse", "addition", "forward_addition")),
    "label_noise",
    "gemma3_270m",
    "gemma3_270m:tasks",
    "star_addition",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_a_shipped_sweep_is_a_valid_config(name):
    folders = {path.parent.name for path in ABLATIONS.glob("*/sweep.py")}
    assert folders == {shipped.partition(":")[0] for shipped in SHIPPED}
    sweep = load_sweep(name)
    for arm in sweep.arms:
        overrides = {key: str(value) for key, value in arm.overrides.items()}
        cli.load_config(f"{ROOT}/{sweep.config}", overrides)
    assert sweep.baseline in {arm.group for arm in sweep.arms}
