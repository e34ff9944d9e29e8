"""A checkpoint as the reader of replies, and the folder of a trained reward model.

The folder has `head.safetensors` and `reward.json`, which says what the head was trained on. The
checkpoint is not copied; it is known by the SHA-256 of its files. What was trained of it is in
`adapter/`, as PEFT writes it, or whole in `model/`, as `transformers` does.
"""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from karploop.asking import Asked, spoken
from karploop.data.prompting import Prompting
from karploop.errors import UserError
from karploop.files import file_sha256
from karploop.judging.reward_model import Reply, RewardModel
from karploop.mesh import check_batch
from karploop.models.checkpoint import load_params, open_checkpoint
from karploop.models.peft import load_peft
from karploop.models.reward_head import HEAD, RewardHead
from karploop.models.weights import Weights
from karploop.roles.local import LocalModel
from karploop.sampling.reader import Reader

CARD = "reward.json"
ADAPTER, MODEL = "adapter", "model"  # folders


class Reads(Protocol):
    """How a model reads a prompt with its completion: to the token that ends it."""

    def tokens(self, prompt: Asked, completion: str) -> list[int]:
        """Raises UserError: the chat template refuses the prompt."""

    def too_long(self, tokens: Sequence[int]) -> str:
        """Why there is no room for so many tokens; "" where there is."""


class Spelling:
    """A checkpoint's way: by its chat template, or plainly."""

    def __init__(self, model: LocalModel, chat: bool, room: int = 0):
        """Args:
        chat: by the chat template, where a text is a user's message.
        room: most tokens, where that is less than the context has room for; 0: it is not.
        """
        self._tokenizer, self._chat = model.tokenizer, chat
        self._room = min(room or model.config.max_length, model.config.max_length)
        self._end = _end_of_turn(model) if chat else self._tokenizer.eos_id

    def tokens(self, prompt: Asked, completion: str) -> list[int]:
        """Raises UserError: the chat template refuses the prompt."""
        if self._chat:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            start = self._tokenizer.render(list(turns), add_generation_prompt=True)
        else:
            text = prompt if isinstance(prompt, str) else spoken(prompt)
            start = self._tokenizer.encode_prompt(text)
        return [*start, *self._tokenizer.encode(completion), self._end]

    def too_long(self, tokens: Sequence[int]) -> str:
        return no_room(tokens, self._room)


class AsTrained:
    """How a reward model of the loop reads: what its training rows were."""

    def __init__(self, prompting: Prompting, room: int):
        self._prompting, self._room = prompting, room

    def tokens(self, prompt: Asked, completion: str) -> list[int]:
        """Raises UserError: the chat template refuses the prompt."""
        start, end = self._prompting.example(prompt, completion)
        return [*start, *end]

    def too_long(self, tokens: Sequence[int]) -> str:
        return no_room(tokens, self._room)


def no_room(tokens: Sequence[int], room: int) -> str:
    """Why a context of so many tokens has no room for these; "" where it has."""
    if len(tokens) <= room:
        return ""
    return f"the reply takes {len(tokens)} tokens, and the context has room for {room}"


def _end_of_turn(model: LocalModel) -> int:
    """The token that ends an assistant's turn; the document's where that cannot be told."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, learnt = model.tokenizer.conversation(turns)
    except UserError:  # a template that no training row can be made with
        return model.tokenizer.eos_id
    last = ids[len(learnt) - 1 - learnt[::-1].index(True)]
    return last if last in model.tokenizer.stop_ids else model.tokenizer.eos_id


class Replies:
    """Weights on the mesh, reading replies."""

    def __init__(self, weights: Weights, params: Any, spelling: Reads, pad_id: int, batch: int):
        """`batch`: replies on the device at a time; no influence on what is read."""
        self.weights, self._params = weights, params
        self._reader = Reader(weights, pad_id)
        self._spelling, self._batch = spelling, batch

    @classmethod
    def of(cls, model: LocalModel, spelling: Spelling, mesh: Mesh, batch: int) -> Replies:
        """Lays a checkpoint on the mesh."""
        return cls(*model.load(mesh), spelling, model.tokenizer.pad_id, batch)

    def with_params(self, params: Any) -> Replies:
        """The same architecture with other parameters; what is compiled is shared."""
        replies = copy.copy(self)
        replies._params = params
        return replies

    def read(self, replies: Sequence[Reply]) -> tuple[np.ndarray, list[str]]:
        """The hidden states of those there is room for, and for each reply why there is none."""
        texts = [self._spelling.tokens(*reply) for reply in replies]
        reasons = [self._spelling.too_long(text) for text in texts]
        fitting = [text for text, reason in zip(texts, reasons, strict=True) if not reason]
        return self.hidden(fitting), reasons

    def hidden(
        self, texts: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """hidden_NxE of texts that there is room for; each text is read once."""
        distinct = {text: place for place, text in enumerate(dict.fromkeys(map(tuple, texts)))}
        hidden_DxE = self._reader.read(self._params, list(distinct), self._batch, advance)
        return hidden_DxE[[distinct[tuple(text)] for text in texts]]


@dataclass(frozen=True)
class TrainedReward:
    """A reward model in a folder, its weights not read yet."""

    path: pathlib.Path
    card: dict[str, Any]  # what is in `reward.json`
    head: RewardHead
    model: LocalModel

    @classmethod
    def describe(cls, path: str, dtype: str = "", base: str = "") -> TrainedReward:
        """Opens a folder that `experiments.reward` wrote.

        Args:
          dtype: that the checkpoint computes in; empty: as in training.
          base: where the checkpoint is now; empty: where it was.

        Raises:
          UserError: no such folder, or one that is not whole; no checkpoint there.
        """
        folder = pathlib.Path(path)
        try:
            card = json.loads((folder / CARD).read_bytes())
            head = RewardHead.load(folder / HEAD)
            whole = file_sha256(folder / HEAD) == card["head_sha256"]
            where, trained_in = card["base"]["path"], card["settings"]["dtype"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"'{path}' holds no reward model ({error}): make one with experiments.reward"
            ) from error
        model = LocalModel.describe(base or where, dtype=dtype or trained_in)
        if not whole or head.weights_E.shape != (model.config.width,):
            raise UserError(
                f"'{path}': {HEAD} is not the one that {CARD} is about: train it again, into "
                "another folder"
            )
        return cls(folder, card, head, model)

    def identity(self) -> dict[str, Any]:
        """What decides its rewards."""
        tuned = self.card.get("tuned")
        return {
            "head": self.card["head_sha256"],
            "base": self.card["base"]["files"],
            "tokenizer": self.card["base"]["tokenizer"],
            "chat": self.card["base"]["chat"],
            "dtype": self.model.config.dtype,
        } | ({"tuned": tuned} if tuned else {})

    def load(self, mesh: Mesh, batch: int) -> RewardModel:
        """Lays the checkpoint on the mesh.

        Raises:
          UserError: it is not the one that the head was trained on, or what was trained of it is
            not as it was; or `batch` does not divide.
        """
        check_batch(batch, mesh, "batch")
        recorded, model = self.card["base"], self.model
        if (model.files(), model.tokenizer.identity) != (recorded["files"], recorded["tokenizer"]):
            raise UserError(
                f"the model at '{model.path}' is not the one that '{self.path}' was trained on: "
                "put the former one back, or train again"
            )
        if tuned_files(self.path) != self.card.get("tuned", {}):
            raise UserError(
                f"'{self.path}': what is in {ADAPTER} or {MODEL} is not what {CARD} is about: "
                "train it again, into another folder"
            )
        weights, params = self._params(mesh)
        spelling = Spelling(model, recorded["chat"])
        replies = Replies(weights, params, spelling, model.tokenizer.pad_id, batch)
        return RewardModel(self.head, replies.read, self.identity())

    def _params(self, mesh: Mesh) -> tuple[Weights, Any]:
        """The architecture on the mesh, and the parameters that the head was trained with."""
        if (self.path / MODEL).exists():
            weights = Weights(self.model.config, self.model.vocabulary, mesh)
            return weights, load_params(open_checkpoint(self.path / MODEL), weights)
        weights, params = self.model.load(mesh)
        if (self.path / ADAPTER).exists():
            adapter, lora = load_peft(self.path / ADAPTER, weights)
            params = weights.merge(params, adapter, lora.scale)
        return weights, params


def tuned_files(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of each file in a reward model's folder that holds what was trained beside the
    head, by its name there."""
    found = [path for name in (ADAPTER, MODEL) for path in sorted((folder / name).glob("*"))]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in found}


def load_reward(path: str, mesh: Mesh, batch: int, dtype: str = "", base: str = "") -> RewardModel:
    """A reward model on the mesh; see `TrainedReward` for arguments and errors."""
    return TrainedReward.describe(path, dtype, base).load(mesh, batch)
