"""Chat templates: rendering, and where in the text a template's own control tokens and turns are.

See `pretrained.py` for what is guaranteed of a chat's tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from karploop.data.messages import ROLES
from karploop.errors import UserError

_MARKS = tuple(map(chr, range(0xF0000, 0xF0010)))  # private use: no text has all of them
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Control(NamedTuple):
    """A control token in a rendered text; `end` takes in the space that it swallows."""

    id: int
    start: int
    end: int


class Marked(NamedTuple):
    """Messages whose control strings are broken by `mark`."""

    messages: list[dict[str, Any]]
    mark: str


class ChatTemplate:
    """A chat template and the control tokens that it writes."""

    def __init__(
        self,
        template: str,
        variables: dict[str, Any],
        control: Mapping[str, int],
        flags: Mapping[str, tuple[bool, bool]],
        written: Sequence[str],
    ):
        """
        Args:
          variables: what the template reads besides the messages.
          control: strings of control tokens and their ids.
          flags: of each, whether it swallows the space on its left and on its right.
          written: added tokens of any kind in the template's own text.
        """
        self.template = template
        self.variables = variables
        self.stop_ids: tuple[int, ...] = ()  # tell the token that ends a turn among several
        self.has_blocks = bool(_GENERATION.search(template))
        self._id_of = control
        self._control = re.compile(any_of(control, flags))
        self._hostile_to_all = at_start_of(control)
        self._hostile = at_start_of([*control, *written])

    def may_write(self, token: str) -> bool:
        """Whether the template may write a control token: itself, as a variable, or by a role."""
        named = token in self.template or token in self.variables.values()
        return named or any(role in token for role in ROLES)

    def mark(self, messages: list[dict[str, Any]]) -> Marked:
        everything = json.dumps(messages, ensure_ascii=False, default=str) + self.template
        mark = next((m for m in _MARKS if m not in everything), None)
        if mark is None:
            raise UserError("the messages have all of the private characters U+F0000 to U+F000F")

        def broken(value: Any, hostile: re.Pattern) -> Any:
            if isinstance(value, str):
                return hostile.sub(lambda m: m[0] + mark, value)
            if isinstance(value, Mapping):
                return {broken(k, hostile): broken(v, hostile) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [broken(v, hostile) for v in value]
            return value

        def message(m: dict[str, Any]) -> dict[str, Any]:
            own = m["role"] == "assistant"
            hostile = self._hostile_to_all if own else self._hostile
            return {k: v if k == "role" else broken(v, hostile) for k, v in m.items()}

        return Marked([message(m) for m in messages], mark)

    def text(
        self, marked: Marked, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat, and the spans (of characters) of its {% generation %} blocks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [marked.messages],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self.has_blocks,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(m["role"] for m in marked.messages) or "none"
            raise UserError(
                f"the chat template refuses the messages (roles: {roles}): {error}"
            ) from error
        return texts[0], list(spans[0]) if spans else []

    def controls(self, text: str) -> list[Control]:
        """The control tokens of a rendered text, in order."""
        found = []
        for match in self._control.finditer(text):
            token = match[0] if match[0] in self._id_of else match[0].strip()
            found.append(Control(self._id_of[token], *match.span()))
        return found

    def turns(
        self, marked: Marked, text: str, blocks: list[tuple[int, int]], *, strict: bool
    ) -> list[tuple[int, int]]:
        """Spans of what the assistants wrote in `text`, the tokens that end their turns included.

        Args:
          text, blocks: what `self.text` gave for the messages.
          strict: whether to raise where they cannot be told; otherwise these are left out.
        """
        answers = [i for i, m in enumerate(marked.messages) if m["role"] == "assistant"]
        if not answers:
            return []
        if self.has_blocks:
            ends = [self._end(text, *block) for block in blocks]
            if strict and not any(ends):
                raise UserError(
                    "the chat template's {% generation %} blocks "
                    + ("have no token that ends the turn" if blocks else "hold no message")
                    + ", so that a model could not learn to stop"
                )
            return [(start, end or stop) for (start, stop), end in zip(blocks, ends, strict=True)]
        spans = []
        for i in answers:
            try:
                spans.append(self._turn(marked, text, i))
            except UserError:
                if strict:
                    raise
        return spans

    def ends_turn(self) -> list[int]:
        """The token that ends an assistant's turn, where that can be told."""
        messages = [dict(role="user", content="a"), dict(role="assistant", content="b")]
        marked = self.mark(messages)
        try:
            text, blocks = self.text(marked, add_generation_prompt=False)
            spans = self.turns(marked, text, blocks, strict=True)
        except UserError:
            return []  # whoever renders a chat will be told
        return [c.id for c in self.controls(text) if c.end == spans[-1][1]]

    def _turn(self, marked: Marked, text: str, i: int) -> tuple[int, int]:
        """The span of message `i`, found by rendering the chat up to it."""
        if i == 0:
            raise UserError(
                "message 0 is the assistant's: nothing asks for it, so that it cannot be learnt; "
                "begin with a system or user message"
            )
        before, _ = self.text(Marked(marked.messages[:i], marked.mark), True)
        upto, _ = self.text(Marked(marked.messages[: i + 1], marked.mark), False)
        if not upto.startswith(before):
            raise UserError(
                f"message {i}: the chat template does not write this assistant's turn as a "
                f"continuation of what asks for it. It asks with {_tail(before, upto)}, and "
                f"writes {_tail(upto, before)}. Give the template's {{% generation %}} blocks"
            )
        end = self._end(upto, len(before), len(upto))
        if end is None:
            raise UserError(
                f"message {i}: the chat template writes no special token after this assistant's "
                "turn, so that a model could not learn to stop"
            )
        if not text.startswith(upto[:end]):
            raise UserError(
                f"message {i}: the chat template writes this assistant's turn differently when "
                f"other messages follow: {_tail(upto[:end], text)} becomes "
                f"{_tail(text, upto[:end])}. Make an example of each turn, of the messages up to "
                "it, or drop what the template takes out (earlier reasoning, as a rule)"
            )
        return len(before), end

    def _end(self, text: str, start: int, stop: int) -> int | None:
        """Where the token ends that closes the turn in a span, or right after the span."""
        controls = [c for c in self.controls(text) if start <= c.start <= stop]
        inside = [c for c in controls if c.start < stop]
        # Several may stand at the end: those of tool calls first, or a last one for the whole chat.
        closing: list[Control] = []
        for control in reversed(inside):
            if text[control.end : closing[0].start if closing else stop].strip():
                break
            closing.insert(0, control)
        closing = closing or controls[len(inside) :] or inside[-1:]
        known = [c for c in closing if c.id in self.stop_ids]
        return (known or closing)[0].end if closing else None


def any_of(tokens: Iterable[str], flags: Mapping[str, tuple[bool, bool]] | None = None) -> str:
    """A pattern for the longest of the strings, with the space that `flags` has them swallow.

    Grouped by first character: some tokenizers have thousands, which would be tried at every place.
    """
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        left, right = (flags or {}).get(token, (False, False))
        head = r"\s*" * left + re.escape(token[0])
        groups.setdefault(head, []).append(re.escape(token[1:]) + r"\s*" * right)
    return "|".join(f"{head}(?:{'|'.join(tails)})" for head, tails in groups.items()) or "(?!)"


def at_start_of(tokens: Iterable[str]) -> re.Pattern:
    """Matches the first character of any of the strings, so that overlapping ones all count."""
    return re.compile(f"(?={any_of(tokens)}).", re.DOTALL)


def within(at: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start <= at < end for start, end in spans)


def _tail(text: str, other: str) -> str:
    """Some of `text` from where it parts from `other`."""
    pairs = zip(text, other, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    return repr(text[max(0, at - 20) : at + 40])
