"""A role whose weights lie on the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from karploop.asking import Asked, How, Said, cut, spoken
from karploop.models.weights import Weights
from karploop.roles.local import LocalModel
from karploop.sampling.distributions import Sampling
from karploop.sampling.sampler import Sampler, batches

_SHORTEST = 32  # tokens


class MeshRole:
    """One model's weights; roles bound to the same model are the same object."""

    def __init__(self, model: LocalModel, weights: Weights, params: Any, *, chat: bool, batch: int):
        """Args:
        chat: texts are asked as a user's message, by the chat template.
        batch: prompts on the device at a time; no influence on what is said.
        """
        self.weights, self.params = weights, params
        self._model, self._chat, self._batch = model, chat, batch
        self._samplers: dict[int, Sampler] = {}

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """See `Role`. A prompt that the context has no room for is an error of its own."""
        room = self._model.config.max_length - how.max_new_tokens
        tokens = [self._tokens(prompt) for prompt in prompts]
        said: list[Said | None] = [
            Said(None, f"the prompt takes {len(ids)} tokens, and the context has room for {room}")
            if len(ids) > room
            else None
            for ids in tokens
        ]
        # Neighbours in length share a batch, and a program.
        places = sorted((i for i, s in enumerate(said) if s is None), key=lambda i: len(tokens[i]))
        sampler = self._sampler(how.max_new_tokens)
        for part in batches(len(places), self._batch):
            at = [places[i] for i in part]
            completions = sampler.complete(
                self.params,
                [tokens[i] for i in at],
                [ids[i] for i in at],
                _key(how.seed),
                samples=1,
                sampling=Sampling(temperature=how.temperature, top_p=how.top_p),
                limits=[how.max_new_tokens - 1] * len(at),
                batch=self._batch,
            )
            for i, (completion,) in zip(at, completions, strict=True):
                said[i] = Said(cut(completion.text, how.stop), tokens=len(completion.tokens))
        return said

    def _tokens(self, prompt: Asked) -> list[int]:
        tokenizer = self._model.tokenizer
        if not self._chat:
            return tokenizer.encode_prompt(prompt if isinstance(prompt, str) else spoken(prompt))
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.render(list(turns), add_generation_prompt=True)

    def _sampler(self, max_new_tokens: int) -> Sampler:
        if max_new_tokens not in self._samplers:
            longest = self._model.config.max_length - max_new_tokens
            lengths = [_SHORTEST << i for i in range(32) if _SHORTEST << i < longest]
            self._samplers[max_new_tokens] = Sampler(
                self.weights,
                self._model.tokenizer,
                prompt_length=[*lengths, longest],
                completion_length=max_new_tokens - 1,
            )
        return self._samplers[max_new_tokens]


def _key(seed: Sequence[int]) -> jax.Array:
    first, *rest = seed
    key = jax.random.key(first)
    for part in rest:
        key = jax.random.fold_in(key, part)
    return key
