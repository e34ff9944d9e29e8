"""Adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

What is written here, `peft.PeftModel.from_pretrained` puts on the model that `save_checkpoint`
wrote. Their A is our a (rank × inputs there), their B is our b (outputs × rank); the scale is alpha
over rank in both. Layers that are scanned here are tensors of their own there.
"""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from karploop.config import LoraConfig, ModelConfig
from karploop.errors import UserError
from karploop.files import write_atomic
from karploop.mesh import is_main, put, to_host
from karploop.models.checkpoint import read_json, tensor_slots, to_json
from karploop.models.lora import Lora, Path, from_pairs, pairs
from karploop.models.weights import Weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings of PEFT under which an adapter means something else than W + scale · a · b.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
)


def save_peft(
    directory: pathlib.Path, adapter: Any, lora: Lora, weights: Weights, *, base: str = ""
) -> None:
    """Writes an adapter as PEFT does, in float32.

    Args:
      adapter: on the mesh; every process takes part, the main one writes.
      base: folder or name of the model below, for those who load the adapter without naming one.
    """
    tensors, modules = {}, set()
    for path, (a, b) in pairs(to_host(adapter)).items():
        names = _modules(path, weights.model.config)
        stacked = path[0] == "layers"
        for module, a_one, b_one in zip(
            names, a if stacked else [a], b if stacked else [b], strict=True
        ):
            rank = a_one.shape[-1]
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_one.reshape(-1, rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_one.reshape(rank, -1).T)
            modules.add(module.rpartition(".")[2])
    alpha = lora.scale * lora.config.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
    if is_main():
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        write_atomic(directory / WEIGHTS, data)
        write_atomic(directory / CONFIG, to_json(config))


def load_peft(path: str | os.PathLike, weights: Weights) -> tuple[Any, Lora]:
    """The adapter in a folder of PEFT's, in float32 on the mesh, and its kind.

    Raises:
      UserError: no such folder or file, another kind of adapter, one that covers some layers only,
        or one of another model.
    """
    folder = pathlib.Path(path)
    config = read_json(folder / CONFIG)
    rank = _check(config)
    try:
        host = safetensors.numpy.load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        hint = " (adapter_model.bin is a pickle, which is never opened)"
        raise UserError(f"no '{folder / WEIGHTS}'{hint}") from error
    except SafetensorError as error:
        raise UserError(f"'{folder / WEIGHTS}' cannot be read as safetensors: {error}") from error
    model = weights.model.config
    matrices = {name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in host}
    everything = Lora(weights.boxed, weights.mesh, LoraConfig(rank))
    modules = {path: _modules(path, model) for path in pairs(everything.abstract)}
    found = {p: names for p, names in modules.items() if names[0].rpartition(".")[2] in matrices}
    wanted = {f"{m}.lora_{x}.weight" for names in found.values() for m in names for x in "AB"}
    if foreign := sorted(set(host) - wanted):
        raise UserError(
            f"the adapter has {len(foreign)} tensors that this model has no place for, first "
            f"'{foreign[0]}': karploop adapts the matrices of the layers and nothing else"
        )
    if missing := sorted(wanted - set(host)):
        raise UserError(
            f"the adapter lacks {len(missing)} of {len(wanted)} tensors, first '{missing[0]}': "
            "karploop adapts a matrix in every layer or in none"
        )
    targets = ",".join(dict.fromkeys(path[-1] for path in found))
    # rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank).
    factor = math.sqrt(rank) if config.get("use_rslora") else 1.0
    alpha = float(config["lora_alpha"]) * factor
    lora = Lora(weights.boxed, weights.mesh, LoraConfig(rank, alpha, targets))
    shapes, shardings = pairs(lora.abstract), pairs(lora.shardings)
    both = {}
    for at, names in found.items():
        both[at] = tuple(
            put(_read(host, names, letter, shapes[at][i].shape, at), shardings[at][i])
            for i, letter in enumerate("AB")
        )
    return from_pairs(both), lora


def _read(
    host: dict[str, np.ndarray], names: list[str], letter: str, shape: tuple[int, ...], path: Path
) -> np.ndarray:
    """One factor of one matrix, for all its layers, in our shape."""
    array = np.empty(shape, np.float32)
    stacked = path[0] == "layers"
    ours = shape[1:] if stacked else shape
    for index, module in enumerate(names):
        theirs = host[f"{module}.lora_{letter}.weight"]
        inner = (math.prod(ours[:-1]), ours[-1]) if letter == "A" else (ours[0], -1)
        expected = np.empty(ours, np.bool_).reshape(inner).T.shape
        if theirs.shape != expected:
            raise UserError(
                f"the adapter's tensor '{module}.lora_{letter}.weight' has the shape "
                f"{theirs.shape}, this model asks for {expected}: it belongs to another model"
            )
        array[index if stacked else ...] = theirs.astype(np.float32).T.reshape(ours)
    return array


def _check(config: dict[str, Any]) -> int:
    """The rank in an adapter_config.json, once nothing in it is beyond us."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"the adapter is a {config.get('peft_type')}: karploop knows LORA")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        used.append(f"init_lora_weights={start} (which changes the model below)")
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(f"the adapter uses PEFT's {', '.join(used)}, which karploop does not know")
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1 or config.get("lora_alpha") is None:
        raise UserError(f"the adapter's {CONFIG} has no 'r' and 'lora_alpha': is it whole?")
    return rank


def _modules(path: Path, model: ModelConfig) -> list[str]:
    """PEFT's names of the modules that make up one matrix: one, or one a layer."""
    return [f"{_PREFIX}{one.name.removesuffix('.weight')}" for one in tensor_slots(path, model)]
