"""A role whose model is behind an OpenAI-compatible address."""

from __future__ import annotations

from collections.abc import Sequence

from karploop.asking import Asked, How, Said, Scored, Spent, cut, spoken
from karploop.endpoints.calls import Call, Failure, Reply, seed_of
from karploop.endpoints.client import Client, Outcome


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
        calls = self.calls(prompts, ids, how)
        said: list[Said | None] = [None] * len(calls)
        for place, outcome in self.client.complete(calls):
            said[place] = read_said(outcome, how)
        return said

    def score(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Scored]:
        """See `Role`: what all tokens of an option are worth together, behind a space.

        Always in plain text, for a server tells of the texts that it is given and of no template's.
        A call for each prompt and option. One that failed for good leaves its prompt without any.

        Raises:
          UserError, RunFailed: as `Client.complete` does; replies that came are kept.
        """
        calls = self.scoring_calls(prompts, options)
        found: list[Outcome | None] = [None] * len(calls)
        for place, outcome in self.client.complete(calls):
            found[place] = outcome
        each = len(options)
        return [read_scored(found[i : i + each]) for i in range(0, len(found), each)]

    def calls(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Call]:
        """What `complete` asks the endpoint."""
        return [self._call(prompt, i, how) for prompt, i in zip(prompts, ids, strict=True)]

    def scoring_calls(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Call]:
        """What `score` asks the endpoint: of each prompt, all options."""
        texts = [prompt if isinstance(prompt, str) else spoken(prompt) for prompt in prompts]
        return [Call.scoring(text, f" {option}") for text in texts for option in options]

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


def read_said(outcome: Outcome, how: How) -> Said:
    """What a call's outcome says to a prompt."""
    if isinstance(outcome, Failure):
        return Said(None, outcome.reason)
    text, stopped = cut(outcome.text, how.stop)  # not every server knows stop strings
    return Said(text, "", _spent(outcome), stopped or outcome.finished)


def read_scored(outcomes: Sequence[Outcome]) -> Scored:
    """From the outcomes of all options of a prompt."""
    spent = sum((_spent(one) for one in outcomes if not isinstance(one, Failure)), Spent())
    for one in outcomes:
        if isinstance(one, Failure):
            return Scored(None, one.reason, spent)
        if None in one.logprobs:
            return Scored(None, "there is nothing before the option", spent)
    return Scored(tuple(sum(one.logprobs) for one in outcomes), "", spent)


def _spent(reply: Reply) -> Spent:
    return Spent(reply.tokens_in or 0, reply.tokens_out or 0, reply.cost, reply.seconds)
