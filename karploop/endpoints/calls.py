"""What is asked of an endpoint, and what comes back: a reply, or a failure with its reason."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karploop.errors import UserError

Message = Mapping[str, Any]
CHARACTERS = 4  # of a token, about
_AROUND = 16  # most tokens that a chat template puts around a message


@dataclass(frozen=True)
class Endpoint:
    """A model behind an address, how hard it may be asked, and what it costs."""

    model: str
    base_url: str
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    concurrency: int = 16  # calls in flight
    requests_per_minute: int = 0  # 0: no limit
    tokens_per_minute: int = 0  # of prompts and replies together; 0: no limit
    timeout: float = 120.0  # seconds from a call to its whole reply
    attempts: int = 8  # of a call, before it counts as failed
    input_price: float = 0.0  # dollars a million tokens
    output_price: float = 0.0
    cap: float = 0.0  # most dollars of a job; 0: no cap
    extra: Mapping[str, Any] = field(default_factory=dict)  # laid over each request; null removes

    def check(self) -> None:
        """Raises UserError: a value out of range, or keys that do not go together."""
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                f"'base_url' is '{self.base_url}': it wants an address such as "
                "http://localhost:8000/v1"
            )
        low = {"concurrency": 1, "attempts": 1, "requests_per_minute": 0, "tokens_per_minute": 0}
        low |= {"timeout": 1e-3, "input_price": 0, "output_price": 0, "cap": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UserError(f"'{name}' must be at least {least}, got {getattr(self, name)}")
        if self.cap and not (self.input_price or self.output_price):
            raise UserError(
                "'cap' is in dollars, and neither 'input_price' nor 'output_price' says what a "
                "million tokens cost: set them"
            )

    def key(self) -> str:
        """The secret, from the environment alone; servers on one's own machine need none.

        Raises UserError: the variable is not set, and the address is elsewhere.
        """
        found = os.environ.get(self.key_env)
        near = any(f"//{host}" in self.base_url for host in ("localhost", "127.0.0.1", "[::1]"))
        if not found and not near:
            raise UserError(f"'{self.base_url}' wants a key: export {self.key_env}=…")
        return found or "none"

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """Dollars."""
        return (tokens_in * self.input_price + tokens_out * self.output_price) / 1e6


def read_extra(text: str, where: str) -> dict[str, Any]:
    """An endpoint's `extra` from the JSON that a user wrote.

    Raises UserError: it is no JSON object.
    """
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}): {text}") from error
    if not isinstance(extra, dict):
        raise UserError(f"{where} wants a JSON object, got {text}")
    return extra


@dataclass(frozen=True)
class Call:
    """One completion of a text, or of a conversation; or how probable a text's continuation is."""

    prompt: str | Sequence[Message]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0  # calls that differ in nothing else get replies of their own
    stop: tuple[str, ...] = ()
    continuation: str | None = None  # of a text: what is scored, and nothing is asked for

    @classmethod
    def scoring(cls, prompt: str, continuation: str, seed: int = 0) -> Call:
        """How probable a text is behind another, which may be empty.

        One token is asked for, because some servers take none for as many as there is room for.
        """
        return cls(prompt, max_tokens=1, seed=seed, continuation=continuation)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The request's JSON."""
        asked = {"messages": list(self.prompt)} if self.is_chat else {"prompt": self._texts[0]}
        if self.continuation is not None:
            asked |= {"echo": True, "logprobs": 1}
        body = asked | {
            "model": endpoint.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": list(self.stop) or None,
        }
        return {k: v for k, v in (body | endpoint.extra).items() if v is not None}

    def identity(self, endpoint: Endpoint) -> str:
        """A hash of the whole request and of where it goes."""
        whole = [endpoint.base_url, self.is_chat, self.body(endpoint)]
        if self.continuation is not None:
            whole.append(len(self.prompt))  # of one text, another end is another question
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    @property
    def characters(self) -> int:
        return sum(map(len, self._texts))

    @property
    def _texts(self) -> list[str]:
        if self.is_chat:
            return [str(m.get("content") or "") for m in self.prompt]
        return [self.prompt + (self.continuation or "")]

    @property
    def most_tokens_in(self) -> int:
        """No tokenizer makes more: a token is a byte at least."""
        return sum(len(text.encode()) + _AROUND for text in self._texts)

    def most_tokens_out(self, endpoint: Endpoint) -> int:
        """As the request says it, under whichever of its two names."""
        body = self.body(endpoint)
        return int(body.get("max_completion_tokens", body.get("max_tokens", self.max_tokens)))


def seed_of(*parts: int) -> int:
    """A seed of 31 bits, for servers that keep it in a signed integer."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


@dataclass(frozen=True)
class Reply:
    """A completion. One that scores a continuation has no text of its own."""

    text: str
    finished: bool  # it ended by itself; else it was cut at `max_tokens`
    tokens_in: int | None  # None: the endpoint does not say
    tokens_out: int | None
    cost: float  # dollars; at most so many where the endpoint does not say
    seconds: float  # of the attempt that succeeded
    attempts: int
    pieces: list[str] | None = None  # of a continuation that was scored: its tokens, as texts …
    logprobs: list[float | None] | None = None  # … and their log-probabilities; see `echo.Echo`


@dataclass(frozen=True)
class Failure:
    """A call that failed for good."""

    reason: str
