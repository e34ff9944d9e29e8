"""The model that samples and learns, as it is known before anything of it is on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from karploop.config import Config, ModelConfig, PromptConfig, RoleConfig
from karploop.curriculum import hardest
from karploop.data.fewshot import FewShot
from karploop.data.prompting import ChatPrompting, PlainPrompting, Prompting
from karploop.data.sources import held_out_prompts, labelled_prompts
from karploop.data.tasks import Task
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.roles.local import LocalModel
from karploop.roles.on_mesh import Described, Speaker

_MEASURABLE = 200_000  # prompts of a difficulty that are tokenized to find the longest


@dataclass(frozen=True)
class Policy:
    """A model trained from scratch, or one that was published.

    Attributes:
      vocabulary: rows of the embedding.
      role: the checkpoint that it starts from; None: from scratch.
      labelled: prompts of the seed data; None: they are drawn by the run's seed.
      prompt_length: tokens of the longest prompt behind the prefix, without a start token.
      completion_length: most tokens of a completion, without its stop token.
      row_length: tokens that the model reads of the longest training row.
    """

    config: ModelConfig
    vocabulary: int
    prompting: Prompting
    role: LocalModel | None
    labelled: Sequence[str] | None
    prompt_length: int
    completion_length: int
    row_length: int

    @property
    def speaker(self) -> Speaker:
        """What answers as a role."""
        own = Described("the policy", self.config, self.prompting.tokenizer)
        return self.role or own

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is sampled, start and stop token included."""
        return len(self.prompting.prefix) + self.prompt_length + self.completion_length + 2

    def limit(self, task: Task, difficulty: int) -> int:
        """Most tokens of a completion at a difficulty, without its stop token."""
        return self.completion_length if self.role else task.max_completion_length(difficulty)


def make_policy(config: Config, task: Task) -> Policy:
    """Reads what the config names; weights stay where they are.

    Raises:
      UserError: settings that do not go with such a model, or a checkpoint that cannot be used.
    """
    role = config.policy
    if role != RoleConfig(path=role.path):
        raise UserError(
            "'config.roles.policy' is trained, so it lies on the mesh: of its keys a loop takes "
            "'path' alone ('config.prompt.chat' says how it is asked)"
        )
    make = _published if config.policy.path else _scratch
    policy = make(config, task)
    if policy.longest > policy.config.max_length:
        behind = len(policy.prompting.prefix)
        shown = f" with the {behind} of examples before them" if behind else ""
        raise UserError(
            f"problems of difficulty {hardest(config)} take {policy.longest} tokens{shown}, longer "
            f"than the model's context, 'config.model.max_length', of {policy.config.max_length}: "
            + (
                "lower 'config.prompt.shots' or 'config.prompt.max_new_tokens'"
                if policy.role
                else "raise it, or lower 'config.rounds' or 'config.evaluate.difficulties'"
            )
        )
    return policy


def _scratch(config: Config, task: Task) -> Policy:
    """A model trained from scratch, on characters."""
    if config.prompt != PromptConfig():
        raise UserError(
            "'config.prompt' says how a published model is asked, and there is none: set "
            "'config.roles.policy.path', or leave 'config.prompt' alone"
        )
    if not config.task.seed_problems:
        raise UserError(
            "'config.task.seed_problems' is 0, and a model trained from scratch starts from "
            "labelled problems: set it to at least 1, or name a published model in "
            "'config.roles.policy.path'"
        )
    tokenizer, limit = _characters(config, task), hardest(config)
    longest = task.max_hinted_length if config.task.hints else task.max_prompt_length
    reached = [d for d in range(task.min_difficulty, limit + 1) if task.space(d)] or [limit]
    # Not always the hardest: difficulties may be kinds of problems.
    prompt = max(map(longest, reached))
    completion = max(map(task.max_completion_length, reached))
    return Policy(
        config=config.model,
        vocabulary=tokenizer.vocab_size,
        prompting=PlainPrompting(tokenizer),
        role=None,
        labelled=None,
        prompt_length=prompt,
        completion_length=completion,
        row_length=prompt + completion + 1,
    )


def _characters(config: Config, task: Task) -> CharTokenizer:
    """Raises UserError: the task has characters that ASCII has not."""
    if config.model.alphabet == "task":
        return CharTokenizer.for_tasks(task)
    tokenizer = CharTokenizer.ascii()
    missing = sorted(set(task.alphabet) - set(tokenizer.alphabet))
    if missing:
        raise UserError(
            f"task '{task.name}' writes {', '.join(map(repr, missing))}, which "
            "'config.model.alphabet=ascii' has not: leave it at task"
        )
    if not task.alphabet:  # a pool of texts
        for difficulty in range(task.min_difficulty, hardest(config) + 1):
            for prompt in task.prompts(difficulty):
                tokenizer.encode(prompt + (task.answer(prompt) if task.answered else ""))
    return tokenizer


def _published(config: Config, task: Task) -> Policy:
    """A checkpoint that was trained elsewhere."""
    execution = {name: getattr(config.model, name) for name in ("dtype", "scan", "remat")}
    if config.model != ModelConfig(**execution):
        raise UserError(
            "'config.roles.policy.path' names a checkpoint, which brings its own shape: of "
            "'config.model' set dtype, scan and remat only"
        )
    if config.members > 1:
        raise UserError("'config.members' counts models trained from scratch: set it to 1")
    role = LocalModel.describe(config.policy.path, **execution)
    labelled = labelled_prompts(task, config)
    prompting = _prompting(config.prompt, task, role, labelled)
    _check_answers(prompting, task, config, labelled)
    prompt_length, longest = _longest(prompting, task, hardest(config))
    completion_length = config.prompt.max_new_tokens - 1
    return Policy(
        config=role.config,
        vocabulary=role.vocabulary,
        prompting=prompting,
        role=role,
        labelled=labelled,
        prompt_length=prompt_length,
        completion_length=completion_length,
        row_length=len(prompting.example(longest, "")[0]) + completion_length,
    )


def _prompting(p: PromptConfig, task: Task, role: LocalModel, labelled: Sequence[str]) -> Prompting:
    if p.shots > len(labelled):
        raise UserError(
            f"'config.prompt.shots' is {p.shots}, and 'config.task.seed_problems' gives "
            f"{len(labelled)} solved problems: raise that, or show fewer"
        )
    if p.shots and not task.answered:
        raise UserError(
            f"'config.prompt.shots' shows solved problems, and task '{task.name}' has problems "
            "without a gold answer: give every row one, or set it to 0"
        )
    shown = tuple(labelled[: p.shots])
    shots = FewShot(
        instruction=p.instruction,
        examples=tuple((q, p.answer.replace("{answer}", task.answer(q))) for q in shown),
        prompt_format=p.question,
        separator=p.separator,
        stop=(p.stop,) if p.stop else (),
    )
    if p.chat and not role.tokenizer.has_template:
        raise UserError(
            f"'config.prompt.chat' asks by the chat template, and '{role.path}' has none: "
            "set it to False and show examples ('config.prompt.shots'), or take the checkpoint of "
            "the chat model"
        )
    kind = ChatPrompting if p.chat else PlainPrompting
    return kind(role.tokenizer, shots, p.answer)


def _check_answers(
    prompting: Prompting, task: Task, config: Config, labelled: Sequence[str]
) -> None:
    """Raises UserError: an answer is longer than what is sampled, so that it is never found."""
    if not task.answered:
        return
    held_out = [prompt for some in held_out_prompts(task, config) for prompt in some]
    for prompt in [*held_out, *labelled]:
        _, tokens = prompting.example(prompt, prompting.gold(task.answer(prompt)))
        if len(tokens) > config.prompt.max_new_tokens:
            raise UserError(
                f"'config.prompt.max_new_tokens' is {config.prompt.max_new_tokens}, and there is a "
                f"gold answer of {len(tokens)} tokens with its stop token, to {prompt!r}: raise it"
            )


def _longest(prompting: Prompting, task: Task, hardest_difficulty: int) -> tuple[int, str]:
    """Tokens of the longest prompt up to a difficulty, and one so long as far as is known.

    Where there are too many to look at them all, a prompt takes no more tokens than characters.
    """
    found: list[tuple[int, str]] = []
    for difficulty in range(task.min_difficulty, hardest_difficulty + 1):
        count = task.space(difficulty)
        if count > _MEASURABLE:
            filler = "0" * task.max_prompt_length(difficulty)
            around = len(prompting.prompt("0")) + len(filler)
            found.append((max(around, len(prompting.prompt(filler))), filler))
        elif count:
            found.append(_longest_of(prompting, task.prompts(difficulty)))
    if not found:
        raise UserError(
            f"task '{task.name}' has no problems up to difficulty {hardest_difficulty}: raise "
            "'config.task.seed_difficulty'"
        )
    return max(found)


def _longest_of(prompting: Prompting, prompts: Iterable[str]) -> tuple[int, str]:
    return max((len(prompting.prompt(prompt)), prompt) for prompt in prompts)
