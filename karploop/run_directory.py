"""What a run shows of itself: config, summary, metrics, table and plot.

    WORKDIR/runs/R/config.json      the resolved config
    WORKDIR/runs/R/environment.json versions, git state, hardware, command
    WORKDIR/runs/R/summary.json     rounds, held-out measurements, stage keys, parameter hash
    WORKDIR/runs/R/metrics.jsonl, tensorboard/, accuracy.txt, accuracy.png

Everything here can be made again from the store: a resumed run writes it anew from the first round
on, so that nothing in it is doubled or missing.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

from karploop import cli
from karploop.bindings import Round
from karploop.config import SIMULATED, Config, changes_results
from karploop.errors import UserError
from karploop.files import remove, remove_torn, write_atomic
from karploop.filtering.choice import choose, reads_gold
from karploop.mesh import is_main
from karploop.phases import by_phase
from karploop.reporting.tables import run_table
from karploop.reporting.writer import RunWriter, write_json_atomic
from karploop.schema import flatten, to_dict
from karploop.stages import peak_host_bytes, provenance
from karploop.store import Store, digest
from karploop.training.train import STEPS_FILE


class RunDirectory:
    """Writes one run's directory; on processes other than the main one it does nothing."""

    def __init__(self, store: Store, name: str, config: Config, simulated: bool = False):
        """Raises UserError if `name` belongs to a run of another config.

        Args:
          simulated: whether gold labels say what people would.
        """
        self.store, self.name, self.config = store, name, config
        self.path = store.root / "runs" / name
        self.summary: dict[str, Any] = {"run": name, "complete": False, "rounds": []}
        # Whoever reads a number of this run has to know.
        if simulated:
            self.summary["diagnostic"] = (
                f"'{SIMULATED}' play people by gold labels: this run is a diagnostic, and no "
                "result of a loop"
            )
        for of_phase in by_phase(config).values():
            if reads_gold(*choose(of_phase)):
                self.summary["diagnostic"] = (
                    f"the filter '{of_phase.filter.name}' selects by gold labels: this run is a "
                    "diagnostic, and no result of a loop"
                )
        self._step = 0  # optimiser steps of all rounds so far: the horizontal axis of training
        self._check_config()
        if not is_main():
            return
        # TensorBoard and plots write to a file system; an object store gets copies of the files.
        if store.local:
            self._local = pathlib.Path(self.path)
            self._local.mkdir(parents=True, exist_ok=True)
            remove_torn(self._local)
        else:
            self._local = store.workspace.scratch_until_exit()
            remove(self.path / "tensorboard")  # an earlier process's, as RunWriter does locally
        write_json_atomic(self.path / "config.json", to_dict(config))
        write_json_atomic(self.path / "environment.json", environment())
        self._writer = RunWriter(self._local)

    def _check_config(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            return
        old, new = flatten(json.loads(path.read_text())), flatten(to_dict(self.config))
        new = {k: list(v) if isinstance(v, tuple) else v for k, v in new.items()}
        changed = [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and changes_results(key)
        ]
        if changed:
            raise UserError(
                f"the run '{self.name}' in '{self.store.root}' has another config "
                f"({'; '.join(changed[:5])}): give this one another --run_name"
            )

    def add_round(self, done: Round) -> None:
        """Adds a complete round to metrics and summary."""
        if not is_main():
            return
        costs = {name: self._seconds(a.manifest) for name, a in done.stages.items()}
        trained = [name for name, a in done.stages.items() if STEPS_FILE in a.manifest.files]
        tokens = {f"tokens/{name}": self._write_steps(done, name) for name in trained}
        if done.evals:
            self._writer.write("eval", done.index + 1, done.evals, round=done.index)
        seconds = {f"seconds/{name}": s for name, s in costs.items() if s is not None}
        self._writer.write(
            "round", done.index + 1, done.metrics | tokens | seconds, round=done.index
        )
        self.summary["rounds"].append(
            {
                "round": done.index,
                "evals": done.evals,
                "stages": {name: a.manifest.key for name, a in done.stages.items()},
                "metrics": done.metrics | tokens,
                "seconds": costs,
            }
            | ({"stopped": done.stopped} if done.stopped else {})
        )
        self._writer.flush()
        write_json_atomic(self.path / "summary.json", self.summary)
        self._upload()

    def finish(self, params_sha256: list[str], seconds: float) -> None:
        """The final summary, the table (printed too) and the plot."""
        if not is_main():
            return
        whole = params_sha256[0] if len(params_sha256) == 1 else digest(params_sha256)
        self.summary |= {
            "complete": True,
            "params_sha256": whole,
            "params_sha256_by_member": params_sha256,
            "seconds": round(seconds, 1),
            "peak_host_bytes": peak_host_bytes(),
        }
        table = run_table(self.summary)
        write_atomic(self.path / "accuracy.txt", (table + "\n").encode())
        from karploop.reporting.plots import run_plot  # matplotlib, for finished runs alone

        drawn = run_plot(
            self.summary,
            self._local / "accuracy.png",
            title=f"{self.config.name}: held-out accuracy by round",
            trained_up_to=self.config.task.seed_difficulty,
        )
        self._writer.close()
        write_json_atomic(self.path / "summary.json", self.summary)
        self._upload()
        files = ["accuracy.png"] * drawn + ["summary.json", "metrics.jsonl"]
        print(f"\n{table}\n\nwritten to {self.path}: {', '.join(files)}")

    def close(self) -> None:
        """Writes out what is logged, however the run ended; at exit it would be too late."""
        if is_main():
            self._writer.close()

    def _write_steps(self, done: Round, name: str) -> float:
        """Logs a training stage by step (the first member's only); returns the tokens it read."""
        rows = done.stages[name].table(STEPS_FILE).to_pylist()
        if "." not in name:
            for row in rows:
                values = {k: v for k, v in row.items() if k != "step"}
                self._writer.write("train", self._step, values, round=done.index)
                self._step += 1
        return sum(row["tokens"] for row in rows)

    def _seconds(self, manifest) -> float | None:
        path = self.store.root / "provenance" / manifest.stage / f"{manifest.key}.json"
        return json.loads(path.read_text())["seconds"] if path.exists() else None

    def _upload(self) -> None:
        if self.store.local:
            return
        for path in self._local.rglob("*"):
            if path.is_file():
                name = path.relative_to(self._local).as_posix()
                write_atomic(self.path / name, path.read_bytes())


def environment() -> dict[str, Any]:
    """Versions, hardware, command and git state of this process."""
    found = provenance(0.0)
    for name in ("seconds", "finished", "peak_host_bytes"):
        del found[name]
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    status = git("status", "--porcelain")
    return found | {
        "command": cli.command(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(status) if status is not None else None,
    }
