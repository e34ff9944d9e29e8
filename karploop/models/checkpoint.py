"""Checkpoints of published models: read onto the mesh tensor by tensor, and written again.

A checkpoint is a folder as `transformers` saves it, or a GGUF file. Either is a config, a list of
tensor names and a way to read one tensor; a parameter is read, converted and laid on the devices
before the next one is touched, so that the host holds one of them at a time.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, Protocol

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from karploop.config import ModelConfig
from karploop.errors import UserError
from karploop.files import write_atomic
from karploop.mesh import is_main, put, to_host
from karploop.models.families import Slot, from_hf, slot, to_hf
from karploop.models.weights import Weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
IMPORTING = ("karploop.models.checkpoint", "karploop.models.gguf")  # all code that reads them


class Checkpoint(Protocol):
    """What an import needs to know of a source."""

    config: dict[str, Any]  # a Hugging Face config.json

    def names(self) -> list[str]:
        """Hugging Face tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is kept or as float32."""


class Folder:
    """A folder with `config.json` and one or many `*.safetensors`, read lazily.

    Raises:
      UserError: no such folder, no config, no weights, or a shard that is missing or cut short.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.config = read_json(self.path / CONFIG)
        shards = _shards(self.path)
        self._files = {}
        for shard in shards:
            try:
                self._files[shard] = safe_open(shard, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"'{shard}' cannot be read as safetensors ({error}): it may have been cut "
                    "short by a download; fetch it again"
                ) from error
        self._file_of = {n: shard for shard, file in self._files.items() for n in file.keys()}  # noqa: SIM118
        # Checkpoints of multimodal models keep their language model one level down.
        self._prefix = next((p for p in _PREFIXES if f"{p}{_ANCHOR}" in self._file_of), "")

    def names(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._file_of]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(self._prefix_of(name) + name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._file(name).get_tensor(self._prefix_of(name) + name)

    def _file(self, name: str):
        return self._files[self._file_of[self._prefix_of(name) + name]]

    def _prefix_of(self, name: str) -> str:
        return "" if name in self._file_of else self._prefix


_ANCHOR = "model.embed_tokens.weight"
_PREFIXES = ("", "language_model.")


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`: a folder, or a file that ends in .gguf.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        from karploop.models.gguf import GGUFCheckpoint  # noqa: PLC0415, an optional package

        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise UserError(f"no model at '{path}': name a folder with {CONFIG} or a .gguf file")
    return Folder(path)


def model_config(checkpoint: Checkpoint, **execution: Any) -> tuple[ModelConfig, int]:
    """The model of a checkpoint and its vocabulary; `execution` sets dtype, scan, remat, …"""
    model, vocabulary = from_hf(checkpoint.config)
    return ModelConfig(**(vars(model) | execution)), vocabulary


def load_params(checkpoint: Checkpoint, weights: Weights) -> Any:
    """The checkpoint's parameters, in float32, laid out as `weights` says.

    Every tensor is checked by name and shape before the first one is read.

    Raises:
      UserError: a tensor is missing, has another shape, or is one that the model has no place for.
    """
    layers = weights.model.config.layers
    abstract = traverse_util.flatten_dict(weights.abstract["params"])
    shardings = traverse_util.flatten_dict(weights.shardings["params"])
    slots = {path: tensor_slots(path, weights.model.config) for path in abstract}
    _check(checkpoint, abstract, slots, weights.model.config)
    params = {}
    for path, leaf in abstract.items():
        tensors = slots[path]
        if len(tensors) == layers and path[0] == "layers":  # stacked
            host = np.empty(leaf.shape, leaf.dtype)
            for index, one in enumerate(tensors):
                host[index] = one.to_ours(checkpoint.read(one.name), leaf.shape[1:])
        else:
            (one,) = tensors
            host = one.to_ours(checkpoint.read(one.name), leaf.shape)
            host = np.ascontiguousarray(host, leaf.dtype)  # most often what was read
        params[path] = put(host, shardings[path])
    return {"params": traverse_util.unflatten_dict(params)}


def save_checkpoint(
    directory: pathlib.Path,
    params: Any,
    weights: Weights,
    *,
    dtype: str = "float32",
    config: dict[str, Any] | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes `config.json` and safetensors that `transformers` loads as the same model.

    Args:
      params: on the mesh; every process takes part, the main one writes.
      dtype: of the written tensors, float32 or bfloat16.
      config: settings to keep from the base's config.json (token ids for instance); what describes
        the architecture is written anew.
      shard_bytes: most bytes in one file.

    Raises:
      UserError: no family of transformers is built like this model.
    """
    written = to_hf(weights.model.config, weights.model.vocabulary, dtype)
    kept = {k: v for k, v in (config or {}).items() if k.endswith("_token_id")}
    shards = _plan(weights, np.dtype(jax.numpy.dtype(dtype)).itemsize, shard_bytes)
    leaves = traverse_util.flatten_dict(params["params"])
    total, weight_map = 0, {}
    for number, shard in enumerate(shards, start=1):
        tensors = {}
        for path in shard:
            host = to_host(leaves[path]).astype(dtype)
            slots = tensor_slots(path, weights.model.config)
            for one, array in zip(slots, host if path[0] == "layers" else [host], strict=True):
                tensors[one.name] = np.ascontiguousarray(one.from_ours(array))
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = WEIGHTS if len(shards) == 1 else several
        if is_main():
            data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
            write_atomic(directory / name, data)
        total += sum(array.nbytes for array in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    if is_main() and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(directory / INDEX, to_json(index))
    if is_main():
        write_atomic(directory / CONFIG, to_json(kept | written))


def _plan(weights: Weights, itemsize: int, limit: int) -> list[list[tuple[str, ...]]]:
    """Which parameters go into which file: as many as fit, in order."""
    plan: list[list[tuple[str, ...]]] = [[]]
    size = 0
    for path, leaf in traverse_util.flatten_dict(weights.abstract["params"]).items():
        if plan[-1] and size + leaf.size * itemsize > limit:
            plan.append([])
            size = 0
        plan[-1].append(path)
        size += leaf.size * itemsize
    return plan


def tensor_slots(path: tuple[str, ...], model: ModelConfig) -> list[Slot]:
    """The checkpoint's tensors that make up one parameter: one, or one a layer."""
    found = slot(path, model)
    if path[0] != "layers":
        return [found]
    return [Slot(found.name.format(i), found.inputs) for i in range(model.layers)]


def _check(checkpoint: Checkpoint, abstract, slots, model: ModelConfig) -> None:
    there = set(checkpoint.names())
    wanted = {one.name for of_leaf in slots.values() for one in of_leaf}
    missing = sorted(wanted - there)
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of {len(wanted)} tensors, first '{missing[0]}': "
            "a shard may be missing, or config.json belongs to another model"
        )
    for path, leaf in abstract.items():
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for one in slots[path]:
            expected, found = one.shape(shape), checkpoint.shape(one.name)
            if expected != found:
                raise UserError(
                    f"the checkpoint's tensor '{one.name}' has the shape {found}, config.json asks "
                    f"for {expected}: they belong to different models"
                )
    foreign = sorted(n for n in there - wanted if n.startswith("model.layers."))
    foreign = [name for name in foreign if "rotary" not in name]  # tables, computed here
    if foreign:
        raise UserError(
            f"the checkpoint holds {len(foreign)} tensors that a model with this config.json has "
            f"no place for, first '{foreign[0]}': karploop would compute something else"
        )


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'")
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        shards = [folder / name for name in names]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise UserError(f"'{folder}' lacks {', '.join(missing)}, which its {INDEX} names")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        others = [p.name for p in folder.glob("*.bin")]
        hint = f" ({others[0]} is a pickle, which is never opened)" if others else ""
        raise UserError(f"'{folder}' has a config and no *.safetensors{hint}: weights are missing")
    return shards


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises UserError: there is no such file, or it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no '{path}': a model's folder holds one") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error


def to_json(value: dict[str, Any]) -> bytes:
    """Indented and in the order of the keys, so that equal values are equal files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
