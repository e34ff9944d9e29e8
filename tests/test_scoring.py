"""How probable a text is, by a server that echoes it with log-probabilities, and by some that do
not."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("openai")

from endpoint_server import tokens_of, worth_of  # noqa: E402

from karploop.config import JudgingConfig  # noqa: E402
from karploop.endpoints.calls import Call, Failure  # noqa: E402
from karploop.endpoints.client import Client  # noqa: E402
from karploop.endpoints.echo import Unscored, read_echo  # noqa: E402
from karploop.endpoints.ledger import Ledger  # noqa: E402
from karploop.errors import RunFailed, UserError  # noqa: E402
from karploop.offline_judge import run_file  # noqa: E402
from karploop.reporting.progress import Progress  # noqa: E402
from karploop.roles.remote import RemoteRole  # noqa: E402
from karploop.schema import lay  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
QUIET = Progress(quiet=True)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "replies.sqlite", "job")


def expected(prompt: str, continuation: str) -> list[float]:
    """What the server says of a continuation's tokens."""
    tokens = tokens_of(prompt + continuation)
    first = len(tokens_of(prompt))
    assert b"".join(tokens[first:]).decode() == continuation
    return [worth_of(tokens, i) for i in range(first, len(tokens))]


# -- whose a token is ------------------------------------------------------------------------------


def read(pieces, prompt, continuation, written=1, logprobs=None):
    if logprobs is None:
        logprobs = [None, *(-float(i) for i in range(1, len(pieces)))]
    choice = {"logprobs": {"tokens": pieces, "token_logprobs": logprobs}}
    return read_echo(choice, written, prompt, continuation)


@pytest.mark.parametrize("written, more", [(1, ["x"]), (None, ["x"]), (1, []), (0, [])])
@pytest.mark.parametrize(
    "pieces, prompt, continuation, first",
    [
        (["The", " sky", " is", " blue", "."], "The sky is", " blue.", 3),
        (["<s>", "The", " sky", " is", " blue"], "The sky is", " blue", 4),
        (["<s>", " The", " sky", " is"], "The sky", " is", 3),  # a space put before the text
        (["<s>", "The", "sky", "is"], "The sky", " is", 3),  # spaces left out
        (["", "a", "b"], "a", "b", 2),  # a start token without a text
        (["[M]", "<sop>", "a", "b"], "a", "b", 3),
        (["a", "a", "a"], "aa", "a", 2),  # the same text again and again
        (["é", "\ufffd", "\ufffd\ufffd", " b"], "é🙂", " b", 3),  # halves of a character
        (["a", " \ufffd", "\ufffd\ufffd", "b"], "a", " 🙂b", 1),
        (["好", "\ufffd", "\ufffd", "好"], "好", "龘好", 1),
        (["a", *["\ufffd"] * 4], "a🙂", "🙂", 3),
    ],
)
def test_a_continuations_tokens_are_those_behind_the_border(
    pieces, prompt, continuation, first, written, more
):
    """Whether the server says how many tokens it has added or not, and adds its end or not."""
    found = read([*pieces, *more], prompt, continuation, written)
    assert found.pieces == pieces[first:]
    assert found.logprobs == [-float(i) for i in range(first, len(pieces))]


@pytest.mark.parametrize(
    "pieces, prompt, continuation, message",
    [
        (["The", " sky", " is", "x"], "The sky ", "is", "the token ' is' is of the prompt and of"),
        (["The", " skyline", "x"], "The sky", "line", "the token ' skyline' is of the prompt"),
        (["The", " skyline", " is", "x"], "The sky", "line is", "' skyline' is of the prompt and"),
        (["The", "sky", "x"], "The ", "sky", "'sky' is of the prompt"),  # with the space left out
        (["a", *["\ufffd"] * 5, "x"], "a🙂", "🙂", "shows no whole"),  # is the third of the first?
        (["a", "", "b", "x"], "a", "b", "shows no whole character"),
        (["x"], "The sky", " is", "do not spell"),  # echo is ignored
        (["The", " sky", "x"], "The sky", " is", "do not spell"),  # cut off
        (["THE", " SKY", " IS", "x"], "The sky", " is", "do not spell"),
        (["token_id:3", "token_id:5", "x"], "The", " sky", "do not spell"),
        (["a", "a", "a", "a", "a", "x"], "aa", "a", "do not spell"),
        (["a", *["\ufffd"] * 3], "a", "🙂", "which tokens of the reply"),  # has it one of its own?
        (["u", "v", "w", "The", " sky", "x"], "The", " sky", "do not spell"),  # what is it doing?
    ],
)
def test_what_cannot_be_told_apart_has_no_numbers(pieces, prompt, continuation, message):
    with pytest.raises(Unscored, match=message):
        read(pieces, prompt, continuation)


def test_a_border_is_found_in_every_cut_of_a_text():
    """Of all prompts and continuations of one text, those cut between tokens and no others."""
    text = "Zoë's 🙂  naïve café, 100% 龘!  done"
    tokens = tokens_of(text)
    pieces = [token.decode(errors="replace") for token in tokens]
    ends = {sum(map(len, tokens[:i])): i for i in range(1, len(tokens))}
    scored = 0
    for cut in range(1, len(text)):
        border = len(text[:cut].encode())
        try:
            found = read([*pieces, "new"], text[:cut], text[cut:])
        except Unscored:
            assert border not in ends
            continue
        scored += 1
        assert found.pieces == pieces[ends[border] :]
    assert scored == sum(1 for end in ends if _is_whole(text.encode()[:end]))


def _is_whole(data: bytes) -> bool:
    return "\ufffd" not in data.decode(errors="replace")


def test_the_first_token_of_a_text_may_have_no_log_probability_and_no_other():
    assert read(["The", " sky", "x"], "", "The sky").logprobs == [None, -1.0]
    start = read(["<s>", "The", " sky", "x"], "", "The sky")
    assert start.pieces == ["<s>", "The", " sky"] and start.logprobs == [None, -1.0, -2.0]
    again = read(["<s>", "The", " The"], "", " The")  # what the server writes is what was sent
    assert again.pieces == ["<s>", "The"]
    for lost in (None, math.nan, "None", True):
        with pytest.raises(Unscored, match="' sky' has no log-probability"):
            read(["The", " sky", "x"], "", "The sky", logprobs=[None, lost, -1.0])
    with pytest.raises(Unscored, match="no log-probabilities of tokens"):
        read_echo({"logprobs": None}, 1, "a", "b")
    with pytest.raises(Unscored, match="no log-probabilities of tokens"):
        read_echo({"logprobs": {"content": [{"token": "a", "logprob": -1.0}]}}, 1, "a", "b")


# -- through the client ----------------------------------------------------------------------------


def test_scores_survive_faults_and_are_asked_for_once(serve, ledger):
    """300 texts, of which a fifth of the attempts fail."""
    faults = {"status 503": 0.05, "reset": 0.05, "torn": 0.05, "garbled": 0.03, "empty": 0.03}
    server = serve(faults=faults)
    endpoint = replace(server.endpoint, attempts=12, concurrency=32, input_price=1.0, cap=1.0)
    calls = [Call.scoring(f"question {i}:", f" answer {i}.") for i in range(300)]
    found = dict(Client(endpoint, ledger).complete(calls))
    for i, call in enumerate(calls):
        assert found[i].logprobs == expected(call.prompt, call.continuation)
        assert "".join(found[i].pieces) == call.continuation
    assert sum(server.stats()["faults"].values()) > 30
    client = Client(endpoint, ledger)
    assert dict(client.complete(calls)) == found and client.usage.from_cache == 300


def test_one_text_cut_at_two_places_is_two_questions(serve, ledger):
    client = Client(serve().endpoint, ledger)
    calls = [Call.scoring("a b", " c d"), Call.scoring("a b c", " d"), Call.scoring("", "a b c d")]
    (long,), (short,), (whole,) = (dict(client.complete([call])).values() for call in calls)
    assert long.pieces == [" c", " d"] and short.pieces == [" d"] and len(whole.pieces) == 4
    assert long.logprobs[1:] == short.logprobs == whole.logprobs[3:]


@pytest.mark.parametrize("echo", ["whole", "start", "bare"])
def test_servers_echo_in_their_own_ways(serve, ledger, echo):
    client = Client(serve(echo=echo).endpoint, ledger)
    client.check_scoring("'x'")
    ((_, found),) = client.complete([Call.scoring("The sky is", " blue today")])
    assert found.logprobs == expected("The sky is", " blue today")


@pytest.mark.parametrize(
    "echo, message",
    [
        ("status 400", "Only no echo is supported"),
        ("status 500", "Only no echo is supported"),  # as llama.cpp's server does
        ("ignored", "do not spell what was sent"),
        ("silent", "no log-probabilities"),
        ("hole", "' blue' has no log-probability"),
    ],
)
def test_an_endpoint_that_cannot_score_is_found_by_one_call(serve, ledger, echo, message):
    server = serve(echo=echo)
    with pytest.raises(UserError) as caught:
        Client(server.endpoint, ledger).check_scoring("'config.roles.judge'")
    said = str(caught.value)
    assert said.startswith("'config.roles.judge' is asked for log-probabilities")
    assert message in said
    assert server.endpoint.base_url in said and "'path'" in said and "'echo'" in said
    assert sum(server.stats()["answered"].values()) <= 1


def test_an_endpoint_that_is_down_is_not_said_to_be_unable(serve, ledger):
    server = serve(faults={"status 503": 1.0})
    with pytest.raises(RunFailed, match="does not answer"):
        Client(server.endpoint, ledger).check_scoring("'x'")
    assert len(server.stats()["times"]) == 3
    with pytest.raises(UserError, match="'x' is asked for .*'/completions'|model 'large' is not"):
        Client(replace(serve().endpoint, model="large"), ledger).check_scoring("'x'")


def test_a_server_is_asked_anew_whether_it_can(serve, ledger):
    """Its answer of yesterday, when it was another one at the same address, says nothing."""
    server = serve()
    Client(server.endpoint, ledger).check_scoring("'x'")
    port = int(server.address.rpartition(":")[2])
    server.stop()
    again = serve(port=port, echo="silent")
    with pytest.raises(UserError, match="no log-probabilities"):
        Client(again.endpoint, ledger).check_scoring("'x'")


# -- as a role -------------------------------------------------------------------------------------


def test_a_role_behind_an_address_scores_options(serve, ledger):
    """Each option by all its tokens, and the whole prompt missing where one of them is."""
    server = serve(worths=[["good", " A", -0.25], ["good", " B", -2.5]])
    role = RemoteRole(Client(server.endpoint, ledger), chat=True)
    good, more, chat = role.score(
        ["good, better:", "or:", ({"role": "user", "content": "Which?"},)], ["A", "B or C"]
    )
    assert good.logprobs[0] == -0.25
    assert good.logprobs[1] == pytest.approx(sum(expected("good, better:", " B or C")))
    assert more.logprobs[0] == pytest.approx(expected("or:", " A")[0])
    spoken = "User: Which?\n\nAssistant:"
    assert chat.logprobs[1] == pytest.approx(sum(expected(spoken, " B or C")))
    assert more.spent.tokens_in == len(tokens_of("or: A")) + len(tokens_of("or: B or C"))
    lost, kept = role.score(["BAD", "fine:"], ["A", "B"])
    assert lost.logprobs is None and "too long" in lost.error and kept.logprobs
    (none,) = role.score([""], ["A"])
    assert none.logprobs is None and "nothing before" in none.error


def judged(server, folder, rows, name, **more) -> list[dict]:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"roles.judge.base_url": server.endpoint.base_url, "roles.judge.model": "small"}
    given |= {"judge.name": name, "roles.judge.input_price": "1e6"} | more
    target = folder / f"{name}.jsonl"
    run_file(lay(JudgingConfig(), {}, given), str(folder / "in.jsonl"), str(target), QUIET)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_judge_behind_an_address_reads_probabilities(serve, tmp_path):
    """A rating is the expectation over what the server says of the numbers, by criterion."""
    shares = {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 5: 0.4}
    worths = [["accurate", f" {level}", math.log(share)] for level, share in shares.items()]
    server = serve(worths=[["Criterion", end, worth] for _, end, worth in worths])
    rows = [{"prompt": f"{tmp_path}", "completion": "b"}, {"prompt": "BAD", "completion": "c"}]
    good, bad = judged(server, tmp_path, rows, "rubric")
    rating = sum(share * (level - 1) / 4 for level, share in shares.items())
    assert good["score"] == pytest.approx(rating)
    assert list(good["criteria"].values()) == [pytest.approx(rating)] * 3
    assert good["dollars"] == pytest.approx(good["tokens_in"]) and good["tokens_in"] > 15
    assert bad["score"] is None and "too long" in bad["reason"]


@pytest.mark.parametrize("name", ["pairwise", "constitution"])
def test_pairs_are_weighed_by_probabilities_in_both_orders(serve, tmp_path, name):
    server = serve(
        worths=[
            ["Reply A: good", " A", -0.1], ["Reply A: good", " B", -2.1],
            ["Reply B: good", " A", -3.0], ["Reply B: good", " B", -2.0],
        ]
    )  # fmt: skip
    (row,) = judged(server, tmp_path, [{"prompt": "q", "completions": ["good", "bad"]}], name)
    assert row["forward"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert row["backward"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert row["winner"] == "first"


def test_a_judge_is_not_asked_where_its_server_cannot_score(serve, tmp_path):
    server, rows = serve(echo="ignored"), [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="'config.roles.judge' is asked for log-probabilities"):
        judged(server, tmp_path, rows, "rubric")
    assert len(server.stats()["times"]) == 1 and not (tmp_path / "rubric.jsonl").exists()
    with pytest.raises(UserError, match="is to be asked as a chat"):
        judged(serve(), tmp_path, rows, "rubric", **{"roles.judge.chat": "yes"})


# -- the command -----------------------------------------------------------------------------------


def score(server, source, *more: str):
    command = [
        sys.executable, "-m", "experiments.score", "--model=small", f"--input={source}",
        f"--base_url={server.endpoint.base_url}", "--output=-", *more,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_scores_rows_and_says_what_it_cannot(serve, tmp_path):
    """Rows keep order and fields; one whose border lies in a token has a reason and no number."""
    source = tmp_path / "in.jsonl"
    rows = [
        {"id": 1, "prompt": "The sky is", "completion": " blue 🙂!"},
        {"id": 2, "prompt": "The sky is ", "completion": "blue"},
        {"id": 3, "text": f"{tmp_path} is it"},
        {"id": 4, "prompt": "BAD", "completion": " one"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = score(serve(), source, "--input_price=1", "--cap=1")
    assert done.returncode == 0, done.stderr
    pair, border, text, bad = map(json.loads, done.stdout.splitlines())
    assert [row["id"] for row in (pair, border, text, bad)] == [1, 2, 3, 4]
    assert pair["logprobs"] == expected("The sky is", " blue 🙂!")
    assert pair["sum"] == pytest.approx(sum(pair["logprobs"]))
    assert "' blue' is of the prompt and of what follows" in border["error"]
    assert "sum" not in border and "a space at the end" in border["error"]
    assert text["logprobs"][0] is None and "".join(text["pieces"]) == rows[2]["text"]
    assert text["sum"] == pytest.approx(sum(text["logprobs"][1:]))
    assert "too long" in bad["error"]
    assert "4 calls" in done.stderr and "2 failed" in done.stderr


def test_the_command_refuses_what_cannot_be_scored(serve, tmp_path):
    source = tmp_path / "in.jsonl"
    for row, server, message in (
        ('{"text": "a b"}', serve(echo="status 500"), "--model is asked for log-probabilities"),
        ('{"messages": [{"role": "user", "content": "a"}], "completion": "b"}', serve(), "line 1"),
        ('{"prompt": "a"}', serve(), "a row has a text 'completion'"),
    ):
        source.write_text(row + "\n")
        done = score(server, source)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_failure_is_not_a_number(serve, ledger):
    server = serve(echo="hole")
    ((_, found),) = Client(server.endpoint, ledger).complete([Call.scoring("a", " b")])
    assert isinstance(found, Failure) and ledger.find(Call.scoring("a", " b").identity(
        server.endpoint
    )) is None  # fmt: skip
