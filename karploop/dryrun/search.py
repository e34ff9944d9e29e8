"""Layouts that may fit, the fastest first by an estimate from shapes alone.

What is compiled afterwards decides; the estimate orders the candidates, and leaves out those of
which parameters and their state alone are too much. Network traffic is guessed as a ring sends it:
parameters gathered forwards and backwards and gradients scattered over `fsdp`, gradients reduced
over `data`, and activations reduced twice a layer and direction over `tensor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from karploop.config import Config
from karploop.dryrun import flops
from karploop.dryrun.chips import Chip
from karploop.dryrun.programs import STEP, Laid, arguments, lay
from karploop.dryrun.roofline import time_of, work
from karploop.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A layout, and how long a training step would take by its shapes."""

    laid: Laid
    seconds: float

    @property
    def settings(self) -> dict[str, str | int]:
        """What to set for it."""
        c = self.laid.config
        mesh = {f"mesh.{axis}": size for axis, size in self.laid.weights.mesh.shape.items()}
        return mesh | {"model.remat": c.model.remat, "train.accumulation": c.train.accumulation}


def candidates(
    config: Config, devices: Sequence, chip: Chip, prompt_length: int | None, slices: int = 1
) -> list[Candidate]:
    """Layouts of data × fsdp × tensor, of remat and of accumulation, the fastest first."""
    found = []
    for changed in _variants(config, len(devices), slices):
        try:
            laid = lay(changed, devices, prompt_length)
        except UserError:
            continue  # what does not divide
        least = arguments(laid, STEP) + _held(laid)
        if least > chip.memory:
            continue
        time = time_of(work(laid, STEP), _guess(laid), chip, len(devices), slices)
        found.append(Candidate(laid, time.worst))
    return sorted(found, key=lambda candidate: candidate.seconds)


def _variants(config: Config, devices: int, slices: int) -> Iterator[Config]:
    parts = sorted({config.train.accumulation, 1, 2, 4, 8, 16, 32})
    for tensor in (n for n in (1, 2, 4, 8, 16) if devices % n == 0):
        for fsdp in (n for n in range(1, devices // tensor + 1) if devices // tensor % n == 0):
            data = devices // tensor // fsdp
            if data % slices:
                continue
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
            for remat in dict.fromkeys((config.model.remat, "dots", "full")):
                for accumulation in parts:
                    yield dataclasses.replace(
                        config,
                        mesh=mesh,
                        model=dataclasses.replace(config.model, remat=remat),
                        train=dataclasses.replace(config.train, accumulation=accumulation),
                    )


def _held(laid: Laid) -> float:
    """Bytes of activations that wait for the backward pass, at least, on each device."""
    c, t, mesh = laid.policy.config, laid.config.train, laid.weights.mesh.shape
    tokens = t.rows * t.row_length / t.accumulation / mesh["data"] / mesh["fsdp"]
    each = float(c.width)
    if c.remat != "full":
        each += 2 * c.width + (2 * c.heads * c.head_width + 2 * c.mlp_width) / mesh["tensor"]
    return tokens * c.layers * each * (2 if c.dtype == "bfloat16" else 4)


def _guess(laid: Laid) -> dict[str, float]:
    """Bytes that each device sends in a step, by axis."""
    c, t, mesh = laid.policy.config, laid.config.train, laid.weights.mesh.shape
    vocabulary, parts = laid.policy.vocabulary, t.accumulation
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    gathered = flops.weight_bytes(c, vocabulary, tensor)
    gradient = 4 * laid.weights.count() / tensor
    passes = 3 if c.remat == "full" else 2
    tokens = t.rows * t.row_length / data / fsdp
    reduced = 2 * tokens * c.width * (2 if c.dtype == "bfloat16" else 4)
    adapting = bool(t.lora.rank)
    return {
        "fsdp": (fsdp - 1) / fsdp * parts * (passes * gathered + (0 if adapting else gradient)),
        "data": 2 * (data - 1) / data * parts * (0 if adapting else gradient / fsdp),
        "tensor": (tensor - 1) / tensor * 2 * passes * c.layers * reduced,
    }


def spread(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """The best of each layout first, then the second of each, and so on: neighbours are alike."""
    ranks: dict[tuple, int] = {}
    placed = []
    for candidate in found:
        shape = tuple(candidate.laid.weights.mesh.shape.values())
        ranks[shape] = rank = ranks.get(shape, -1) + 1
        placed.append((rank, candidate.seconds, len(placed), candidate))
    for *_, candidate in sorted(placed, key=lambda one: one[:3]):
        yield candidate
