"""How fast an endpoint is asked, and how much may be spent on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from karploop.endpoints.calls import Endpoint
from karploop.endpoints.ledger import Ledger
from karploop.errors import RunFailed, UserError


class Limits:
    """Requests and tokens a minute. To be made inside an event loop."""

    def __init__(self, endpoint: Endpoint):
        from aiolimiter import AsyncLimiter

        requests, self._most = endpoint.requests_per_minute, endpoint.tokens_per_minute
        # In seconds and not in minutes, or the first minute would let two minutes' worth through.
        self._requests = (
            AsyncLimiter(max(1.0, requests / 60), max(1.0, 60 / requests)) if requests else None
        )
        self._tokens = AsyncLimiter(self._most, 60) if self._most else None

    async def wait(self, tokens: int) -> None:
        """Returns when a request of at most so many tokens may go.

        Raises:
          UserError: none so large ever may.
        """
        if self._tokens:
            if tokens > self._most:
                raise UserError(
                    f"a call of {tokens} tokens, prompt and longest reply, can never be within "
                    f"'tokens_per_minute' of {self._most}: raise it, or lower 'max_new_tokens'"
                )
            await self._tokens.acquire(tokens)
        if self._requests:
            await self._requests.acquire()


class Budget:
    """A hard cap: what is spent and what calls in flight may yet cost never exceed it."""

    def __init__(self, cap: float, ledger: Ledger):
        """Args:
        cap: in dollars; 0: none.
        """
        self._cap, self._spent = cap, ledger.spent()
        self._held, self._holders = 0.0, 0
        self._changed = asyncio.Condition()

    def spend(self, dollars: float) -> None:
        self._spent += dollars

    @contextlib.asynccontextmanager
    async def hold(self, dollars: float) -> AsyncIterator[None]:
        """Sets the most that a call can cost aside while it runs; waits while others hold it.

        Raises:
          RunFailed: the cap does not allow the call, and no call in flight can give anything back.
        """
        async with self._changed:
            while self._cap and self._spent + self._held + dollars > self._cap:
                if not self._holders:
                    raise RunFailed(
                        f"${self._spent:.4f} of the cap of ${self._cap:g} are spent, and the next "
                        f"call may cost ${dollars:.4f}. What was answered is kept: run the same "
                        "command again with a higher 'cap'"
                    )
                await self._changed.wait()
            self._held, self._holders = self._held + dollars, self._holders + 1
        try:
            yield
        finally:
            self._held, self._holders = self._held - dollars, self._holders - 1
            async with self._changed:
                self._changed.notify_all()
