"""What a chain reads out of a completion. None means that it cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


def one_of(**words: Any) -> Callable[[str], Any]:
    """The value of the one word that the text has, in whatever case, as a word of its own.

    A text with several of them is read by the last line that has just one: who reasons first names
    what he rejects. `one_of(pass_=True, fail=False)`: an underscore at the end is left out.
    """
    values = {word.rstrip("_").lower(): value for word, value in words.items()}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, values))})\b", re.IGNORECASE)

    def parse(text: str) -> Any:
        for part in (text, *reversed(text.splitlines())):
            found = {word.lower() for word in pattern.findall(part)}
            if len(found) == 1:
                return values[found.pop()]
        return None

    return parse


def after(marker: str) -> Callable[[str], str | None]:
    """What follows the last `marker`, on its line."""

    def parse(text: str) -> str | None:
        _, found, rest = text.rpartition(marker)
        line = rest.strip().split("\n", 1)[0].strip()
        return line if found and line else None

    return parse


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in the text."""
    decoder = json.JSONDecoder()
    for start in (m.start() for m in re.finditer(r"\{", text)):
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            continue
        return value
    return None
