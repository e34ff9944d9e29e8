"""Filters: (samples, verdicts) to a selection, with a reason for every row kept or dropped."""
