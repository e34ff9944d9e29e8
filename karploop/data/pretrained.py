r"""The tokenizers of real language models, and their chat templates.

A transformers tokenizer adapted to a loop that samples text, judges it and trains on it:

- *Pieces join.* `decode(encode(a) + encode(b)) == a + b`, so that a prompt and a completion
  tokenized apart mean the text between them, in sampling and in training alike. Tokenizers of the
  SentencePiece kind put a space before any text and take one off when they decode; here only
  `encode_prompt`, where a document begins, does so. (A normaliser, such as the NFC of Qwen, still
  holds: what `decode` gives back is the normalised text. SentencePiece does not tell "\u2581" from
  a space.)
- *Text stays text.* A special token's string ("<|im_end|>") that is typed by a model or stands in
  the data is encoded as the characters that it consists of. Only `encode_prompt` and chat templates
  write control tokens. Control tokens are those marked special, those with a role (start, end,
  padding, …) and the stop tokens. Other added tokens, such as the "<think>" of Qwen, are words like
  any other, which a model may write; but see below.
- *Messages cannot leave their turn.* In a chat, control strings in messages are broken by a mark (a
  private-use character after the first one) before the template is rendered. The control strings
  found in the rendered text are then the template's own. The text between them is tokenized as
  plain text, cut where the marks were. In all messages but the assistant's, added tokens that the
  template itself writes are broken too, special or not.
- *Templates see no clock.* `strftime_now("…")` is always one day, as results are stored under the
  hash of what they were made from.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from karploop.data.chat_template import ChatTemplate, at_start_of, within
from karploop.data.messages import Message, check_messages
from karploop.data.prepared import Prepared, kept, prepare
from karploop.data.tokenizer import Tokenizer
from karploop.errors import UserError
from karploop.files import file_sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_READ = (".json", ".txt", ".model", ".jinja")  # what transformers reads of a folder for a tokenizer


class PretrainedTokenizer:
    """A fast tokenizer of transformers; see the module's docstring for where it differs.

    Built by `load_tokenizer` and `from_fast`. Two of the same identity are equal.
    """

    def __init__(self, prepared: Prepared):
        self._prepared = prepared
        self._specials, self._prefix = prepared.specials, prepared.prefix
        self._chat = prepared.chat()
        # What stands for unknown characters is written for text, too: it is only typed that it
        # counts as a control token.
        control, unknown = prepared.control, prepared.unknown
        self._control_ids = frozenset(control.values()) - {control.get(unknown)}
        self._unknown = (unknown, control.get(unknown))

    @functools.cached_property
    def _starts_control(self) -> re.Pattern:
        return at_start_of(self._prepared.control)

    @functools.cached_property
    def _backend(self) -> Any:
        """Made when first asked for: of a large vocabulary it takes a second."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._prepared.rules)
        backend.encode_special_tokens = True  # special tokens in text are text
        return backend

    @classmethod
    def from_fast(
        cls,
        tokenizer: Any,
        stop_ids: Iterable[int] = (),
        *,
        variables: Mapping[str, Any] | None = None,
    ) -> PretrainedTokenizer:
        """Wraps a `transformers.PreTrainedTokenizerFast`, which is copied and stays as it was.

        Args:
          stop_ids: ids that end a text besides the tokenizer's own end token; the token that ends
            an assistant's turn in the chat template comes on top.
          variables: what else the chat template reads, such as `enable_thinking`; JSON values.

        Raises:
          UserError: not a fast tokenizer; no end token and no stop ids; a stop id out of range.
        """
        return cls(prepare(_checked(tokenizer), tuple(stop_ids), dict(variables or {})))

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token, or the end token where it has none.

        Padding is masked wherever it is used, so that any id would do.
        """
        return self._specials.pad

    @property
    def bos_id(self) -> int | None:
        """The token that the tokenizer puts before a document; None where it puts none.

        Some families (GPT-2, Qwen) name a start token, or could, but begin without one.
        """
        return self._specials.bos

    @property
    def eos_id(self) -> int:
        """The token that ends a document: the tokenizer's own, or else the first stop id."""
        return self._specials.eos

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_id` and what else ends a text, such as the token that ends an assistant's turn."""
        return self._specials.stop

    @property
    def vocab_size(self) -> int:
        """Number of ids, that is the largest plus one, added tokens included."""
        return self._prepared.vocab_size

    @property
    def reachable_size(self) -> int:
        """Rows that an embedding needs: the largest id that can occur plus one.

        Less than `vocab_size` where the last ids are control tokens that nothing writes, such as
        the image token in the tokenizer of the text-only Gemma 3 (id 262144, embedding 262144).
        """
        return self._prepared.reachable_size

    def tokens(self, below: int) -> dict[str, int]:
        """The ids below `below` by their tokens, control tokens included."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {token: i for token, i in vocabulary.items() if i < below}

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all that decides what this tokenizer does.

        That is its vocabulary and rules, special and stop tokens, chat template and the template's
        variables; not where it was loaded from.
        """
        return self._prepared.identity

    @property
    def has_template(self) -> bool:
        return self._chat is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PretrainedTokenizer):
            return NotImplemented
        return self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.vocab_size} ids, {self.identity[:12]})"

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text, wherever it stands; never a control token.

        Raises:
          UserError: the text has half of a surrogate pair, which is no Unicode.
        """
        ids = self._plain(text)
        unknown, unknown_id = self._unknown
        typed = unknown is not None and unknown in text and unknown_id in ids
        if self._control_ids.isdisjoint(ids) and not typed:
            return ids
        # A unigram model has control tokens among its pieces and finds them in text. Cut there.
        cuts = [0, *(m.end() for m in self._starts_control.finditer(text)), len(text)]
        ids = [i for a, b in zip(cuts[:-1], cuts[1:], strict=True) for i in self._plain(text[a:b])]
        if not self._control_ids.isdisjoint(ids):
            raise UserError(f"this tokenizer cannot write as plain text: {text[:80]!r}")
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a document that begins with `text`: what the tokenizer itself makes of it.

        The start token where the family has one, and the space where it puts one first.
        """
        start = [] if self.bos_id is None else [self.bos_id]
        return start + self.encode(self._prefix.put(text, first=True))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first stop id; control tokens are skipped.

        Ids of no token (an embedding may have rows to spare) are skipped too. Bytes that are not
        UTF-8, such as half a character, become U+FFFD.

        Raises:
          ValueError: an id before the first stop id is negative.
        """
        kept = []
        for token in map(int, ids):
            if token in self.stop_ids:
                break
            if token < 0:
                raise ValueError(f"id {token} is negative")
            kept.append(token)
        return self._backend.decode(kept, skip_special_tokens=True)

    def holding(self, strings: Sequence[str]) -> tuple[int, ...]:
        """Ids whose text holds one of `strings` whole; control tokens are never among them."""
        ids = [i for i in range(self.vocab_size) if i not in self._control_ids]
        texts = self._backend.decode_batch([[i] for i in ids], skip_special_tokens=True)
        return tuple(
            i for i, text in zip(ids, texts, strict=True) if any(s in text for s in strings)
        )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a chat, written by the chat template.

        Of ordinary messages, what transformers' `apply_chat_template` gives, but for assistant
        turns: these are tokenized apart from what is before them, as they were sampled.

        Args:
          messages: role and content each; see `check_messages`.
          add_generation_prompt: whether the chat ends with the opening of an assistant's turn.

        Raises:
          UserError: no template; messages of a wrong shape, or refused by the template.
        """
        chat = self._template()
        marked = chat.mark(check_messages(messages))
        text, spans = chat.text(marked, add_generation_prompt)
        return self._tokens(marked.mark, text, chat.turns(marked, text, spans, strict=False))[0]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a finished chat, and for each whether a model is to learn to write it.

        That is so for what assistants said and for the token that ends their turn. For templates
        with {% generation %} blocks it is what stands in them, with the token that ends the turn;
        for others what the template writes after the opening of the turn.

        Returns:
          ids: (length)
          targets: (length), True where the id itself, not the one after it, is learnt

        Raises:
          UserError: as `render`; no message is an assistant's; or the template does not write a
            turn as the continuation of what asks for it, or changes it when others follow.
        """
        chat = self._template()
        messages = check_messages(messages)
        if not any(m["role"] == "assistant" for m in messages):
            raise UserError("a conversation to learn from has no message of an assistant")
        marked = chat.mark(messages)
        text, spans = chat.text(marked, add_generation_prompt=False)
        return self._tokens(marked.mark, text, chat.turns(marked, text, spans, strict=True))

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            raise UserError(
                "this tokenizer has no chat template: it belongs to a base model. Use the "
                "instruction-tuned model's tokenizer, put a 'chat_template.jinja' beside its "
                "files, or ask with examples (karploop.data.fewshot.FewShot)"
            )
        return self._chat

    def _tokens(
        self, mark: str, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[bool]]:
        """Ids of a rendered text, and which lie in the spans (of characters) to learn."""
        ids, targets, position = [], [], 0
        borders = sorted({at for span in spans for at in span})
        controls = [*self._chat.controls(text), None]
        for control in controls:
            end = control.start if control else len(text)
            inner = [at for at in borders if position < at < end]
            edges = [position, *inner, end]
            for start, stop in zip(edges[:-1], edges[1:], strict=True):
                piece, learn = text[start:stop], within(start, spans)
                # After a control token, or at the very start. A sampled answer that begins with a
                # space has the one that the tokenizer would put.
                if start == position and not (learn and piece.startswith(" ")):
                    piece = self._prefix.put(piece, first=position == 0)
                # A model's own words are tokenized as `encode` does it, the marks gone.
                new = self.encode(piece.replace(mark, "")) if learn else self._pieces(piece, mark)
                ids += new
                targets += [learn] * len(new)
            if control:
                ids.append(control.id)
                targets.append(within(control.start, spans))
                position = control.end
        return ids, targets

    def _pieces(self, text: str, mark: str) -> list[int]:
        return [i for piece in text.split(mark) for i in self._plain(piece)]

    def _plain(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids if text else []
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"not Unicode text, half of a surrogate pair: {text[:80]!r}") from None
        except Exception as error:  # the library has no class of its own for it
            raise UserError(
                f"this tokenizer has no token for a part of {text[:80]!r} ({error}): ask in the "
                "characters that its model was trained on"
            ) from error


def load_tokenizer(
    directory: str | pathlib.Path, *, variables: Mapping[str, Any] | None = None
) -> PretrainedTokenizer:
    """The tokenizer of a model in a local directory, as Hugging Face lays it out.

    Stop ids are those of 'generation_config.json' where there is one. Nothing is downloaded and no
    code of the directory is run.

    Args:
      variables: what else the chat template reads, such as `enable_thinking`; JSON values.

    Raises:
      UserError: transformers is not installed; the directory is missing, on an object store, or
        has no tokenizer that can be loaded; 'generation_config.json' is broken.
    """
    if "://" in str(directory):
        raise UserError(
            f"the tokenizer's directory must be local: copy '{directory}' to this machine first"
        )
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise UserError(f"no directory '{folder}' to load a tokenizer from")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        found = sorted(p.name for p in folder.iterdir())
        raise UserError(
            f"no tokenizer in '{folder}': it has none of {', '.join(TOKENIZER_FILES)}, but "
            f"{', '.join(found[:8]) or 'nothing'}{', …' if len(found) > 8 else ''}. Copy them from "
            "where the model's weights came from"
        )
    stops, variables = _generation_stops(folder / "generation_config.json"), dict(variables or {})

    def make() -> Prepared:
        return prepare(_fast(folder), stops, variables)

    found = sorted(path for path in folder.rglob("*") if path.suffix in _READ and path.is_file())
    files = {str(path.relative_to(folder)): file_sha256(path) for path in found}
    return PretrainedTokenizer(kept([files, stops, variables], (__name__,), make))


def _fast(folder: pathlib.Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            "tokenizers of pretrained models need transformers: pip install 'transformers>=5' "
            "'jinja2>=3.1.6'"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # whatever a broken file brings about in either library
        raise UserError(f"cannot load the tokenizer in '{folder}': {error}") from error
    return _checked(tokenizer)


def _checked(tokenizer: Any) -> Any:
    """Raises UserError: a tokenizer of transformers that is not a fast one."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one; convert it to a "
            "'tokenizer.json' (save_pretrained of a fast tokenizer writes it)"
        )
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuses a tokenizer that writes ids beyond a model's embedding.

    An embedding with rows to spare is fine: many are padded to a round number.

    Args:
      vocabulary: rows of the model's embedding.

    Raises:
      UserError: the tokenizer needs more.
    """
    pretrained = isinstance(tokenizer, PretrainedTokenizer)
    needed = tokenizer.reachable_size if pretrained else tokenizer.vocab_size
    if needed > vocabulary:
        raise UserError(
            f"the tokenizer has ids up to {needed - 1} and needs an embedding of {needed} rows; "
            f"the model's has {vocabulary}. Use the tokenizer that came with the weights, or "
            "a model whose vocabulary is at least as large"
        )


def _generation_stops(path: pathlib.Path) -> tuple[int, ...]:
    if not path.is_file():
        return ()
    try:
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{path}' is no JSON object: {error}") from error
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(type(i) is int for i in stops):
        raise UserError(f"'{path}': 'eos_token_id' must be an id or a list of ids, not {stops!r}")
    return tuple(stops)
