"""The one device mesh, and how the model's logical axes lie on it.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and batch both split), `tensor`
(matrices split inside a layer). Training splits parameters over fsdp × tensor; decoding over tensor
alone. A training layout extends the decoding layout, so that going from one to the other is one
all-gather over `fsdp` at the entry of the sampling program and nothing inside its loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from karploop.config import MeshConfig
from karploop.errors import UserError

AXES = ("data", "fsdp", "tensor")

# logical axis → mesh axis; logical axes that are not listed stay whole on every device
TRAIN_RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
)
DECODE_RULES = tuple((name, None if name == "embed" else axis) for name, axis in TRAIN_RULES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Raises:
      UserError: the axes ask for another number of devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        if len(devices) % fixed:
            raise UserError(
                f"'config.mesh' splits devices by {fixed}, but there are {len(devices)}: choose "
                "sizes whose product divides the number of devices"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    needed = int(np.prod(sizes))
    if needed > len(devices):
        shape = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"'config.mesh' ({shape}) needs {needed} devices, there are {len(devices)}: lower a "
            "size, or set one to -1 to take what is there"
        )
    return jax.make_mesh(sizes, AXES, devices=devices[:needed], axis_types=(AxisType.Auto,) * 3)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, mesh: Mesh, where: str) -> None:
    """Raises UserError unless `size` rows divide evenly over the mesh."""
    parts = batch_parts(mesh)
    if size % parts:
        raise UserError(
            f"'{where}' is {size}, which does not divide over the mesh's data × fsdp = {parts} "
            f"parts: use a multiple of {parts}, such as {-(-size // parts) * parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data × fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def parameter_shardings(abstract: Any, mesh: Mesh, rules=TRAIN_RULES) -> Any:
    """Shardings of a tree of `nn.Partitioned` shapes (as `eval_shape(model.init)` gives it).

    Raises:
      UserError: a parameter's axis does not divide over the mesh axis it is laid on.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
    shapes = nn.unbox(abstract)

    def check(path, shape, sharding):
        for size, axes in zip(shape.shape, sharding.spec, strict=False):
            parts = int(np.prod([mesh.shape[a] for a in np.atleast_1d(axes) if a is not None]))
            if size % parts:
                raise UserError(
                    f"'config.mesh' splits an axis of {size} of the parameter "
                    f"{jax.tree_util.keystr(path)} into {parts}: choose a size that divides it"
                )

    jax.tree_util.tree_map_with_path(check, shapes, shardings)
    return shardings


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a host array that every process holds whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(tree: Any) -> Any:
    """Whole NumPy copies of a tree of global arrays, on every process."""

    def gather(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(gather, tree)


def is_main() -> bool:
    """True on the one process that writes."""
    return jax.process_index() == 0


def agree(decide: Callable[[], bool]) -> bool:
    """What the main process decides, known to all; the others do not evaluate `decide`."""
    if jax.process_count() == 1:
        return decide()
    mine = np.asarray(decide() if is_main() else False)
    return bool(multihost_utils.broadcast_one_to_all(mine))


def any_process(flag: bool) -> bool:
    """True everywhere if `flag` is true on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
