"""Decimal digit strings, drawn and enumerated.

A *string* of length L may start with zeros: 10^L of them. A *number* of length L has no leading
zero, except that "0" is a number of length 1: 10 numbers of length 1, 9·10^(L-1) of length L > 1.
"""

from collections.abc import Iterator

import numpy as np

DIGITS = "0123456789"


def random_strings(rng: np.random.Generator, length: int, count: int) -> list[str]:
    """`count` independent, uniform digit strings of `length`."""
    return _as_text(rng.integers(0, 10, size=(count, length), dtype=np.uint8))


def random_numbers(rng: np.random.Generator, length: int, count: int) -> list[str]:
    """`count` independent, uniform decimal numbers of exactly `length` digits."""
    digits_NxL = rng.integers(0, 10, size=(count, length), dtype=np.uint8)
    if length > 1:
        digits_NxL[:, 0] = rng.integers(1, 10, size=count, dtype=np.uint8)
    return _as_text(digits_NxL)


def all_strings(length: int) -> Iterator[str]:
    """Every digit string of `length`, in increasing order."""
    return (f"{value:0{length}d}" for value in range(count_strings(length)))


def all_numbers(length: int) -> Iterator[str]:
    """Every decimal number of exactly `length` digits, in increasing order."""
    stop = 10**length
    return (str(value) for value in range(stop - count_numbers(length), stop))


def count_strings(length: int) -> int:
    """How many digit strings have `length` characters."""
    return 10**length


def count_numbers(length: int) -> int:
    """How many decimal numbers have exactly `length` >= 1 digits."""
    return 10 if length == 1 else 9 * 10 ** (length - 1)


def is_number(text: str) -> bool:
    """Whether `text` consists of digits and has no needless leading zero."""
    return text.isascii() and text.isdigit() and (text[0] != "0" or len(text) == 1)


def least_significant_first(value: int, width: int) -> str:
    """Digits of `value` from the lowest upwards, padded with (trailing) zeros to `width`."""
    return str(value).zfill(width)[::-1]


def _as_text(digits_NxL: np.ndarray) -> list[str]:
    length = digits_NxL.shape[1]
    text = (digits_NxL + np.uint8(ord("0"))).tobytes().decode("ascii")
    return [text[start : start + length] for start in range(0, len(text), length)]
