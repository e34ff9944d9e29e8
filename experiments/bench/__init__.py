"""How fast a model samples, scores and learns here: `python -m experiments.bench`."""
