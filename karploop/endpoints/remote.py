"""One request to an OpenAI-compatible server, and what its outcome means."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from karploop.endpoints.calls import Call, Endpoint
from karploop.endpoints.echo import Echo, Unscored, read_echo
from karploop.errors import RunFailed, UserError

_LONGEST_ASKED = 120.0  # most seconds of a Retry-After header that are waited


class Transient(Exception):
    """The request failed in a way that another one may not.

    Attributes:
      wait: seconds that the endpoint asks to wait.
      billed: whether the endpoint may have done the work.
    """

    def __init__(self, reason: str, wait: float = 0.0, *, billed: bool = False):
        super().__init__(reason)
        self.wait, self.billed = wait, billed


class Refused(Exception):
    """The endpoint will not answer this call, however often it is asked."""


@dataclass(frozen=True)
class Answer:
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    finished: bool = True
    refusal: str = ""  # why there is no text
    echo: Echo | None = None  # of a call that scores


class Remote:
    """A connection pool; to be entered inside an event loop."""

    def __init__(self, endpoint: Endpoint, key: str):
        import openai

        self._openai, self._endpoint = openai, endpoint
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=key,
            max_retries=0,  # attempts are counted, limited and paid for by the caller
            timeout=endpoint.timeout,
            http_client=openai.DefaultAioHttpClient(timeout=endpoint.timeout),
        )

    async def __aenter__(self) -> Remote:
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.close()

    async def ask(self, call: Call) -> Answer:
        """Raises:
        Transient: worth another attempt.
        Refused: not worth one.
        UserError: no call will ever be answered: the key or the model is wrong.
        RunFailed: nor will one before the account is filled.
        """
        try:
            # openai's own timeout starts anew with every byte that comes.
            async with asyncio.timeout(self._endpoint.timeout):
                response = await self._send(call)
        except TimeoutError as error:
            raise Transient(self._too_slow, billed=True) from error
        except self._openai.APITimeoutError as error:
            raise Transient(self._too_slow, billed=_was_sent(error)) from error
        except self._openai.APIConnectionError as error:
            reason = f"the connection broke ({error.__cause__ or error})"
            raise Transient(reason, billed=_was_sent(error)) from error
        except self._openai.APIStatusError as error:
            raise self._meaning(error, call) from error
        try:
            return _read(json.loads(response.content), call)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Transient("the reply is no completion", billed=True) from error

    async def answers(self) -> bool:
        """Whether there is a server that still says anything."""
        try:
            await self._client.models.list()
        except self._openai.APIStatusError as error:
            return error.status_code < 500
        except self._openai.OpenAIError:
            return False
        return True

    async def _send(self, call: Call) -> Any:
        body = call.body(self._endpoint)
        api = self._client.chat.completions if call.is_chat else self._client.completions
        asked = "messages" if call.is_chat else "prompt"
        named = {name: body.pop(name) for name in ("model", asked)}
        # The raw response: what a server leaves out or garbles is found here, not deep in a parser.
        raw = await api.with_raw_response.create(**named, extra_body=body)
        return raw.http_response

    @property
    def _too_slow(self) -> str:
        return f"no reply within {self._endpoint.timeout:g} s"

    def _meaning(self, error: Any, call: Call) -> Exception:
        """Of a status that is not 200."""
        status, said = error.status_code, str(error.message)[:300]
        address, model = self._endpoint.base_url, self._endpoint.model
        if status == 429 and error.code == "insufficient_quota":
            return RunFailed(f"'{address}' says that the account is empty: {said}")
        if call.continuation is not None and "echo" in said:  # llama.cpp says so with status 500
            return Refused(f"status {status}: {said}")
        if status in (408, 409, 429) or status >= 500:
            return Transient(f"status {status}: {said}", _asked_wait(error.response.headers))
        if status in (401, 403):
            return UserError(
                f"'{address}' refuses the key in {self._endpoint.key_env} (status {status}): {said}"
            )
        if status == 404:
            way = "/chat/completions" if call.is_chat else "/completions"
            hint = "" if call.is_chat else "; a chat model wants 'messages' in place of 'prompt'"
            hint = hint if call.continuation is None else "; log-probabilities are asked for there"
            return UserError(f"'{address}{way}' or its model '{model}' is not there: {said}{hint}")
        return Refused(f"status {status}: {said}")


def _read(payload: Any, call: Call) -> Answer:
    """Raises LookupError, TypeError or AttributeError where it is no completion."""
    choice, usage = payload["choices"][0], payload.get("usage") or {}
    used = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if call.continuation is not None:
        try:
            echo = read_echo(choice, used[1], call.prompt, call.continuation)
        except Unscored as error:
            return Answer(None, *used, refusal=str(error))
        return Answer("", *used, echo=echo)
    text = choice["message"].get("content") if call.is_chat else choice["text"]
    ended = choice.get("finish_reason") or "stop"
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text of type {type(text).__name__}")
    if text is None or ended == "content_filter":
        return Answer(None, *used, refusal=f"a reply without text ({ended})")
    return Answer(text, *used, finished=ended == "stop")


def _was_sent(error: Exception) -> bool:
    """Whether the server may have seen the request of which this became."""
    return not type(error.__cause__).__name__.startswith(("Connect", "Pool"))


def _asked_wait(headers: Any) -> float:
    """Seconds of a Retry-After header; 0 where there is none in seconds."""
    try:
        return min(max(float(headers.get("retry-after", 0)), 0.0), _LONGEST_ASKED)
    except ValueError:
        return 0.0
