"""How long programs and a round would take: estimates from arithmetic, memory and network.

No program was run. A device computes at its peak, reads its memory at its peak, and sends at the
peak of one ring for each mesh axis. At best the three go on side by side, and the longest counts;
at worst one waits for the other, and they add up. Real programs reach their peaks in part, so that
even the latter is often too short; what it tells is which layout is better, and what binds it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from karploop.dryrun import flops
from karploop.dryrun.chips import Chip
from karploop.dryrun.programs import ROLLOUT, SCORE, STEP, Laid, Program, per_device
from karploop.mesh import batch_parts


@dataclass(frozen=True)
class Time:
    """Seconds of one program by what takes them."""

    compute: float
    memory: float
    network: float

    @property
    def best(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def worst(self) -> float:
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        return max(vars(self), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Work:
    """What a program does.

    Attributes:
      flops: of all devices together.
      traffic: bytes that each device reads and writes in its memory, at least.
      tokens: that it makes, scores or learns from.
    """

    flops: float
    traffic: float
    tokens: int


def work(laid: Laid, name: str) -> Work:
    """Of a program at its full shapes: every completion as long as it may be, every row full."""
    g, e, t = laid.config.generate, laid.config.evaluate, laid.config.train
    if name == ROLLOUT:
        return sampling_work(laid, g.batch, g.samples)
    c, vocabulary, mesh = laid.policy.config, laid.policy.vocabulary, laid.weights.mesh
    weights = flops.weight_bytes(c, vocabulary, mesh.shape["tensor"])
    if name == SCORE:
        length = laid.prompt + laid.sampler.completion_length
        new = laid.sampler.completion_length
        keys = laid.prefix + length
        once = flops.forward(c, vocabulary, e.batch * length, keys, e.batch * new)
        return Work(once.total, weights + _activations(laid, e.batch * length), e.batch * new)
    tokens = t.rows * t.row_length
    count = flops.train_step(c, vocabulary, t.rows, t.row_length, t.lora, t.accumulation)
    passes = (2 + (c.remat == "full")) * t.accumulation
    state = 2 * per_device(laid.trainer.abstract, laid.trainer.shardings)  # read and written
    return Work(count, state + passes * weights + 3 * _activations(laid, tokens), tokens)


def sampling_work(laid: Laid, prompts: int, samples: int) -> Work:
    """Of `samples` completions of each of so many prompts."""
    c, vocabulary, mesh = laid.policy.config, laid.policy.vocabulary, laid.weights.mesh
    tensor, new = mesh.shape["tensor"], laid.sampler.completion_length
    length, rows = laid.prefix + laid.prompt, prompts * samples
    weights = flops.weight_bytes(c, vocabulary, tensor)
    slots = min(laid.config.generate.slots or prompts, prompts)
    decoded = slots * samples
    g = laid.config.generate
    if g.weights == "int8":
        weights /= 2 if c.dtype == "bfloat16" else 4
    # A prompt's keys and values are read once for all of its samples.
    laid_out = batch_parts(mesh), tensor, g.cache
    cache = flops.cache_bytes(c, slots, length, *laid_out)
    cache += flops.cache_bytes(c, decoded, new, *laid_out)
    steps = max(new - 1, 0) * math.ceil(prompts / slots)
    traffic = weights + _activations(laid, prompts * length) + steps * (weights + cache)
    count = flops.rollout(c, vocabulary, prompts, samples, length, new)
    return Work(count, traffic, rows * new)


def _activations(laid: Laid, tokens: int) -> float:
    """Bytes written and read once between the parts of a layer, on each device."""
    c, mesh = laid.policy.config, laid.weights.mesh
    size = 2 if c.dtype == "bfloat16" else 4
    inside = 6 * c.width + 3 * (c.mlp_width + c.heads * c.head_width) / mesh.shape["tensor"]
    return 2.0 * size * tokens / batch_parts(mesh) * c.layers * inside


def moved(program: Program) -> dict[str, float]:
    """Bytes that each device sends, by the mesh axes that they go over, as in 'data+fsdp'."""
    by_axes: dict[str, float] = defaultdict(float)
    for one in program.collectives:
        by_axes["+".join(one.axes)] += one.total
    return dict(by_axes)


def time_of(done: Work, sent: dict[str, float], chip: Chip, devices: int, slices: int = 1) -> Time:
    """Args:
    sent: as `moved` gives it; what goes over `data` leaves a slice where there are several.
    """
    network = 0.0
    for axes, size in sent.items():
        between = slices > 1 and "data" in axes.split("+")
        network += size / (chip.between if between else chip.ring)
    return Time(done.flops / devices / chip.flops, done.traffic / chip.bandwidth, network)


def forecast(
    laid: Laid, programs: dict[str, Program], chip: Chip, slices: int = 1
) -> dict[str, Any]:
    """One round: seconds, tokens and chip-hours of each stage, at worst (see above) and at best.

    Everything is as long as it may be, so that a round is over sooner. A stage is left out whose
    program was not compiled or does not fit.
    """
    config, devices = laid.config, laid.weights.mesh.size
    g, e = config.generate, config.evaluate
    members, stages = config.members, {}

    def add(stage: str, name: str, calls: float, done: Work, share: float = 1.0) -> None:
        if name not in programs or not programs[name].fits or not calls:
            return
        sent = {axes: size * share for axes, size in moved(programs[name]).items()}
        time = time_of(done, sent, chip, devices, slices)
        old = stages.get(stage, {"seconds": 0.0, "best": 0.0, "tokens": 0.0})
        add = {"seconds": time.worst * calls, "best": time.best * calls}
        add["tokens"] = done.tokens * calls
        stages[stage] = {key: old[key] + add[key] for key in old}

    if not g.chain:
        add("generate", ROLLOUT, -(-g.prompts // g.batch) * members, work(laid, ROLLOUT))
    add("train", STEP, steps(laid) * members, work(laid, STEP))
    problems = e.problems * len(e.difficulties)
    calls = -(-problems // e.batch) / e.every
    share = e.batch / (g.batch * g.samples)
    add("evaluate", ROLLOUT, calls, sampling_work(laid, e.batch, 1), share)
    if e.samples:
        sampled = sampling_work(laid, e.batch, e.samples)
        add("evaluate", ROLLOUT, calls, sampled, share * e.samples)
    add("evaluate", SCORE, calls * (2 if e.samples else 1), work(laid, SCORE))
    total = {key: sum(stage[key] for stage in stages.values()) for key in ("seconds", "best")}
    total["tokens"] = sum(stage["tokens"] for stage in stages.values())
    for stage in (*stages.values(), total):
        stage["chip_hours"] = stage["seconds"] / 3600 * devices / chip.devices
    return {"stages": stages, "round": total}


def steps(laid: Laid) -> float:
    """Updates of a round's training; of passes over data, as if everything sampled were kept."""
    t, g = laid.config.train, laid.config.generate
    if t.tokens:
        return -(-t.tokens // (t.rows * t.row_length))
    if t.epochs:
        fit = max(t.row_length // laid.policy.row_length, 1) * t.rows
        return t.epochs * -(-g.prompts * g.samples // fit)
    return t.steps
