"""A reward model from the comparisons of a file: a head on a checkpoint, which may learn too."""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jax.sharding import Mesh

from karploop.compiling import command_mesh
from karploop.config import RewardConfig
from karploop.data.comparisons import Comparison, Comparisons, read_comparisons
from karploop.errors import UserError
from karploop.files import file_sha256, whole_folder, write_atomic
from karploop.jobs import identity_of
from karploop.mesh import check_batch
from karploop.models.reward_head import HEAD, RewardHead
from karploop.reporting.progress import Progress
from karploop.reporting.statistics import share_interval
from karploop.resolve import check_lora, check_reward
from karploop.roles.local import LocalModel
from karploop.roles.reward import CARD, Spelling, tuned_files
from karploop.roles.reward_learning import Texts, learn
from karploop.schema import nearest
from karploop.training.reward_head import Pairs

BASE = "base"


def run_file(config: RewardConfig, source: str, target: str, progress: Progress) -> None:
    """Trains a reward model on the comparisons of `source` and writes it into the folder `target`.

    `reward.json` there says of what checkpoint and comparisons it was made, and how often it is
    right about those that it was trained on and those held out, which have other prompts. A folder
    that already holds the same model is left as it is.

    Raises:
      UserError: anything wrong with checkpoint, comparisons or settings, before anything is
        compiled; or `target` holds something else.
    """
    folder = pathlib.Path(target)
    before = _before(folder)
    comparisons = read_comparisons(source)
    model, chat = _base(config)
    mesh = command_mesh({"config.batch": config.batch})
    _check_tuning(config, model, mesh)
    # What is trained is packed, and no text is longer than a row.
    room = 0 if config.tune == "head" else config.train.row_length
    spelling = Spelling(model, chat, room)
    kept, texts, no_room = _texts(comparisons.decided, spelling)
    held_N = np.array([c.is_held_out(config.held_out, config.seed) for c in kept], bool)
    if held_N.all():
        raise UserError(_nothing_left(source, comparisons, no_room, len(kept)))
    base = {"files": model.files(), "tokenizer": model.tokenizer.identity, "chat": chat}
    settings = _settings(config)
    of = [[c.topic, c.chosen, c.rejected] for c in kept]
    identity = identity_of(settings, base, texts, of)
    if before:
        if before != identity:
            raise UserError(
                f"'{target}' holds a reward model of another checkpoint, of other comparisons or "
                "of other settings: name another --output"
            )
        progress.say(f"'{target}' is there already")
        return
    found = learn(config, model, spelling, mesh, texts, weigh(config, kept), ~held_N, progress)
    training, held_out = (
        _measured(found.head, found.pairs, side_N, kept, texts) for side_N in (~held_N, held_N)
    )
    path = config.roles[BASE].path
    del training["low"], training["high"]  # of an accuracy on other data, which this is not
    unused = {"ties": comparisons.ties, "no_winner": comparisons.no_winner, "no_room": no_room}
    card = {
        "identity": identity,
        "base": {"path": path if path.startswith("package:") else os.path.abspath(path)} | base,
        "comparisons": {"used": len(kept)} | unused,
        "settings": settings,
        "training": training | found.reached,
        "held_out": held_out,
    }
    with whole_folder(folder) as scratch:
        card["head_sha256"] = found.head.save(scratch / HEAD)
        if found.tuned:
            found.save(model, path, scratch)
            card["tuned"] = tuned_files(scratch)
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        write_atomic(scratch / CARD, text.encode())
    progress.say(_summary(card))


def _settings(config: RewardConfig) -> dict[str, Any]:
    """What decides the result: neither the number of replies on the device, nor the place of the
    checkpoint, nor keys of what is not trained."""
    settings = asdict(config)
    unread = ("tune", "train") if config.tune == "head" else ("l2", "steps")
    for name in ("roles", "batch", *unread):
        del settings[name]
    if config.tune == "full":
        del settings["train"]["lora"]
    return settings


def _check_tuning(config: RewardConfig, model: LocalModel, mesh: Mesh) -> None:
    """Raises UserError: settings of what is trained that do not go together, or with the model."""
    check_reward(config)
    if config.tune != "head":
        check_batch(config.train.rows, mesh, "config.train.rows")
        if config.tune == "lora":
            check_lora(config.train.lora, model.config, "config.train.lora")


def _before(folder: pathlib.Path) -> str:
    """The identity of the reward model in the folder; "" where there is nothing.

    Raises:
      UserError: there is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    try:
        card = json.loads((folder / CARD).read_bytes())
        identity, whole = card["identity"], card["head_sha256"] == file_sha256(folder / HEAD)
        whole = whole and card.get("tuned", {}) == tuned_files(folder)
    except (OSError, ValueError, KeyError, TypeError):
        identity, whole = "", False
    if not whole:
        raise UserError(f"'{folder}' exists and holds no reward model: name another --output")
    return identity


def _base(config: RewardConfig) -> tuple[LocalModel, bool]:
    """The checkpoint, and whether it is asked as a chat."""
    for name in config.roles:
        if name != BASE:
            raise UserError(f"'config.roles.{name}' is not read: {nearest(name, [BASE])}")
    role = config.roles.get(BASE)
    if role is None or not role.path or role.base_url:
        raise UserError(
            f"'config.roles.{BASE}' wants a 'path' (a folder, a .gguf file, package:NAME): a "
            "reward model reads hidden states, which no server gives"
        )
    model = LocalModel.describe(role.path, dtype=config.dtype)
    if role.chat == "yes" and not model.tokenizer.has_template:
        raise UserError(
            f"'config.roles.{BASE}' is to be asked as a chat, and '{role.path}' has no chat "
            "template: leave 'chat' at auto"
        )
    return model, role.chat != "no" and model.tokenizer.has_template


def _texts(
    comparisons: Sequence[Comparison], spelling: Spelling
) -> tuple[list[Comparison], list[Texts], int]:
    """Comparisons that the context has room for, their tokens, and how many it has no room for."""
    kept, texts, no_room = [], [], 0
    for one in comparisons:
        try:
            pair = tuple(spelling.tokens(one.prompt, text) for text in (one.chosen, one.rejected))
        except UserError as error:
            raise UserError(f"{one.where}: {error}") from error
        if any(map(spelling.too_long, pair)):
            no_room += 1
        else:
            kept.append(one)
            texts.append(pair)
    return kept, texts, no_room


def _nothing_left(source: str, found: Comparisons, no_room: int, kept: int) -> str:
    if kept:
        return (
            f"'{source}': all prompts of its {kept} comparisons are held out, and there is nothing "
            "to train on: lower 'config.held_out', or take another 'config.seed'"
        )
    return (
        f"'{source}' has no comparison to train on: {found.ties} ties, {found.no_winner} without a "
        f"winner, {no_room} too long for the context"
    )


def weigh(config: RewardConfig, comparisons: Sequence[Comparison]) -> np.ndarray:
    """weights_N: 1 for each comparison, or 1/K where its prompt has K (arXiv 2203.02155 eq. 1)."""
    if config.equal == "comparisons":
        return np.ones(len(comparisons), np.float32)
    count = Counter(one.topic for one in comparisons)
    return np.array([1 / count[one.topic] for one in comparisons], np.float32)


def _measured(
    head: RewardHead,
    pairs: Pairs,
    side_N: np.ndarray,
    comparisons: Sequence[Comparison],
    texts: Sequence[Texts],
) -> dict[str, Any]:
    """How often the better one has the larger reward, and how often it is merely the longer one."""
    at = np.flatnonzero(side_N).tolist()
    margin_N = head.rewards(pairs.chosen_NxE[side_N]) - head.rewards(pairs.rejected_NxE[side_N])
    longer = [np.sign(len(texts[i][0]) - len(texts[i][1])) for i in at]
    topics = [comparisons[i].topic for i in at]
    found = share_interval((0.5 + 0.5 * np.sign(margin_N)).tolist(), topics)
    return {  # low and high: of the 95% interval
        "comparisons": found.n,
        "prompts": len(set(topics)),
        "accuracy": found.mean,
        "low": found.low,
        "high": found.high,
        "longer_is_better": float(np.mean(longer) / 2 + 0.5) if at else None,
    }


def _summary(card: dict[str, Any]) -> str:
    held, counts = card["held_out"], card["comparisons"]
    unused = counts["ties"] + counts["no_winner"] + counts["no_room"]
    text = f"{counts['used']} comparisons ({unused} more not used), "
    text += f"training accuracy {card['training']['accuracy']:.3f}, "
    if not held["comparisons"]:
        return text + "none held out"
    interval = f"{held['low']:.3f} to {held['high']:.3f}"
    return text + f"held out {held['accuracy']:.3f} ({interval}, n = {held['comparisons']})"
