"""The compiled sampler: prompts in, completions out, one program for a whole run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from karploop.data.tokenizer import Tokenizer
from karploop.errors import UserError
from karploop.mesh import Begun, batch_parts, batch_sharding, laid_out, put, replicated, to_host
from karploop.models.for_decoding import quantised, turned
from karploop.models.weights import Weights
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import WHOLE_BATCH, Decoding, Rollout, rollout
from karploop.sampling.score import score, score_next

Prompt = str | Sequence[int]  # text, or tokens


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    text: str
    tokens: list[int]  # stop token included
    logprobs: list[float]  # unfiltered model, nats
    entropy: float  # mean over its tokens, nats
    finished: bool


class Sampler:
    """Sampling and scoring programs for fixed prompt and completion lengths.

    All `jax.jit` calls of sampling stand here. Shapes depend only on the constructor's arguments
    and the batch size, so that a run compiles each program once.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Tokenizer,
        *,
        prompt_length: int | Sequence[int],
        completion_length: int,
        prefix: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
    ):
        """Lengths are in tokens (for one token a character, in characters); the start token and
        the stop token come on top.

        Args:
          prompt_length: of the longest prompt; or several lengths, each compiled when a batch
            first needs it.
          prefix: tokens before every prompt, the start token among them, which prompts then lack;
            read once for a batch. Continuations are scored behind it too.
          stop_ids: tokens that end a completion; empty: the tokenizer's.
        """
        self.tokenizer = tokenizer
        self.prefix = np.array(prefix, np.int32)
        lengths = [prompt_length] if isinstance(prompt_length, int) else prompt_length
        extra = 0 if len(prefix) else len(_start(tokenizer))
        self.prompt_lengths = sorted(length + extra for length in lengths)
        self.completion_length = completion_length + 1
        self.mesh = weights.mesh
        # As the parameters are: the compiler is asked for the same program as by a call.
        self._abstract = laid_out(weights.abstract, weights.shardings)
        model, mesh = weights.model, weights.mesh
        rows, whole = batch_sharding(mesh), replicated(mesh)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        scorer = model.clone(rows=rows if mesh.size > 1 else None)

        def given(prefix_L):
            return prefix_L if len(prefix) else None

        def decode(
            params, prompts_PxL, lengths_P, ids_P, limits_P, key, prefix_L, samples, sampling, how
        ):
            # The one change of layout: parameters lose their fsdp split here, before the loop.
            params = jax.lax.with_sharding_constraint(params, weights.decode_shardings)
            small = how.weights == "int8"
            if small:
                params = quantised(weights.boxed, params)
            return rollout(
                model,
                params,
                prompts_PxL,
                lengths_P,
                ids_P,
                limits_P,
                key,
                samples=samples,
                max_new=self.completion_length,
                sampling=sampling,
                prefix_L=given(prefix_L),
                stop_ids=tuple(stop_ids) or tokenizer.stop_ids,
                pad_id=tokenizer.pad_id,
                decoding=how,
                buckets=[n for n in self.prompt_lengths if n <= prompts_PxL.shape[1]],
                turned=turned(weights.boxed, params) if on_cpu and not small else None,
            )

        self._decode = jax.jit(
            decode,
            static_argnums=(7, 8, 9),
            in_shardings=(weights.shardings, rows, rows, rows, rows, whole, whole),
            out_shardings=whole,
        )
        self._score = jax.jit(
            lambda params, tokens_BxL, starts_B, lengths_B, prefix_L: score(
                scorer, params, tokens_BxL, starts_B, lengths_B, given(prefix_L)
            ),
            in_shardings=(weights.shardings, rows, rows, rows, whole),
            out_shardings=whole,
        )
        self._score_next = jax.jit(
            lambda params, prompts_PxL, lengths_P, options_O, prefix_L: score_next(
                model, params, prompts_PxL, lengths_P, options_O, given(prefix_L)
            ),
            in_shardings=(weights.shardings, rows, rows, whole, whole),
            out_shardings=whole,
        )

    def complete(self, *args, **kwargs) -> list[list[Completion]]:
        """What `begin` begins, once it is done."""
        return self.begin(*args, **kwargs).read()

    def begin(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[int],
        key: jax.Array,
        *,
        samples: int,
        sampling: Sampling,
        limits: Sequence[int],
        batch: int,
        decoding: Decoding = WHOLE_BATCH,
    ) -> Begun[list[list[Completion]]]:
        """`samples` completions for each of at most `batch` prompts.

        A completion ends at its prompt's limit of tokens; one that has not stopped by then counts
        as not finished. Results do not depend on the length that the program was compiled
        for, as long as it is no shorter than the limits.

        Raises:
          UserError: a prompt is longer than the sampler's prompt length.
        """
        tokens_PxL, lengths_P = self._pad_left(prompts, batch)
        ids_P, limits_P = np.zeros(batch, np.uint32), np.zeros(batch, np.int32)
        ids_P[: len(prompts)] = prompt_ids
        limits_P[: len(prompts)] = np.add(limits, 1)  # the stop token on top
        order_P = np.arange(batch)
        if 0 < decoding.slots < batch:
            # Longest first, dealt out to the parts: what is read together is as long.
            parts = batch_parts(self.mesh)
            order_P = np.argsort(-lengths_P, kind="stable").reshape(-1, parts).T.ravel()
        place_P = np.argsort(order_P)
        given = (x[order_P] for x in (tokens_PxL, lengths_P, ids_P, limits_P))
        rows = batch_sharding(self.mesh)
        found = self._decode(
            params,
            *(put(x_P, rows) for x_P in given),
            key,
            self.prefix,
            samples,
            sampling,
            self._on_mesh(decoding),
        )

        def completion(host: Rollout, entropy_R: np.ndarray, row: int) -> Completion:
            n = host.lengths_R[row]
            tokens = host.tokens_RxT[row, :n].tolist()
            return Completion(
                text=self.tokenizer.decode(tokens),
                tokens=tokens,
                logprobs=host.logprobs_RxT[row, :n].tolist(),
                entropy=float(entropy_R[row]),
                finished=bool(host.finished_R[row]),
            )

        def read() -> list[list[Completion]]:
            host = to_host(found)
            # Term by term, unlike `sum`: the zeros behind a completion change no bit.
            sums_RxT = np.cumsum(host.entropy_RxT, axis=1, dtype=np.float64)
            entropy_R = sums_RxT[:, -1] / np.maximum(host.lengths_R, 1)  # none behind the prompts
            return [
                [completion(host, entropy_R, place_P[p] * samples + s) for s in range(samples)]
                for p in range(len(prompts))
            ]

        return Begun(found, read)

    def _on_mesh(self, decoding: Decoding) -> Decoding:
        return dataclasses.replace(decoding, parts=batch_parts(self.mesh))

    def lower_decode(
        self,
        batch: int,
        *,
        samples: int,
        sampling: Sampling,
        decoding: Decoding = WHOLE_BATCH,
        longest: int | None = None,
    ) -> jax.stages.Lowered:
        """The program of `complete`, from shapes alone.

        Args:
          longest: tokens of the longest of the prompts; None: as long as any can be.
        """
        length = _smallest(self.prompt_lengths, longest)
        tokens_PxL = self._rows((batch, length), np.int32)
        ids_P, numbers_P = (self._rows((batch,), t) for t in (np.uint32, np.int32))
        key = jax.eval_shape(lambda: jax.random.key(0))
        given = (tokens_PxL, numbers_P, ids_P, numbers_P, key, self.prefix)
        return self._decode.lower(
            self._abstract, *given, samples, sampling, self._on_mesh(decoding)
        )

    def lower_score(self, batch: int, *, longest: int | None = None) -> jax.stages.Lowered:
        """The program of `score`, from shapes alone; `longest` as of `lower_decode`, of texts."""
        length = _smallest(self._text_lengths(), longest)
        tokens_BxL = self._rows((batch, length), np.int32)
        numbers_B = self._rows((batch,), np.int32)
        return self._score.lower(self._abstract, tokens_BxL, numbers_B, numbers_B, self.prefix)

    def score(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        batch: int,
        *,
        stop: bool = True,
    ) -> list[np.ndarray]:
        """Log-probabilities (nats) of each continuation's tokens and, with `stop`, of the stop
        token after them."""
        end = [self.tokenizer.eos_id] if stop else []
        starts = [self._ids(p) for p in prompts]
        texts = [self.tokenizer.encode(c) if isinstance(c, str) else c for c in continuations]
        ends = [[*tokens, *end] for tokens in texts]
        longest = max(len(s) + len(e) for s, e in zip(starts, ends, strict=True))
        length = _smallest(self._text_lengths(), longest)
        tokens_BxL = np.full((batch, length), self.tokenizer.pad_id, np.int32)
        starts_B, lengths_B = np.ones(batch, np.int32), np.ones(batch, np.int32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            starts_B[row], lengths_B[row] = len(start), len(start) + len(end)
            tokens_BxL[row, : lengths_B[row]] = [*start, *end]
        rows = batch_sharding(self.mesh)
        on_device = (put(array, rows) for array in (tokens_BxL, starts_B, lengths_B))
        logprobs_BxL = to_host(self._score(params, *on_device, self.prefix))
        return [logprobs_BxL[row, starts_B[row] : lengths_B[row]] for row in range(len(starts))]

    def score_next(
        self, params: Any, prompts: Sequence[Prompt], options: Sequence[int], batch: int
    ) -> np.ndarray:
        """Log-probability (nats) that each of the tokens `options` comes after each of at most
        `batch` prompts, logprobs_PxO."""
        tokens_PxL, lengths_P = self._pad_left(prompts, batch)
        rows = batch_sharding(self.mesh)
        options_O = np.array(options, np.int32)
        logprobs_PxO = self._score_next(
            params, put(tokens_PxL, rows), put(lengths_P, rows), options_O, self.prefix
        )
        return to_host(logprobs_PxO)[: len(prompts)]

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def _text_lengths(self) -> list[int]:
        """Of prompt and continuation: lengths that `score` is compiled for."""
        return [length + self.completion_length for length in self.prompt_lengths]

    def _ids(self, prompt: Prompt) -> list[int]:
        """A text's tokens, behind the start token unless a prefix has it; given tokens as given."""
        if not isinstance(prompt, str):
            return list(prompt)
        return (self.tokenizer.encode if len(self.prefix) else self.tokenizer.encode_prompt)(prompt)

    def _pad_left(self, prompts: Sequence[Prompt], batch: int) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self._ids(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > self.prompt_lengths[-1]:
                raise UserError(
                    f"a prompt of {len(ids)} tokens exceeds the sampler's "
                    f"{self.prompt_lengths[-1]}: '{prompt}'"
                )
            if not ids:
                raise UserError("a prompt is empty, and the model has no start token to put there")
        length = _smallest(self.prompt_lengths, max(map(len, encoded), default=1))
        tokens_PxL = np.full((batch, length), self.tokenizer.pad_id, np.int32)
        lengths_P = np.ones(batch, np.int32)
        # Rows beyond the prompts hold a single token: attention over nothing would be NaN.
        tokens_PxL[:, -1] = [*_start(self.tokenizer), self.tokenizer.eos_id][0]
        for row, ids in enumerate(encoded):
            tokens_PxL[row, -len(ids) :] = ids
            lengths_P[row] = len(ids)
        return tokens_PxL, lengths_P


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _smallest(lengths: Sequence[int], needed: int | None) -> int:
    """The first of the ascending lengths that suffices, or the last; None needs the last."""
    enough = (length for length in lengths if needed is not None and length >= needed)
    return next(enough, lengths[-1])


def batches(count: int, size: int) -> list[range]:
    """Ranges of at most `size` that cover 0 … count − 1."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
