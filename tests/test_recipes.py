"""Each recipe, cut down to what a test can wait for, by its command line."""

import json
import os
import subprocess
import sys

import pytest
from processes import LIMIT_SECONDS, ROOT

# Config and the argument under which it is small.
RECIPES = [
    *("star.py:tiny", "star.py:rationalise,tiny"),
    *("constitutional.py:tiny", "constitutional.py:dpo,tiny"),
    *("rest_em.py:tiny", "raft.py:tiny", "rft.py:tiny", "spin.py:tiny"),
    *("distill.py:tiny", "distill.py:on_policy,tiny"),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_ends_with_a_result(recipe, tmp_path):
    command = ["experiments.run", f"--config=configs/{recipe}", f"--workdir={tmp_path}"]
    found = subprocess.run(
        [sys.executable, "-m", *command, "--run_name=r"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert summary["complete"]
    base, *rounds = summary["rounds"]
    learnt = [{"train", "reward"} & done["stages"].keys() for done in rounds]
    assert rounds and all(learnt), "something was learnt from"
    assert rounds[-1]["evals"].keys() >= base["evals"].keys()
    assert any(rounds[-1]["evals"][name] != value for name, value in base["evals"].items())
