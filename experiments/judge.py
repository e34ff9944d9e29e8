"""Has a model judge the rows of a file.

python -m experiments.judge --config=configs/judge.py:rubric --config.roles.judge.path=PATH
    --input=rows.jsonl --output=verdicts.jsonl

`rubric` rates {"prompt", "completion"} by weighted criteria, `debate` by arguments for and against;
`pairwise` and `constitution` compare {"prompt", "completions": [one, two, …]}, in both orders. Rows
keep their order and fields and gain `score` (null: no verdict, and `reason` says why), `judge`,
`criteria`, `length` and, for a pair, `forward`, `backward` and `winner`; of more than two, `scores`
and `best`. With `config.judge.rationale` the judge writes its reasons first, as one must that is
behind an address whose server gives no log-probabilities. With a `gold` in the rows
`experiments.calibrate` tells how good the judge is. The same command again goes on where an
interrupted one stopped.
"""

import sys

from absl import flags

from karploop import cli
from karploop.config import JudgingConfig
from karploop.schema import lay

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "configs/judge.py", "Config file.")
flags.DEFINE_string("input", None, "Rows: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "JSON lines to write, or -.", required=True)


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    config = lay(JudgingConfig(), cli.load_settings(FLAGS.config), _OVERRIDES)
    from karploop.offline_judge import run_file  # imports jax: only once the config is known
    from karploop.reporting.progress import Progress

    run_file(config, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
