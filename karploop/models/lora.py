"""Low-rank adaptation (LoRA, arXiv 2106.09685): a small tree that changes a frozen model.

A matrix W of a layer is used as W + scale · a · b, where a is (inputs …, rank) and b is (rank,
outputs …); both have the layers' axis in front where layers are scanned. An adapter is a tree like
the parameters' with {"a": …, "b": …} in place of each adapted matrix and nothing else, in float32:

    {"params": {"layers_0": {"attention": {"query": {"a": …, "b": …}}}}}

It meets the parameters in one of two ways.

`attach` is for training. The layers compute x·W + (x·a)·(scale·b), so that W gets no gradient: of
the three products that a matrix costs a step one is not computed, and there is neither a second
copy of the weights nor a gradient as large as they are. Differentiating through the sum
W + scale · a · b would cost all of these.

`merge` is for sampling, which reads every weight once a token: it makes the sum, once a round, and
the sampling program is the one of any other parameters. What it computes differs from what was
trained by rounding alone.

Not here: dropout; norms, biases, embedding and head, which stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from karploop.config import ADAPTABLE, LoraConfig
from karploop.errors import UserError
from karploop.mesh import parameter_shardings

Path = tuple[str, ...]
# Axes of a matrix, after that of the layers, which are its inputs; the rest are its outputs.
_INPUTS = dict.fromkeys(ADAPTABLE, 1) | {"out": 2}


class Lora:
    """The adapters of one config for one architecture on one mesh.

    Attributes:
      abstract, shardings: of an adapter. Its axes lie where the matrix's do; the rank's is whole.
      scale: what a · b is multiplied by.
      matrices: names of the adapted parameters.
    """

    def __init__(self, boxed: Any, mesh: Mesh, config: LoraConfig):
        """Args:
          boxed: the parameters' shapes and logical axes, as `eval_shape(model.init)` gives them.

        Raises:
          UserError: the rank is 0, or the model has no such matrix.
        """
        if not config.rank:
            raise UserError("an adapter needs a rank of at least 1, got 0")
        there = traverse_util.flatten_dict(boxed["params"])
        pairs = {p: _factors(p, x, config.rank) for p, x in there.items() if _is_adapted(p, config)}
        self.matrices = tuple(name for name in ADAPTABLE if any(p[-1] == name for p in pairs))
        missing = sorted(set(config.matrices) - set(self.matrices))
        if missing and config.targets != "all":
            known = [name for name in ADAPTABLE if any(path[-1] == name for path in there)]
            raise UserError(
                f"the model has no matrix {', '.join(missing)} to adapt; it has {', '.join(known)}"
            )
        boxed_adapter = {"params": traverse_util.unflatten_dict(pairs)}
        self.config = config
        self.scale = config.scale
        self.abstract = nn.unbox(boxed_adapter)
        self.shardings = parameter_shardings(boxed_adapter, mesh)
        self._jit_init = jax.jit(self._init, out_shardings=self.shardings)

    def init(self, key: jax.Array) -> Any:
        """A fresh adapter, which changes nothing: a is random and b zero, as in the paper.

        The paper says "random Gaussian" of a; its standard deviation, 1/sqrt(fan in), is that of
        our other matrices, so that x·a is about as large as x. (PEFT draws a uniformly, with
        1/sqrt(3 · fan in).) A matrix's numbers depend on its name and layer only: not on the other
        targets, the mesh, or whether layers are scanned.
        """
        return self._jit_init(key)

    def _init(self, key: jax.Array) -> Any:
        def draw(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            *_, matrix, factor = path
            if factor == "b":
                return jnp.zeros(leaf.shape, leaf.dtype)
            inputs = _INPUTS[matrix]
            shape = leaf.shape[-inputs - 1 :]
            of_matrix = jax.random.fold_in(key, ADAPTABLE.index(matrix))

            def one(layer):
                normal = jax.random.normal(jax.random.fold_in(of_matrix, layer), shape, leaf.dtype)
                return normal * math.prod(shape[:-1]) ** -0.5

            if _is_stacked(path):
                return jax.vmap(one)(jnp.arange(leaf.shape[0]))
            return one(int(path[0].removeprefix("layers_")))

        flat = traverse_util.flatten_dict(self.abstract["params"])
        drawn = {path: draw(path, leaf) for path, leaf in flat.items()}
        return {"params": traverse_util.unflatten_dict(drawn)}


def attach(params: Any, adapter: Any, scale: float) -> Any:
    """Variables with which the decoder computes as if merged; shares the parameters' buffers."""
    return params | {"lora": scaled(adapter, scale)["params"]}


def merge(params: Any, adapter: Any, scale: float) -> Any:
    """Parameters with the adapter in them: W + scale · a · b where there are factors, else W.

    Under `jit` that is one more copy of the parameters. A caller who has no more use for the old
    ones can donate them, for shapes and shardings are the same; the adapter has no use there.
    """
    factors = pairs(adapter)

    def whole(path: Path, weight: jax.Array) -> jax.Array:
        if path not in factors:
            return weight
        # The default precision of an accelerator would round a · b to eight bits.
        product = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")  # noqa: E731
        a, b = factors[path]
        return weight + scale * (jax.vmap(product) if _is_stacked(path) else product)(a, b)

    flat = traverse_util.flatten_dict(params["params"])
    return {"params": traverse_util.unflatten_dict({p: whole(p, w) for p, w in flat.items()})}


def pairs(adapter: Any) -> dict[Path, tuple[jax.Array, jax.Array]]:
    """(a, b) by the path of the matrix that they adapt."""
    flat = traverse_util.flatten_dict(adapter["params"])
    return {path[:-1]: (a, flat[*path[:-1], "b"]) for path, a in flat.items() if path[-1] == "a"}


def from_pairs(found: dict[Path, tuple[Any, Any]]) -> Any:
    """The adapter of which these are the `pairs`."""
    both = {path: {"a": a, "b": b} for path, (a, b) in found.items()}
    return {"params": traverse_util.unflatten_dict(both)}


def scaled(adapter: Any, scale: float) -> Any:
    """The adapter with b times `scale`."""
    return from_pairs({path: (a, scale * b) for path, (a, b) in pairs(adapter).items()})


def _factors(path: Path, box: nn.Partitioned, rank: int) -> dict[str, nn.Partitioned]:
    """Shapes and logical axes of the two factors of a matrix."""
    lead = int(_is_stacked(path))
    cut = lead + _INPUTS[path[-1]]

    def factor(join: Callable) -> nn.Partitioned:
        shape, names = join(tuple(box.value.shape), rank), join(tuple(box.names), "rank")
        return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    return {
        "a": factor(lambda axes, own: (*axes[:cut], own)),
        "b": factor(lambda axes, own: (*axes[:lead], own, *axes[cut:])),
    }


def _is_adapted(path: Path, config: LoraConfig) -> bool:
    return path[0].startswith("layers") and path[-1] in config.matrices


def _is_stacked(path: Path) -> bool:
    """Whether the first axis counts the layers, which are scanned."""
    return path[0] == "layers"
