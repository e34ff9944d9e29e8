"""Which problems are held out, and drawing distinct problems from either side of the split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from karploop.data.tasks.base import Task
from karploop.errors import UserError

# Draws spent per wanted prompt before rejection sampling gives up; see `draw`.
_DRAWS_PER_PROMPT = 64
_MIN_DRAWS = 4096
# Spaces up to this size are cheap enough (seconds) to enumerate whenever rejection falls short.
_ENUMERABLE_SPACE = 2_000_000
_MAX_BATCH = 1 << 16


def is_held_out(task: Task, prompt: str, fraction: float) -> bool:
    """Whether `prompt` lies on the held-out side of the split, which holds `fraction` of all keys.

    The side depends on nothing but the SHA-256 of the task's name and the prompt's split key:
    it is the same in every process, run and Python version, so training and held-out problems are
    disjoint for ever without any list of them. The held-out side of a smaller fraction is a subset
    of that of a larger one.

    Args:
      fraction: share of the keys to hold out, in [0, 1].
    """
    digest = hashlib.sha256(f"{task.name}\n{task.split_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def draw(
    task: Task,
    difficulty: int,
    count: int,
    *,
    held_out: bool,
    fraction: float,
    rng: np.random.Generator,
    exclude: AbstractSet[str] = frozenset(),
) -> list[str]:
    """Distinct prompts from one side of the split, in random order.

    Rejection sampling; when that has used as many draws as the space has prompts, all prompts are
    enumerated instead, so the work stays within twice that of the better method. Rejection also
    stops after 4096 + 64 draws per expected acceptance, which only an `exclude` that covers nearly
    all of the space can use up.

    Args:
      difficulty: exact difficulty of every prompt.
      count: prompts wanted, at least 1. If fewer exist, all that exist are returned.
      held_out: which side of the split to draw from.
      fraction: share of keys held out, in [0, 1]; see `is_held_out`.
      exclude: prompts not to return, such as those of earlier rounds.

    Raises:
      UserError: an argument is out of range; no prompt is available; or `exclude` leaves so few
        prompts of a space too large to enumerate that rejection found less than `count`.
    """
    _check(task, [difficulty], count, fraction)
    prompts = _draw(task, difficulty, count, held_out, fraction, rng, exclude)
    return _require_any(prompts, task, [difficulty], held_out, fraction)


def draw_mixture(
    task: Task,
    difficulties: Sequence[int],
    count: int,
    *,
    held_out: bool,
    fraction: float,
    rng: np.random.Generator,
    exclude: AbstractSet[str] = frozenset(),
) -> list[str]:
    """Distinct prompts of several difficulties in equal numbers, in random order.

    Numbers per difficulty differ by at most one; which difficulties get the odd ones is random. A
    difficulty with fewer prompts than its share gives all it has, and the others share the rest
    equally. If fewer than `count` prompts exist in total, all that exist are returned.

    Args:
      difficulties: difficulties to mix; naming one twice has no effect.
      The other arguments are those of `draw`, and so are the errors raised.
    """
    _check(task, difficulties, count, fraction)
    chosen: list[str] = []
    unexhausted = list(dict.fromkeys(difficulties))
    # Each pass but the last exhausts at least one difficulty, so there are few of them.
    while unexhausted and len(chosen) < count:
        shares = _even_shares(count - len(chosen), len(unexhausted), rng)
        taken = exclude | set(chosen) if chosen else exclude
        for difficulty, share in list(zip(unexhausted, shares, strict=True)):
            found = _draw(task, difficulty, share, held_out, fraction, rng, taken)
            chosen += found
            if len(found) < share:
                unexhausted.remove(difficulty)
    _require_any(chosen, task, difficulties, held_out, fraction)
    return _shuffled(chosen, rng)


def _draw(
    task: Task,
    difficulty: int,
    count: int,
    held_out: bool,
    fraction: float,
    rng: np.random.Generator,
    exclude: AbstractSet[str],
) -> list[str]:
    """`draw` without its checks: may return an empty list, and is given `count` >= 0."""
    share = fraction if held_out else 1.0 - fraction
    if count == 0 or share == 0.0:
        return []

    def usable(prompt: str) -> bool:
        return prompt not in exclude and is_held_out(task, prompt, fraction) == held_out

    space = task.space(difficulty)
    budget = _MIN_DRAWS + math.ceil(_DRAWS_PER_PROMPT * count / share)
    found: dict[str, None] = {}  # A set that keeps its order, so that draws are reproducible.
    draws = 0
    while len(found) < count and draws < min(space, budget):
        batch = min(math.ceil((count - len(found)) / share) + 16, space, _MAX_BATCH)
        sampled = task.sample_many(rng, difficulty, batch)
        found.update((prompt, None) for prompt in sampled if usable(prompt))
        draws += batch
    if len(found) < count:
        if space > max(budget, _ENUMERABLE_SPACE):
            raise UserError(
                f"task {task.name}: {draws} draws at difficulty {difficulty} gave {len(found)} of "
                f"the {count} prompts wanted; exclude fewer prompts, ask for fewer, or change the "
                f"held-out fraction ({fraction})."
            )
        unseen = [p for p in task.prompts(difficulty) if p not in found and usable(p)]
        found.update((prompt, None) for prompt in _shuffled(unseen, rng))
    return list(found)[:count]


def _even_shares(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`total` split into `parts` integers that differ by at most one, the larger ones at random."""
    shares = np.full(parts, total // parts)
    shares[rng.permutation(parts)[: total % parts]] += 1
    return shares.tolist()


def _shuffled(prompts: list[str], rng: np.random.Generator) -> list[str]:
    return [prompts[i] for i in rng.permutation(len(prompts)).tolist()]


def _check(task: Task, difficulties: Sequence[int], count: int, fraction: float) -> None:
    if not difficulties:
        raise UserError(f"task {task.name}: no difficulty to draw from; name at least one.")
    if min(difficulties) < task.min_difficulty:
        raise UserError(
            f"task {task.name}: difficulty {min(difficulties)} does not exist; the smallest is "
            f"{task.min_difficulty}."
        )
    if count < 1:
        raise UserError(f"task {task.name}: cannot draw {count} prompts; ask for at least 1.")
    if not 0.0 <= fraction <= 1.0:
        raise UserError(
            f"task {task.name}: the held-out fraction is {fraction}; it must lie in [0, 1]."
        )


def _require_any(
    prompts: list[str], task: Task, difficulties: Sequence[int], held_out: bool, fraction: float
) -> list[str]:
    if not prompts:
        side = "held-out" if held_out else "training"
        raise UserError(
            f"task {task.name}: no {side} prompts are left at difficulty "
            f"{', '.join(map(str, difficulties))} (held-out fraction {fraction}); use larger "
            "difficulties, change the fraction, or exclude fewer prompts."
        )
    return prompts
