"""The benchmark's workloads by transformers, PEFT and the losses of TRL, on a CPU.

What a library does best counts: parameters are random ones in the same shape, all rows are equally
long and none has padding, AdamW is torch's fused one, and no trainer's loop, logging or data loader
stands around a step. Generation writes exactly as many tokens as are asked for, drawn from the
unfiltered model, and nothing else; karploop's records each token's log-probability, too.
The losses are those of TRL's DPO and GRPO, of one pass over the samples, without a reference for
the latter, as are its defaults. Their log-probabilities are made of logits of the completions
alone: TRL's own head, which goes over the vocabulary in tiles, takes longer, for less memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from karploop.benchmark.subject import Subject
from karploop.benchmark.workloads import Work, asked
from karploop.config import OptimizerConfig
from karploop.models.families import to_hf

_BETA, _CLIP = 0.1, 0.2  # of DPO; of GRPO
_SCORED = 8  # texts at a time: their logits take 2 GB, and more at a time is no faster
_MATRICES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "up": "up_proj",
    "gate": "gate_proj",
    "down": "down_proj",
}


def make(name: str, subject: Subject) -> Work:
    """A workload by its name, warmed up: threads and memory, for nothing compiles.

    Raises:
      UserError: transformers has no model of this shape.
    """
    if name in ("w1", "w2", "w3"):
        return _draw(name, subject)
    work = {
        "score": _score,
        "sft": _imitate,
        "sft_lora": _imitate_with_adapter,
        "dpo": _prefer,
        "grpo": _reinforce,
    }[name](subject)
    work.run()
    return work


def _model(subject: Subject):
    shape = subject.shape
    settings = to_hf(shape.config, shape.vocabulary, shape.config.dtype)
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(subject.config.seed)
    dtype = getattr(torch, shape.config.dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # no token ends a completion
    model.generation_config.pad_token_id = 0
    return model


def _tokens(subject: Subject, seed: int, *shape: int) -> torch.Tensor:
    rng = np.random.default_rng([subject.config.seed, seed])
    return torch.from_numpy(rng.integers(0, subject.shape.vocabulary, shape))


def _generated(model, prompts_PxL: torch.Tensor, samples: int, new: int) -> torch.Tensor:
    """Prompts and `new` tokens behind each, `samples` rows a prompt."""
    with torch.inference_mode():
        found_RxL = model.generate(
            prompts_PxL,
            attention_mask=torch.ones_like(prompts_PxL),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=new,
        )
    assert found_RxL.shape == (len(prompts_PxL) * samples, prompts_PxL.shape[1] + new)
    return found_RxL.clone()  # no tensor of inference: what learns reads it


def _draw(name: str, subject: Subject) -> Work:
    wanted = asked(name, subject.config.seed)
    (length,), (new,) = set(wanted.lengths), set(wanted.new)
    model, prompts_PxL = _model(subject), _tokens(subject, 1, len(wanted.lengths), length)

    def run(new: int = new) -> dict[str, float]:
        _generated(model, prompts_PxL, wanted.samples, new)
        return {}

    run(2)
    return Work(run, len(prompts_PxL) * wanted.samples * new, [])


def _score(subject: Subject) -> Work:
    model, texts_BxL = _model(subject), _tokens(subject, 2, 64, 256)

    def run() -> dict[str, float]:
        with torch.inference_mode():
            for part_BxL in texts_BxL.split(_SCORED):
                logits_BxLxV = model(part_BxL, use_cache=False).logits[:, :-1]
                logprobs_BxLxV = logits_BxLxV.float().log_softmax(-1)
                logprobs_BxLxV.gather(-1, part_BxL[:, 1:, None]).numpy()
        return {}

    return Work(run, texts_BxL.numel(), [])


class _Learner:
    """A model and its optimiser; the settings are those of the config, where both have them."""

    def __init__(self, model, config: OptimizerConfig):
        self.model = model.train()
        self._clip = config.clip_norm
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()


def _imitate(subject: Subject, adapted: Callable = lambda model: model) -> Work:
    learner = _Learner(adapted(_model(subject)), subject.config.train.optimizer)
    rows_BxL = _tokens(subject, 4, 8, 129)
    given_BxL, next_BxL = rows_BxL[:, :-1].contiguous(), rows_BxL[:, 1:].contiguous()

    def run() -> dict[str, float]:
        found = learner.model(given_BxL, labels=given_BxL, shift_labels=next_BxL, use_cache=False)
        learner.step(found.loss)
        return {}

    return Work(run, given_BxL.numel(), [])


def _imitate_with_adapter(subject: Subject) -> Work:
    lora = subject.config.train.lora
    settings = peft.LoraConfig(
        r=lora.rank or 16,
        lora_alpha=lora.alpha or 2 * (lora.rank or 16),
        target_modules=[_MATRICES[name] for name in lora.matrices],
        task_type="CAUSAL_LM",
    )
    return _imitate(subject, lambda model: peft.get_peft_model(model, settings))


def _logprobs(model, texts_BxL: torch.Tensor, start: int) -> torch.Tensor:
    """Of the tokens from place `start` on, and logits of no others."""
    kept = texts_BxL.shape[1] - start + 1
    logits_BxTxV = model(texts_BxL, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
    picked_BxT = logits_BxTxV.gather(-1, texts_BxL[:, start:, None])[..., 0]
    return picked_BxT - logits_BxTxV.logsumexp(-1)


def _prefer(subject: Subject) -> Work:
    pairs, length, start = 4, 129, 64
    model = _model(subject)
    reference = copy.deepcopy(model).requires_grad_(False)
    learner = _Learner(model, subject.config.train.optimizer)
    prompts_PxL = _tokens(subject, 5, pairs, start).repeat(2, 1)  # the better ones, then the worse
    texts_BxL = torch.cat([prompts_PxL, _tokens(subject, 6, 2 * pairs, length - start)], 1)

    def run() -> dict[str, float]:
        began = time.perf_counter()
        with torch.no_grad():
            before_B = _logprobs(reference, texts_BxL, start).sum(1)
        read = time.perf_counter()
        gains_B = _logprobs(model, texts_BxL, start).sum(1) - before_B
        better_P, worse_P = gains_B.chunk(2)
        learner.step(-F.logsigmoid(_BETA * (better_P - worse_P)).mean())
        return {"reference": read - began, "step": time.perf_counter() - read}

    return Work(run, 2 * pairs * (length - 1), [])


def _reinforce(subject: Subject) -> Work:
    prompts, samples, length, new = 4, 4, 64, 32
    model, prompts_PxL = _model(subject), _tokens(subject, 1, prompts, length)
    learner = _Learner(model, subject.config.train.optimizer)
    rewards_PxN = torch.from_numpy(np.random.default_rng(0).random((prompts, samples))).float()
    spread_Px1 = rewards_PxN.std(1, keepdim=True) + 1e-4
    advantages_R = ((rewards_PxN - rewards_PxN.mean(1, keepdim=True)) / spread_Px1).reshape(-1)

    def run() -> dict[str, float]:
        began = time.perf_counter()
        model.eval()
        texts_RxL = _generated(model, prompts_PxL, samples, new)
        model.train()
        drawn = time.perf_counter()
        logprobs_RxT = _logprobs(model, texts_RxL, length)
        ratios_RxT = torch.exp(logprobs_RxT - logprobs_RxT.detach())
        clipped_RxT = ratios_RxT.clamp(1 - _CLIP, 1 + _CLIP)
        gains_RxT = torch.minimum(
            ratios_RxT * advantages_R[:, None], clipped_RxT * advantages_R[:, None]
        )
        learner.step(-gains_RxT.mean())
        return {"sampling": drawn - began, "step": time.perf_counter() - drawn}

    return Work(run, prompts * samples * new, [])
