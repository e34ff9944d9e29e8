"""Runs, or resumes, one loop.

python -m experiments.run --config=configs/NAME.py[:ARG] --workdir=DIR [--run_name=R]
    [--config.KEY=VALUE …]

The same command again continues where the last one stopped, however it stopped.
"""

import sys

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file, path/to/file.py[:ARG].", required=True)
flags.DEFINE_string("workdir", "workdir", "Where the store and the runs are: a path or s3://, gs://.")
flags.DEFINE_string("run_name", None, "Folder under WORKDIR/runs; default: config name and hash.")
flags.DEFINE_bool("dry_run", False, "Check the config, print it resolved, and stop.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument '{argv[1]}': settings are --config.KEY=VALUE")
    config = cli.load_config(FLAGS.config, _OVERRIDES)
    from karploop import launch  # imports jax: only once the config is known to be sound

    return launch.launch(config, FLAGS.workdir, FLAGS.run_name, dry_run=FLAGS.dry_run)


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
