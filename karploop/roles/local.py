"""Models in files: what a checkpoint says of itself, and its weights on the mesh.

`LocalModel.describe` reads the one and checks it; `load` does the other. Between the two nothing
has been compiled and no weight has been read, so that whatever is wrong with prompts or settings is
said within seconds.
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from dataclasses import dataclass
from typing import Any

from etils import epath
from jax.sharding import Mesh

from karploop.config import ModelConfig
from karploop.data.prepared import Prepared, kept, prepare
from karploop.data.pretrained import (
    TOKENIZER_FILES,
    PretrainedTokenizer,
    check_fits,
    load_tokenizer,
)
from karploop.errors import UserError
from karploop.files import cache_folder, file_sha256, is_local
from karploop.models.checkpoint import (
    CONFIG,
    Checkpoint,
    load_params,
    model_config,
    open_checkpoint,
    to_json,
)
from karploop.models.weights import Weights
from karploop.roles.fetched import fetched

_PACKAGE = "package:"
_GENERATION = "generation_config.json"
_BESIDE = (  # files that go with a tokenizer's
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    _GENERATION,
)


@dataclass(frozen=True)
class LocalModel:
    """A checkpoint with its tokenizer."""

    path: pathlib.Path
    checkpoint: Checkpoint
    config: ModelConfig
    vocabulary: int  # rows of the embedding
    tokenizer: PretrainedTokenizer

    @classmethod
    def describe(cls, path: str, **execution: Any) -> LocalModel:
        """Opens a model without reading its weights.

        Args:
          path: a Hugging Face folder or a .gguf file, here or on an object store, or
            "package:NAME" for an installed package that carries a GGUF file. Joined parts and
            copies from a store are kept under XDG_CACHE_HOME or ~/.cache.
          execution: fields of ModelConfig that say how it runs: dtype, scan, remat.

        Raises:
          UserError: no such model, an unknown architecture, no tokenizer, or one that does not fit.
        """
        if path.startswith(_PACKAGE):
            file = _from_package(path.removeprefix(_PACKAGE))
        elif not is_local(path):
            file = fetched(path)
        else:
            file = pathlib.Path(path)
        checkpoint = open_checkpoint(file)
        config, vocabulary = model_config(checkpoint, **execution)
        tokenizer = _tokenizer(file, checkpoint)
        check_fits(tokenizer, vocabulary)
        return cls(file, checkpoint, config, vocabulary, tokenizer)

    def weights(self, mesh: Mesh) -> Weights:
        """The architecture on the mesh."""
        return Weights(self.config, self.vocabulary, mesh)

    def load(self, mesh: Mesh) -> tuple[Weights, Any]:
        """The same, and its parameters."""
        weights = self.weights(mesh)
        return weights, load_params(self.checkpoint, weights)

    def files(self) -> dict[str, str]:
        """The SHA-256 of every file that decides the parameters, by name."""
        if self.path.is_file():
            return {self.path.name: file_sha256(epath.Path(self.path))}
        paths = [self.path / CONFIG, *sorted(self.path.glob("*.safetensors"))]
        return {path.name: file_sha256(epath.Path(path)) for path in paths}

    def stamps(self) -> list[Any]:
        """What tells the model from another without reading its weights."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return [*stamps, self.tokenizer.identity]

    def save_tokenizer(self, folder: pathlib.Path) -> None:
        """Writes the tokenizer's files as `transformers` reads them, chat template included."""
        if self.path.is_dir():
            for name in (*TOKENIZER_FILES, *_BESIDE):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)
            return
        from karploop.models.gguf import gguf_tokenizer

        gguf_tokenizer(self.checkpoint.file).save_pretrained(folder)
        keys = ("bos_token_id", "eos_token_id")
        stops = {k: self.checkpoint.config[k] for k in keys if k in self.checkpoint.config}
        (folder / _GENERATION).write_bytes(to_json(stops))


def _from_package(name: str) -> pathlib.Path:
    from karploop.models.gguf import find_package

    return find_package(name, cache_folder())


def _tokenizer(path: pathlib.Path, checkpoint: Checkpoint) -> PretrainedTokenizer:
    if path.is_dir():
        return load_tokenizer(path)
    from karploop.models.gguf import gguf_tokenizer

    stops = checkpoint.config.get("eos_token_id")
    stops = (stops,) if isinstance(stops, int) else tuple(stops or ())
    header = hashlib.sha256(checkpoint.file.header).hexdigest()

    def make() -> Prepared:
        return prepare(gguf_tokenizer(checkpoint.file), stops, {})

    return PretrainedTokenizer(kept([header, stops], (gguf_tokenizer.__module__,), make))


def prompt_tokens(tokenizer: PretrainedTokenizer, prompt, where: str) -> list[int]:
    """A `data.rows.Prompt` as the model reads it: behind a start token, or by the chat template.

    Raises:
      UserError: the prompt is a chat and the model has no template; or ids that it does not have.
    """
    if prompt.text is not None:
        return tokenizer.encode_prompt(prompt.text)
    if prompt.messages is not None:
        return tokenizer.render(prompt.messages, add_generation_prompt=True)
    largest = max(prompt.tokens)
    if largest >= tokenizer.vocab_size:
        raise UserError(f"{where}: token {largest} is none of the model's {tokenizer.vocab_size}")
    return list(prompt.tokens)
