"""What a run would take on devices that are not here: memory, traffic, and an estimate of time.

python -m experiments.dryrun --config=configs/NAME.py[:ARG] --topology=v5e:16x16
    [--num_slices=N] [--search] [--json] [--output=FILE] [--config.KEY=VALUE …]

Compiles the very programs of that run (rollout, scoring, train step) with libtpu, which needs no
TPU: pip install "jax[tpu]". Topologies are v4, v5e, v5p, v6e and tpu7x with a shape in chips;
without --topology it compiles for the devices of this machine. No parameter is made; of a published
model its config.json is enough. --search tries layouts until --compile of them have been compiled,
the fastest first by an estimate from shapes. --tables=FOLDER makes table.md of what --output wrote
there. Exit codes: 0 all programs fit, 3 one does not, 2 a mistake, 1 anything else.
"""

import json
import pathlib
import sys

from absl import flags
from etils import epath

from karploop import cli
from karploop.dryrun import topology
from karploop.files import write_atomic

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "Config file, path/to/file.py[:ARG].")
flags.DEFINE_string("topology", "", "As v5e:16x16, in chips; empty: the devices of this machine.")
flags.DEFINE_integer("num_slices", 1, "Slices of that topology.", lower_bound=1)
flags.DEFINE_integer("prompt_length", None, "Tokens, of a model without tokenizer.", lower_bound=1)
flags.DEFINE_list("programs", None, "Of rollout, score, train step; default: all.")
flags.DEFINE_bool("search", False, "Try layouts, remat and accumulation.")
flags.DEFINE_integer("compile", 4, "Most layouts that --search compiles.", lower_bound=1)
flags.DEFINE_bool("json", False, "One line of JSON in place of the table.")
flags.DEFINE_string("output", None, "File that the JSON is written to.")
flags.DEFINE_string("tables", None, "Folder of such files; writes its table.md and ends.")

DOES_NOT_FIT = 3


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    if FLAGS.tables:
        from karploop.dryrun import tables

        print(tables.write(pathlib.Path(FLAGS.tables)))
        return 0
    if not FLAGS.config:
        raise cli.UserError("--config is missing: name a config file, path/to/file.py[:ARG]")
    config = cli.load_config(FLAGS.config, _OVERRIDES)
    if FLAGS.topology:
        topology.check(FLAGS.topology)
        topology.prepare_environment()
    elif FLAGS.num_slices > 1:
        raise cli.UserError("--num_slices counts slices of a --topology: name one")
    from karploop.dryrun import report, run  # imports jax: behind the environment

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    where = run.Where(FLAGS.topology, FLAGS.num_slices)
    more = dict(prompt_length=FLAGS.prompt_length, say=say)
    if FLAGS.search:
        found = run.search(config, where, most=FLAGS.compile, **more)
    else:
        found = run.dry_run(config, where, only=FLAGS.programs, **more)
    line = json.dumps(found, sort_keys=True)
    if FLAGS.output:
        data = json.dumps(found, sort_keys=True, indent=1) + "\n"
        write_atomic(epath.Path(FLAGS.output), data.encode())
    print(line if FLAGS.json else report.render(found))
    return 0 if found["fits"] else DOES_NOT_FIT


if __name__ == "__main__":
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
