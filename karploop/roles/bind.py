"""From what a config says of roles to roles that can be asked."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jax.sharding import Mesh

from karploop.asking import Role
from karploop.config import ASKING, RoleConfig
from karploop.endpoints.calls import Endpoint, read_extra
from karploop.endpoints.client import Client
from karploop.endpoints.ledger import Ledger
from karploop.errors import UserError
from karploop.judging.reward_model import RewardModel
from karploop.roles.local import LocalModel
from karploop.roles.on_mesh import MeshRole
from karploop.roles.remote import RemoteRole
from karploop.roles.reward import CARD, TrainedReward
from karploop.schema import nearest

POLICY = "policy"


class Bound:
    """Roles by name, checked; weights are loaded when `load` is called."""

    def __init__(
        self,
        names: Iterable[str],
        configs: Mapping[str, RoleConfig],
        ledger: pathlib.Path,
        job: str,
        **execution: Any,
    ):
        """Roles that are not bound are the policy.

        Args:
          names: the roles that are wanted.
          ledger: where replies of endpoints are kept.
          job: what spending is counted for.
          execution: how models on the mesh run; see `LocalModel.describe`.

        Raises:
          UserError: a role is bound to nothing, to two things, or wanted by nobody; a checkpoint or
            an endpoint's settings that cannot be used.
        """
        wanted = {POLICY, *names} if names else set()
        for name in configs:
            if name not in wanted:
                raise UserError(
                    f"'config.roles.{name}' is asked by no step: {nearest(name, wanted)}"
                )
        self._configs = {name: configs.get(name, configs.get(POLICY)) for name in sorted(names)}
        self._models: dict[RoleConfig, LocalModel] = {}
        self._rewards: dict[RoleConfig, TrainedReward] = {}
        self._clients: dict[RoleConfig, Client] = {}
        for name, config in self._configs.items():
            where = f"'config.roles.{name if name in configs else POLICY}'"
            if config is not None and config.weights:
                raise UserError(
                    f"{where}: 'weights' are those of a loop, and this is none: name a model by "
                    "'path' or by 'base_url' and 'model'"
                )
            if config is None or bool(config.path) == bool(config.base_url):
                raise UserError(
                    f"{where} wants a model: either 'path' (a folder, a .gguf file, package:NAME) "
                    "or 'base_url' with 'model' (an OpenAI-compatible server)"
                )
            if config.path and (pathlib.Path(config.path) / CARD).is_file():
                if config not in self._rewards:
                    self._rewards[config] = TrainedReward.describe(config.path, **execution)
            elif config.path and config not in self._models:
                self._models[config] = LocalModel.describe(config.path, **execution)
                self._check_template(config, where)
            elif config.base_url and config not in self._clients:
                if not config.model:
                    raise UserError(f"{where} wants 'model', the name that the server gives it")
                self._clients[config] = Client(_endpoint(config, where), Ledger(ledger, job))

    def check(self, name: str, wanted: str) -> None:
        """Raises UserError unless the role can give what is `wanted` of it.

        Args:
          wanted: text, probabilities, distributions (over tokens, by weights), or reward.
        """
        config, where = self._configs[name], f"'config.roles.{name}'"
        if wanted == "distributions" and config.base_url:
            raise UserError(
                f"{where} is to read tokens, and a server reads texts: bind it to weights "
                "('path'), or learn from what it writes ('config.generate.chain=teacher' with "
                "'config.objective.name=sft')"
            )
        if wanted == "reward" and config not in self._rewards:
            raise UserError(
                f"{where} wants a reward model: set 'path' to a folder that experiments.reward made"
            )
        if wanted != "reward" and config in self._rewards:
            raise UserError(
                f"{where} is asked for {wanted}, and '{config.path}' is a reward model, which "
                "gives numbers alone: 'config.judge.name=reward' asks for these"
            )
        if wanted == "probabilities" and config.base_url and config.chat == "yes":
            raise UserError(
                f"{where} is to be asked as a chat, and a server says how probable a text is in "
                "plain text alone: leave 'chat' at auto, set 'config.judge.rationale', or bind the "
                "role to weights ('path')"
            )

    def probe(self, seats: Mapping[str, Collection[str]]) -> None:
        """Asks each endpoint that is to give probabilities for those of a few words.

        Args:
          seats: roles, and what is wanted of them.

        Raises:
          UserError: one of them gives none.
          RunFailed: one of them is down.
        """
        for name, wanted in seats.items():
            config = self._configs.get(name)
            if config in self._clients and "probabilities" in wanted:
                self._clients[config].check_scoring(f"'config.roles.{name}'")

    def identity(self, whole: bool = False) -> list[Any]:
        """What decides what is said: of weights, by `whole`, their files' SHA-256 or time stamps.

        The latter take no reading, and tell the same files from a copy of them.
        """
        found = []
        for name, config in self._configs.items():
            said_by = [config.base_url, config.model, config.extra, config.chat]
            if config in self._rewards:
                said_by.append(self._rewards[config].identity())
            elif config.path and whole:
                model = self._models[config]
                said_by += [model.files(), model.tokenizer.identity]
            elif config.path:
                said_by += [config.path, self._models[config].stamps()]
            found.append([name, *said_by])
        return found

    def model(self, name: str) -> LocalModel:
        """The checkpoint of a role that has one."""
        return self._models[self._configs[name]]

    @property
    def names(self) -> list[str]:
        return list(self._configs)

    @property
    def remote(self) -> dict[str, RemoteRole]:
        """The roles behind an address."""
        return {
            name: RemoteRole(self._clients[config], chat=config.chat != "no")
            for name, config in self._configs.items()
            if config in self._clients
        }

    def load(self, mesh: Mesh, batch: int) -> dict[str, Role | RewardModel]:
        """Lays weights on the mesh, those of one model once (and those below a reward again)."""
        made: dict[RoleConfig, Any] = {}
        for name, config in self._configs.items():
            if config in made:
                continue
            if config in self._rewards:
                made[config] = self._rewards[config].load(mesh, batch)
                continue
            if config.base_url:
                made[config] = self.remote[name]
                continue
            model = self._models[config]
            same = next((c for c in made if c.path == config.path and c in self._models), None)
            if same:  # asked in another way
                weights, params = made[same].weights, made[same].params
            else:
                weights, params = model.load(mesh)
            chat = config.chat != "no" and model.tokenizer.has_template
            made[config] = MeshRole(model, weights, params, chat=chat, batch=batch)
        return {name: made[config] for name, config in self._configs.items()}

    def _check_template(self, config: RoleConfig, where: str) -> None:
        if config.chat == "yes" and not self._models[config].tokenizer.has_template:
            raise UserError(
                f"{where} is to be asked as a chat, and '{config.path}' has no chat template: "
                "leave 'chat' at auto"
            )


def _endpoint(config: RoleConfig, where: str) -> Endpoint:
    extra = read_extra(config.extra, f"{where}: 'extra'")
    settings = {name: getattr(config, name) for name in ("model", *ASKING)}
    return Endpoint(base_url=config.base_url, extra=extra, **settings)
