"""Addition with a scratchpad (STaR, arXiv 2203.14465, after arXiv 2112.00114)."""

from __future__ import annotations

from dataclasses import dataclass

from karploop.data.tasks.addition import ReverseAddition
from karploop.errors import UserError


@dataclass(frozen=True)
class ScratchpadAddition(ReverseAddition):
    """Sum of two numbers of `difficulty` digits each, digit by digit and then as a whole.

    Everything has its least significant digit first, and operands are interleaved: 157 + 268 is
    "785612=" → "78=15,56=12,12=04:5240". A step a digit: the two digits, then what they and the
    carry from the step before add up to, as two digits of which the first is the new carry. Behind
    ":" stands the answer, padded to `difficulty` + 1 digits. The papers write numbers as people do
    and repeat the operands in every step; this form is one that a small model learns in seconds.

    The gold verifier and votes look at the answer only, as STaR does: a wrong scratchpad with the
    right answer counts as right. A completion without ":" has no answer.

    Attributes:
      check_steps: the scratchpad must be the gold one, too. Give such a task its own name.
    """

    name: str = "scratchpad_addition"
    interleave: bool = True
    check_steps: bool = False

    alphabet = ReverseAddition.alphabet + ",:()"

    def __post_init__(self) -> None:
        if self.check_steps and self.name == "scratchpad_addition":
            raise UserError(
                "ScratchpadAddition(check_steps=True) needs a name of its own, such as "
                "name='checked_addition': results and splits are filed by name."
            )

    @property
    def hintable(self) -> bool:
        return True

    def answer(self, prompt: str) -> str:
        a, b = self.operands(prompt)
        steps, carry = [], 0
        for x, y in zip(reversed(a), reversed(b), strict=True):
            total = int(x) + int(y) + carry
            carry = total // 10
            steps.append(f"{x}{y}={total:02d}")
        return f"{','.join(steps)}:{super().answer(prompt)}"

    def hinted(self, prompt: str) -> str:
        """The sum stands in brackets before the equals sign: "785612(5240)="."""
        return f"{prompt.removesuffix('=')}({super().answer(prompt)})="

    def max_hinted_length(self, difficulty: int) -> int:
        return len(self.hinted(self._largest(difficulty)))

    def normalise(self, completion: str) -> str:
        steps, colon, total = completion.strip().rpartition(":")
        if not (colon and total):
            return ""
        return f"{steps}:{total}" if self.check_steps else total
