"""CharTokenizer: ids, round trips, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.data.tasks import get_task, task_names
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError

DIGITS = CharTokenizer("0123456789+=")


def test_ids_follow_the_alphabet_after_the_special_ones():
    tokenizer = CharTokenizer("ba")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("abba") == [4, 3, 3, 4]
    assert tokenizer.vocab_size == 5


@given(st.text(alphabet=DIGITS.alphabet))
def test_decode_inverts_encode(text):
    ids = DIGITS.encode(text)
    assert DIGITS.decode(ids) == text
    assert all(DIGITS.first_character_id <= i < DIGITS.vocab_size for i in ids)


def test_decode_skips_pad_and_bos_and_stops_at_eos():
    one, two, three = DIGITS.encode("123")
    pad, bos, eos = DIGITS.pad_id, DIGITS.bos_id, DIGITS.eos_id
    ids = [pad, bos, one, pad, two, eos, three, eos]
    assert DIGITS.decode(ids) == DIGITS.decode(iter(ids)) == DIGITS.decode(np.array(ids)) == "12"
    assert DIGITS.decode([eos, DIGITS.vocab_size]) == ""


def test_encode_names_an_unknown_character():
    with pytest.raises(UserError, match=r"'x' of '1x2'"):
        DIGITS.encode("1x2")


@pytest.mark.parametrize("bad_id", [-1, DIGITS.vocab_size])
def test_decode_refuses_ids_outside_the_vocabulary(bad_id):
    with pytest.raises(ValueError, match=str(bad_id)):
        DIGITS.decode([bad_id])


def test_alphabet_must_be_nonempty_and_without_repeats():
    with pytest.raises(UserError, match="empty"):
        CharTokenizer("")
    with pytest.raises(UserError, match="repeats 'a'"):
        CharTokenizer("aba")


def test_for_tasks_joins_alphabets():
    tokenizer = CharTokenizer.for_tasks(get_task("copy"), get_task("multiplication"))
    assert tokenizer.alphabet == "0123456789=*+()"
    for name in task_names():
        if not get_task(name).alphabet:
            continue  # of another test: prompts that are data have none
        assert CharTokenizer.for_tasks(get_task(name)).alphabet == get_task(name).alphabet


def test_is_a_frozen_value():
    assert CharTokenizer("ab") == CharTokenizer("ab") != CharTokenizer("ba")
    with pytest.raises(dataclasses.FrozenInstanceError):
        CharTokenizer("ab").alphabet = "c"
