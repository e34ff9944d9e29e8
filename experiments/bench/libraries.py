"""The libraries that the benchmark knows, and which of its workloads they are asked for."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from karploop.errors import UserError

OURS = "karploop"
_SAMPLING = ("w1", "w2", "w3")
COMPARED = (*_SAMPLING, "score", "sft", "sft_lora", "dpo", "grpo")


@dataclass(frozen=True)
class Peer:
    """A library: the module that asks it, what has to be installed, what it is asked for.

    `dtype` is what it computes with, where that is not the config's.
    """

    module: str
    packages: Sequence[str]
    workloads: Sequence[str] = COMPARED
    dtype: str = ""

    def versions(self) -> dict[str, str]:
        """Raises UserError: something is not installed."""
        try:
            return {name: importlib.metadata.version(name) for name in self.packages}
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"'{error.name}' is not installed: pip install {' '.join(self.packages)}, or leave "
                "what wants it out of --peers"
            ) from error


PEERS = {
    OURS: Peer("", ("jax",)),
    "transformers": Peer("torch_peer", ("torch", "transformers", "peft")),
    "llama.cpp": Peer("llama_peer", ("llama-cpp-python",), _SAMPLING, "the file's"),
    "tunix": Peer("tunix_peer", ("google-tunix", "jax"), (*_SAMPLING, "sft")),
}
