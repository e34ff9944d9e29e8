"""Many calls to one endpoint at once: limited, repeated when they fail, paid for once.

Calls run on an event loop in a thread of their own, so that they go on while the caller computes.
A reply is kept in the ledger before it is handed out: a job that is killed asks again for nothing
that it has already got.

When is a call lost, and when is the endpoint? A call that failed `attempts` times is doubtful. If
others succeed after it, the fault was its own and it is a `Failure`; if doubtful calls pile up and
nothing succeeds, the endpoint is down, no row is blamed for that, and the job stops to be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from karploop.endpoints.calls import CHARACTERS, Call, Endpoint, Failure, Reply
from karploop.endpoints.forecast import Forecast, Load
from karploop.endpoints.ledger import Ledger
from karploop.endpoints.limits import Budget, Limits
from karploop.endpoints.remote import Refused, Remote, Transient
from karploop.errors import RunFailed, UserError

Outcome = Reply | Failure
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between attempts
_DOUBTFUL = 8  # calls that fail one after another before the endpoint counts as down
_PROBE, _PROBES = ("The sky is", " blue"), 3  # what is scored to see if it can be; attempts at it


@dataclass
class Usage:
    """What a client has done so far."""

    answered: int = 0
    from_cache: int = 0
    failed: int = 0
    attempts: int = 0  # requests sent
    tokens_in: int = 0
    tokens_out: int = 0


class Client:
    """See the module docstring. One job's calls to one endpoint."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger):
        """Raises UserError: settings out of range, or a missing key."""
        endpoint.check()
        self._key = endpoint.key()
        self._endpoint, self._ledger = endpoint, ledger
        self.usage = Usage()

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def known(self, call: Call) -> Reply | None:
        """The reply to a call that has been answered before."""
        return self._ledger.find(call.identity(self._endpoint))

    def spent(self) -> float:
        """Dollars that the job has spent so far."""
        return self._ledger.spent()

    def forecast(self, calls: Sequence[Call]) -> Forecast:
        """What is still to be asked of `calls`."""
        asked = [call for call in calls if not self.known(call)]
        load = sum((Load.of(call, self._endpoint) for call in asked), Load())
        return Forecast(self._endpoint, load, load, len(calls) - len(asked), self.spent())

    def check_scoring(self, where: str) -> None:
        """Asks for the log-probability of a few words, anew each time.

        Args:
          where: what wants log-probabilities, for errors.

        Raises:
          UserError: the endpoint gives none, or none that can be told apart.
          RunFailed: it is down.
        """
        call = Call.scoring(*_PROBE, seed=secrets.randbits(31))  # no earlier reply is its answer
        endpoint = replace(self._endpoint, attempts=min(self._endpoint.attempts, _PROBES))
        address, model = endpoint.base_url, endpoint.model
        try:
            ((_, found),) = Client(endpoint, self._ledger).complete([call])
        except UserError as error:
            found = Failure(str(error))
        if isinstance(found, Failure):
            raise UserError(
                f"{where} is asked for log-probabilities, and '{model}' at '{address}' gives none: "
                f"{found.reason}. Bind it to a checkpoint ('path'), or take a server that answers "
                "/completions with 'echo' and 'logprobs', such as vLLM's"
            )

    def complete(self, calls: Iterable[Call]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of every call with its place among `calls`, once each, as they come.

        Raises:
          UserError: the endpoint knows neither the key nor the model, or a call can never be within
            the limits.
          RunFailed: the endpoint is down, or the cap is reached. What was answered before has been
            handed out and is kept.
        """
        outcomes: queue.SimpleQueue = queue.SimpleQueue()
        job = _Job(self._endpoint, self._key, self._ledger, self.usage, calls, outcomes)
        thread = threading.Thread(target=job.run, name="endpoint", daemon=True)
        thread.start()
        try:
            while (item := outcomes.get()) is not None:
                yield item
        finally:
            job.stop()
            thread.join()
        if job.error:
            raise job.error


class _Job:
    """One `complete`, in a thread: its workers share the calls and end when there are no more."""

    def __init__(
        self,
        endpoint: Endpoint,
        key: str,
        ledger: Ledger,
        usage: Usage,
        calls: Iterable[Call],
        outcomes: queue.SimpleQueue,
    ):
        self.error: BaseException | None = None
        self._endpoint, self._key, self._ledger, self._usage = endpoint, key, ledger, usage
        self._calls, self._outcomes = enumerate(calls), outcomes
        self._doubtful: list[tuple[int, Failure]] = []
        self._succeeded = False
        self._loop = asyncio.new_event_loop()
        self._main: asyncio.Task | None = None

    def run(self) -> None:
        """In the thread; outcomes end with None."""
        try:
            self._main = self._loop.create_task(self._work())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.error = self.error or error
        finally:
            self._loop.close()
            self._outcomes.put(None)

    def stop(self) -> None:
        """From another thread: gives up what is in flight."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(lambda: self._main and self._main.cancel())

    async def _work(self) -> None:
        self._limits = Limits(self._endpoint)
        self._budget = Budget(self._endpoint.cap, self._ledger)
        async with Remote(self._endpoint, self._key) as self._remote:
            workers = [self._worker() for _ in range(self._endpoint.concurrency)]
            await asyncio.gather(*workers)
            if self._doubtful and not self.error:
                if self._succeeded and await self._remote.answers():
                    self._settle()
                else:
                    self._give_up()

    async def _worker(self) -> None:
        for place, call in self._calls:
            if self.error:
                return
            try:
                await self._one(place, call)
            except Exception as error:  # the others finish what they have begun
                self.error = self.error or error

    async def _one(self, place: int, call: Call) -> None:
        identity = call.identity(self._endpoint)
        if reply := self._ledger.find(identity):
            self._usage.from_cache += 1
            self._outcomes.put((place, reply))
            return
        for attempt in range(1, self._endpoint.attempts + 1):
            try:
                reply = await self._attempt(call, identity, attempt)
            except Refused as refused:
                self._finish(place, Failure(str(refused)))
                return
            except Transient as lost:
                reason = str(lost)
                if attempt < self._endpoint.attempts:
                    await asyncio.sleep(max(lost.wait, _backoff(attempt)))
                if self.error:
                    return
                continue
            self._finish(place, reply)
            return
        times = f"{self._endpoint.attempts} attempts"
        self._doubtful.append((place, Failure(f"no reply in {times}, the last: {reason}")))
        if len(self._doubtful) >= _DOUBTFUL:
            self._give_up()

    async def _attempt(self, call: Call, identity: str, number: int) -> Reply:
        """Raises Refused, Transient, and what ends the job."""
        most_out = call.most_tokens_out(self._endpoint)
        most = self._endpoint.price(call.most_tokens_in, most_out)
        await self._limits.wait(call.characters // CHARACTERS + most_out)
        async with self._budget.hold(most):
            self._usage.attempts += 1
            started = time.monotonic()
            try:
                answer = await self._remote.ask(call)
            except Transient as lost:
                if lost.billed:
                    self._budget.spend(most)
                    self._ledger.charge(most)
                raise
            known = answer.tokens_in is not None and answer.tokens_out is not None
            cost = self._endpoint.price(answer.tokens_in, answer.tokens_out) if known else most
            self._budget.spend(cost)
            self._usage.tokens_in += answer.tokens_in or 0
            self._usage.tokens_out += answer.tokens_out or 0
            if answer.text is None:
                self._ledger.charge(cost)
                raise Refused(answer.refusal)
            reply = Reply(
                text=answer.text,
                finished=answer.finished,
                tokens_in=answer.tokens_in,
                tokens_out=answer.tokens_out,
                cost=cost,
                seconds=round(time.monotonic() - started, 3),
                attempts=number,
                pieces=answer.echo and answer.echo.pieces,
                logprobs=answer.echo and answer.echo.logprobs,
            )
            self._ledger.keep(identity, reply)
            return reply

    def _finish(self, place: int, outcome: Outcome) -> None:
        """The endpoint has answered: what failed before it failed by itself."""
        self._succeeded = True
        self._settle()
        self._hand_out(place, outcome)

    def _settle(self) -> None:
        for place, failure in self._doubtful:
            self._hand_out(place, failure)
        self._doubtful.clear()

    def _hand_out(self, place: int, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self._usage.failed += 1
        else:
            self._usage.answered += 1
        self._outcomes.put((place, outcome))

    def _give_up(self) -> None:
        self.error = self.error or RunFailed(
            f"'{self._endpoint.base_url}' does not answer: {self._doubtful[-1][1].reason}. What it "
            "has answered is kept: run the same command again when it is back"
        )


def _backoff(attempt: int) -> float:
    """Seconds to wait after an attempt (from 1): doubling, and never two callers in step."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
