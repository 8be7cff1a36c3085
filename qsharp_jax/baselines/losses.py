"""Losses of the methods that train the policy itself, as pure functions of log-probabilities.

Letters: B answers or pairs, P prompts, G answers of a prompt, T tokens, V vocabulary. The log-probability of an answer
is the sum over its tokens; losses are means over answers or pairs. Rewards become advantages on the host, before the
gradient.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.types import Array

_SMALLEST_SPREAD = 1e-6  # of the rewards of one prompt: below, all are equal but for rounding


def answer_log_probs(log_probs: Array, weights: Array) -> Array:
    """Returns the log-probability of each answer in nats.

    Args:
      log_probs: of each token, given those before it.  # [..., T]
      weights: 1 on the tokens of the answer, 0 elsewhere.  # [..., T]
    """
    return jnp.sum(weights * log_probs, axis=-1)


def over_mean(rewards: np.ndarray) -> np.ndarray:
    """Returns each reward less the mean of all; 0 for an answer without one (NaN).  # [B] -> [B]

    The mean holds the answer itself, so that the expected gradient is (B - 1) / B of that of the expected reward.
    """
    graded = ~np.isnan(rewards)
    mean = rewards[graded].mean() if graded.any() else 0.0
    return np.where(graded, rewards - mean, 0.0)


def over_group(rewards: np.ndarray, scaled: bool) -> np.ndarray:
    """Returns each reward less the mean of its prompt's; 0 for an answer without one (NaN).  # [P, G] -> [P, G]

    Args:
      rewards: of G answers to each of P prompts.
      scaled: divide by the (population) standard deviation of the prompt's rewards, as GRPO does.
    """
    graded = ~np.isnan(rewards)
    count = np.maximum(graded.sum(axis=1, keepdims=True), 1)
    known = np.where(graded, rewards, 0.0)
    above = np.where(graded, known - known.sum(axis=1, keepdims=True) / count, 0.0)
    if not scaled:
        return above
    spread = np.sqrt((above ** 2).sum(axis=1, keepdims=True) / count)
    return np.where(spread > _SMALLEST_SPREAD, above / np.maximum(spread, _SMALLEST_SPREAD), 0.0)


def reinforce(log_probs: Array, weights: Array, advantages: Array) -> Array:
    """REINFORCE (Williams 1992): its gradient is that of minus the expected reward, for answers of this policy.

    Args:
      log_probs: of the tokens under the policy that is trained, and that drew them.  # [B, T]
      weights: 1 on the tokens of the answers.  # [B, T]
      advantages: of the answers, such as from `over_mean`.  # [B]
    """
    return -jnp.mean(advantages * answer_log_probs(log_probs, weights))


def clipped(log_probs: Array, drawn_log_probs: Array, weights: Array, advantages: Array, clip: float) -> Array:
    """The clipped surrogate of PPO (Schulman et al. 2017, equation 7), summed over an answer's tokens.

    Args:
      log_probs: of the tokens under the policy that is trained.  # [B, T]
      drawn_log_probs: the same under the policy that drew them, which no gradient reaches.  # [B, T]
      weights: 1 on the tokens of the answers.  # [B, T]
      advantages: of the answers.  # [B]
      clip: a token whose ratio of probabilities is more than this from 1, in the direction of its advantage, has no
        gradient.
    """
    ratio = jnp.exp(jnp.where(weights > 0, log_probs - drawn_log_probs, 0.0))
    gain = advantages[:, None]
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    return -jnp.mean(jnp.sum(weights * surrogate, axis=-1))


def divergence(log_p: Array, log_q: Array, weights: Array) -> Array:
    """The KL divergence of two policies in nats an answer: exact at each token, summed over those of an answer.

    Args:
      log_p: log-probabilities of all tokens.  # [B, T, V]
      log_q: the same of the policy that the divergence is to; finite wherever `log_p` is.  # [B, T, V]
      weights: 1 on the tokens of the answers.  # [B, T]
    """
    possible = log_p > -jnp.inf
    # Where p is 0 both are replaced: a gradient through infinities would be NaN.
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    each = jnp.sum(jnp.where(possible, jnp.exp(jnp.where(possible, log_p, 0.0)) * difference, 0.0), axis=-1)
    return jnp.mean(jnp.sum(weights * each, axis=-1))


def grpo(log_probs: Array, drawn_log_probs: Array, weights: Array, advantages: Array, clip: float, all_log_probs: Array,
         reference_log_probs: Array, kl: float) -> Array:
    """GRPO (Shao et al. 2024, equation 3) with the exact KL to π_ref at each token in place of a sample of it.

    Sums over tokens, of the surrogate and of the KL, stand where the paper has means over those of an answer, so that
    tokens count alike whatever the answer's length.

    Args:
      log_probs: as in `clipped`.
      drawn_log_probs: likewise.
      weights: likewise.
      advantages: from `over_group`.
      clip: as in `clipped`.
      all_log_probs: of every token under the policy that is trained.  # [B, T, V]
      reference_log_probs: of every token under π_ref.  # [B, T, V]
      kl: the KL coefficient, in units of advantage a nat.
    """
    surrogate = clipped(log_probs, drawn_log_probs, weights, advantages, clip)
    return surrogate + kl * divergence(all_log_probs, reference_log_probs, weights)


def dpo_margins(chosen: Array, rejected: Array, reference_chosen: Array, reference_rejected: Array) -> Array:
    """Returns log π/π_ref of each chosen answer less that of the rejected one.  # [B] x 4 -> [B]"""
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def dpo(chosen: Array, rejected: Array, reference_chosen: Array, reference_rejected: Array, beta: float) -> Array:
    """DPO (Rafailov et al. 2023, equation 7).

    Args:
      chosen: log-probability of the better answer of each pair under the policy that is trained.  # [B]
      rejected: of the other one.  # [B]
      reference_chosen: of the better one under π_ref.  # [B]
      reference_rejected: of the other one.  # [B]
      beta: the KL coefficient; it multiplies log π/π_ref.
    """
    return jnp.mean(jax.nn.softplus(-beta * dpo_margins(chosen, rejected, reference_chosen, reference_rejected)))


def rpo(chosen: Array, rejected: Array, reference_chosen: Array, reference_rejected: Array, beta: float,
        nll_weight: float) -> Array:
    """RPO (Pang et al. 2024): DPO, and the negative log-likelihood of the chosen answers.

    The likelihood is summed over tokens, as in the star-graph code of the Q# paper; Pang et al. divide it by the
    answer's length.

    Args:
      chosen: as in `dpo`.
      rejected: likewise.
      reference_chosen: likewise.
      reference_rejected: likewise.
      beta: likewise.
      nll_weight: of the likelihood's part.
    """
    return dpo(chosen, rejected, reference_chosen, reference_rejected, beta) - nll_weight * jnp.mean(chosen)
