"""Published models in small: folders as transformers writes them, with random weights."""

import pathlib

import jax
from small_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from karploop.config import MeshConfig, ModelConfig
from karploop.data.pretrained import load_tokenizer
from karploop.mesh import make_mesh
from karploop.models.checkpoint import save_checkpoint
from karploop.models.weights import Weights


def save_llama(
    folder: pathlib.Path,
    template: str | None = None,
    max_length: int = 256,
    width: int = 16,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> str:
    """Writes a Llama with a byte-level tokenizer, or another one, and returns the folder.

    Its weights are larger than initial ones, so that predictions are far from uniform.
    """
    folder.mkdir(exist_ok=True)
    (tokenizer or byte_level(template)).save_pretrained(folder)
    config = ModelConfig(
        layers=2, width=width, heads=4, kv_heads=2, head_width=8, mlp_width=32, activation="swiglu",
        positions="rope", max_length=max_length, tied=True, embedding_scale=False,
    )  # fmt: skip
    vocabulary = load_tokenizer(folder).vocab_size
    weights = Weights(config, vocabulary, make_mesh(MeshConfig(data=1)))
    params = jax.tree.map(lambda x: 3 * x, weights.init(jax.random.key(0)))
    save_checkpoint(folder, params, weights, config={"eos_token_id": 0})
    return str(folder)
