"""A model as a judge over the rows of a file.

    python -m experiments.judge --config=configs/judge.py:pairwise --config.roles.judge.path=PATH \
        --input=rows.jsonl --output=verdicts.jsonl

The argument is the judge: rubric (the default), pairwise, constitution or debate. Criteria and
principles are files: `--config.judge.criteria=FILE`, `--config.judge.constitution=FILE`. With
`--config.judge.rationale=True` it writes its reasons first.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    return ConfigDict(dict(judge=dict(name=arg or "rubric")))
