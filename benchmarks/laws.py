"""A step of decoding in two halves, between which the next token is chosen from outside: to compare with a peer."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.workload import Guide
from qsharp_jax import decoding
from qsharp_jax.decoding.candidates import Read, score_candidates, Scored
from qsharp_jax.decoding.step import append, law, told
from qsharp_jax.types import Params, Policy, Reference


def policy_of(guide: Guide, rows: int) -> Policy:
    """Returns the policy of each row."""
    return Policy(
        eta=jnp.asarray(guide.eta_of_rows(rows)), temperature=jnp.full(rows, guide.temperature),
        top_k=jnp.zeros(rows, jnp.int32), top_p=jnp.full(rows, guide.top_p),
        reference_temperature=jnp.full(rows, guide.temperature))


def law_of_step(reference: Reference, how: decoding.Guidance, params: Params, values: Params, policy: Policy,
                state: decoding.DecodeState
                ) -> tuple[jax.Array, jax.Array, decoding.DecodeState, Scored | None, Read | None]:
    """Returns the reference's logits [B, V], log-probabilities of the next token [B, V], and what `follow` wants."""
    logits, cache = reference.step(params, state.pending, state.length, state.reference_cache)
    state, scored, read = dataclasses.replace(state, reference_cache=cache), None, None
    if how.value is not None:
        scored, state, read = score_candidates(
            how, values, state, policy, logits[:, None], state.pending[:, None], state.active[:, None])
    return logits, law(how, policy, state.count, logits, scored), state, scored, read


def follow(how: decoding.Guidance, state: decoding.DecodeState, scored: Scored | None, read: Read | None,
           token: jax.Array) -> decoding.DecodeState:
    """Returns the state after the step in which these tokens [B] were chosen, as `decoding.step` does."""
    active, (mean, weight) = state.active, told(scored, token)
    token, mean, weight = (part[:, None] for part in (token, mean, weight))
    state = append(state, token, active[:, None], mean, weight, jnp.zeros(token.shape), (), guided=scored is not None)
    return state if read is None else read.keep(how, state, active)
