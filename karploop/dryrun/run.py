"""One dry run, or a search over layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from karploop.config import Config
from karploop.dryrun.advice import fits
from karploop.dryrun.chips import chip_of
from karploop.dryrun.programs import (
    ROLLOUT,
    SCORE,
    STEP,
    Laid,
    Program,
    compile_program,
    lay,
    lowerings,
)
from karploop.dryrun.report import limit_of, report
from karploop.dryrun.search import candidates, spread
from karploop.dryrun.topology import devices_of
from karploop.errors import UserError

Say = Callable[[str], None]


class Where(NamedTuple):
    """Devices to compile for: of a topology, or of this machine where it is empty."""

    topology: str = ""
    slices: int = 1

    @property
    def devices(self) -> Sequence:
        return devices_of(*self) if self.topology else jax.devices()

    @property
    def name(self) -> str:
        return self.topology or "the devices of this machine"


def dry_run(
    config: Config,
    where: Where,
    only: Sequence[str] | None = None,
    prompt_length: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """The report on a config as it is; see `report.report`.

    Args:
      only: names of programs; None: all.

    Raises:
      UserError: what a run on these devices would refuse, or no such program.
    """
    devices = where.devices
    laid = lay(config, devices, prompt_length)
    known = lowerings(laid)
    if unknown := sorted(set(only or ()) - known.keys()):
        raise UserError(f"no program '{unknown[0]}' here: there are {', '.join(known)}")
    programs = {name: _compiled(laid, name, say) for name in known if not only or name in only}
    return report(laid, programs, where.name, where.slices, chip_of(devices[0]))


def search(
    config: Config,
    where: Where,
    most: int = 4,
    prompt_length: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """The report on the fastest layout that fits; `tried` lists what was compiled.

    A layout of which one program does not fit is given up there.

    Raises:
      UserError: nothing is known of these devices, or no layout can hold parameters and state.
    """
    devices = where.devices
    chip = chip_of(devices[0])
    if chip is None:
        raise UserError(
            f"--search compares times, and nothing is known of '{devices[0].device_kind}': "
            "name a --topology"
        )
    ordered = candidates(config, devices, chip, prompt_length, where.slices)
    if not ordered:
        raise UserError(
            "no layout holds parameters, optimiser and activations, or divides batches and rows: "
            "take more devices, an adapter ('config.train.lora.rank=16'), or batches that the "
            "devices divide"
        )
    tried, found = [], []
    for candidate in [each for each, _ in zip(spread(ordered), range(most), strict=False)]:
        programs: dict[str, Program] = {}
        for name in (STEP, ROLLOUT, SCORE):
            if name not in lowerings(candidate.laid):
                continue
            programs[name] = _compiled(candidate.laid, name, say)
            if not fits(programs[name], limit_of(programs, chip)):
                break
        one = report(candidate.laid, programs, where.name, where.slices, chip)
        seconds = one["forecast"]["round"]["seconds"] if one["fits"] else None
        tried.append(candidate.settings | {"fits": one["fits"], "round_seconds": seconds})
        found.append(one)
        say(f"{tried[-1]}")
    best = min(found, key=lambda one: (not one["fits"], one["forecast"]["round"]["seconds"]))
    return best | {"tried": tried, "layouts": len(ordered)}


def _compiled(laid: Laid, name: str, say: Say) -> Program:
    program = compile_program(laid, name)
    say(f"compiled {name} in {program.seconds:.0f} s")
    return program
