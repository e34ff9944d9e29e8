"""Recipes of the literature: each runs from end to end in its smallest form."""

import json

import pytest
from finished_runs import promotion

from karploop import cli, launch
from karploop.sweeps import ROOT

RECIPES = ["constitutional:tiny", "constitutional:dpo,tiny"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs(recipe, tmp_path):
    name, _, argument = recipe.partition(":")
    config = cli.load_config(f"{ROOT}/configs/{name}.py:{argument}", {"mesh.data": "1"})
    with promotion():
        assert launch.launch(config, str(tmp_path), "r") == 0
    rounds = json.loads((tmp_path / "runs/r/summary.json").read_text())["rounds"]
    assert [entry["round"] for entry in rounds] == list(range(-1, config.rounds))
