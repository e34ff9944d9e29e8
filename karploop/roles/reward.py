"""A checkpoint as the reader of replies, and the folder of a trained reward model.

The folder has `head.safetensors` and `reward.json`, which says what the head was trained on. The
checkpoint is not copied; it is known by the SHA-256 of its files.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError

from karploop.asking import Asked, spoken
from karploop.errors import UserError
from karploop.files import file_sha256
from karploop.judging.reward_model import Reply, RewardModel
from karploop.mesh import check_batch
from karploop.models.reward_head import RewardHead
from karploop.roles.local import LocalModel
from karploop.sampling.reader import Reader

HEAD, CARD = "head.safetensors", "reward.json"


class Spelling:
    """How a model reads a prompt with its completion: to the token that ends it."""

    def __init__(self, model: LocalModel, chat: bool):
        """`chat`: by the chat template, where a text is a user's message."""
        self._tokenizer, self._chat = model.tokenizer, chat
        self._room = model.config.max_length
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
        """Why the context has no room for so many tokens; "" where it has."""
        if len(tokens) <= self._room:
            return ""
        return f"the reply takes {len(tokens)} tokens, and the context has room for {self._room}"


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
    """A checkpoint's weights on the mesh, reading replies."""

    def __init__(self, model: LocalModel, spelling: Spelling, mesh: Mesh, batch: int):
        """`batch`: replies on the device at a time; no influence on what is read."""
        self.weights, self._params = model.load(mesh)
        self._reader = Reader(self.weights, model.tokenizer.pad_id)
        self._spelling, self._batch = spelling, batch

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
        return {
            "head": self.card["head_sha256"],
            "base": self.card["base"]["files"],
            "tokenizer": self.card["base"]["tokenizer"],
            "chat": self.card["base"]["chat"],
            "dtype": self.model.config.dtype,
        }

    def load(self, mesh: Mesh, batch: int) -> RewardModel:
        """Lays the checkpoint on the mesh.

        Raises:
          UserError: it is not the one that the head was trained on; or `batch` does not divide.
        """
        check_batch(batch, mesh, "batch")
        recorded, model = self.card["base"], self.model
        if (model.files(), model.tokenizer.identity) != (recorded["files"], recorded["tokenizer"]):
            raise UserError(
                f"the model at '{model.path}' is not the one that '{self.path}' was trained on: "
                "put the former one back, or train again"
            )
        replies = Replies(model, Spelling(model, recorded["chat"]), mesh, batch)
        return RewardModel(self.head, replies.read, self.identity())


def load_reward(path: str, mesh: Mesh, batch: int, dtype: str = "", base: str = "") -> RewardModel:
    """A reward model on the mesh; see `TrainedReward` for arguments and errors."""
    return TrainedReward.describe(path, dtype, base).load(mesh, batch)
