"""The one device mesh, and how the model's logical axes lie on it.

Axes: `data` (replicas of the parameters), `fsdp` (parameters and batch both split), `tensor`
(matrices split inside a layer). Training splits parameters over fsdp × tensor; decoding over tensor
alone. A training layout extends the decoding layout, so that going from one to the other is one
all-gather over `fsdp` at the entry of the sampling program and nothing inside its loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from karploop.config import MeshConfig
from karploop.errors import UserError

AXES = ("data", "fsdp", "tensor")
T, U = TypeVar("T"), TypeVar("U")
Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis → mesh axis, or None where it stays whole on every device. Written as keywords, so
# that a logical axis laid out twice is a syntax error; `partition_spec` refuses other collisions.
TRAIN_RULES = dict(
    batch=("data", "fsdp"),
    embed="fsdp",
    vocab="tensor",
    heads="tensor",
    kv_heads="tensor",
    mlp="tensor",
    head_width=None,
    norm=None,
    layers=None,
    rank=None,
)
DECODE_RULES = TRAIN_RULES | dict(embed=None)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the devices of all processes.

    One process may leave devices idle (a mesh of 1 × 1 × 1 takes the first one). Several may not:
    a process without a device in the mesh could not take part in its computations. Of several TPU
    slices, which a slower network joins, whole parts of the axis `data` lie on each.

    Raises:
      UserError: the axes ask for more devices than there are, or for another number than there
        are where −1 or several processes call for all of them.
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
    shape = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if needed > len(devices):
        raise UserError(
            f"'config.mesh' ({shape}) needs {needed} devices, there are {len(devices)}: lower a "
            "size, or set one to -1 to take what is there"
        )
    if needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"'config.mesh' ({shape}) takes {needed} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: use all of them, for example by setting a size to -1"
        )
    return Mesh(_arranged(sizes, devices[:needed]), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices by mesh axis, so that neighbours there are neighbours in the network."""
    if devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return join_slices(sizes, devices, slices)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def join_slices(sizes: Sequence[int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Devices [data, fsdp, tensor] of several TPU slices, each of which has rows of `data` alone.

    Between slices the network is slower, and along `data` least is sent: gradients, once a step.

    Raises:
      UserError: `data` is no multiple of the number of slices.
    """
    data, *inner = sizes
    if data % slices:
        raise UserError(
            f"'config.mesh.data' is {data}, but the devices are of {slices} slices: give a "
            "multiple, or -1 where the other sizes divide what one slice has"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


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


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis over data × fsdp, the first if not said otherwise."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, *partition_spec(["batch"])))


def partition_spec(names: Sequence[str], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """Where an array with these logical axes lies on the mesh.

    Raises:
      ValueError: a name is not in `rules`, or two of the array's axes fall on one mesh axis.
    """
    unknown = sorted(set(names) - rules.keys())
    if unknown:
        raise ValueError(f"no rule for the logical axes {unknown}; known: {sorted(rules)}")
    spec = PartitionSpec(*(rules[name] for name in names))
    used = [axis for entry in spec for axis in _mesh_axes(entry)]
    if len(used) > len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} fall on one mesh axis twice: {spec}")
    return spec


def parameter_shardings(boxed: Any, mesh: Mesh, rules: Rules = TRAIN_RULES) -> Any:
    """Shardings of a tree of `nn.Partitioned` shapes (as `eval_shape(model.init)` gives it).

    A vocabulary that does not divide stays whole: its size is the tokenizer's, not the user's. So
    do key-value heads, of which there are often fewer than parts.

    Raises:
      UserError: another axis of a parameter does not divide over the mesh axes it is laid on.
    """

    def lay(path, box: nn.Partitioned) -> NamedSharding:
        entries = list(partition_spec(box.names, rules))
        for i, (name, size) in enumerate(zip(box.names, box.value.shape, strict=True)):
            parts = int(np.prod([mesh.shape[axis] for axis in _mesh_axes(entries[i])]))
            if size % parts and name in ("vocab", "kv_heads"):
                entries[i] = None
            elif size % parts:
                keys = " × ".join(f"config.mesh.{axis}" for axis in _mesh_axes(entries[i]))
                raise UserError(
                    f"'{keys}' is {parts}, which does not divide the axis '{name}' of {size} of "
                    f"the parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: "
                    f"choose a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*entries))

    is_box = lambda node: isinstance(node, nn.Partitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(lay, boxed, is_leaf=is_box)


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def laid_out(abstract: Any, shardings: Any) -> Any:
    """Shapes and types of a tree of arrays, and where each lies."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


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


@dataclass(frozen=True)
class Begun(Generic[T]):
    """Work that was given to the devices, which are at it or done with it.

    Attributes:
      found: arrays that they leave.
      read: waits for them, and makes the result of them on the host.
    """

    found: Any
    read: Callable[[], T]

    def wait(self) -> None:
        """Returns when the devices are done; the host's part is still to be done."""
        jax.block_until_ready(self.found)

    def then(self, function: Callable[[T], U]) -> Begun[U]:
        """The same work, with more to do on the host once it is read."""
        return Begun(self.found, lambda: function(self.read()))


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


def main_first(action: Callable[[], T]) -> T:
    """Calls `action` on the main process, then on the others; if the main one fails, all fail.

    Raises:
      UserError: on the others, when `action` raised on the main process.
    """
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    if any_process(error is not None):
        raise error or UserError("the main process could not start: its message says why")
    return result if is_main() else action()


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
