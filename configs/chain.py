"""A chain of prompts over the rows of a file.

    python -m experiments.chain --config=configs/chain.py --config.chain=critique_revise \
        --config.roles.policy.path=PATH --input=rows.jsonl --output=out.jsonl

Chains: answer, question_answer (rows with a `topic`), reasoning, critique_revise, debate,
draft_judge_revise, extract_validate_repair, safe_reply. `--config.options.passes=2`,
`--config.options.turns=2` and the like say what they leave open.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    return ConfigDict(dict(chain=arg or "answer"))
