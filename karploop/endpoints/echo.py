"""Log-probabilities of a continuation, out of a completion that echoes what was sent.

A server that is asked with `echo` and `logprobs` gives back the tokens of prompt and continuation,
as texts, each with its log-probability. They are laid on the text that was sent, byte by byte, and
have to spell all of it; the continuation's are those that begin at its first byte or behind it. The
offsets that servers report are not read: vLLM counts the text of a start token, SGLang says −1.

Tokenizers know no border between prompt and continuation. Where a token reaches over it, or where
it cannot be told whose a token is, there are no numbers but a reason. Log-probabilities are those
of the server's own tokens of the whole text; a model on the mesh reads prompt and continuation
tokenized apart, which may be other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LOST = "\ufffd"  # what stands for bytes that are no whole character
_START = 2  # most tokens that a tokenizer puts before a text
_HINT = "a space at the end of a prompt belongs at the beginning of what follows"


class Unscored(Exception):
    """Why a reply says nothing of how probable a continuation is."""


@dataclass(frozen=True)
class Echo:
    """A continuation's tokens as texts, and their log-probabilities in nats.

    None where nothing is before a token: the first of a text without a prompt.
    """

    pieces: list[str]
    logprobs: list[float | None]


def read_echo(
    choice: Mapping[str, Any], written: int | None, prompt: str, continuation: str
) -> Echo:
    """From a completion's `choice`.

    Args:
      written: tokens that the server has added to what was sent; None: it does not say.

    Raises:
      Unscored: there are no log-probabilities, or they cannot be told apart.
      LookupError, TypeError: it is no completion.
    """
    found = choice.get("logprobs") or {}
    pieces, logprobs = found.get("tokens"), found.get("token_logprobs")
    if not pieces or not logprobs:
        raise Unscored("the reply has no log-probabilities of tokens")
    if len(pieces) != len(logprobs) or not all(isinstance(piece, str) for piece in pieces):
        raise TypeError("tokens and log-probabilities do not go together")
    sent = (prompt + continuation).encode()
    counts = {1 if written is None else written, 0}  # what ends a text is a token of some servers
    ways = [_starts(pieces[: max(0, len(pieces) - count)], sent) for count in sorted(counts)]
    ways = sorted((way for way in ways if way is not None), key=len)
    if not ways:
        raise Unscored("the tokens of the reply do not spell what was sent ('echo' is ignored?)")
    starts = ways[0]
    if any(pieces[len(starts) : len(ways[-1])]):
        raise Unscored("which tokens of the reply are of what was sent cannot be told")
    first = _first(starts, pieces, len(prompt.encode()))
    logprobs = [_number(value) for value in logprobs[first : len(starts)]]
    for place, value in enumerate(logprobs, start=first):
        if value is None and place:
            raise Unscored(f"the token {pieces[place]!r} has no log-probability")
    return Echo(list(pieces[first : len(starts)]), logprobs)


def _starts(pieces: Sequence[str], sent: bytes) -> list[set[int]] | None:
    """For each token, the bytes at which it may begin; None: they do not spell what was sent."""
    bare_sent = sent.lstrip(b" ")
    for skipped in range(min(_START, len(pieces)) + 1):
        words = [piece.strip(" ").encode() for piece in pieces[:skipped]]
        if any(word and bare_sent.startswith(word) for word in words):
            break  # it is no start token but the text's own
        rest = list(pieces[skipped:])
        if rest and rest[0].startswith(" ") and not sent.startswith(b" "):
            rest[0] = rest[0][1:]  # SentencePiece puts a space before a text …
        for bare in (False, True):  # … and some servers leave out the one that begins a token
            found = _spelt(rest, sent, bare)
            if found is not None:
                return [{0}] * skipped + found
    return None


def _spelt(pieces: Sequence[str], sent: bytes, bare: bool) -> list[set[int]] | None:
    """As `_starts`, of tokens none of which stands before the text."""
    reached = [{0}]
    for piece in pieces:
        reached.append({end for at in reached[-1] for end in _ends(piece, sent, at, bare)})
    if not sent or len(sent) not in reached[-1]:
        return None
    reached[-1] = {len(sent)}
    for i in reversed(range(len(pieces))):  # only what leads to the end
        reached[i] = {at for at in reached[i] if _ends(pieces[i], sent, at, bare) & reached[i + 1]}
    return reached[:-1]


def _ends(piece: str, sent: bytes, start: int, bare: bool) -> set[int]:
    """Where the token may end that begins at a byte.

    Args:
      bare: a space may stand before it that it does not show.
    """
    ends = {start, start + 1} if bare and sent[start : start + 1] == b" " else {start}
    for number, part in enumerate(piece.split(_LOST)):
        if number:
            ends = {end for at in ends for end in _lost(sent, at)}
        whole = part.encode()
        ends = {at + len(whole) for at in ends if sent.startswith(whole, at)}
    return ends


def _lost(sent: bytes, start: int) -> set[int]:
    """Where bytes may end that are shown as one replacement character (Unicode 15, section 3.9).

    It stands for as many as begin a character of more, or for one that begins none; or for itself.
    """
    some = sent[start : start + 3]
    most = 0 if not some or some[0] < 0x80 else 1 if some[0] < 0xC0 else 3 if some[0] >= 0xF0 else 2
    ends = {start + n for n in range(1, most + 1) if start + n <= len(sent)}
    return ends | ({start + 3} if some == _LOST.encode() else set())


def _first(starts: Sequence[set[int]], pieces: Sequence[str], border: int) -> int:
    """The place of the continuation's first token; `border` is its first byte.

    Raises Unscored: a token reaches over the border, or may be on either side of it.
    """
    if not border:
        return 0
    first = next((i for i, some in enumerate(starts) if max(some) >= border), len(starts))
    if first == len(starts) or min(starts[first]) > border:
        raise Unscored(
            f"the token {pieces[first - 1]!r} is of the prompt and of what follows: {_HINT}"
        )
    if starts[first] != {border} or not pieces[first]:
        raise Unscored(
            f"whether the token {pieces[first]!r} is of the prompt or of what follows cannot be "
            "told: it shows no whole character"
        )
    return first


def _number(value: Any) -> float | None:
    """A log-probability; None where it is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
