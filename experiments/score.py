"""Scores the rows of a file with one model: the log-probability of every token.

python -m experiments.score --model=PATH --input=rows.jsonl --output=out.jsonl [--batch=8]

Rows are {"prompt", "completion"} (the completion is scored), {"text"} or {"tokens"}. They come out
in their order with all their fields, `logprobs` (nats, one a token) and their `sum`. The first
token of a row without a prompt has none. PATH and files are those of experiments.generate.
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file or package:NAME.", required=True)
flags.DEFINE_string("input", None, "Rows: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "JSON lines to write, or -.", required=True)
flags.DEFINE_integer("batch", 8, "Rows at a time; no influence on the result.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.offline import ScoreJob, score  # imports jax
    from karploop.reporting.progress import Progress

    job = ScoreJob(model=FLAGS.model, batch=FLAGS.batch, dtype=FLAGS.dtype)
    score(job, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    cli.run(main)
