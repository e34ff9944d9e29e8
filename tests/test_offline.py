"""experiments.generate and experiments.score: rows in, the same rows with more in them out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("transformers")

from processes import ROOT  # noqa: E402
from small_models import save_llama  # noqa: E402
from small_tokenizers import CHATML  # noqa: E402

from karploop import offline  # noqa: E402
from karploop.data.pretrained import load_tokenizer  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.offline import GenerateJob, ScoreJob  # noqa: E402
from karploop.reporting.progress import Progress  # noqa: E402

QUIET = Progress(quiet=True)
CONTEXT = 64
ROWS = [
    {"id": 3, "prompt": "what is 12 + 34?"},
    {"messages": [{"role": "user", "content": "hello"}], "id": 1},
    {"tokens": [5, 6, 7], "note": "kept"},
    {"prompt": "the quick brown fox", "id": 0},
    {"prompt": "é 🙂", "nested": {"a": [1, None]}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small random Llama and a chat template."""
    return save_llama(tmp_path_factory.mktemp("model"), CHATML, max_length=CONTEXT)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def generated(model, tmp_path, rows=ROWS, name="out.jsonl", **settings):
    job = GenerateJob(model, **(dict(n=2, max_new_tokens=6, batch=8) | settings))
    source = write(tmp_path / "in.jsonl", rows)
    offline.generate(job, source, str(tmp_path / name), QUIET)
    return read(tmp_path / name)


def test_rows_keep_order_and_fields_and_gain_completions(model, tmp_path):
    found = generated(model, tmp_path)
    assert [{k: v for k, v in row.items() if k != "completions"} for row in found] == ROWS
    tokenizer = load_tokenizer(model)
    for row in found:
        assert len(row["completions"]) == 2
        for completion in row["completions"]:
            tokens = completion["tokens"]
            stopped = tokens[-1] in tokenizer.stop_ids
            assert completion["finish_reason"] == ("stop" if stopped else "length")
            assert 0 < len(tokens) <= 6 and (stopped or len(tokens) == 6)
            assert len(completion["logprobs"]) == len(tokens)
            assert completion["text"] == tokenizer.decode(tokens)
    assert not list(tmp_path.glob(".*"))


def test_the_scorer_agrees_with_the_log_probabilities_of_sampling(model, tmp_path):
    found = generated(model, tmp_path, temperature=0.7, top_p=0.9)
    tokenizer = load_tokenizer(model)
    first = tokenizer.encode_prompt(ROWS[0]["prompt"])
    completion = found[0]["completions"][0]
    rows = [
        {"tokens": first + completion["tokens"]},
        {"prompt": "hello", "completion": " world", "id": 7},
        {"text": "hello world"},
    ]
    source, target = write(tmp_path / "rows.jsonl", rows), tmp_path / "scored.jsonl"
    offline.score(ScoreJob(model), source, str(target), QUIET)
    by_tokens, pair, text = read(target)
    np.testing.assert_allclose(
        by_tokens["logprobs"][len(first) :], completion["logprobs"], atol=1e-4
    )
    assert by_tokens["logprobs"][0] is None and text["logprobs"][0] is None
    assert pair["id"] == 7 and pair["completion"] == " world" and None not in pair["logprobs"]
    assert pair["tokens"] == tokenizer.encode(" world")
    for row in (by_tokens, pair, text):
        assert row["sum"] == pytest.approx(sum(x for x in row["logprobs"] if x is not None))
    tail = len(pair["tokens"])
    np.testing.assert_allclose(text["logprobs"][-tail:], pair["logprobs"], atol=1e-4)


def test_batch_size_changes_nothing_and_the_seed_does(model, tmp_path):
    rows = [*ROWS, *ROWS]  # two batches of eight, or one of sixteen
    texts = [
        [c["tokens"] for row in rows for c in row["completions"]]
        for rows in (
            generated(model, tmp_path, rows, batch=8),
            generated(model, tmp_path, rows, batch=16, name="b"),
            generated(model, tmp_path, rows, seed=1, name="c"),
        )
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_all_prompts_begin_with_is_read_once(model, tmp_path, monkeypatch):
    """With the same log-probabilities; a row by itself shares nothing."""
    rows = [
        {"prompt": "the quick brown fox jumps over the " + tail} for tail in ("lazy dog", "cat")
    ]
    shared = []

    def sampler(*args, prefix=(), **kwargs):
        shared.append(len(prefix))
        return Sampler(*args, prefix=prefix, **kwargs)

    Sampler = offline.Sampler
    monkeypatch.setattr(offline, "Sampler", sampler)
    monkeypatch.setattr(offline, "_WORTH_SHARING", 4)
    together = generated(model, tmp_path, rows, temperature=0.0)
    alone = generated(model, tmp_path, rows[:1], name="alone", temperature=0.0)
    assert shared[0] > 4 and shared[1] == 0
    one, other = (found[0]["completions"][0] for found in (together, alone))
    assert one["tokens"] == other["tokens"]
    np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)


def test_greedy_completions_of_one_prompt_are_equal(model, tmp_path):
    for row in generated(model, tmp_path, temperature=0.0):
        assert row["completions"][0]["tokens"] == row["completions"][1]["tokens"]


def test_an_interrupted_job_goes_on_where_it_was(model, tmp_path, monkeypatch):
    rows = ROWS * 4  # three batches
    expected = generated(model, tmp_path, rows, name="whole.jsonl")
    calls, write_part = [], offline._write

    def breaks(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_part(*args)

    monkeypatch.setattr(offline, "_write", breaks)
    with pytest.raises(KeyboardInterrupt):
        generated(model, tmp_path, rows)
    (partial,) = tmp_path.glob(".*.partial")
    assert not (tmp_path / "out.jsonl").exists()
    with open(partial, "a") as torn:
        torn.write('{"id": 3, "prom')  # as a kill would leave it
    assert generated(model, tmp_path, rows) == expected
    assert len(calls) == 4, "the first batch is not computed again"
    assert not partial.exists()


def test_the_context_limits_completions(model, tmp_path):
    rows = [{"tokens": [5] * (CONTEXT - 3)}]
    (row,) = generated(model, tmp_path, rows, n=1, temperature=0.0, max_new_tokens=20)
    assert len(row["completions"][0]["tokens"]) <= 3


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"tokens": [5] * CONTEXT}], {}, "line 1: the prompt takes 64 tokens.*context of 64"),
        ([{"prompt": "a"}, {"question": "b"}], {}, "line 2: no prompt in this row"),
        ([{"tokens": [5, 100_000]}], {}, "line 1: token 100000"),
        ([], {}, "no rows"),
        (ROWS, {"n": 0}, "--n must be at least 1"),
        (ROWS, {"top_p": 1.5}, "--top_p must be at most 1"),
        (ROWS, {"batch": 3}, "'--batch' is 3.*parts"),
        (ROWS, {"model": "/nowhere"}, "no model at '/nowhere'"),
    ],
)
def test_mistakes_are_named_before_anything_compiles(model, tmp_path, rows, settings, message):
    with pytest.raises(UserError, match=message):
        generated(settings.pop("model", model), tmp_path, rows, **settings)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_to_score_needs_something_to_score(model, tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(UserError, match="line 1: a row to score has a 'completion'"):
        offline.score(ScoreJob(model), source, str(tmp_path / "out.jsonl"), QUIET)


def command(tool, *arguments, stdin=""):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{tool}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )


def test_the_commands_read_and_write_pipes_and_refuse_with_code_2(model, tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    flags = (f"--model={model}", "--input=-", "--output=-", "--max_new_tokens=3")
    done = command("generate", *flags, stdin=rows)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line).get("id") for line in done.stdout.splitlines()] == [
        3,
        1,
        None,
        0,
        None,
    ]
    assert "generate  5/5 rows" in done.stderr
    refused = command("score", *flags[:3], stdin='{"text": "a"}\n{broken\n')
    assert refused.returncode == 2
    assert "standard input, line 2: malformed JSON" in refused.stderr
    assert "Traceback" not in refused.stderr
