"""Prompts with and without examples, and completions that end at a stop string."""

import pytest

pytest.importorskip("transformers")

from small_tokenizers import byte_level, sentence_piece  # noqa: E402

from karploop.data.fewshot import FewShot  # noqa: E402
from karploop.data.pretrained import PretrainedTokenizer  # noqa: E402
from karploop.data.prompting import PlainPrompting  # noqa: E402
from karploop.data.tokenizer import CharTokenizer  # noqa: E402

SHOTS = FewShot(instruction="Add.", examples=(("1+1", " 2"), ("2+3", " 5")))


@pytest.fixture(params=["bytes", "pieces"])
def tokenizer(request):
    made = byte_level(bos=True) if request.param == "bytes" else sentence_piece()
    return PretrainedTokenizer.from_fast(made)


def test_prefix_and_prompt_are_the_whole_text(tokenizer):
    prompting = PlainPrompting(tokenizer, SHOTS)
    tokens = [*prompting.prefix, *prompting.prompt("4+4")]
    assert tokenizer.decode(tokens).lstrip() == SHOTS.render("4+4")
    assert prompting.prefix[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in prompting.prompt("4+4")


def test_training_rows_go_without_examples(tokenizer):
    start, end = PlainPrompting(tokenizer, SHOTS).example("4+4", " 8")
    assert start[0] == tokenizer.bos_id and end[-1] == tokenizer.eos_id
    assert tokenizer.decode(start).lstrip() == "Q: 4+4\nA:"
    assert tokenizer.decode(end) == " 8"


def test_every_token_that_holds_a_stop_string_stops(tokenizer):
    prompting = PlainPrompting(tokenizer, SHOTS)
    newline = [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])]
    assert newline and set(newline) <= set(prompting.stop_ids)
    assert set(prompting.stop_ids) == {*newline, *tokenizer.stop_ids}
    sampled = [*tokenizer.encode(" 8"), newline[0], *tokenizer.encode("Q:")]
    assert prompting.completion(tokenizer.decode(sampled), stopped=True) == (" 8", True)
    assert prompting.completion(" 8", stopped=False) == (" 8", False)


def test_without_examples_a_prompt_is_the_tokenizers_own():
    tokenizer = CharTokenizer("0123456789+=")
    prompting = PlainPrompting(tokenizer)
    assert prompting.prefix == () and prompting.stop_ids == tokenizer.stop_ids
    assert prompting.prompt("1+1=") == tokenizer.encode_prompt("1+1=")
    assert prompting.example("1+", "2") == ([1, 4, 13], [5, 2])
    assert prompting.completion("2", stopped=True) == ("2", True)


def test_whatever_decides_the_tokens_is_in_the_identity(tokenizer):
    identities = {
        PlainPrompting(tokenizer, shots).identity
        for shots in (None, SHOTS, FewShot(), FewShot(stop=("\n\n",)))
    }
    assert len(identities) == 4
    assert PlainPrompting(tokenizer, SHOTS).identity in identities
