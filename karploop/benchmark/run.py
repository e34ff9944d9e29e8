"""One workload in this process, from its name to a row of results."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from karploop.benchmark import workloads
from karploop.benchmark.costs import Rates, total
from karploop.benchmark.measure import machine, memory, timed
from karploop.benchmark.rates import measure_rates
from karploop.benchmark.starting import first_token
from karploop.benchmark.subject import Subject, make_subject
from karploop.benchmark.workloads import Work
from karploop.config import Config

Row = dict[str, Any]


def make(name: str, subject: Subject) -> Work:
    """A workload of one model, ready to be timed."""
    from karploop.benchmark import learning  # not before it is needed: a start is timed, too

    makers: dict[str, Callable[[str, Subject], Work]] = {
        **dict.fromkeys(("w1", "w2", "w3", "w4"), workloads.draw),
        **dict.fromkeys(("score", "score_prefix"), workloads.rate),
        **dict.fromkeys(("sft", "sft_lora"), learning.imitate),
        "dpo": learning.prefer,
        "grpo": learning.reinforce,
    }
    return makers[name](name, subject)


def run_rates(config: Config, vocabulary: int | None, repeats: int) -> Row:
    """What the machine can do, for `complete` to compare with."""
    subject = make_subject(config, vocabulary)
    found = measure_rates(subject.shape, repeats)
    best = found.best(subject.weights.mesh.size)
    return machine() | dataclasses.asdict(found) | {"limit": dataclasses.asdict(best)}


def run_work(
    name: str, config: Config, vocabulary: int | None, repeats: int, limit: dict[str, float]
) -> Row:
    """A workload of one model; fields as in `report.FIELDS`.

    Args:
      limit: `Rates` of this machine, as `run_rates` found them.
    """
    busy = machine()  # before there is work of our own
    subject = make_subject(config, vocabulary)
    work = make(name, subject)
    timing = timed(work.run, repeats)
    cost, seconds = total(work.costs), timing.median
    least = sum(part.seconds(Rates(**limit)) for part in work.costs)
    return {
        **_of(name, subject, busy),
        "seconds": seconds,
        "all_seconds": timing.seconds,
        "cpu_seconds": statistics.median(timing.cpu),
        "compile_seconds": timing.compile,
        "tokens": work.tokens,
        "tokens_per_second": work.tokens / seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_per_second": cost.flops / seconds,
        "bytes_per_second": cost.bytes / seconds,
        "limit_seconds": least,
        "of_limit": least / seconds,
        "parts": {name: statistics.median(each) for name, each in timing.parts.items()},
        **memory(),
    }


def run_start(name: str, config: Config, vocabulary: int | None, began: float) -> Row:
    """One way to the first token, of a process that began at `began`."""
    busy = machine()
    subject = make_subject(config, vocabulary)
    return {**_of(name, subject, busy), **first_token(name, subject, began), **memory()}


def run_loop(config: Config, repeats: int) -> Row:
    """Rounds of a loop."""
    from karploop.benchmark import whole

    busy = machine()
    found = whole.loop_rounds(config, repeats)
    parts = {name: statistics.median(each) for name, each in found["parts"].items()}
    seconds = statistics.median(found["seconds"])
    named = {"workload": "loop", "model": config.name, "dtype": config.model.dtype}
    more = {"seconds": seconds, "all_seconds": found["seconds"], "parts": parts}
    return named | busy | found | more | memory()


def run_in_loop(config: Config, repeats: int) -> Row:
    """Sampling in a loop, and by the sampler alone."""
    from karploop.benchmark import inside

    busy = machine()
    found = inside.sampling_in_loop(config, repeats)
    parts = {name: statistics.median(each) for name, each in found["parts"].items()}
    named = {"workload": "in_loop", "model": config.name, "dtype": config.model.dtype}
    seconds = {"seconds": statistics.median(found["seconds"]), "all_seconds": found["seconds"]}
    return named | busy | found | seconds | {"parts": parts} | memory()


def _of(name: str, subject: Subject, busy: Row) -> Row:
    model = subject.weights.model.config
    return {
        "workload": name,
        "model": subject.name,
        "parameters": subject.weights.count(),
        "random_weights": not subject.config.policy.path,
        "dtype": model.dtype,
        **busy,
    }
