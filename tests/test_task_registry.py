"""The task registry: known names, registration, a user's own task by import path."""

import sys

import numpy as np
import pytest

from karploop.data.tasks import (
    Copy,
    ReverseAddition,
    Task,
    get_task,
    home_module,
    register,
    task_names,
)
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="did you mean 'reverse_addition'"):
        get_task("reverse_adition")
    with pytest.raises(UserError, match="Known tasks: copy, forward_addition"):
        get_task("zzzzzz")


def test_register_refuses_what_could_confuse():
    assert register(Copy()) == get_task("copy")
    with pytest.raises(UserError, match="already belongs"):
        register(ReverseAddition(name="copy"))
    with pytest.raises(UserError, match="':'"):
        register(Copy(name="a:b"))
    with pytest.raises(UserError, match="is a class"):
        register(Copy)
    with pytest.raises(UserError, match="name of its own"):
        ReverseAddition(interleave=True)


def test_registered_tasks_are_found(monkeypatch):
    monkeypatch.setattr("karploop.data.tasks.registry._TASKS", {})
    task = register(Copy(name="my_copy"))
    assert get_task("my_copy") is task
    assert task_names() == ["my_copy"]


USER_MODULE = '''
from dataclasses import dataclass
from karploop.data.tasks import Task

@dataclass(frozen=True)
class Successor(Task):
    """Count one up."""
    name: str = "successor"
    alphabet = "0123456789>"

    def sample(self, rng, difficulty):
        return f"{rng.integers(10 * difficulty)}>"

    def prompts(self, difficulty):
        return (f"{i}>" for i in range(self.space(difficulty)))

    def space(self, difficulty):
        return 10 * difficulty

    def difficulty(self, prompt):
        return int(prompt[:-1]) // 10 + 1

    def answer(self, prompt):
        return str(int(prompt[:-1]) + 1)

    def max_prompt_length(self, difficulty):
        return len(str(10 * difficulty)) + 1

    def max_completion_length(self, difficulty):
        return len(str(10 * difficulty))

@dataclass(frozen=True)
class Mute(Successor):
    alphabet = ""

successor = Successor()
mute = Mute()
number = 3
'''


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(USER_MODULE)
    (tmp_path / "my_broken_tasks.py").write_text("def oops(:")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_tasks"
    sys.modules.pop("my_tasks", None)


def test_users_task_by_import_path(user_module):
    task = get_task(f"{user_module}:successor")
    assert isinstance(task, Task)
    assert task.verify("41>", "42")
    assert len(task.sample_many(np.random.default_rng(0), 2, 5)) == 5


def test_a_task_without_an_alphabet_needs_a_pretrained_model(user_module):
    mute = get_task(f"{user_module}:mute")
    with pytest.raises(UserError, match="'successor' has no alphabet.*alphabet' to ascii"):
        CharTokenizer.for_tasks(Copy(), mute)


def test_a_task_of_code_is_identified_by_its_name(user_module):
    task = get_task(f"{user_module}:successor")
    assert task.identity == task.name
    assert task.answered and task.verifiable


@pytest.mark.parametrize(
    "name, module",
    [
        ("copy", None),
        ("my_tasks:successor", "my_tasks"),
        ("a.b:c", "a.b"),
        ("file:x.jsonl", None),
        ("file:gs://bucket/x.jsonl", None),
        ("tfds/gsm8k:train?prompt=question", None),
        ("reasoning_gym/gcd?operators=a:b", None),
    ],
)
def test_only_import_paths_have_a_home_module(name, module):
    assert home_module(name) == module


@pytest.mark.parametrize(
    "name, message",
    [
        ("reasoning-gym/gcd", "did you mean 'reasoning_gym/'"),
        ("tdfs/gsm8k:train", "did you mean 'tfds/'"),
        ("some/where", "unknown task 'some/where'. Known tasks"),
    ],
)
def test_addresses_of_unknown_kinds_suggest_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        get_task(name)


@pytest.mark.parametrize(
    "path, message",
    [
        ("my_tasks:sucessor", "did you mean 'successor'"),
        ("my_tasks:", "has no attribute ''"),
        ("my_tasks:Successor", "is a class"),
        ("my_tasks:number", "found int"),
        ("files:x.jsonl", "did you mean 'file:'"),
        ("no_such_tasks:task", "ModuleNotFoundError.*PYTHONPATH"),
        ("my_broken_tasks:task", "SyntaxError"),
        (":task", "importing '' failed"),
    ],
)
def test_bad_import_paths_say_what_to_do(user_module, path, message):
    with pytest.raises(UserError, match=message):
        get_task(path)
