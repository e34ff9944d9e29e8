"""Judges: samples in, verdicts out. A judge may say "no verdict", which is never a number."""
