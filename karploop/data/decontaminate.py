"""Which training prompts repeat held-out ones.

Three kinds of overlap are told apart, the surest first:

  exact     the same words as a held-out prompt
  quoted    a held-out prompt of fewer than n words stands in it as whole sentences
  n-gram    n words in a row that a held-out problem has too

n is 13 as in GPT-3 (arXiv 2005.14165, appendix C). Its analysis ignores punctuation; here a symbol
is a word of its own, because "3 * 4" and "3 + 4" are two problems; only letter case, white space
and the marks of sentences do not count. Short prompts are why "quoted" asks for whole sentences:
"What is 3 * 4?" is not part of "What is 3 * 4 * 5?".

Text that many training prompts share, such as instructions or the frame of a word problem, is no
overlap. A word is template if it lies in three words in a row that more than `common` of the
distinct training prompts have (and more than 10 of them, the number from which GPT-3 ignored an
n-gram); an n-gram counts if at least half of its words are not template. An n-gram that is itself
as common as that is all template, and so is a quotation. Exact repetition always counts.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from karploop.errors import UserError

CLEAN, EXACT, QUOTED, NGRAM = "", "exact", "quoted", "n-gram"

_TEMPLATE_WORDS = 3  # in a row, that make a template if they are common
_TEMPLATE_FLOOR = 10  # prompts; what fewer share is no template in however small a set
_CONTENT = 0.5  # share of an n-gram's words that must not be template

# A decimal number; a letter of a script that is written without spaces; a run of letters and
# digits; or one symbol that is no mark.
_WORD = re.compile(
    r"\d+\.\d+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u9fff]+"
    r"|[^\w\s.?:;,\"'`“”‘’„。？：；，]"
)
# Where sentences end. "!" ends one and stays a word besides, for it may be a factorial.
_END = re.compile(r"(?<!\d)\.|\.(?!\d)|[?:;\n。？：；]|(?<=[!！])")


@dataclass(frozen=True)
class Overlaps:
    """What each training row has in common with the held-out problems.

    Attributes:
      reasons: one of CLEAN, EXACT, QUOTED and NGRAM a row, the first that applies of the last
        three in this order.
      held_out_S: [rows] int64, the first held-out row that it overlaps with so; −1 where clean.
      summary: counts for a log: "rows", "held_out", "clean", "exact", "quoted", "ngram"; and
        "exact_other_answer", how many of the exact ones have another answer than the held-out row.
    """

    reasons: list[str]
    held_out_S: np.ndarray
    summary: dict[str, int]

    @property
    def clean_S(self) -> np.ndarray:
        """[rows] bool, whether a row has no overlap."""
        return self.held_out_S < 0


def find_overlaps(
    held_out: Sequence[str],
    training: Sequence[str],
    *,
    held_out_answers: Sequence[str | None] | None = None,
    training_answers: Sequence[str | None] | None = None,
    n: int = 13,
    common: float = 0.01,
) -> Overlaps:
    """Compares training prompts with held-out ones; see the module's docstring.

    Answers lengthen the text in which n-grams are looked for, on their side, so that a worked
    solution that is copied is found too; they have no part in the other two kinds.

    Args:
      held_out, training: prompts.
      held_out_answers, training_answers: gold answers, or completions to be trained on, one a
        prompt; None where there are none.
      n: words of an n-gram, at least 3.
      common: share of the distinct training prompts, in [0, 1], above which words are template.

    Raises:
      UserError: n or `common` is out of range, or the numbers of prompts and answers differ.
    """
    if n < _TEMPLATE_WORDS or not 0.0 <= common <= 1.0:
        raise UserError(
            f"decontamination: n is {n} and must be at least {_TEMPLATE_WORDS}; common is {common} "
            "and must lie in [0, 1]"
        )
    known, sought = _Corpus(held_out, held_out_answers), _Corpus(training, training_answers)
    size = len(training)
    exact_S = known.find_prompts(sought)
    quoted_S = known.find_sentences(sought, n, common)
    ngram_S = known.find_ngrams(sought, n, common)
    found_S, reasons = np.full(size, -1), np.full(size, CLEAN, dtype=object)
    for reason, row_S in ((NGRAM, ngram_S), (QUOTED, quoted_S), (EXACT, exact_S)):
        found_S = np.where(row_S >= 0, row_S, found_S)
        reasons[row_S >= 0] = reason
    other = sum(
        row >= 0 and known.answer(row) != sought.answer(i) for i, row in enumerate(exact_S.tolist())
    )
    counts = {r: int((reasons == r).sum()) for r in (CLEAN, EXACT, QUOTED, NGRAM)}
    summary = {
        "rows": size,
        "held_out": len(held_out),
        "clean": counts[CLEAN],
        "exact": counts[EXACT],
        "quoted": counts[QUOTED],
        "ngram": counts[NGRAM],
        "exact_other_answer": other if held_out_answers and training_answers else 0,
    }
    return Overlaps(reasons.tolist(), found_S, summary)


def words(text: str) -> list[str]:
    """The words of `text` that are compared; see the module's docstring."""
    return _words_and_ends(text)[0]


def _words_and_ends(text: str) -> tuple[list[str], list[int]]:
    """The words, and the positions between them where sentences begin or end, in rising order."""
    found: list[str] = []
    ends = [0]
    for sentence in _END.split(unicodedata.normalize("NFC", text).casefold()):
        found += _WORD.findall(sentence)
        if ends[-1] != len(found):
            ends.append(len(found))
    return found, ends


class _Corpus:
    """Texts as words, with what is looked up in them as 64-bit hashes of runs of words."""

    def __init__(self, prompts: Sequence[str], answers: Sequence[str | None] | None):
        if answers is not None and len(answers) != len(prompts):
            raise UserError(
                f"decontamination: {len(prompts)} prompts and {len(answers)} answers; give one "
                "answer, or None, a prompt"
            )
        self.prompts, self.answers = prompts, answers
        split = [_words_and_ends(prompt) for prompt in prompts]
        self.words = [found for found, _ in split]
        self.ends = [ends for _, ends in split]

    def answer(self, row: int) -> str | None:
        answer = self.answers[row] if self.answers else None
        return None if answer is None else " ".join(answer.split())

    @cached_property
    def distinct(self) -> np.ndarray:
        """[rows] bool, whether a prompt is the first with its words.

        Copies of one prompt say nothing about what different prompts share.
        """
        first: dict[tuple[str, ...], int] = {}
        return np.array([first.setdefault(k, i) == i for i, k in enumerate(self.keys)], dtype=bool)

    def limit(self, common: float) -> float:
        """The number of distinct prompts above which what they share is template."""
        return max(common * self.distinct.sum(), _TEMPLATE_FLOOR)

    @cached_property
    def keys(self) -> list[tuple[str, ...]]:
        """What makes two prompts the same: their words, or the text where it has none."""
        return [
            tuple(found) if found else ("", " ".join(prompt.split()))
            for found, prompt in zip(self.words, self.prompts, strict=True)
        ]

    def find_prompts(self, sought: _Corpus) -> np.ndarray:
        """[rows of `sought`] the first prompt here with the same words, or −1."""
        first: dict[tuple[str, ...], int] = {}
        for row, key in enumerate(self.keys):
            first.setdefault(key, row)
        return np.array([first.get(key, -1) for key in sought.keys], dtype=np.int64)

    def find_sentences(self, sought: _Corpus, n: int, common: float) -> np.ndarray:
        """[rows of `sought`] the first prompt here of under n words that is quoted there, or −1."""
        short: dict[tuple[str, ...], int] = {}
        for row, found in enumerate(self.words):
            if 0 < len(found) < n:
                short.setdefault(tuple(found), row)
        lengths = {len(key) for key in short}
        rows = np.full(len(sought.words), -1)
        if not short:
            return rows
        quotes = [
            {
                short[key]
                for at, start in enumerate(ends)
                for stop in ends[at + 1 : at + n]
                if stop - start in lengths and (key := tuple(found[start:stop])) in short
            }
            for found, ends in zip(sought.words, sought.ends, strict=True)
        ]
        distinct = sought.distinct.tolist()
        times = Counter(row for i, found in enumerate(quotes) if distinct[i] for row in found)
        for i, found in enumerate(quotes):
            rows[i] = min((row for row in found if times[row] <= sought.limit(common)), default=-1)
        return rows

    def find_ngrams(self, sought: _Corpus, n: int, common: float) -> np.ndarray:
        """[rows of `sought`] the first row here with an n-gram that counts there, or −1."""
        ids: dict[str, int] = defaultdict(itertools.count().__next__)
        known, known_row = self._ids(ids)
        text, text_row = sought._ids(ids)
        rows = np.full(len(sought.words), -1)
        grams, at = _grams(known, known_row, n)
        hashes, starts = _grams(text, text_row, n)
        if not (len(grams) and len(hashes)):
            return rows
        grams, first = np.unique(grams, return_index=True)
        gram_row = known_row[at[first]]  # the first row, as `np.unique` returns first occurrences
        place = np.minimum(np.searchsorted(grams, hashes), len(grams) - 1)
        hit = grams[place] == hashes
        starts, place = starts[hit], place[hit]
        if not len(starts):
            return rows
        template = sought._template(text, text_row, common)
        before = np.concatenate([[0], np.cumsum(~template)])
        content = before[starts + n] - before[starts] >= _CONTENT * n
        rows[:] = len(self.words)
        np.minimum.at(rows, text_row[starts[content]], gram_row[place[content]])
        return np.where(rows < len(self.words), rows, -1)

    def _ids(self, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The words of all texts, prompts with their answers, as ids; and the row of each."""
        flat: list[int] = []
        lengths: list[int] = []
        for row, found in enumerate(self.words):
            answer = self.answers[row] if self.answers else None
            text = found + words(answer) if answer else found
            flat.extend(map(ids.__getitem__, text))  # a new word gets the next id
            lengths.append(len(text))
        row = np.repeat(np.arange(len(lengths)), lengths)
        return np.array(flat, dtype=np.uint64), row

    def _template(self, text: np.ndarray, row: np.ndarray, common: float) -> np.ndarray:
        """[words] bool, whether a word lies in a run of words that is common to many prompts."""
        limit = self.limit(common)
        hashes, starts = _grams(text, row, _TEMPLATE_WORDS)
        of_distinct = self.distinct[row[starts]]
        kinds, kind = np.unique(hashes, return_inverse=True)
        # Only runs that occur often can occur in many prompts: count prompts for these alone.
        often = np.bincount(kind[of_distinct], minlength=len(kinds)) > limit
        chosen = often[kind] & of_distinct
        pairs = np.unique(kind[chosen] * np.int64(len(row)) + row[starts[chosen]])
        prompts = np.bincount(pairs // len(row), minlength=len(kinds))
        template = np.zeros(len(text), dtype=bool)
        of_template = starts[(prompts > limit)[kind]]
        for offset in range(_TEMPLATE_WORDS):
            template[of_template + offset] = True
        return template


def _grams(text: np.ndarray, row: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of n words within a row, and where each starts, in their order.

    Two of 10^7 different runs meet in one hash with a probability of about 10^-6.

    Args:
      text: [words] uint64 ids.
      row: [words] the row of each word, rising.
    """
    if len(text) < n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    starts = np.flatnonzero(row[n - 1 :] == row[: len(row) - n + 1])
    mixed = _mix(text + np.uint64(1))
    total = np.zeros(len(text) - n + 1, dtype=np.uint64)
    for offset in range(n):  # a polynomial in an odd number, modulo 2^64
        total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[offset : offset + len(total)]
    return _mix(total[starts]), starts


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters them (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
