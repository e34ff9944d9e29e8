"""Filters that compare texts: copies, near copies, and what differs most.

Texts are compared within their prompt, or with all (`among`). A completion that did not end takes
nobody's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from karploop.config import FilterConfig
from karploop.filtering.registry import chosen_rows, decide, register, wanted
from karploop.records import Samples, Selection

_FEATURES = 2**14  # that the pieces of texts are hashed to
_HASHES = 128  # of a MinHash
_SEED = 1  # of its permutations, the same for every run
_STRICTEST = 0.9  # bound for candidates: above it the hashes would be in too few bands
_RECALL = (0.1, 0.9)  # weights of false positives, which are checked, and of false negatives


@register("duplicates", keys=("among",))
def duplicates_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the first of equal completions."""
    seen: dict[tuple[str, str], int] = {}
    groups = _groups(samples, config)
    for row in np.flatnonzero(samples.finished_S).tolist():
        seen.setdefault((groups[row], samples.completions[row]), row)
    first_S = chosen_rows(samples, list(seen.values()))
    return decide(samples, (first_S, "a copy"), kept="no copy")


@register("near_duplicates", keys=("among", "shingle", "shingle_size", "similarity"))
def near_duplicates_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Drops what is like a completion that is kept before it, in the order of the rows.

    Alike are texts whose sets of shingles (runs of `shingle_size` characters or words) have a
    Jaccard similarity of `similarity` or more. Candidates come from MinHash (Broder 1997) with
    locality-sensitive hashing, which may miss a pair close to the bound, and are then compared
    exactly: what is dropped is alike.
    """
    from datasketch import MinHash, MinHashLSH

    rows = np.flatnonzero(samples.finished_S).tolist()
    groups = _groups(samples, config)
    # A shingle carries its group: texts of different groups have none in common.
    shingles = {r: shingled(samples.completions[r], config, groups[r]) for r in rows}
    hashes = MinHash.bulk(
        [[shingle.encode() for shingle in sorted(shingles[r])] for r in rows],
        num_perm=_HASHES,
        seed=_SEED,
    )
    bound = min(config.similarity, _STRICTEST)
    index = MinHashLSH(threshold=bound, num_perm=_HASHES, weights=_RECALL)
    kept = []
    for row, hashed in zip(rows, hashes, strict=True):
        candidates = index.query(hashed)
        if any(jaccard(shingles[row], shingles[r]) >= config.similarity for r in candidates):
            continue
        index.insert(row, hashed)
        kept.append(row)
    return decide(
        samples, (chosen_rows(samples, kept), "much like one before it"), kept="like none before it"
    )


@register("diverse", keys=("among", "shingle", "shingle_size", "rate", "count"))
def diverse_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps texts far from each other: one after the other, each the farthest from those so far.

    This greedy choice is within a factor of two of the best covering (Gonzalez 1985). Texts are
    hashed counts of runs of up to `shingle_size` characters or words; their distance is one minus
    the cosine. Those of different groups are farther apart than any of one group, so that each
    prompt has its first text before one has its second. Equally far ones are drawn.
    """
    rows = rng.permutation(np.flatnonzero(samples.finished_S))
    kept_S = chosen_rows(samples, _farthest(samples, rows, config, wanted(config, samples)))
    return decide(samples, (kept_S, "too close to those kept"), kept="far from the others")


def _farthest(samples: Samples, rows: np.ndarray, config: FilterConfig, count: int) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    if not len(rows):
        return rows
    vectorizer = HashingVectorizer(
        analyzer="char" if config.shingle == "characters" else "word",
        token_pattern=r"\S+",
        ngram_range=(1, config.shingle_size),
        lowercase=False,
        n_features=_FEATURES,
        alternate_sign=False,
    )
    vectors = vectorizer.transform([samples.completions[row] for row in rows])
    groups = np.unique([_groups(samples, config)[row] for row in rows], return_inverse=True)[1]
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    parts = [vectors[places] for places in members]
    distance_N = np.full(len(rows), np.inf)  # of each row to those chosen in its group
    chosen = []
    for _ in range(min(count, len(rows))):
        place = int(np.argmax(distance_N))
        chosen.append(place)
        group = groups[place]
        to_it_M = 1 - parts[group] @ vectors[place].toarray().ravel()
        distance_N[members[group]] = np.minimum(distance_N[members[group]], to_it_M)
        distance_N[place] = -np.inf
    return rows[chosen]


def shingled(text: str, config: FilterConfig, group: str = "") -> set[str]:
    """The runs of `shingle_size` characters or words of a text; the text, where it is shorter."""
    units: Sequence[str] = text if config.shingle == "characters" else text.split()
    joint = "" if config.shingle == "characters" else " "
    starts = range(max(len(units) - config.shingle_size, 0) + 1)
    return {f"{group}\0{joint.join(units[i : i + config.shingle_size])}" for i in starts}


def jaccard(one: set[str], other: set[str]) -> float:
    """The share of the elements of two sets that is in both."""
    return len(one & other) / len(one | other)


def _groups(samples: Samples, config: FilterConfig) -> list[str]:
    """Of each row, whose texts it is compared with."""
    return samples.prompts if config.among == "prompt" else [""] * len(samples)
