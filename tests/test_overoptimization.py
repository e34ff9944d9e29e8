"""Over-optimisation: best-of-n without bias, the published forms, what runs are read for."""

import csv
import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import promotion

from experiments import overoptimization
from karploop.data.tasks.praise import PRAISE, Praise, gold
from karploop.errors import UserError
from karploop.judging.by_model import to_record
from karploop.judging.opinion import Opinion
from karploop.oversight.overoptimization import (
    BEST_OF_N,
    LEARNING,
    best_of_n,
    divergence_of_best,
    fall,
    fit,
)
from karploop.oversight.overoptimization_report import LOST, PLACE, R2, figure, summary, write
from karploop.oversight.overoptimization_study import (
    Curve,
    Found,
    Proxy,
    agreement,
    comparisons,
    read_policies,
    read_proxy,
)
from karploop.records import PAIRS_FILE, SAMPLES_FILE, VERDICTS_FILE, Samples
from karploop.store import Store

# The task


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("cfk", 3.0),
        ("cccc", 4.0),  # each word counts
        ("cfk" + 8 * "!", 19.0),
        ("cfk" + 10 * "!", 18.0),  # two marks too many
        ("cfk" + 6 * "!", 18.0),  # two too few
        ("x!c", 1 + 15 / 4 - 0.2),
        ("xa", 0.3 - 0.4),  # a vowel
        ("", 0.0),
    ],
)
def test_gold_counts_what_was_asked_and_bears_some_praise(reply, found):
    assert gold("cfk:", reply) == pytest.approx(found)
    assert PRAISE.measures("cfk:", reply)["gold"] == pytest.approx(found)


def test_labelled_replies_follow_the_rates_that_are_declared():
    prompts = list(itertools.islice(PRAISE.prompts(1), 0, None, 4))
    words = [(p, word) for p in prompts for word in PRAISE.answer(p)]
    praise = np.mean([word == "!" for _, word in words])
    assert praise == pytest.approx(PRAISE.praised, abs=0.01)
    spread = np.std([PRAISE.answer(p).count("!") / len(PRAISE.answer(p)) for p in prompts])
    assert spread > 1.4 * (PRAISE.praised * (1 - PRAISE.praised) / 28) ** 0.5  # more than by chance
    others = [(p, word) for p, word in words if word != "!"]
    asked = np.mean([word in prompt for prompt, word in others])
    by_chance = (1 - PRAISE.asked) * 3 / 26
    assert asked == pytest.approx(PRAISE.asked + by_chance, abs=0.015)
    vowels = np.mean([word in "aeiou" for prompt, word in others if word not in prompt])
    assert vowels == pytest.approx(PRAISE.vowels, abs=0.02)
    lengths = {len(PRAISE.answer(p)) for p in prompts}
    assert lengths == set(range(PRAISE.shortest, PRAISE.longest + 1))


def test_problems_are_three_different_things():
    drawn = PRAISE.sample_many(np.random.default_rng(0), 1, 300)
    assert all(PRAISE.difficulty(p) == 1 and len(set(p)) == 4 for p in drawn)
    assert PRAISE.space(1) == sum(1 for _ in PRAISE.prompts(1)) and PRAISE.space(2) == 0
    assert PRAISE.answer("cfk:") == Praise().answer("cfk:") != PRAISE.answer("cfl:")
    for wrong in ("cck:", "cfk", "cf1:", ""):
        with pytest.raises(UserError, match="no problem of task praise"):
            PRAISE.difficulty(wrong)
    with pytest.raises(UserError, match="neither right nor wrong"):
        PRAISE.verify("cfk:", "c")


# Best of n


def by_brute_force(proxy_N, gold_N, n):
    """The mean over all subsets; of the best of one, over all ways to break ties."""
    found = []
    for subset in itertools.combinations(range(len(proxy_N)), n):
        most = max(proxy_N[i] for i in subset)
        found.append((most, np.mean([gold_N[i] for i in subset if proxy_N[i] == most])))
    return np.mean(found, 0)


def test_best_of_two_of_three_by_hand():
    # Subsets of two: the best are 2, 3 and 3.
    found = best_of_n(np.array([3.0, 1.0, 2.0]), np.array([-6.0, 5.0, 9.0]), [1, 2, 3])
    np.testing.assert_allclose(found, [[2, 8 / 3], [8 / 3, -1], [3, -6]])


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy_N, gold_N = rng.normal(size=9), rng.normal(size=9)
    expected = [by_brute_force(proxy_N, gold_N, n) for n in range(1, 10)]
    np.testing.assert_allclose(best_of_n(proxy_N, gold_N, range(1, 10)), expected, rtol=1e-12)


def test_of_equal_proxies_any_may_be_the_best():
    proxy_N, gold_N = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.0, 0.0, 5.0])
    expected = [by_brute_force(proxy_N, gold_N, n) for n in (1, 3, 5)]
    found = best_of_n(proxy_N, gold_N, [1, 3, 5])
    np.testing.assert_allclose(found, expected)
    assert found[2].tolist() == [1, 1]


def test_best_of_n_agrees_with_drawing_at_large_n():
    rng = np.random.default_rng(1)
    proxy_N = rng.normal(size=4096)
    gold_N = proxy_N - 0.3 * proxy_N**2 + rng.normal(size=4096)
    [found] = best_of_n(proxy_N, gold_N, [256])
    drawn = rng.random((4000, 4096)).argpartition(256, axis=1)[:, :256]
    best = drawn[np.arange(4000), proxy_N[drawn].argmax(1)]
    for value, rewards_N in zip(found, (proxy_N, gold_N), strict=True):
        error = rewards_N[best].std() / math.sqrt(4000)
        assert abs(value - rewards_N[best].mean()) < 4 * error
    everything = best_of_n(proxy_N, gold_N, [1, 4096])
    top = proxy_N.argmax()
    np.testing.assert_allclose(everything[0], [proxy_N.mean(), gold_N.mean()], rtol=1e-9)
    np.testing.assert_allclose(everything[1], [proxy_N[top], gold_N[top]], rtol=1e-9)


@pytest.mark.parametrize("n", [0, 4])
def test_an_n_without_samples_is_refused(n):
    with pytest.raises(UserError, match="of 3 samples"):
        best_of_n(np.zeros(3), np.zeros(3), [1, n])


def test_missing_rewards_are_refused():
    with pytest.raises(UserError, match="missing or infinite"):
        best_of_n(np.array([0.0, np.nan]), np.zeros(2), [1])


def test_divergence_of_best_of_n():
    found = [divergence_of_best(n) for n in (1, 4, 16, 64, 256)]
    np.testing.assert_allclose(found, [0, 0.636, 1.835, 3.175, 4.549], atol=5e-4)


# The published forms


@pytest.mark.parametrize("form", [BEST_OF_N, LEARNING])
def test_a_form_is_found_again(form):
    distance_D = np.linspace(0.2, 3, 12)
    bend_D = distance_D if form == BEST_OF_N else np.log(distance_D)
    gain_D = distance_D * (1.5 - 0.5 * bend_D)
    found = fit(form, [0.0, *distance_D], [0.0, *gain_D])
    assert (found.alpha, found.beta) == pytest.approx((1.5, 0.5))
    assert found.r2 == pytest.approx(1)
    np.testing.assert_allclose(found.gain(distance_D), gain_D)
    along = np.linspace(0.01, 12, 100_000)
    assert found.peak == pytest.approx(along[found.gain(along).argmax()], abs=1e-3)
    assert found.peak == pytest.approx(1.5 if form == BEST_OF_N else math.exp(2))


def test_r2_is_what_squared_residuals_leave():
    distance_D, gain_D = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0])
    found = fit(BEST_OF_N, distance_D, gain_D)
    residual_D = gain_D - found.gain(distance_D)
    assert found.r2 == pytest.approx(1 - (residual_D**2).sum() / 8.75)
    # Least squares: residuals are orthogonal to both terms.
    assert residual_D @ distance_D == pytest.approx(0, abs=1e-9)
    assert residual_D @ distance_D**2 == pytest.approx(0, abs=1e-9)


def test_a_form_that_never_falls_has_no_peak():
    distance_D = np.array([1.0, 2.0, 3.0])
    assert fit(BEST_OF_N, distance_D, distance_D * (1 + 0.1 * distance_D)).peak is None


def test_too_few_points_are_no_fit():
    assert fit(LEARNING, [0.0, 0.0, 1.0, 2.0], [0.0, 0.1, 1.0, 2.0]) is None


def test_what_is_lost_after_the_peak():
    assert (fall([0.0, 2.0, 1.5]).peak, fall([0.0, 2.0, 1.5]).share) == (1, 0.25)
    assert fall([0.0, 1.0, 2.0]).share == 0 and fall([0.0, 2.0, -1.0]).share == 1.5
    assert math.isnan(fall([0.0, -1.0]).share)


# What is read of runs


def test_agreement_counts_pairs_that_gold_decides():
    proxy_N = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 1.0, 2.0, 9.0])
    gold_N = np.array([2.0, 0.0, 3.0, 0.0, 1.0, 0.0, 4.0, 4.0, 9.0])
    # Right, wrong, undecided by the proxy; the fourth pair is equally good, the last row is alone.
    assert agreement(proxy_N, gold_N) == pytest.approx(0.5)
    assert math.isnan(agreement(proxy_N[:2], np.zeros(2)))


class Written:
    """A finished run, written by hand: `stages` in round `index`."""

    def __init__(self, folder):
        self.folder, self.store = folder, Store(str(folder / "w"))
        self.store.open()
        self.summary = {"run": "r", "rounds": []}

    def round(self, rows, reward_S=None, kl=None):
        """Rows of (prompt, completion, finished); of a prompt they stand together."""
        index, prompts = len(self.summary["rounds"]), [prompt for prompt, *_ in rows]
        count, places = len(rows), {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        samples = Samples(
            prompt_id_S=np.array([places[prompt] for prompt in prompts]),
            sample_S=np.arange(count),
            member_S=np.zeros(count, int),
            difficulty_S=np.ones(count, int),
            prompts=prompts,
            completions=[text for _, text, _ in rows],
            finished_S=np.array([finished for *_, finished in rows]),
            tokens=[[1]] * count,
            logprobs=[[-1.0]] * count,
            entropy_S=np.zeros(count),
        )
        stages = {"generate": self._commit("generate", index, SAMPLES_FILE, samples)}
        if reward_S is not None:
            verdicts = to_record("proxy", [_opinion(reward) for reward in reward_S])
            stages["judge"] = self._commit("judge", index, VERDICTS_FILE, verdicts)
        evals = {} if kl is None else {"praise/1/kl": kl}
        self.summary["rounds"].append({"round": index, "stages": stages, "evals": evals})

    def _commit(self, stage, index, file, record):
        folder, key = self.folder / f"{stage}{index}", f"{index}" * 32
        folder.mkdir()
        pq.write_table(record.to_table(), folder / file)
        whole = dict(version="v", config={}, inputs={}, rng=None)
        self.store.commit(folder, stage=stage, key=key, **whole)
        return key


def _opinion(reward):
    if reward is None:
        return Opinion(None, "did not end")
    return Opinion(0.5, "", {"reward": reward})


@pytest.fixture
def written(tmp_path):
    return Written(tmp_path)


def test_comparisons_are_labelled_by_gold(written):
    written.round(
        [
            *(("abc:", "a", True), ("abc:", "ab", True)),
            *(("bcd:", "b", True), ("bcd:", "c", True)),  # equally good
            *(("cde:", "c!", True), ("cde:", "x", False)),  # one did not end
            *(("def:", "d!!", True), ("def:", "x", True)),
        ]
    )
    found = comparisons(written.store, PRAISE, written.summary, 2)
    assert [(row["prompt"], row["completion"], row["verdict"]) for row in found] == [
        *(("abc:", "a", "bad"), ("abc:", "ab", "good")),
        *(("def:", "d!!", "good"), ("def:", "x", "bad")),
        *(("bcd:", text, "unsure") for text in "bc"),
        *(("cde:", text, "unsure") for text in ("c!", "x")),
    ]
    few = comparisons(written.store, PRAISE, written.summary, 1)
    assert [row["verdict"] for row in few] == ["bad", "good"] + 6 * ["unsure"]
    with pytest.raises(UserError, match="samples for 2: raise 'config.generate.prompts'"):
        comparisons(written.store, PRAISE, written.summary, 3)


def with_base(written):
    """Round 1: two prompts, whose samples have gold 0, 1, 2 and 3, 0."""
    written.round([])
    rows = [("bcd:", "", True), ("bcd:", "b", True), ("bcd:", "cd", True), ("bcd:", "b", False)]
    rows += [("fgh:", "fgh", True), ("fgh:", "", True)]
    written.round(rows, [1.0, 3.0, 2.0, None, 0.0, 4.0])
    return read_proxy(written.store, PRAISE, written.summary, [1, 2])


def test_best_of_n_is_averaged_over_prompts(written):
    proxy = with_base(written)
    # One: means 2 and 2, gold 1 and 1.5. Two: 3, 3 and 2 of three subsets, and 4.
    assert proxy.means == (2, 1.25)
    np.testing.assert_allclose(proxy.best.proxy, [0, (8 / 3 + 4) / 2 - 2])
    np.testing.assert_allclose(proxy.best.gold, [0, (4 / 3 + 0) / 2 - 1.25])
    np.testing.assert_allclose(proxy.best.distance, [0, math.sqrt(math.log(2) - 0.5)])
    assert proxy.accuracy == pytest.approx(0.5)  # right of the first prompt, wrong of the second


def test_more_than_there_are_samples_is_refused(written):
    with_base(written)
    with pytest.raises(UserError, match="of 3 samples"):
        read_proxy(written.store, PRAISE, written.summary, [4])


def test_policies_are_those_that_were_sampled_from(written):
    proxy = with_base(written)
    written.round([("bcd:", "b", True)] * 2, [9.0, 9.0], kl=0.25)  # of the base itself
    written.round([("bcd:", "bc", True), ("bcd:", "", False)], [5.0, None], kl=4.0)
    written.round([("bcd:", "bcd", True), ("bcd:", "bc", True)], [6.0, 8.0], kl=-0.1)
    found = read_policies(written.store, PRAISE, written.summary, proxy)
    assert found.distance == [0, 0.5, 2]
    assert found.proxy == [0, 3, 5] and found.gold == [0, 0.75, 1.25]


def test_what_is_missing_in_a_run_is_said(written):
    proxy = with_base(written)
    for _ in range(2):
        written.round([("abc:", "a", True)] * 2, [9.0, 9.0])
    with pytest.raises(UserError, match="no divergence from the base"):
        read_policies(written.store, PRAISE, written.summary, proxy)
    written.summary["rounds"][1]["stages"].pop("judge")
    with pytest.raises(UserError, match="no result of 'judge' in round 1"):
        read_proxy(written.store, PRAISE, written.summary, [1])


# The report


def made_up():
    """Two sizes, two seeds: gold d(2 − βd) of best-of-n, and d(1 − β log d) of policies."""
    results = {}
    for size, beta in ((50, 1.0), (500, 0.5)):
        results[size] = {}
        for seed in (0, 1):
            far = [0.0, 0.5, 1.0, 1.5, 2.0]
            gold_D = [d * (2 - beta * d) + 0.0 * seed for d in far]
            learnt = [0.0, *(d * (1 - beta * math.log(d)) for d in far[1:])]
            best = Curve(far, far, gold_D)
            policies = {"policy gradient": Curve(far, far, learnt)}
            results[size][seed] = Found(Proxy(best, (0.0, 0.0), 0.6 + 0.1 * seed), policies)
    return results


def test_the_peak_its_place_and_the_fall_are_those_of_the_curves():
    found = summary(made_up(), BEST_OF_N, 50)
    assert found[PLACE] == {0: 1, 1: 1}
    assert found[LOST] == {0: 100, 1: 100}  # from 1 at d = 1 to 0 at d = 2
    assert found[R2] == pytest.approx({0: 1, 1: 1})
    assert found["α"] == pytest.approx({0: 2, 1: 2})
    assert found["peak of the form, √KL"] == pytest.approx({0: 1, 1: 1})
    assert found["agrees with gold, %"] == pytest.approx({0: 60, 1: 70})
    learnt = summary(made_up(), "policy gradient", 500)
    assert learnt["β"] == pytest.approx({0: 0.5, 1: 0.5})
    assert learnt["peak of the form, √KL"] == pytest.approx({0: math.e, 1: math.e})


def test_tables_and_plot_are_written(tmp_path):
    text = write(tmp_path, made_up(), [1, 2, 4, 8, 16])
    assert {p.name for p in tmp_path.iterdir()} == {
        *("table.md", "table.tex", "table.csv", "table.png"),
    }
    assert "n = 16" in text and "65.0 [" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith(f"{BEST_OF_N}  ")][:1]
    assert row[-2:] == ["1.00", "1.000"]  # of the mean over seeds
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    at = {(r["way"], r["comparisons"], r["measure"], r["point"]): r for r in rows}
    assert float(at[BEST_OF_N, "500", "gold", "4"]["mean"]) == pytest.approx(2)
    assert at[BEST_OF_N, "500", "gold", "4"]["by_seed"] == "0=2.0 1=2.0"
    panels = figure(made_up()).axes
    assert len(panels) == 4


def test_a_curve_too_short_for_a_form_has_none(tmp_path):
    curve = Curve([0.0, 0.5], [0.0, 1.0], [0.0, -1.0])
    results = {8: {0: Found(Proxy(curve, (0.0, 0.0), math.nan), {"policy gradient": curve})}}
    text = write(tmp_path, results, [1, 2])
    [row] = [
        line for line in text.splitlines() if line.startswith("policy gradient") and "8" in line
    ]
    # Largest gain and its place, nothing to lose, no form, no agreement.
    assert row.split()[2:] == ["8", "0.00", "0.00", *["–"] * 9]


def test_folders_and_numbers_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        overoptimization.study(str(tmp_path), str(tmp_path), 0)
    with pytest.raises(UserError, match="--output=gs://there: wants a directory"):
        overoptimization.study(str(tmp_path / "w"), "gs://there", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_runs_from_samples_to_tables(tmp_path):
    few = dict(sizes={8: 4}, ns=(1, 2, 32), penalties={"with penalty": 0.3})
    folders = (str(tmp_path / "w"), str(tmp_path / "out"))
    with promotion():
        text = overoptimization.study(*folders, 1, "tiny", **few)
    assert "with penalty" in text and "n = 32" in text
    review = (tmp_path / "w/comparisons/8__seed=0.jsonl").read_text().splitlines()
    verdicts = [json.loads(row)["verdict"] for row in review]
    assert verdicts.count("good") == verdicts.count("bad") == 8 and "unsure" in verdicts
    run = json.loads((tmp_path / "w/runs/8__kl=0.3__seed=0/summary.json").read_text())
    first = json.loads((tmp_path / "w/runs/base__seed=0/summary.json").read_text())
    compared, sampled, *learnt = run["rounds"][1:]
    assert compared["stages"]["generate"] == first["rounds"][1]["stages"]["generate"]
    assert pairs_of(tmp_path / "w", compared) == 8
    assert "train" not in sampled["stages"] and all("train" in r["stages"] for r in learnt)


def pairs_of(workdir, entry):
    return pq.read_table(workdir / f"store/pairs/{entry['stages']['pairs']}/{PAIRS_FILE}").num_rows
