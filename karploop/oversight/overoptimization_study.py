"""What proxies and the gold reward of a known task become as runs optimise the proxy.

Runs of `configs/overoptimization.py` are read: round 0 trains a reward model, the proxy, on
comparisons that this module labels by the gold reward; round 1 samples the base for best-of-n; and
later rounds learn from the proxy. A task's gold reward is what it measures under the name "gold".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from karploop.data.tasks.base import Task
from karploop.errors import UserError
from karploop.oversight.overoptimization import best_of_n, divergence_of_best
from karploop.records import SAMPLES_FILE, VERDICTS_FILE, Opinions, Record, Samples
from karploop.store import Store
from karploop.training.experience import rewards

GOLD = "gold"
COMPARED, SAMPLED, LEARNT = 0, 1, 2  # rounds: of comparisons, of best-of-n, the first that learns

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """What is won on the way from the base, by its points in order.

    Attributes:
      distance: √KL to the base.
      proxy, gold: mean rewards less those of the base.
    """

    distance: Sequence[float]
    proxy: Sequence[float]
    gold: Sequence[float]


@dataclass(frozen=True)
class Proxy:
    """One reward model on samples of the base.

    Attributes:
      best: best-of-n, a point for each n.
      means: of the base's samples, proxy and gold.
      accuracy: how often it agrees with gold on two samples of a prompt; a tie is half right.
    """

    best: Curve
    means: tuple[float, float]
    accuracy: float


@dataclass(frozen=True)
class Found:
    """What one seed made of so many comparisons: the proxy, and by way the policies it taught."""

    proxy: Proxy
    policies: Mapping[str, Curve]


def comparisons(store: Store, task: Task, summary: Summary, count: int) -> list[dict[str, str]]:
    """A review of a run's samples: of the first two of each of the first prompts gold says which is
    better, in two rows each, until there are as many comparisons; nobody says anything of the rest.

    Prompts where a sample did not end, or both are equally good, are left out. What is left out is
    "unsure", so that no run waits for verdicts on it.

    Raises:
      UserError: there are not so many.
    """
    samples = _record(Samples, store, summary, COMPARED, "generate", SAMPLES_FILE)
    found, seen = [], set()
    for rows in _by_prompt(samples, np.ones(len(samples), bool)):
        if len(found) == 2 * count:
            break
        first, second = rows[:2].tolist()
        prompt = samples.prompts[first]
        gold_2 = _gold(task, samples, [first, second])
        if prompt in seen or not samples.finished_S[rows[:2]].all() or gold_2[0] == gold_2[1]:
            continue
        seen.add(prompt)
        better = first if gold_2[0] > gold_2[1] else second
        for row in (first, second):
            verdict = "good" if row == better else "bad"
            found.append(_review(prompt, samples.completions[row], verdict))
    if len(found) < 2 * count:
        raise UserError(
            f"{count} comparisons are wanted, and the run '{summary['run']}' has samples for "
            f"{len(found) // 2}: raise 'config.generate.prompts'"
        )
    said = {(row["prompt"], row["completion"]) for row in found}
    texts = dict.fromkeys(zip(samples.prompts, samples.completions, strict=True))
    return found + [_review(*text, "unsure") for text in texts if text not in said]


def _review(prompt: str, completion: str, verdict: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, "verdict": verdict}


def read_proxy(store: Store, task: Task, summary: Summary, ns: Sequence[int]) -> Proxy:
    """Best-of-n for each of `ns`, averaged over prompts. Samples that did not end are left out.

    Raises:
      UserError: a prompt has fewer samples than the largest n.
    """
    samples, proxy_S = _rewarded(store, summary, SAMPLED)
    best, means, right = [], [], []
    for rows in _by_prompt(samples, ~np.isnan(proxy_S)):
        gold_N = _gold(task, samples, rows)
        best.append(best_of_n(proxy_S[rows], gold_N, ns))
        means.append((proxy_S[rows].mean(), gold_N.mean()))
        right.append(agreement(proxy_S[rows], gold_N))
    base_2 = np.mean(means, 0)
    gain_nx2 = np.mean(best, 0) - base_2
    distance = [float(np.sqrt(divergence_of_best(n))) for n in ns]
    curve = Curve(distance, gain_nx2[:, 0].tolist(), gain_nx2[:, 1].tolist())
    return Proxy(curve, (float(base_2[0]), float(base_2[1])), float(np.nanmean(right)))


def agreement(proxy_N: np.ndarray, gold_N: np.ndarray) -> float:
    """How often the proxy says of the first and second, third and fourth … what gold says.

    Pairs that are equally good are not counted; NaN where all are.
    """
    even = len(proxy_N) // 2 * 2
    margins_2xP = np.stack([x[:even:2] - x[1:even:2] for x in (proxy_N, gold_N)])
    sign_2xP = np.sign(margins_2xP[:, margins_2xP[1] != 0])
    return float(0.5 + 0.5 * np.mean(sign_2xP[0] * sign_2xP[1])) if sign_2xP.size else np.nan


def read_policies(store: Store, task: Task, summary: Summary, proxy: Proxy) -> Curve:
    """The policies that learnt from a proxy, a point for each that was sampled from.

    The rewards are those of the samples that the next round learnt from; the divergence is the one
    measured on held-out prompts, from unfiltered log-probabilities, and 0 where noise puts it
    below.

    Raises:
      UserError: the run measured no divergence.
    """
    entries = {entry["round"]: entry for entry in summary["rounds"]}
    distance, gains = [0.0], [(0.0, 0.0)]
    for index in range(LEARNT + 1, max(entries) + 1):
        kl = entries[index - 1]["evals"].get(f"{task.name}/1/kl")
        if kl is None:
            raise UserError(
                f"the run '{summary['run']}' has no divergence from the base: run it again with "
                "'config.evaluate.samples' of 1 or more"
            )
        samples, proxy_S = _rewarded(store, summary, index)
        rows = np.flatnonzero(~np.isnan(proxy_S))
        found = proxy_S[rows].mean(), _gold(task, samples, rows).mean()
        gains.append((found[0] - proxy.means[0], found[1] - proxy.means[1]))
        distance.append(max(kl, 0.0) ** 0.5)
    proxies, golds = zip(*gains, strict=True)
    return Curve(distance, [float(x) for x in proxies], [float(x) for x in golds])


def _rewarded(store: Store, summary: Summary, index: int) -> tuple[Samples, np.ndarray]:
    """A round's samples, and proxy_S: NaN where there is no verdict."""
    samples = _record(Samples, store, summary, index, "generate", SAMPLES_FILE)
    verdicts = _record(Opinions, store, summary, index, "judge", VERDICTS_FILE)
    return samples, rewards(verdicts, "raw")


def _record(
    kind: type[Record], store: Store, summary: Summary, index: int, stage: str, file: str
) -> Any:
    """What a stage of a round wrote. Raises UserError: it is not there."""
    [entry] = [entry for entry in summary["rounds"] if entry["round"] == index]
    key = entry["stages"].get(stage)
    manifest = store.find(stage, key) if key else None
    if manifest is None:
        raise UserError(
            f"the run '{summary['run']}' has no result of '{stage}' in round {index} in the store: "
            "it was deleted, or the run had other settings"
        )
    return kind.from_table(pq.read_table(store.fetch(manifest, file)))


def _by_prompt(samples: Samples, chosen_S: np.ndarray) -> list[np.ndarray]:
    """The chosen rows of each prompt."""
    rows = np.flatnonzero(chosen_S)
    rows = rows[np.argsort(samples.prompt_id_S[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(samples.prompt_id_S[rows])) + 1)


def _gold(task: Task, samples: Samples, rows: Sequence[int]) -> np.ndarray:
    texts = ((samples.prompts[row], samples.completions[row]) for row in rows)
    return np.array([task.measures(*text)[GOLD] for text in texts])
