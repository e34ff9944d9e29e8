"""Rotary position embedding (arXiv 2104.09864), and how families stretch it to longer contexts."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from karploop.config import ModelConfig


class Rotation(NamedTuple):
    """Sines and cosines of every position's angles, float32."""

    sin_BxLx1xD: jax.Array  # D is half a head's width
    cos_BxLx1xD: jax.Array


def rotations(config: ModelConfig, positions_BxL: jax.Array) -> tuple[Rotation, Rotation] | None:
    """Tables for layers of full and of sliding-window attention; none without positions."""
    if config.positions == "none":
        return None
    full = _rotation(frequencies(config), positions_BxL)
    if not config.window or not config.rope_local_base:
        return full, full
    # Only full attention looks far: sliding layers keep their own base, unscaled (Gemma 3).
    return full, _rotation(_plain(config.rope_local_base, config.head_width), positions_BxL)


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each pair of dimensions, after the config's scaling, float32 (D/2,).

    `linear` divides all by the factor (arXiv 2306.15595). `llama3` divides those whose wavelength
    exceeds the original context over `rope_low`, keeps those below it over `rope_high`, and blends
    in between (Llama 3.1's published code).
    """
    c = config
    plain_D = _plain(c.rope_base, c.head_width)
    if c.rope_scaling == "none":
        return plain_D
    if c.rope_scaling == "linear":
        return plain_D / np.float32(c.rope_factor)
    turns_D = c.rope_original_length * plain_D / (2 * math.pi)  # over the original context
    blend_D = np.clip((turns_D - c.rope_low) / (c.rope_high - c.rope_low), 0.0, 1.0)
    return ((1 - blend_D) * plain_D / c.rope_factor + blend_D * plain_D).astype(np.float32)


def rotate(x_BxLxHxD: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each head (arXiv 2104.09864, eq. 34), pairing its first half with its second."""
    sin, cos = rotation
    first, second = jnp.split(x_BxLxHxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxD.dtype)


def _plain(base: float, width: int) -> np.ndarray:
    half = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(base) ** half).astype(np.float32)


def _rotation(frequency_D: np.ndarray, positions_BxL: jax.Array) -> Rotation:
    position_BxLx1x1 = positions_BxL[:, :, None, None].astype(jnp.float32)
    angle_BxLx1xD = position_BxLx1x1 * frequency_D[None, None, None]
    return Rotation(jnp.sin(angle_BxLx1xD), jnp.cos(angle_BxLx1xD))
