"""How good a published model is as a judge of its own answers, on tasks whose gold is known.

The model answers held-out problems behind a few solved ones; a task's scorer says which answers are
right. Then it judges them as rubric, by pairs and by a constitution, and so do reward models on its
frozen weights, each trained on comparisons of a gold answer with a wrong one, made by rule, to
other problems. The scorer's word reaches the report, and no judge.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from karploop.compiling import command_mesh
from karploop.config import JudgeConfig, JudgingConfig, RewardConfig, RoleConfig
from karploop.data.fewshot import FewShot
from karploop.data.problems import draw
from karploop.data.rows import located_rows
from karploop.data.tasks import Task, get_task
from karploop.errors import UserError
from karploop.files import write_atomic
from karploop.jobs import GenerateJob, Row, identity_of
from karploop.judging.reward_model import RewardModel
from karploop.offline import generate
from karploop.offline_judge import run_file
from karploop.oversight.calibration import report
from karploop.reporting.progress import Progress
from karploop.rng import folded
from karploop.roles.local import LocalModel
from karploop.roles.reward import Replies, Spelling
from karploop.schema import nearest
from karploop.training.reward_head import Pairs, fit_head

HELD_OUT = 0.1  # share of a task's problems that judges are measured on
REPLIES, PAIRS, COMPARISONS = "replies", "pairs", "comparisons"
ASKED = {  # who judges what, besides reward models
    REPLIES: ("rubric",),
    PAIRS: ("pairwise", "constitution"),
    COMPARISONS: ("pairwise", "constitution"),
}
CRITERION = "1 correct: Is the reply the right answer to the request?\n"
PRINCIPLES = "The reply is the right answer to the request.\nThe reply contains no mistake.\n"


@dataclass(frozen=True)
class Subject:
    """A task to judge answers to.

    Attributes:
      address: of the task; `max_new_tokens`: of its longest answer.
      wrong: an answer that is not right, from one that is.
    """

    address: str
    max_new_tokens: int
    wrong: Callable[[str, np.random.Generator], str]


def swapped(answer: str, rng: np.random.Generator) -> str:
    """Two words the other way round."""
    return ", ".join(reversed(re.split(r",\s*", answer)))


def miscounted(answer: str, rng: np.random.Generator) -> str:
    """A number that is off by one or two, and not negative."""
    near = [int(answer) + d for d in (-2, -1, 1, 2) if int(answer) + d >= 0]
    return str(rng.choice(near))


SUBJECTS = {
    "sort-two-words": Subject(
        "reasoning_gym/word_sorting?min_words=2&max_words=2&size=9000&name=words", 16, swapped
    ),
    "letters": Subject(
        "reasoning_gym/letter_counting?min_words=2&max_words=4&size=9000&name=letters",
        4,
        miscounted,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      model: the judge's checkpoint; it answers the problems, too.
      sizes: numbers of comparisons that reward models are trained on.
      seeds: reward models of each size, with comparisons drawn anew.
      problems: held-out ones, each answered `samples` times.
    """

    model: str
    sizes: tuple[int, ...] = (50, 500, 5000)
    seeds: int = 3
    problems: int = 128
    samples: int = 8
    shots: int = 8
    batch: int = 8

    def __post_init__(self):
        for name in ("seeds", "problems", "samples", "shots", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not self.sizes or min(self.sizes) < 2:
            raise UserError(f"--sizes={','.join(map(str, self.sizes))}: wants numbers from 2 on")


def study(name: str, settings: Settings, work: pathlib.Path, output: pathlib.Path) -> str:
    """Makes what is not in `work` yet, and the reports in `output`; returns the tables.

    Raises:
      UserError: no such subject or model, or too few problems for the largest reward model.
    """
    if name not in SUBJECTS:
        raise UserError(f"--tasks has '{name}': {nearest(name, SUBJECTS)}")
    subject, progress = SUBJECTS[name], Progress()
    task = get_task(subject.address)
    known = _comparisons(task, subject, settings)
    asked = _held_out(task, settings)
    work = work / name / _made_of(subject, settings)
    work.mkdir(parents=True, exist_ok=True)
    replies, pairs = _answered(task, subject, settings, asked, work, progress)
    held_out = _as_pairs(_against_wrong(task, subject, asked, np.random.default_rng(1)))
    of = {REPLIES: replies, PAIRS: pairs, COMPARISONS: held_out}
    verdicts = {
        kind: [
            verdict
            for judge in ASKED[kind]
            for verdict in _judged(judge, kind, rows, settings, work, progress)
        ]
        for kind, rows in of.items()
        if rows  # a model that is never right, or never wrong, leaves no pairs
    }
    for kind, found in _rewarded(known, of, settings, progress).items():
        verdicts[kind] = verdicts.get(kind, []) + found
    text = f"# {name}\n"
    for kind, rows in verdicts.items():
        if rows:
            _write(work / f"verdicts-{kind}.jsonl", rows)
            table = report(str(work / f"verdicts-{kind}.jsonl"), output / name / kind, 0.5, 1000, 0)
            text += f"\n## {kind}\n\n{table}"
    return text


def _made_of(subject: Subject, settings: Settings) -> str:
    """A folder's name that tells answers and verdicts from those of another model or problem."""
    model = LocalModel.describe(settings.model).stamps()
    asked = [settings.problems, settings.samples, settings.shots]
    return identity_of(model, subject.address, subject.max_new_tokens, asked)[:12]


def _held_out(task: Task, settings: Settings) -> list[str]:
    rng = np.random.default_rng(0)
    return draw(task, 1, settings.problems, held_out=True, fraction=HELD_OUT, rng=rng)


def _comparisons(task: Task, subject: Subject, settings: Settings) -> list[Row]:
    """Gold answers beside wrong ones, for problems that no judge is measured on."""
    most = max(settings.sizes)
    rng = np.random.default_rng(0)
    prompts = draw(task, 1, most + settings.shots, held_out=False, fraction=HELD_OUT, rng=rng)[
        settings.shots :
    ]  # what the model is shown is what no reward model is trained on
    if len(prompts) < most:
        raise UserError(
            f"task '{task.name}' has problems for {len(prompts)} comparisons: lower --sizes"
        )
    return _against_wrong(task, subject, prompts, rng)


def _against_wrong(task: Task, subject: Subject, prompts: Sequence[str], rng) -> list[Row]:
    rows = []
    for prompt in prompts:
        gold = task.answer(prompt).strip()
        rows.append({"prompt": prompt, "chosen": gold, "rejected": subject.wrong(gold, rng)})
    return rows


def _as_pairs(comparisons: Sequence[Row]) -> list[Row]:
    """As a judge reads them: the better one first in every other."""
    rows = []
    for number, row in enumerate(comparisons):
        gold = 1 - number % 2
        two = [row["chosen"], row["rejected"]]
        completions = two if gold else two[::-1]
        rows.append({"prompt": row["prompt"], "completions": completions, "gold": gold})
    return rows


def _answered(
    task: Task, subject: Subject, settings: Settings, asked: list[str], work, progress
) -> tuple[list[Row], list[Row]]:
    """The model's different answers, with gold; and of each problem a right and a wrong one."""
    rng = np.random.default_rng(0)
    shown = draw(task, 1, settings.shots, held_out=False, fraction=HELD_OUT, rng=rng)
    solved = [(prompt, f" {task.answer(prompt).strip()}") for prompt in shown]
    form = FewShot(examples=tuple(solved))
    questions, answers = work / "questions.jsonl", work / "answers.jsonl"
    _write(questions, [{"prompt": form.render(prompt)} for prompt in asked])
    job = GenerateJob(
        settings.model,
        n=settings.samples,
        max_new_tokens=subject.max_new_tokens,
        batch=settings.batch,
    )
    if not answers.exists():
        generate(job, str(questions), str(answers), progress)
    replies, pairs, rng = [], [], np.random.default_rng(0)
    for prompt, (_, row) in zip(asked, located_rows(answers), strict=True):
        texts = dict.fromkeys(form.cut(c["text"])[0].strip() for c in row["completions"])
        right = {text: task.verify(prompt, text) for text in texts if text}
        replies += [{"prompt": prompt, "completion": t, "gold": int(g)} for t, g in right.items()]
        two = [[t for t, g in right.items() if g is want] for want in (True, False)]
        if all(two):
            chosen, rejected = (str(rng.choice(texts)) for texts in two)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return replies, _as_pairs(pairs)


def _judged(judge: str, kind: str, rows, settings: Settings, work, progress) -> list[Row]:
    """Verdicts of the model asked as a `judge`."""
    source, target = work / f"{kind}.jsonl", work / f"{judge}-{kind}.jsonl"
    _write(source, rows)
    criteria, constitution = work / "criteria.txt", work / "constitution.txt"
    write_atomic(criteria, CRITERION.encode())
    write_atomic(constitution, PRINCIPLES.encode())
    config = JudgingConfig(
        roles={"judge": RoleConfig(path=settings.model)},
        judge=JudgeConfig(
            name=judge,
            batch=settings.batch,
            criteria=str(criteria),
            constitution=str(constitution),
            principles=len(PRINCIPLES.splitlines()),
        ),
    )
    if not target.exists():
        run_file(config, str(source), str(target), progress)
    return [row | {"judge": judge} for _, row in located_rows(target)]


def _rewarded(known, of: dict[str, list[Row]], settings: Settings, progress) -> dict[str, list]:
    """Verdicts of reward models of every size and seed, all on the same hidden states."""
    model = LocalModel.describe(settings.model)
    mesh, spelling = command_mesh({}), Spelling(model, chat=False)
    replies = Replies.of(model, spelling, mesh, settings.batch)
    texts = [_asked(row["prompt"], row[side]) for row in known for side in ("chosen", "rejected")]
    judged = [
        _asked(row["prompt"], text)
        for rows in of.values()
        for row in rows
        for text in row.get("completions", [row.get("completion")])
    ]
    distinct = list(dict.fromkeys([*texts, *judged]))
    with progress.stage(None, "read", len(distinct), "replies") as stage:
        states = replies.hidden([spelling.tokens(*text) for text in distinct], stage.advance)
    hidden = dict(zip(distinct, states, strict=True))
    chosen_NxE, rejected_NxE = (np.stack([hidden[t] for t in texts[i::2]]) for i in (0, 1))

    def read(asked):
        return np.stack([hidden[_asked(*reply)] for reply in asked]), [""] * len(asked)

    verdicts: dict[str, list[Row]] = {kind: [] for kind in of}
    for size in settings.sizes:
        for seed in range(settings.seeds):
            drawn = np.random.default_rng([seed, size]).permutation(len(known))[:size]
            pairs = Pairs(chosen_NxE[drawn], rejected_NxE[drawn], np.ones(size, np.float32))
            default = RewardConfig()
            fitted = fit_head(
                pairs,
                l2=default.l2,
                centring=default.centring,
                steps=default.steps,
                key=folded([seed]),
                mesh=mesh,
            )
            for kind, rows in of.items():
                found = _scored(RewardModel(fitted.head, read), rows)
                verdicts[kind] += [row | {"judge": f"reward {size:,}"} for row in found]
    return verdicts


def _asked(prompt: str, completion: str) -> tuple[str, str]:
    """A reply as a reward model reads it, in the form in which the model was asked."""
    return FewShot().ask(prompt), f" {completion}"


def _scored(reward: RewardModel, rows: Sequence[Row]) -> list[Row]:
    """What `experiments.judge` would write of these rows."""
    found = []
    for number, row in enumerate(rows):
        texts = row.get("completions", [row.get("completion")])
        if len(texts) == 2:
            opinion = reward.pairs([(row["prompt"], *texts)])[0]
            both = {"forward": opinion.forward, "backward": opinion.backward}
            length = len(texts[0]) - len(texts[1])
        else:
            opinion, both, length = reward.scores([(row["prompt"], texts[0])])[0], {}, len(texts[0])
        verdict = {"sample": number, "gold": row["gold"], "score": opinion.score, "length": length}
        found.append(verdict | both)
    return found


def _write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
