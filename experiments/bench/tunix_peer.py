"""Sampling and supervised workloads by Tunix, Google's library for post-training in JAX.

Its sampler draws one row for each sample, from the unfiltered model, and records log-probabilities
on request, as here. A supervised step is that of its trainer with optax's AdamW and clipped
gradients. Parameters are float32 and random ones in its own Gemma 3, whatever the config's
`model.dtype`, which has to be float32, too.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma3.model import Gemma3, ModelConfig
from tunix.sft import peft_trainer, utils

from karploop.benchmark.subject import Subject
from karploop.benchmark.workloads import Work, asked
from karploop.errors import UserError
from karploop.models.families import to_hf


def make(name: str, subject: Subject) -> Work:
    """`w1`, `w2`, `w3` or `sft`, compiled and warmed up.

    Raises:
      UserError: the shape is not one of Gemma 3's, or not computed in float32.
    """
    work = (_imitate if name == "sft" else _draw)(name, subject)
    work.run()
    return work


def _model(subject: Subject) -> Gemma3:
    shape, vocabulary = subject.shape.config, subject.shape.vocabulary
    if to_hf(shape, vocabulary)["model_type"] != "gemma3_text" or shape.dtype != "float32":
        raise UserError(
            "of Tunix, Gemma 3's shapes in float32 are measured: leave 'tunix' out of --peers"
        )
    config = ModelConfig(
        num_layers=shape.layers,
        num_embed=vocabulary,
        embed_dim=shape.width,
        hidden_dim=shape.mlp_width,
        num_heads=shape.heads,
        head_dim=shape.head_width,
        num_kv_heads=shape.key_value_heads,
        sliding_window_size=shape.window,
        local_base_frequency=int(shape.rope_local_base),
        global_base_frequency=int(shape.rope_base),
        param_dtype=jnp.float32,
    )
    return Gemma3(config, rngs=nnx.Rngs(subject.config.seed))


class _Numbers:
    """A tokenizer whose texts are token numbers; 0 is padding and never asked for."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def _draw(name: str, subject: Subject) -> Work:
    wanted = asked(name, subject.config.seed)
    (length,), (new,) = set(wanted.lengths), set(wanted.new)
    model, shape = _model(subject), subject.shape.config
    cache = CacheConfig(length + new, shape.layers, shape.key_value_heads, shape.head_width)
    sampler, calls = Sampler(model, _Numbers(), cache), itertools.count()
    rng = np.random.default_rng([subject.config.seed, 1])
    prompts_PxL = rng.integers(1, subject.shape.vocabulary, (len(wanted.lengths), length))
    texts = [_Numbers().decode(row) for row in np.repeat(prompts_PxL, wanted.samples, axis=0)]

    def run() -> dict[str, float]:
        found = sampler(
            texts,
            new,
            max_prompt_length=length,
            temperature=1.0,
            top_p=1.0,
            return_logprobs=True,
            eos_tokens=[-1],  # is no token's number
            seed=next(calls),
        )
        assert {len(tokens) for tokens in found.tokens} == {new}
        return {}

    return Work(run, len(texts) * new, [])


def _imitate(name: str, subject: Subject) -> Work:
    del name
    model, config = _model(subject), subject.config.train.optimizer
    adamw = optax.adamw(config.learning_rate, config.b1, config.b2, config.epsilon)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm or jnp.inf), adamw)
    optimizer = nnx.Optimizer(model, clipped, wrt=nnx.Param)
    rng = np.random.default_rng([subject.config.seed, 4])
    tokens_BxL = jnp.array(rng.integers(1, subject.shape.vocabulary, (8, 128)))
    mask_BxL = jnp.ones(tokens_BxL.shape, bool)
    positions_BxL = utils.build_positions_from_mask(mask_BxL)
    attention_BxLxL = utils.make_causal_attn_mask(mask_BxL)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(peft_trainer._default_loss_fn)(
            model, tokens_BxL, mask_BxL, positions_BxL, attention_BxLxL
        )
        optimizer.update(model, gradient)
        return loss

    def run() -> dict[str, float]:
        jax.block_until_ready(step(model, optimizer))
        return {}

    return Work(run, tokens_BxL.size, [])
