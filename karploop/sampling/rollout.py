"""Prefill each prompt once, fan its cache out to n samples, decode in chunks with early exit.

Every row draws from its own key, folded from (prompt id, sample index, position): which rows share
a batch, in what order, and on how many devices does not change a row's tokens. Log-probabilities
are those of the unfiltered, untempered model, so that they equal the scorer's and can serve as the
behaviour policy's in an importance ratio.

Shape suffixes: P prompts, R = P · n rows, L padded prompt length, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.models.decoder import Cache, Decoder
from karploop.sampling.distributions import Sampling, draw
from karploop.sampling.prefix import prefill


class Rollout(NamedTuple):
    """Rows 0 … n−1 belong to prompt 0, and so on."""

    tokens_RxT: jax.Array  # int32; stop token included, padding after it
    logprobs_RxT: jax.Array  # float32; 0 on padding
    entropy_RxT: jax.Array  # float32, nats; 0 on padding
    lengths_R: jax.Array  # int32; tokens up to and including the stop token
    finished_R: jax.Array  # bool; a stop token was drawn


class _State(NamedTuple):
    step: jax.Array
    cache: Cache
    tokens_RxT: jax.Array
    logprobs_RxT: jax.Array
    entropy_RxT: jax.Array
    lengths_R: jax.Array
    done_R: jax.Array
    finished_R: jax.Array


def rollout(
    model: Decoder,
    params,
    prompts_PxL: jax.Array,
    lengths_P: jax.Array,
    prompt_ids_P: jax.Array,
    limits_P: jax.Array,
    key: jax.Array,
    *,
    samples: int,
    max_new: int,
    sampling: Sampling,
    prefix_L: jax.Array | None = None,
    stop_ids: Sequence[int],
    pad_id: int,
    fused_steps: int,
) -> Rollout:
    """Samples `samples` completions for each prompt.

    Args:
      prompts_PxL: token ids, padded on the left.
      lengths_P: real tokens in each row (at least 1).
      prompt_ids_P: integers that tell prompts apart in the random stream.
      limits_P: most new tokens of each prompt's completions, stop token included, up to `max_new`.
        0 gives empty completions, which hold nobody up: what fills a batch.
      key: the stage's key.
      prefix_L: tokens that stand before every prompt (few-shot examples, say), read once for all.
      max_new: columns of the result, T.
      stop_ids: tokens that end a completion, each with the same right.
      fused_steps: decode steps between two looks at whether every row has stopped.
    """
    prefilled, logits_PxV = prefill(model, params, prompts_PxL, lengths_P, prefix_L)
    rows, prompt_length = prompts_PxL.shape[0] * samples, prompts_PxL.shape[1]
    prefix_length = 0 if prefix_L is None else len(prefix_L)
    chunks = -(-max(max_new - 1, 0) // fused_steps)
    width = 1 + chunks * fused_steps  # whole chunks; cut to max_new at the end

    def fan_out(x, row_axis):
        x = jnp.repeat(x, samples, axis=row_axis)
        return jnp.pad(x, [(0, width if axis == row_axis + 1 else 0) for axis in range(x.ndim)])

    keys_R = jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))(
        jnp.repeat(prompt_ids_P, samples), jnp.tile(jnp.arange(samples), prompts_PxL.shape[0])
    )
    limits_R = jnp.minimum(jnp.repeat(limits_P, samples), max_new)
    columns_1xS = jnp.arange(prefix_length + prompt_length + width)[None]
    padding_Rx1 = prompt_length - jnp.repeat(lengths_P, samples)[:, None]
    # Columns are the prefix, then padding, then prompt and completion.
    text_RxS = (columns_1xS < prefix_length) | (columns_1xS >= prefix_length + padding_Rx1)

    def emit(state: _State, logits_RxV: jax.Array) -> _State:
        """Draws and records the token at `state.step` from its logits."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_R, state.step)
        token_R = draw(keys, logits_RxV, sampling)
        # Over a large vocabulary most of the time goes into exponentials: one for each logit, which
        # drawing shares where nothing is filtered, gives both numbers.
        below_RxV = logits_RxV - jnp.max(logits_RxV, axis=-1, keepdims=True)
        mass_RxV = jnp.exp(below_RxV)
        whole_R = mass_RxV.sum(axis=-1)
        picked_R = jnp.take_along_axis(below_RxV, token_R[:, None], axis=1)[:, 0]
        logprob_R = picked_R - jnp.log(whole_R)
        entropy_R = jnp.log(whole_R) - jnp.sum(mass_RxV * below_RxV, axis=-1) / whole_R

        def put(array_RxT, value_R, padding):
            value_R = jnp.where(state.done_R, padding, value_R).astype(array_RxT.dtype)
            return jax.lax.dynamic_update_slice(array_RxT, value_R[:, None], (0, state.step))

        going_R = ~state.done_R
        lengths_R = state.lengths_R + going_R.astype(jnp.int32)
        stopped_R = jnp.isin(token_R, jnp.array(stop_ids, jnp.int32))
        return state._replace(
            step=state.step + 1,
            tokens_RxT=put(state.tokens_RxT, token_R, pad_id),
            logprobs_RxT=put(state.logprobs_RxT, logprob_R, 0.0),
            entropy_RxT=put(state.entropy_RxT, entropy_R, 0.0),
            lengths_R=lengths_R,
            finished_R=state.finished_R | (stopped_R & going_R),
            done_R=state.done_R | stopped_R | (lengths_R >= limits_R),
        )

    def decode_one(_, state: _State) -> _State:
        """Feeds the last token, then draws the next."""
        previous_Rx1 = jax.lax.dynamic_slice_in_dim(state.tokens_RxT, state.step - 1, 1, axis=1)
        offset = prefix_length + prompt_length + state.step - 1
        mask_RxS = (columns_1xS <= offset) & text_RxS
        positions_Rx1 = offset - padding_Rx1
        hidden_Rx1xE, cache = model.apply(
            params, previous_Rx1, mask_RxS[:, None, :], positions_Rx1, state.cache, offset
        )
        logits_RxV = model.apply(params, hidden_Rx1xE[:, 0], method="logits")
        return emit(state._replace(cache=cache), logits_RxV)

    state = _State(
        step=jnp.int32(0),
        cache=Cache(*map(fan_out, prefilled, (1, 1, 0))),
        tokens_RxT=jnp.full((rows, width), pad_id, jnp.int32),
        logprobs_RxT=jnp.zeros((rows, width), jnp.float32),
        entropy_RxT=jnp.zeros((rows, width), jnp.float32),
        lengths_R=jnp.zeros((rows,), jnp.int32),
        finished_R=jnp.zeros((rows,), bool),
        done_R=limits_R < 1,
    )
    state = emit(state, jnp.repeat(logits_PxV, samples, axis=0))
    state = jax.lax.while_loop(
        lambda s: ~jnp.all(s.done_R),
        lambda s: jax.lax.fori_loop(0, fused_steps, decode_one, s),
        state,
    )
    return Rollout(
        tokens_RxT=state.tokens_RxT[:, :max_new],
        logprobs_RxT=state.logprobs_RxT[:, :max_new],
        entropy_RxT=state.entropy_RxT[:, :max_new],
        lengths_R=state.lengths_R,
        finished_R=state.finished_R,
    )
