"""The space that some tokenizers put before text, taken out of their rules and told apart."""

from __future__ import annotations

from typing import Any, NamedTuple

SPACE = "\u2581"  # how SentencePiece writes a space


class Prefix(NamedTuple):
    """The space that a tokenizer puts before text."""

    scheme: str  # "never"; "first": where a document begins; "always": after control tokens too
    unless_space: bool  # whether text that begins with a space gets none

    def put(self, text: str, *, first: bool) -> str:
        if not text or self.scheme == "never" or (self.scheme == "first" and not first):
            return text
        if self.unless_space and text[0] in (" ", SPACE):
            return text
        return " " + text


def without_prefix(rules: dict[str, Any]) -> tuple[dict[str, Any], Prefix]:
    """The rules of a tokenizer that puts no space before text, and what this one puts."""
    found = [Prefix("never", False)]

    def before(step: dict | None) -> dict | None:
        if step is None:
            return None
        kind = step["type"]
        if kind == "Sequence":
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            return step | {key: [s for s in map(before, step[key]) if s is not None]}
        if kind == "Prepend" and step["prepend"] == SPACE:
            found.append(Prefix("always", False))
            return None
        if kind == "Metaspace" and step["prepend_scheme"] != "never":
            found.append(Prefix(step["prepend_scheme"], True))
            return step | {"prepend_scheme": "never"}
        if kind == "ByteLevel" and step["add_prefix_space"]:
            found.append(Prefix("always", True))
            return step | {"add_prefix_space": False}
        return step

    def after(step: dict | None) -> dict | None:
        if step is None:
            return None
        if step["type"] == "Sequence":
            kept = [s for s in map(after, step["decoders"]) if s is not None]
            return step | {"decoders": kept}
        if step["type"] == "Strip" and step["content"] == " ":
            return None
        if step["type"] == "Metaspace":
            return step | {"prepend_scheme": "never"}
        return step

    changed = rules | dict(
        normalizer=before(rules["normalizer"]),
        pre_tokenizer=before(rules["pre_tokenizer"]),
        decoder=after(rules["decoder"]),
    )
    return changed, found[-1]
