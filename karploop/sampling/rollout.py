"""Prefill each prompt once, fan its cache out to n samples, decode in chunks; refill what is done.

A slot holds one prompt with its n rows. Where more prompts wait than there are slots, the slots
whose rows have all stopped are refilled between chunks (continuous batching, as in Orca, OSDI
2022). All shapes are static: what rows write is a ring in time (`cache.Memory`), so that rows which
began at different times still write the same column in each step. A prompt's keys and values stand
there once, however many samples see them.

Every row draws from its own key, folded from (prompt id, sample index, position): which rows share
a batch, in what order, and on how many devices does not change a row's tokens. Log-probabilities
are those of the unfiltered, untempered model, so that they equal the scorer's and can serve as the
behaviour policy's in an importance ratio.

Where devices split the batch into parts, each part has its own share of the prompts and of the
slots, and decodes no other's.

Shape suffixes: D parts, P prompts, Q prompts of a part, G slots of a part, F slots of a part that
are filled at a time, n samples of a prompt, R = D · G · n rows, L padded prompt length, T new
tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.config import GenerateConfig
from karploop.models.cache import Columns, Memory, init_memory
from karploop.models.decoder import Decoder
from karploop.models.for_decoding import whole
from karploop.sampling.distributions import Sampling, draw
from karploop.sampling.prefix import columns_of, prefill, read_prefix


class Rollout(NamedTuple):
    """Rows 0 … n−1 belong to prompt 0, and so on."""

    tokens_RxT: jax.Array  # int32; stop token included, padding after it
    logprobs_RxT: jax.Array  # float32; 0 on padding
    entropy_RxT: jax.Array  # float32, nats; 0 on padding
    lengths_R: jax.Array  # int32; tokens up to and including the stop token
    finished_R: jax.Array  # bool; a stop token was drawn


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a batch is decoded (static: a change compiles a new program).

    Attributes:
      slots: prompts that are decoded at a time; 0: all that are given.
      parts: into how many parts devices split the prompts.
      fused_steps: decode steps between two looks at which rows have stopped.
      cache: what keys and values are stored in: `model`, as it computes, bfloat16 or int8.
      weights: what matrices are stored in: `model`, as given, or int8.
    """

    slots: int = 0
    parts: int = 1
    fused_steps: int = 4
    cache: str = "model"
    weights: str = "model"

    @classmethod
    def of(cls, config: GenerateConfig) -> Decoding:
        return cls(
            slots=config.slots,
            fused_steps=config.fused_steps,
            cache=config.cache,
            weights=config.weights,
        )


WHOLE_BATCH = Decoding()


class _Row(NamedTuple):
    """Of each row in a slot, and of each that is put there: arrays of (parts, rows)."""

    job: jax.Array  # which row of its part's results
    step: jax.Array  # new tokens so far
    token: jax.Array  # the last of them
    born: jax.Array  # the time at which that would have been its first
    length: jax.Array  # tokens of its prompt
    done: jax.Array


class _State(NamedTuple):
    now: jax.Array  # the time that the next step writes
    memory: Memory
    rows: _Row
    results: Rollout  # (parts, jobs, …)
    taken_D: jax.Array  # prompts of each part that have had a slot


def rollout(
    model: Decoder,
    weights,
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
    decoding: Decoding = WHOLE_BATCH,
    buckets: Sequence[int] = (),
    turned=None,
) -> Rollout:
    """Samples `samples` completions for each prompt.

    Args:
      weights: parameters, as they are or `quantised`.
      prompts_PxL: token ids, padded on the left. They are taken in order, each part's by itself.
      lengths_P: real tokens in each row (at least 1).
      prompt_ids_P: integers that tell prompts apart in the random stream.
      limits_P: most new tokens of each prompt's completions, stop token included, up to `max_new`.
        0 gives empty completions, which hold nobody up: what fills a batch.
      key: the stage's key.
      prefix_L: tokens that stand before every prompt (few-shot examples, say), read once for all.
      max_new: columns of the result, T.
      stop_ids: tokens that end a completion, each with the same right.
      buckets: ascending lengths at which prompts that are taken together may be read, L the last;
        empty: L alone.
      turned: the weights as `for_decoding.turned` makes them, for decode steps; None: as they are.
    """
    parts, length = decoding.parts, prompts_PxL.shape[1]
    queue = len(prompts_PxL) // parts
    count = min(decoding.slots // parts or queue, queue)  # slots of a part
    # Few at a time hold others up for short; where nobody waits, all are filled at once.
    filled = queue if count == queue else max(1, count // 8)
    prefix = read_prefix(model, whole(weights, model.config.dtype), prefix_L)
    before = columns_of(prefix)
    buckets = tuple(buckets) or (length,)

    def by_part(x_P):
        return x_P.reshape(parts, queue, *x_P.shape[1:])

    prompts_DxQxL, lengths_DxQ = by_part(prompts_PxL), by_part(lengths_P)
    limits_DxJ = jnp.repeat(jnp.minimum(by_part(limits_P), max_new), samples, axis=1)
    keys_DxJ = jax.vmap(
        jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s), (None, 0)),
        (0, None),
    )(prompt_ids_P, jnp.arange(samples)).reshape(parts, queue * samples)

    def emit(results: Rollout, rows: _Row, logits_RxV: jax.Array) -> tuple[Rollout, _Row]:
        """Draws and records each row's token number `step` from its logits."""
        shape = rows.job.shape
        keys = jax.vmap(jax.vmap(jax.random.fold_in))(_at(keys_DxJ, rows.job), rows.step)
        token_R, logprob_R, entropy_R = _drawn(keys.reshape(-1), logits_RxV, sampling)
        token, logprob, entropy = (x.reshape(shape) for x in (token_R, logprob_R, entropy_R))
        # What is done writes nothing: its place lies outside.
        job = jnp.where(rows.done, queue * samples, rows.job)

        def put(array, value, *place):
            return jax.vmap(lambda a, v, *at: a.at[at].set(v.astype(a.dtype), mode="drop"))(
                array, value, job, *place
            )

        stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
        results = Rollout(
            tokens_RxT=put(results.tokens_RxT, token, rows.step),
            logprobs_RxT=put(results.logprobs_RxT, logprob, rows.step),
            entropy_RxT=put(results.entropy_RxT, entropy, rows.step),
            lengths_R=put(results.lengths_R, rows.step + 1),
            finished_R=put(results.finished_R, stopped),
        )
        done = rows.done | stopped | (rows.step + 1 >= _at(limits_DxJ, rows.job))
        return results, rows._replace(step=rows.step + 1, token=token, done=done)

    def decode_one(_, state: _State) -> _State:
        """Feeds each row's last token, then draws the next."""
        now, rows = state.now, state.rows
        lengths_R, age_R = rows.length.reshape(-1), (now - rows.born).reshape(-1)
        masks = state.memory.masks(now, lengths_R, age_R + 1)
        position_Rx1 = (before + lengths_R + age_R)[:, None]
        params = whole(weights if turned is None else turned, model.config.dtype)
        hidden_Rx1xE, memory = model.apply(
            params, rows.token.reshape(-1, 1), masks, position_Rx1, state.memory, now
        )
        logits_RxV = model.apply(params, hidden_Rx1xE[:, 0], method="logits")
        results, rows = emit(state.results, rows, logits_RxV)
        return state._replace(now=now + 1, memory=memory, rows=rows, results=results)

    def free(state: _State) -> jax.Array:
        """free_DxG: slots of which all rows are done."""
        return state.rows.done.reshape(parts, count, samples).all(-1)

    def refillable(state: _State) -> jax.Array:
        waiting_D = queue - state.taken_D
        return jnp.any((waiting_D > 0) & (free(state).sum(1) >= jnp.minimum(filled, waiting_D)))

    def refill(state: _State) -> _State:
        """Reads the next `filled` prompts of each part, and puts them in slots that are free."""
        place_1xF = jnp.arange(filled)[None]
        prompt_DxF = state.taken_D[:, None] + place_1xF
        free_DxG = free(state)
        taking_DxF = (prompt_DxF < queue) & (place_1xF < free_DxG.sum(1)[:, None])
        prompt_DxF = jnp.minimum(prompt_DxF, queue - 1)
        slot_DxF = jnp.argsort(~free_DxG, axis=1, stable=True)[:, :filled]
        length_DxF = _at(lengths_DxQ, prompt_DxF)
        lengths_B = length_DxF.reshape(-1)
        prompts_BxL = _at(prompts_DxQxL, prompt_DxF).reshape(-1, length)

        def read(bucket: int):
            params = whole(weights, model.config.dtype)
            cache, logits = prefill(
                model, params, prompts_BxL[:, length - bucket :], lengths_B, prefix
            )
            return state.memory.columns(cache, before), logits

        fits = jnp.searchsorted(jnp.array(buckets), lengths_B.max())
        columns, logits_BxV = jax.lax.switch(
            fits, [functools.partial(read, bucket) for bucket in buckets]
        )

        def each(x_DxF):  # of a slot, for each of its rows
            return jnp.repeat(x_DxF, samples, axis=1)

        sample = jnp.tile(jnp.arange(samples), filled)[None]
        job = each(prompt_DxF) * samples + sample
        none = jnp.zeros_like(job)
        idle = ~each(taking_DxF) | (_at(limits_DxJ, job) < 1)
        rows = _Row(job, none, none, none + state.now, each(length_DxF), idle)
        results, rows = emit(state.results, rows, jnp.repeat(logits_BxV, samples, axis=0))
        # A row that takes no place has one outside.
        at = jnp.where(each(taking_DxF), each(slot_DxF) * samples + sample, count * samples)
        put = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop"))
        return _State(
            now=state.now,
            memory=_placed(state.memory, columns, slot_DxF, taking_DxF),
            rows=_Row(*(put(old, new, at) for old, new in zip(state.rows, rows, strict=True))),
            results=results,
            taken_D=state.taken_D + taking_DxF.sum(1),
        )

    def all_refilled(state: _State) -> _State:
        return jax.lax.while_loop(refillable, refill, state)

    def chunk(state: _State) -> _State:
        state = jax.lax.fori_loop(0, decoding.fused_steps, decode_one, state)
        return all_refilled(state) if count < queue else state

    none = jnp.zeros((parts, count * samples), jnp.int32)
    jobs = (parts, queue * samples)
    kept = model.config.dtype if decoding.cache == "model" else decoding.cache
    state = _State(
        now=jnp.int32(0),
        memory=init_memory(
            model.config,
            prefix,
            prompts=parts * count,
            length=length,
            samples=samples,
            new=max(max_new - 1, 1),  # the last one is not fed again
            dtype=kept,
        ),
        rows=_Row(none, none, none, none, none, none == 0),
        results=Rollout(
            tokens_RxT=jnp.full((*jobs, max_new), pad_id, jnp.int32),
            logprobs_RxT=jnp.zeros((*jobs, max_new), jnp.float32),
            entropy_RxT=jnp.zeros((*jobs, max_new), jnp.float32),
            lengths_R=jnp.zeros(jobs, jnp.int32),
            finished_R=jnp.zeros(jobs, bool),
        ),
        taken_D=jnp.zeros((parts,), jnp.int32),
    )
    state = all_refilled(state) if count < queue else refill(state)
    state = jax.lax.while_loop(lambda s: ~jnp.all(s.rows.done), chunk, state)
    return Rollout(*(x.reshape(-1, *x.shape[2:]) for x in state.results))


def _at(x_DxNx, index_DxM: jax.Array) -> jax.Array:
    """Of each part its own entries."""
    return jax.vmap(lambda x, index: x[index])(x_DxNx, index_DxM)


def _drawn(keys_R, logits_RxV, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, their log-probabilities and the entropies of what they are drawn from."""
    token_R = draw(keys_R, logits_RxV, sampling)
    # Over a large vocabulary most of the time goes into exponentials: one for each logit, which
    # drawing shares where nothing is filtered, gives both numbers.
    below_RxV = logits_RxV - jnp.max(logits_RxV, axis=-1, keepdims=True)
    mass_RxV = jnp.exp(below_RxV)
    whole_R = mass_RxV.sum(axis=-1)
    picked_R = jnp.take_along_axis(below_RxV, token_R[:, None], axis=1)[:, 0]
    entropy_R = jnp.log(whole_R) - jnp.sum(mass_RxV * below_RxV, axis=-1) / whole_R
    return token_R, picked_R - jnp.log(whole_R), entropy_R


def _placed(memory: Memory, columns: list[Columns], slot_DxF, taking_DxF) -> Memory:
    """The memory with new prompts in some slots."""
    parts, filled = slot_DxF.shape

    def one_part(old_NxGx, new_NxFx, slot_F, taking_F):
        def put(f, old_NxGx):
            new = jax.lax.dynamic_slice_in_dim(new_NxFx, f, 1, axis=1)
            before = jax.lax.dynamic_slice_in_dim(old_NxGx, slot_F[f], 1, axis=1)
            new = jnp.where(taking_F[f], new, before)
            return jax.lax.dynamic_update_slice_in_dim(old_NxGx, new, slot_F[f], axis=1)

        return jax.lax.fori_loop(0, filled, put, old_NxGx)

    def all_parts(old_NxPx, new_NxBx):
        if old_NxPx.shape[1] == new_NxBx.shape[1]:  # nobody waits: all are new
            return new_NxBx
        if parts == 1:
            return one_part(old_NxPx, new_NxBx, slot_DxF[0], taking_DxF[0])

        def split(x):
            return x.reshape(x.shape[0], parts, -1, *x.shape[2:])

        placed = jax.vmap(one_part, (1, 1, 0, 0), 1)(
            split(old_NxPx), split(new_NxBx), slot_DxF, taking_DxF
        )
        return placed.reshape(old_NxPx.shape)

    old = [stack.prompts for stack in memory.stacks]
    return memory.with_prompts(jax.tree.map(all_parts, old, columns))
