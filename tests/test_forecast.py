"""What jobs say before they ask endpoints for anything, and that it comes true."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest

pytest.importorskip("openai")


from karploop import offline_chain, offline_judge, offline_remote  # noqa: E402
from karploop.chains import library  # noqa: E402
from karploop.chains.definition import Ask, Branch, Chain, Let, Repeat  # noqa: E402
from karploop.config import ChainConfig, JudgingConfig  # noqa: E402
from karploop.endpoints.calls import Endpoint  # noqa: E402
from karploop.endpoints.forecast import Forecast, Load  # noqa: E402
from karploop.errors import RunFailed  # noqa: E402
from karploop.jobs import GenerateJob  # noqa: E402
from karploop.reporting.progress import Progress  # noqa: E402
from karploop.schema import lay  # noqa: E402

ROWS = [{"id": i, "prompt": f"request {i}", "topic": "tides"} for i in range(5)]
LENGTH = 20  # most tokens of a reply


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def there(server, role: str = "policy", **more) -> dict[str, str]:
    """A role behind a server, as a config has it."""
    given = {"base_url": server.endpoint.base_url, "model": "small"} | more
    return {f"roles.{role}.{key}": str(value) for key, value in given.items()}


def chain(folder, given, name="out", source="in.jsonl") -> list[str]:
    """The lines that a chain says before its first call."""
    stream = io.StringIO()
    config = lay(ChainConfig(), {"max_new_tokens": LENGTH}, given)
    target = str(folder / f"{name}.jsonl")
    try:
        offline_chain.run_file(
            config, str(folder / source), target, Progress(stream), folder / "replies.sqlite"
        )
    except RunFailed as error:
        stream.write(f"{error}\n")
    return stream.getvalue().partition(f"{config.chain}  started")[0].splitlines()


def judge(folder, given, rows, name="judged") -> list[str]:
    stream, source = io.StringIO(), folder / f"{name}-in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = lay(JudgingConfig(), {}, given)
    target = str(folder / f"{name}.jsonl")
    offline_judge.run_file(config, str(source), target, Progress(stream))
    return stream.getvalue().partition(f"{config.judge.name}  started")[0].splitlines()


def numbers(line: str) -> list[tuple[int, int]]:
    """Least and most of calls, tokens in, tokens out."""
    found = re.search(
        r"(?:([\d,]+) to |(up to ))?([\d,]+) calls, "
        r"(?:about ([\d,]+) to |(up to )about |about )([\d,]+) tokens in, at most ([\d,]+) out",
        line,
    )
    calls, none, most, tokens, nothing, most_in, out = (
        int(part.replace(",", "")) if part and part[0].isdigit() else part
        for part in found.groups()
    )
    ends = ((calls, none, most), (tokens, nothing, most_in))
    least = [0 if zero else high if low is None else low for low, zero, high in ends]
    return [(least[0], most), (least[1], most_in), (0, out)]


GOOD, BAD = "PASS safe right {}", "FAIL rewrite wrong"
CALLS = {
    "answer": (5, 5), "teacher": (5, 5), "question_answer": (10, 10), "reasoning": (5, 5),
    "critique_revise": (15, 15), "debate": (20, 20), "draft_judge_revise": (10, 30),
    "extract_validate_repair": (5, 15), "safe_reply": (10, 15),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, says",
    [(name, GOOD) for name in library.CHAINS]
    + [(name, BAD) for name in library.CHAINS if CALLS[name][0] < CALLS[name][1]],
)
def test_a_chain_asks_as_often_as_it_has_said(folder, serve, name, says):
    """Of every shipped chain, whatever way its rows go; and what is answered is not counted."""
    server, calls = serve(rules=[["", says]]), CALLS[name]
    given = {"chain": name} | there(server)
    (line,) = chain(folder, given)
    assert f"{'teacher' if name == 'teacher' else 'policy'}, 'small': " in line
    found, tokens, out = numbers(line)
    assert found == calls and out == (0, calls[1] * LENGTH) and tokens[0] <= tokens[1]
    asked = len(server.stats()["times"])
    assert calls[0] <= asked <= calls[1]
    (again,) = chain(folder, given, "again")
    assert numbers(again) == [(0, 0), (0, 0), (0, 0)]
    assert f"({asked} more are answered already)" in again
    assert len(server.stats()["times"]) == asked


def test_prompts_are_counted_with_what_they_will_quote(folder, serve):
    """From empty replies to the longest: of those a later prompt has all the characters."""
    mine = Chain("mine", (Ask("draft"), Ask("output", str(folder / "polish.jinja"))))
    (folder / "polish.jinja").write_text("{{ draft }}, {{ prompt }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.CHAINS, "mine", lambda options: mine)
        (line,) = chain(folder, {"chain": "mine"} | there(serve()))
    least = 5 * (len("request 0") + len(", request 0"))
    _, tokens, _ = numbers(line)
    assert tokens == (least // 4, (least + 5 * LENGTH * 4) // 4)


def test_a_way_that_is_known_is_followed_and_of_others_the_bounds_are_taken(folder, serve):
    """By a field of the row, or by what was answered before; each endpoint by itself."""
    sides = Chain(
        "sides",
        (
            Branch("side", {"long": (Ask("a"), Ask("b"), Ask("output"))}, (Ask("output"),)),
            Ask("verdict", role="judge"),
            Branch(
                "verdict",
                {"yes": (Ask("c"), Ask("d", role="judge")), "no": (Ask("e"), Ask("f"), Ask("g"))},
            ),
            Repeat((Ask("h"),), 4, until=lambda v: v["h"] == "enough"),
            Repeat((Ask("i"),), 2),
        ),
    )
    rows = [{"prompt": f"{i}", "side": "long" if i else "short"} for i in range(2)]
    (folder / "sides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy, judging = serve(), serve(rules=[["", "yes"]])
    given = {"chain": "sides"} | there(policy) | there(judging, "judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.CHAINS, "sides", lambda options: sides)
        lines = chain(folder, given, source="sides.jsonl")
        by_role = {line.split(",")[0]: numbers(line)[0] for line in lines}
        # Each of the two rows: 1 or 3 known, then 0, 2 or 1 … 3, then 1 … 4, and 2.
        assert by_role == {"judge": (2, 4), "policy": (4 + 2 * 3, 4 + 2 * 9)}
        assert len(policy.stats()["times"]) == 4 + 2 * (1 + 4 + 2)
        # The first row is answered, the second is another: its judge may say anything.
        rows[1]["prompt"] = "other"
        (folder / "sides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = chain(folder, given, "second", source="sides.jsonl")
        by_role = {line.split(",")[0]: (numbers(line)[0], line) for line in lines}
    assert by_role["judge"][0] == (1, 2) and "(2 more are answered" in by_role["judge"][1]
    assert by_role["policy"][0] == (3 + 3, 3 + 9) and "(8 more are" in by_role["policy"][1]


def test_roles_of_one_endpoint_are_one_line_and_those_on_the_mesh_none(folder, serve):
    server = serve()
    shared = there(server) | there(server, "critic")
    (line,) = chain(folder, {"chain": "critique_revise"} | shared)
    assert line.startswith("critic and policy, 'small': 15 calls")


def test_a_step_that_a_made_up_reply_is_too_much_for_holds_up_nobody(folder, serve):
    picky = Chain("picky", (Ask("draft"), Let("output", lambda v: v["draft"][0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.CHAINS, "picky", lambda options: picky)
        (line,) = chain(folder, {"chain": "picky"} | there(serve()))
    assert line.startswith("what policy will be asked is not known before (string index")
    assert len((folder / "out.jsonl").read_text().splitlines()) == 5


# -- money -----------------------------------------------------------------------------------------


def test_dollars_and_caps():
    """The prompts alone may be too much, or the replies, or neither; what is spent counts."""
    endpoint = Endpoint("m", "http://x/v1", input_price=100.0, output_price=1000.0, cap=20.0)
    least, most = Load(10, 400_000, 1000), Load(20, 800_000, 2000)

    def said(spent=0.0, cap=20.0):
        return Forecast(Endpoint(**vars(endpoint) | {"cap": cap}), least, most, 0, spent)

    assert said().dollars == (10.0, 22.0)
    assert str(said()).endswith(
        "10 to 20 calls, about 100,000 to 200,000 tokens in, at most 2,000 out, "
        "about $10.00 to $22.00"
    )
    assert "it may cost $22.00, and the cap of $20.00 may end it before" in said().warning
    assert said(cap=22.0).warning == said(cap=0.0).warning == ""
    assert "($1.00 of it are spent)" in said(spent=1.0, cap=22.5).warning
    short = said(spent=1.0, cap=10.5).warning
    assert short.startswith("warning: the cap of $10.50 ($1.00 of it are spent) is less than the")
    assert "$10.00 that the prompts alone cost" in short
    loop = Forecast(endpoint, Load(), most)
    assert str(loop).startswith("up to 20 calls, up to about 200,000 tokens in, at most 2,000 out")
    assert str(loop).endswith("about $22.00 at most")


def test_a_job_that_its_cap_may_end_says_so_before(folder, serve):
    server = serve()
    priced = {"input_price": 1000.0, "output_price": 1000.0}
    lines = chain(folder, {"chain": "critique_revise"} | there(server, cap=5.0, **priced))
    assert len(lines) == 1 and "about $" in lines[0]
    low, high = map(float, re.search(r"\$([\d.]+) to \$([\d.]+)$", lines[0]).groups())
    spent = 15 * (10 + 5) * 1000 / 1e6  # as the server counts
    assert high < 5.0 and low < high and spent < high
    lines = chain(
        folder, {"chain": "critique_revise", "seed": "1"} | there(server, cap=0.6, **priced), "b"
    )
    assert len(lines) > 1 and lines[1].startswith("critic and policy: warning: ")
    assert "may end it before" in lines[1] or "prompts alone" in lines[1]


def test_completions_of_a_file_are_warned_of_too(folder, serve):
    stream, target = io.StringIO(), str(folder / "out.jsonl")
    endpoint = replace(serve().endpoint, input_price=1.0, output_price=1e5, cap=2.0)
    job = GenerateJob("small", max_new_tokens=LENGTH)
    source, ledger = str(folder / "in.jsonl"), folder / "replies.sqlite"
    with pytest.raises(RunFailed, match="cap"):
        offline_remote.generate(job, endpoint, source, target, Progress(stream), ledger)
    assert "5 calls" in stream.getvalue() and "$10.00 at most\n" in stream.getvalue()
    assert "warning: it may cost $10.00, and the cap of $2.00" in stream.getvalue()


# -- judges ----------------------------------------------------------------------------------------

REPLIES = [{"prompt": f"q{i}", "completion": "a", "completions": ["a", "b"]} for i in range(4)]


@pytest.mark.parametrize(
    "given, calls",
    [
        ({"judge.name": "rubric", "judge.rationale": "true"}, 4 * 3),
        ({"judge.name": "rubric"}, 4 * 3 * 5),
        ({"judge.name": "pairwise"}, 4 * 2 * 2),
        ({"judge.name": "constitution", "judge.principles": "2"}, 4 * 2 * 2 * 2),
        ({"judge.name": "debate", "judge.turns": "2"}, 4 * (2 * 2 + 2 * 2)),
        ({"judge.name": "ensemble", "judge.members": "rubric, pairwise"}, 4 * (2 * 3 * 5 + 2 * 2)),
    ],
)
def test_a_judge_asks_as_often_as_it_has_said(folder, serve, given, calls):
    """By probabilities a call for each option; one more finds out whether there are any."""
    server = serve()
    rows = [row | {"prompt": f"{folder} {row['prompt']}"} for row in REPLIES]
    (line,) = judge(folder, given | there(server, "judge"), rows)
    found, tokens, _ = numbers(line)
    assert found == (calls, calls)
    probes = 0 if "judge.rationale" in given else 1
    assert len(server.stats()["times"]) == calls + probes


def test_a_tournament_has_bounds(folder, serve):
    """Where no verdict can be read, both of a pair drop out."""
    server = serve(rules=[["Better", "Better: A"]])
    rows = [{"prompt": f"{folder}", "completions": list("abcd")}]
    given = {"judge.name": "pairwise", "judge.ranking": "tournament", "judge.rationale": "true"}
    (line,) = judge(folder, given | there(server, "judge"), rows)
    assert numbers(line)[0] == (2 * 2, 3 * 2)
    assert len(server.stats()["times"]) == 6


def test_a_judges_tokens_are_those_of_its_prompts(folder, serve):
    """About: four characters each. And a person beside it costs nothing."""
    server = serve()
    review = folder / "review.jsonl"
    review.write_text('{"prompt": "q0", "completion": "a", "score": 1}\n')
    given = {"judge.name": "ensemble", "judge.members": "rubric, person"}
    given |= {"judge.review": str(review), "judge.rationale": "true"}
    (line,) = judge(folder, given | there(server, "judge"), [{"prompt": "q0", "completion": "a"}])
    asked = server.stats()["answered"]
    characters = sum(len(text[1 : text.rindex("|")]) for text in asked)
    assert len(asked) == 3 and numbers(line)[1] == (characters // 4,) * 2


def test_a_cap_is_of_one_job(folder, serve):
    """What another file's verdicts have cost is not in it."""
    server = serve(rules=[["Rating", "Rating: 4"]])
    priced = there(server, "judge", input_price=1000.0, output_price=1.0, cap=1.5)
    for name in ("one", "two"):
        rows = [{"prompt": f"{folder} {name} {i}", "completion": "a"} for i in range(2)]
        given = {"judge.name": "rubric", "judge.rationale": "true"}
        (line,) = judge(folder, given | priced, rows, name)[:1]
        assert "spent" not in line
        scores = [json.loads(row)["score"] for row in (folder / f"{name}.jsonl").open()]
        assert scores == [0.75, 0.75]
