"""The roles of a loop: its own weights at some round, another checkpoint, or a model elsewhere."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from karploop.asking import Role
from karploop.config import Config, RoleConfig
from karploop.data.prompting import Prompting
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import RunFailed, UserError
from karploop.files import cache_folder
from karploop.judging.reward_model import RewardModel
from karploop.models.reward_head import HEAD, RewardHead
from karploop.models.weights import Weights
from karploop.roles.bind import POLICY, Bound
from karploop.roles.local import LocalModel
from karploop.roles.on_mesh import MeshRole, Speaker
from karploop.roles.remote import RemoteRole
from karploop.roles.reward import AsTrained, Replies
from karploop.schema import nearest

ASCII = CharTokenizer.ascii().alphabet
REWARD = "reward"
_ROUND = re.compile(r"round:(\d+)")
_OWN = RoleConfig(weights=POLICY)


def check_reward_models(rounds: Sequence[Config]) -> None:
    """Refuses a loop that judges by a reward model of its own before it can have trained one.

    Args:
      rounds: the config of each round, from the first on.

    Raises:
      UserError: there is such a round.
    """
    trained = False
    for index, config in enumerate(rounds):
        judge = config.judge
        judges = judge.name == REWARD or (judge.name == "ensemble" and REWARD in judge.members)
        own = [name for name, role in config.roles.items() if role.weights == REWARD]
        if judge.name == REWARD:
            own = [name for name in own if name == judge.role]
        if judges and own and not trained:
            raise UserError(
                f"'config.roles.{own[0]}.weights=reward' is the newest reward model that the loop "
                f"has trained, and before round {index}, which judges by it, no round has "
                "'config.objective.name=reward': let an earlier one have it, with another judge, "
                "or set 'path' to a folder that experiments.reward made"
            )
        trained |= config.objective.name == REWARD


class LoopRoles:
    """The roles that a stage asks, checked; weights are loaded when `load` is called."""

    def __init__(
        self,
        seats: Sequence[str],
        configs: Mapping[str, RoleConfig],
        policy: Speaker,
        batch: int,
        dtype: str,
        chat: bool,
        job: str,
        prompting: Prompting,
        readers: Sequence[str] = (),
    ):
        """A seat that is not bound is the policy, as it is in that round.

        Args:
          seats: names of the roles that are asked.
          readers: of those that read tokens; see `params`.
          chat: whether the seat of the policy itself is asked as a chat, as in sampling.
          policy: what is trained.
          batch: prompts on the device at a time.
          job: what spending is counted for.
          prompting: how the policy is asked, and reward models are that were trained from it.

        Raises:
          UserError: a role is bound to nothing, to two things, or wanted by nobody; a model that
            reads the characters of its task alone is to answer questions.
        """
        asked, seats = set(seats), tuple(dict.fromkeys([*seats, *readers]))
        for name in configs:
            if name not in {POLICY, *seats}:
                raise UserError(
                    f"'config.roles.{name}' is asked by nothing in this run: "
                    f"{nearest(name, {POLICY, *seats})}"
                )
        self.seats, self._policy, self._batch = seats, policy, batch
        bound = {name: configs[name] for name in seats if name in configs and name != POLICY}
        if POLICY in seats:
            bound[POLICY] = RoleConfig(weights=POLICY, chat="yes" if chat else "no")
        elsewhere = {name: c for name, c in bound.items() if c.path or c.base_url}
        self._own = {name: bound.get(name, _OWN) for name in seats if name not in elsewhere}
        for name, config in self._own.items():
            self._check_own(name, config, name in asked)
        self._loaded: dict[str, Role] | None = None
        self._compiled: dict[bool, MeshRole] = {}  # by whether it is asked as a chat
        self._prompting, self._replies = prompting, None
        ledger = cache_folder() / "responses.sqlite"
        self._elsewhere = Bound(elsewhere, elsewhere, ledger, job, dtype=dtype)
        if self.remote and jax.process_count() > 1:
            raise UserError(
                "a model behind an address is asked by one process, and this run has "
                f"{jax.process_count()}: bind the role to weights ('path')"
            )

    def _check_own(self, name: str, config: RoleConfig, asked: bool) -> None:
        where = f"'config.roles.{name}'"
        if not config.weights or config != RoleConfig(weights=config.weights, chat=config.chat):
            raise UserError(
                f"{where} wants a model: 'weights' (policy, base, round:N or reward), 'path', or "
                "'base_url' with 'model'"
            )
        if config.weights == REWARD:
            if config.chat != "auto":
                raise UserError(
                    f"{where} is a reward model, which reads texts as it was trained on them: "
                    "leave 'chat' at auto"
                )
            return
        if config.weights not in (POLICY, "base") and not _ROUND.fullmatch(config.weights):
            raise UserError(
                f"{where}: 'weights' is '{config.weights}': write policy, base, round:N, or reward"
            )
        alphabet = getattr(self._policy.tokenizer, "alphabet", ASCII)
        if asked and set(ASCII) - set(alphabet):
            raise UserError(
                f"{where} is to be answered by the policy, which reads the characters of its task "
                "alone: bind the role to a checkpoint ('path') or an address ('base_url' and "
                "'model'), or set 'config.model.alphabet' to ascii"
            )
        if config.chat == "yes" and not self._policy.tokenizer.has_template:
            raise UserError(
                f"{where} is to be asked as a chat, and '{self._policy.path}' has no chat "
                "template: leave 'chat' at auto"
            )

    def check(self, name: str, wanted: str) -> None:
        """Raises UserError unless the role can give what is `wanted`; see `Bound.check`."""
        if name not in self._own:
            self._elsewhere.check(name, wanted)
        elif (wanted == REWARD) != (self._own[name].weights == REWARD):
            where = f"'config.roles.{name}'"
            if wanted == REWARD:
                raise UserError(
                    f"{where} wants a reward model: set 'path' to a folder that experiments.reward "
                    "made, or 'weights' to reward, for one that the loop has trained"
                )
            raise UserError(
                f"{where} is asked for {wanted}, and 'weights=reward' is a reward model, which "
                "gives numbers alone: 'config.judge.name=reward' asks for these"
            )

    @property
    def remote(self) -> dict[str, RemoteRole]:
        """The roles behind an address."""
        return self._elsewhere.remote

    def probe(self, seats: Mapping[str, Collection[str]]) -> None:
        """Asks endpoints whether they can give probabilities; see `Bound.probe`."""
        self._elsewhere.probe(seats)

    def identity(self, seats: Iterable[str]) -> list[Any]:
        """What decides what `seats` say, but for the loop's own parameters (see `inputs`)."""
        wanted = set(seats)
        own = [
            [n, dataclasses.asdict(c), *([self._prompting.identity] * (c.weights == REWARD))]
            for n, c in self._own.items()
            if n in wanted
        ]
        return own + [one for one in self._elsewhere.identity(whole=True) if one[0] in wanted]

    def inputs(
        self, seats: Iterable[str], history: Sequence[Any], rewards: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """For each of `seats` that the loop's own weights answer, the artifact they are in.

        Args:
          history: the base, and then the parameters after each round so far.
          rewards: the reward models so far.

        Raises:
          RunFailed: a reward model is asked, and no round found pairs to train one.
        """
        own = {name: self._own[name] for name in seats if name in self._own}
        found = {}
        for name, config in own.items():
            if config.weights == REWARD and not rewards:
                raise RunFailed(
                    f"'config.roles.{name}.weights=reward' is a reward model that the loop has "
                    "trained, and it has trained none: no round with 'config.objective.name=reward'"
                    " found a pair"
                )
            of_policy = config.weights != REWARD
            found[f"role_{name}"] = (
                history[_place(config, len(history))] if of_policy else rewards[-1]
            )
        return found

    def load(self, weights: Weights, mesh: Mesh, inputs: Mapping[str, Any]) -> dict[str, Role]:
        """Lays on the mesh what is not there yet, where it stays; the policy's own weights are."""
        roles = dict(self._there(mesh))
        own = {name: c for name, c in self._own.items() if f"role_{name}" in inputs}
        for name, config in own.items():
            if config.weights == REWARD:
                roles[name] = self._reward_model(weights, inputs[f"role_{name}"])
                continue
            chat = config.chat != "no" and self._policy.tokenizer.has_template
            if chat not in self._compiled:
                batch = self._batch
                self._compiled[chat] = MeshRole(self._policy, weights, None, chat=chat, batch=batch)
            params = weights.load(inputs[f"role_{name}"])
            roles[name] = self._compiled[chat].with_params(params)
        return roles

    def model(self, name: str) -> LocalModel | None:
        """The checkpoint that a role is bound to; None: it is the loop's own weights."""
        return None if name in self._own else self._elsewhere.model(name)

    def params(self, name: str, weights: Weights, inputs: Mapping[str, Any]) -> Any:
        """The parameters of a role that reads tokens; shared buffers, not to be donated.

        Args:
          weights: of the policy, where the loop's own are what is read with.
        """
        if name in self._own:
            return weights.load(inputs[f"role_{name}"])
        return self._there(weights.mesh)[name].params

    def _there(self, mesh: Mesh) -> Mapping[str, Role]:
        """The roles that are not the loop's own, laid on the mesh once."""
        if self._loaded is None:
            self._loaded = self._elsewhere.load(mesh, self._batch)
        return self._loaded

    def _reward_model(self, weights: Weights, artifact: Any) -> RewardModel:
        """One that a round has trained, with the policy's architecture."""
        if self._replies is None:
            spelling = AsTrained(self._prompting, weights.model.config.max_length)
            pad_id = self._prompting.tokenizer.pad_id
            self._replies = Replies(weights, None, spelling, pad_id, self._batch)
        replies = self._replies.with_params(weights.load(artifact))
        head = RewardHead.load(artifact.path(HEAD))
        return RewardModel(head, replies.read, {"reward": artifact.content})


def _place(config: RoleConfig, known: int) -> int:
    """Where in the history of parameters a role's are."""
    if config.weights == "base":
        return 0
    found = _ROUND.fullmatch(config.weights)
    return min(int(found[1]) + 1, known - 1) if found else known - 1
