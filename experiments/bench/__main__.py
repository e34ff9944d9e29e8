"""Measures what a run does, beside what the machine could do.

python -m experiments.bench [--config=configs/NAME.py[:ARG]] [--workloads=w1,score,…] [--repeats=3]
    [--output=experiments/bench/results --machine='2 cores of …'] [--config.KEY=VALUE …]

The model is that of any config: random weights in its shape (by default that of Gemma 3 270M,
which needs no download), or published ones with --config.roles.policy.path=PATH. Each workload has
a process of its own, so that peaks of memory are its own, and no compiled programs to find; it is
called once to compile and then --repeats times. Before them, matrix products at the model's shapes
and a copy are timed: the limit that `of_limit` tells the share of. One JSON line a workload goes to
the standard output (fields: karploop/benchmark/report.py), and a table at the end.

No token ends a completion, so that a workload always writes what it says, with random weights or
real ones; output lengths of w4 are geometric, drawn from config.seed, and enforced.

    w1, w2, w3, w4         sampling
    score, score_prefix    log-probabilities of given texts
    sft, sft_lora, dpo, grpo   one update
    loop                   rounds of --loop, a whole loop, by stage
    in_loop                its stage `generate`, and the sampler alone on the same prompts
    start, start_one       from the command to the first tokens of w1 or w2, --repeats times without
                           compiled programs and (part `warm`) with them

On a CPU only a machine that does nothing else measures anything: `load` says whether it did.
"""

import json
import pathlib
import signal
import statistics
import sys
import tempfile
from typing import Any

from absl import flags

from experiments.bench import process
from experiments.bench.process import FLAGS, call, check_output, vocabulary_of
from karploop import cli
from karploop.benchmark.names import RATES, STARTS, WORKLOADS, chosen
from karploop.config import Config

flags.adopt_module_key_flags(process)
flags.DEFINE_string("workloads", "", f"Some of {','.join(WORKLOADS)}; empty: all.")
flags.DEFINE_string("loop", "configs/addition.py", "The loop whose rounds are measured.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    config = cli.load_config(FLAGS.config, _OVERRIDES)
    loop = cli.load_config(FLAGS.loop, {})
    vocabulary = vocabulary_of(config)
    if FLAGS.only:
        return _child(config, loop, vocabulary)
    names = chosen(FLAGS.workloads)
    check_output()
    from karploop.benchmark import report

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workload's process, too
    rates, rows = _call(RATES, {}), []
    print(report.rates_line(rates), file=sys.stderr)
    for name in names:
        row = _start(name) if name in STARTS else _call(name, {"limit": rates["limit"]})
        row = {"workload": name, "machine": FLAGS.machine, "repeats": FLAGS.repeats} | row
        row["rates"] = {key: rates[key] for key in ("flops", "copied", "read")}
        rows.append(row)
        print(report.line(row), flush=True)
        if FLAGS.output:  # at once: the next one may fail
            place = report.write([row], rates, pathlib.Path(FLAGS.output), FLAGS.machine)
    print(report.table(rows))
    if FLAGS.output:
        print(f"written to {place}: results.jsonl, README.md, limit.png")
    return 0


def _child(config: Config, loop: Config, vocabulary: int | None) -> int:
    """One workload, told and answered in a file."""
    from karploop.benchmark import run  # imports jax

    file, name = pathlib.Path(FLAGS.task), FLAGS.only
    told = json.loads(file.read_text())
    if name == RATES:
        row = run.run_rates(config, vocabulary, FLAGS.repeats)
    elif name == "loop":
        row = run.run_loop(loop, FLAGS.repeats)
    elif name == "in_loop":
        row = run.run_in_loop(loop, FLAGS.repeats)
    elif name in STARTS:
        row = run.run_start(name, config, vocabulary, told["began"])
    else:
        row = run.run_work(name, config, vocabulary, FLAGS.repeats, told["limit"])
    file.write_text(json.dumps(row))
    return 0


def _call(name: str, told: dict[str, Any], cache: str | None = None) -> dict[str, Any]:
    return call("experiments.bench", _ARGUMENTS, name, told, cache)


def _start(name: str) -> dict[str, Any]:
    """From the command to the first token, without compiled programs and with them."""
    cold, warm = [], []
    for _ in range(FLAGS.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(_call(name, {}, cache))
            warm.append(_call(name, {}, cache))

    def median(rows: list[dict[str, Any]], step: str) -> float:
        return statistics.median(row[step] for row in rows)

    steps = ("imports", "parameters", "sampling")
    parts = {step: median(cold, step) for step in steps} | {"warm": median(warm, "seconds")}
    parts |= {f"warm {step}": median(warm, step) for step in steps}
    row = {key: value for key, value in cold[-1].items() if key not in steps}
    seconds = [each["seconds"] for each in cold]
    return row | {"seconds": statistics.median(seconds), "all_seconds": seconds, "parts": parts}


if __name__ == "__main__":
    _ARGUMENTS = sys.argv[1:]
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
