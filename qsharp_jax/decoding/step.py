"""The next token of every row, or several: reference, values of the candidates, THE sampling distribution, a draw."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qsharp_jax import guidance, sharding
from qsharp_jax.decoding.candidates import CANDIDATES, Guidance, score_candidates, Scored, spread
from qsharp_jax.decoding.state import DecodeState, is_eos
from qsharp_jax.types import Array, Cache, Params, Policy, Reference

REFERENCE_PASS = 'reference_pass'  # what profiles call it
_LAWS = 2 ** 27  # bytes a device, about eight times its logits, above which rows are worked out by parts


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
        logits, scored.weighing, scored.log_weight, scored.mask, scored.root_log_weight, count == 0, policy,
        outside=how.outside, order=how.order)


def step(reference: Reference, how: Guidance, reference_params: Params, value_params: Params, policy: Policy,
         eos_ids: tuple[int, ...], state: DecodeState) -> DecodeState:
    """Returns the complete state after one more token in every active row; finished rows do not change.

    With `how.draft` above 0 a row gets up to so many more: the reference writes that many tokens ahead, each with the
    noise of its position, and one pass of the value network scores what the laws at all these positions need. Then the
    guided token of each position is drawn *with the same noise*, and as long as it is the drafted one, the next
    position's law is that of the answer. So speculation (Leviathan et al. 2023) changes no token of any answer; where
    the usual acceptance keeps the law, a shared noise keeps the draw itself. It accepts a draft with probability at
    least (1 - TV) / (1 + TV), TV being the total variation between the reference and the guided law.

    Args:
      reference: π_ref.
      how: the guidance.
      reference_params: of the reference.
      value_params: of the value network.
      policy: of each row; a row with eta = inf samples from the reference bit for bit.
      eos_ids: tokens that end an answer.
      state: before this token.
    """
    places = how.places
    logits, tokens, cache = _read(reference, reference_params, policy, state, places)
    ahead = jnp.arange(places)[None]
    # Nothing follows a drafted end, or the limit.
    ends = jnp.cumsum(is_eos(tokens, eos_ids) & (ahead > 0), axis=1)
    there = state.active[:, None] & (state.count[:, None] + ahead < state.limit[:, None]) & (ends == 0)
    scored = read = None
    if how.value is not None:
        with jax.named_scope(CANDIDATES):
            scored, state, read = score_candidates(how, value_params, state, policy, logits, tokens, there)
    flat, count = logits.reshape(-1, logits.shape[-1]), (state.count[:, None] + ahead).reshape(-1)
    each, keys = jax.tree.map(functools.partial(spread, places=places), (policy, state.keys))
    token, mean, weight, kl = (part.reshape(-1, places) for part in sharding.map_rows(
        functools.partial(_draw, how), (each, keys, count, flat, scored), 8 * flat.nbytes, _LAWS, spread=True))
    # The draw of a place counts where all drafted tokens before it are what was drawn.
    agreed = there & ((ahead == 0) | (jnp.roll(token, 1, axis=1) == tokens))
    state = append(dataclasses.replace(state, reference_cache=cache), token, jnp.cumprod(agreed, axis=1).astype(bool),
                   mean, weight, kl, eos_ids, guided=how.value is not None)
    # Where the networks want it: spread as the law was, their tokens would have their products worked out piecemeal.
    state = sharding.constrain_rows(state, like=policy.eta)
    return state if read is None else read.keep(how, state, there[:, 0])


def _read(reference: Reference, params: Params, policy: Policy, state: DecodeState,
          places: int) -> tuple[Array, Array, Cache]:
    """Returns the pending token and those that the reference lets follow it [B, M], and its logits behind each."""
    token, length = sharding.constrain_rows((state.pending, state.length), like=policy.eta)

    def one(token: Array, place: Array | int, cache: Cache) -> tuple[Array, Cache]:
        with jax.named_scope(REFERENCE_PASS):
            logits, cache = reference.step(params, token, length + place, cache)
        # The law of a row is worked out whole: split over the vocabulary, its sorting would cross devices each time.
        return sharding.spread_rows(logits), cache

    if places == 1:
        logits, cache = one(token, 0, state.reference_cache)
        return logits[:, None], token[:, None], cache

    def draft(carry: tuple[Array, Cache], place: Array) -> tuple[tuple[Array, Cache], tuple[Array, Array]]:
        token, cache = carry
        logits, cache = one(token, place, cache)
        noise = jax.vmap(jax.random.fold_in)(state.keys, state.count + place)
        following = guidance.sample(noise, guidance.sampler_log_probs(logits, policy))
        return (sharding.constrain_rows(following, like=policy.eta), cache), (logits, token)

    (_, cache), (logits, tokens) = jax.lax.scan(draft, (token, state.reference_cache), jnp.arange(places))
    return logits.swapaxes(0, 1), tokens.T, cache


def _draw(how: Guidance, policy: Policy, keys: Array, count: Array, logits: Array,
          scored: Scored | None) -> tuple[Array, Array, Array, Array]:
    """Returns the token of each row, its expected return and log-weight, NaN unless scored, and the law's KL.

    # [B] x 4
    """
    log_probs = law(how, policy, count, logits, scored)
    token = guidance.sample(jax.vmap(jax.random.fold_in)(keys, count), log_probs)
    untruncated = guidance.reference_log_probs(logits, policy.reference_temperature)
    return token, *told(scored, token), guidance.kl_divergence(log_probs, untruncated)


def told(scored: Scored | None, token: Array) -> tuple[Array, Array]:
    """Returns the expected return and the log-weight of a token of each row, NaN unless scored.  # [B] -> [B] x 2"""
    if scored is None:
        return (jnp.full(token.shape, jnp.nan),) * 2
    mean, weight = (jnp.take_along_axis(array, token[:, None], axis=1)[:, 0]
                    for array in (scored.mean, scored.log_weight))
    return mean, jnp.where(jnp.isnan(mean), jnp.nan, weight)


def append(state: DecodeState, token: Array, taken: Array, mean: Array, weight: Array, kl: Array,
           eos_ids: tuple[int, ...], guided: bool) -> DecodeState:
    """Returns the state with the leading tokens of each row that are `taken` behind its answer.  # [B, M] each"""
    places = token.shape[1]
    new = jnp.sum(taken, axis=1, dtype=jnp.int32)
    count = state.count + new
    place = jnp.arange(state.tokens.shape[1])[None] - state.count[:, None]
    here = (place >= 0) & (place < new[:, None])

    def placed(numbers: Array) -> Array:  # [B, M] -> [B, T]
        return numbers if places == 1 else jnp.take_along_axis(numbers, jnp.clip(place, 0, places - 1), axis=1)

    def last(numbers: Array, before: Array) -> Array:  # [B, M] -> [B]
        own = jnp.take_along_axis(numbers, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0]
        return jnp.where(new > 0, own, before)

    values = state.values
    if guided:
        # A token that was drafted may have been heard as a root only; what was heard of those not taken goes.
        heard = jnp.where(place < new[:, None] - 1, values, jnp.nan)
        values = jnp.where(here, jnp.where(jnp.isnan(placed(mean)), heard, placed(mean)), values)
        values = jnp.where(place < new[:, None], values, jnp.nan)
    pending = last(token, state.pending)
    state = dataclasses.replace(
        state,
        pending=pending,
        tokens=jnp.where(here, placed(token), state.tokens),
        count=count,
        ended=state.ended | ((new > 0) & is_eos(pending, eos_ids)),
        kl=state.kl + jnp.sum(jnp.where(taken, kl, 0.0), axis=1),
        values=values,
        log_weight=last(weight, state.log_weight),
        reference_tokens=state.reference_tokens + places * (new > 0),
    )
    # Of what is drafted the caches keep the tokens that were taken, but for the pending one.
    return dataclasses.replace(state, value_length=jnp.minimum(state.value_length, state.length))
