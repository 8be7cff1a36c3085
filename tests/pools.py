"""A pool that is filled once, each row with a unit of its own, and goes on until all have ended: without a queue."""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import decoding, rollout


class Units(NamedTuple):
    """Units, one a row; one that is not `real` is never begun."""

    prompts: np.ndarray  # right-padded  # [U, P]
    lengths: np.ndarray  # [U]
    rows: np.ndarray  # which prompt each unit answers  # [B]
    examples: np.ndarray  # ids of the prompts, for the noise  # [B]
    samples: np.ndarray  # [B]
    real: np.ndarray  # [B]


def collect(*arguments):
    """The `rollout.Rollouts` of all units; the arguments are those of `ended`."""
    task, pool = ended(*arguments)
    return task.read(pool)


def ended(reference, how, reference_params, value_params, policy, units, config, eos_ids, seed, iteration):
    """The task, and the pool when all its rows have ended."""
    task = rollout.RollingOut(config)
    keys, limit, plan = task.begin(decoding.stage_keys(seed, iteration), units.examples, units.samples)
    state = decoding.start(reference, how.value, reference_params, value_params, units.prompts, units.lengths,
                           units.rows, keys, jnp.where(units.real, limit, 0), task.buffer)
    pool = decoding.Pool(state, policy, dataclasses.replace(plan, rolls_in=jnp.asarray(units.real)))
    pool = jax.tree.map(jnp.copy, pool)  # some of its arrays are one and the same, and none may be given up twice
    pool, _ = decoding.advance(reference, how, reference_params, value_params, pool, eos_ids, task, len(units.rows))
    return task, pool
