"""Trains a reward model on the comparisons of a file.

python -m experiments.reward --config=configs/reward.py --config.roles.base.path=PATH
    --input=comparisons.jsonl --output=DIR

Rows are {"prompt", "chosen", "rejected"}, or {"prompt", "completions": [one, two], "winner"} with
"first" or "second" for the winner, as experiments.judge writes them; `messages` may stand for
`prompt`. DIR gains `head.safetensors` and `reward.json`, which has the accuracy on training and on
held-out prompts; with --config.tune=lora also `adapter/`, with full `model/`.
"""

import sys

from absl import flags

from karploop import cli
from karploop.config import RewardConfig
from karploop.schema import lay

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "configs/reward.py", "Config file.")
flags.DEFINE_string("input", None, "Comparisons: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "Folder to write.", required=True)


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    config = lay(RewardConfig(), cli.load_settings(FLAGS.config), _OVERRIDES)
    from karploop.offline_reward import run_file  # imports jax: only once the config is known
    from karploop.reporting.progress import Progress

    run_file(config, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
