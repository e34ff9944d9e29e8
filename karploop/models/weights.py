"""Parameters: made on the mesh, kept as safetensors, shared between stages without a copy.

A stage that trained everything wrote `params.safetensors`. One that trained an adapter (`lora.py`)
wrote `adapter.safetensors`, a small file that says in its header what it was trained at and the
SHA-256 of the parameters below it; these are the ones of the nearest stage before it, along the
inputs called "params", that wrote them. A published checkpoint is not copied: the stage that took
it in wrote `source.json`, the SHA-256 of each of its files and of the code that reads them. Any of
the three identifies parameters by its own SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import safe_open

from karploop.compiling import compiling
from karploop.config import LoraConfig, ModelConfig
from karploop.errors import UserError
from karploop.mesh import DECODE_RULES, is_main, parameter_shardings, put, to_host
from karploop.models.decoder import Decoder, packed_mask
from karploop.models.lora import Lora, merge
from karploop.stages import StageContext

FILE, ADAPTER, SOURCE = "params.safetensors", "adapter.safetensors", "source.json"
_HEADER = "karploop"  # one key: the order of several in a safetensors header is not fixed


class Weights:
    """One architecture laid on one mesh, and the parameters that are on the devices right now.

    Parameters are remembered by the SHA-256 of their file. A stage that needs the parameters which
    the previous stage trained or sampled from gets those very buffers; nothing is read or moved.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        mesh: Mesh,
        source: Callable[[Weights], Any] | None = None,
    ):
        """`source` reads the published checkpoint that the run starts from, if it does."""
        self.model = Decoder(config, vocabulary)
        self._source = source
        self.mesh = mesh
        self.boxed = boxed = _shapes(self.model)
        self.abstract = nn.unbox(boxed)
        self.shardings = parameter_shardings(boxed, mesh)
        self.decode_shardings = parameter_shardings(boxed, mesh, DECODE_RULES)
        self._jit_init = jax.jit(
            lambda key: nn.unbox(_init(self.model, key)), out_shardings=self.shardings
        )
        # The base is not donated: the next round's adapter is trained on it.
        self._jit_merge = jax.jit(merge, static_argnums=2, out_shardings=self.shardings)
        self._live: dict[str, Any] = {}  # SHA-256 → parameters

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, made in place on the mesh."""
        return self._jit_init(key)

    def count(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.abstract))

    def merge(self, params: Any, adapter: Any, scale: float) -> Any:
        """W + scale · a · b for every adapted matrix: a second copy of the parameters."""
        return self._jit_merge(params, adapter, scale)

    def save(self, params: Any, directory: pathlib.Path) -> None:
        """Writes `params.safetensors` and keeps the buffers for whoever loads that file next."""
        data = _write(directory / FILE, params)
        self._remember(hashlib.sha256(data).hexdigest(), params)

    def save_adapter(self, adapter: Any, lora: Lora, below: Any, directory: pathlib.Path) -> None:
        """Writes `adapter.safetensors`; `below` is the artifact that its training started from."""
        header = {
            "rank": lora.config.rank,
            "alpha": lora.scale * lora.config.rank,
            "targets": ",".join(lora.matrices),
            "params_sha256": params_sha256(base_of(below).manifest),
        }
        _write(directory / ADAPTER, adapter, {_HEADER: json.dumps(header, sort_keys=True)})

    def load(self, artifact, meanwhile: Callable[[], jax.stages.Lowered] | None = None) -> Any:
        """The parameters of a stage that trained; shared buffers, not to be donated.

        Those of an adapter are merged with what is below it, which stays on the devices as well.

        Args:
          meanwhile: a program to compile while they are read, if they have to be.
        """
        sha256 = params_sha256(artifact.manifest)
        if sha256 in self._live:
            params = self._live[sha256]
        else:
            with compiling(meanwhile) if meanwhile else contextlib.nullcontext():
                params = self._read(artifact)
        self._remember(sha256, params)
        return params

    def _read(self, artifact) -> Any:
        if params_file(artifact.manifest) == SOURCE:
            return self._source(self)  # whose files' hashes are the stage's key
        if params_file(artifact.manifest) == FILE:
            host = safetensors.numpy.load_file(artifact.path(FILE))
            return jax.tree.map(put, _tree(host), self.shardings)
        adapter, lora = self.read_adapter(artifact)
        return self.merge(self.load(base_of(artifact)), adapter, lora.scale)

    def take(self, artifact) -> Any:
        """The same, given up by this object: the caller may donate the buffers.

        Everything else is let go of, so that training has one set of parameters on the devices.
        """
        params = self.load(artifact)
        self._live = {}
        return params

    def load_base(self, artifact) -> Any:
        """What lies below an adapter (or the parameters, where there is none); shared buffers.

        Everything else is let go of, as in `take`.
        """
        base = base_of(artifact)
        params = self.load(base)
        self._live = {params_sha256(base.manifest): params}
        return params

    def load_adapter(self, artifact, lora: Lora) -> Any | None:
        """The adapter of a stage, in buffers of its own; None where it trained everything.

        Raises:
          UserError: it is one of another rank, scale or choice of matrices than `lora`.
        """
        if params_file(artifact.manifest) != ADAPTER:
            return None
        adapter, found = self.read_adapter(artifact)
        if (found.abstract, found.scale) != (lora.abstract, lora.scale):
            header = found.config
            raise UserError(
                f"the adapter of {artifact.manifest.stage}/{artifact.manifest.key} has rank "
                f"{header.rank}, alpha {header.alpha} and the matrices {header.targets}: "
                "training goes on with the same values of 'config.train.lora' only"
            )
        return adapter

    def read_adapter(self, artifact) -> tuple[Any, Lora]:
        """The adapter that a stage wrote, on the mesh, and its kind."""
        with safe_open(artifact.path(ADAPTER), framework="numpy") as file:
            header = json.loads(file.metadata()[_HEADER])
            host = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        base = base_of(artifact).manifest
        if header.pop("params_sha256") != params_sha256(base):
            raise UserError(
                f"the adapter of {artifact.manifest.stage}/{artifact.manifest.key} was trained on "
                f"other parameters than those of {base.stage}/{base.key}"
            )
        lora = Lora(self.boxed, self.mesh, LoraConfig(**header))
        return jax.tree.map(put, _tree(host), lora.shardings), lora

    def _remember(self, sha256: str, params: Any) -> None:
        """At most one set of parameters besides the one being added stays on the devices."""
        others = [(name, live) for name, live in self._live.items() if name != sha256]
        self._live = {sha256: params, **dict(others[:1])}


def take_in(context: StageContext, *, files: dict[str, str], code: str) -> None:
    """The stage that lets a run start from a published checkpoint: keeps what that was.

    Args:
      files: SHA-256 of each of its files, by name.
      code: fingerprint of the code that reads them, on which the parameters depend as well.
    """
    source = {"files": files, "code": code}
    (context.directory / SOURCE).write_text(json.dumps(source, indent=1, sort_keys=True) + "\n")


def params_file(manifest) -> str:
    """The file in which a stage left parameters, an adapter, or where parameters come from."""
    return next(name for name in (FILE, SOURCE, ADAPTER) if name in manifest.files)


def params_sha256(manifest) -> str:
    """The SHA-256 of that file; it tells parameters, merged or not, from all others."""
    return manifest.files[params_file(manifest)]["sha256"]


def base_of(artifact) -> Any:
    """The artifact whose parameters lie below an adapter; itself, where it trained everything."""
    while params_file(artifact.manifest) == ADAPTER:
        artifact = artifact.inputs["params"]
    return artifact


def _write(path: pathlib.Path, tree: Any, metadata: dict[str, str] | None = None) -> bytes:
    """Writes a tree as safetensors, on the main process; returns the bytes, on all."""
    host = traverse_util.flatten_dict(to_host(tree), sep="/")
    arrays = {name: np.ascontiguousarray(x) for name, x in host.items()}
    data = safetensors.numpy.save(arrays, metadata)
    if is_main():
        path.write_bytes(data)
    return data


def _tree(host: dict[str, np.ndarray]) -> Any:
    return traverse_util.unflatten_dict(host, sep="/")


def _init(model: Decoder, key: jax.Array) -> Any:
    """Fresh parameters in their boxes, which name logical axes."""
    tokens_1x1 = jnp.ones((1, 1), jnp.int32)
    return model.init(key, tokens_1x1, packed_mask(tokens_1x1), tokens_1x1, method="init_all")


def _shapes(model: Decoder) -> Any:
    """The same without numbers. Unrolled layers are all alike: one of them is traced."""
    one = model if model.config.scan else model.clone(config=replace(model.config, layers=1))
    found = jax.eval_shape(functools.partial(_init, one), jax.random.key(0))
    if one is model:
        return found
    params = dict(found["params"])
    layer = params.pop("layers_0")
    params |= {f"layers_{i}": layer for i in range(model.config.layers)}
    return found | {"params": dict(sorted(params.items()))}  # as JAX sorts trees
