"""Which tokens may be scored, and when the scores that there are decide a law: the paper's order."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from qsharp_jax import types
from qsharp_jax.types import Array

_MARGIN = 1e-3  # by which a nucleus must be clear of its edge, to be known before all weights are


def are_candidates(logits: Array, ids: Array, policy: types.Policy, epsilon_cutoff: float) -> Array:
    """Which of the most probable tokens may be scored: those that are possible and not too improbable.

    The name is that of the cut in Hewitt et al. 2022, which removes such tokens; here they weigh as all others do.
    Under the rules 'zero' and 'remove', before top-k and top-p, the law's total variation to that without a cut-off is
    at most the share of the tokens that are cut, if each weighed the most it can.

    Args:
      logits: of the reference.  # [B, V]
      ids: of the most probable tokens, best first.  # [B, C]
      policy: of each row; its temperature is read, 1 in place of 0.
      epsilon_cutoff: least probability under the reference at that temperature; the first token needs none.

    Returns:
      [B, C] bool
    """
    own = jnp.take_along_axis(logits, ids, axis=1)
    possible = own > -jnp.inf
    if not epsilon_cutoff:
        return possible
    temperature = jnp.where(policy.temperature > 0, policy.temperature, 1.0)[:, None]
    log_probs = own / temperature - jax.nn.logsumexp(logits / temperature, axis=-1, keepdims=True)
    return possible & ((log_probs >= jnp.log(epsilon_cutoff)) | (jnp.arange(ids.shape[1])[None] == 0))


def is_open(candidate_logits: Array, candidate_weighing: Array, others: Array, log_weight: Array, scored: Array,
            low: Array, high: Array, policy: types.Policy, outside: str) -> Array:
    """Whether what is not scored yet could change the paper order's law: False is certain, True a guess.

    Weights are bounded, and the cuts come after them. A row is closed where its nucleus consists of scored tokens (or
    is the most probable token alone, whose own weight then does not matter) however large the weights of all other
    tokens turn out to be.

    Args:
      candidate_logits: of the reference, of all tokens that may be scored, best first; -inf where there are no more.
        # [B, C]
      candidate_weighing: their `weighing_logits`, normalised or not, -inf likewise; anything if those are None.
        # [B, C]
      others: log Σ exp(logit / temperature) over the tokens that are no candidates.  # [B]
      log_weight: of the scored candidates, anything elsewhere.  # [B, C]
      scored: which are scored.  # [B, C] bool
      low: no log weight is below; may be -inf.  # [B]
      high: none is above.  # [B]
      policy: of each row.
      outside: rule for tokens that are no candidates, see `offsets`.

    Returns:
      [B] bool
    """
    if outside == 'soft_bellman':  # its weight falls where a candidate's rises
        return jnp.ones(others.shape, bool)
    temperature = jnp.where(policy.temperature > 0, policy.temperature, 1.0)[:, None]
    real = candidate_logits > -jnp.inf
    most = jnp.where(scored, log_weight, high[:, None])
    if outside == 'zero':
        rest = jnp.zeros_like(high)
    elif outside == 'remove':
        rest = jnp.full_like(high, -jnp.inf)
    elif outside == 'min':
        rest = jnp.min(most, axis=-1)
    elif outside == 'average':
        rest = jnp.mean(most, axis=-1, where=real)
    else:
        rest = jax.nn.logsumexp(candidate_weighing + most, axis=-1) - jax.nn.logsumexp(candidate_weighing, axis=-1)
    # Before anything is scored, the most probable token is known to weigh at least `low`.
    first = ~jnp.any(scored, axis=-1, keepdims=True) & (jnp.arange(scored.shape[1])[None] == 0)
    known = scored | first
    scaled = candidate_logits / temperature
    least = jnp.where(known, scaled + jnp.where(scored, log_weight, low[:, None]) / temperature, -jnp.inf)
    unit = jnp.max(least, axis=-1, keepdims=True)
    unit = jnp.where(jnp.isfinite(unit), unit, 0.0)
    inside = -jnp.sort(-jnp.exp(least - unit), axis=-1)
    left = jnp.where(known, 0.0, jnp.exp(scaled + most / temperature - unit))
    behind = rest[:, None] / temperature - unit
    total = jnp.sum(inside + left, axis=-1, keepdims=True) + jnp.exp(others[:, None] + behind)
    # No other token is more probable than the last candidate.
    last = jnp.min(scaled, axis=-1, keepdims=True, where=real, initial=jnp.inf)
    largest = jnp.maximum(jnp.max(left, axis=-1, keepdims=True), jnp.exp(last + behind))
    reached = jnp.cumsum(inside, axis=-1)
    top_p = policy.top_p[:, None]
    # The margins keep clear of the rounding of whoever finds the nucleus.
    ends = (reached >= (1 + _MARGIN) * top_p * total) & (inside > (1 + _MARGIN) * largest)
    ends &= reached - inside < (1 - _MARGIN) * top_p * jnp.sum(inside, axis=-1, keepdims=True)
    return ~(jnp.any(ends, axis=-1) & (policy.temperature > 0) & (policy.top_k <= 0))
