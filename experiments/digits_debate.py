"""Does debate help a judge who sees a few pixels of a digit? (arXiv 1805.00899, section 3.1)

python -m experiments.digits_debate --workdir=DIR [--output=DIR] [--seeds=3] [--pixels=2,4,6]
    [--images=300] [--steps=5000]

For every seed and number of pixels a judge is trained on random pixels of digits (8 × 8, shipped
with scikit-learn) and decides debates about digits held out, between perfect players. WORKDIR keeps
the result of each, which the same command does not compute again; the output, by default WORKDIR
too, gets table.md, table.csv, table.png and debates.png.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from karploop import cli
from karploop.errors import UserError
from karploop.files import is_local, writing

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", "workdir/digits_debate", "Keeps the result of every seed.")
    flags.DEFINE_string("output", None, "Folder for tables and plots; default: the workdir.")
    flags.DEFINE_integer("seeds", 3, "How many, from 0 on.")
    flags.DEFINE_list("pixels", ["2", "4", "6"], "Pixels revealed in all: 2, 4, 6 or several.")
    flags.DEFINE_integer("images", 300, "Held out, each the subject of every game.")
    flags.DEFINE_integer("steps", 5000, "Of training a judge, each on 128 images.")


def study(workdir: str, output: str, seeds: int, pixels: Sequence[str], **settings: int) -> str:
    """Measures what is not measured yet, writes tables and plots; returns the tables.

    Args:
      workdir: where results are kept, a file each.
      output: where tables and plots go.
      seeds: how many.
      pixels: how many are revealed, as typed.
      **settings: other fields of `debate_study.Settings`.

    Raises:
      UserError: settings that make no sense, or folders that cannot be written to.
    """
    from karploop.oversight.debate_report import write
    from karploop.oversight.debate_study import Settings

    arms = [Settings(pixels=count, **settings) for count in _counts(pixels)]
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    for name, folder in {"workdir": workdir, "output": output}.items():
        if not is_local(folder):
            raise UserError(f"--{name}={folder}: wants a directory of this machine")
        with writing(folder, folder):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    results = {
        arm.pixels: {seed: _result(pathlib.Path(workdir), arm, seed) for seed in range(seeds)}
        for arm in arms
    }
    with writing(output, output):
        return write(pathlib.Path(output), results)


def _counts(pixels: Sequence[str]) -> list[int]:
    try:
        counts = [int(text) for text in pixels]
    except ValueError:
        counts = []
    if not counts or len(set(counts)) < len(counts):
        raise UserError(f"--pixels={','.join(pixels)}: wants numbers, each once, such as 4,6")
    return counts


def _result(workdir: pathlib.Path, arm: Any, seed: int) -> dict[str, Any]:
    """What was measured with a seed: looked up, if settings and code are the same, or made."""
    from karploop.fingerprint import fingerprint
    from karploop.oversight import debate_study
    from karploop.reporting.writer import write_json_atomic

    path = workdir / f"pixels-{arm.pixels}-seed-{seed}.json"
    made_of = dataclasses.asdict(arm) | {"seed": seed, "code": fingerprint(debate_study.__name__)}
    try:
        found = json.loads(path.read_text())
        if found["made_of"] == made_of:
            return found["result"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # not measured, or not by this command
    start = time.monotonic()
    result = debate_study.measure(arm, seed)
    seconds = round(time.monotonic() - start, 1)
    with writing(workdir, path):
        write_json_atomic(path, {"made_of": made_of, "result": result, "seconds": seconds})
    print(f"{arm.pixels} pixels, seed {seed}: {seconds} s", flush=True)
    return result


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    output = FLAGS.output or FLAGS.workdir
    settings = {"images": FLAGS.images, "steps": FLAGS.steps}
    print(study(FLAGS.workdir, output, FLAGS.seeds, FLAGS.pixels, **settings))
    print(f"\nwritten to {output}: table.md, table.csv, table.png, debates.png")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
