"""Arithmetic and memory traffic of a run's programs, counted from the model's shape.

A compiler's own count takes a loop's body once. Here a matrix product of (m, k) by (k, n) counts
2·m·k·n; attention counts every key that is computed, also those that the mask hides; norms,
activations and softmax are left out. The head counts for every position that may want it.
"""

from __future__ import annotations

from dataclasses import dataclass

from karploop.config import ADAPTABLE, LoraConfig, ModelConfig
from karploop.models.likelihood import CHUNK


@dataclass(frozen=True)
class Passes:
    """What one forward pass computes, in FLOPs."""

    layers: float  # products with parameters
    attention: float  # of queries with keys, and of these with values
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def matrices(c: ModelConfig) -> dict[str, int]:
    """Numbers in each matrix of a layer."""
    heads, kv_heads = c.heads * c.head_width, c.key_value_heads * c.head_width
    sizes = {
        "query": c.width * heads,
        "key": c.width * kv_heads,
        "value": c.width * kv_heads,
        "out": c.width * heads,
        "up": c.width * c.mlp_width,
        "down": c.width * c.mlp_width,
    }
    return sizes | ({} if c.activation == "gelu" else {"gate": c.width * c.mlp_width})


def forward(c: ModelConfig, vocabulary: int, tokens: int, keys: int, predicted: int) -> Passes:
    """Args:
    tokens: that go through the layers.
    keys: columns that each of them looks at.
    predicted: positions of which the head is asked.
    """
    return Passes(
        layers=2.0 * tokens * c.layers * sum(matrices(c).values()),
        attention=4.0 * tokens * keys * c.layers * c.heads * c.head_width,
        head=2.0 * predicted * vocabulary * c.width,
    )


def train_step(
    c: ModelConfig, vocabulary: int, rows: int, length: int, lora: LoraConfig, parts: int = 1
) -> float:
    """FLOPs of one supervised update, with what `remat` and the chunked head compute again."""
    once = forward(c, vocabulary, rows * length, length, rows * length)
    again = once.head if rows // parts * length * vocabulary > CHUNK else 0.0
    if c.remat != "none":
        again += once.attention + (once.layers if c.remat == "full" else 0.0)
    if not lora.rank:
        return 3 * once.total + again
    low = sum(_factors(c, name) for name in set(lora.matrices) & set(ADAPTABLE) & {*matrices(c)})
    adapter = 6.0 * rows * length * c.layers * lora.rank * low
    # No gradient by frozen matrices: backwards, theirs is the work of one forward pass.
    return 2 * (once.layers + once.head) + 3 * once.attention + adapter + again


def _factors(c: ModelConfig, name: str) -> int:
    """Inputs and outputs of a layer's matrix."""
    heads, kv_heads = c.heads * c.head_width, c.key_value_heads * c.head_width
    other = {"query": heads, "out": heads, "key": kv_heads, "value": kv_heads}
    return c.width + other.get(name, c.mlp_width)


def rollout(
    c: ModelConfig, vocabulary: int, prompts: int, samples: int, length: int, new: int
) -> float:
    """FLOPs of sampling `new` tokens, none fewer, behind prompts of `length`."""
    prefill = forward(c, vocabulary, prompts * length, length, prompts)
    steps = max(new - 1, 0)
    decode = forward(c, vocabulary, prompts * samples, length + new, prompts * samples)
    return prefill.total + steps * decode.total


def weight_bytes(c: ModelConfig, vocabulary: int, tensor: int) -> float:
    """Bytes of matrices that a forward pass reads on each device, in the type it computes in."""
    size = 2 if c.dtype == "bfloat16" else 4
    return size * (c.layers * sum(matrices(c).values()) + vocabulary * c.width) / tensor


def cache_bytes(
    c: ModelConfig, rows: int, columns: int, data: int, tensor: int, stored: str = "model"
) -> float:
    """Bytes of keys and values on each device; heads that do not divide are whole everywhere.

    Layers with a sliding window keep the window alone. `stored` is `config.generate.cache`; int8
    has a float32 scale for each token and head.
    """
    kept = c.dtype if stored == "model" else stored
    size = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / c.head_width}[kept]
    near = min(columns, c.window or columns)
    columns_of_all = sum(near if sliding else columns for sliding in c.sliding_layers)
    heads = c.key_value_heads
    heads = heads / tensor if heads % tensor == 0 else heads
    return 2.0 * size * columns_of_all * rows / data * heads * c.head_width
