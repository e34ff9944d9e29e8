"""What accelerators are said to have, for roofline estimates.

Figures of one device as JAX counts them, from the makers' pages: cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e and tpu7x ("Key chip specifications"), and NVIDIA's data sheets of A100, H100 and H200
(dense bfloat16, SXM). `ring` is what the TPU pages call bidirectional interconnect bandwidth a chip
over its ports, four on a 2D torus and six on a 3D one: a ring takes two ports, and sends on both.
The network between slices is from jax-ml.github.io/scaling-book/tpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      flops: bfloat16, a second.
      memory: bytes, of v5e those that its compiler grants; of others it may be a little less.
      bandwidth: of its memory, bytes a second.
      ring: bytes a second that it sends to the others of one mesh axis.
      between: the same where the axis goes over several slices.
      devices: as JAX counts them on one chip.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    ring: float
    between: float = 6.25e9
    devices: int = 1


# By generation, as topologies are named: chips of one device but for the last.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32e9, 1.228e12, 100e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * 2**30, 0.819e12, 100e9, 3.125e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2.765e12, 200e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1.638e12, 200e9, 12.5e9),
    # Two dies to a chip, each of which is a device: half of 2,307 TFLOP/s, 192 GB and 7,380 GB/s.
    "tpu7x": Chip("TPU7x", 1153e12, 96e9, 3.69e12, 100e9, 6.25e9, devices=2),
}
_KINDS = {  # as `device_kind` begins
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
    "NVIDIA A100": Chip("NVIDIA A100", 312e12, 80e9, 2.039e12, 300e9),
    "NVIDIA H100": Chip("NVIDIA H100", 989e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H200": Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 450e9),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device; None: nothing."""
    kind = device.device_kind
    return next((chip for name, chip in _KINDS.items() if kind.startswith(name)), None)
