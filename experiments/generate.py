"""Completes the prompts of a file with one model.

python -m experiments.generate --model=PATH --input=prompts.jsonl --output=out.jsonl [--n=1
    --temperature=1 --top_p=1 --top_k=0 --min_p=0 --max_new_tokens=128 --seed=0 --batch=8]

Rows are {"prompt": text}, {"messages": [...]} or {"tokens": [...]}, as JSON lines, a JSON list or
Parquet; "-" is standard input or output. They come out in their order with all their fields and
`completions`: [{text, tokens, logprobs, finish_reason}]. PATH is a Hugging Face folder, a .gguf
file, or package:NAME. The same command again goes on where an interrupted one stopped.
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file or package:NAME.", required=True)
flags.DEFINE_string("input", None, "Prompts: .jsonl, .json, .parquet or -.", required=True)
flags.DEFINE_string("output", None, "JSON lines to write, or -.", required=True)
flags.DEFINE_integer("n", 1, "Completions of each row.")
flags.DEFINE_float("temperature", 1.0, "0 is greedy.")
flags.DEFINE_integer("top_k", 0, "Draw from the k most probable tokens; 0: all.")
flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens of this mass.")
flags.DEFINE_float("min_p", 0.0, "Draw from tokens at least this probable, relative to the best.")
flags.DEFINE_integer("max_new_tokens", 128, "Most tokens of a completion, its stop token included.")
flags.DEFINE_integer("seed", 0, "Of the random numbers.")
flags.DEFINE_integer("batch", 8, "Rows at a time; no influence on the result.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.offline import GenerateJob, generate  # imports jax
    from karploop.reporting.progress import Progress

    names = GenerateJob.__dataclass_fields__
    job = GenerateJob(**{name: getattr(FLAGS, name) for name in names})
    generate(job, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    cli.run(main)
