"""Scores the rows of a file with one model: the log-probability of every token.

python -m experiments.score --model=PATH --input=rows.jsonl --output=out.jsonl [--batch=8]

Rows are {"prompt", "completion"} (the completion is scored), {"text"} or {"tokens"}. They come out
in their order with all their fields, `logprobs` (nats, one a token) and their `sum`. The first
token of a row without a prompt has none. PATH and files are those of experiments.generate.

With --base_url=URL the model is one that an OpenAI-compatible server there calls --model. Not every
server gives log-probabilities of what it is sent (vLLM's does, llama.cpp's own does not): it is
asked for those of a few words first. Rows are {"prompt", "completion"} or {"text"} and gain the
tokens' texts, `pieces`, too; where a token is of both prompt and completion, or a call failed for
good, `error` says so:

python -m experiments.score --base_url=URL --model=NAME --input=rows.jsonl --output=out.jsonl
    [the flags of experiments.generate that are about the server]
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file, package:NAME or name.", required=True)
flags.DEFINE_string("input", None, "Rows: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "JSON lines to write, or -.", required=True)
flags.DEFINE_integer("batch", 8, "Rows at a time; no influence on the result.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")
cli.define_endpoint_flags()


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.jobs import ScoreJob
    from karploop.reporting.progress import Progress

    job = ScoreJob(model=FLAGS.model, batch=FLAGS.batch, dtype=FLAGS.dtype)
    if FLAGS.base_url:
        from karploop import offline_remote

        offline_remote.score(job, cli.endpoint(), FLAGS.input, FLAGS.output, Progress())
    else:
        from karploop import offline  # imports jax

        offline.score(job, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    cli.run(main)
