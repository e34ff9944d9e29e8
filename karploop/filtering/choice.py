"""Which filter a config asks for, whose verdicts it reads, and its settings in a round."""

from __future__ import annotations

import dataclasses
from typing import Any

from karploop.config import MODELS, TALLIES, Config, FilterConfig
from karploop.errors import UserError
from karploop.filtering.filters import SCORES, Filter, get_filter
from karploop.resolve import pairs_labelled


def choose(config: Config) -> tuple[Filter, Filter | None]:
    """The filter, and the one whose yield it is to match, if any.

    Raises:
      UserError: no such filter, one that has no yield to set, gold labels without permission, or
        more votes than voters.
    """
    chosen = get_filter(config.filter.name)
    matched = None
    if config.filter.match:
        matched = get_filter(config.filter.match, "config.filter.match")
        if chosen.parts != (chosen,) or "count" not in (chosen.keys or ()):
            raise UserError(
                f"'config.filter.match' sets how many rows are kept, and the filter "
                f"'{chosen.name}' does not let it: leave it empty or take a filter by itself that "
                "reads 'count' (random, quantile, diverse, oracle)"
            )
    if not config.filter.allow_gold and reads_gold(chosen, matched):
        raise UserError(
            f"the filter '{chosen.name}' selects by gold labels, which makes a diagnostic and no "
            "result: set 'config.filter.allow_gold=True' if that is meant"
        )
    if config.filter.votes > voters(config):
        raise UserError(
            f"'config.filter.votes' is {config.filter.votes}, and {voters(config)} vote on a "
            "prompt: lower it, or raise 'config.generate.samples' (or 'config.members', where "
            "'config.judge.voters=members')"
        )
    return chosen, matched


def reads_gold(chosen: Filter, matched: Filter | None) -> bool:
    """Whether gold labels decide what is selected other than through the judge `verifier`."""
    return chosen.reads_gold or bool(matched and matched.reads_gold)


def judges(chosen: Filter, matched: Filter | None) -> frozenset[str]:
    """The judges that the filter, or the one that it is matched with, declares."""
    return chosen.judges | (matched.judges if matched else frozenset())


def judge_name(config: Config, chosen: Filter, matched: Filter | None) -> str:
    """The judge whose verdicts filters or the objective read; empty: none's.

    Raises UserError: the config names another one, none where one is wanted, or the filters read
    several.
    """
    asked, declared = config.judge.name, sorted(judges(chosen, matched) - {SCORES})
    name = config.filter.match or config.filter.name
    reader = f"the filter '{name}'" if SCORES in judges(chosen, matched) else ""
    if not reader and config.objective.scored and not pairs_labelled(config):
        reader = f"the objective '{config.objective.name}'"
    if reader and not asked and (len(declared) != 1 or "filter" in reader):
        known = declared or [*MODELS, *TALLIES]
        raise UserError(
            f"{reader} reads scores, and 'config.judge.name' says nobody's: "
            f"set it to one of {', '.join(known)}"
        )
    read = sorted({*declared, *([asked] if reader and asked else [])})
    if len(read) > 1:
        raise UserError(
            f"the filter '{name}' reads the judges {' and '.join(map(repr, read))}, and a round "
            "has the verdicts of one: leave out the filters of all but one, or, for gold labels "
            "in a diagnostic, take 'oracle' in place of 'verifier'"
        )
    if asked not in ("", *read):
        reads = f"the judge '{read[0]}'" if read else "no judge"
        raise UserError(
            f"'config.judge.name' is '{asked}', and the filter '{name}' reads {reads}: "
            "leave it empty, or take a filter of scores (threshold, quantile, best)"
        )
    return read[0] if read else ""


def voters(config: Config) -> int:
    """How many votes are counted on a prompt, by `config.judge.voters`."""
    return config.generate.samples * (config.members if config.judge.voters == "members" else 1)


def at_round(config: Config, index: int) -> FilterConfig:
    """The filter's settings in a round (from 0), with what depends on the round or on other groups.

    The threshold rises by `threshold_step` a round up to `threshold_last` (as the thresholds of
    ReST's improvement steps do, arXiv 2308.08998); votes become the share of them.
    """
    found = config.filter
    raised = min(found.threshold + found.threshold_step * index, found.threshold_last)
    threshold = round(raised, 9) if found.threshold_step else found.threshold
    agreement = found.votes / voters(config) if found.votes else found.agreement
    return dataclasses.replace(found, threshold=threshold, agreement=agreement)


def settings(chosen: Filter, matched: Filter | None, config: FilterConfig) -> dict[str, Any]:
    """What of the config decides the selection: the keys that the filters declare.

    Under a key of FilterConfig stands its value, as it is there but for what `at_round` sets, so
    that `Catalogue.reach` can tell whose a stage may be.
    """
    found = chosen.settings(config) | {"name": config.name}
    if matched:  # its yield is in place of these
        found = {key: value for key, value in found.items() if key not in ("count", "rate")}
        found |= {"match": config.match, "matched": matched.settings(config)}
    return found
