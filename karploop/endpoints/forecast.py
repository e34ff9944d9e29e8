"""What a job will ask of an endpoint and what that costs, as far as it is known before.

Tokens of prompts are taken to be four characters long; of replies, the most that is asked for
counts. What is answered already is not asked again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from karploop.endpoints.calls import CHARACTERS, Call, Endpoint


@dataclass(frozen=True)
class Load:
    """Calls, the characters of their prompts, and the most tokens of their replies."""

    calls: int = 0
    characters: int = 0
    tokens_out: int = 0

    @classmethod
    def of(cls, call: Call, endpoint: Endpoint) -> Load:
        return cls(1, call.characters, call.most_tokens_out(endpoint))

    @property
    def tokens_in(self) -> int:
        """About so many."""
        return self.characters // CHARACTERS

    def __add__(self, other: Load) -> Load:
        return Load(
            self.calls + other.calls,
            self.characters + other.characters,
            self.tokens_out + other.tokens_out,
        )

    def __mul__(self, times: int) -> Load:
        return Load(self.calls * times, self.characters * times, self.tokens_out * times)


Loads = Mapping[tuple[int, str], Load]  # by the id of what is asked for, and the endpoint's name


@dataclass
class Tally:
    """What endpoints are asked on one way through a job.

    Attributes:
      longest: whether replies that nobody knows yet are as long as they may be, or empty.
      unsure: ids for which such a reply was made up: where they go from there nobody knows.
      answered: calls of each endpoint that have been answered before.
    """

    longest: bool
    loads: dict[tuple[int, str], Load] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)
    answered: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, loads: Loads) -> None:
        for key, load in loads.items():
            self.loads[key] = self.loads.get(key, Load()) + load

    def of(self, name: str) -> Load:
        """All that the endpoint is asked."""
        return sum((load for (_, asked), load in self.loads.items() if asked == name), Load())


def extreme(ways: Sequence[Loads], pick: Callable[..., int]) -> Loads:
    """The least or the most of several ways on, by `pick`, which is min or max."""
    keys = {key for loads in ways for key in loads}
    found = {}
    for key in keys:
        loads = [way.get(key, Load()) for way in ways]
        found[key] = Load(
            pick(load.calls for load in loads),
            pick(load.characters for load in loads),
            pick(load.tokens_out for load in loads),
        )
    return found


@dataclass(frozen=True)
class Forecast:
    """What will be asked, at least and at most.

    Attributes:
      answered: calls that have been answered before, and are in neither.
      spent: dollars that the job has spent so far, which count against the cap.
    """

    endpoint: Endpoint
    least: Load
    most: Load
    answered: int = 0
    spent: float = 0.0

    @property
    def dollars(self) -> tuple[float, float]:
        """Least, with empty replies, and most."""
        least, most = self.least, self.most
        return (
            self.endpoint.price(least.tokens_in, 0),
            self.endpoint.price(most.tokens_in, most.tokens_out),
        )

    def __str__(self) -> str:
        least, most = self.least, self.most
        text = f"{_range(least.calls, most.calls)} calls, "
        text += f"{_range(least.tokens_in, most.tokens_in, 'about ')} tokens in, "
        text += f"at most {most.tokens_out:,} out"
        if self.answered:
            text += f" ({self.answered:,} more are answered already)"
        if self.endpoint.input_price or self.endpoint.output_price:
            low, high = map(_dollars, self.dollars)
            known = (least.calls, least.characters) == (most.calls, most.characters)
            at_most = known or not least.calls
            text += f", about {high} at most" if at_most else f", about {low} to {high}"
        return text

    @property
    def warning(self) -> str:
        """That the cap may end the job, or will; empty where it does neither."""
        (low, high), cap = self.dollars, self.endpoint.cap
        left = cap - self.spent
        if not cap or high <= left:
            return ""
        spent = f" ({_dollars(self.spent)} of it are spent)" if self.spent else ""
        what = f"the cap of {_dollars(cap)}{spent}"
        if low > left:
            return f"warning: {what} is less than the {_dollars(low)} that the prompts alone cost"
        return (
            f"warning: it may cost {_dollars(high)}, and {what} may end it before; what was "
            "answered is kept for another try with a higher one"
        )


def _range(low: int, high: int, about: str = "") -> str:
    if low == high:
        return f"{about}{low:,}"
    return f"{about}{low:,} to {high:,}" if low else f"up to {about}{high:,}"


def _dollars(amount: float) -> str:
    return f"${amount:.2f}" if amount >= 0.1 or not amount else f"${amount:.4f}"
