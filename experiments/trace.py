"""Traces a sample or a parameter set to its origins, and forward to what it went into.

python -m experiments.trace --workdir=DIR --sample=KEY:ROW [--json]
python -m experiments.trace --workdir=DIR --params=HASH [--json]

KEY is a generate stage's key, as in `summary.json` and `rows.parquet`, or its first 6 characters or
more; `seed:ROW` is a row of the labelled data (with the seed stage's key where there are several).
HASH is the SHA-256 of a params.safetensors or adapter.safetensors, the key of the stage that wrote
it, or the beginning of either.
"""

import json
from typing import Any

from absl import flags

from karploop import cli
from karploop.catalogue import read_catalogue
from karploop.errors import UserError
from karploop.lineage import trace_params, trace_sample
from karploop.store import Store

Trace = dict[str, Any]
Tree = tuple[str, list["Tree"]]  # a line of text and what hangs below it

_SHOWN = 12  # characters of a key or hash

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", "workdir", "Where the store and the runs are: a path or s3://, gs://."
    )
    flags.DEFINE_string("sample", None, "KEY:ROW of a sample.")
    flags.DEFINE_string(
        "params", None, "SHA-256 of parameters, or key of the stage that wrote them."
    )
    flags.DEFINE_bool("json", False, "Print JSON instead of a tree.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': use --sample=KEY:ROW or --params=HASH")
    if bool(FLAGS.sample) == bool(FLAGS.params):
        raise UserError("give one of --sample=KEY:ROW and --params=HASH")
    catalogue = read_catalogue(Store(FLAGS.workdir))
    if FLAGS.sample:
        trace = trace_sample(catalogue, FLAGS.sample)
    else:
        trace = trace_params(catalogue, FLAGS.params)
    print(json.dumps(trace, indent=1, ensure_ascii=False) if FLAGS.json else as_text(trace))


def as_text(trace: Trace) -> str:
    """A trace as a tree for people; `--json` has more."""
    tree = _params_tree(trace) if trace["kind"] == "params" else _sample_tree(trace)
    return "\n".join(_draw(tree))


def _draw(tree: Tree) -> list[str]:
    text, branches = tree
    lines = [text]
    for branch in branches:
        last = branch is branches[-1]
        first, *others = _draw(branch)
        lines.append(("└─ " if last else "├─ ") + first)
        lines += [("   " if last else "│  ") + line for line in others]
    return lines


def _sample_tree(trace: Trace) -> Tree:
    sample, prompt, weights = trace["sample"], trace["prompt"], trace["weights"]
    ended = {True: "", False: "  (did not end)", None: ""}[sample.get("finished")]
    difficulty = "" if prompt["difficulty"] is None else f"  difficulty {prompt['difficulty']}"
    branches = [
        (f"prompt      {_quoted(prompt['text'], prompt)}{difficulty}{_prompt_place(prompt)}", []),
        (f"completion  {_quoted(sample['completion'], sample)}{ended}", []),
        (f"used by     {_names(sample['runs'])}", []),
    ]
    if sample.get("hinted"):
        branches.insert(1, (f"asked as    {_quoted(sample['hinted'], sample)}, with a hint", []))
    if sample.get("same_content"):
        branches.append((f"same bytes  {', '.join(sample['same_content'])}", []))
    if trace["kind"] == "sample":
        missing = "no longer in the store: that stage was computed again with another result"
        weights_line = _params_line(weights) if weights else missing
        branches.insert(3 if sample.get("hinted") else 2, (f"weights     {weights_line}", []))
        decided = [_decision_tree(d) for d in trace["decisions"]]
        decided += [(_verdict_line(v) + "; read by no filter", []) for v in trace["other_verdicts"]]
        branches.append(("decisions" if decided else "decisions   none: no filter saw it", decided))
    trained = [(_trained_line(t, sample), [_runs_leaf(t)]) for t in trace["trained"]]
    branches.append((f"trained directly  {_sets(trained)}", trained))
    descended = [(_params_line(t), [_runs_leaf(t)]) for t in trace["descended"]]
    branches.append((f"only descend from those  {_sets(descended)}", descended))
    return f"{trace['kind']} {_title(sample)}, row {sample['row']}", branches


def _decision_tree(decision: Trace) -> Tree:
    outcome = {True: "kept", False: "dropped", None: "decision unknown"}[decision["kept"]]
    verdict, gold = decision["verdict"], decision["gold"]
    reason = f": {decision['reason']}" if decision["reason"] else ""
    said = _verdict_line(verdict) if verdict else "no judge: the filter asks for none"
    seen = [(f"gold labels select: {_verdict_line(gold)}", [])] if gold else []
    return (
        f"{outcome} by the filter '{decision['filter']}'{reason}   {_title(decision)}",
        [(said, []), *seen, _runs_leaf(decision)],
    )


def _verdict_line(verdict: Trace) -> str:
    score = verdict["score"]
    said = f"score {score:g}" if score is not None else f"no verdict ({verdict['reason']})"
    if score is None and verdict["reason"] is None:
        said = "verdict collected" if verdict["collected"] else "verdict unknown"
    return f"judge '{verdict['judge']}': {said}   {_title(verdict)}"


def _params_tree(trace: Trace) -> Tree:
    params = trace["params"]
    chain = [_training_tree(link) for link in trace["chain"]]
    ending = [("fresh parameters", [])]
    if trace["chain"][-1]["checkpoint"]:
        ending = []
    elif not trace["chain_complete"]:
        gone = (
            "parameters no longer in the store: that stage was computed again with another result"
        )
        ending = [(gone, [])]
    generated = [
        (f"{_title(g)}: {_number(g['samples'])} samples{_collected(g)}", [_runs_leaf(g)])
        for g in trace["generated"]
    ]
    evaluated = [
        (f"{_title(e)}: mean exact match {_share(e['mean_exact_match'])}", [_runs_leaf(e)])
        for e in trace["evaluated"]
    ]
    children = [(_params_line(c), [_runs_leaf(c)]) for c in trace["trained_from_these"]]
    branches = [
        (f"sha256   {params['params_sha256']}", []),
        (f"used by  {_names(params['runs'])}", []),
        ("trained, newest first", [*chain, *ending]),
        (f"generated{'' if generated else '  nothing'}", generated),
        (f"measured{'' if evaluated else '  never'}", evaluated),
        (f"trained on from here  {_sets(children)}", children),
    ]
    if params["same_content"]:
        branches.insert(2, (f"same bytes  {', '.join(params['same_content'])}", []))
    return f"parameters {_params_line(params)}", branches


def _training_tree(link: Trace) -> Tree:
    if link["checkpoint"]:
        files = [(f"{name}   sha256 {sha}", []) for name, sha in link["checkpoint"].items()]
        return f"{_params_line(link)}, a published checkpoint", [*files, _runs_leaf(link)]
    rows = [(_rows_line(r), []) for r in link["rows"] or []]
    filters = [(_filter_line(f), []) for f in link["filters"]]
    rows = rows or [("rows.parquet was collected", [])]
    return f"{_params_line(link)}, {link['steps']} steps", [*rows, *filters, _runs_leaf(link)]


def _rows_line(rows: Trace) -> str:
    source = "the seed data"
    if rows["source"] != "seed":
        where = _where(rows)
        source = f"generate/{rows['source'][:_SHOWN]} ({where}), filter '{rows['filter']}'"
    return f"{_count(rows['distinct'], 'row')}, {_count(rows['times'], 'draw')}, from {source}"


def _filter_line(entry: Trace) -> str:
    kept = f"filter '{entry['filter']}' kept {_number(entry['kept'])} of {_number(entry['of'])}"
    altered = f", altered by {', '.join(entry['altered_by'])}" if entry["altered_by"] else ""
    return f"{kept}{altered}   {_title(entry)}"


def _trained_line(entry: Trace, sample: Trace) -> str:
    too = "; descends from an earlier one as well" if entry["descends_too"] else ""
    given = entry["completion"]
    same = given is None or sample["completion"] in (None, given)
    altered = "" if same else f", altered to {json.dumps(given, ensure_ascii=False)}"
    return f"{_params_line(entry)}, row seen {_count(entry['times'], 'time')}{altered}{too}"


def _params_line(entry: Trace) -> str:
    return f"{_title(entry)}, params {entry['params_sha256'][:_SHOWN]}{_collected(entry)}"


def _title(entry: Trace) -> str:
    where = _where(entry)
    return f"{entry['stage']}/{entry['key'][:_SHOWN]}" + (f" ({where})" if where else "")


def _where(entry: Trace) -> str:
    if entry["round"] is None:
        return ""
    member = f", member {entry['member']}" if entry["member"] else ""
    return ("base" if entry["round"] < 0 else f"round {entry['round']}") + member


def _prompt_place(prompt: Trace) -> str:
    return f"   {_title(prompt)} row {prompt['row']}" if prompt.get("key") else ""


def _collected(entry: Trace) -> str:
    return f" [collected: {', '.join(entry['collected'])}]" if entry["collected"] else ""


def _runs_leaf(entry: Trace) -> Tree:
    return f"used by {_names(entry['runs'])}", []


def _names(runs: list[dict[str, Any]], most: int = 4) -> str:
    if not runs:
        return "no round of any run that is there"
    shown = ", ".join(f"{r['run']} ({_where(r | {'member': 0})})" for r in runs[:most])
    return shown + (f" and {len(runs) - most} more runs" if len(runs) > most else "")


def _quoted(text: str | None, entry: Trace) -> str:
    if text is not None:
        return json.dumps(text, ensure_ascii=False)
    return "collected" if entry.get("collected") else "unknown"


def _sets(entries: list[Tree]) -> str:
    return _count(len(entries), "parameter set") if entries else "no parameters"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
