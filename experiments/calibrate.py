"""Reports how good judges are, from their verdicts on samples with gold labels.

python -m experiments.calibrate --input=verdicts.jsonl --output=DIR [--threshold=0.5]

A row is {"sample", "gold": 0 or 1, "score": number or null} and may have "judge" (several are
compared), "length", "own" (the judge wrote it), and for a pair "forward" and "backward", the scores
in both orders. DIR gets calibration.json, table.md and reliability.png.
"""

import pathlib

from absl import flags

from karploop import cli
from karploop.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "Verdicts: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "Folder for the report.", required=True)
flags.DEFINE_float("threshold", 0.5, "A score above it is a yes, below it a no.")
flags.DEFINE_integer("resamples", 1000, "Of the bootstrap.")
flags.DEFINE_integer("seed", 0, "Of the bootstrap.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.oversight.calibration import report

    if FLAGS.resamples < 1:
        raise UserError(f"--resamples must be at least 1, got {FLAGS.resamples}")
    output = pathlib.Path(FLAGS.output)
    print(report(FLAGS.input, output, FLAGS.threshold, FLAGS.resamples, FLAGS.seed))
    return 0


if __name__ == "__main__":
    cli.run(main)
