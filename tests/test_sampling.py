"""Sampling: the right distribution, row by row, however rows are padded, batched and laid out."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from karploop.compiling import compiling
from karploop.config import GenerateConfig, ObjectiveConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.models.decoder import Decoder, packed_mask
from karploop.records import PROMPTS_FILE, SAMPLES_FILE, Samples
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.sampling.distributions import (
    GREEDY,
    Sampling,
    categorical,
    draw,
    filtered_logits,
)
from karploop.sampling.generate import generate
from karploop.sampling.rollout import Decoding, rollout
from karploop.sampling.sampler import Sampler, batches
from karploop.stages import Stages
from karploop.store import Store
from karploop.training.objectives import make_objective
from karploop.training.packing import Tokenized, pack
from karploop.training.trainer import measure

KEY = jax.random.key(11)
SUPERVISED = make_objective(ObjectiveConfig(), longest=8)
PROMPTS = ["1+2=", "34", "", "567+89", "0=0"]
IDS = [7, 3, 2**31, 0, 12]
LIMITS = [7, 7, 5, 7, 3]
MIXED = Sampling(temperature=0.8, top_k=9, top_p=0.95, min_p=0.01)


# -- the distribution of one token -------------------------------------------------------------


def exact_probabilities(logits_V, sampling):
    """By definition, in float64: which tokens each filter lets through, then renormalised."""
    weights_V = np.exp(np.asarray(logits_V, np.float64) / sampling.temperature)
    p_V = weights_V / weights_V.sum()
    best_first = sorted(range(len(p_V)), key=lambda token: -p_V[token])
    kept = set(best_first)
    if sampling.top_k:
        kept &= set(best_first[: sampling.top_k])
    if sampling.top_p < 1:
        nucleus = next(
            best_first[:n]
            for n in range(1, len(p_V) + 1)
            if p_V[best_first[:n]].sum() >= sampling.top_p
        )
        kept &= set(nucleus)
    if sampling.min_p:
        kept &= {token for token in best_first if p_V[token] >= sampling.min_p * p_V.max()}
    return np.array([p if token in kept else 0.0 for token, p in enumerate(p_V)]) / sum(
        p_V[token] for token in kept
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(temperature=1.5, top_k=6, top_p=0.9),
        Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.05),
    ],
    ids=lambda s: "-".join(f"{name}={value}" for name, value in s._asdict().items()),
)
def test_tokens_come_with_their_exact_probabilities(sampling):
    """Chi-square over 100,000 draws. The seed is fixed: a failure means a wrong distribution."""
    logits_V = np.array([0.3, -1.0, 2.0, 1.1, -3.0, 0.9, 1.6, -0.2], np.float32)
    n = 100_000
    keys_N = jax.random.split(KEY, n)
    logits_NxV = jnp.broadcast_to(logits_V[None], (n, len(logits_V)))
    tokens_N = jax.jit(draw, static_argnums=2)(keys_N, logits_NxV, sampling)
    counts_V = np.bincount(tokens_N, minlength=len(logits_V))
    p_V = exact_probabilities(logits_V, sampling)
    assert (counts_V[p_V == 0] == 0).all(), "a token that is filtered out was drawn"
    assert stats.chisquare(counts_V[p_V > 0], n * p_V[p_V > 0]).pvalue > 1e-4


def test_tokens_of_a_large_vocabulary_come_with_their_probabilities():
    """Several blocks, the last one not full; most of the mass in few places, edges among them."""
    rng = np.random.default_rng(0)
    logits_V = rng.normal(size=1300).astype(np.float32) - 3
    hot = np.array([0, 511, 512, 700, 1023, 1024, 1299])
    logits_V[hot] = np.log(np.arange(1, 8) * 50.0)
    logits_V[1030:1200] = -np.inf
    n = 40_000
    draws = jax.jit(lambda keys: categorical(keys, jnp.broadcast_to(logits_V[None], (n, 1300))))
    tokens_N = np.asarray(draws(jax.random.split(KEY, n)))
    p_V = exact_probabilities(logits_V, Sampling())
    counts_V = np.bincount(tokens_N, minlength=1300)
    assert (counts_V[1030:1200] == 0).all() and len(counts_V) == 1300
    cold = np.setdiff1d(np.arange(1300), hot)
    found = [*counts_V[hot], counts_V[cold].sum()]
    expected = [*(n * p_V[hot]), n * p_V[cold].sum()]
    assert stats.chisquare(found, expected).pvalue > 1e-4


def kept_tokens(logits_V, **filters):
    logits_1xV = jnp.array([logits_V], jnp.float32)
    filtered_1xV = jax.jit(filtered_logits, static_argnums=1)(logits_1xV, Sampling(**filters))
    return np.flatnonzero(np.isfinite(filtered_1xV[0])).tolist()


def test_edges_of_the_filters():
    even = [1.0, 1.0, 1.0, 0.0]
    assert kept_tokens([0.0, 3.0, 1.0], top_p=1e-6) == [1], "the best token always stays"
    assert kept_tokens([0.0, 3.0, 1.0], top_p=0.0) == [1]
    assert kept_tokens([0.0, 3.0, 1.0], min_p=1.0) == [1]
    assert kept_tokens([0.0, 3.0, 1.0], top_k=3) == [0, 1, 2]
    assert kept_tokens([0.0, 3.0, 1.0], top_k=99) == [0, 1, 2], "more than there are: off"
    assert kept_tokens(even, top_p=0.4) == [0, 1, 2], "equals stay together"
    assert kept_tokens(even, top_k=1) == [0, 1, 2]
    assert kept_tokens([0.0] * 4, top_p=0.5) == [0, 1, 2, 3]
    assert kept_tokens([5.0, 4.0, -90.0], top_p=0.999999) == [0, 1]
    halves = np.log([0.5, 0.25, 0.25])
    assert kept_tokens(halves, top_p=0.5) == [0], "p reached exactly is reached"
    assert kept_tokens(halves, top_p=0.51) == [0, 1, 2]


@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_filters_keep_what_sorting_would(scale):
    """Ties among them, tokens that are ruled out, and numbers of both signs."""
    logits_BxV = np.random.default_rng(1).normal(size=(4, 700)).astype(np.float32) * scale
    logits_BxV[:, ::5] = np.round(logits_BxV[:, ::5])
    logits_BxV[1, :30], logits_BxV[3] = -np.inf, 0.0
    for logits_V in logits_BxV:
        down_V = np.sort(logits_V)[::-1]
        expected = np.flatnonzero(logits_V >= down_V[80])
        assert kept_tokens(logits_V, top_k=81) == [n for n in expected if logits_V[n] > -np.inf]
        mass_V = np.exp(down_V.astype(np.float64) - down_V[0])
        before_V = (np.cumsum(mass_V) - mass_V) / mass_V.sum()
        for p in (0.1, 0.5, 0.9):
            last = down_V[before_V < p][-1]
            assert kept_tokens(logits_V, top_p=p) == np.flatnonzero(logits_V >= last).tolist()


# -- whole completions -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_weights, make_params):
    weights = make_weights(positions="rope")
    return weights, make_params(weights)


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return Sampler(model[0], tokenizer, prompt_length=6, completion_length=7)


@functools.partial(jax.jit, static_argnums=2)
def plain_draw(keys_B, step, sampling, logits_BxV):
    """Tokens and the log-probabilities of all, from each row's own key."""
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return draw(step_keys_B, logits_BxV, sampling), jax.nn.log_softmax(logits_BxV)


@functools.partial(jax.jit, static_argnums=0)
def next_logits(model, params, tokens_BxL, lengths_B):
    """Logits after the last of each row's real tokens, by a full forward pass."""
    columns_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1])[None], tokens_BxL.shape)
    mask_BxLxL = packed_mask((columns_BxL < lengths_B[:, None]).astype(jnp.int32))
    hidden_BxLxE, _ = model.apply(params, tokens_BxL, mask_BxLxL, columns_BxL)
    logits_BxLxV = model.apply(params, hidden_BxLxE, method="logits")
    return jnp.take_along_axis(logits_BxLxV, lengths_B[:, None, None] - 1, axis=1)[:, 0]


def plain_sampling(weights, params, tokenizer, samples, sampling):
    """What `complete` must return for PROMPTS, IDS and LIMITS: no cache, no batch, no chunks.

    Returns (prompt, sample) → (tokens, log-probabilities).
    """
    rows = [(p, s) for p in range(len(PROMPTS)) for s in range(samples)]
    texts = [[tokenizer.bos_id, *tokenizer.encode(PROMPTS[p])] for p, _ in rows]
    keys_B = jnp.stack(
        [jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(IDS[p])), s) for p, s in rows]
    )
    found = {row: ([], []) for row in rows}
    for step in range(max(LIMITS) + 1):
        tokens_BxL = np.zeros((len(rows), 16), np.int32)
        for row, text in enumerate(texts):
            tokens_BxL[row, : len(text)] = text
        lengths_B = np.array([len(text) for text in texts], np.int32)
        logits_BxV = next_logits(weights.model, params, tokens_BxL, lengths_B)
        tokens_B, logprobs_BxV = map(np.asarray, plain_draw(keys_B, step, sampling, logits_BxV))
        for row, (p, s) in enumerate(rows):
            tokens, logprobs = found[p, s]
            texts[row].append(int(tokens_B[row]))
            if tokenizer.eos_id not in tokens and len(tokens) < LIMITS[p] + 1:
                tokens.append(int(tokens_B[row]))
                logprobs.append(float(logprobs_BxV[row, tokens_B[row]]))
    return found


ALL_ROWS = range(len(PROMPTS))


def complete(sampler, params, rows=ALL_ROWS, *, samples=3, sampling=MIXED, **settings):
    """(prompt, sample) → Completion for some of PROMPTS, in the order given."""
    completions = sampler.complete(
        params,
        [PROMPTS[row] for row in rows],
        [IDS[row] for row in rows],
        KEY,
        samples=samples,
        sampling=sampling,
        limits=[LIMITS[row] for row in rows],
        **(dict(batch=8) | settings),
    )
    return {
        (row, s): completion
        for row, of_prompt in zip(rows, completions, strict=True)
        for s, completion in enumerate(of_prompt)
    }


def tokens_of(completions):
    return {where: completion.tokens for where, completion in completions.items()}


@pytest.mark.parametrize(("samples", "sampling"), [(3, MIXED), (1, GREEDY)])
def test_completions_are_those_of_plain_sampling(model, sampler, tokenizer, samples, sampling):
    """Prefill once, fan out, cache, chunks, left padding: none of it may change a token."""
    expected = plain_sampling(*model, tokenizer, samples, sampling)
    got = complete(sampler, model[1], samples=samples, sampling=sampling)
    assert tokens_of(got) == {where: tokens for where, (tokens, _) in expected.items()}
    for (p, s), completion in got.items():
        stopped = tokenizer.eos_id in completion.tokens
        np.testing.assert_allclose(completion.logprobs, expected[p, s][1], atol=1e-4)
        assert completion.finished == stopped
        assert stopped or len(completion.tokens) == LIMITS[p] + 1
        assert completion.text == tokenizer.decode(completion.tokens)
    if sampling != GREEDY:
        assert len({c.finished for c in got.values()}) == 2, "both kinds must occur here"
        assert len({tuple(c.tokens) for c in got.values()}) >= 8, "samples must differ"


def test_greedy_takes_the_most_probable_token(model, sampler, tokenizer):
    for p, completion in enumerate(
        complete(sampler, model[1], samples=1, sampling=GREEDY).values()
    ):
        text = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[p])]
        for token in completion.tokens:
            padded_1xL = np.array([text + [0] * (16 - len(text))], np.int32)
            logits_1xV = next_logits(model[0].model, model[1], padded_1xL, np.array([len(text)]))
            assert token == int(jnp.argmax(logits_1xV[0]))
            text.append(token)


def test_a_row_does_not_depend_on_its_companions(model, sampler):
    whole = tokens_of(complete(sampler, model[1]))
    assert tokens_of(complete(sampler, model[1], [3, 0, 4, 2, 1])) == whole
    alone = tokens_of(complete(sampler, model[1], [3]))
    assert alone == {where: whole[where] for where in alone}


def test_padding_lengths_and_devices_change_nothing(
    model, sampler, tokenizer, make_weights, make_params
):
    """Wider programs on eight devices, and another number of fused steps."""
    weights = make_weights(data=2, fsdp=2, tensor=2, positions="rope")
    wide = Sampler(weights, tokenizer, prompt_length=9, completion_length=11)
    expected = complete(sampler, model[1])
    got = complete(wide, make_params(weights), decoding=Decoding(fused_steps=3), batch=16)
    assert tokens_of(got) == tokens_of(expected)
    for where, completion in got.items():
        np.testing.assert_allclose(completion.logprobs, expected[where].logprobs, atol=1e-4)
        np.testing.assert_allclose(completion.entropy, expected[where].entropy, atol=1e-4)


KINDS = {
    "full": dict(positions="rope"),
    "windows": dict(positions="rope", layers=3, kv_heads=2, window=3, pattern="ssf"),
    "windows under scan": dict(positions="rope", layers=3, window=3, pattern="sfs", scan=True),
}


ONE_HEAD = dict(positions="rope", kv_heads=1, window=3, pattern="sf")


@pytest.mark.parametrize(
    ("shape", "tensor", "cache"),
    [
        *((shape, 1, "float32") for shape in (*KINDS.values(), ONE_HEAD)),
        (KINDS["full"], 2, "float32"),
        (ONE_HEAD, 1, "int8"),
    ],
)
def test_one_row_alone_draws_what_it_draws_among_others(
    shape, tensor, cache, make_weights, make_params, tokenizer
):
    """Its matrices are multiplied in parts, and its ring has no axis of rows."""
    weights = make_weights(tensor=tensor, **shape)
    params = make_params(weights)
    sampler = Sampler(weights, tokenizer, prompt_length=6, completion_length=9)
    how = dict(samples=1, decoding=Decoding(cache=cache))
    among = complete(sampler, params, [0, 3, 1, 2], batch=4, **how)
    for row in (0, 3):
        (alone,) = complete(sampler, params, [row], batch=1, **how).values()
        assert alone.tokens == among[row, 0].tokens
        np.testing.assert_allclose(alone.logprobs, among[row, 0].logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_that_are_refilled_change_nothing(kind, make_weights, make_params, tokenizer):
    """Fewer slots than prompts, so that prompts begin at other times and in other places; the ring
    goes round several times. Prompts of several buckets, behind a prefix longer than the window."""
    weights = make_weights(max_length=64, **KINDS[kind])
    params = make_params(weights)
    prompts = [str(i % 10) * (1 + i % 7) for i in range(21)]
    limits = [1 + (5 * i) % 9 for i in range(21)]
    prefix = [tokenizer.bos_id, *tokenizer.encode("1+1=2")]
    asked = dict(samples=2, sampling=MIXED, limits=limits, batch=24)

    def drawn(weights, params, decoding):
        sampler = Sampler(
            weights, tokenizer, prompt_length=[4, 7], completion_length=9, prefix=prefix
        )
        found = sampler.complete(params, prompts, range(21), KEY, **asked, decoding=decoding)
        return sum(found, [])

    whole = drawn(weights, params, Decoding())
    assert len({len(c.tokens) for c in whole}) > 4
    eight = make_weights(data=2, fsdp=2, tensor=2, max_length=64, **KINDS[kind])
    few, fewer = Decoding(8, fused_steps=2), Decoding(2, fused_steps=3)
    for found in (drawn(weights, params, fewer), drawn(eight, make_params(eight), few)):
        for one, other in zip(found, whole, strict=True):
            assert (one.tokens, one.finished) == (other.tokens, other.finished)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
            assert one.entropy == pytest.approx(other.entropy, abs=1e-4)


@pytest.mark.parametrize(
    ("less", "error"),
    [({"cache": "bfloat16"}, 0.03), ({"cache": "int8"}, 0.06), ({"weights": "int8"}, 0.15)],
)
def test_less_memory_costs_little_accuracy(less, error, model, sampler):
    """Log-probabilities of the same tokens, nats; drawn with few slots, which are refilled."""
    whole = complete(sampler, model[1])
    small = complete(sampler, model[1], decoding=Decoding(2, **less))
    pairs = [(small[where], whole[where]) for where in whole]
    same = [(one, other) for one, other in pairs if one.tokens == other.tokens]
    assert len(same) > len(pairs) // 2
    moved = [np.subtract(one.logprobs, other.logprobs) for one, other in same]
    moved = np.abs(np.concatenate(moved))
    assert 0 < moved.max() < error, "other numbers, and nearly the same"


def test_log_probabilities_are_the_scorers(model, sampler, tokenizer):
    """Of the untempered, unfiltered model: sampling at 0.8 with filters must not show."""
    rows = complete(sampler, model[1])
    prompts, completions = [PROMPTS[p] for p, _ in rows], list(rows.values())
    scores = sampler.score(model[1], prompts, [c.tokens for c in completions], 16, stop=False)
    for completion, score_T in zip(completions, scores, strict=True):
        np.testing.assert_allclose(completion.logprobs, score_T, atol=1e-4)
    texts = ["12", "", "7="]
    with_stop = sampler.score(model[1], PROMPTS[:3], texts, 16)
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    for one, other in zip(
        with_stop, sampler.score(model[1], PROMPTS[:3], ids, 16, stop=False), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_log_probabilities_of_sampling_are_those_that_training_sees(
    make_weights, make_params, tokenizer
):
    """In bfloat16, from packed rows, without a cache, on eight devices; drawn with filters.

    So a ratio of the two is 1 before the first update, and what filters renormalise is not in it.
    """
    kind = dict(positions="rope", layers=1, dtype="bfloat16")
    one, eight = make_weights(**kind), make_weights(data=2, fsdp=2, tensor=2, **kind)
    sampler = Sampler(one, tokenizer, prompt_length=6, completion_length=7)
    drawn = complete(sampler, make_params(one), samples=2)
    examples = []
    for (p, _), completion in drawn.items():
        start = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[p])]
        examples.append(Tokenized(np.array([*start, *completion.tokens], np.int32), len(start)))
    order = itertools.cycle(range(len(examples)))
    batch, taken = next(pack([(e,) for e in examples], order, rows=8, row_length=32))
    assert batch.segments_BxL.max() > 1 and len(set(taken)) == len(examples)
    loss_of = jax.jit(functools.partial(measure, eight.model, SUPERVISED))
    params, seen = make_params(eight), {}
    for row in range(8):
        for segment in range(1, batch.segments_BxL[row].max() + 1):
            here_BxL = np.zeros_like(batch.weights_BxL)
            here_BxL[row] = batch.segments_BxL[row] == segment
            only = batch._replace(weights_BxL=batch.weights_BxL * here_BxL)
            text = tuple(batch.targets_BxL[here_BxL > 0].tolist())
            seen[text] = -float(loss_of(params, only)[0])
    for example, completion in zip(examples, drawn.values(), strict=True):
        mean = np.mean(completion.logprobs)
        assert seen[tuple(example.tokens[1:].tolist())] == pytest.approx(mean, abs=0.02)


def test_entropy_is_the_mean_over_a_completion(model, sampler, tokenizer):
    completion = complete(sampler, model[1])[3, 0]
    text, entropies = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[3])], []
    for token in completion.tokens:
        padded_1xL = np.array([text + [0] * (16 - len(text))], np.int32)
        logits_1xV = next_logits(model[0].model, model[1], padded_1xL, np.array([len(text)]))
        entropies.append(stats.entropy(jax.nn.softmax(logits_1xV[0])))
        text.append(token)
    assert completion.entropy == pytest.approx(np.mean(entropies), abs=1e-4)


def test_a_prefix_is_read_as_if_it_stood_before_every_prompt(make_weights, make_params, tokenizer):
    """Completions, log-probabilities and scores, also under a window shorter than the prefix."""
    weights = make_weights(positions="rope", kv_heads=2, window=4, pattern="sf", max_length=64)
    params = make_params(weights)
    prefix = [tokenizer.bos_id, *tokenizer.encode("1+1=2 2+2=")]
    prompts = [prompt for prompt in PROMPTS if prompt]
    whole = [[*prefix, *tokenizer.encode(prompt)] for prompt in prompts]
    with_prefix = Sampler(weights, tokenizer, prompt_length=6, completion_length=7, prefix=prefix)
    without = Sampler(weights, tokenizer, prompt_length=20, completion_length=7)
    asked = dict(samples=3, sampling=MIXED, limits=[7] * len(prompts), batch=8)
    ids = list(range(len(prompts)))
    got = with_prefix.complete(params, prompts, ids, KEY, **asked)
    expected = without.complete(params, whole, ids, KEY, **asked)
    for one, other in zip(sum(got, []), sum(expected, []), strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    scores = with_prefix.score(params, prompts, [row[0].tokens for row in got], 8, stop=False)
    for completions, score_T in zip(got, scores, strict=True):
        np.testing.assert_allclose(completions[0].logprobs, score_T, atol=1e-4)


def test_a_prompt_that_is_too_long_is_named(model, sampler):
    with pytest.raises(UserError, match="'1234567'"):
        sampler.complete(
            model[1], ["1234567"], [0], KEY, samples=1, sampling=GREEDY, limits=[1], batch=8
        )


# -- the decode loop ---------------------------------------------------------------------------


class CountingDecoder(Decoder):
    """A decoder that counts its forward passes as they run."""

    passes = []

    def logits(self, hidden):
        jax.debug.callback(lambda: self.passes.append(1))
        return super().logits(hidden)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def run_rollout(model, params, prompts_PxL, limits_P, stop_id, max_new, fused_steps):
    rows = prompts_PxL.shape[0]
    return rollout(
        model,
        params,
        prompts_PxL,
        jnp.full((rows,), prompts_PxL.shape[1]),
        jnp.arange(rows),
        limits_P,
        KEY,
        samples=1,
        max_new=max_new,
        sampling=GREEDY,
        stop_ids=(stop_id,),
        pad_id=0,
        decoding=Decoding(fused_steps=fused_steps),
    )


def test_decoding_ends_with_the_last_row(model):
    """One pass of prefill, then whole chunks of 3 steps until no row goes on."""
    weights, params = model
    counting = CountingDecoder(weights.model.config, weights.model.vocabulary)
    prompts_2x2 = jnp.array([[1, 5], [1, 9]])
    never = -1

    def passes(limits, stop_id=never):
        counting.passes.clear()
        found = run_rollout(counting, params, prompts_2x2, jnp.array(limits), stop_id, 10, 3)
        jax.effects_barrier()
        return len(counting.passes), found

    count, free = passes([10, 10])
    assert count == 1 + 9 and free.lengths_R.tolist() == [10, 10]
    assert passes([1, 1])[0] == 1, "the first token comes from the prefill"
    assert passes([2, 4])[0] == 1 + 3
    assert passes([5, 0])[0] == 1 + 6
    assert passes([0, 0])[0] == 1
    assert passes([5, 0])[1].lengths_R.tolist() == [5, 0], "what fills a batch stays empty"
    first, second = free.tokens_RxT.tolist()
    stop_id = next(token for token in first if token in second)
    stops = [row.index(stop_id) for row in (first, second)]
    count, stopped = passes([10, 10], stop_id)
    assert count == 1 + 3 * -(-max(stops) // 3) < 10
    assert stopped.lengths_R.tolist() == [stop + 1 for stop in stops]


def test_what_follows_the_stop_token_is_padding(model):
    weights, params = model
    prompts_2x2 = jnp.array([[1, 5], [1, 9]])
    free = run_rollout(weights.model, params, prompts_2x2, jnp.array([8, 8]), -1, 8, 4)
    stop_id = int(free.tokens_RxT[0, 2])
    limits_2 = jnp.array([8, 2])
    found = run_rollout(weights.model, params, prompts_2x2, limits_2, stop_id, 8, 4)
    length = free.tokens_RxT[0].tolist().index(stop_id) + 1
    assert found.lengths_R.tolist() == [length, 2]
    assert found.finished_R.tolist() == [True, stop_id in free.tokens_RxT[1, :2].tolist()]
    for row, n in enumerate(found.lengths_R.tolist()):
        assert found.tokens_RxT[row, :n].tolist() == free.tokens_RxT[row, :n].tolist()
        assert not found.tokens_RxT[row, n:].any()
        assert found.logprobs_RxT[row, :n].all() and not found.logprobs_RxT[row, n:].any()
        assert found.entropy_RxT[row, :n].all() and not found.entropy_RxT[row, n:].any()


@pytest.mark.parametrize(("max_new", "fused_steps"), [(1, 4), (2, 4), (8, 3)])
def test_any_length_with_any_number_of_fused_steps(model, max_new, fused_steps):
    weights, params = model
    prompts_2x2, limits_2 = jnp.array([[1, 5], [1, 9]]), jnp.array([99, 99])
    whole = run_rollout(weights.model, params, prompts_2x2, limits_2, -1, 8, 4)
    found = run_rollout(weights.model, params, prompts_2x2, limits_2, -1, max_new, fused_steps)
    assert found.tokens_RxT.tolist() == whole.tokens_RxT[:, :max_new].tolist()
    assert found.lengths_R.tolist() == [max_new] * 2 and not found.finished_R.any()


def test_batches_cover_everything_once():
    assert [list(rows) for rows in batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert batches(0, 2) == []


# -- compilation -------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_compilations():
    """Yields a list that grows by one with every program compiled meanwhile."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_one_program_serves_all_prompts_keys_and_limits(model, sampler):
    complete(sampler, model[1])
    complete(sampler, model[1], samples=1, sampling=GREEDY)
    other_key = jax.random.fold_in(KEY, 1)
    with counted_compilations() as compiled:
        for rows in ([0, 1, 2], [4], range(5)):
            complete(sampler, model[1], rows)
            complete(sampler, model[1], rows, samples=1, sampling=GREEDY)
        sampler.complete(
            model[1], ["9"], [1], other_key, samples=3, sampling=MIXED, limits=[2], batch=8
        )
    assert not compiled
    with counted_compilations() as compiled:
        complete(sampler, model[1], samples=2)
    assert compiled, "the counter must notice what does compile"


def test_what_is_compiled_ahead_is_what_calls_run(model, tokenizer):
    weights, params = model
    sampler = Sampler(weights, tokenizer, prompt_length=[4, 6], completion_length=7)
    how = dict(samples=3, sampling=MIXED, decoding=Decoding(8))
    lowered = (
        lambda: sampler.lower_decode(8, **how),
        lambda: sampler.lower_decode(8, longest=3, **how),
        lambda: sampler.lower_score(8),
        lambda: sampler.lower_score(8, longest=5),
    )
    for lower in lowered:
        with counted_compilations() as compiled, compiling(lower):
            pass
        assert compiled
    with counted_compilations() as compiled:
        complete(sampler, params, **how)
        sampler.complete(params, ["9"], [1], KEY, limits=[2], batch=8, **how)
        sampler.score(params, ["123456"], ["1234567"], 8)
        sampler.score(params, ["1"], ["2"], 8)
    assert not compiled


def test_what_fails_to_compile_ahead_is_left_to_the_call(model, tokenizer):
    def lower():
        raise RuntimeError("out of memory")

    with compiling(lower):
        done = True
    assert done


def test_sampling_in_the_loop_costs_what_sampling_alone_does(model, sampler, tokenizer, tmp_path):
    """A round on new parameters and longer prompts compiles nothing, reads no file, and decodes
    once a batch."""
    weights, params = model
    stages = Stages(Store(str(tmp_path), print), Progress(quiet=True))
    stages.store.open()
    config = GenerateConfig(batch=8, samples=3)
    decoded, files = [], []

    def sampled(index: int, prompts: list[str]):
        rng = Rng(0, 0, index)

        def ask(context):
            difficulties = [len(prompt) for prompt in prompts]
            context.write_table(
                PROMPTS_FILE, pa.table({"prompt": prompts, "difficulty": difficulties})
            )

        def learn(context):
            moved = jax.tree.map(lambda x: x * (1 + index / 10), params)
            weights.save(moved, context.directory)

        made = {
            name: stages.run(name, function, config={}, inputs={}, rng=rng)
            for name, function in (("prompts", ask), ("params", learn))
        }
        function = functools.partial(
            generate,
            sampler=sampler,
            weights=weights,
            prompting=PlainPrompting(tokenizer),
            limit=lambda difficulty: 7,
            config=config,
        )
        return stages.run("generate", function, config={}, inputs=made, rng=rng)

    first = sampled(0, [f"{i}+" for i in range(20)])
    with pytest.MonkeyPatch.context() as patch, counted_compilations() as compiled:
        decode = sampler._decode
        patch.setattr(sampler, "_decode", lambda *args: decoded.append(args) or decode(*args))
        patch.setattr("safetensors.numpy.load_file", lambda path: files.append(path) or 1 / 0)
        second = sampled(1, [f"{i}+456" for i in range(20)])
    assert (len(compiled), len(decoded), files) == (0, 3, [])
    one, other = (Samples.from_table(a.table(SAMPLES_FILE)) for a in (first, second))
    assert len(one) == len(other) == 60 and one.tokens != other.tokens
