"""An optimiser's state on its way from one round to the next."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from karploop.mesh import is_main, put, to_host
from karploop.training.trainer import Trainer, TrainState

MOMENTS = "optimizer.safetensors"


def save_moments(opt_state: Any, directory: pathlib.Path) -> None:
    """Writes `optimizer.safetensors`: each array of the state, by its path."""
    host = {
        jax.tree_util.keystr(path): np.array(x, order="C")
        for path, x in jax.tree_util.tree_leaves_with_path(to_host(opt_state))
    }
    data = safetensors.numpy.save(host)
    if is_main():
        (directory / MOMENTS).write_bytes(data)


def restored(trainer: Trainer, state: TrainState, given: Any) -> TrainState:
    """The state with the moments that the stage `given` ended with; as it is after a warm-up, which
    leaves none."""
    if MOMENTS not in given.manifest.files:
        return state
    host = safetensors.numpy.load_file(given.path(MOMENTS))

    def laid(path, sharding):
        return put(host[jax.tree_util.keystr(path)], sharding)

    shardings = trainer.shardings.opt_state
    return TrainState(state.params, jax.tree_util.tree_map_with_path(laid, shardings))
