"""From a task's prompts and completions to a model's tokens, and back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict

from karploop.asking import Asked
from karploop.data.fewshot import FewShot
from karploop.data.messages import Message
from karploop.data.pretrained import PretrainedTokenizer
from karploop.data.tokenizer import Tokenizer


class Prompting(ABC):
    """How one model is asked: its tokenizer and, for a published model, format and examples.

    Sampling shows the examples with every prompt. Training rows go without them: what the model
    learns is to answer when it is asked alone, at a fraction of the tokens (context distillation,
    arXiv 2112.00861).

    Attributes:
      prefix: tokens that stand before every prompt, start token included; () where none do.
      shown: prompts of the examples.
      stop_ids: tokens that end a completion: the tokenizer's, and all that hold a stop string.
      identity: SHA-256 (hex) of everything that decides the tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, shots: FewShot | None = None, answer: str = "{answer}"
    ):
        """`answer` is how a gold answer is written as a completion."""
        self.tokenizer, self._shots, self._answer = tokenizer, shots, answer
        self.prefix: tuple[int, ...] = ()
        self.shown = tuple(prompt for prompt, _ in shots.examples) if shots else ()
        holding = tokenizer.holding(shots.stop) if shots and shots.stop else ()
        self.stop_ids = tuple(dict.fromkeys([*tokenizer.stop_ids, *holding]))
        settings = [type(self).__name__, tokenizer.identity, asdict(shots) if shots else None]
        self.identity = hashlib.sha256(json.dumps([*settings, answer]).encode()).hexdigest()

    @abstractmethod
    def prompt(self, text: str) -> list[int]:
        """Tokens of a prompt to sample from, which follow `prefix`."""

    @abstractmethod
    def asked(self, text: str) -> Asked:
        """The same for a role, prefix included: a text, or a conversation."""

    @abstractmethod
    def example(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Tokens of a training row: the prompt without examples; the completion and its stop."""

    def gold(self, answer: str) -> str:
        """A gold answer as the completion that gives it."""
        return self._answer.replace("{answer}", answer)

    def completion(self, text: str, stopped: bool) -> tuple[str, bool]:
        """The completion in what was sampled, and whether it ended by itself.

        Args:
          text: of the sampled tokens.
          stopped: a stop token was drawn.
        """
        if not self._shots:
            return text, stopped
        cut, found = self._shots.cut(text)
        return cut, found or stopped

    def _ask(self, text: str) -> str:
        return self._shots.ask(text) if self._shots else text


class PlainPrompting(Prompting):
    """Plain text: instruction and examples are a prefix that all prompts share."""

    def __init__(
        self, tokenizer: Tokenizer, shots: FewShot | None = None, answer: str = "{answer}"
    ):
        super().__init__(tokenizer, shots, answer)
        header = shots.header() if shots else ""
        self.prefix = tuple(tokenizer.encode_prompt(header)) if header else ()

    def prompt(self, text: str) -> list[int]:
        text = self._ask(text)
        return self.tokenizer.encode(text) if self.prefix else self.tokenizer.encode_prompt(text)

    def asked(self, text: str) -> Asked:
        return self._shots.render(text) if self._shots else text

    def example(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        start = self.tokenizer.encode_prompt(self._ask(prompt))
        return start, [*self.tokenizer.encode(completion), self.tokenizer.eos_id]


class ChatPrompting(Prompting):
    """Turns of the model's chat template: the instruction is the system's, examples are turns.

    Training rows keep the instruction. What is learnt of them is what the template calls the
    assistant's, with the token that ends its turn.
    """

    tokenizer: PretrainedTokenizer

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.render(self.asked(text), add_generation_prompt=True)

    def asked(self, text: str) -> list[Message]:
        turns = [turn for example in self._shots.examples for turn in self._turns(*example)]
        return [*self._system(), *turns, *self._turns(text)]

    def example(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Raises UserError: the template cannot be trained on; see `conversation`."""
        said = [*self._system(), *self._turns(prompt, completion)]
        ids, targets = self.tokenizer.conversation(said)
        first = targets.index(True)
        last = len(targets) - targets[::-1].index(True)
        return ids[:first], ids[first:last]

    def _system(self) -> list[Message]:
        instruction = self._shots.instruction
        return [{"role": "system", "content": instruction}] if instruction else []

    def _turns(self, question: str, completion: str | None = None) -> list[Message]:
        asked = {"role": "user", "content": self._ask(question)}
        if completion is None:
            return [asked]
        return [asked, {"role": "assistant", "content": completion}]
