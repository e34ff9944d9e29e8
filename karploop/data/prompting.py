"""From a task's prompts and completions to a model's tokens, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from karploop.data.fewshot import FewShot
from karploop.data.tokenizer import Tokenizer


class Prompting:
    """How one model is asked: its tokenizer and, for a base model, examples and stop strings.

    Sampling puts the examples (`prefix`) before every prompt. Training rows go without them: what
    the model learns is to answer when it is asked alone, at a fraction of the tokens (context
    distillation, arXiv 2112.00861).

    Attributes:
      prefix: tokens that stand before every prompt, start token included; () without examples.
      stop_ids: tokens that end a completion: the tokenizer's, and all that hold a stop string.
      identity: SHA-256 (hex) of everything that decides the tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, shots: FewShot | None = None, answer: str = "{answer}"
    ):
        """`answer` is how a gold answer is written as a completion."""
        self.tokenizer, self._shots, self._answer = tokenizer, shots, answer
        header = shots.header() if shots else ""
        self.prefix = tuple(tokenizer.encode_prompt(header)) if header else ()
        holding = tokenizer.holding(shots.stop) if shots and shots.stop else ()
        self.stop_ids = tuple(dict.fromkeys([*tokenizer.stop_ids, *holding]))
        settings = [tokenizer.identity, asdict(shots) if shots else None, answer]
        self.identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt to sample from, which follow `prefix`."""
        text = self._ask(text)
        return self.tokenizer.encode(text) if self.prefix else self.tokenizer.encode_prompt(text)

    def gold(self, answer: str) -> str:
        """A gold answer as the completion that gives it."""
        return self._answer.replace("{answer}", answer)

    def example(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Tokens of a training row: the prompt without examples; the completion and its stop."""
        start = self.tokenizer.encode_prompt(self._ask(prompt))
        return start, [*self.tokenizer.encode(completion), self.tokenizer.eos_id]

    def completion(self, tokens: Sequence[int], stopped: bool) -> tuple[str, bool]:
        """The text of sampled tokens, and whether it ended by itself.

        Args:
          stopped: a stop token was drawn.
        """
        text = self.tokenizer.decode(tokens)
        if not self._shots:
            return text, stopped
        cut, found = self._shots.cut(text)
        return cut, found or stopped

    def _ask(self, text: str) -> str:
        return self._shots.ask(text) if self._shots else text
