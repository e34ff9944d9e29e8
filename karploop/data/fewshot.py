"""Asking a base model: an instruction, some worked examples, and where the answer ends.

For models without a chat template. A base model goes on writing after its answer, as a rule with
questions of its own; the first stop string tells where the answer was over.
"""

from __future__ import annotations

from dataclasses import dataclass

from karploop.asking import cut
from karploop.errors import UserError

_FIELD = "{prompt}"


@dataclass(frozen=True)
class FewShot:
    """A prompt format by example.

    Completions are exact: an example's is written right after its prompt, and a sampled one is cut
    but not stripped. With the default format they begin with a space (" 4"), as most tokenizers
    join a word and the space before it.

    Raises:
      UserError: `prompt_format` has not exactly one {prompt}; an example is not a pair of strings,
        or its completion contains a stop string, so that it would be cut too; a stop string is
        empty.
    """

    instruction: str = ""  # before the examples; nothing is written for an empty one
    examples: tuple[tuple[str, str], ...] = ()  # (prompt, completion)
    prompt_format: str = "Q: {prompt}\nA:"
    separator: str = "\n\n"  # between instruction, examples and the question
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        # Lists come from configs and JSON; the value must be hashable.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"few-shot format: a stop string is empty or no string: {self.stop!r}")
        if self.prompt_format.count(_FIELD) != 1:
            raise UserError(
                f"few-shot format: 'prompt_format' must contain {_FIELD} exactly once; it is "
                f"{self.prompt_format!r}"
            )
        examples = tuple(self._example(i, example) for i, example in enumerate(self.examples))
        object.__setattr__(self, "examples", examples)

    def render(self, prompt: str) -> str:
        """The text that asks `prompt`; braces in the prompt and the examples mean nothing."""
        return self.header() + self.ask(prompt)

    def header(self) -> str:
        """What stands before every question: instruction and examples, with their separators."""
        shown = [self.ask(question) + completion for question, completion in self.examples]
        parts = [self.instruction] if self.instruction else []
        return "".join(part + self.separator for part in [*parts, *shown])

    def ask(self, prompt: str) -> str:
        """The question alone, up to where the answer begins."""
        before, _, after = self.prompt_format.partition(_FIELD)
        return before + prompt + after

    def cut(self, completion: str) -> tuple[str, bool]:
        """`completion` up to its first stop string, and whether there was one."""
        return cut(completion, self.stop)

    def _example(self, i: int, example: object) -> tuple[str, str]:
        if (
            not isinstance(example, tuple | list)
            or len(example) != 2
            or not all(isinstance(part, str) for part in example)
        ):
            raise UserError(
                f"few-shot format: example {i} must be a pair of strings, prompt and completion; "
                f"it is {example!r}"
            )
        prompt, completion = example
        inside = [s for s in self.stop if s in completion]
        if inside:
            raise UserError(
                f"few-shot format: the completion of example {i} contains the stop string "
                f"{inside[0]!r}, where a model that follows it would be cut: {completion!r}. "
                "Choose another stop string or shorten the example"
            )
        return prompt, completion
