"""The filters: those of arXiv 2502.01612 with their controls, and others, by theme.

by_form     none, discard, random, length, parses, perplexity
by_score    threshold, quantile, verifier, vote
by_prompt   best, top_k, margin, cap, oracle
by_text     duplicates, near_duplicates, diverse

They combine: `chain(verifier, near_duplicates, cap)`, `all_of(threshold, length)`. To add one,
write a function with the signature of `Function` and decorate it with `register`, or name it in a
config as "package.module:ATTRIBUTE".
"""

from karploop.filtering import by_form, by_prompt, by_score, by_text
from karploop.filtering.composition import Composition, get_filter
from karploop.filtering.registry import (
    GOLD,
    NO_VERDICT,
    SCORES,
    Filter,
    Function,
    Said,
    decide,
    register,
)

THEMES = (by_form, by_score, by_prompt, by_text)  # imported, their filters are known by name

__all__ = [
    "GOLD",
    "NO_VERDICT",
    "SCORES",
    "THEMES",
    "Composition",
    "Filter",
    "Function",
    "Said",
    "decide",
    "get_filter",
    "register",
]
