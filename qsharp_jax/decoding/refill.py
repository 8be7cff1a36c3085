"""Rows that are filled again: where an answer has ended the next one begins, while the other rows go on.

Shapes are fixed and every row has a position of its own, so that a row is filled by an index update. Noise is keyed by
unit and position, so no answer depends on the row or on the moment in which it is written.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import sharding
from qsharp_jax.decoding import state as states
from qsharp_jax.decoding.candidates import Guidance
from qsharp_jax.decoding.state import DecodeState
from qsharp_jax.decoding.step import step
from qsharp_jax.types import Array, Cache, Params, Policy, Reference, Value


@struct.dataclass
class Pool:
    """Rows at work, each on a unit of its own.

    Attributes:
      state: of the answers; a row that is not active has ended, or was never filled.
      policy: that each row is sampled from.
      plan: what the task notes of each row; any tree of arrays with rows as leading axis.
    """

    state: DecodeState
    policy: Policy
    plan: Any


class Task(Protocol):
    """What units are drawn for. Static, so it is hashable: another one compiles anew."""

    @property
    def buffer(self) -> int:
        """T: the longest answer, in tokens."""

    def begin(self, stages: Array, examples: Array, samples: Array) -> tuple[Array, Array, Any]:
        """Returns keys [K], limits [K] and plan of units that begin; `stages` is from `stage_keys`."""

    def turn(self, pool: Pool, eos_ids: tuple[int, ...]) -> Pool:
        """Returns the pool after a step: rows whose answer has ended may go on with something else."""

    def read(self, pool: Pool) -> Any:
        """Returns what is kept of a unit that has ended: a tree of arrays with rows as leading axis."""


class Answers(NamedTuple):
    """What is kept of whole answers; see `DecodeState`."""

    tokens: Array  # [B, T]
    count: Array  # [B]
    ended: Array  # [B]
    kl: Array  # [B]
    values: Array  # [B, T]
    reference_tokens: Array  # [B]
    value_tokens: Array  # [B]


@dataclasses.dataclass(frozen=True)
class Answering:
    """The task of writing whole answers; see `Task`.

    Attributes:
      buffer: most tokens of an answer.
    """

    buffer: int

    def begin(self, stages: Array, examples: Array, samples: Array) -> tuple[Array, Array, Any]:
        """Returns keys, limits and an empty plan."""
        return states.keys_of(stages, 'evaluate', examples, samples), jnp.full(examples.shape, self.buffer), ()

    def turn(self, pool: Pool, eos_ids: tuple[int, ...]) -> Pool:
        """Returns the pool as it is: what has ended waits to be read."""
        del eos_ids
        return pool

    def read(self, pool: Pool) -> Answers:
        """Returns the answers."""
        state = pool.state
        return Answers(state.tokens, state.count, state.ended, state.kl, state.values, state.reference_tokens,
                       state.value_tokens)


class Orders(NamedTuple):
    """Units that begin, K at once.

    Attributes:
      rows: where; a number beyond the last row: nowhere. Ascending.  # [K] int32
      sources: row of the prefilled prompt.  # [K] int32
      examples: ids of the prompts, for the noise.  # [K] int32
      samples: number of the unit among those of its example.  # [K] int32
      policy: that they are sampled from.  # [K] each
    """

    rows: Array
    sources: Array
    examples: Array
    samples: Array
    policy: Policy


# Arguments that are only looked at say which devices the result is on.
@functools.partial(jax.jit, static_argnames=('reference', 'value', 'task', 'capacity'), keep_unused=True)
def vacant(reference: Reference, value: Value | None, reference_params: Params, value_params: Params, task: Task,
           capacity: int, like: Array) -> Pool:
    """Returns a pool without units, whose caches have `capacity` slots a row.

    Args:
      reference: π_ref.
      value: the value network, or None where nothing will be guided.
      reference_params: of `reference`; only their shapes are used.
      value_params: of `value`, likewise.
      task: what the units will be drawn for.
      capacity: slots for the longest prompt and the longest answer.
      like: any array that is split by rows as the pool is to be.  # [B]
    """
    rows = like.shape[0]
    one = jnp.ones(1, jnp.int32)

    def new() -> tuple[DecodeState, Any]:
        prompts = jnp.zeros((1, capacity - task.buffer), jnp.int32)
        _, _, plan = task.begin(states.stage_keys(0, 0), one, one)
        return states.prefill(reference, value, reference_params, value_params, prompts, one, task.buffer), plan

    state, plan = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(new))
    ones = jnp.ones(rows, jnp.float32)
    policy = Policy(eta=jnp.inf * ones, temperature=ones, top_k=jnp.zeros(rows, jnp.int32), top_p=ones,
                    reference_temperature=ones)
    state = dataclasses.replace(state, prompt_length=jnp.ones(rows, jnp.int32))
    return sharding.constrain_rows(Pool(state, policy, plan), like=like)


@functools.partial(jax.jit, static_argnames=('reference', 'value', 'shared'))
def prefill(reference: Reference, value: Value | None, reference_params: Params, value_params: Params,
            before: tuple[Cache, Cache] | None, prompts: Array, lengths: Array, shared: int) -> DecodeState:
    """Returns prompts for `refill` to fill rows from. Arguments as in `decoding.state.prefill`."""
    state = states.prefill(
        reference, value, reference_params, value_params, prompts, lengths, 0, before, shared)
    return sharding.constrain_rows(state, like=lengths)


@functools.partial(jax.jit, static_argnames=('task',), donate_argnames=('pool',))
def refill(pool: Pool, prefilled: DecodeState, stages: Array, orders: Orders, task: Task) -> Pool:
    """Returns the pool with new units in some rows; only what is in those is written.

    `pool` is given up. Slots of its caches behind the prompt keep what they hold: they are never read.

    Args:
      pool: whose named rows are not active.
      prefilled: prompts, from `prefill`.
      stages: data of the keys from `stage_keys`.
      orders: what begins where.
      task: what the units are drawn for.
    """
    keys, limit, plan = task.begin(jax.random.wrap_key_data(stages), orders.examples, orders.samples)
    state = jax.tree.map(lambda leaf: leaf[orders.sources], prefilled)
    new = Pool(dataclasses.replace(state, keys=keys, limit=limit), orders.policy, plan)
    return sharding.put_rows(pool, orders.rows, new, like=pool.policy.eta)


class Block(NamedTuple):
    """What a call of `advance` did.

    Attributes:
      active: rows that still need tokens.  # [B] bool
      steps: that were made.  # [] int32
      written: steps of rows in which a unit was written.  # [] int32
    """

    active: Array
    steps: Array
    written: Array


@functools.partial(jax.jit, static_argnames=('reference', 'how', 'eos_ids', 'task'), donate_argnames=('pool',))
def advance(reference: Reference, how: Guidance, reference_params: Params, value_params: Params, pool: Pool,
            eos_ids: tuple[int, ...], task: Task, enough: Array) -> tuple[Pool, Block]:
    """Returns the pool once `enough` more rows have ended, or all; see `step` for the other arguments.

    `pool` is given up: its caches are written in place.
    """
    at_work = jnp.sum(pool.state.active)

    def unfinished(carry: tuple[Pool, Array, Array]) -> Array:
        left = jnp.sum(carry[0].state.active)
        return (left > 0) & (at_work - left < enough)

    def one(carry: tuple[Pool, Array, Array]) -> tuple[Pool, Array, Array]:
        pool, steps, written = carry
        active = jnp.sum(pool.state.active, dtype=jnp.int32)
        state = step(reference, how, reference_params, value_params, pool.policy, eos_ids, pool.state)
        return task.turn(dataclasses.replace(pool, state=state), eos_ids), steps + 1, written + active

    zero = jnp.zeros((), jnp.int32)
    pool, steps, written = jax.lax.while_loop(unfinished, one, (pool, zero, zero))
    pool = sharding.constrain_rows(pool, like=pool.policy.eta)
    return pool, Block(pool.state.active, steps, written)
