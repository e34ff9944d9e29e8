"""Rows and prompts from files: every shape and every mistake, with its place."""

from __future__ import annotations

import io
import json
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karploop.data.rows import Prompt, read_prompts, read_rows, to_prompt
from karploop.errors import UserError

ROWS = [
    {"prompt": "1+1=", "answer": "2", "id": 7},
    {"prompt": "żółć 👍\u2028", "answer": "x", "id": 8},
]
USER = {"role": "user", "content": "hello"}
BOT = {"role": "assistant", "content": "fox"}


@pytest.fixture
def write(tmp_path):
    """write(name, content): a file of text, bytes or lines of JSON."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_formats_hold_the_same_rows(write, tmp_path, monkeypatch):
    lines = write("a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in (lines, str(lines), write("a.json", json.dumps(ROWS)), tmp_path / "a.parquet"):
        assert read_rows(path) == ROWS
    assert read_rows(write("b.ndjson", b"\xef\xbb\xbf" + lines.read_bytes())) == ROWS
    assert read_rows(write("c.JSONL", lines.read_bytes().replace(b"\n", b"\r\n\r\n"))) == ROWS
    stdin = types.SimpleNamespace(buffer=io.BytesIO(lines.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_rows("-") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt": }\n',
            r"a\.jsonl', line 3: malformed .* column 12",
        ),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', r"a\.jsonl', line 2: \[\"b\"\] is no object"),
        ("a.jsonl", '{"a": 1} {"a": 2}', "line 1: malformed JSON: Extra data"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8 .byte 12: 0xff"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', "line 1: half a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "line 1: (JSON nested too deeply|malformed)"),
        ("a.jsonl", "", r"a\.jsonl': no rows"),
        ("a.jsonl", "\n \n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "", "malformed JSON"),
        ("a.json", '{"prompt": "a"}', "one list of rows"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "malformed .* line 2.* makes a .jsonl file"),
        ("a.json", '[{"prompt": "a"}, 3]', r"a\.json', row 2: 3 is no object"),
        ("a.parquet", "no", "no Parquet file"),
        ("a.csv", "prompt\na", "name it .jsonl, .json or .parquet"),
    ],
)
def test_broken_files(write, name, content, message):
    with pytest.raises(UserError, match=message):
        read_rows(write(name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read prompts from .*missing\.jsonl'"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "folder.json")


def test_empty_parquet(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no rows"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a"}, Prompt(text="a")),
        ({"prompt": "a", "answer": "b", "k": [1]}, Prompt(text="a", answer="b", extra={"k": [1]})),
        ({"prompt": "a", "answer": 72}, Prompt(text="a", answer="72")),
        (
            {"prompt": "a", "answer": None, "messages": None},
            Prompt(text="a", extra={"messages": None}),
        ),
        ({"messages": [USER]}, Prompt(messages=(USER,))),
        ({"messages": [USER, BOT]}, Prompt(messages=(USER,), answer="fox")),
        ({"messages": [USER, BOT, USER]}, Prompt(messages=(USER, BOT, USER))),
        ({"messages": [USER, BOT], "answer": "2"}, Prompt(messages=(USER,), answer="2")),
        ({"prompt": [USER], "answer": "2"}, Prompt(messages=(USER,), answer="2")),
        ({"tokens": [3, 0]}, Prompt(tokens=(3, 0))),
        ({"prompt": "a", "tokens": [1]}, Prompt(text="a", extra={"tokens": [1]})),
        ({"prompt": None, "tokens": [1]}, Prompt(tokens=(1,), extra={"prompt": None})),
    ],
)
def test_shapes(row, prompt):
    assert to_prompt(row) == prompt


def test_messages_of_parquet_have_no_nulls(tmp_path):
    rows = [{"messages": [USER | {"name": None}, BOT]}, {"messages": [USER | {"name": "Ann"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == [
        Prompt(messages=(USER,), answer="fox"),
        Prompt(messages=(USER | {"name": "Ann"},)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "id": 1}, r"keys: 'question', 'id'\. Shapes .*\"messages\""),
        ({}, "keys: none"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' must be text or a chat, not 3"),
        ({"prompt": "a", "answer": ["b"]}, "'answer' must be text or a number"),
        ({"prompt": "a", "answer": True}, "'answer' must be"),
        ({"messages": []}, "'messages': a chat is a list of at least one"),
        ({"messages": "a"}, "a chat is a list"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "message 0 has the role 'gpt'"),
        ({"messages": [BOT]}, "nothing but an assistant's answer"),
        ({"tokens": []}, "at least one"),
        ({"tokens": [1, "a"]}, "list of ids"),
        ({"tokens": [-1]}, "list of ids"),
        ({"tokens": [True]}, "list of ids"),
    ],
)
def test_rows_of_no_shape(write, row, message):
    with pytest.raises(UserError, match=rf"a\.jsonl', line 2: {'.*' + message}"):
        read_prompts(write("a.jsonl", [{"prompt": "a"}, row]))
