"""Completes the prompts of a file with one model.

python -m experiments.generate --model=PATH --input=prompts.jsonl --output=out.jsonl [--n=1
    --temperature=1 --top_p=1 --top_k=0 --min_p=0 --max_new_tokens=128 --seed=0 --batch=8
    --slots=0 --cache=model --weights=model]

Rows are {"prompt": text}, {"messages": [...]} or {"tokens": [...]}, as JSON lines, a JSON list or
Parquet; "-" is standard input or output. They come out in their order with all their fields and
`completions`: [{text, tokens, logprobs, finish_reason}]. PATH is a Hugging Face folder, a .gguf
file, or package:NAME. The same command again goes on where an interrupted one stopped.

With --base_url=URL the model is one that an OpenAI-compatible server there calls --model; its key
is in OPENAI_API_KEY. Completions are {text, finish_reason}, a row that failed for good has `error`
instead, and a reply is never paid for twice:

python -m experiments.generate --base_url=URL --model=NAME --input=rows.jsonl --output=out.jsonl
    [--concurrency=16 --requests_per_minute=0 --tokens_per_minute=0 --timeout=120 --attempts=8
    --input_price=0 --output_price=0 --cap=0 --extra='{"top_k": 20}']
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file, package:NAME or name.", required=True)
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
flags.DEFINE_integer("slots", 0, "Rows decoded at a time: as one is done, another begins; 0: all.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the model computes in.")
flags.DEFINE_enum("cache", "model", ["model", "bfloat16", "int8"], "Of keys and values.")
flags.DEFINE_enum("weights", "model", ["model", "int8"], "Of matrices, while sampling.")
cli.define_endpoint_flags()


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.jobs import GenerateJob
    from karploop.reporting.progress import Progress

    names = GenerateJob.__dataclass_fields__
    job = GenerateJob(**{name: getattr(FLAGS, name) for name in names})
    if FLAGS.base_url:
        from karploop import offline_remote

        offline_remote.generate(job, cli.endpoint(), FLAGS.input, FLAGS.output, Progress())
    else:
        from karploop import offline  # imports jax

        offline.generate(job, FLAGS.input, FLAGS.output, Progress())
    return 0


if __name__ == "__main__":
    cli.run(main)
