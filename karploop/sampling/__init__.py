"""Sampling and scoring on the mesh."""
