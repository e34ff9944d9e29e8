"""Addition of two numbers of equal length (Self-improving transformers, arXiv 2502.01612)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from karploop.data.tasks.arithmetic import TwoOperandTask
from karploop.data.tasks.digits import DIGITS, least_significant_first
from karploop.errors import UserError

_SUM = re.compile(r"([0-9]+)\+([0-9]+)=")
_INTERLEAVED = re.compile(r"((?:[0-9][0-9])+)=")


@dataclass(frozen=True)
class ForwardAddition(TwoOperandTask):
    """Sum in the usual digit order, unpadded: "123+456=" → "579".

    Both operands have exactly `difficulty` digits. The carry runs against the direction of
    generation, which makes this the hard encoding; completions differ in length by one.
    """

    name: str = "forward_addition"

    alphabet = DIGITS + "+="

    def shapes(self, difficulty: int) -> list[tuple[int, int]]:
        return [(difficulty, difficulty)]

    def write(self, a: str, b: str) -> str:
        return f"{a}+{b}="

    def read(self, prompt: str) -> tuple[str, str] | None:
        match = _SUM.fullmatch(prompt)
        return (match[1], match[2]) if match else None

    def answer(self, prompt: str) -> str:
        a, b = self.operands(prompt)
        return str(int(a) + int(b))


@dataclass(frozen=True)
class ReverseAddition(ForwardAddition):
    """Sum with the least significant digit first: 123 + 456 is "321+654=" → "9750".

    Both operands have exactly `difficulty` digits; the answer is padded with zeros to
    `difficulty` + 1 digits, so that its length tells nothing about the carry.

    Attributes:
      interleave: write the operands digit by digit, a0 b0 a1 b1 …: 123 + 456 is "362514=". It
        brings the digits that are added next to each other. Give such a task its own name.
    """

    name: str = "reverse_addition"
    interleave: bool = False

    def __post_init__(self) -> None:
        if self.interleave and self.name == "reverse_addition":
            raise UserError(
                "ReverseAddition(interleave=True) needs a name of its own, such as "
                "name='interleaved_addition': results and splits are filed by name."
            )

    def write(self, a: str, b: str) -> str:
        a, b = a[::-1], b[::-1]
        if self.interleave:
            return "".join(x + y for x, y in zip(a, b, strict=True)) + "="
        return f"{a}+{b}="

    def read(self, prompt: str) -> tuple[str, str] | None:
        if self.interleave:
            match = _INTERLEAVED.fullmatch(prompt)
            return (match[1][-2::-2], match[1][::-2]) if match else None
        match = _SUM.fullmatch(prompt)
        return (match[1][::-1], match[2][::-1]) if match else None

    def answer(self, prompt: str) -> str:
        a, b = self.operands(prompt)
        return least_significant_first(int(a) + int(b), width=len(a) + 1)
