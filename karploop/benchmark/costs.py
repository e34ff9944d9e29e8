"""What a workload cannot do without: multiplications and additions, and bytes from memory.

Counted from shapes, by hand, because a compiler's own count takes the body of a loop once. Only
what the mathematics needs is in it: no padding, no attention behind the mask or outside a window,
nothing that is computed a second time to save memory. Of bytes, parameters, the key-value cache and
an optimiser's state, each read or written as often as it must be where nothing of it fits into a
cache; activations are left out. So a time derived from it is a lower bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from karploop.config import LoraConfig, ModelConfig

_PARAMETER = 4  # bytes; float32 whatever the model computes in
_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Rates:
    """What a machine does at best, measured."""

    flops: float  # a second
    bytes: float  # a second


@dataclass(frozen=True)
class Cost:
    """Of one program, or of one step of its loop."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The least that it can take: arithmetic and memory at once, whichever is longer."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def total(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as costs need them."""

    config: ModelConfig
    vocabulary: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by the names that adapters know them by."""
        c = self.config
        out = {"query": c.heads, "key": c.key_value_heads, "value": c.key_value_heads}
        found = {name: (c.width, heads * c.head_width) for name, heads in out.items()}
        found |= {"out": (c.heads * c.head_width, c.width), "up": (c.width, c.mlp_width)}
        if c.activation != "gelu":
            found["gate"] = (c.width, c.mlp_width)
        return found | {"down": (c.mlp_width, c.width)}

    @property
    def in_layers(self) -> int:
        """Numbers in the matrices of all layers."""
        return self.config.layers * sum(n * m for n, m in self.matrices.values())

    @property
    def head(self) -> int:
        """Numbers in the output matrix."""
        return self.config.width * self.vocabulary

    def pairs(self, length: int, before: int = 0) -> int:
        """Queries and the keys that they see, over all layers, of `length` tokens behind others."""
        far = self.config.window or before + length
        full = sum(range(before + 1, before + length + 1))
        near = sum(min(place, far) for place in range(before + 1, before + length + 1))
        return sum(near if sliding else full for sliding in self.config.sliding_layers)

    def attention(self, pairs: int) -> float:
        """FLOPs of scores and of the mean over values."""
        return 4.0 * self.config.heads * self.config.head_width * pairs

    def cached(self, pairs: int) -> float:
        """Bytes of keys and values, of so many columns over all layers."""
        c = self.config
        return 2.0 * c.key_value_heads * c.head_width * pairs * _SIZES[c.dtype]


def forward(shape: Shape, tokens: int, pairs: int, predicted: int) -> Cost:
    """One pass over `tokens` tokens, with the head at `predicted` of them."""
    flops = 2.0 * (tokens * shape.in_layers + predicted * shape.head) + shape.attention(pairs)
    read = shape.in_layers + (shape.head if predicted else 0)
    return Cost(flops, _PARAMETER * read)


def sampling(
    shape: Shape, prompts: Sequence[int], new: Sequence[int], slots: int, samples: int = 1
) -> list[Cost]:
    """Prefill of each prompt once, and decoding: every step reads all parameters for `slots` rows.

    Args:
      prompts: tokens of each.
      new: tokens of each prompt's completions, at least 1.
      slots: rows that are decoded at a time, always filled; `samples` of each prompt.
    """
    pairs = sum(map(shape.pairs, prompts))
    costs = [forward(shape, sum(prompts), pairs, len(prompts))]
    # The first new token comes from the prompt's last; each further one takes a step.
    contexts = [
        length + step
        for length, count in zip(prompts, new, strict=True)
        for step in range(count - 1)
        for _ in range(samples)
    ]
    steps = math.ceil(len(contexts) / slots)
    if steps:
        pairs = sum(shape.pairs(1, context) for context in contexts) / steps
        rows = len(contexts) / steps
        one = forward(shape, rows, pairs, rows)
        # What the samples of a prompt see in common is read once for all of them.
        shared = sum(
            (count - 1) * shape.pairs(1, length - 1)
            for length, count in zip(prompts, new, strict=True)
        )
        read = pairs - shared * (samples - 1) / steps
        costs += [Cost(one.flops, one.bytes + shape.cached(read))] * steps
    return costs


def scoring(shape: Shape, rows: int, length: int, prefix: int = 0) -> list[Cost]:
    """One pass over rows whose tokens are all scored but the first, the prefix once before."""
    scored = rows * (length - 1)
    pairs = rows * shape.pairs(length, prefix)
    first = [forward(shape, prefix, shape.pairs(prefix), 0)] if prefix else []
    return [*first, forward(shape, rows * length, pairs, scored)]


@dataclass(frozen=True)
class Texts:
    """What a pass reads: `count` prompts, each once, and behind it `branches` texts.

    A text by itself is a prompt without branches. A prompt's last token predicts the first one of
    all its branches, and so is asked once.
    """

    count: int
    prompt: int  # tokens
    branches: int = 0
    length: int = 0  # tokens of a branch that are read: all but the last

    @property
    def tokens(self) -> int:
        return self.count * (self.prompt + self.branches * self.length)

    @property
    def predicted(self) -> int:
        """Positions that the head is asked at, where only branches are learnt."""
        return self.count * (1 + self.branches * self.length)

    def pairs(self, shape: Shape) -> int:
        behind = self.branches * shape.pairs(self.length, self.prompt)
        return self.count * (shape.pairs(self.prompt) + behind)


def training(
    shape: Shape, texts: Texts, predicted: int, lora: LoraConfig | None = None
) -> list[Cost]:
    """One step of AdamW on these texts, the head at `predicted` of their tokens.

    A backward pass takes twice a forward pass. With an adapter the frozen matrices get no gradient,
    which saves one product of three; the factors' own are small and counted. Of each trained
    parameter the number is read three times (forward, backward, update) and written once, its
    gradient written and read, its two moments read and written.
    """
    tokens, attention = texts.tokens, shape.attention(texts.pairs(shape))
    products = 2.0 * (tokens * shape.in_layers + predicted * shape.head)
    if lora is None or not lora.rank:
        held = shape.in_layers + shape.head * (1 if shape.config.tied else 2)
        return [Cost(3.0 * (products + attention), 10.0 * _PARAMETER * held)]
    sizes = [sum(shape.matrices[m]) for m in lora.matrices if m in shape.matrices]
    factors = shape.config.layers * lora.rank * sum(sizes)
    flops = 2.0 * products + 3.0 * attention + 6.0 * tokens * factors
    frozen = shape.in_layers + shape.head
    return [Cost(flops, _PARAMETER * (2.0 * frozen + 10.0 * factors))]


def as_lora(lora: LoraConfig, rank: int) -> LoraConfig:
    """The same adapter, of `rank` where it is off."""
    return lora if lora.rank else dataclasses.replace(lora, rank=rank)
