"""The loop on a published model: what is read, asked, trained and measured."""

import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")

from published import compiled, run, settings, sums  # noqa: E402
from small_models import save_llama  # noqa: E402
from small_tokenizers import CHATML  # noqa: E402

from experiments.trace import as_text  # noqa: E402
from karploop.catalogue import read_catalogue  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.lineage import trace_params, trace_sample  # noqa: E402
from karploop.machinery import prepare  # noqa: E402
from karploop.models.checkpoint import load_params  # noqa: E402
from karploop.models.weights import ADAPTER, FILE, SOURCE  # noqa: E402
from karploop.oversight.evaluate import _Asking  # noqa: E402
from karploop.records import Problems  # noqa: E402
from karploop.resolve import resolve  # noqa: E402
from karploop.store import Store  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("chat"), CHATML)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(model, task, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("published")
    return workdir, run(workdir, model=model, task=task)


def manifest(workdir, stage: str, key: str):
    return Store(str(workdir)).manifest(stage, key)


def test_a_run_starts_from_the_checkpoint_and_trains_an_adapter(finished):
    workdir, summary = finished
    base, first, second = summary["rounds"]
    assert set(base["stages"]) == {"held_out", "seed", "import", "evaluate"}
    origin = manifest(workdir, "import", base["stages"]["import"])
    assert set(origin.files) == {SOURCE}
    for done in (first, second):
        assert ADAPTER in manifest(workdir, "train", done["stages"]["train"]).files
    assert (
        summary["params_sha256"]
        == (manifest(workdir, "train", second["stages"]["train"]).files[ADAPTER]["sha256"])
    )


def test_a_second_run_computes_nothing(finished, model, task, capfd):
    workdir, summary = finished
    capfd.readouterr()
    again = run(workdir, "again", model=model, task=task)
    assert again["params_sha256"] == summary["params_sha256"]
    assert again["rounds"] == summary["rounds"]


def test_samples_of_held_out_problems_are_measured(finished):
    _, summary = finished
    for done in summary["rounds"]:
        evals = {name.removeprefix("sums/1/"): value for name, value in done["evals"].items()}
        wanted = {"exact_match", "nll", "problems", "majority_answer", "random_answer"}
        wanted |= {"pass@1", "pass@3", "distinct", "solutions"}
        assert set(evals) == wanted | ({"kl"} if done["round"] >= 0 else set())
        assert evals["problems"] == 6 and 0 <= evals["pass@1"] <= evals["pass@3"] <= 1
        assert 1 / 3 <= evals["distinct"] <= 1
        # Nine sums of 81 are 8: what a constant answer gets right.
        assert 0 <= evals["majority_answer"] < 0.5
    assert all("overlap/exact" in done["metrics"] for done in summary["rounds"][1:])


def test_divergence_from_the_base(model, task, tmp_path):
    kwargs = dict(model=model, task=task, rounds=1)
    [base, far] = run(tmp_path, **kwargs, train__optimizer=dict(learning_rate=0.3))["rounds"]
    assert far["evals"]["sums/1/kl"] > 0.1
    # Parameters against themselves: nothing but rounding.
    machinery = compiled(model, task, 2)
    evaluate = base["stages"]["evaluate"]
    answers = pq.read_table(tmp_path / "store" / "evaluate" / evaluate / "answers.parquet")
    prompts = answers["prompt"].to_pylist()[:4]
    params = load_params(machinery.policy.role.checkpoint, machinery.weights)
    asking = _Asking(
        machinery.sampler, machinery.policy.prompting, machinery.task,
        lambda difficulty: machinery.policy.completion_length, machinery.config.evaluate,
    )  # fmt: skip
    problems = Problems(np.ones(4, np.int64), prompts, ["1"] * 4)
    np.testing.assert_allclose(asking.ask(params, params, problems, range(4))["kl"], 0, atol=1e-4)


def test_what_is_kept_is_what_was_sampled_and_never_an_example_or_held_out(finished):
    workdir, summary = finished
    store = workdir / "store"
    base = summary["rounds"][0]["stages"]
    held_out = pq.read_table(store / "held_out" / base["held_out"] / "held_out.parquet")
    seed = pq.read_table(store / "seed" / base["seed"] / "examples.parquet").to_pydict()
    assert len(seed["prompts"]) == 4 and all(c.startswith(" ") for c in seed["completions"])
    for done in summary["rounds"][1:]:
        prompts = pq.read_table(store / "prompts" / done["stages"]["prompts"] / "prompts.parquet")
        asked = set(prompts["prompt"].to_pylist())
        assert len(asked) == 8
        assert not asked & set(held_out["prompts"].to_pylist())
        assert not asked & set(seed["prompts"][:2])


def test_lineage_leads_to_the_checkpoint(finished):
    workdir, summary = finished
    catalogue = read_catalogue(Store(str(workdir)))
    stages = summary["rounds"][1]["stages"]
    sample = trace_sample(catalogue, f"{stages['generate']}:0")
    assert sample["weights"]["stage"] == "import"
    assert [trained["stage"] for trained in sample["trained"]] == ["train"] * len(sample["trained"])
    found = trace_params(catalogue, summary["params_sha256"])
    assert [link["stage"] for link in found["chain"]] == ["train", "train", "import"]
    assert "config.json" in found["chain"][-1]["checkpoint"]
    assert found["chain"][0]["checkpoint"] is None
    shown = as_text(found)
    assert "a published checkpoint" in shown and "fresh parameters" not in shown


def test_all_stages_of_a_run_are_within_its_reach(finished):
    """What garbage collection spares while a run is live."""
    workdir, _ = finished
    catalogue = read_catalogue(Store(str(workdir)))
    config = next(run.config for run in catalogue.runs if run.name == "run")
    assert catalogue.reach(config) == set(catalogue.manifests)


def test_everything_is_trained_without_an_adapter(model, task, tmp_path):
    summary = run(tmp_path, model=model, task=task, train__lora=dict(rank=0), rounds=1, fresh=True)
    key = summary["rounds"][1]["stages"]["train"]
    assert FILE in manifest(tmp_path, "train", key).files


def test_a_chat_model_is_asked_by_its_template(chat_model, task, tmp_path):
    prompt = dict(chat=True, shots=1, instruction="Add.", max_new_tokens=6)
    kwargs = dict(model=chat_model, task=task, prompt=prompt, rounds=1, train__row_length=128)
    summary = run(tmp_path, **kwargs, fresh=True)
    assert summary["complete"]
    prompting = prepare(resolve(settings(**kwargs))).policy.prompting
    tokenizer = prompting.tokenizer
    text = tokenizer._backend.decode(prompting.prompt("1 + 2"), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>assistant") == 2
    start, end = prompting.example("1 + 2", "3")
    assert tokenizer._backend.decode(end, skip_special_tokens=False) == "3<|im_end|>"
    without = tokenizer._backend.decode(start, skip_special_tokens=False)
    assert without.count("<|im_start|>assistant") == 1 and "Add." in without


def test_without_seed_problems_only_what_was_kept_is_trained_on(model, task, tmp_path):
    none = dict(task__seed_problems=0, prompt__shots=0)
    summary = run(tmp_path, model=model, task=task, rounds=1, **none)
    key = summary["rounds"][1]["stages"]["train"]
    rows = pq.read_table(tmp_path / "store" / "train" / key / "rows.parquet").to_pydict()
    assert set(rows["source"]) == {summary["rounds"][1]["stages"]["generate"]}


@pytest.mark.slow
def test_problems_without_answers_are_sampled_and_trained_on(model, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(60)))
    none = dict(task__seed_problems=0, prompt__shots=0, rounds=1)
    summary = run(tmp_path, model=model, task=f"file:{path}?name=open", fresh=True, **none)
    evals = summary["rounds"][1]["evals"]
    assert set(evals) == {"open/1/distinct", "open/1/kl", "open/1/problems"}
    assert "train" in summary["rounds"][1]["stages"]
    assert not (tmp_path / "runs" / "run" / "accuracy.png").exists()


def test_nothing_is_trained_on_nothing(model, task, tmp_path, capfd):
    nothing = dict(filter=dict(name="discard", on_empty="train"), task__seed_problems=0)
    summary = run(
        tmp_path, model=model, task=task, rounds=1, fresh=True, prompt__shots=0, **nothing
    )
    assert "train" not in summary["rounds"][1]["stages"]
    assert "kept nothing: training is skipped" in capfd.readouterr().err


def test_a_changed_checkpoint_is_another_base(model, task, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in pathlib.Path(model).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    kwargs = dict(task=task, rounds=0, fresh=True)
    same = run(tmp_path / "w", "a", model=model, **kwargs)
    moved = run(tmp_path / "w", "b", model=str(copy), **kwargs)
    assert moved["params_sha256"] == same["params_sha256"]
    [weights] = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    other = run(tmp_path / "w", "c", model=str(copy), **kwargs)
    assert other["params_sha256"] != same["params_sha256"]


@pytest.mark.slow
def test_prompts_that_repeat_held_out_ones_in_other_words_are_dropped(model, tmp_path):
    """The split goes by letters; the same words with other marks are caught behind it."""
    sums = [f"{a} + {b}" for a in range(9) for b in range(9)]
    rows = [{"prompt": text + mark, "answer": "1"} for text in sums for mark in ("", " ?", ":")]
    path = tmp_path / "doubled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"file:{path}?name=doubled"
    kwargs = dict(model=model, task=task, rounds=1, fresh=True, filter__name="discard")
    kwargs |= dict(filter__on_empty="skip", generate__prompts=100, generate__samples=1)
    [base, done] = run(tmp_path, **kwargs)["rounds"]
    store = tmp_path / "store"
    table = store / "held_out" / base["stages"]["held_out"] / "held_out.parquet"
    held_out = {prompt.rstrip(" ?:") for prompt in pq.read_table(table)["prompts"].to_pylist()}
    table = store / "prompts" / done["stages"]["prompts"] / "prompts.parquet"
    asked = [prompt.rstrip(" ?:") for prompt in pq.read_table(table)["prompt"].to_pylist()]
    dropped = done["metrics"]["overlap/exact"]
    assert dropped > 0 and len(asked) == 100 - dropped
    assert not held_out & set(asked)
    seed = store / "seed" / base["stages"]["seed"] / "examples.parquet"
    labelled = {prompt.rstrip(" ?:") for prompt in pq.read_table(seed)["prompts"].to_pylist()}
    assert not held_out & labelled


BAD = {
    "its own shape": dict(model__width=32),
    "trained from scratch: set it to 1": dict(members=2),
    "no model at 'nowhere'": dict(model="nowhere"),
    "is 5, and 'config.task.seed_problems' gives 4": dict(prompt__shots=5),
    "has none: set it to False": dict(prompt__chat=True),
    "lower 'config.prompt.shots'": dict(prompt__max_new_tokens=256),
    "must contain {prompt} exactly once": dict(prompt__question="Q:"),
    "shorter than the longest example": dict(train__row_length=8),
    "longer than the model's context of 256": dict(train__row_length=512),
    "gold answer of": dict(prompt__max_new_tokens=2),
    "no regular expression": dict(filter=dict(name="parses", pattern="(")),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_found_before_anything_compiles(model, task, message):
    arguments = dict(model=model, task=task) | BAD[message]
    with pytest.raises(UserError) as error:
        prepare(resolve(settings(**arguments)))
    assert message in str(error.value)


def test_prompt_settings_need_a_published_model():
    with pytest.raises(UserError, match="'config.prompt' says how a published model is asked"):
        prepare(resolve(dict(prompt=dict(shots=3), mesh=dict(data=1))))
    with pytest.raises(UserError, match="starts from labelled problems"):
        prepare(resolve(dict(task=dict(seed_problems=0), mesh=dict(data=1))))


def test_log_probabilities_of_the_base_are_compared_token_by_token(finished):
    workdir, summary = finished
    key = summary["rounds"][2]["stages"]["evaluate"]
    answers = pq.read_table(workdir / "store" / "evaluate" / key / "answers.parquet").to_pydict()
    assert np.mean(answers["kl"]) == pytest.approx(summary["rounds"][2]["evals"]["sums/1/kl"])
    assert all(len(texts) == 3 for texts in answers["samples"])
