"""Calls to an OpenAI-compatible server, against one that runs beside the tests and fails."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("openai")

from endpoint_server import KEY, text_of  # noqa: E402
from endpoints import Running  # noqa: E402

from karploop.endpoints.calls import Call, Endpoint, Failure, Reply  # noqa: E402
from karploop.endpoints.client import Client  # noqa: E402
from karploop.endpoints.ledger import Ledger  # noqa: E402
from karploop.errors import RunFailed, UserError  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "replies.sqlite", "job")


def calls(count: int, prompt: str = "question {}", chat: bool = False) -> list[Call]:
    def ask(i: int):
        text = prompt.format(i)
        return [{"role": "user", "content": text}] if chat else text

    return [Call(ask(i), max_tokens=5, seed=i) for i in range(count)]


def collect(endpoint: Endpoint, ledger: Ledger, asked: list[Call]) -> dict:
    client, found = Client(endpoint, ledger), {}
    for place, outcome in client.complete(asked):
        assert place not in found
        found[place] = outcome
    return found


FAULTS = {
    "status 429": 0.05, "status 500": 0.03, "status 503": 0.03, "reset": 0.03, "torn": 0.02,
    "garbled": 0.02, "empty": 0.018, "hang": 0.002,
}  # fmt: skip


@pytest.mark.parametrize("chat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nothing_is_lost_doubled_or_misaligned(serve, ledger, chat):
    """10,000 calls in all, of which a fifth of the attempts fail in one of eight ways."""
    server = serve(faults=FAULTS)
    asked = calls(5000, chat=chat)
    endpoint = replace(server.endpoint, concurrency=64, attempts=12, timeout=3.0)
    client = Client(endpoint, ledger)
    seen, right = set(), 0
    for place, outcome in client.complete(asked):
        assert place not in seen
        seen.add(place)
        right += outcome.text == text_of(asked[place].prompt, place)
    assert right == len(asked) == len(seen)
    stats = server.stats()
    assert set(stats["faults"]) == set(FAULTS)
    share = sum(stats["faults"].values()) / client.usage.attempts
    assert 0.17 < share < 0.23
    assert stats["most"] <= 64
    assert max(stats["answered"].values()) == 1, "no reply that came is asked for again"


def test_concurrency_pays(serve, tmp_path):
    """At least twenty times the rate of one call after another, at 50 ms a call."""
    server = serve(delay=0.05)

    def rate(concurrency: int, count: int) -> float:
        ledger = Ledger(tmp_path / f"{concurrency}.sqlite", "job")
        collect(replace(server.endpoint, concurrency=concurrency), ledger, calls(64))  # connected
        started = time.monotonic()
        found = collect(
            replace(server.endpoint, concurrency=concurrency), ledger, calls(count, "timed {}")
        )
        assert len(found) == count
        return count / (time.monotonic() - started)

    serial = rate(1, 40)
    assert max(rate(64, 2000 + i) for i in range(2)) > 20 * serial
    assert server.stats()["most"] == 64


def test_replies_are_kept_and_asked_for_once(serve, ledger):
    server = serve()
    first = collect(server.endpoint, ledger, calls(20))
    client = Client(server.endpoint, ledger)
    said = str(client.forecast(calls(20)))
    assert "0 calls" in said and "20 more" in said
    assert dict(client.complete(calls(20))) == first
    assert client.usage.from_cache == 20 and client.usage.attempts == 0
    assert sum(server.stats()["answered"].values()) == 20
    warmer = [replace(call, temperature=0.5) for call in calls(20)]
    collect(server.endpoint, ledger, warmer)
    assert sum(server.stats()["answered"].values()) == 40, "the key is the whole request"


@pytest.mark.parametrize("longest", [{}, {"max_tokens": 50}, {"max_completion_tokens": 50}])
def test_the_forecast_is_what_the_job_may_cost(ledger, longest):
    """Before anything is asked, of calls that were not answered yet, as the requests will be."""
    extra = longest | ({"max_tokens": None} if "max_completion_tokens" in longest else {})
    out = 50 if longest else 5
    endpoint = Endpoint(
        "m", "http://localhost/v1", input_price=2000.0, output_price=3000.0, extra=extra
    )
    asked = [Call("x" * 400, max_tokens=5, seed=i) for i in range(30)]
    client = Client(endpoint, ledger)
    cost = (30 * 100 * 2000 + 30 * out * 3000) / 1e6
    said = str(client.forecast(asked))
    assert said.startswith(f"30 calls, about 3,000 tokens in, at most {30 * out:,} out")
    assert said.endswith(f"about ${cost:.2f} at most")
    for call in asked[:20]:
        ledger.keep(call.identity(endpoint), Reply("y", True, 100, out, 0.0, 0.1, 1))
    said = str(client.forecast(asked))
    assert said.startswith(f"10 calls, about 1,000 tokens in, at most {10 * out:,} out")
    assert "(20 more are answered already)" in said and f"${cost / 3:.2f}" in said


def test_a_row_that_is_refused_is_a_failure_with_its_reason(serve, ledger):
    server = serve()
    asked = calls(6)
    asked[2] = replace(asked[2], prompt="BAD")
    asked[4] = replace(asked[4], prompt=[{"role": "user", "content": "SILENT"}])
    found = collect(server.endpoint, ledger, asked)
    assert "status 400" in found[2].reason and "too long" in found[2].reason
    assert "without text" in found[4].reason
    assert all(isinstance(found[i], Reply) for i in (0, 1, 3, 5))


@pytest.mark.parametrize("place", [0, 29])
def test_a_row_that_always_fails_holds_up_nobody(serve, ledger, place):
    """Also where it is the last: the endpoint answers others, so the fault is the row's."""
    server = serve()
    asked = calls(30)
    asked[place] = replace(asked[place], prompt="POISON")
    found = collect(replace(server.endpoint, attempts=3, concurrency=2), ledger, asked)
    assert isinstance(found[place], Failure)
    assert "3 attempts" in found[place].reason and "500" in found[place].reason
    assert sum(isinstance(outcome, Reply) for outcome in found.values()) == 29


def test_a_dead_endpoint_fails_the_job_and_no_row(serve, ledger):
    server = serve(delay=0.01)
    endpoint = replace(server.endpoint, attempts=3, concurrency=4)
    client, found = Client(endpoint, ledger), {}
    with pytest.raises(RunFailed, match="does not answer"):
        for place, outcome in client.complete(calls(200)):
            found[place] = outcome
            if len(found) == 50:
                server.stop()
    assert 50 <= len(found) < 60
    assert all(isinstance(outcome, Reply) for outcome in found.values())


def test_an_endpoint_that_only_fails_counts_as_dead(serve, ledger):
    server = serve(faults={"status 500": 1.0})
    with pytest.raises(RunFailed, match="does not answer.*500"):
        collect(replace(server.endpoint, attempts=2), ledger, calls(100))


def test_a_full_account_is_not_retried(serve, ledger):
    server = serve(faults={"status 402": 1.0})
    with pytest.raises(RunFailed, match="account is empty"):
        collect(server.endpoint, ledger, calls(10))
    assert sum(server.stats()["faults"].values()) <= 10


def test_mistakes_are_the_users(serve, ledger, monkeypatch):
    server = serve()
    with pytest.raises(UserError, match="model 'large' is not there"):
        collect(replace(server.endpoint, model="large"), ledger, calls(50))
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"):
        collect(server.endpoint, ledger, calls(50))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="export OPENAI_API_KEY"):
        Client(replace(server.endpoint, base_url="https://api.example.com/v1"), ledger)
    for wrong, message in (
        (dict(base_url="localhost:8000"), "base_url"),
        (dict(concurrency=0), "'concurrency' must be at least 1"),
        (dict(cap=1.0), "'input_price'"),
    ):
        with pytest.raises(UserError, match=message):
            Client(replace(server.endpoint, **wrong), ledger)


def test_the_cap_is_never_exceeded_and_the_job_goes_on_when_it_is_raised(serve, tmp_path):
    """A reply costs 10 + 5 tokens, and may cost up to the bytes of its prompt."""
    server = serve(delay=0.005)
    asked = calls(100)
    priced = replace(server.endpoint, input_price=1000.0, output_price=2000.0, concurrency=8)
    each = priced.price(10, 5)
    capped = replace(priced, cap=30.5 * each)
    ledger, found = Ledger(tmp_path / "r.sqlite", "job"), {}
    with pytest.raises(RunFailed, match="higher 'cap'"):
        for place, outcome in Client(capped, ledger).complete(asked):
            found[place] = outcome
    assert 20 <= len(found) <= 30
    assert ledger.spent() == pytest.approx(len(found) * each)
    assert ledger.spent() <= capped.cap
    ledger.close()
    ledger = Ledger(tmp_path / "r.sqlite", "job")
    client = Client(replace(priced, cap=101 * each), ledger)
    assert len(dict(client.complete(asked))) == 100
    assert ledger.spent() == pytest.approx(100 * each), "nothing is paid for twice"
    assert Ledger(tmp_path / "r.sqlite", "another job").spent() == 0


def test_what_may_have_been_billed_counts(serve, ledger):
    server = serve(faults={"torn": 0.5})
    asked = calls(40)
    priced = replace(server.endpoint, input_price=1.0, output_price=1.0, attempts=20)
    collect(priced, ledger, asked)
    torn = server.stats()["faults"]["torn"]
    most = priced.price(asked[0].most_tokens_in, 5)
    assert torn > 10
    assert ledger.spent() == pytest.approx(40 * priced.price(10, 5) + torn * most, rel=0.05)
    before = ledger.spent()
    (reply,) = collect(priced, ledger, [Call("NOUSAGE", 5)]).values()
    assert reply.tokens_in is None and ledger.spent() - before >= reply.cost > 0


def test_requests_a_minute_are_kept(serve, ledger):
    server = serve()
    collect(replace(server.endpoint, requests_per_minute=600), ledger, calls(25))
    times = sorted(server.stats()["times"])
    assert times[-1] - times[0] > 1.3  # ten at once, then ten a second
    with pytest.raises(UserError, match="'tokens_per_minute' of 3"):
        collect(replace(server.endpoint, tokens_per_minute=3), ledger, calls(2, "new {}"))


def test_extra_settings_reach_the_server(serve):
    call = Call("a", 5)
    endpoint = Endpoint("m", "http://x/v1", extra={"top_k": 3, "max_tokens": None})
    body = call.body(endpoint)
    assert body["top_k"] == 3 and "max_tokens" not in body
    assert call.identity(endpoint) != call.identity(replace(endpoint, extra={}))


def test_a_reader_that_stops_early_leaves_nothing_running(serve, ledger):
    server = serve(delay=0.2)
    outcomes = Client(server.endpoint, ledger).complete(calls(1000))
    next(outcomes)
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 2.0


# -- the command -----------------------------------------------------------------------------------


def command(server: Running, source, target, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "experiments.generate", "--model=small", f"--input={source}",
        f"--base_url={server.endpoint.base_url}", f"--output={target}", "--max_new_tokens=5",
        *more,
    ]  # fmt: skip


def test_a_killed_command_goes_on_and_its_rows_keep_their_order(serve, tmp_path):
    server = serve(delay=0.05, faults={"status 500": 0.1, "reset": 0.1})
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(60)]
    rows[7] = {"id": 7, "messages": [{"role": "user", "content": "p7"}]}
    rows[9] = {"id": 9, "prompt": "BAD"}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    asked = command(server, source, target, "--n=2", "--concurrency=4")
    process = subprocess.Popen(asked, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(server.stats()["answered"].values()) < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stderr and "answered" in done.stderr
    out = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in out] == list(range(60))
    assert "too long" in out[9]["error"] and "completions" not in out[9]
    for row in out[:9] + out[10:]:
        texts = [completion["text"] for completion in row["completions"]]
        assert len(set(texts)) == 2 and all(t.startswith(f"<p{row['id']}|") for t in texts)
    # Those in flight at the kill may have been answered to nobody.
    assert sum(server.stats()["answered"].values()) <= 118 + 4


def test_what_an_endpoint_cannot_take_is_refused(serve, tmp_path):
    server = serve()
    source = tmp_path / "in.jsonl"
    for row, more, message in (
        ('{"tokens": [1, 2]}', (), "in.jsonl', line 1: an endpoint takes 'prompt' or 'messages'"),
        ('{"prompt": "a"}', ("--top_k=5",), "--extra"),
        ('{"prompt": "a"}', ("--extra=[]",), "JSON object"),
        ('{"prompt": "a"}', ("--cap=1",), "'input_price'"),
    ):
        source.write_text(row + "\n")
        asked = command(server, source, tmp_path / "out.jsonl", *more)
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
