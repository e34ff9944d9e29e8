"""Tables, comparisons of arms and plots, from summaries made up here."""

import csv
import io

import pytest
from PIL import Image

from experiments.table import run_groups, write_tables
from karploop.errors import UserError
from karploop.reporting.comparison import (
    Group,
    compare,
    csv_text,
    default_metrics,
    difference_rows,
    mean_rows,
    metric_value,
)
from karploop.reporting.plots import (
    ArmResult,
    accuracy_figure,
    accuracy_plot,
    comparison_figure,
    rounds_figure,
    run_plot,
)
from karploop.reporting.statistics import mean_interval
from karploop.reporting.tables import (
    accuracy_table,
    escape_latex,
    escape_markdown,
    latex_table,
    markdown_table,
    run_table,
)
from karploop.reporting.writer import write_json_atomic


def summary(by_round: dict[int, dict[str, float | None]], **metrics) -> dict:
    """Evals of one run by round; `metrics` belong to the last round."""
    rounds = [{"round": r, "evals": e, "stages": {}, "metrics": {}} for r, e in by_round.items()]
    rounds[-1]["metrics"] = metrics
    return {"run": "r", "rounds": rounds}


TWO_ROUNDS = summary(
    {
        -1: {"add/2/exact_match": 1.0, "add/10/exact_match": 0.125, "add/10/nll": 3.0},
        0: {"add/2/exact_match": 0.9996, "add/10/exact_match": None},
        1: {"add/10/exact_match": 0.5, "add/2/exact_match": 1.0},
    },
    label_precision=0.75,
)


def test_accuracy_table_is_aligned_and_in_order_of_difficulty():
    assert accuracy_table(TWO_ROUNDS).splitlines() == [
        "add: exact_match by difficulty, held out, %",
        "",
        "round      2    10",
        "-----  -----  ----",
        "base   100.0  12.5",
        "0      100.0     -",
        "1      100.0  50.0",
    ]


def test_accuracy_table_has_a_block_for_each_task():
    table = accuracy_table(summary({0: {"b/1/exact_match": 0.0, "a/1/exact_match": 1.0}}))
    first, second = table.split("\n\n")[0], table.split("\n\n")[2]
    assert first.startswith("a: ") and second.startswith("b: ")


def test_wide_accuracy_table_is_folded_into_equal_parts():
    evals = {f"add/{d}/exact_match": 1.0 for d in range(1, 13)}
    parts = accuracy_table(summary({0: evals}), width=80).split("\n\n")[1:]
    headers = [part.splitlines()[0].split() for part in parts]
    assert headers == [["round", *map(str, range(1, 7))], ["round", *map(str, range(7, 13))]]
    assert max(len(line) for part in parts for line in part.splitlines()) <= 80


ONE_DIFFICULTY = summary(
    {
        -1: {"gym/x/1/pass@1": 0.25, "gym/x/1/nll": 1.5, "gym/x/1/majority_answer": 0.1},
        0: {"gym/x/1/pass@1": 0.5, "gym/x/1/nll": 1.25, "gym/x/1/kl": 0.75},
    }
)


def test_one_difficulty_is_shown_metric_by_metric():
    assert run_table(ONE_DIFFICULTY).splitlines() == [
        "gym/x: held out",
        "",
        "round  pass@1, %  majority_answer, %   nll    kl",
        "-----  ---------  ------------------  ----  ----",
        "base        25.0                10.0   1.5     -",
        "0           50.0                   -  1.25  0.75",
    ]
    assert run_table(TWO_ROUNDS) == accuracy_table(TWO_ROUNDS)
    assert run_table(summary({0: {}})) == "nothing was measured in this run"


def test_one_difficulty_is_drawn_against_the_round(tmp_path):
    panel = rounds_figure(ONE_DIFFICULTY, "t").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert lines == {"pass@1": [[-1, 0.25], [0, 0.5]], "majority answer": [[-1, 0.1]]}
    assert run_plot(ONE_DIFFICULTY, tmp_path / "a.png", "t", 1)
    nothing = summary({0: {"a/1/nll": 1.0}})
    assert not run_plot(nothing, tmp_path / "b.png", "t", 1)
    assert not run_plot(summary({0: {}}), tmp_path / "b.png", "t", 1)
    assert not (tmp_path / "b.png").exists()


def test_accuracy_table_without_evals():
    assert accuracy_table(summary({0: {}})) == "no eval of exact_match in this run"


def test_markdown_escapes_markup_and_cell_borders():
    assert escape_markdown("a|b_c*d<e>\n`f`") == r"a\|b\_c\*d\<e\> \`f\`"
    assert markdown_table(["arm", "x|y"], [["k_1", "0.5"]]).splitlines() == [
        r"| arm | x\|y |",
        "| :--- | ---: |",
        r"| k\_1 | 0.5 |",
    ]


def test_latex_escapes_every_special_character():
    assert escape_latex(r"\&%$#_{}~^<|[-0.1") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}"
        r"\textbar{}{[}-0.1"
    )
    assert escape_latex("a=1__b--c") == r"a=1\_\_b-{}-c"
    table = latex_table(["arm", "Δ"], [["50%", "±1"]], "R&D", "tab:a b")
    assert r"50\% & $\pm$1 \\" in table and r"\caption{R\&D}" in table
    assert r"\label{tab:a-b}" in table and r"\begin{tabular}{lr}" in table


def test_an_at_sign_in_a_name_is_no_round():
    one = summary({-1: {"t/1/pass@1": 0.25}, 0: {"t/1/pass@1": 0.5, "t/1/pass@8": 0.75}})
    assert metric_value(one, "t/1/pass@1") == 0.5 and metric_value(one, "t/1/pass@8") == 0.75
    assert metric_value(one, "t/1/pass@1@-1") == 0.25
    assert metric_value(one, "t/1/pass@8@-1") is None and metric_value(one, "t/1/pass@4") is None
    results = compare([Group("a", {0: one})], ["t/1/pass@8", "t/1/pass@1@-1"], "a")
    assert results["t/1/pass@1@-1"]["a"].values == {0: 0.25}
    with pytest.raises(UserError, match="did you mean 't/1/pass@8'"):
        compare([Group("a", {0: one})], ["t/1/pas@8"], "a")


def test_metric_value_reads_the_last_round_unless_told():
    assert metric_value(TWO_ROUNDS, "add/10/exact_match") == 0.5
    assert metric_value(TWO_ROUNDS, "add/10/exact_match@-1") == 0.125
    assert metric_value(TWO_ROUNDS, "add/10/exact_match@0") is None
    assert metric_value(TWO_ROUNDS, "add/10/exact_match@9") is None
    assert metric_value(TWO_ROUNDS, "add/*/exact_match") == 0.75
    assert metric_value(TWO_ROUNDS, "add/*/exact_match@0") is None, "one difficulty is unknown"
    assert metric_value(TWO_ROUNDS, "label_precision") == 0.75
    with pytest.raises(UserError, match="after @"):
        metric_value(TWO_ROUNDS, "label_precision@last")


def one_value(value: float | None) -> dict:
    return summary({0: {"add/5/exact_match": value}})


GROUPS = [
    Group("default", {0: one_value(0.50), 1: one_value(0.60), 2: one_value(0.70)}),
    Group("filter.name=vote", {0: one_value(0.60), 1: one_value(0.80), 2: None}),
    Group("filter.name=gold", {0: None, 1: None, 2: None}),
    Group("filter.name=random", {2: one_value(0.0)}),
]
METRIC = "add/5/exact_match"


def test_compared_groups_show_missing_arms_as_missing():
    results = compare(GROUPS, [METRIC], "default")
    assert mean_rows(GROUPS, results) == (
        ["arm", "runs", METRIC],
        [
            ["default", "3/3", "0.600 [0.352, 0.848]"],
            ["filter.name=vote", "2/3", "0.700 [-0.571, 1.971]"],
            ["filter.name=gold", "0/3", "missing"],
            ["filter.name=random", "1/1", "0.000"],
        ],
    )
    assert difference_rows(GROUPS, results, "default") == (
        ["arm", f"Δ {METRIC}"],
        [
            # Differences 0.1 and 0.2: t = 3 with one degree of freedom; t(0.975, 1) = 12.7062.
            ["filter.name=vote", "+0.150 [-0.485, +0.785] (0.205 / 0.500)"],
            ["filter.name=gold", "missing"],
            ["filter.name=random", "-0.700"],
        ],
    )


def test_a_mean_over_fewer_values_than_runs_says_so():
    group = Group("default", {0: one_value(0.5), 1: one_value(None)})
    _, rows = mean_rows([group], compare([group], [METRIC], "default"))
    assert rows == [["default", "2/2", "0.500 (n=1)"]]


def test_csv_leaves_unknown_cells_empty():
    text = csv_text(GROUPS, compare(GROUPS, [METRIC], "default"))
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(text))}
    assert rows["filter.name=gold"]["mean"] == rows["filter.name=gold"]["difference"] == ""
    assert rows["filter.name=random"]["low"] == "" and rows["default"]["p_t"] == ""
    assert float(rows["filter.name=vote"]["difference"]) == pytest.approx(0.15)
    assert rows["filter.name=vote"]["values_by_seed"] == "0=0.6 1=0.8"


@pytest.mark.parametrize(
    "metrics, baseline, message",
    [
        (["add/5/exact_mach"], "default", "did you mean 'add/5/exact_match'"),
        ([METRIC], "filter.name=vot", "did you mean 'filter.name=vote'"),
        ([], "default", r"which metric\? .*add/\*/exact_match"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(metrics, baseline, message):
    with pytest.raises(UserError, match=message):
        compare(GROUPS, metrics, baseline)


def test_default_metrics_are_the_accuracy_of_each_task():
    assert default_metrics([TWO_ROUNDS, one_value(1.0)]) == ["add/*/exact_match"]


def test_tables_are_written(tmp_path):
    results = compare(GROUPS, [METRIC, "add/*/exact_match"], "default")
    shown = write_tables(GROUPS, results, "default", "Filters & judges", tmp_path / "out")
    assert "not corrected for 2 comparisons" in shown, "only one arm has two pairs, in two metrics"
    assert (
        (tmp_path / "out/table.md").read_text().startswith("# Filters \\& judges\n\n| arm | runs |")
    )
    assert r"\caption{Filters \& judges: means." in (tmp_path / "out/table.tex").read_text()
    assert len((tmp_path / "out/table.csv").read_text().splitlines()) == 1 + 2 * len(GROUPS)
    assert Image.open(tmp_path / "out/table.png").width > 500


def test_runs_without_a_sweep_are_grouped_by_what_they_differ_in(tmp_path):
    for name, seed, rate in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 0, 0.2)):
        config = {"name": name, "seed": seed, "train": {"rate": rate, "steps": 3}}
        write_json_atomic(tmp_path / "runs" / name / "config.json", config)
    write_json_atomic(tmp_path / "runs/a/summary.json", one_value(0.5))
    write_json_atomic(tmp_path / "runs/b/summary.json", one_value(0.6) | {"complete": False})
    groups = {group.name: group for group in run_groups(tmp_path)}
    assert groups.keys() == {"train.rate=0.1", "train.rate=0.2"}
    assert groups["train.rate=0.1"].summaries == {0: one_value(0.5), 1: None}
    assert groups["train.rate=0.2"].complete == 0


def test_accuracy_figure_draws_each_round_over_difficulty():
    figure = accuracy_figure(TWO_ROUNDS, "t", trained_up_to=5)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["base", "0", "1"]
    assert lines["1"].get_xydata().tolist() == [[2, 1.0], [10, 0.5]]
    assert lines["0"].get_xydata().tolist() == [[2, 0.9996]], "an unknown value is no point"
    assert lines["base"].get_linestyle() == "--"
    (shade,) = figure.axes[0].patches
    assert shade.get_x() + shade.get_width() == 5.5


def test_accuracy_plot_is_a_png(tmp_path):
    accuracy_plot(TWO_ROUNDS, tmp_path / "plots" / "a.png", "t")
    with Image.open(tmp_path / "plots" / "a.png") as image:
        assert image.format == "PNG" and image.width > image.height > 400


def test_accuracy_plot_refuses_an_empty_summary(tmp_path):
    with pytest.raises(ValueError, match="exact_match"):
        accuracy_plot(summary({0: {}}), tmp_path / "a.png", "t")


def test_comparison_figure_marks_what_is_missing():
    arms = [ArmResult("a", [0.5], mean_interval([0.5])), ArmResult("b", [], mean_interval([]))]
    panel = comparison_figure({"m": arms}, "t", baseline="a").axes[0]
    assert [text.get_text() for text in panel.texts] == ["missing"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b"]
