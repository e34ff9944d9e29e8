"""Parameters: made on the mesh, kept as safetensors, shared between stages without a copy."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh

from karploop.config import ModelConfig
from karploop.mesh import DECODE_RULES, is_main, parameter_shardings, put, to_host
from karploop.models.decoder import Decoder, packed_mask

FILE = "params.safetensors"


class Weights:
    """One architecture laid on one mesh, and the parameters that are on the devices right now.

    Parameters are remembered by the SHA-256 of their file. A stage that needs the parameters which
    the previous stage trained or sampled from gets those very buffers; nothing is read or moved.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, mesh: Mesh):
        self.model = Decoder(config, vocabulary)
        self.mesh = mesh
        tokens_1x1 = jnp.ones((1, 1), jnp.int32)
        self._example = (tokens_1x1, packed_mask(tokens_1x1), tokens_1x1)
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        self.abstract = nn.unbox(boxed)
        self.shardings = parameter_shardings(boxed, mesh)
        self.decode_shardings = parameter_shardings(boxed, mesh, DECODE_RULES)
        self._jit_init = jax.jit(
            lambda key: nn.unbox(self._init(key)), out_shardings=self.shardings
        )
        self._live: dict[str, Any] = {}  # SHA-256 → parameters

    def _init(self, key):
        return self.model.init(key, *self._example, method="init_all")

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, made in place on the mesh."""
        return self._jit_init(key)

    def count(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.abstract))

    def save(self, params: Any, directory: pathlib.Path) -> None:
        """Writes `params.safetensors` and keeps the buffers for whoever loads that file next."""
        host = traverse_util.flatten_dict(to_host(params), sep="/")
        data = safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in host.items()})
        if is_main():
            (directory / FILE).write_bytes(data)
        self._live = {hashlib.sha256(data).hexdigest(): params, **_newest(self._live)}

    def load(self, artifact) -> Any:
        """The parameters of a stage that trained; shared buffers, not to be donated."""
        sha256 = artifact.manifest.files[FILE]["sha256"]
        if sha256 not in self._live:
            host = safetensors.numpy.load_file(artifact.path(FILE))
            tree = traverse_util.unflatten_dict(host, sep="/")
            params = jax.tree.map(put, tree, self.shardings)
            self._live = {sha256: params, **_newest(self._live)}
        return self._live[sha256]

    def take(self, artifact) -> Any:
        """The same, given up by this object: the caller may donate the buffers."""
        params = self.load(artifact)
        del self._live[artifact.manifest.files[FILE]["sha256"]]
        return params


def _newest(live: dict[str, Any]) -> dict[str, Any]:
    """At most one set of parameters besides the one being added stays on the devices."""
    return dict(list(live.items())[:1])
