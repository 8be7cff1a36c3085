"""One token for every row: reference, values of the candidates, THE sampling distribution, a draw."""
from __future__ import annotations

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import guidance, sharding
from qsharp_jax.categorical import ReturnDistribution
from qsharp_jax.decoding.state import DecodeState, is_eos
from qsharp_jax.types import Array, Cache, Params, Policy, Reference, Value

_LAWS = 2 ** 27  # bytes a device, about eight times its logits, above which rows are worked out by parts


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a value network bends the reference. Static: a change compiles anew.

    Attributes:
      value: the network, or None for the plain reference.
      distribution: how its scores are read.
      candidates: tokens scored per pass.
      outside: rule for tokens that are not scored (`guidance.OUTSIDE`).
      order: 'paper' (guide, then temperature, top-k, top-p) or 'after_sampler' (guide the truncated sampler).
      offset: 'qsharp', 'cd' or 'fudge'.
    """

    value: Value | None = None
    distribution: ReturnDistribution | None = None
    candidates: int = 20
    outside: str = 'mean'
    order: str = 'paper'
    offset: str = 'qsharp'


@struct.dataclass
class Scored:
    """Log-weights of the candidates, scattered over the vocabulary."""

    log_weight: Array  # [B, V]
    mean: Array  # expected return, NaN where not scored  # [B, V]
    mask: Array  # [B, V] bool
    root_log_weight: Array  # [B]
    tokens: Array  # that the network was given  # [] int32
    cache: Cache


def _score_chunk(how: Guidance, params: Params, state: DecodeState, policy: Policy, ids: Array, wanted: Array,
                 scored: Scored) -> Scored:
    """Adds one packed pass over the candidates `ids` [B, C], of which `wanted` [B, C] count."""
    assert how.value is not None and how.distribution is not None
    scores, cache = how.value.score(params, state.pending, ids, state.length, scored.cache)
    vocab = scored.mask.shape[1]
    target = jnp.where(wanted, ids, vocab)  # out of range: dropped by the scatter
    row = jnp.arange(ids.shape[0])[:, None]
    weight = how.distribution.log_weight(scores.candidates, policy.eta[:, None], how.offset)
    mean = how.distribution.mean(scores.candidates)
    return Scored(
        log_weight=scored.log_weight.at[row, target].set(weight, mode='drop'),
        mean=scored.mean.at[row, target].set(mean, mode='drop'),
        mask=scored.mask.at[row, target].set(True, mode='drop'),
        root_log_weight=how.distribution.log_weight(scores.root, policy.eta, how.offset),
        # Without a score of the root all candidates are read off it.
        tokens=scored.tokens + (1 + ids.shape[1] if how.value.scores_root else 1),
        cache=cache,
    )


def score_candidates(how: Guidance, params: Params, state: DecodeState, policy: Policy, logits: Array,
                     sampler: Array) -> Scored:
    """Returns the log-weights of every token that the guided law needs.

    In the paper's order these are the `candidates` most probable tokens under the reference: one packed pass. In the
    other order they are the sampler's whole support, in as many passes as its largest nucleus needs, never cut.

    Args:
      how: the guidance.
      params: of the value network.
      state: before this token.
      policy: of each row.
      logits: of the reference.  # [B, V]
      sampler: log-probabilities of the plain sampler, -inf outside its support.  # [B, V]
    """
    batch, vocab = logits.shape
    count = min(how.candidates, vocab)
    empty = Scored(
        log_weight=jnp.zeros((batch, vocab), jnp.float32),
        mean=jnp.full((batch, vocab), jnp.nan, jnp.float32),
        mask=jnp.zeros((batch, vocab), bool),
        root_log_weight=jnp.zeros(batch, jnp.float32),
        tokens=jnp.zeros((), jnp.int32),
        cache=state.value_cache,
    )
    if how.order == 'paper':
        ids = guidance.top_candidates(logits, count)
        possible = jnp.take_along_axis(logits, ids, axis=1) > -jnp.inf
        return _score_chunk(how, params, state, policy, ids, possible, empty)

    # A row that needs no values (finished, or at eta = inf) must not make the batch go on for its nucleus.
    needed = (sampler > -jnp.inf) & (state.active & jnp.isfinite(policy.eta))[:, None]

    def more(carry: Scored) -> Array:
        return jnp.any(needed & ~carry.mask)

    def chunk(carry: Scored) -> Scored:
        left = jnp.where(needed & ~carry.mask, sampler, -jnp.inf)
        ids = guidance.top_candidates(left, count)
        wanted = jnp.take_along_axis(left, ids, axis=1) > -jnp.inf
        return _score_chunk(how, params, state, policy, ids, wanted, carry)

    # The first chunk always runs: it is what puts the pending token into the value cache.
    return jax.lax.while_loop(more, chunk, chunk(empty))


def law(how: Guidance, policy: Policy, count: Array, logits: Array, scored: Scored | None) -> Array:
    """Returns the log-probabilities that each row's next token is drawn from.  # [B, V]

    Args:
      how: the guidance.
      policy: of each row.
      count: tokens of the answer so far.  # [B]
      logits: of the reference.  # [B, V]
      scored: from `score_candidates`; None where nothing is guided.
    """
    if scored is None:
        return guidance.sampler_log_probs(logits, policy)
    return guidance.policy_log_probs(
        logits, scored.log_weight, scored.mask, scored.root_log_weight, count == 0, policy,
        outside=how.outside, order=how.order)


def _draw(how: Guidance, policy: Policy, keys: Array, count: Array, logits: Array,
          scored: Scored | None) -> tuple[Array, Array, Array]:
    """Returns the token of each row, its expected return if it was scored, and the KL of the law it was drawn from.

    # [B] x 3
    """
    log_probs = law(how, policy, count, logits, scored)
    token = guidance.sample(jax.vmap(jax.random.fold_in)(keys, count), log_probs)
    mean = jnp.zeros(token.shape) if scored is None else jnp.take_along_axis(scored.mean, token[:, None], axis=1)[:, 0]
    untruncated = guidance.reference_log_probs(logits, policy.reference_temperature)
    return token, mean, guidance.kl_divergence(log_probs, untruncated)


def step(reference: Reference, how: Guidance, reference_params: Params, value_params: Params, policy: Policy,
         eos_ids: tuple[int, ...], state: DecodeState) -> DecodeState:
    """Returns the complete state after one more token in every active row; finished rows do not change.

    Args:
      reference: π_ref.
      how: the guidance.
      reference_params: of the reference.
      value_params: of the value network.
      policy: of each row; a row with eta = inf samples from the reference bit for bit.
      eos_ids: tokens that end an answer.
      state: before this token.
    """
    active = state.active
    pending, length = sharding.constrain_rows((state.pending, state.length), like=policy.eta)
    logits, reference_cache = reference.step(reference_params, pending, length, state.reference_cache)
    # The law of a row is worked out whole: split over the vocabulary, its sorting would cross devices in every pass.
    logits = sharding.spread_rows(logits)
    value_cache, values, value_tokens = state.value_cache, state.values, state.value_tokens
    if how.value is None:
        scored = None
    else:
        sampler = guidance.sampler_log_probs(logits, policy)
        scored = score_candidates(how, value_params, state, policy, logits, sampler)
        value_cache, value_tokens = scored.cache, value_tokens + jnp.where(active, scored.tokens, 0)
        scored = dataclasses.replace(scored, cache=None, tokens=None)
    token, mean, kl = sharding.map_rows(
        functools.partial(_draw, how), (policy, state.keys, state.count, logits, scored), 8 * logits.nbytes, _LAWS,
        spread=True)
    here = active[:, None] & (jnp.arange(state.tokens.shape[1])[None, :] == state.count[:, None])
    if how.value is not None:
        values = jnp.where(here, mean[:, None], values)
    # Where the networks want it: spread as the law was, their tokens would have their products worked out piecemeal.
    return sharding.constrain_rows(dataclasses.replace(
        state,
        reference_cache=reference_cache,
        value_cache=value_cache,
        pending=jnp.where(active, token, state.pending),
        tokens=jnp.where(here, token[:, None], state.tokens),
        count=state.count + active.astype(jnp.int32),
        ended=state.ended | (active & is_eos(token, eos_ids)),
        kl=state.kl + jnp.where(active, kl, 0.0),
        values=values,
        value_tokens=value_tokens,
    ), like=policy.eta)
