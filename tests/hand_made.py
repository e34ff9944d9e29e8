"""Samples written by hand, for what judges and filters make of them."""

import numpy as np

from karploop.records import Samples


def samples(rows, difficulty=None) -> Samples:
    """Rows of (prompt id, member, completion, finished); prompts are '<id digit>2='."""
    count = len(rows)
    return Samples(
        prompt_id_S=np.array([r[0] for r in rows], int),
        sample_S=np.arange(count),
        member_S=np.array([r[1] for r in rows], int),
        difficulty_S=np.array(difficulty if difficulty is not None else [2] * count, int),
        prompts=[f"{r[0]}2=" for r in rows],
        completions=[r[2] for r in rows],
        finished_S=np.array([r[3] for r in rows], bool),
        tokens=[[3] * len(r[2]) for r in rows],
        logprobs=[[-1.0] * len(r[2]) for r in rows],
        entropy_S=np.zeros(count),
    )
