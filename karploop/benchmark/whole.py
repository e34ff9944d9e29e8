"""Rounds of a whole loop."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

from karploop.catalogue import read_catalogue
from karploop.config import Config
from karploop.errors import RunFailed
from karploop.launch import launch
from karploop.store import Store

# Stages that sample, score or train; whatever else a round does is "outside".
INSIDE = ("generate", "rationalise", "evaluate", "fitness", "warmup", "train", "reward")


def loop_rounds(config: Config, repeats: int) -> dict[str, Any]:
    """Runs a loop in a workdir of its own: the base, a round to warm up, and `repeats` rounds.

    A round's time is from the commit of its predecessor's last stage to that of its own, so that
    metrics, tables and pictures written in between are in it; a stage's is as it is recorded.

    Returns:
      seconds: of each round but the first.
      parts: by stage, seconds in each of these rounds; `outside`, what is left of a round beside
        sampling, scoring and training (stages of `INSIDE`).
      outside_share: median over these rounds.
      run_seconds, run_outside_share: of the whole command's work: the base, all rounds, and what
        is compiled.
    """
    config = dataclasses.replace(config, rounds=repeats + 1)
    with tempfile.TemporaryDirectory() as workdir:
        started = time.time()
        if launch(config, workdir, "bench"):
            raise RunFailed("the loop did not end well")
        whole = time.time() - started
        store = Store(workdir)
        (run,) = read_catalogue(store).runs
        ends = [_last_commit(store, run.stages[entry["round"]]) for entry in run.rounds]
    if len(run.rounds) < repeats + 2:
        raise RunFailed(f"the loop stopped after {len(run.rounds) - 1} of {repeats + 1} rounds")
    by_stage = [{_stage(s): t for s, t in entry["seconds"].items()} for entry in run.rounds]
    rounds = [after - before for before, after in zip(ends[1:], ends[2:], strict=False)]
    parts = {name: [stages.get(name, 0.0) for stages in by_stage[2:]] for name in by_stage[-1]}
    outside = [
        seconds - sum(stages.get(name, 0.0) for name in INSIDE)
        for seconds, stages in zip(rounds, by_stage[2:], strict=True)
    ]
    inside = sum(stages.get(name, 0.0) for stages in by_stage for name in INSIDE)
    shares = [left / seconds for left, seconds in zip(outside, rounds, strict=True)]
    return {
        "seconds": rounds,
        "parts": parts | {"outside": outside},
        "outside_share": statistics.median(shares),
        "run_seconds": whole,
        "run_outside_share": 1.0 - inside / whole,
    }


def _last_commit(store: Store, stages: list[tuple[str, str]]) -> float:
    """When the last of a round's stages was committed, seconds since 1970."""
    entries = [pathlib.Path(store.entry(stage, key)) for stage, key in stages]
    return max((entry / "manifest.json").stat().st_mtime for entry in entries)


def _stage(name: str) -> str:
    return name.partition(".")[0]
