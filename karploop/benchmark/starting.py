"""The way to the first token."""

from __future__ import annotations

import dataclasses
import time

import jax

from karploop.benchmark.names import STARTS
from karploop.benchmark.subject import Subject
from karploop.benchmark.workloads import Drawing, asked
from karploop.compiling import compiling


def first_token(name: str, subject: Subject, began: float) -> dict[str, float]:
    """Seconds from `began` (of the clock `time.time`) until the first tokens of a workload.

    Its program is compiled for all its new tokens and asked for one. Parts: `imports` until this
    is called; `parameters` read or drawn, while programs are compiled; `sampling` once both are
    there.
    """
    called = time.time()
    wanted = asked(STARTS[name], subject.config.seed)
    first = dataclasses.replace(wanted, new=[1] * len(wanted.new))
    drawing = Drawing(name, subject, first, room=max(wanted.new))
    with compiling(drawing.lower):
        subject.tokenizer.encode(subject.tokenizer.decode(drawing.prompts[0]))  # as text's are
        params = jax.block_until_ready(subject.load())
    loaded = time.time()
    drawing(0, params)
    done = time.time()
    return {
        "seconds": done - began,
        "imports": called - began,
        "parameters": loaded - called,
        "sampling": done - loaded,
    }
