"""Runs, or resumes, one loop.

python -m experiments.run --config=configs/NAME.py[:ARG] --workdir=DIR [--run_name=R]
    [--config.KEY=VALUE …]

The same command again continues where the last one stopped, however it stopped.

On several machines start the same command on each, with --distributed and a workdir that all share.
TPU pods, Slurm and Open MPI need no more than that; elsewhere say who is who, on machine I of N:
    --coordinator_address=HOST_OF_MACHINE_0:PORT --num_processes=N --process_id=I
"""

import sys

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file, path/to/file.py[:ARG].", required=True)
flags.DEFINE_string(
    "workdir", "workdir", "Where the store and the runs are: a path or s3://, gs://."
)
flags.DEFINE_string("run_name", None, "Folder under WORKDIR/runs; default: config name and hash.")
flags.DEFINE_bool("dry_run", False, "Check the config, print it resolved, and stop.")
flags.DEFINE_bool("distributed", False, "Join the other machines that run this command.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of machine 0; implies --distributed.")
flags.DEFINE_integer("num_processes", None, "Machines in all, where they cannot find each other.")
flags.DEFINE_integer("process_id", None, "This machine's number, from 0.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"unexpected argument '{argv[1]}': settings are --config.KEY=VALUE")
    config = cli.load_config(FLAGS.config, _OVERRIDES)
    from karploop import launch  # imports jax: only once the config is known to be sound

    if FLAGS.distributed or FLAGS.coordinator_address:
        launch.join_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    return launch.launch(config, FLAGS.workdir, FLAGS.run_name, dry_run=FLAGS.dry_run)


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
