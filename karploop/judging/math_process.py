"""A process that compares answers as mathematics, by math-verify and SymPy.

What it is given was written by a model, and a few characters can ask for more than any machine has
(9^{9^9}). Python cannot interrupt such a computation, nor can math-verify's own alarm, so each
question may take some processor time, and then the kernel ends the process (`equivalence` starts
another). What is plainly too large is refused before, so that the verdict hardly ever depends on
how fast the machine is.

Reads a JSON list of one text or two a line, and answers 1 or 0: whether it is mathematics, whether
the two are the same. Run as a script, with the seconds that a question may take, it imports nothing
of karploop.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
import resource
import signal
import sys

_BYTES = 2 << 30  # of address space
_NODES = 200  # of an expression
# As in 1,234.5 and 1 234: in LaTeX a comma may part two numbers, and a blank multiply them.
_NUMBER = re.compile(r"-?(\d{1,3}([ ,]\d{3})+|\d+)([.,]\d+)?\s*%?")
_MARKED = re.compile(r"\$|\\[(\[]|\\boxed")  # where LaTeX begins, or the answer is
_COMMAND = re.compile(r"\\[A-Za-z]+\s*(\{[A-Za-z* ]+\})?")  # \frac, or \text{cm}
_WORD = re.compile(r"[^\W\d_]{2,}")
_POWER = re.compile(r"\*\*\s*(-?\d+)?")


def main(seconds: float) -> None:
    """Answers until there are no more questions; of the processor's time, each takes `seconds`."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _BYTES if hard == resource.RLIM_INFINITY else min(_BYTES, hard)
    with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run may finish what it is at
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    import math_verify  # noqa: F401  Fails here, where it cannot pass for an answer.

    answer(["1/2", "0.5"])  # the first takes longer
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(found), file=answers, flush=True)


def answer(texts: list[str]) -> bool:
    """Whether one text is mathematics, or two are the same; not where that cannot be told."""
    try:
        parsed = [_parsed(text) for text in texts]
        if any(expression is None for expression in parsed):
            return False
        return len(parsed) == 1 or _same(*parsed)
    except Exception:  # of a parser and an algebra system, on any text at all
        return False


def _same(one, two) -> bool:
    """In either direction: of x = 1 and 1, math-verify unwraps the first in one of them."""
    from math_verify import verify

    return any(verify(a, b, timeout_seconds=None) for a, b in ((one, two), (two, one)))


@functools.lru_cache(maxsize=10_000)
def _parsed(text: str):
    """The mathematics in a text, as far as it can be computed with; None: there is none.

    A text without words is an expression as a whole: of 2^{10} the 2 alone is another answer. In
    others the answer is what math-verify finds, which is the last expression as a rule.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nothing ends it
    from math_verify import parse

    def found(latex: str):
        return parse(latex, fallback_mode="no_fallback", parsing_timeout=None)

    whole = not _MARKED.search(text) and not _WORD.search(_COMMAND.sub("", text))
    expressions = [] if whole and not _NUMBER.fullmatch(text) else found(text)
    if whole and not expressions:
        latex = _POWER.sub(lambda m: f"^{{{m[1]}}}" if m[1] else "^", text.strip("* "))
        expressions = found(f"${latex}$")
    return expressions[0] if expressions and _manageable(expressions[0]) else None


def _manageable(expression) -> bool:
    """Whether it is small, also when worked out, and nothing that may take for ever to do."""
    from sympy import Derivative, Integral, Limit, Product, Sum, preorder_traversal

    endless = (Derivative, Integral, Limit, Product, Sum)
    for count, node in enumerate(preorder_traversal(expression)):
        if count >= _NODES or isinstance(node, endless):
            return False
    return _size(expression) < math.inf


def _size(expression) -> float:
    """About the most that can come of it or its parts; inf beyond what a float holds."""
    from sympy import Add, Mul, Number, Pow, factorial, oo

    sizes = [_size(part) for part in getattr(expression, "args", ())]
    try:
        if expression in (oo, -oo):  # the end of an interval
            return 1.0
        if isinstance(expression, Number):
            return max(abs(float(expression)), float(getattr(expression, "q", 1)), 1.0)
        if isinstance(expression, Pow):
            return max(sizes[0], 2.0) ** sizes[1]
        if isinstance(expression, factorial):
            return math.gamma(sizes[0] + 1)
        if isinstance(expression, Mul):
            return math.prod(sizes)
        return sum(sizes) if isinstance(expression, Add) else max(sizes, default=10.0)
    except OverflowError:
        return math.inf


if __name__ == "__main__":
    main(float(sys.argv[1]))
