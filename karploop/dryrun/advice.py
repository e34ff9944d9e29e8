"""What to change where a program does not fit."""

from __future__ import annotations

from karploop.dryrun.programs import ROLLOUT, SCORE, STEP, Laid, Program

GIB = 2**30


def fits(program: Program, limit: float | None) -> bool:
    """Whether it fits beside what else lies on the devices; what has no known limit fits."""
    if not program.fits:
        return False
    return limit is None or program.memory["peak"] + program.resident <= limit


def advice(laid: Laid, program: Program, limit: float) -> list[str]:
    """Settings by which the program would take less, the most likely first."""
    config, mesh = laid.config, laid.weights.mesh.shape
    train, found = config.train, []
    fixed = program.memory["arguments"] + program.resident
    splitting = (
        "split parameters further: 'config.mesh.fsdp' or 'config.mesh.tensor' larger, "
        "'config.mesh.data' smaller, or more devices"
    )
    if fixed > 0.6 * limit:
        found.append(f"{fixed / GIB:.2f} GiB are parameters and their state. {splitting}")
        if program.name == STEP and not train.lora.rank:
            found.append("train an adapter: 'config.train.lora.rank=16'")
    if program.name == STEP:
        if laid.policy.config.remat != "full":
            found.append("compute activations again: 'config.model.remat=full'")
        parts = train.accumulation * 2
        rows = train.rows // (mesh["data"] * mesh["fsdp"])
        if rows >= parts:
            found.append(f"take a step's rows in parts: 'config.train.accumulation={parts}'")
        else:
            found.append("shorten 'config.train.row_length', or raise 'config.mesh.tensor'")
    if program.name == ROLLOUT:
        gathered = laid.weights.count() * 4 / mesh["tensor"] / GIB
        found.append(
            f"decoding splits parameters over 'tensor' alone, {gathered:.2f} GiB of them a device "
            f"as they are stored: raise 'config.mesh.tensor' from {mesh['tensor']}"
        )
        found.append(
            f"keys and values of {config.generate.slots or config.generate.batch} × "
            f"{config.generate.samples} completions: lower 'config.generate.slots' or "
            "'config.generate.samples', or store them as 'config.generate.cache=int8'"
        )
    if program.name == SCORE:
        found.append("lower 'config.evaluate.batch'")
    if not laid.policy.config.scan:
        found.append("compile one layer for all: 'config.model.scan=True'")
    return found
