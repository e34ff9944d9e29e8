"""From a config file and the command line to a checked config: rules that span several keys.

The types and bounds of single keys stand with the keys (`config.py`). Nothing here reads a file of
the run or touches a device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from karploop.config import (
    ADAPTABLE,
    COMPARING,
    OF_PAIRS,
    TEACHER,
    Config,
    FilterConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    TrainConfig,
)
from karploop.errors import UserError
from karploop.phases import by_phase, told_of
from karploop.schema import lay, nearest


def resolve(settings: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Lays `settings` (nested) and then `overrides` (dotted path → text) over the defaults.

    Raises:
      UserError: unknown key (with the nearest name), wrong type, or value out of range.
    """
    config = lay(Config(), settings, overrides)
    for start, of_phase in by_phase(config).items():
        with told_of(start):
            _check_consistency(of_phase)
    return config


def _check_consistency(config: Config) -> None:
    """Rules that span several keys."""
    sizes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in sizes.values()) > 1 or 0 in sizes.values():
        raise UserError(f"'config.mesh' wants positive sizes and at most one −1, got {sizes}")
    _check_model(config.model)
    if config.judge.voters == "members" and _votes(config) and config.members < 2:
        raise UserError(
            "'config.judge.voters=members' counts votes over independently seeded models: "
            "set 'config.members' to 2 or more (5 in arXiv 2502.01612)"
        )
    for stage in ("warmup", "train"):
        train: TrainConfig = getattr(config, stage)
        check_schedule(train.optimizer, f"config.{stage}.optimizer")
        if train.tokens and train.epochs:
            raise UserError(
                f"'config.{stage}.tokens' is {train.tokens} and 'config.{stage}.epochs' "
                f"{train.epochs:g}: a stage has one length, set one of them to 0"
            )
        _check_shared(config, stage)
        # A published model's context is not known here.
        if train.row_length > config.model.max_length and not config.policy.path:
            raise UserError(
                f"'config.{stage}.row_length' is {train.row_length}, longer than the model's "
                f"'config.model.max_length' of {config.model.max_length}"
            )
    _check_curriculum(config)
    _check_regime(config)
    _check_labelled(config)
    _check_rationalise(config)
    _check_objective(config)
    _check_filter(config.filter)
    if config.warmup.lora.rank:
        raise UserError(
            f"'config.warmup.lora.rank' is {config.warmup.lora.rank}: a warm-up starts from fresh "
            "parameters, and there is nothing in them to adapt. Leave it at 0, or set "
            "'config.train.lora.rank'"
        )
    for stage in ("warmup", "train"):
        check_lora(getattr(config, stage).lora, config.model, f"config.{stage}.lora")


def _check_shared(config: Config, stage: str) -> None:
    """Raises UserError: no text of the stage shares a prompt with another of its unit."""
    if not getattr(config, stage).share_prompts:
        return
    objective = "sft" if stage == "warmup" else config.objective.name
    if objective not in COMPARING:
        raise UserError(
            f"'config.{stage}.share_prompts' reads a prompt once for all that is compared of it, "
            f"and the objective of this stage, {objective}, compares nothing of one prompt: leave "
            f"it at False; it is for {', '.join(COMPARING)}"
        )


def _check_curriculum(config: Config) -> None:
    """Rules of how hard problems get."""
    generate, seen = config.generate, config.task.seed_difficulty
    if generate.curriculum == "step":
        return
    name = f"'config.generate.curriculum={generate.curriculum}'"
    if generate.max_difficulty <= seen or not generate.difficulty_step:
        raise UserError(
            f"{name} goes beyond the labelled problems: set 'config.generate.max_difficulty' above "
            f"'config.task.seed_difficulty' of {seen}, and 'difficulty_step' to 1 or more"
        )
    if generate.curriculum == "accelerated" and not generate.advance:
        raise UserError(
            f"{name} unlocks difficulties of which enough was kept, and of 'advance' at 0 any "
            "share is enough: set 'config.generate.advance' to 0.9, say"
        )


def _check_regime(config: Config) -> None:
    """Rules of what rounds train on."""
    regime = config.regime
    if -1 < regime.seed_share < 0:
        raise UserError(
            f"'config.regime.seed_share' is {regime.seed_share}: write a share from 0 to 1, or −1"
        )
    if max(regime.seed_share, 0) + config.train.newest_share > 1:
        raise UserError(
            f"'config.regime.seed_share' of {regime.seed_share} and 'config.train.newest_share' of "
            f"{config.train.newest_share} are more than all draws: lower one"
        )
    if regime.optimizer == "keep" and regime.start != "continue":
        raise UserError(
            "'config.regime.optimizer=keep' goes on with the moments of the round before, and "
            f"'config.regime.start={regime.start}' with other parameters than its: leave it at "
            "reset"
        )
    if regime.start == "scratch":
        _check_scratch(config)


def _check_scratch(config: Config) -> None:
    """Rules of rounds that start from fresh parameters."""
    asked = "'config.regime.start=scratch' trains fresh parameters each round, and"
    if config.policy.path or config.train.lora.rank:
        raise UserError(
            f"{asked} a published model or an adapter ('config.roles.policy.path', "
            "'config.train.lora.rank') is trained further: set it to base or continue"
        )
    if config.objective.name != "sft":
        raise UserError(
            f"{asked} 'config.objective.name={config.objective.name}' improves parameters that "
            "sample: set it to base or continue"
        )


def pairs_labelled(config: Config) -> bool:
    """Whether what is compared are gold completions and samples, which no judge decides."""
    return config.objective.name in OF_PAIRS and config.preference.pairing == "labelled"


def _check_labelled(config: Config) -> None:
    """Rules of rounds that go back to the labelled problems."""
    labelled = config.generate.problems == "labelled"
    if labelled and not config.task.seed_problems:
        raise UserError(
            "'config.generate.problems=labelled' goes back to labelled problems, and there are "
            "none: raise 'config.task.seed_problems'"
        )
    if pairs_labelled(config) and not labelled:
        raise UserError(
            "'config.preference.pairing=labelled' compares samples with gold completions: set "
            "'config.generate.problems' to labelled, too"
        )


def _check_rationalise(config: Config) -> None:
    """Rules of samples that are drawn with a hint."""
    if not config.generate.rationalise:
        return
    name = "'config.generate.rationalise'"
    if not config.task.hints:
        raise UserError(
            f"{name} gives the model hints, which it learns to read from labelled problems: set "
            "'config.task.hints=True'"
        )
    if config.objective.name != "sft":
        raise UserError(
            f"{name} draws completions from another prompt than they are learnt with, and "
            f"'config.objective.name={config.objective.name}' compares what one prompt gave: set "
            "it to sft, or leave hints out"
        )
    if config.generate.chain:
        raise UserError(
            f"{name} asks the policy itself, and 'config.generate.chain' asks others, too: leave "
            "it empty"
        )
    if config.members > 1:
        raise UserError(
            f"'config.members' is {config.members}, which vote, and {name} would tell them what "
            "to vote for: set it to 1"
        )


def _check_objective(config: Config) -> None:
    """Rules of what is minimised, and on what."""
    wanted = config.objective
    _check_teacher(config)
    if wanted.name in ("sft", "gkd"):
        return
    name = f"'config.objective.name={wanted.name}'"
    if config.noise.rate:
        raise UserError(
            f"'config.noise.rate' puts wrong labels into rows that are imitated, and {name} "
            "imitates none: set it to 0"
        )
    if config.members > 1:
        raise UserError(
            f"'config.members' is {config.members}, which vote on what is imitated, and {name} "
            "imitates nothing: set it to 1"
        )
    if config.regime.seed_share >= 0:
        raise UserError(
            f"'config.regime.seed_share' is a share of labelled rows, which are imitated, and "
            f"{name} imitates none: leave it at −1"
        )
    if wanted.name == "reward" and config.regime.optimizer == "keep":
        raise UserError(
            f"'config.regime.optimizer=keep' goes on with the moments of the round before, and "
            f"with {name} each round trains another model, from the policy: leave it at reset"
        )
    alone = wanted.name == "kto" or wanted.taught or pairs_labelled(config)
    if config.generate.samples < 2 and not alone:
        raise UserError(
            f"{name} compares completions of a prompt, and there is one: set "
            "'config.generate.samples' to 2 or more"
        )
    if wanted.name == "policy_gradient" and config.generate.chain:
        raise UserError(
            f"{name} learns from the tokens that the policy drew, and 'config.generate.chain' "
            "makes texts of several: leave it empty"
        )
    if wanted.name == "policy_gradient" and wanted.truncate and wanted.clip_low + wanted.clip_high:
        raise UserError(
            f"'config.objective.truncate' is {wanted.truncate}, and ratios are clipped, too: set "
            "'clip_low' and 'clip_high' to 0, or leave it at 0"
        )


def _check_teacher(config: Config) -> None:
    """Rules of learning from the role `teacher`."""
    wanted = config.objective
    if (wanted.taught or config.generate.chain == TEACHER) and TEACHER not in config.roles:
        key = "'config.generate.chain=teacher'"
        if wanted.taught:
            key = f"'config.objective.name={wanted.name}'"
            key += " with 'advantage=teacher'" if wanted.name == "policy_gradient" else ""
        raise UserError(
            f"{key} learns from the role 'teacher', and there is none: set "
            "'config.roles.teacher.path', or 'config.roles.teacher.weights' to base or round:N"
        )
    if wanted.name == "gkd" and wanted.divergence == "jsd" and not 0 < wanted.beta < 1:
        raise UserError(
            f"'config.objective.beta' is {wanted.beta}, and 'divergence=jsd' mixes teacher and "
            "student by it: write a number between 0 and 1, both excluded"
        )
    if wanted.taught and wanted.name != "gkd" and wanted.kl and wanted.kl_in == "reward":
        raise UserError(
            "'config.objective.kl_in=reward' takes the divergence from a reward, and "
            "'advantage=teacher' has none: set it to loss, or 'kl' to 0"
        )


def _check_filter(wanted: FilterConfig) -> None:
    """Rules between the keys of a filter."""
    try:
        re.compile(wanted.pattern)
    except re.error as error:
        raise UserError(
            f"'config.filter.pattern' is no regular expression ({error}): {wanted.pattern!r}"
        ) from error
    if wanted.threshold_step and wanted.threshold > wanted.threshold_last:
        raise UserError(
            f"'config.filter.threshold' of {wanted.threshold} rises to "
            f"'config.filter.threshold_last' of {wanted.threshold_last}, which is below it"
        )
    if wanted.nll_low > wanted.nll_high or (wanted.nll_by == "quantile" and wanted.nll_high > 1):
        raise UserError(
            f"'config.filter.nll_low' is {wanted.nll_low} and 'config.filter.nll_high' "
            f"{wanted.nll_high}: want low below high, and with 'nll_by=quantile' both in 0 … 1"
        )


def _votes(config: Config) -> bool:
    """Whether votes are counted."""
    names = re.findall(r"[\w.:]+", f"{config.filter.name} {config.filter.match}")
    names.append(config.judge.name)
    if config.judge.name == "ensemble":
        names += [member.strip().partition("*")[0] for member in config.judge.members.split(",")]
    return "vote" in names


def check_schedule(optimizer: OptimizerConfig, where: str) -> None:
    """Raises UserError unless warm-up and decay fit into a stage."""
    if optimizer.warmup + optimizer.decay > 1:
        raise UserError(
            f"'{where}': warmup {optimizer.warmup} and decay {optimizer.decay} together exceed the "
            "whole schedule (1.0)"
        )


def check_reward(config: RewardConfig) -> None:
    """Raises UserError: keys that are not read by what is to be trained, or cannot be together."""
    default = RewardConfig()
    unread, reader = ("l2", "steps"), "head ('config.train.epochs' is of lora and full)"
    if config.tune == "head":
        unread, reader = ("train",), "lora or full"
    for name in unread:
        if getattr(config, name) != getattr(default, name):
            raise UserError(
                f"'config.{name}' is not read with 'config.tune={config.tune}': leave it alone, or "
                f"set 'config.tune' to {reader}"
            )
    if config.tune == "lora" and not config.train.lora.rank:
        raise UserError(
            "'config.train.lora.rank' is 0, and 'config.tune=lora' trains an adapter: set it to at "
            "least 1, or 'config.tune' to full"
        )
    check_schedule(config.train.optimizer, "config.train.optimizer")


def check_lora(lora: LoraConfig, model: ModelConfig, where: str = "lora") -> None:
    """Raises UserError unless the model has every matrix that `targets` names, and each once."""
    if lora.targets == "all":
        return
    names = lora.matrices
    for name in names:
        if name not in ADAPTABLE:
            raise UserError(f"'{where}.targets' names '{name}': {nearest(name, ADAPTABLE)}")
    if len(set(names)) < len(names):
        raise UserError(f"'{where}.targets' is '{lora.targets}', which names a matrix twice")
    if "gate" in names and model.activation == "gelu":
        raise UserError(
            f"'{where}.targets' names 'gate', and a feed-forward block with "
            "'config.model.activation=gelu' has none: leave it out"
        )


def _check_model(model: ModelConfig) -> None:
    """Rules between the keys of a model."""
    if model.positions == "rope" and model.head_width % 2:
        raise UserError(
            f"'config.model.head_width' must be even with rotary positions, got {model.head_width}"
        )
    if model.heads % model.key_value_heads:
        raise UserError(
            f"'config.model.kv_heads' is {model.kv_heads}, which does not divide "
            f"'config.model.heads' of {model.heads}"
        )
    if not model.pattern or set(model.pattern) - set("fs"):
        raise UserError(
            f"'config.model.pattern' is '{model.pattern}': write f for a layer of full attention "
            "and s for one with a sliding window, as in sssssf"
        )
    if ("s" in model.pattern) != bool(model.window):
        raise UserError(
            f"'config.model.window' is {model.window} and 'config.model.pattern' is "
            f"'{model.pattern}': a window needs layers marked s, and they need a window"
        )
    if model.rope_scaling == "llama3" and model.rope_low >= model.rope_high:
        raise UserError(
            f"'config.model.rope_low' ({model.rope_low}) must be below "
            f"'config.model.rope_high' ({model.rope_high})"
        )
