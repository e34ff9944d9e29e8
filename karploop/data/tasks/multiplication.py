"""Multiplication with its steps (arXiv 2502.01612; trace format of arXiv 2311.01460)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from karploop.data.tasks.arithmetic import TwoOperandTask
from karploop.data.tasks.digits import DIGITS, least_significant_first

_PRODUCT = re.compile(r"([0-9]+)\*([0-9]+)=")


@dataclass(frozen=True)
class Multiplication(TwoOperandTask):
    """Schoolbook multiplication, every number with its least significant digit first.

    2719 · 1349 is "9172*9431=" → "17442+067801(132331)+0075180(1398490)+00091720=13976630": one
    partial product per digit of the second operand, each but the first and the last followed by
    the running sum in brackets, then "=" and the product. All widths follow from the lengths of
    the operands: partial product i has len(a) + 1 + i digits and the product len(a) + len(b).

    Difficulty d holds operands of 1 to d digits, at least one of exactly d: 2d − 1 shapes. `sample`
    is uniform over shapes and then within the shape, as in the paper. Uniform over prompts would
    show little but d × d (82% at d = 5; 1 × 5 and 5 × 1 together 0.02%).

    The gold verifier and votes look at the final answer only, the text after the last "=": a wrong
    trace with the right product counts as right, as a verifier without access to the steps would
    have it. Compare with `answer` to demand the steps too. A completion without "=" has no answer.
    """

    name: str = "multiplication"

    alphabet = DIGITS + "*+()="

    def shapes(self, difficulty: int) -> list[tuple[int, int]]:
        shorter = range(1, difficulty)
        return (
            [(n, difficulty) for n in shorter]
            + [(difficulty, n) for n in shorter]
            + [(difficulty, difficulty)]
        )

    def write(self, a: str, b: str) -> str:
        return f"{a[::-1]}*{b[::-1]}="

    def read(self, prompt: str) -> tuple[str, str] | None:
        match = _PRODUCT.fullmatch(prompt)
        return (match[1][::-1], match[2][::-1]) if match else None

    def answer(self, prompt: str) -> str:
        a, b = self.operands(prompt)
        terms, total = [], 0
        for place, digit in enumerate(reversed(b)):
            partial = int(a) * int(digit) * 10**place
            total += partial
            width = len(a) + 1 + place
            term = least_significant_first(partial, width)
            # The first sum would repeat its only term, and the last one is the product.
            if 0 < place < len(b) - 1:
                term += f"({least_significant_first(total, width)})"
            terms.append(term)
        return f"{'+'.join(terms)}={least_significant_first(total, len(a) + len(b))}"

    def normalise(self, completion: str) -> str:
        _, equals, product = completion.rpartition("=")
        return product.strip() if equals else ""
