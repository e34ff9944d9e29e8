"""Chat messages: which roles there are, and what a message must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karploop.errors import UserError

# A closed set, because some templates write a control token around the role's name.
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]  # "role" and "content"; other keys go to the template as they are


def check_messages(messages: Any, where: str = "messages") -> list[dict[str, Any]]:
    """Copies of `messages`, without keys whose value is None.

    Args:
      where: what the messages belong to, such as a file and line, for the error.

    Raises:
      UserError: not a list of at least one message; a message is no object, has a role that is
        not one of `ROLES`, or has no text. An assistant's message may have tool calls instead.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError(
            f"{where}: a chat is a list of at least one message like "
            f"{{'role': 'user', 'content': 'Hello'}}, not {_short(messages)}"
        )
    return [_check(message, f"{where}: message {i}") for i, message in enumerate(messages)]


def _check(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"{where} is {_short(message)}; write it as {{'role': 'user', 'content': 'Hello'}}"
        )
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if isinstance(content, str) or (
        content is None and role == "assistant" and message.get("tool_calls")
    ):
        return message
    if isinstance(content, list):
        raise UserError(
            f"{where} has its content in parts; only text can be used: join the parts' texts into "
            "one string"
        )
    raise UserError(
        f"{where} has the content {_short(content)}; it must be a string. Its keys are: "
        f"{', '.join(sorted(map(str, message)))}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
