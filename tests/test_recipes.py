"""Each recipe, cut down to what a test can wait for, by its command line."""

import json
import os
import subprocess
import sys

import pytest
from processes import LIMIT_SECONDS, ROOT

# Config and the argument under which it is small.
RECIPES = [
    *("star.py:tiny", "constitutional.py:tiny", "distill.py:tiny"),
    *("self_rewarding.py:tiny", "rlaif.py:tiny", "d_rlaif.py:tiny"),
    *("rest_em.py:tiny", "raft.py:tiny", "rft.py:tiny", "spin.py:tiny"),
]
VARIANTS = [
    pytest.param(f"{recipe},tiny", marks=pytest.mark.slow)
    for recipe in ("star.py:rationalise", "constitutional.py:dpo", "distill.py:on_policy")
]
# Those whose verdicts people give, while the run waits.
REVIEWED = ["rlhf.py:tiny", pytest.param("rlhf.py:dpo,tiny", marks=pytest.mark.slow)]


def run(recipe, folder, *more):
    command = ["experiments.run", f"--config=configs/{recipe}", f"--workdir={folder}"]
    return subprocess.run(
        [sys.executable, "-m", *command, "--run_name=r", *more],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def check(found, folder):
    assert found.returncode == 0, found.stderr
    summary = json.loads((folder / "runs/r/summary.json").read_text())
    assert summary["complete"]
    base, *rounds = summary["rounds"]
    learnt = [{"train", "reward"} & done["stages"].keys() for done in rounds]
    assert rounds and all(learnt), "something was learnt from"
    assert rounds[-1]["evals"].keys() >= base["evals"].keys()
    assert any(rounds[-1]["evals"][name] != value for name, value in base["evals"].items())


@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANTS])
def test_a_recipe_ends_with_a_result(recipe, tmp_path):
    check(run(recipe, tmp_path), tmp_path)


@pytest.mark.parametrize("recipe", REVIEWED)
def test_a_recipe_waits_for_people_and_ends_with_a_result(recipe, tmp_path):
    review = tmp_path / "review.jsonl"
    given = f"--config.judge.review={review}"
    waiting = run(recipe, tmp_path, given)
    assert waiting.returncode == 1 and "Trace" not in waiting.stderr
    assert f"wait for a verdict in '{review}'" in waiting.stderr
    rows = [json.loads(line) for line in review.read_text().splitlines()]
    said = [row | {"better": "a" if len(row["a"]) < len(row["b"]) else "b"} for row in rows]
    review.write_text("".join(json.dumps(row) + "\n" for row in said))
    check(run(recipe, tmp_path, given), tmp_path)
