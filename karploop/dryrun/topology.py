"""Devices that are not here: a TPU's topology from libtpu, which compiles for it on any machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping, Sequence

from karploop.errors import UserError

# Sizes that are easily mistaken: accelerator types count chips, or for v4 and v5p TensorCores.
EXAMPLES = {
    "v4": "v4:2x2x2",
    "v5e": "v5e:4x4 (16 chips), v5e:16x16 (256)",
    "v5p": "v5p:2x4x4 (32 chips, sold as v5p-64)",
    "v6e": "v6e:4x4",
    "tpu7x": "tpu7x:2x2x1 (4 chips, 8 devices)",
}
# libtpu asks a machine that has no TPU where its TPU is, unless all of it is said.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def check(topology: str) -> None:
    """Before JAX is imported.

    Raises:
      UserError: no such generation of TPUs, or nothing to compile for it with.
    """
    generation = topology.partition(":")[0]
    if generation not in EXAMPLES or ":" not in topology:
        known = "; ".join(EXAMPLES.values())
        raise UserError(
            f"'--topology={topology}' is none that is known: give GENERATION:SHAPE, such as "
            f"{known}; or nothing, for the devices of this machine"
        )
    if not has_libtpu():
        raise UserError(
            f"'--topology={topology}' compiles with libtpu, which is not installed: pip install "
            '"jax[tpu]" (no TPU is needed)'
        )


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """What libtpu reads; to be called before JAX is imported. JAX itself computes on the CPU."""
    environment.update(_ENVIRONMENT)


def devices_of(topology: str, num_slices: int = 1) -> Sequence:
    """Stand-ins for the devices of so many slices of a topology, to compile for.

    Raises:
      UserError: there is no such shape.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    more: dict = {"num_slices": num_slices} if num_slices > 1 else {}
    if topology.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **more).devices
    except (JaxRuntimeError, ValueError) as error:
        generation = topology.partition(":")[0]
        raise UserError(
            f"'--topology={topology}': {str(error).splitlines()[0]}. A shape such as "
            f"{EXAMPLES[generation]} is a multiple of a host's 2x2 or 2x2x1 chips"
        ) from error
