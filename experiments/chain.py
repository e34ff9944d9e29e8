"""Takes the rows of a file through a chain of prompts.

python -m experiments.chain --config=configs/chain.py --config.chain=critique_revise
    --config.roles.policy.path=PATH --input=rows.jsonl --output=out.jsonl

A role is a folder, .gguf file or package:NAME (`roles.ROLE.path`), or a model behind an
OpenAI-compatible server (`roles.ROLE.base_url` and `roles.ROLE.model`); those not named are the
policy. Rows keep their order and fields and gain `output` and `steps` (step, role, prompt, text),
or `error` where a call failed for good. What servers will be asked, and what it may cost, is said
before, from the least to the most that the chain may take. "-" is standard input or output. The
same command again goes on where an interrupted one stopped.
"""

import sys

from absl import flags

from karploop import cli
from karploop.config import ChainConfig
from karploop.schema import lay

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "configs/chain.py", "Config file.")
flags.DEFINE_string("input", None, "Rows: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "JSON lines to write, or -.", required=True)


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    config = lay(ChainConfig(), cli.load_settings(FLAGS.config), _OVERRIDES)
    from karploop.offline_chain import run_file  # imports jax: only once the config is known
    from karploop.reporting.progress import Progress

    run_file(config, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
