"""Learning from one's own samples: closed forms, a language of known probabilities, the study."""

import csv
import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.collapse import study
from karploop import cli, launch, machinery
from karploop.data.problems import is_held_out
from karploop.data.tasks.zipf import LANGUAGE, WORDS, Zipf
from karploop.errors import UserError
from karploop.models.decoder import packed_mask
from karploop.oversight import regression_collapse
from karploop.oversight.collapse_report import share_of_rise
from karploop.oversight.collapse_study import HALF, MEASURES, NLL, REACH, Generation, Language
from karploop.oversight.collapse_study import measure as measure_generation
from karploop.oversight.regression_collapse import REGIMES, Regression, bound, closed_form, measure
from karploop.stages import Artifact
from karploop.store import Store

TINY = {
    "mesh.data": "1",
    "task.seed_problems": "48",
    "model.width": "16",
    "model.head_width": "8",
    "model.mlp_width": "32",
    "warmup.steps": "6",
    "warmup.rows": "4",
    "train.steps": "6",
    "train.rows": "4",
    "generate.prompts": "48",
    "generate.batch": "48",
    "regime.budget": "20",
    "evaluate.problems": "8",
    "evaluate.samples": "2",
    "evaluate.batch": "8",
}
SMALL = dict(generations=2, seeds=1, repetitions=16, overrides=TINY)


# Linear regression


@pytest.fixture(scope="module")
def regression():
    return Regression(features=3, rows=14, noise=2.0, generations=3, repetitions=8000)


@pytest.fixture(scope="module")
def errors(regression):
    return measure(regression)


def test_replacing_adds_an_error_each_generation(regression, errors):
    expected = [4 * n * 3 / (14 - 3 - 1) for n in range(1, 4)]
    np.testing.assert_allclose(closed_form(regression, "replace"), expected)
    np.testing.assert_allclose([e.mean for e in errors["replace"]], expected, rtol=0.03)


def test_accumulating_stays_below_its_bound(regression, errors):
    found = [e.mean for e in errors["accumulate"]]
    np.testing.assert_allclose(found, closed_form(regression, "accumulate"), rtol=0.03)
    assert max(e.high for e in errors["accumulate"]) < bound(regression)
    assert bound(regression) == pytest.approx(1.2 * math.pi**2 / 6)


def test_a_budget_lies_between(errors):
    replace, accumulate, budget = (errors[regime] for regime in REGIMES)
    assert budget[0].low < accumulate[0].high and accumulate[0].low < budget[0].high
    for g in range(1, 3):
        assert accumulate[g].high < budget[g].low and budget[g].high < replace[g].low


def test_a_fit_is_that_of_the_rows_used():
    rng = np.random.default_rng(0)
    x_MxD, label_M = rng.normal(size=(40, 5)), rng.normal(size=40)
    used_M = np.arange(40) % 3 > 0
    expected = np.linalg.lstsq(x_MxD[used_M], label_M[used_M], rcond=None)[0]
    given = (jnp.float32(x_MxD), jnp.float32(label_M), jnp.array(used_M))
    np.testing.assert_allclose(regression_collapse._least_squares(*given), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(dict(features=20, rows=21), "two rows more"), (dict(repetitions=1), "at least 1")],
)
def test_regressions_without_a_mean_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Regression(**wrong)


# The language


def test_probabilities_of_all_documents_sum_to_one():
    task = Zipf(name="short", longest=2)
    texts = ["".join(words) for n in (1, 2) for words in itertools.product(WORDS, repeat=n)]
    total = math.fsum(math.exp(task.log_probability(text)) for text in texts)
    assert total == pytest.approx(1, abs=1e-12)


def test_documents_are_drawn_from_those_probabilities():
    documents = [LANGUAGE.answer(f"{number:05d}=") for number in range(4000)]
    rank_N = np.array([rank for text in documents for _, rank in LANGUAGE.transitions(text)])
    share_R = np.bincount(rank_N, minlength=len(WORDS)) / len(rank_N)
    weight_R = 1 / np.arange(1, 33)
    np.testing.assert_allclose(LANGUAGE.probability_R, weight_R / weight_R.sum())
    error_R = np.sqrt(LANGUAGE.probability_R / len(rank_N))
    assert (abs(share_R - LANGUAGE.probability_R) < 4.5 * error_R).all()
    # 1/8 but for those longer than 40.
    lengths = np.array([len(text) for text in documents])
    assert lengths.max() <= LANGUAGE.longest and abs(lengths.mean() - 7.8) < 0.4


def test_what_follows_depends_on_the_word_before():
    first_of = {(b, LANGUAGE.transitions(f"{WORDS[b]}{w}")[1][1]) for b in (0, 1) for w in WORDS}
    assert len(first_of) == 2 * len(WORDS)  # each word has a rank of its own behind each
    ranks = [LANGUAGE.transitions(f"{b}a")[1][1] for b in WORDS]
    assert len(set(ranks)) > 5


def test_a_document_is_the_same_whenever_it_is_asked_for():
    assert LANGUAGE.answer("04217=") == Zipf().answer("04217=")
    assert LANGUAGE.answer("04217=") != LANGUAGE.answer("04218=")
    assert Zipf(exponent=1.5).identity != LANGUAGE.identity


def test_rare_ranks_hold_the_share_or_less():
    for share in (0.5, 0.1):
        first = LANGUAGE.rare_from(share)
        tail_R = LANGUAGE.probability_R
        assert tail_R[first:].sum() <= share < tail_R[first - 1 :].sum()


def test_a_completion_is_neither_right_nor_wrong():
    assert LANGUAGE.answered and not LANGUAGE.verifiable
    with pytest.raises(UserError, match="neither right nor wrong"):
        LANGUAGE.verify("04217=", "a")
    with pytest.raises(UserError, match="no problem of task zipf"):
        LANGUAGE.answer("4217=")
    with pytest.raises(UserError, match="no document"):
        LANGUAGE.log_probability("a7")


def test_words_behind_what_is_no_word_are_left_out():
    [(before, _), (behind, _)] = LANGUAGE.transitions("a7bc")
    assert (before, WORDS[behind]) == (-1, "b")


# The study


@pytest.fixture(scope="module")
def prepared():
    """What one run compiled serves the others, which differ by data alone."""
    return machinery.prepare(cli.load_config("configs/zipf.py", TINY | {"rounds": "2"}))


@pytest.fixture(scope="module")
def done(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("collapse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "prepare", lambda c: dataclasses.replace(prepared, config=c))
        text = study("configs/zipf.py", str(folder / "w"), str(folder / "out"), **SMALL)
        yield folder, text


def summary(folder, regime):
    return json.loads((folder / f"w/runs/{regime}__seed=0/summary.json").read_text())


def test_the_study_writes_its_files(done):
    folder, text = done
    assert {p.name for p in (folder / "out").iterdir()} == {"table.md", "table.csv", "table.png"}
    assert "accumulate, bound" in text and "budget" in text
    with (folder / "out/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 + 3 * 3 * len(MEASURES)
    for row in rows:
        if row["measure"] == NLL and row["regime"] == "replace":
            evals = summary(folder, "replace")["rounds"][int(row["generation"]) - 1]["evals"]
            assert float(row["mean"]) == evals["zipf/1/nll"]


def test_the_same_command_finds_what_is_done(done):
    folder, text = done
    before = sorted((folder / "w/store").glob("*/*"))
    again = study("configs/zipf.py", str(folder / "w"), str(folder / "out"), **SMALL)
    assert again == text
    assert sorted((folder / "w/store").glob("*/*")) == before


def test_regimes_train_on_what_they_say_from_fresh_parameters(done):
    folder, _ = done
    seen = {}
    for regime in REGIMES:
        key = summary(folder, regime)["rounds"][-1]["stages"]["train"]
        trained = folder / "w/store/train" / key
        assert "params" not in json.loads((trained / "manifest.json").read_text())["inputs"]
        sources = pq.read_table(trained / "rows.parquet")["source"].to_pylist()
        seen[regime] = {source: sources.count(source) for source in set(sources)}
    assert len(seen["replace"]) == 1 and "seed" not in seen["replace"]
    assert len(seen["accumulate"]) == 3 and "seed" in seen["accumulate"]
    assert "seed" in seen["budget"] and sum(seen["budget"].values()) <= 20


def test_held_out_loss_is_that_of_gold_documents_computed_by_hand(done, prepared):
    folder, _ = done
    store = Store(str(folder / "w"))
    model, tokenizer = prepared.weights.model, prepared.policy.prompting.tokenizer
    base = summary(folder, "replace")["rounds"][0]
    params = prepared.weights.load(
        Artifact(store.manifest("warmup", base["stages"]["warmup"]), store, lambda: None)
    )
    key = base["stages"]["evaluate"]
    prompts = pq.read_table(folder / "w/store/evaluate" / key / "answers.parquet")["prompt"]
    losses = []
    for prompt in prompts.to_pylist():
        assert is_held_out(LANGUAGE, prompt, 0.1)
        before = tokenizer.encode_prompt(prompt)
        gold = [*tokenizer.encode(LANGUAGE.answer(prompt)), tokenizer.eos_id]
        behind = [0] * (64 - len(before) - len(gold))  # which nothing before it sees
        tokens_1xL = jnp.array([[*before, *gold, *behind]])
        real_1xL = jnp.ones_like(tokens_1xL)
        positions_1xL = jnp.arange(64)[None]
        hidden, _ = model.apply(params, tokens_1xL, packed_mask(real_1xL), positions_1xL, None, 0)
        logits_LxV = np.asarray(model.apply(params, hidden, method="logits"))[0, len(before) - 1 :]
        chance = np.exp(logits_LxV) / np.exp(logits_LxV).sum(axis=1, keepdims=True)
        losses.append(np.mean([-math.log(chance[i, token]) for i, token in enumerate(gold)]))
    assert base["evals"]["zipf/1/nll"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_measures_of_a_generation_by_hand():
    common, rare = LANGUAGE.rare_from(0.5) - 1, LANGUAGE.rare_from(0.5)
    last = len(WORDS) - 1
    transitions = [(0, common), (0, rare), (0, rare), (1, rare), (2, last)]
    found = measure_generation(LANGUAGE, Generation(3.0, 2.5, transitions), 4)
    assert found[NLL] == 3.0
    assert found[HALF] == pytest.approx(4 / 5) and found["tenth"] == pytest.approx(1 / 5)
    assert found[REACH] == pytest.approx(2 / (33 * (32 - rare)))  # the fifth is not counted


def test_the_share_of_a_rise_is_taken_seed_by_seed():
    values = {"replace": {NLL: {0: [1.0, 2.0], 1: [1.0, 3.0]}}}
    values["accumulate"] = {NLL: {0: [1.0, 1.1], 1: [1.0, 1.6]}}
    assert share_of_rise(Language(values, {}, 1), "accumulate").mean == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"generations": 0}, "--generations"),
        ({"seeds": 0}, "--seeds"),
        ({"repetitions": 1}, "1 repetitions"),
        ({"overrides": TINY | {"task.name": "copy"}}, "task 'copy'"),
        ({"overrides": TINY | {"evaluate.samples": "0"}}, "evaluate.samples"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        study("configs/zipf.py", str(tmp_path / "w"), str(tmp_path / "w"), **(SMALL | wrong))
    assert not list(tmp_path.iterdir())
