"""A classifier that sees a few pixels of an image: the judge of a debate about it.

After section 3.1 of Irving et al., "AI safety via debate" (arXiv 1805.00899), whose judge is a
convolutional net on two channels, revealed values and mask. For images of 8 × 8 pixels a perceptron
on both channels does; what it takes in is then a sum over the revealed pixels, so that a million
masks of one image are judged for little more than the cost of the output layer.

Axes: B images, P pixels, H hidden units, C classes. Values lie between 0 and 1.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class SparseJudge(nn.Module):
    """Logits of classes from the revealed pixels of an image, through one hidden layer."""

    pixels: int
    classes: int
    width: int

    def setup(self):
        # Of 2 P inputs no more than 2 k differ from 0, so that the usual 1 / √(2 P) would be small.
        draw = nn.initializers.normal(0.3)
        self.value_PxH = self.param("value", draw, (self.pixels, self.width))
        self.mask_PxH = self.param("mask", draw, (self.pixels, self.width))
        self.bias_H = self.param("bias", draw, (self.width,))
        self.head = nn.Dense(self.classes)

    def __call__(self, values_BxP: jax.Array, mask_BxP: jax.Array) -> jax.Array:
        """Logits, B × C, of images of which only the mask's pixels (1.0, else 0.0) are shown."""
        return self.decide((values_BxP * mask_BxP) @ self.value_PxH + mask_BxP @ self.mask_PxH)

    def parts(self, values_P: jax.Array) -> jax.Array:
        """What each pixel of one image adds to the hidden layer if it is revealed, P × H."""
        return values_P[:, None] * self.value_PxH + self.mask_PxH

    def decide(self, sum_BxH: jax.Array) -> jax.Array:
        """Logits, B × C, from the sum of the parts of the revealed pixels."""
        return self.head(nn.relu(sum_BxH + self.bias_H[None]))


def random_mask(key: jax.Array, values_BxP: jax.Array, revealed: int) -> jax.Array:
    """A mask, B × P of 0.0 and 1.0, of `revealed` pixels of each image, drawn from those not 0."""
    score_BxP = jnp.where(values_BxP > 0, jax.random.uniform(key, values_BxP.shape), -1.0)
    least_Bx1 = jax.lax.top_k(score_BxP, revealed)[0][:, -1:]
    return (score_BxP >= least_Bx1).astype(values_BxP.dtype)


@functools.partial(jax.jit, static_argnames=("judge", "revealed", "steps", "batch"))
def train(
    judge: SparseJudge,
    key: jax.Array,
    values_NxP: jax.Array,
    labels_N: jax.Array,
    *,
    revealed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
) -> tuple[dict, jax.Array]:
    """Parameters after `steps` of AdamW with a cosine schedule, and the loss of every step.

    A step draws its images and which pixels of them are revealed, from the key folded with its
    number: the whole training is one program on the device.
    """
    init_key, data_key = jax.random.split(key)
    params = judge.init(init_key, values_NxP[:1], values_NxP[:1])
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimiser = optax.adamw(schedule, weight_decay=weight_decay)

    def loss(params, values_BxP, labels_B, mask_BxP):
        logits_BxC = judge.apply(params, values_BxP, mask_BxP)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B).mean()

    def step(state, number):
        params, moments = state
        image_key, mask_key = jax.random.split(jax.random.fold_in(data_key, number))
        rows_B = jax.random.randint(image_key, (batch,), 0, values_NxP.shape[0])
        values_BxP = values_NxP[rows_B]
        mask_BxP = random_mask(mask_key, values_BxP, revealed)
        value, grads = jax.value_and_grad(loss)(params, values_BxP, labels_N[rows_B], mask_BxP)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
            updates, moments = optimiser.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, optimiser.init(params))
    (params, _), losses = jax.lax.scan(step, state, jnp.arange(steps))
    return params, losses
