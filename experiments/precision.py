"""What smaller caches and weights cost in accuracy: how far they move what is sampled.

python -m experiments.precision --model=PATH --input=prompts.jsonl [--max_new_tokens=64 --batch=8]

Each row's completion is drawn once for each way to keep keys, values and matrices, and its tokens
are scored by the model as it is. What sampling says of its tokens less what the model says of them
is, on average, the Kullback-Leibler divergence of what was sampled from, from the model, in nats a
token (interval: 95%, over rows); beside it are the mean and the largest size of the differences of
single tokens. The first row is the model as it is: what two programs differ by. PATH
and rows are those of experiments.generate.
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file or package:NAME.", required=True)
flags.DEFINE_string("input", None, "Prompts: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
flags.DEFINE_integer("max_new_tokens", 64, "Most tokens of a completion, its stop token included.")
flags.DEFINE_integer("seed", 0, "Of the random numbers.")
flags.DEFINE_integer("batch", 8, "Rows at a time; no influence on the result.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.jobs import GenerateJob
    from karploop.precision import measure, report
    from karploop.reporting.progress import Progress

    names = ("model", "temperature", "max_new_tokens", "seed", "batch", "dtype")
    job = GenerateJob(**{name: getattr(FLAGS, name) for name in names})
    print(report(measure(job, FLAGS.input, Progress())))
    return 0


if __name__ == "__main__":
    cli.run(main)
