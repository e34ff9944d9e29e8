"""Noise put in on purpose: the share asked for, wrong in the way asked for, origins untouched."""

import numpy as np
import pytest

from karploop.config import NoiseConfig
from karploop.filtering.noise import corrupted
from karploop.records import EXAMPLES_FILE, Examples
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Rng, Stages
from karploop.store import Store


def examples(count=40) -> Examples:
    return Examples(
        prompts=[f"{i:03d}=" for i in range(count)],
        completions=[f"{i:03d}"[::-1] for i in range(count)],
        difficulty=np.full(count, 3),
        source=["f" * 32] * count,
        row=np.arange(count),
    )


@pytest.mark.parametrize("structure", ["digit", "random", "swap", "drop"])
def test_each_structure_is_wrong_in_its_own_way(structure):
    rows = list(range(0, 40, 2))
    clean = examples()
    config = NoiseConfig(rate=0.5, structure=structure)
    wrong = corrupted(clean, rows, config, np.random.default_rng(0))
    right = [clean.completions[r] for r in rows]
    differing = [
        sum(a != b for a, b in zip(w, r, strict=False)) for w, r in zip(wrong, right, strict=True)
    ]
    if structure == "digit":
        assert differing == [1] * len(rows)
    if structure == "random":
        assert all(len(w) == 3 for w in wrong)
        assert sum(d > 0 for d in differing) > len(rows) / 2
    if structure == "swap":
        assert sorted(wrong) == sorted(right)
        assert all(w != r for w, r in zip(wrong, right, strict=True))
    if structure == "drop":
        assert wrong == [r[:-1] for r in right]


def test_an_empty_answer_can_be_made_wrong_too():
    empty = Examples(["1="], [""], np.array([1]), ["seed"], np.array([0]))
    assert corrupted(empty, [0], NoiseConfig(structure="digit"), np.random.default_rng(0)) != [""]


def test_the_stage_corrupts_its_share_and_keeps_every_origin(tmp_path):
    from functools import partial

    from karploop.filtering.noise import corrupt

    clean = examples()
    store = Store(str(tmp_path))
    store.open()
    stages = Stages(store, Progress(quiet=True))
    rng = Rng(seed=0, member=0, round=0)
    kept = stages.run(
        "filter",
        lambda context: context.write_table(EXAMPLES_FILE, clean.to_table()),
        config={},
        inputs={},
        rng=rng,
    )
    noise = resolve({}, {"noise.rate": "0.25"}).noise
    noisy = stages.run(
        "corrupt", partial(corrupt, config=noise), config={}, inputs={"kept": kept}, rng=rng
    )
    after = Examples.from_table(noisy.table(EXAMPLES_FILE))
    changed = [a != b for a, b in zip(after.completions, clean.completions, strict=True)]
    assert sum(changed) == 10
    assert after.prompts == clean.prompts
    assert after.row.tolist() == clean.row.tolist()
