"""An OpenAI-compatible server that fails on purpose, for a process of its own.

    python tests/endpoint_server.py '{"faults": {"status 500": 0.1}, "delay": 0.05}'

It prints its port. A reply says which prompt and seed it answers, so that one that reaches another
row is found. GET /stats tells what it has seen.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
import zlib
from collections import Counter

KEY = "secret-of-the-test"
HANG = 30.0  # seconds; longer than any client waits


def text_of(prompt, seed: int) -> str:
    """What the server answers."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"<{asked}|{seed}>"


def tokens_of(text: str) -> list[bytes]:
    """The server's tokens: words with the space before them; of an emoji, two halves."""
    found = []
    for part in re.findall(r" ?\w+| ?[^\w\s]|\s", text):
        data = part.encode()
        cut = len(data) - 2 if len(data) > 3 and data[-4] >= 0xF0 else len(data)
        found += [half for half in (data[:cut], data[cut:]) if half]
    return found


def worth_of(tokens: list[bytes], place: int) -> float:
    """The log-probability of a token behind those before it."""
    return -(1 + zlib.crc32(b"|".join(tokens[: place + 1])) % 1000) / 100


class Server:
    def __init__(self, faults=None, delay=0.0, seed=0, rules=(), echo="whole", worths=()):
        """`faults` are shares of requests by kind; `rules` are pairs: what a prompt ends with or
        contains, and what is answered in place of the echo; `echo` is how a prompt is echoed with
        log-probabilities; `worths` are triples: what a text contains, what it ends with, and the
        log-probability of its last token."""
        self.faults: dict[str, float] = faults or {}
        self.delay, self.rules, self.echo, self.worths = delay, rules, echo, worths
        self.random = random.Random(seed)
        self.answered, self.faulted = Counter(), Counter()
        self.now = self.most = 0
        self.times: list[float] = []

    async def serve(self, reader, writer) -> None:
        try:
            while line := await reader.readline():
                await self.respond(line.split()[:2], reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def respond(self, request, reader, writer) -> None:
        headers = {}
        while (line := (await reader.readline()).strip()) != b"":
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip().decode()
        body = json.loads(await reader.readexactly(int(headers.get(b"content-length", 0))) or "{}")
        method, path = (part.decode() for part in request)
        if method == "GET":
            stats = {
                "answered": self.answered, "faults": self.faulted, "most": self.most,
                "times": self.times,
            }  # fmt: skip
            return await send(writer, 200, stats if path == "/stats" else {"data": []})
        if headers.get(b"authorization") != f"Bearer {KEY}":
            return await send(writer, 401, {"error": {"message": "no such key"}})
        if body["model"] != "small":
            return await send(writer, 404, {"error": {"message": "no such model"}})
        self.times.append(time.time())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay)
            await self.complete(body, path.endswith("/chat/completions"), writer)
        finally:
            self.now -= 1

    async def complete(self, body, chat: bool, writer) -> None:
        if body.get("echo") and self.echo.startswith("status"):
            said = {"error": {"message": "Only no echo is supported"}}
            return await send(writer, int(self.echo.split()[1]), said)
        text = text_of(body["messages"] if chat else body["prompt"], body.get("seed"))
        text = next((said for part, said in self.rules if part in text), text)
        if "BAD" in text:
            return await send(writer, 400, {"error": {"message": "prompt is too long"}})
        fault = "status 500" if "POISON" in text else self.draw()
        if fault:
            self.faulted[fault] += 1
        whole = completion(text, chat)
        if body.get("echo"):
            whole = self.echoed(body["prompt"])
        if fault.startswith("status"):
            status = int(fault.split()[1])
            said = {"message": "try later", "code": "insufficient_quota" if status == 402 else None}
            await send(writer, 429 if status == 402 else status, {"error": said})
        elif fault == "reset":
            writer.transport.abort()
        elif fault == "torn":
            data = json.dumps(whole).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            writer.write(b"content-length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])
            await writer.drain()
            writer.transport.abort()
        elif fault == "hang":
            await asyncio.sleep(HANG)
        elif fault == "garbled":
            await send(writer, 200, None, data=b"<html>overloaded</html>")
        elif fault == "empty":
            await send(writer, 200, {"choices": []})
        else:
            self.answered[text] += 1
            if "SILENT" in text:
                whole = completion(None, chat)
            if "NOUSAGE" in text:
                del whole["usage"]
            await send(writer, 200, whole)

    def echoed(self, prompt: str) -> dict:
        """The prompt with one token behind it, as a server tells of it."""
        tokens = tokens_of(prompt)
        worths = [worth_of(tokens, i) if i else None for i in range(len(tokens))]
        for part, end, worth in self.worths:
            if part in prompt and prompt.endswith(end):
                worths[-1] = worth
        pieces = [token.decode(errors="replace") for token in tokens]
        if self.echo == "hole":
            worths[-1] = None
        if self.echo == "bare":  # as one token alone is decoded from SentencePiece
            pieces = [piece.removeprefix(" ") for piece in pieces]
        if self.echo == "start":
            pieces, worths = ["<s>", *pieces], [None, -9.0, *worths[1:]]
        if self.echo == "ignored":
            pieces, worths, prompt = [], [], ""
        whole = completion(f"{prompt} new", False)
        if self.echo != "silent":
            whole["choices"][0]["logprobs"] = {
                "tokens": [*pieces, " new"], "token_logprobs": [*worths, -0.5],
                "text_offset": [-1] * (len(pieces) + 1), "top_logprobs": None,
            }  # fmt: skip
        used = {"prompt_tokens": len(pieces), "completion_tokens": 1}
        return whole | {"usage": used}

    def draw(self) -> str:
        point = self.random.random()
        for fault, share in self.faults.items():
            if point < share:
                return fault
            point -= share
        return ""


def completion(text: str | None, chat: bool) -> dict:
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "1",
        "object": "chat.completion" if chat else "text_completion",
        "choices": [{"index": 0, "finish_reason": "stop", **said}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


async def send(writer, status: int, payload, data: bytes | None = None) -> None:
    data = json.dumps(payload).encode() if data is None else data
    wait = b"retry-after: 0.01\r\n" if status == 429 else b""
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%s" % (status, wait))
    writer.write(b"content-length: %d\r\n\r\n" % len(data) + data)
    await writer.drain()


async def main(settings: dict) -> None:
    port = settings.pop("port", 0)
    server = await asyncio.start_server(Server(**settings).serve, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
