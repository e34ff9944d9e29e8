"""Seconds and memory of something that is called again and again."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from karploop.stages import peak_host_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Of one workload.

    Attributes:
      first: seconds of the first call, in which everything compiles.
      seconds: of each call after it.
      cpu: seconds of all cores together in each of them, which others at work do not change much.
      parts: by name, seconds within each of these calls.
    """

    first: float
    seconds: list[float]
    cpu: list[float]
    parts: dict[str, list[float]]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compile(self) -> float:
        """What the first call took longer than the others: tracing and compiling."""
        return max(0.0, self.first - self.median)


def timed(run: Callable[[], Mapping[str, float]], repeats: int) -> Timing:
    """Calls `run` once to compile and warm up, then `repeats` times.

    Args:
      run: does its work to the end, results on the host, and returns seconds of its parts.
    """
    first, _, _ = _once(run)
    return repeated(run, repeats, first)


def repeated(run: Callable[[], Mapping[str, float]], repeats: int, first: float = 0.0) -> Timing:
    """Calls `run` `repeats` times; it is warm already, and its first call took `first`."""
    seconds, cpu, parts = zip(*(_once(run) for _ in range(repeats)), strict=True)
    by_name = {name: [each[name] for each in parts] for name in parts[0]}
    return Timing(first, list(seconds), list(cpu), by_name)


def _once(run: Callable[[], Mapping[str, float]]) -> tuple[float, float, Mapping[str, float]]:
    started, worked = time.perf_counter(), time.process_time()
    parts = run()
    return time.perf_counter() - started, time.process_time() - worked, parts


def clocked(function: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds that it took."""
    started = time.perf_counter()
    found = function()
    return found, time.perf_counter() - started


def memory() -> dict[str, int | None]:
    """Peaks of this process, in bytes.

    `peak_host_bytes`: resident. `peak_device_bytes`: the largest of the devices, None on a CPU,
    which keeps no account. `program_bytes`: what the largest program needs at once, arguments,
    results and temporaries, by the compiler's own account (its "memory analysis").
    """
    device = [d.memory_stats() for d in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in device if stats]
    return {
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": max(peaks, default=None),
        "program_bytes": _largest_program(),
    }


def _largest_program() -> int | None:
    """Of everything compiled in this process and not yet let go of; None: the backend keeps mum."""
    needed = []
    for program in jax.local_devices()[0].client.live_executables():
        try:
            stats = program.get_compiled_memory_stats()
        except (NotImplementedError, RuntimeError):
            continue
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes
        needed.append(held + stats.temp_size_in_bytes - stats.alias_size_in_bytes)
    return max(needed, default=None)


def machine() -> dict[str, Any]:
    """What was measured on, and how busy it was before."""
    device = jax.devices()[0]
    cores = getattr(os, "sched_getaffinity", None)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": len(cores(0)) if cores else os.cpu_count(),
        "jax": jax.__version__,
        "load": load(),
    }


def load() -> float | None:
    """Processes that wanted a core, mean of a minute; None where nobody counts them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
