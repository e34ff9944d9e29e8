"""What a job will ask of the endpoints behind its roles: it is gone through with stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karploop.asking import Asked, How, Said, Scored
from karploop.endpoints.calls import CHARACTERS, Call, Reply
from karploop.endpoints.forecast import Forecast, Load, Tally
from karploop.judging.opinion import Opinion
from karploop.judging.reading import READABLE
from karploop.roles.remote import RemoteRole, read_said, read_scored

Go = Callable[[Mapping[str, Any], Tally], None]  # takes stand-ins through a job, with their tally


@dataclass(frozen=True)
class StandIn:
    """In place of a role: says what its endpoint has said before, or makes something up.

    Attributes:
      name: of the endpoint, in the tally.
      remote: the role, if it is behind an address; others cost nothing.
    """

    name: str
    remote: RemoteRole | None
    tally: Tally

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """See `Role`."""
        longest = CHARACTERS * how.max_new_tokens if self.tally.longest else 0
        made_up = Said(("x" * longest + READABLE)[-longest:] if longest else "")
        if not self.remote:
            self.tally.unsure.update(ids)
            return [made_up] * len(prompts)
        calls = zip(ids, self.remote.calls(prompts, ids, how), strict=True)
        replies = [self._reply(prompt_id, call) for prompt_id, call in calls]
        return [read_said(reply, how) if reply else made_up for reply in replies]

    def score(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Scored]:
        """See `Role`."""
        each, made_up = len(options), Scored((0.0,) * len(options))
        if not self.remote:
            return [made_up] * len(prompts)
        calls = self.remote.scoring_calls(prompts, options)
        replies = [self._reply(0, call) for call in calls]
        groups = [replies[i : i + each] for i in range(0, len(replies), each)]
        return [read_scored(group) if all(group) else made_up for group in groups]

    def scores(self, replies: Sequence[Any]) -> list[Opinion]:
        """As `RewardModel.scores`, for a judge beside others."""
        return [Opinion(0.5) for _ in replies]

    def pairs(self, pairs: Sequence[Any]) -> list[Opinion]:
        """As `RewardModel.pairs`."""
        return [Opinion(0.5, "", {}, 0.5, 0.5) for _ in pairs]

    def _reply(self, prompt_id: int, call: Call) -> Reply | None:
        """What was answered before; else the call is counted."""
        client, tally = self.remote.client, self.tally
        if reply := client.known(call):
            tally.answered[self.name] += 1
            return reply
        tally.unsure.add(prompt_id)
        tally.add({(prompt_id, self.name): Load.of(call, client.endpoint)})
        return None


def rehearse(names: Sequence[str], remote: Mapping[str, RemoteRole], go: Go) -> list[str]:
    """What to say before a job: for each endpoint what it will be asked, and what its cap allows.

    Args:
      names: all roles.
      remote: those behind an address; roles of one endpoint share its client.
      go: takes the job's course, twice: with the shortest replies and with the longest.
    """
    if not remote:
        return []
    seats: dict[Any, list[str]] = {}
    for name, role in remote.items():
        seats.setdefault(role.client, []).append(name)
    shared = {name: " and ".join(own) for own in seats.values() for name in own}
    tallies = []
    for longest in (False, True):
        tally = Tally(longest)
        stand_ins = {n: StandIn(shared.get(n, n), remote.get(n), tally) for n in names}
        try:
            go(stand_ins, tally)
        except Exception as error:  # a step of one's own that a made-up reply is too much for
            return [f"what {', '.join(remote)} will be asked is not known before ({error})"]
        tallies.append(tally)
    low, high = tallies
    lines = []
    for client, own in seats.items():
        name = shared[own[0]]
        forecast = Forecast(
            *(client.endpoint, low.of(name), high.of(name)),
            *(high.answered[name], client.spent()),
        )
        lines.append(f"{name}, '{client.endpoint.model}': {forecast}")
        if forecast.warning:
            lines.append(f"{name}: {forecast.warning}")
    return lines
