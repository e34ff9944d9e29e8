"""The programs of a run, lowered from shapes alone and compiled for devices that may not be here.

They are the jitted functions of `Sampler` and `Trainer` that a run calls, and no copies of them. No
parameter is made: of a published model its config.json is enough. Without its tokenizer nobody
knows how long prompts are, so that the caller says it.
"""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from karploop.config import Config
from karploop.data.pretrained import TOKENIZER_FILES
from karploop.data.prompting import PlainPrompting
from karploop.data.tokenizer import CharTokenizer
from karploop.dryrun.hlo import Collective, collectives
from karploop.errors import UserError
from karploop.machinery import SAMPLED, check_divides, make_sampler, make_trainers, prepare
from karploop.mesh import make_mesh
from karploop.models.checkpoint import CONFIG, read_json
from karploop.models.families import from_hf
from karploop.models.weights import Weights
from karploop.policy import Policy
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Sampler
from karploop.training.objectives import EPISODES, EXAMPLES, LABELS, PAIRS, REWARDS, Objective
from karploop.training.packing import Batch, Tokenized, pack
from karploop.training.trainer import Trainer

ROLLOUT, SCORE, STEP = "rollout", "score", "train step"


@dataclass(frozen=True)
class Laid:
    """A config on a mesh, of which nothing has been compiled.

    Attributes:
      notes: what is assumed, for people to read.
    """

    config: Config
    policy: Policy
    weights: Weights
    sampler: Sampler
    trainer: Trainer
    notes: tuple[str, ...] = ()

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt, as the sampler pads it."""
        return self.sampler.prompt_lengths[-1]

    @property
    def prefix(self) -> int:
        return len(self.sampler.prefix)


@dataclass(frozen=True)
class Program:
    """What the compiler says of one program, per device.

    Attributes:
      fits: False where the compiler refused it.
      memory: bytes by kind: arguments, outputs, shared (of both), temporaries, peak. Of one that
        does not fit: `needed` and `available`, as the compiler names them, and arguments.
      resident: bytes of parameters that lie beside it in a run, and are no arguments of it.
    """

    name: str
    fits: bool
    memory: dict[str, float]
    resident: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    seconds: float = 0.0  # of compiling


def lay(config: Config, devices: Sequence, prompt_length: int | None = None) -> Laid:
    """Args:
      prompt_length: tokens of the longest prompt, for a model whose tokenizer is not there.

    Raises:
      UserError: anything that a run of this config on these devices would refuse.
    """
    if not _is_bare(config):
        if prompt_length is not None:
            raise UserError("--prompt_length is for a model without tokenizer; here it is known")
        m = prepare(config, devices)
        return Laid(config, m.policy, m.weights, m.sampler, m.trainers["train"], _notes(config))
    policy, notes = _bare(config, prompt_length)
    mesh = make_mesh(config.mesh, devices)
    for where in (*SAMPLED, "train.rows"):
        check_divides(config, *where.split("."), mesh)
    weights = Weights(policy.config, policy.vocabulary, mesh)
    teacher = weights if config.objective.taught else None
    if teacher:
        notes += ("the teacher is taken to be as large as the policy",)
    trainers = make_trainers({0: config}, weights, policy, teacher)[0]
    sampler = make_sampler(weights, policy)
    return Laid(config, policy, weights, sampler, trainers["train"], notes + _notes(config))


def _is_bare(config: Config) -> bool:
    """Whether the policy is a folder that lacks weights or a tokenizer."""
    folder = pathlib.Path(config.policy.path or "/")
    if not config.policy.path or not (folder / CONFIG).is_file():
        return False
    return not any(folder.glob("*.safetensors")) or not any(
        (folder / name).is_file() for name in TOKENIZER_FILES
    )


def _bare(config: Config, prompt_length: int | None) -> tuple[Policy, tuple[str, ...]]:
    """A policy whose prompts are as long as is said, else as a training row leaves room for."""
    shape, vocabulary = from_hf(read_json(pathlib.Path(config.policy.path) / CONFIG))
    execution = {name: getattr(config.model, name) for name in ("dtype", "scan", "remat")}
    shape = type(shape)(**(vars(shape) | execution))
    new = config.prompt.max_new_tokens
    prompt = prompt_length or config.train.row_length - new
    if prompt < 1 or prompt + new > shape.max_length:
        raise UserError(
            f"prompts of {prompt} tokens and 'config.prompt.max_new_tokens' of {new} do not go "
            f"into the model's context of {shape.max_length}: set --prompt_length"
        )
    stand_in = CharTokenizer.ascii()
    policy = Policy(
        config=shape,
        vocabulary=vocabulary,
        prompting=PlainPrompting(stand_in),
        role=None,
        labelled=None,
        prompt_length=prompt - 1,  # a start token comes on top
        completion_length=new - 1,
        row_length=prompt + new - 1,
    )
    return policy, (f"no tokenizer there: prompts are taken to have {prompt} tokens",)


def _notes(config: Config) -> tuple[str, ...]:
    notes = []
    if config.generate.chain:
        notes.append("completions come from a chain, which is not compiled and not counted")
    if config.judge.name not in ("", "verifier", "vote"):
        notes.append("judging by a model is not counted")
    if config.train.share_prompts and config.train.epochs:
        notes.append("a pass over the data is counted with a prompt for each text, none shared")
    if config.phases:
        notes.append("the settings of the first phase are taken for all rounds")
    return tuple(notes)


def lowerings(laid: Laid) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """How each program is lowered, by name."""
    g, e, sampler = laid.config.generate, laid.config.evaluate, laid.sampler
    sampling = Sampling.of(g)
    named: dict[str, Callable[[], jax.stages.Lowered]] = {}
    if not g.chain:
        more: dict[str, Any] = dict(samples=g.samples, sampling=sampling)
        named[ROLLOUT] = lambda: sampler.lower_decode(g.batch, **more, decoding=Decoding.of(g))
    named[SCORE] = lambda: sampler.lower_score(e.batch)
    named[STEP] = lambda: laid.trainer.lower_step(example_batch(laid))
    return named


def compile_program(laid: Laid, name: str) -> Program:
    """One of `lowerings`, compiled; one that is too large for the devices is described as such."""
    started, mesh = time.monotonic(), laid.weights.mesh
    try:
        compiled = lowerings(laid)[name]().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = exhausted(str(error)) | {"arguments": arguments(laid, name)}
        return Program(name, False, memory, resident(laid, name), [], time.monotonic() - started)
    new = laid.sampler.completion_length
    g = laid.config.generate
    waves = -(-g.batch // (g.slots or g.batch))
    chunks = waves * -(-max(new - 1, 0) // g.fused_steps)
    moved = collectives(compiled.as_text(), dict(mesh.shape), open_loops=max(chunks, 1))
    memory = _memory(compiled.memory_analysis())
    return Program(name, True, memory, resident(laid, name), moved, time.monotonic() - started)


def example_batch(laid: Laid) -> Batch:
    """A batch as the objective packs it, for its shapes."""
    train, objective = laid.config.train, laid.trainer.objective
    text = Tokenized(np.zeros(2, np.int32), 1, **_beside(objective))
    texts = (text, text) if objective.lesson in (PAIRS, LABELS) else (text,)
    shape = train.rows, train.row_length, train.accumulation
    return next(pack([texts], iter([0]), *shape))[0]


def _beside(objective: Objective) -> dict[str, dict[str, Any]]:
    """What a text carries for the objective's loss; see `lessons.units`."""
    token, one = np.zeros(1, np.float32), 0.0
    if objective.lesson == EXAMPLES:
        return {}
    by_text: dict[str, Any] = {"present": one}
    by_token: dict[str, Any] = {}
    if objective.lesson == LABELS:
        by_text["desirable"] = one
    if objective.lesson == EPISODES:
        by_token = {"sampler": token, "advantage": token}
    if objective.reference == "text":
        by_text["reference"] = one
    elif objective.reference == "token":
        by_token["reference"] = token
    return {"by_text": by_text, "by_token": by_token}


def per_device(abstract: Any, shardings: Any) -> float:
    """Bytes of a tree of shapes on each device."""
    sizes = jax.tree.map(
        lambda x, s: np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, abstract, shardings
    )
    return float(sum(jax.tree.leaves(sizes)))


def arguments(laid: Laid, name: str) -> float:
    """Bytes of parameters and optimiser state that a program is given, on each device."""
    weights, trainer = laid.weights, laid.trainer
    params = per_device(weights.abstract, weights.shardings)
    if name != STEP:
        return params
    state = per_device(trainer.abstract, trainer.shardings)
    return state + (params if laid.config.train.lora.rank else 0.0)


def resident(laid: Laid, name: str) -> float:
    """Bytes beside a program in a run: below a merged adapter, its base stays on the devices; so
    does the base, while samples are compared with it."""
    config = laid.config
    beside = name == ROLLOUT and config.train.lora.rank or name == SCORE and config.evaluate.samples
    if not beside or laid.trainer.objective.reads == REWARDS and name == ROLLOUT:
        return 0.0
    return per_device(laid.weights.abstract, laid.weights.shardings)


def _memory(stats: Any) -> dict[str, float]:
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    shared, temporaries = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    code = stats.generated_code_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "shared": shared,
        "temporaries": temporaries,
        "code": code,
        "peak": arguments + outputs - shared + temporaries + code,
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"


def exhausted(message: str) -> dict[str, float]:
    """`needed` and `available` bytes of the compiler's refusal, as far as it names them."""
    patterns = (
        rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
        rf"Used {_SIZE} of {_SIZE} hbm",
        rf"requires {_SIZE}.*?limit of {_SIZE}",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            needed, unit, available, other = match.groups()
            sizes = float(needed) * _UNITS[unit], float(available) * _UNITS[other]
            return dict(zip(("needed", "available"), sizes, strict=True))
    return {}
