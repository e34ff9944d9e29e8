"""Writes the model of a run as a folder that transformers or PEFT loads.

python -m experiments.export --workdir=DIR --run=R --output=FOLDER [--round=K] [--adapter]
    [--dtype=bfloat16]

The folder gets safetensors, config.json, the tokenizer's files and a model card (README.md) that
says what the model was made from and how it was measured. A model that was trained from scratch
reads characters, and is written where a family of transformers is built like it (llama is, with
positions=rope and activation=swiglu). With --adapter it is a PEFT adapter for the published model
that the run started from (`--config.roles.policy.path`).
"""

from absl import flags

from karploop import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "workdir", "Where the store and the runs are.")
flags.DEFINE_string("run", None, "Name of the run; may be left out where there is one alone.")
flags.DEFINE_string("output", None, "Folder to write, new or empty.", required=True)
flags.DEFINE_integer("round", None, "Parameters as of this round; -1 is the base. Default: last.")
flags.DEFINE_bool("adapter", False, "Write the adapter alone, in PEFT's format.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the written weights.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    from karploop.export import export  # imports jax

    folder = export(
        FLAGS.workdir,
        FLAGS.output,
        run=FLAGS.run,
        round=FLAGS.round,
        adapter=FLAGS.adapter,
        dtype=FLAGS.dtype,
    )
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
