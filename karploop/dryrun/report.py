"""What a dry run found, as data and as a table."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import jax
import jaxlib

from karploop.dryrun.advice import GIB, advice, fits
from karploop.dryrun.chips import Chip
from karploop.dryrun.programs import Laid, Program
from karploop.dryrun.roofline import forecast, moved, time_of, work

_NAMES = {"collective-permute": "permute"}


def report(
    laid: Laid, programs: dict[str, Program], where: str, slices: int, chip: Chip | None
) -> dict[str, Any]:
    """Everything that was found, as JSON has it. Bytes are per device, seconds are estimates."""
    config, mesh = laid.config, laid.weights.mesh
    limit = limit_of(programs, chip)
    c, t, g = laid.policy.config, config.train, config.generate
    found: dict[str, Any] = {
        "config": config.name,
        "where": where,
        "slices": slices,
        "devices": mesh.size,
        "chips": mesh.size // (chip.devices if chip else 1),
        "device": chip.name if chip else mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "parameters": laid.weights.count(),
        "settings": {
            "prompt": laid.prompt,
            "completion": laid.sampler.completion_length,
            "batch": g.batch,
            "samples": g.samples,
            "rows": t.rows,
            "row_length": t.row_length,
            "accumulation": t.accumulation,
            "remat": c.remat,
            "scan": c.scan,
            "dtype": c.dtype,
            "lora": t.lora.rank,
            "optimizer": t.optimizer.name,
        },
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "memory_limit": limit,
        "notes": list(laid.notes),
        "programs": {
            name: _program(laid, program, limit, chip, slices) for name, program in programs.items()
        },
    }
    found["fits"] = all(one["fits"] for one in found["programs"].values())
    if chip:
        found["forecast"] = forecast(laid, programs, chip, slices)
    return found


def limit_of(programs: dict[str, Program], chip: Chip | None) -> float | None:
    """Bytes of a device's memory: what the compiler named, else what the maker says."""
    named = [p.memory["available"] for p in programs.values() if "available" in p.memory]
    return named[0] if named else chip.memory if chip else None


def _program(laid, program: Program, limit, chip: Chip | None, slices: int) -> dict[str, Any]:
    done = work(laid, program.name)
    found: dict[str, Any] = {
        "fits": fits(program, limit),
        "memory": program.memory,
        "resident": program.resident,
        "flops": done.flops,
        "tokens": done.tokens,
        "compile_seconds": round(program.seconds, 1),
    }
    if not found["fits"] and limit:
        found["advice"] = advice(laid, program, limit)
    if not program.fits:
        return found
    kinds: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for one in program.collectives:
        sums = kinds[one.kind, "+".join(one.axes)]
        sums[0] += one.count
        sums[1] += one.total
    found["collectives"] = [
        {"kind": kind, "axes": axes, "count": int(count), "bytes": size}
        for (kind, axes), (count, size) in sorted(kinds.items(), key=lambda item: -item[1][1])
    ]
    if chip:
        time = time_of(done, moved(program), chip, laid.weights.mesh.size, slices)
        found["estimate"] = asdict(time) | {
            "best": time.best,
            "worst": time.worst,
            "bound": time.bound,
            "tokens_per_second": [done.tokens / time.worst, done.tokens / time.best],
        }
    return found


def render(found: dict[str, Any]) -> str:
    """The report for people to read."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    slices = f", {found['slices']} slices" if found["slices"] > 1 else ""
    lines = [
        f"{found['config']}: {found['parameters'] / 1e9:.2f} billion parameters on {found['where']}"
        f" ({found['device']}, {found['chips']} chips{slices}), mesh {mesh}",
        "  " + ", ".join(f"{key} {value}" for key, value in found["settings"].items()),
        *(f"  note: {note}" for note in found["notes"]),
    ]
    for name, one in found["programs"].items():
        lines += ["", *_rendered(name, one, found["memory_limit"])]
    if "forecast" in found:
        lines += ["", *_forecast(found["forecast"])]
    else:
        lines += ["", "no estimate of time: nothing is known of this device's speed"]
    return "\n".join(lines)


def _rendered(name: str, one: dict[str, Any], limit: float | None) -> list[str]:
    kinds = {**one["memory"], **({"beside": one["resident"]} if one["resident"] else {})}
    sizes = ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in kinds.items())
    of = f" of {limit / GIB:.2f}" if limit else ""
    verdict = "fits" if one["fits"] else "DOES NOT FIT"
    lines = [f"{name}: {verdict}", f"  memory a device, GiB{of}: {sizes}"]
    lines += [f"  try: {line}" for line in one.get("advice", ())]
    lines.append(f"  {one['flops']:.3g} FLOPs for {one['tokens']:,} tokens")
    for each in one.get("collectives", ())[:8]:
        axes, kind = each["axes"], _NAMES.get(each["kind"], each["kind"])
        size = each["bytes"] / GIB
        lines.append(f"  {kind:15} over {axes:12} {each['count']:>9,} times {size:10.3f} GiB")
    if estimate := one.get("estimate"):
        low, high = estimate["tokens_per_second"]
        lines.append(
            f"  estimate: {estimate['best']:.3g} to {estimate['worst']:.3g} s, "
            f"{low:,.0f} to {high:,.0f} tokens/s (compute {estimate['compute']:.3g}, memory "
            f"{estimate['memory']:.3g}, network {estimate['network']:.3g} s)"
        )
    return lines


def _forecast(found: dict[str, Any]) -> list[str]:
    lines = ["a round at its longest (estimate, nothing of it overlapping; in brackets, all):"]
    for stage, one in [*found["stages"].items(), ("in all", found["round"])]:
        lines.append(
            f"  {stage:9} {one['seconds']:>10,.1f} s ({one['best']:,.1f}) {one['tokens']:>15,.0f} "
            f"tokens {one['chip_hours']:>9.3f} chip-hours"
        )
    return lines
