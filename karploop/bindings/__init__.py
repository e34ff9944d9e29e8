"""One method a stage: which function it runs, on which sub-config, from which inputs.

What is passed as `config` to a stage is what its result depends on, and nothing else; a key left
out (a batch size, how often to save) can change without computing anything again.
"""

from __future__ import annotations

from karploop.bindings.judging import Judging
from karploop.bindings.measuring import Measuring
from karploop.bindings.sampling import Sampling
from karploop.bindings.shared import BASE, Round
from karploop.bindings.training import Training
from karploop.stages import Artifact


class Bindings(Sampling, Judging, Training, Measuring):
    """The stages of one run. See the module docstring."""


def by_member(stage: str, artifacts: dict[int, Artifact]) -> dict[str, Artifact]:
    """A round's artifacts by name: 'train' for the first member, 'train.1' for the second, …"""
    return {f"{stage}.{m}" if m else stage: artifact for m, artifact in artifacts.items()}


__all__ = ["BASE", "Bindings", "Round", "by_member"]
