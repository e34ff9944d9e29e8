"""README's examples of a config, a task and a filter of one's own are run as they stand there."""

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_worked_examples_run(tmp_path):
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, re.S)
    assert {name for name, _ in blocks} == {"my_config.py", "my_task.py", "my_filter.py"}
    for name, source in blocks:
        (tmp_path / name).write_text(source)
    result = subprocess.run(
        [sys.executable, "-m", "experiments.run", "--config=my_config.py", "--run_name=r"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
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
