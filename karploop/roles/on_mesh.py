"""A role whose weights lie on the mesh."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from karploop.asking import Asked, How, Said, Scored, Spent, cut, spoken
from karploop.config import ModelConfig
from karploop.data.tokenizer import Tokenizer
from karploop.errors import UserError
from karploop.models.weights import Weights
from karploop.rng import folded
from karploop.sampling.distributions import Sampling
from karploop.sampling.sampler import Sampler, batches

_SHORTEST = 32  # tokens
_STEP = 32  # a shared beginning is read in multiples of so many tokens


class Speaker(Protocol):
    """What is to be known of a model besides its weights."""

    path: Any  # what messages call it
    config: ModelConfig
    tokenizer: Tokenizer


class Described(NamedTuple):
    """One without files of its own."""

    path: str
    config: ModelConfig
    tokenizer: Tokenizer


class MeshRole:
    """One model's weights; roles bound to the same model are the same object."""

    def __init__(self, model: Speaker, weights: Weights, params: Any, *, chat: bool, batch: int):
        """Args:
        chat: texts are asked as a user's message, by the chat template.
        batch: prompts on the device at a time; no influence on what is said.
        """
        self.weights, self.params = weights, params
        self._model, self._chat, self._batch = model, chat, batch
        self._samplers: dict[tuple[int, tuple[int, ...]], Sampler] = {}

    def with_params(self, params: Any) -> MeshRole:
        """The same architecture with other parameters; what is compiled is shared."""
        role = copy.copy(self)
        role.params = params
        return role

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """See `Role`. A prompt that the context has no room for is an error of its own."""
        room = self._model.config.max_length - how.max_new_tokens
        tokens = [self._tokens(prompt) for prompt in prompts]
        said = [Said(None, _too_long(prompt, room)) for prompt in tokens]
        sampler = self._sampler(how.max_new_tokens)
        for at in self._batches(tokens, room):
            completions = sampler.complete(
                self.params,
                [tokens[i] for i in at],
                [ids[i] for i in at],
                folded(how.seed),
                samples=1,
                sampling=Sampling(temperature=how.temperature, top_p=how.top_p),
                limits=[how.max_new_tokens - 1] * len(at),
                batch=self._batch,
            )
            for i, (completion,) in zip(at, completions, strict=True):
                text, stopped = cut(completion.text, how.stop)
                spent = Spent(len(tokens[i]), len(completion.tokens))
                said[i] = Said(text, "", spent, stopped or completion.finished)
        return said

    def score(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Scored]:
        """See `Role`. What all prompts begin with, such as a judge's instructions, is read once.

        Raises:
          UserError: the tokenizer does not tell the options apart by one token.
        """
        begin, last = self._options(options)
        tokens = [[*self._tokens(prompt), *begin] for prompt in prompts]
        room = self._model.config.max_length - 1
        found = [Scored(None, _too_long(prompt, room)) for prompt in tokens]
        prefix = self._beginning(tokens)
        sampler = self._sampler(1, prefix)
        for at in self._batches(tokens, room):
            rests = [tokens[i][len(prefix) :] for i in at]
            logprobs_PxO = sampler.score_next(self.params, rests, last, self._batch)
            for i, logprobs_O in zip(at, logprobs_PxO.tolist(), strict=True):
                found[i] = Scored(tuple(logprobs_O), "", Spent(len(tokens[i])))
        return found

    def _options(self, options: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens that all options begin with, and the one by which each differs."""
        # In running text a word follows a space; a chat's answer begins with none.
        texts = options if self._chat else [f" {option}" for option in options]
        ids = [self._model.tokenizer.encode(text) for text in texts]
        begin = os.path.commonprefix(ids)
        rest = [option[len(begin) :] for option in ids]
        if any(len(tokens) != 1 for tokens in rest):
            raise UserError(
                f"the tokenizer of '{self._model.path}' does not tell {', '.join(options)} apart "
                "by one token: name options that differ in one, such as digits or capitals"
            )
        return begin, [token for (token,) in rest]

    def _beginning(self, tokens: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """What all the prompts begin with, before their last token; () where that is short.

        One that was met before will do, for a new one is a new program.
        """
        for _, prefix in sorted(self._samplers, key=lambda made: -len(made[1])):
            if prefix and all(
                len(ids) > len(prefix) and tuple(ids[: len(prefix)]) == prefix for ids in tokens
            ):
                return prefix
        shared = os.path.commonprefix([list(ids[:-1]) for ids in tokens])
        return tuple(shared[: len(shared) // _STEP * _STEP])

    def _batches(self, tokens: Sequence[Sequence[int]], room: int) -> Iterator[list[int]]:
        """Places of the prompts that there is room for: neighbours in length share a program."""
        fitting = [i for i, ids in enumerate(tokens) if len(ids) <= room]
        places = sorted(fitting, key=lambda i: len(tokens[i]))
        for part in batches(len(places), self._batch):
            yield [places[i] for i in part]

    def _tokens(self, prompt: Asked) -> list[int]:
        tokenizer = self._model.tokenizer
        if not self._chat:
            return tokenizer.encode_prompt(prompt if isinstance(prompt, str) else spoken(prompt))
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.render(list(turns), add_generation_prompt=True)

    def _sampler(self, max_new_tokens: int, prefix: tuple[int, ...] = ()) -> Sampler:
        if (max_new_tokens, prefix) not in self._samplers:
            longest = self._model.config.max_length - max_new_tokens - len(prefix)
            lengths = [_SHORTEST << i for i in range(32) if _SHORTEST << i < longest]
            self._samplers[max_new_tokens, prefix] = Sampler(
                self.weights,
                self._model.tokenizer,
                prompt_length=[*lengths, longest],
                completion_length=max_new_tokens - 1,
                prefix=prefix,
            )
        return self._samplers[max_new_tokens, prefix]


def _too_long(tokens: Sequence[int], room: int) -> str:
    return f"the prompt takes {len(tokens)} tokens, and the context has room for {room}"
