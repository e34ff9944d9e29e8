"""What is found out once of a transformers tokenizer, and kept.

For a vocabulary of Gemma's size that takes longer than anything else that a process does before its
first token, and comes out the same each time. So it is kept in the cache folder, under the hash of
the files that it was found in and of the code that found it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from karploop.data.chat_template import ChatTemplate
from karploop.data.space_prefix import Prefix, without_prefix
from karploop.errors import UserError
from karploop.files import cache_folder, write_atomic
from karploop.fingerprint import fingerprint

_TODAY = datetime.date(2024, 7, 26)  # what Llama's templates fall back on
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


class Specials(NamedTuple):
    """Control tokens by what they are for."""

    pad: int
    bos: int | None
    eos: int
    stop: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A tokenizer's rules and what it does with control tokens; JSON but for its tuples.

    Attributes:
      rules: of a `tokenizers.Tokenizer` that puts no space before text, in its own JSON.
      control: strings of control tokens and their ids.
      flags: of each, whether it swallows the space on its left and on its right.
      unknown: what stands for unknown characters.
      template: the chat template, if there is one.
      variables: what it reads besides the messages.
      written: added tokens of any kind in its own text.
      vocab_size: the largest id plus one.
      reachable_size: the largest id that can occur, plus one.
      identity: SHA-256 (hex) of all that decides what this tokenizer does.
    """

    rules: str
    control: dict[str, int]
    flags: dict[str, tuple[bool, bool]]
    unknown: str | None
    specials: Specials
    prefix: Prefix
    template: str | None
    variables: dict[str, Any]
    written: tuple[str, ...]
    vocab_size: int
    reachable_size: int
    identity: str

    def chat(self) -> ChatTemplate | None:
        if self.template is None:
            return None
        chat = ChatTemplate(self.template, self.variables, self.control, self.flags, self.written)
        chat.stop_ids = self.specials.stop
        return chat

    def to_bytes(self) -> bytes:
        """A line of JSON, and the rules."""
        line = {k: v for k, v in vars(self).items() if k != "rules"}
        return f"{json.dumps(line)}\n{self.rules}".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Prepared:
        line, _, rules = data.decode().partition("\n")
        found = json.loads(line)
        found["flags"] = {token: tuple(sides) for token, sides in found["flags"].items()}
        pad, bos, eos, stop = found["specials"]
        found["specials"] = Specials(pad, bos, eos, tuple(stop))
        found["prefix"] = Prefix(*found["prefix"])
        found["written"] = tuple(found["written"])
        return cls(rules=rules, **found)


def kept(source: Any, modules: Sequence[str], make: Callable[[], Prepared]) -> Prepared:
    """What `make` makes of `source`, made once.

    Args:
      source: what tells it from all others, JSON.
      modules: whose code makes it, besides this one.
    """
    code = fingerprint(__name__, *modules)
    versions = {name: _version(name) for name in _LIBRARIES}
    key = hashlib.sha256(json.dumps([source, code, versions], sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "tokenizers" / key
    # Whatever is wrong with what was kept, it can be made again.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Prepared.from_bytes(path.read_bytes())
    made = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        write_atomic(path, made.to_bytes())
    return made


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""


def prepare(tokenizer: Any, stop_ids: Sequence[int], variables: dict[str, Any]) -> Prepared:
    """Of a `transformers.PreTrainedTokenizerFast`, which stays as it was.

    Args:
      stop_ids, variables: as of `PretrainedTokenizer.from_fast`.

    Raises:
      UserError: no end token and no stop ids; a stop id out of range; templates without jinja2.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["truncation"] = rules["padding"] = None  # left over from whoever saved the file
    if "dropout" in rules["model"]:
        rules["model"]["dropout"] = None  # makes encoding random
    eos, vocabulary = tokenizer.eos_token_id, tokenizer.get_vocab()
    stops = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stop_ids]))
    if not stops:
        raise UserError(
            "the tokenizer names no end token and no stop ids are given: name what ends a text, in "
            "'eos_token' of 'tokenizer_config.json' or 'eos_token_id' of 'generation_config.json'"
        )
    ids = set(vocabulary.values())
    if unknown := [i for i in stops if i not in ids]:
        raise UserError(
            f"the stop ids {unknown} are no tokens of this tokenizer, whose ids go up to {max(ids)}"
        )

    named = {str(token) for token in tokenizer.special_tokens_map.values() if token}
    control, flags = {}, {}
    for token in rules["added_tokens"]:
        content = token["content"]
        if token["special"] or content in named or token["id"] in stops:
            token["special"] = True
            flags[content] = (token["lstrip"], token["rstrip"])
            control[content] = token["id"]
    plain, prefix = without_prefix(rules)

    chat, template, written = None, None, ()
    if tokenizer.chat_template:
        template = _template(tokenizer)
        words = [t["content"] for t in rules["added_tokens"] if not t["content"].isspace()]
        written = tuple(w for w in words if w in template)
        names = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        variables = names | variables
        # A chat model whose end token is a document's still ends its turns in the template's way.
        chat = ChatTemplate(template, variables, control, flags, written)
        stops = tuple(dict.fromkeys([*stops, *chat.ends_turn()]))

    letters = [t for t in sorted(vocabulary) if len(t) == 1 and t not in control]
    document = tokenizer("a" if "a" in letters else (*letters, "a")[0])["input_ids"]
    bos = document[0] if len(document) > 1 and document[0] in control.values() else None
    pad = tokenizer.pad_token_id
    specials = Specials(stops[0] if pad is None else pad, bos, stops[0], stops)
    by_template = {token for token in control if chat and chat.may_write(token)}
    unwritten = {
        i for token, i in control.items() if token not in {*by_template, tokenizer.unk_token}
    }
    described = dict(
        rules=rules,
        control=control,
        specials=specials,
        template=template,
        variables=variables if template else None,
    )
    identity = hashlib.sha256(
        json.dumps(described, sort_keys=True, ensure_ascii=True).encode()
    ).hexdigest()
    return Prepared(
        rules=json.dumps(plain, ensure_ascii=False),
        control=control,
        flags=flags,
        unknown=tokenizer.unk_token,
        specials=specials,
        prefix=prefix,
        template=template,
        variables=variables,
        written=written,
        vocab_size=max(ids) + 1,
        # What no text and no template brings about need not have an embedding.
        reachable_size=1
        + max(ids - unwritten | {*specials.stop, specials.pad, specials.bos} - {None}),
        identity=identity,
    )


def _template(tokenizer: Any) -> str:
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("chat templates need jinja2: pip install 'jinja2>=3.1.6'")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise UserError(f"cannot choose the tokenizer's chat template: {error}") from error
    # A stored result must not depend on the day on which it was computed.
    return _CLOCK.sub(lambda m: json.dumps(_TODAY.strftime(m[2])), template)
