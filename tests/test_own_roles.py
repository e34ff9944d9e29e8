"""A policy trained from scratch that is asked as a role: by chains, and as a judge of itself."""

import json

import pyarrow.parquet as pq
import pytest
import tiny
from finished_runs import promotion

from karploop import launch
from karploop.data.tasks.manners import MANNERS
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.resolve import resolve

PROMPTS = ["Name a river.", "Name a hill.", "Say yes: ok?", "What is new?"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    numbered = (f"{prompt} {i}" for prompt in PROMPTS for i in range(20))
    path.write_text(
        "".join(json.dumps({"prompt": p, "answer": "Indeed."}) + "\n" for p in numbered)
    )
    return path


GENERATE = dict(prompts=4, samples=2, batch=8, difficulty_step=0, temperature=0.5)


def settings(rows, **groups):
    made = tiny.get_config()
    made.update(
        dict(
            rounds=1,
            mesh=dict(data=1),
            task=dict(name=f"file:{rows}", seed_difficulty=1, seed_problems=20),
            model=dict(alphabet="ascii", max_length=2048),
            generate=GENERATE,
            evaluate=dict(problems=4, difficulties=(1,), batch=8),
        )
        | groups
    )
    # Until it has learnt to say what it was shown, and to stop.
    optimizer = dict(learning_rate=1e-2)
    made.warmup = dict(steps=60, checkpoint_every=60, rows=8, row_length=64, optimizer=optimizer)
    made.train = dict(steps=2, checkpoint_every=2, rows=8, row_length=64, optimizer=optimizer)
    return made.to_dict()


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """run(name, **groups of the config): the store and a round's stages; all share one base."""
    workdir = tmp_path_factory.mktemp("own")

    def run(name, **groups):
        with promotion():
            given = resolve(settings(rows, **groups))
            assert launch.launch(given, str(workdir), name) == 0
        summary = json.loads((workdir / f"runs/{name}/summary.json").read_text())
        return workdir / "store", summary["rounds"][1]["stages"]

    return run


def test_it_revises_what_it_wrote(run):
    store, done = run("revises", generate=GENERATE | dict(chain="critique_revise"))
    samples = pq.read_table(store / f"generate/{done['generate']}/samples.parquet")
    steps = [json.loads(row) for row in samples["steps"].to_pylist()]
    assert {step["role"] for row in steps for step in row} == {"policy", "critic"}
    assert any("Indeed" in step["text"] for row in steps for step in row)


def test_it_judges_what_it_wrote(run):
    """Short prompts it knows, which it ends; of what did not end nobody is asked."""
    judged = dict(judge=dict(name="rubric", fitness="off"), filter=dict(name="threshold"))
    store, done = run("judges", **judged)
    verdicts = pq.read_table(store / f"judge/{done['judge']}/verdicts.parquet").to_pydict()
    scores = [score for score in verdicts["scores"] if score is not None]
    assert scores and all(0 <= score <= 1 for score in scores)
    manifest = json.loads((store / f"judge/{done['judge']}/manifest.json").read_text())
    assert manifest["inputs"]["role_judge"]["stage"] == "warmup"


def test_its_alphabet_is_that_of_its_task_unless_it_is_to_read_more(rows):
    assert len(CharTokenizer.ascii().alphabet) == 96
    assert CharTokenizer.ascii().decode(CharTokenizer.ascii().encode("a b\n~")) == "a b\n~"
    with pytest.raises(UserError, match="'config.model.alphabet' to ascii"):
        given = settings(rows)
        given["model"]["alphabet"] = "task"
        prepare(resolve(given))
    machinery = prepare(resolve(settings(rows)))
    assert machinery.policy.vocabulary == 99


def test_it_has_room_for_the_longest_prompt_of_whichever_difficulty():
    made = tiny.get_config()
    made.task = dict(name="karploop.data.tasks.manners:MANNERS", seed_difficulty=5)
    made.mesh = dict(data=1)
    made.generate.update(dict(difficulty_step=0))
    made.evaluate.update(dict(difficulties=(1, 5)))
    made.model.max_length = made.train.row_length = made.warmup.row_length = 128
    policy = prepare(resolve(made.to_dict())).policy
    lengths = [MANNERS.max_prompt_length(kind) for kind in (1, 2, 3, 4, 5)]
    assert policy.prompt_length == max(lengths) > lengths[-1]


def test_other_characters_are_refused_before_anything_is_compiled(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Caf\\u00e9?", "answer": "yes"}\n')
    with pytest.raises(UserError, match="'é' of 'Café.*published model"):
        prepare(resolve(settings(path)))
