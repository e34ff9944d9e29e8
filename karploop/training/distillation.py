"""Objectives with a teacher: its distribution is learnt, on texts of the student or of the teacher.

Three ways, by what is known of the teacher:

  its texts alone          Supervised learning on them: sequence-level distillation (arXiv
                           1606.07947) is the objective `sft` on the teacher's completions and needs
                           nothing of its own.
  sampled tokens' scores   `reverse_kl_advantages` on the student's own samples, for
                           `policy_losses.policy_loss`. One number a token, from any teacher with
                           the same tokenizer.
  all next tokens'         `distillation_loss` on texts of either, between whole distributions:
                           generalised knowledge distillation (arXiv 2306.13649). In training, where
                           there is no room for these, `token_divergences`.

Both models' distributions are unfiltered and at one temperature; for another than 1, divide logits
by it before the softmax.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from karploop.errors import UserError
from karploop.models.decoder import Decoder
from karploop.models.likelihood import by_chunks
from karploop.training.weighting import full

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
_NEVER = -1e4  # for log 0: its exponential is 0, and its products are numbers


def reverse_kl_advantages(logprobs_T: jax.Array, teacher_T: jax.Array) -> jax.Array:
    """log π_teacher − log π of tokens that the student sampled, without a gradient; float32, nats.

    As the advantages of a policy gradient they make the student descend KL(student ‖ teacher) at
    each of the positions that it visits (K. Lu, On-policy distillation, Thinking Machines Lab,
    2025; arXiv 2306.13649 with the reverse divergence). What a token does to the divergence at
    later positions is left out, which arXiv 2306.08543 has.

    Args:
      logprobs_T: of the sampled tokens by the student that sampled them.
      teacher_T: of the same tokens after the same prefixes by the teacher. One that gives a token
        no probability (−inf) has an advantage of about −10⁴ there.
    """
    return jax.lax.stop_gradient(_finite(teacher_T) - _finite(logprobs_T))


def distillation_loss(
    student_TxV: jax.Array,
    teacher_TxV: jax.Array,
    shares_T: jax.Array,
    divergence: str,
    beta: float = 0.5,
) -> jax.Array:
    """Σ share · divergence between teacher and student at each token, nats.

    Args:
      student_TxV, teacher_TxV: log-softmax over the vocabulary; only the first has a gradient.
      shares_T: as `policy_losses.token_shares` gives them; where they are 0, nothing else is read.
      divergence, beta: as in `divergences`.

    Returns:
      A scalar. Over chunks of positions, and over chunks of the vocabulary, the losses add up.
    """
    shares_T = full(shares_T)
    counted_Tx1 = (shares_T > 0)[:, None]
    student_TxV, teacher_TxV = (
        jnp.where(counted_Tx1, full(x_TxV), 0.0) for x_TxV in (student_TxV, teacher_TxV)
    )
    return jnp.sum(shares_T * divergences(student_TxV, teacher_TxV, divergence, beta))


class Read(NamedTuple):
    """A model, and its hidden states of a batch after the final norm."""

    model: Decoder
    params: Any
    hidden_BxLxE: jax.Array


def token_divergences(
    student: Read,
    teacher: Read,
    targets_BxL: jax.Array,
    wanted_BxL: jax.Array,
    *,
    divergence: str,
    beta: float,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """The divergence at each position, without logits of a whole batch; only `student` has a
    gradient.

    Args:
      student, teacher: of any widths. Where one embedding has more rows, which are then padding,
        both distributions are over the rows that the other has.
      targets_BxL: the token that comes next, for the second result.
      wanted_BxL: bool; both heads are spent on these.
      divergence, beta: as in `divergences`.
      temperature: that the logits of both are divided by, above 0.

    Returns:
      divergences_BxL: nats, float32; 0 where not wanted.
      best_BxL: whether the target is the student's most probable token, bool; false where not
        wanted.
    """
    models = student.model, teacher.model
    shared = min(model.vocabulary for model in models)

    def look(student_BxCxE, teacher_BxCxE, targets_BxC):
        logits_BxCxV, taught_BxCxV = (
            read.model.apply(read.params, hidden_BxCxE, method="logits")[..., :shared]
            for read, hidden_BxCxE in ((student, student_BxCxE), (teacher, teacher_BxCxE))
        )
        found_BxC = divergences(
            jax.nn.log_softmax(logits_BxCxV / temperature),
            jax.nn.log_softmax(taught_BxCxV / temperature),
            divergence,
            beta,
        )
        return found_BxC, jnp.argmax(logits_BxCxV, axis=-1).astype(jnp.int32) == targets_BxC

    given = (student.hidden_BxLxE, jax.lax.stop_gradient(teacher.hidden_BxLxE), targets_BxL)
    logits = sum(model.vocabulary for model in models)
    return by_chunks(look, given, wanted_BxL, logits, student.model.parts)


def divergences(
    student_TxV: jax.Array, teacher_TxV: jax.Array, divergence: str, beta: float = 0.5
) -> jax.Array:
    """Of each token's two distributions, in nats (arXiv 2306.13649, eq. 1).

      forward_kl   KL(teacher ‖ student): the student is to cover all that the teacher may say
      reverse_kl   KL(student ‖ teacher): it is to say nothing that the teacher would not
      jsd          β · KL(teacher ‖ M) + (1 − β) · KL(student ‖ M), M = β · teacher + (1 − β) ·
                   student; bounded, and divided by β or 1 − β near either of the two as β nears
                   0 or 1

    Args:
      student_TxV, teacher_TxV: log-probabilities. What is never said may be −inf and counts as
        −10⁴, so that a divergence that should be infinite is large. V may be a part of the
        vocabulary: each entry adds its term to the sum, which is a divergence once all have.
      beta: for 'jsd', between 0 and 1.

    Raises:
      UserError: there is no such divergence, or `beta` is not between 0 and 1.
    """
    student_TxV, teacher_TxV = _finite(student_TxV), jax.lax.stop_gradient(_finite(teacher_TxV))
    if divergence == "forward_kl":
        return _kl(teacher_TxV, student_TxV)
    if divergence == "reverse_kl":
        return _kl(student_TxV, teacher_TxV)
    if divergence != "jsd":
        raise UserError(
            f"there is no divergence '{divergence}': it is one of {', '.join(DIVERGENCES)}"
        )
    if not 0 < beta < 1:
        raise UserError(f"beta is {beta}: 'jsd' needs one between 0 and 1, both excluded")
    mixture_TxV = jnp.logaddexp(math.log(beta) + teacher_TxV, math.log1p(-beta) + student_TxV)
    return beta * _kl(teacher_TxV, mixture_TxV) + (1 - beta) * _kl(student_TxV, mixture_TxV)


def _kl(p_TxV: jax.Array, q_TxV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p_TxV) * (p_TxV - q_TxV), axis=-1)


def _finite(logprobs_X: jax.Array) -> jax.Array:
    return jnp.maximum(full(logprobs_X), _NEVER)
