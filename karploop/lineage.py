"""Where a training row came from and what it went into.

`trace_sample` goes from one sampled completion back to its prompt and to the weights that wrote it,
across to the verdict and the decision of every filter that saw it, and forward to every parameter
set that was updated on it. `trace_params` goes from parameters back to the fresh initialisation
and forward to what they generated. Both return plain dictionaries, ready for JSON.

A parameter set is trained *directly* by the rows that its own updates drew (`rows.parquet`), and
*descends* from those that its training started from, however long the chain; rows that such an
ancestor merely generated are not counted as descent.

What garbage collection removed is not computed again here: it is named, and the rest is told.

A run's stages are those in its summary, those of its other members included. The round that an
unfinished run is at has no entry there yet, and counts as nobody's.
"""

from __future__ import annotations

import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from karploop.catalogue import (
    LEARNT,
    SEED,
    Catalogue,
    Name,
    mean_exact_match,
    member_of,
    round_of,
)
from karploop.errors import UserError
from karploop.models.weights import params_sha256
from karploop.oversight.evaluate import EVALS_FILE
from karploop.records import (
    EXAMPLES_FILE,
    PROMPTS_FILE,
    SAMPLES_FILE,
    SELECTION_FILE,
    VERDICTS_FILE,
)
from karploop.schema import nearest
from karploop.store import Corrupt, Manifest
from karploop.training.train import ROWS_FILE

Trace = dict[str, Any]

_SHORTEST_PREFIX = 6


# -- a sample ------------------------------------------------------------------------------


def trace_sample(catalogue: Catalogue, identity: str) -> Trace:
    """The story of one row: `KEY:ROW`, KEY naming a generate or a seed stage, or `seed:ROW`.

    Raises:
      UserError: no such stage or row, or several stages that KEY could mean.
    """
    text, colon, number = identity.rpartition(":")
    if not colon or not number.isdecimal():
        raise UserError(
            f"'{identity}' names no sample: --sample wants KEY:ROW, a generate stage's key (or "
            f"its first {_SHORTEST_PREFIX} characters or more) and a row number from 0"
        )
    name, row = _find_source(catalogue, text), int(number)
    count = _count(catalogue, name)
    if count is not None and row >= count:
        raise UserError(f"'{identity}': {_show(name)} has the rows 0 to {count - 1}")
    origin = _seed_row(catalogue, name, row) if name[0] == SEED else _sample(catalogue, name, row)
    direct = _direct(catalogue, name, row)
    below = _descendants(catalogue, direct)
    return origin | {
        "trained": [
            _params(catalogue, n)
            | {
                "times": times,
                "completion": _trained_on(catalogue, n, name, row),
                "descends_too": n in below,
            }
            for n, times in direct.items()
        ],
        "descended": [_params(catalogue, n) for n in catalogue.trained if n in below - set(direct)],
    }


def _find_source(catalogue: Catalogue, text: str) -> Name:
    if text != SEED:
        return _find(catalogue, text, ("generate", SEED), "--sample")
    found = [name for name in catalogue.manifests if name[0] == SEED]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(key for _, key in found) or "none"
    raise UserError(f"'{SEED}' is not one stage here: give the key of one of them ({keys})")


def _find(catalogue: Catalogue, text: str, stages: tuple[str, ...], flag: str) -> Name:
    """The one stage whose key begins with `text`."""
    wanted = " or ".join(stages)
    if len(text) < _SHORTEST_PREFIX:
        raise UserError(
            f"'{text}' is too short: {flag} wants at least {_SHORTEST_PREFIX} characters"
        )
    found = [name for name in catalogue.manifests if name[1].startswith(text)]
    fitting = [name for name in found if name[0] in stages]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"'{text}' fits several: {_list(fitting)}. Give more characters")
    if found:
        raise UserError(f"'{text}' is {_list(found)}: {flag} wants the key of a {wanted} stage")
    keys = [key for stage, key in catalogue.manifests if stage in stages]
    hint = nearest(text, keys) if 0 < len(keys) < 20 else f"there are {len(keys)}"
    raise UserError(
        f"no {wanted} stage has a key that begins with '{text}' ({hint}): keys stand in a run's "
        "summary.json, and rows in a train stage's rows.parquet; or this is another --workdir"
    )


def _sample(catalogue: Catalogue, name: Name, row: int) -> Trace:
    manifest = catalogue.manifests[name]
    sample = _row(catalogue, name, SAMPLES_FILE, row) or {}
    kept = None if sample else _kept_row(catalogue, name, row)
    prompt_row = sample.get("prompt_id_S", _prompt_row(manifest, row))
    prompts = catalogue.input(name, "prompts")
    prompt = _row(catalogue, prompts, PROMPTS_FILE, prompt_row) if prompts else None
    weights = catalogue.input(name, "params")
    text = sample.get("prompts", (prompt or {}).get("prompt"))
    decisions, verdicts = _decisions(catalogue, name, row)
    return {
        "kind": "sample",
        "sample": _stage(catalogue, name)
        | {
            "row": row,
            "sample": sample.get("sample_S"),
            "completion": sample.get("completions", (kept or {}).get("completions")),
            "finished": sample.get("finished_S", True if kept else None),
            "same_content": _twins(catalogue, name),
        },
        "prompt": {"text": text, "row": prompt_row, "difficulty": (prompt or {}).get("difficulty")}
        | (_stage(catalogue, prompts) if prompts else {"stage": None, "key": None}),
        "weights": _params(catalogue, weights) if weights else None,
        "decisions": decisions,
        "other_verdicts": verdicts,
    }


def _seed_row(catalogue: Catalogue, name: Name, row: int) -> Trace:
    found = _row(catalogue, name, EXAMPLES_FILE, row) or {}
    return {
        "kind": "seed row",
        "sample": _stage(catalogue, name) | {"row": row, "completion": found.get("completions")},
        "prompt": {"text": found.get("prompts"), "difficulty": found.get("difficulty")},
        "weights": None,
        "decisions": [],
        "other_verdicts": [],
    }


def _prompt_row(manifest: Manifest, row: int) -> int | None:
    """Samples of one prompt lie side by side, in the order of the prompts."""
    samples = manifest.config.get("samples")
    return row // samples if samples else None


def _kept_row(catalogue: Catalogue, name: Name, row: int) -> dict[str, Any] | None:
    """The row as a filter kept it: where its text is left after its samples were collected."""
    for reader in catalogue.readers(name, ("filter",), "samples"):
        table = _table(catalogue, reader, EXAMPLES_FILE, filters=_is(catalogue, name, row))
        if table is not None and table.num_rows:
            return table.to_pylist()[0]
    return None


def _decisions(catalogue: Catalogue, name: Name, row: int) -> tuple[list[Trace], list[Trace]]:
    """What every filter that saw the sample did with it, and verdicts that no filter read."""
    decisions, read = [], set()
    for reader in catalogue.readers(name, ("filter",), "samples"):
        at = _place(catalogue, reader, name, row)
        decision = _row(catalogue, reader, SELECTION_FILE, at) or {}
        judge, gold = catalogue.input(reader, "verdicts"), catalogue.input(reader, "gold")
        read |= {judge, gold}
        decisions.append(
            _stage(catalogue, reader)
            | {
                "filter": catalogue.manifests[reader].config.get("name"),
                "config": catalogue.manifests[reader].config,
                "kept": decision.get("kept_S"),
                "reason": decision.get("reasons"),
                "verdict": _verdict(catalogue, judge, at) if judge else None,
                "gold": _verdict(catalogue, gold, at) if gold else None,
            }
        )
    others = [n for n in catalogue.readers(name, ("judge",), "samples") if n not in read]
    verdicts = [_verdict(catalogue, n, _place(catalogue, n, name, row)) for n in others]
    return decisions, verdicts


def _verdict(catalogue: Catalogue, name: Name, at: int | None) -> Trace:
    found = _row(catalogue, name, VERDICTS_FILE, at) or {}
    return _stage(catalogue, name) | {
        "judge": catalogue.manifests[name].config.get("judge"),
        "score": found.get("scores"),
        "reason": found.get("reasons"),
    }


def _place(catalogue: Catalogue, reader: Name, name: Name, row: int) -> int | None:
    """Where a sample stands for a stage that read all members' samples laid end to end."""
    inputs, before = catalogue.manifests[reader].inputs, 0
    for member in range(len(inputs)):
        reference = inputs[f"samples_{member}"]
        if reference["content"] == catalogue.content[name]:
            return before + row
        other = catalogue.resolve(reference)
        count = _count(catalogue, other) if other else None
        if count is None:
            return None
        before += count
    raise KeyError(name)


def _direct(catalogue: Catalogue, name: Name, row: int) -> dict[Name, int]:
    """The training stages whose updates drew this row, and how often each did."""
    found = {}
    for trained in catalogue.trained:
        if name[0] == SEED:
            seed = catalogue.manifests[trained].inputs.get(SEED)
            if not seed or seed["content"] != catalogue.content[name]:
                continue
        table = _table(catalogue, trained, ROWS_FILE, filters=_is(catalogue, name, row))
        if table is not None and table.num_rows:
            found[trained] = sum(table.column("times").to_pylist())
    return found


def _trained_on(catalogue: Catalogue, trained: Name, name: Name, row: int) -> str | None:
    """The completion as this training stage was given it: noise may have altered it."""
    given = [name] if name[0] == SEED else _kept(catalogue, trained)
    for stage in given:
        table = _table(catalogue, stage, EXAMPLES_FILE, filters=_is(catalogue, name, row))
        if table is not None and table.num_rows:
            return table.column("completions")[0].as_py()
    return None


def _descendants(catalogue: Catalogue, names: Iterable[Name]) -> set[Name]:
    """The parameter sets whose training started from one of these, or from one that did."""
    children = defaultdict(set)
    for name in catalogue.trained:
        reference = catalogue.manifests[name].inputs.get("params")
        if reference:
            children[reference["content"]].add(name)
    found: set[Name] = set()
    waiting = list(names)
    while waiting:
        new = children[catalogue.content[waiting.pop()]] - found
        found |= new
        waiting += new
    return found


# -- parameters ----------------------------------------------------------------------------


def trace_params(catalogue: Catalogue, identity: str) -> Trace:
    """The story of a parameter set: its file's SHA-256, or the key of the stage that wrote it.

    Raises:
      UserError: no such parameters, or several that `identity` could mean.
    """
    name = _find_params(catalogue, identity)
    chain, complete = _chain(catalogue, name)
    return {
        "kind": "params",
        "params": _params(catalogue, name) | {"same_content": _twins(catalogue, name)},
        "chain": [_training(catalogue, n) for n in chain],
        "chain_complete": complete,
        "generated": [
            _stage(catalogue, n) | {"samples": _count(catalogue, n)}
            for n in catalogue.readers(name, ("generate",), "params")
        ],
        "evaluated": [
            _stage(catalogue, n) | {"mean_exact_match": mean_exact_match(_evals(catalogue, n))}
            for n in catalogue.readers(name, ("evaluate",), "params")
        ],
        "trained_from_these": [
            _params(catalogue, n) for n in catalogue.readers(name, LEARNT, "params")
        ],
    }


def _find_params(catalogue: Catalogue, text: str) -> Name:
    hashes = {n: params_sha256(catalogue.manifests[n]) for n in catalogue.trained}
    by_hash = [n for n in catalogue.trained if hashes[n].startswith(text)]
    by_key = [n for n in catalogue.trained if n[1].startswith(text)]
    found = dict.fromkeys([*by_hash, *by_key])
    if len(text) < _SHORTEST_PREFIX or not found:
        try:
            return _find(catalogue, text, LEARNT, "--params")
        except UserError as error:
            raise UserError(
                f"{error}. --params also takes the SHA-256 of a params.safetensors or an "
                "adapter.safetensors; for a run of several members that is one of its summary's "
                "params_sha256_by_member"
            ) from None
    if len({hashes[n] for n in found}) > 1:
        raise UserError(f"'{text}' fits several: {_list(found)}. Give more characters")
    return max(found, key=lambda n: len(catalogue.used_by.get(n, [])))


def _chain(catalogue: Catalogue, name: Name) -> tuple[list[Name], bool]:
    """The training stages from this one back to the first, and whether none is missing."""
    chain = [name]
    while "params" in catalogue.manifests[chain[-1]].inputs:
        before = catalogue.input(chain[-1], "params")
        if before is None:
            return chain, False
        chain.append(before)
    return chain, True


def _training(catalogue: Catalogue, name: Name) -> Trace:
    """One link of the chain: what this stage trained on."""
    filters = [_filter_behind(catalogue, n) for n in _kept(catalogue, name)]
    return _params(catalogue, name) | {
        "steps": catalogue.manifests[name].config.get("steps"),
        "checkpoint": catalogue.manifests[name].config.get("files"),  # of `import`: file → SHA-256
        "rows": _rows_by_source(catalogue, name, [f for f, _ in filters if f]),
        "filters": [
            _stage(catalogue, f)
            | {
                "filter": catalogue.manifests[f].config.get("name"),
                "kept": _rows_in(catalogue, f, EXAMPLES_FILE),
                "of": _rows_in(catalogue, f, SELECTION_FILE),
                "altered_by": [_show(n) for n in between],
            }
            for f, between in filters
            if f
        ],
    }


def _kept(catalogue: Catalogue, name: Name) -> list[Name]:
    """The stages whose kept rows a training stage was given, by round."""
    roles = (r for r in catalogue.manifests[name].inputs if r.startswith("kept_"))
    found = (catalogue.input(name, r) for r in sorted(roles, key=lambda r: int(r[len("kept_") :])))
    return [n for n in found if n]


def _filter_behind(catalogue: Catalogue, name: Name) -> tuple[Name | None, list[Name]]:
    """The filter that kept a stage's rows, and what altered them on the way (noise)."""
    between: list[Name] = []
    at: Name | None = name
    while at and at[0] != "filter":
        between.append(at)
        at = catalogue.input(at, "kept")
    return at, between


def _rows_by_source(catalogue: Catalogue, name: Name, filters: list[Name]) -> list[Trace] | None:
    table = _table(catalogue, name, ROWS_FILE)
    if table is None:
        return None
    distinct: dict[str, int] = defaultdict(int)
    times: dict[str, int] = defaultdict(int)
    for source, drawn in zip(
        *(table.column(c).to_pylist() for c in ("source", "times")), strict=True
    ):
        distinct[source] += 1
        times[source] += drawn
    found = []
    for source in distinct:
        written = ("generate", source)
        manifest = catalogue.manifests.get(written)
        found.append(
            {
                "source": source,
                "round": round_of(manifest) if manifest else None,
                "member": member_of(manifest) if manifest else None,
                "distinct": distinct[source],
                "times": times[source],
                "filter": _filter_of(catalogue, written, filters) if manifest else None,
            }
        )
    return sorted(found, key=lambda f: (f["source"] != SEED, f["round"] or 0, f["source"]))


def _filter_of(catalogue: Catalogue, written: Name, filters: list[Name]) -> str | None:
    read_it = set(catalogue.readers(written, ("filter",), "samples"))
    return next((catalogue.manifests[f].config.get("name") for f in filters if f in read_it), None)


def _evals(catalogue: Catalogue, name: Name) -> dict[str, Any]:
    manifest = catalogue.manifests[name]
    if catalogue.store.gone(manifest, EVALS_FILE):
        return {}
    return json.loads(_fetch(catalogue, manifest, EVALS_FILE).read_text())


# -- reading -------------------------------------------------------------------------------


def _stage(catalogue: Catalogue, name: Name) -> Trace:
    manifest = catalogue.manifests[name]
    removed = [file for file in manifest.files if catalogue.store.gone(manifest, file)]
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "round": round_of(manifest) if manifest.rng else None,
        "member": member_of(manifest) if manifest.rng else None,
        "collected": removed,
        "runs": catalogue.used_by.get(name, []),
    }


def _params(catalogue: Catalogue, name: Name) -> Trace:
    return _stage(catalogue, name) | {"params_sha256": params_sha256(catalogue.manifests[name])}


def _twins(catalogue: Catalogue, name: Name) -> list[str]:
    same = catalogue.by_content[catalogue.content[name]]
    return [key for stage, key in same if stage == name[0] and key != name[1]]


def _is(catalogue: Catalogue, name: Name, row: int) -> list[tuple[str, str, Any]]:
    """The condition under which a row of examples or of rows.parquet is this one."""
    sources = [SEED] if name[0] == SEED else [name[1], *_twins(catalogue, name)]
    return [("source", "in", sources), ("row", "==", row)]


def _fetch(catalogue: Catalogue, manifest: Manifest, file: str) -> pathlib.Path:
    try:
        return catalogue.store.fetch(manifest, file)
    except Corrupt as error:
        raise UserError(
            f"{error}. Start a run that uses it again: the stage will be computed anew"
        ) from error


def _table(catalogue: Catalogue, name: Name, file: str, **options: Any) -> pa.Table | None:
    """A stage's table; None where it was collected, or the stage has no such table."""
    manifest = catalogue.manifests[name]
    if file not in manifest.files or catalogue.store.gone(manifest, file):
        return None
    return pq.read_table(_fetch(catalogue, manifest, file), **options)


def _row(catalogue: Catalogue, name: Name, file: str, row: int | None) -> dict[str, Any] | None:
    table = _table(catalogue, name, file) if row is not None else None
    return table.slice(row, 1).to_pylist()[0] if table is not None else None


def _rows_in(catalogue: Catalogue, name: Name, file: str) -> int | None:
    manifest = catalogue.manifests[name]
    if catalogue.store.gone(manifest, file):
        return None
    return pq.read_metadata(_fetch(catalogue, manifest, file)).num_rows


def _count(catalogue: Catalogue, name: Name) -> int | None:
    """Rows of a seed or generate stage, worked out from the prompts if they were collected."""
    if name[0] == SEED:
        return _rows_in(catalogue, name, EXAMPLES_FILE)
    count = _rows_in(catalogue, name, SAMPLES_FILE)
    prompts = catalogue.input(name, "prompts")
    samples = catalogue.manifests[name].config.get("samples")
    if count is None and prompts and samples:
        asked = _rows_in(catalogue, prompts, PROMPTS_FILE)
        count = asked * samples if asked is not None else None
    return count


def _show(name: Name) -> str:
    return f"{name[0]}/{name[1]}"


def _list(names: Iterable[Name]) -> str:
    return ", ".join(map(_show, names))
