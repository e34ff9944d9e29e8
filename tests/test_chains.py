"""Chains, through the command that runs them: against a server by rules, and on the mesh."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
import time

import jax
import pytest
from endpoint_server import KEY
from small_models import save_llama
from small_tokenizers import CHATML

from karploop import asking
from karploop import offline_chain as job
from karploop.chains import library
from karploop.chains.definition import Ask, Chain
from karploop.chains.parsing import after, json_object, one_of
from karploop.chains.rendering import SHIPPED, load_templates
from karploop.chains.run import Run, Runner, Settings
from karploop.config import ChainConfig, ChainOptions, MeshConfig, RoleConfig
from karploop.endpoints.calls import Failure, Reply, seed_of
from karploop.errors import RunFailed, UserError
from karploop.mesh import make_mesh
from karploop.reporting.progress import Progress
from karploop.rng import folded
from karploop.roles.bind import Bound
from karploop.roles.remote import RemoteRole
from karploop.sampling.sampler import Completion, Sampler
from karploop.schema import lay

ROOT = pathlib.Path(__file__).parent.parent
QUIET = Progress(quiet=True)
ROWS = [{"id": i, "prompt": f"request {i}"} for i in range(5)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run(folder, server, chain: str, **overrides: str) -> list[dict]:
    """The rows that come out."""
    given = {"chain": chain, "roles.policy.base_url": server.endpoint.base_url}
    given |= {"roles.policy.model": "small", "roles.policy.attempts": "3"} | overrides
    config = lay(ChainConfig(), {}, given)
    out = folder / f"{chain}.jsonl"
    job.run_file(config, str(folder / "in.jsonl"), str(out), QUIET, folder / "replies.sqlite")
    return [json.loads(line) for line in out.read_text().splitlines()]


def said(row: dict) -> list[tuple[str, str]]:
    return [(step["step"], step["role"]) for step in row["steps"]]


def write(folder, rows) -> None:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_plain_answer_keeps_rows_and_order(folder, serve):
    rows = run(folder, serve(), "answer")
    assert [{"id": r["id"], "prompt": r["prompt"]} for r in rows] == ROWS
    for row in rows:
        assert row["output"].startswith(f"<{row['prompt']}|")
        (step,) = row["steps"]
        assert step["prompt"] == row["prompt"] and step["text"] == row["output"]


def test_questions_and_answers_come_from_topics(folder, serve):
    write(folder, [{"topic": "tides"}])
    server = serve(rules=[["Topic: tides", "Why two a day?"], ["Why two a day?", "The far side."]])
    (row,) = run(folder, server, "question_answer")
    assert row["output"] == {"question": "Why two a day?", "answer": "The far side."}


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_each_pass_criticises_by_one_principle_and_revises(folder, serve, passes):
    rules = [["Write the reply anew", "revised"], ["Critique:", "too long"]]
    principles = folder / "mine.txt"
    principles.write_text("# mine\n" + "".join(f"Principle number {i}.\n" for i in range(6)))
    rows = run(
        folder, serve(rules=rules), "critique_revise",
        **{"options.passes": str(passes), "options.constitution": str(principles)},
    )  # fmt: skip
    drawn = []
    for row in rows:
        steps = [("output", "policy")] + [("critique", "critic"), ("output", "policy")] * passes
        assert said(row) == steps
        assert (row["output"] == "revised") == bool(passes)
        for critique, revision in zip(row["steps"][1::2], row["steps"][2::2], strict=True):
            (line,) = (x for x in critique["prompt"].splitlines() if x.startswith("Principle:"))
            assert line in revision["prompt"] and "Critique: too long" in revision["prompt"]
            drawn.append(line)
    assert len(set(drawn)) > 1 or not passes, "rows and passes draw their own"


@pytest.mark.parametrize("hidden", [False, True])
def test_a_debate_argues_both_ways_before_the_judge(folder, serve, hidden):
    rules = [
        ["Write one word: RIGHT", "It is WRONG"],
        ["argue for the", "FOR ARGUMENT"],
        ["argue against the", "AGAINST ARGUMENT"],
        ["is right. Before", "FOR CLAIM"],
        ["is wrong. Before", "AGAINST CLAIM"],
    ]
    options = {"options.turns": "2", "options.precommit": "true", "options.hidden": str(hidden)}
    rows = run(folder, serve(rules=rules), "debate", **options)
    for row in rows:
        assert row["output"]["upheld"] is False
        names = [name for name, _ in said(row)]
        assert names == ["answer", "claim_for", "claim_against", *["argument"] * 4, "upheld"]
        first_for, first_against, second_for, _ = row["steps"][3:7]
        assert "AGAINST CLAIM" in first_for["prompt"], "claims are known to both"
        assert "ARGUMENT" not in first_for["prompt"].replace("Argument:", "")
        assert ("FOR ARGUMENT" in first_against["prompt"]) == (not hidden)
        assert "FOR ARGUMENT" in second_for["prompt"], "one's own is always known"
        judged = row["steps"][-1]["prompt"]
        assert judged.count("AGAINST ARGUMENT") == 2 and judged.count("FOR CLAIM") == 1
    plain = run(folder, serve(rules=rules[:3]), "debate")
    assert [name for name, _ in said(plain[0])] == ["answer", *["argument"] * 2, "upheld"]


def test_drafts_go_on_until_one_passes(folder, serve):
    rules = [
        ["PASS or FAIL.\n\nReview", "no rule"],
        ["A reviewer found", "second"],
        ["Reply: second", "Good now.\nPASS"],
        ["Reply: <", "Too thin. It should not PASS.\nFAIL"],
    ]
    rows = run(folder, serve(rules=rules[1:]), "draft_judge_revise")
    for row in rows:
        assert row["output"] == "second"
        assert [name for name, _ in said(row)] == ["draft", "review"] * 2
    never = run(folder, serve(rules=[["PASS or FAIL", "FAIL"]]), "draft_judge_revise",
                **{"options.attempts": "2"})  # fmt: skip
    assert all(row["output"] is None and len(row["steps"]) == 4 for row in never)


def test_what_is_extracted_is_validated_and_repaired(folder, serve):
    rules = [
        ["not valid: 'place' is missing", 'Here: {"name": "Ada", "place": "London"}'],
        ["request 0", "no object"],
        ["JSON:", '{"name": "Ada"}'],
    ]
    rows = run(folder, serve(rules=rules), "extract_validate_repair",
               **{"options.fields": "name, place"})  # fmt: skip
    assert rows[0]["output"] is None and len(rows[0]["steps"]) == 3
    for row in rows[1:]:
        assert row["output"] == {"name": "Ada", "place": "London"} and len(row["steps"]) == 2


@pytest.mark.parametrize(
    "verdict, steps, output",
    [("SAFE", 2, "<"), ("Rewrite.", 3, "mild"), ("REFUSE", 3, "sorry"), ("hm", 3, "sorry")],
)
def test_a_reply_is_sent_rewritten_or_refused(folder, serve, verdict, steps, output):
    rules = [["Verdict:", verdict], ["leave out what could", "mild"], ["Decline", "sorry"]]
    for row in run(folder, serve(rules=rules), "safe_reply"):
        assert len(row["steps"]) == steps and row["output"].startswith(output)


def test_a_row_that_fails_keeps_its_reason_and_its_steps(folder, serve):
    write(folder, [{"prompt": "fine"}, {"prompt": "BAD"}, {"prompt": "fine too"}])
    rows = run(folder, serve(rules=[["Critique:", "x"]]), "critique_revise")
    assert ["output" in row for row in rows] == [True, False, True]
    assert "step 'output'" in rows[1]["error"] and "too long" in rows[1]["error"]
    assert rows[1]["steps"][0]["text"] is None


def test_roles_have_models_of_their_own(folder, serve):
    judge = serve(rules=[["PASS or FAIL", "PASS"]])
    other = {"roles.judge.base_url": judge.endpoint.base_url, "roles.judge.model": "small"}
    policy = serve()
    rows = run(folder, policy, "draft_judge_revise", **other)
    assert all(row["output"].startswith("<request") for row in rows)
    assert sum(judge.stats()["answered"].values()) == len(ROWS)
    assert sum(policy.stats()["answered"].values()) == len(ROWS)


def test_a_conversation_is_asked_as_it_is_and_quoted_as_text(folder, serve):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    write(folder, [{"messages": turns}, {"messages": turns[:1]}])
    server = serve(rules=[["Critique:", "x"], ["Write the reply anew", "y"]])
    long, short = run(folder, server, "critique_revise")
    assert long["steps"][0]["prompt"] == turns and long["steps"][0]["text"].startswith("<Why?|")
    assert "Request: User: Hi\n\nAssistant: Hello\n\nUser: Why?" in long["steps"][1]["prompt"]
    assert "Request: Hi\n" in short["steps"][1]["prompt"]


def test_an_interrupted_chain_goes_on_and_asks_for_nothing_twice(folder, serve):
    """The server dies between two steps and comes back at the same address."""
    write(folder, [{"id": i, "prompt": f"p{i}"} for i in range(40)])
    server = serve(faults={"status 500": 0.2}, delay=0.01)
    few = {"rows": "10", "options.passes": "2", "roles.policy.attempts": "12"}
    stopper = threading.Thread(target=_stop_after, args=(server, 60))
    stopper.start()
    with pytest.raises(RunFailed, match="does not answer"):
        run(folder, server, "critique_revise", **few)
    stopper.join()
    assert not (folder / "critique_revise.jsonl").exists()
    before = server.seen
    port = int(server.address.rpartition(":")[2])
    again = serve(port=port, faults={"status 500": 0.2})
    rows = run(folder, again, "critique_revise", **few)
    assert [row["id"] for row in rows] == list(range(40))
    assert all(row["output"].startswith("<") and len(row["steps"]) == 5 for row in rows)
    # Those in flight when the server died are asked for again.
    assert 200 <= before + sum(again.stats()["answered"].values()) <= 200 + 16


def _stop_after(server, count: int) -> None:
    while (seen := sum(server.stats()["answered"].values())) < count:
        time.sleep(0.02)
    server.seen = seen
    server.stop()


# -- on the mesh -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "m", CHATML, max_length=512)


def command(folder, model, *more: str) -> subprocess.CompletedProcess:
    asked = [
        sys.executable, "-m", "experiments.chain", "--config=configs/chain.py:critique_revise",
        f"--config.roles.policy.path={model}", f"--input={folder / 'in.jsonl'}",
        f"--output={folder / 'out.jsonl'}", "--config.max_new_tokens=4", *more,
    ]  # fmt: skip
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)


def test_the_command_on_the_mesh_cuts_rows_as_it_likes(folder, model):
    """The result does not depend on how many rows go together, or how many are on the device."""
    done = command(folder, model, "--config.options.constitution=constitution.txt")
    assert done.returncode == 0, done.stderr
    first = (folder / "out.jsonl").read_text()
    config = lay(
        ChainConfig(),
        {"chain": "critique_revise", "rows": 2, "batch": 16, "max_new_tokens": 4},
        {"roles.policy.path": str(model)},
    )
    out = folder / "again.jsonl"
    job.run_file(config, str(folder / "in.jsonl"), str(out), QUIET)
    assert out.read_text() == first
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["id"] for row in rows] == list(range(5))
    assert len({row["output"] for row in rows}) > 1


def test_rows_go_through_a_step_together(folder, model, monkeypatch):
    """A hundred and sixty rows, 40 on the device at a time: four calls a step, and no more."""
    write(folder, [{"prompt": f"{i}"} for i in range(160)])
    calls, complete = [], Sampler.complete

    def counted(self, params, prompts, *args, **kwargs):
        calls.append(len(prompts))
        return complete(self, params, prompts, *args, **kwargs)

    monkeypatch.setattr(Sampler, "complete", counted)
    settings = {"chain": "safe_reply", "rows": 160, "batch": 40, "max_new_tokens": 1}
    config = lay(ChainConfig(), settings, {"roles.policy.path": str(model)})
    job.run_file(config, str(folder / "in.jsonl"), str(folder / "o.jsonl"), QUIET)
    assert len(calls) == 3 * 4 and sum(calls) == 480


def test_a_role_on_the_mesh_draws_by_the_steps_seed_and_the_rows_id(tmp_path, model, monkeypatch):
    drawn = []

    def noted(self, params, prompts, ids, key, **_):
        drawn.extend((*jax.random.key_data(key).tolist(), i) for i in ids)
        return [[Completion("a", [1], [0.0], 0.0, True)]] * len(prompts)

    monkeypatch.setattr(Sampler, "complete", noted)
    bound = Bound(["policy"], {"policy": RoleConfig(path=str(model))}, tmp_path / "r", "j")
    role = bound.load(make_mesh(MeshConfig()), 8)["policy"]
    for seed in ((0, 1), (0, 2), (1, 1)):
        role.complete(["same"] * 20, range(20), asking.How(seed=seed, max_new_tokens=4))
    assert len(set(drawn)) == len(drawn) == 60


def test_roles_bound_to_one_model_share_its_buffers(folder, model, monkeypatch):
    made = {}
    monkeypatch.setattr(Runner, "__init__", lambda self, c, roles, s, t: made.update(roles))
    monkeypatch.setattr(Runner, "run", lambda self, runs: sys.exit("far enough"))
    overrides = {"chain": "debate", "roles.policy.path": str(model)}
    overrides |= {"roles.judge.path": str(model), "roles.judge.chat": "no"}
    config = lay(ChainConfig(), {}, overrides)
    with pytest.raises(SystemExit):
        job.run_file(config, str(folder / "in.jsonl"), str(folder / "o.jsonl"), QUIET)
    assert made["debater"] is made["policy"]
    assert made["judge"] is not made["policy"], "asked without the template"
    assert made["judge"].params is made["policy"].params


def test_a_prompt_longer_than_the_context_is_an_error_of_its_row(folder, model):
    write(folder, [{"prompt": "a"}, {"prompt": "a b " * 600}])
    config = lay(ChainConfig(), {"max_new_tokens": 4}, {"roles.policy.path": str(model)})
    job.run_file(config, str(folder / "in.jsonl"), str(folder / "o.jsonl"), QUIET)
    good, bad = (json.loads(line) for line in (folder / "o.jsonl").read_text().splitlines())
    assert "output" in good and "context has room for" in bad["error"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"chain": "critic_revise"}, "did you mean 'critique_revise'?"),
        ({"chain": "nowhere:CHAIN"}, "No module named 'nowhere'"),
        ({"chain": "json:loads"}, "is no chain"),
        ({"roles.jugde.path": "x"}, "'config.roles.jugde' is asked by no step"),
        ({"roles.policy.base_url": "http://localhost/v1"}, "either 'path'"),
        ({"chain": "critique_revise", "options.constitution": "no.txt"}, "no file 'no.txt'"),
        ({"chain": "extract_validate_repair", "options.fields": " , "}, "names no field"),
        ({"options.passes": "-1"}, "'config.options.passes' must be at least 0"),
        ({"option.passes": "1"}, "did you mean 'options'?"),
        ({"roles.policy": "x"}, "is a group of keys"),
        ({"roles.policy.pth": "x"}, "did you mean 'path'?"),
    ],
)
def test_mistakes_are_named(folder, model, overrides, message):
    if overrides.get("chain") == "json:loads":
        overrides = {"chain": "karploop.errors:__name__"}
    given = {"roles.policy.path": str(model)} | overrides
    with pytest.raises(UserError) as caught:
        config = lay(ChainConfig(), {}, given)
        job.run_file(config, str(folder / "in.jsonl"), str(folder / "o.jsonl"), QUIET)
    assert message in str(caught.value)


def test_the_command_refuses_with_code_2(folder, model):
    for more, message in (
        (("--config.roles.policy.path=nowhere",), "nowhere"),
        (("--config.chain=",), "no chain ''"),
    ):
        done = command(folder, model, *more)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


# -- parts -----------------------------------------------------------------------------------------


class Echo:
    """A role that answers with what it is asked."""

    def complete(self, prompts, ids, how):
        return [asking.Said(prompt) for prompt in prompts]


@pytest.mark.parametrize("chain", ["critique_revise", "debate", "draft_judge_revise"])
def test_no_two_calls_of_a_chain_share_their_noise(chain):
    """Each row, step and turn draws its own, also where the same thing is asked once more."""

    def drawn(seed: int) -> list[tuple[int, ...]]:
        words = []

        class Noting:
            def complete(self, prompts, ids, how):
                words.extend((*how.seed, i) for i in ids)
                return [asking.Said("FAIL") for _ in prompts]

        made = library.CHAINS[chain](ChainOptions(passes=3, turns=3, attempts=3, precommit=True))
        templates = load_templates(ask.template for ask in made.asks() if ask.template)
        rows = [Run(i, "same", {"prompt": "same"}) for i in range(4)]
        roles = {ask.role: Noting() for ask in made.asks()}
        Runner(made, roles, Settings(seed=seed), templates).run(rows)
        return words

    found = drawn(0) + drawn(1)
    assert len(found) >= 2 * 4 * 6
    assert len(set(found)) == len({seed_of(*words) for words in found}) == len(found)
    on_device = {tuple(jax.random.key_data(folded(words)).tolist()) for words in found}
    assert len(on_device) == len(found)


def test_a_role_behind_an_address_asks_at_once_and_keeps_every_answers_place():
    """Whatever order answers come in, and whichever fails: its row says so, the others stay."""
    asked = []

    class Client:
        def complete(self, calls):
            asked.append(calls)
            for place in (3, 0, 4, 2, 1):
                prompt = calls[place].prompt
                reply = Reply(f"to {prompt}", True, 1, 1, 0.0, 0.0, 1)
                yield place, Failure("lost") if place == 2 else reply

    role = RemoteRole(Client(), chat=False)
    prompts = [f"p{i}" for i in range(5)]
    said = role.complete(prompts, range(5), asking.How(seed=(0,), max_new_tokens=4))
    assert [len(calls) for calls in asked] == [5]
    assert len({call.seed for call in asked[0]}) == 5
    assert [one.text for one in said] == ["to p0", "to p1", None, "to p3", "to p4"]
    assert [one.error for one in said] == ["", "", "lost", "", ""]


def test_an_unreadable_judge_upholds_nothing_and_lets_nothing_pass():
    """What names both verdicts, or neither, is no verdict: null, and no coin is thrown."""

    class Unsure(Echo):
        def complete(self, prompts, ids, how):
            texts = ["RIGHT or WRONG, PASS or FAIL", "", "hm", "rightly passing"]
            return [asking.Said(texts[i]) for i in ids]

    for chain, output in (("debate", None), ("draft_judge_revise", None)):
        made = library.CHAINS[chain](ChainOptions())
        templates = load_templates(ask.template for ask in made.asks() if ask.template)
        rows = [Run(i, "q", {"prompt": "q"}) for i in range(4)]
        roles = {ask.role: Echo() for ask in made.asks()} | {"judge": Unsure()}
        Runner(made, roles, Settings(), templates).run(rows)
        found = [row.variables["output"] for row in rows]
        assert [f["upheld"] if chain == "debate" else f for f in found] == [output] * 4
        assert not any(row.error for row in rows)


def test_templates_render_data_and_never_run_it(tmp_path):
    """What a model or a row says is not a template, and a template reaches nothing of Python."""
    path = tmp_path / "t.jinja"
    path.write_text("{{ prompt }}")
    chain = Chain("c", (Ask("output", str(path)),))

    def output(text: str, prompt: str = "") -> str:
        path.write_text(text)
        runs = [Run(0, "", {"prompt": prompt})]
        Runner(chain, {"policy": Echo()}, Settings(), load_templates([str(path)])).run(runs)
        return runs[0].variables["output"]

    assert output("{{ prompt }}", "{{ 7 * 7 }}") == "{{ 7 * 7 }}"
    with pytest.raises(UserError, match="unsafe"):
        output("{{ prompt.__class__.__mro__ }}")
    with pytest.raises(UserError, match="'missing' is undefined"):
        output("{{ missing }}")
    with pytest.raises(UserError, match="line 2"):
        output("a\n{% if %}")


def test_every_shipped_template_is_used_and_there():
    chains = [make(ChainOptions(precommit=True)) for make in library.CHAINS.values()]
    used = {ask.template for chain in chains for ask in chain.asks() if ask.template}
    assert {path.name for path in SHIPPED.glob("*.jinja")} == used
    load_templates(used)


@pytest.mark.parametrize(
    "text, value",
    [
        ("PASS", True),
        ("It does not pass.\nfail", False),
        ("I would not say fail, nor pass", None),
        ("passing, failed", None),
        ("", None),
        ("FAIL\nPASS\nso FAIL it is", False),
    ],
)
def test_a_verdict_is_read_or_missing(text, value):
    assert one_of(pass_=True, fail=False)(text) is value


def test_objects_and_marked_lines_are_found():
    assert json_object('Sure: {"a": {"b": 1}} and {"c": 2}') == {"a": {"b": 1}}
    assert json_object("{not json} {1}") is None
    assert after("Answer:")("Answer: 3\nno, Answer: 4\nbye") == "4"
    assert after("Answer:")("Answer:") is None


def test_keys_do_not_reach_the_output(folder, serve):
    rows = run(folder, serve(), "answer")
    assert KEY not in json.dumps(rows)
    assert KEY.encode() not in (folder / "replies.sqlite").read_bytes()
