"""FewShot: what it writes, where it cuts, and what it refuses."""

import dataclasses

import pytest

from karploop.data.fewshot import FewShot
from karploop.errors import UserError

SUMS = FewShot("Add.", (("1 + 1", " 2"), ("2 + 3", " 5")))


def test_render():
    assert SUMS.render("4 + 4") == "Add.\n\nQ: 1 + 1\nA: 2\n\nQ: 2 + 3\nA: 5\n\nQ: 4 + 4\nA:"
    assert FewShot().render("why?") == "Q: why?\nA:"
    assert FewShot(prompt_format="{prompt}=", separator=";").render("1+1") == "1+1="


@pytest.mark.parametrize(
    "prompt", ["{", "{}", "{0}", "{prompt}", "{x!r:>{y}}", "100% {{a}}", "\\1"]
)
def test_braces_mean_nothing(prompt):
    asked = FewShot(prompt, ((prompt, prompt),), prompt_format="{}{prompt}{{0}}").render(prompt)
    line = "{}" + prompt + "{{0}}"
    assert asked == f"{prompt}\n\n{line}{prompt}\n\n{line}"


def test_cut_at_the_first_stop_string():
    assert SUMS.cut(" 8\n\nQ: 5 + 5\nA: 10") == (" 8", True)
    assert SUMS.cut(" 8") == (" 8", False)
    assert SUMS.cut("\n8") == ("", True)
    assert FewShot(stop=("END", "Q:")).cut("a Q: b END") == ("a ", True)
    assert FewShot(stop=()).cut("a\nb") == ("a\nb", False)


def test_lists_make_a_value():
    listed = FewShot("Add.", [["1 + 1", " 2"], ["2 + 3", " 5"]], stop=["\n"])
    assert listed == SUMS
    assert hash(listed) == hash(SUMS)
    assert FewShot(stop="\n").stop == ("\n",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUMS.stop = ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prompt_format="Q: {question}"), "exactly once"),
        (dict(prompt_format="{prompt} {prompt}"), "exactly once"),
        (dict(stop=("",)), "stop string is empty"),
        (dict(stop=(3,)), "no string"),
        (dict(examples=(("a", " b"), ("a",))), "example 1 must be a pair"),
        (dict(examples=(("a", 3),)), "example 0 must be a pair"),
        (dict(examples=("ab",)), "example 0 must be a pair"),
        (dict(examples=(("a", " b\nc"),)), r"example 0 contains the stop string '\\n'"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        FewShot(**fields)
