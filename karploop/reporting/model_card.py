"""The card of an exported model: how it was made, so that nobody has to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from karploop.phases import laid
from karploop.reporting.tables import (
    curves,
    escape_markdown,
    is_share,
    markdown_table,
    measured,
    round_label,
)

_COUNTS = ("samples", "kept", "label_precision")
_HINTS = (
    "Problems that it found no right answer to were asked again with the gold answer as a hint; "
    "what was right then was learnt without the hint, and the table does not count it."
)


def model_card(
    *,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    environment: Mapping[str, Any],
    round: int,
    base: str,
    files: Mapping[str, str],
    params_sha256: str,
    adapter: bool,
) -> str:
    """A README.md as model hubs show it.

    Args:
      config, summary, environment: the run's files of these names.
      round: the last round that went into the model; −1 for the base.
      base: what the run started from, as the config names it; empty: trained from scratch.
      files: SHA-256 of the base's files.
      params_sha256: of the file of parameters or adapter in the run's store.
      adapter: whether this is an adapter for the base, or a whole model.
    """
    rounds = [entry for entry in summary["rounds"] if entry["round"] <= round]
    begun = {start: of_phase for start, of_phase in laid(config).items() if start <= max(round, 0)}
    own = begun[max(begun)]
    task, train, kept = config["task"], own["train"], own["filter"]
    rank = train["lora"]["rank"]
    how = f"low-rank adapter of rank {rank}" if rank else "all parameters"
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base else {}),
        "tags": ["karploop", "self-improvement"],
    }
    sections = [
        # Values are JSON, which is YAML too; a name of anybody's choice cannot end the block.
        "---\n"
        + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
        + "\n---",
        f"# {escape_markdown(str(config['name']))}, round {round_label(round)}",
        f"{_made(base, adapter)} by a self-improvement loop: the model answers problems of "
        f"`{_code(task['name'])}`, the filter `{_code(kept['name'])}` chooses among its answers, "
        f"and it is trained on those ({how}, {train['steps']} steps a round).",
        *([_HINTS] if any(c["generate"].get("rationalise") for c in begun.values()) else []),
        *([_changes(begun, config)] if len(begun) > 1 else []),
        *([f"Not a result: {_code(summary['diagnostic'])}."] if "diagnostic" in summary else []),
        "## Data",
        _data_table(rounds, task),
        "## Held-out scores",
        _scores(rounds),
        "## How to make it again",
        f"```\n{_fenced(environment.get('command') or 'not recorded')}\n```",
        _origin(environment, params_sha256),
        *(["The base's files:", _listed(files)] if files else []),
        "The resolved config:",
        f"```json\n{_fenced(json.dumps(config, indent=1))}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _made(base: str, adapter: bool) -> str:
    if not base:
        return "Trained from scratch on labelled problems, a token a character, and then"
    return f"{'An adapter for' if adapter else 'Made from'} `{_code(base)}`"


def _listed(files: Mapping[str, str]) -> str:
    return "\n".join(f"- `{_code(name)}`, SHA-256 `{sha}`" for name, sha in sorted(files.items()))


def _changes(begun: Mapping[int, Any], config: Mapping[str, Any]) -> str:
    """What phases changed, where those sentences speak of the last."""
    told = [
        f"from {round_label(start)} on `{_code(json.dumps(config['phases'][str(start)]))}`"
        for start in begun
        if start
    ]
    return f"That is its last phase. Settings changed {', '.join(told)}."


def _data_table(rounds: list[dict[str, Any]], task: Mapping[str, Any]) -> str:
    seed = f"Labelled problems: {task['seed_problems']} at most."
    rows = []
    for entry in rounds:
        metrics = entry.get("metrics", {})
        if entry["round"] >= 0:
            rows.append([round_label(entry["round"]), *(_number(metrics.get(c)) for c in _COUNTS)])
    if not rows:
        return f"{seed} Nothing was sampled: this is the base."
    return f"{seed}\n\n{markdown_table(['round', 'samples', 'kept', 'kept that are right'], rows)}"


def _scores(rounds: list[dict[str, Any]]) -> str:
    """A table a metric: rounds by difficulty."""
    blocks = []
    for metric in measured({"rounds": rounds}):
        for task, by_difficulty in curves({"rounds": rounds}, metric).items():
            unit = "share" if is_share(metric) else "value"
            table = markdown_table(
                ["round", *(f"difficulty {d}" for d in by_difficulty)],
                [
                    [round_label(e["round"])]
                    + [_number(values.get(e["round"])) for values in by_difficulty.values()]
                    for e in rounds
                ],
            )
            blocks.append(f"{escape_markdown(f'{task}: {metric} ({unit})')}\n\n{table}")
    return "\n\n".join(blocks) or "Nothing was measured."


def _origin(environment: Mapping[str, Any], params_sha256: str) -> str:
    commit = environment.get("git_commit") or "not recorded"
    changed = " with uncommitted changes" if environment.get("git_dirty") else ""
    versions = ", ".join(f"{n} {environment[n]}" for n in ("python", "jax") if n in environment)
    return (
        f"Commit `{_code(commit)}`{changed}; {escape_markdown(versions)} on "
        f"{escape_markdown(str(environment.get('device', 'an unknown device')))}. Parameters in "
        f"the run's store: SHA-256 `{params_sha256}`."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _code(text: str) -> str:
    """Text between single backticks."""
    return " ".join(str(text).replace("`", "'").split())


def _fenced(text: str) -> str:
    """Text between fences, which it cannot close."""
    return str(text).replace("```", "'''")
