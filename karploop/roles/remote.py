"""A role whose model is behind an OpenAI-compatible address."""

from __future__ import annotations

from collections.abc import Sequence

from karploop.asking import Asked, How, Said, Scored, Spent, cut
from karploop.endpoints.calls import Call, Failure, seed_of
from karploop.endpoints.client import Client
from karploop.errors import UserError


class RemoteRole:
    """One endpoint's model."""

    def __init__(self, client: Client, *, chat: bool):
        """Args:
        chat: texts are asked as a user's message.
        """
        self.client = client
        self._chat = chat

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """See `Role`. A call that failed for good is an error of its own.

        Raises:
          UserError, RunFailed: as `Client.complete` does; replies that came are kept.
        """
        calls = [self._call(prompt, i, how) for prompt, i in zip(prompts, ids, strict=True)]
        said: list[Said | None] = [None] * len(calls)
        for place, outcome in self.client.complete(calls):
            if isinstance(outcome, Failure):
                said[place] = Said(None, outcome.reason)
            else:
                # Not every server knows stop strings.
                text, stopped = cut(outcome.text, how.stop)
                used = (outcome.tokens_in or 0, outcome.tokens_out or 0)
                spent = Spent(*used, outcome.cost, outcome.seconds)
                said[place] = Said(text, "", spent, stopped or outcome.finished)
        return said

    def score(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Scored]:
        """Raises UserError: a server does not tell how probable a text is."""
        raise UserError(
            "a judge reads probabilities, and a model behind an address gives texts alone: bind "
            "the role to weights ('path')"
        )

    def _call(self, prompt: Asked, prompt_id: int, how: How) -> Call:
        if self._chat and isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        return Call(
            prompt=prompt,
            max_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=seed_of(*how.seed, prompt_id),
            stop=how.stop,
        )
