"""Answers: steps until every row has ended or reached its limit."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from qsharp_jax import sharding
from qsharp_jax.decoding.candidates import Guidance
from qsharp_jax.decoding.state import DecodeState
from qsharp_jax.decoding.step import step
from qsharp_jax.types import Params, Policy, Reference


@functools.partial(jax.jit, static_argnames=('reference', 'how', 'eos_ids'), donate_argnames=('state',))
def decode(reference: Reference, how: Guidance, reference_params: Params, value_params: Params, policy: Policy,
           state: DecodeState, eos_ids: tuple[int, ...]) -> DecodeState:
    """Returns the state once no row is active.

    `state` is given up: its caches are written in place. See `step` for the other arguments; how many rows are
    guided, at which eta and at which temperature is traced, so that one compilation serves them all.
    """

    def unfinished(carry: DecodeState) -> jax.Array:
        return jnp.any(carry.active)

    done = jax.lax.while_loop(
        unfinished,
        functools.partial(step, reference, how, reference_params, value_params, policy, eos_ids), state)
    return sharding.constrain_rows(done, like=policy.eta)
