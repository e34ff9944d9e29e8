"""The workloads by name, known before anything that takes seconds to import is imported."""

from __future__ import annotations

from collections.abc import Collection

from karploop.errors import UserError
from karploop.schema import nearest

RATES = "rates"  # a process of its own, too: what the machine can do
WORKLOADS = {
    "w1": "32 prompts of 64 tokens, 64 new each",
    "w2": "1 prompt of 64 tokens, 128 new",
    "w3": "8 prompts of 256 tokens, 8 samples each of 64 new",
    "w4": "64 prompts of 16 to 512 tokens, 1 to 256 new, geometric, 16 at a time",
    "score": "64 texts of 256 tokens, all scored but the first",
    "score_prefix": "64 texts of 64 tokens behind the same 192",
    "sft": "one step on 8 rows of 128 tokens, all parameters",
    "sft_lora": "one step on 8 rows of 128 tokens, an adapter",
    "dpo": "reference and one step on 4 pairs of 128 tokens",
    "grpo": "4 prompts of 64 tokens, 4 samples each of 32 new, and one step on them",
    "loop": "rounds of a whole loop",
    "in_loop": "sampling in a loop's stage, beside the sampler alone",
    "start": "from the command to the first tokens of w1",
    "start_one": "from the command to the first token of w2",
}
STARTS = {"start": "w1", "start_one": "w2"}  # and whose first tokens they wait for


def chosen(text: str, known: Collection[str] = tuple(WORKLOADS)) -> list[str]:
    """The workloads of a comma-separated list, in its order; all that are known where it is empty.

    Raises:
      UserError: there is no such workload; names the nearest.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--workloads has '{name}': {nearest(name, known)}")
    return list(dict.fromkeys(names)) or list(known)
