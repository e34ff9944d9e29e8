"""README's examples of a config, a task and a filter of one's own are run as they stand there."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from small_models import save_llama

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def mine(tmp_path):
    """A folder with the files of one's own that README shows."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, re.S)
    blocks += re.findall(r"```jinja\n\{# (\S+) #\}\n(.*?)```", README, re.S)
    assert {name for name, _ in blocks} == {
        "my_config.py", "my_task.py", "my_filter.py", "my_chain.py", "polish.jinja",
    }  # fmt: skip
    for name, source in blocks:
        (tmp_path / name).write_text(source)
    return tmp_path


def run(folder, *command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def test_a_chain_of_ones_own_runs(mine, tmp_path):
    model = save_llama(tmp_path / "model", max_length=512)
    (mine / "rows.jsonl").write_text('{"prompt": "Water?"}\n')
    run(
        mine, "experiments.chain", f"--config={ROOT}/configs/chain.py",
        "--config.chain=my_chain:POLITE", "--config.max_new_tokens=4",
        f"--config.roles.policy.path={model}", "--input=rows.jsonl", "--output=out.jsonl",
    )  # fmt: skip
    row = json.loads((mine / "out.jsonl").read_text())
    draft, polished = row["steps"]
    assert draft["prompt"] == "Water?" and polished["role"] == "editor"
    assert polished["prompt"].startswith(
        f"Request: Water?\nReply: {row['steps'][0]['text'].strip()}"
    )


def test_the_worked_examples_run(mine, tmp_path):
    run(mine, "experiments.run", "--config=my_config.py", "--run_name=r")
    summary = json.loads((tmp_path / "workdir/runs/r/summary.json").read_text())
    assert "parity/5/exact_match" in summary["rounds"][-1]["evals"]


def test_the_first_two_installing_blocks_are_single_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    installing = [block.strip() for block in blocks if "install" in block]
    assert len(installing) == 2
    for command in installing:
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
    assert "experiments.run --config=configs/addition.py" in installing[0]
    assert "pytest" in installing[1]


def test_every_file_that_readme_names_exists():
    for name in re.findall(r"(?:configs|karploop|tests|experiments)/[\w/]+\.(?:py|png)", README):
        assert (ROOT / name).exists(), name
