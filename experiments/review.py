"""Writes what a run has sampled as a file for people to review.

python -m experiments.review --workdir=DIR --run_name=NAME --output=review.jsonl [--round=K]
    [--people=rate|compare]
python -m experiments.review --workdir=DIR --run_name=NAME --output=review.jsonl --annotate=0.1

Rows are {"prompt", "completion", "verdict": ""}, to be set to "good", "bad" or "unsure", or
{"prompt", "a", "b", "better": ""}, to be set to "a", "b", "tie" or "unsure". Rows that the file has
stay as they are, and new ones come behind them; `-` writes to standard output. A run reads it with
`--config.judge.name=person --config.judge.review=FILE`, and such a run writes what it waits for to
that file itself.

With --annotate no rows are added: annotators that see gold, and err at this rate, fill in those
that wait for a verdict, so that RLHF can be tried with no people at hand. The rows say so.
"""

from absl import flags

from karploop import cli
from karploop.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "workdir", "Where the store and the runs are.")
flags.DEFINE_string("run_name", None, "Whose samples.", required=True)
flags.DEFINE_integer("round", None, "Of which complete round; default: the last that sampled.")
flags.DEFINE_enum(
    "people", None, ["rate", "compare"], "Single replies, or two of a prompt; default: as the run."
)
flags.DEFINE_string("output", None, "JSON lines, new or begun, or -.", required=True)
flags.DEFINE_float("annotate", None, "How often simulated annotators err who fill it in, 0 … 1.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop import reviewing  # imports jax
    from karploop.judging.person import as_lines, complete, to_review
    from karploop.store import Store

    store = Store(FLAGS.workdir)
    run = reviewing.find_run(store, FLAGS.run_name)
    if FLAGS.annotate is not None:
        if FLAGS.output == "-" or FLAGS.round is not None or FLAGS.people:
            raise UserError(
                "--annotate fills in the rows of a file: name it with --output, and leave out "
                "--round and --people"
            )
        filled = reviewing.annotate(FLAGS.output, run, FLAGS.annotate)
        print(f"{filled} rows filled in by simulated annotators: {FLAGS.output}")
        return 0
    asked = reviewing.texts_of_round(store, run, FLAGS.round, FLAGS.people or "")
    if FLAGS.output == "-":
        print(as_lines(to_review(asked)), end="")
        return 0
    print(f"{complete(FLAGS.output, asked)} rows added to {FLAGS.output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
