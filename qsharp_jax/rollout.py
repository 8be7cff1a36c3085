"""The one home of the roll-in / cut / roll-out rule (paper, Algorithm 1 and §2.2).

Each unit (example, sample): the guided policy writes a whole answer, a cut is drawn uniformly over the length that
was realised, the token at the cut is the last guided one, and π_ref writes the rest. The reward of the spliced answer
is an unbiased draw of the reward-to-go of the token at the cut, and of every token after it.

The rest is always written anew, also where the roll-in was the reference itself: the cut depends on the length of
the roll-in, so given the cut its own remainder is *not* a draw from π_ref (short answers are cut early more often).
"""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import decoding
from qsharp_jax.types import Array

CUTS = ('uniform', 'start')
BUDGETS = ('total', 'fresh')


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How units are drawn.

    Attributes:
      max_new_tokens: most tokens of an answer (`budget`), end-of-sequence included.
      cut: 'uniform' over the realised length of the roll-in, or 'start': after the first token, for which no more
        than that token need be rolled in.
      budget: 'total': kept prefix and continuation together have `max_new_tokens`; 'fresh': the continuation has
        `max_new_tokens` of its own (the official collection).
    """

    max_new_tokens: int
    cut: str = 'uniform'
    budget: str = 'total'

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f'sampling.max_new_tokens is {self.max_new_tokens}; it must be at least 1.')
        if self.cut not in CUTS:
            raise ValueError(f'collect.cut is {self.cut!r}; it must be one of {", ".join(CUTS)}.')
        if self.budget not in BUDGETS:
            raise ValueError(f'collect.budget is {self.budget!r}; it must be one of {", ".join(BUDGETS)}.')

    @property
    def buffer(self) -> int:
        """Longest answer that can come out, in tokens."""
        return self.max_new_tokens * (2 if self.budget == 'fresh' and self.cut == 'uniform' else 1) + (
            1 if self.budget == 'fresh' and self.cut == 'start' else 0)


class Rollouts(NamedTuple):
    """Spliced answers.

    Attributes:
      tokens: kept prefix and continuation; entries at or beyond `count` mean nothing.  # [B, T] int32
      count: length of the answer.  # [B] int32
      cut: index in the answer of the last guided token.  # [B] int32
      ended: whether the answer ends with an end-of-sequence token; otherwise the budget ended it.  # [B] bool
      roll_in: tokens of the roll-in before it was cut.  # [B] int32
    """

    tokens: Array
    count: Array
    cut: Array
    ended: Array
    roll_in: Array


def draw_cuts(keys: Array, lengths: Array) -> Array:
    """Returns one cut per row, uniform on {0, …, length-1} with addressed noise.  # [B] int32"""
    return jax.vmap(lambda key, n: jax.random.randint(key, (), 0, jnp.maximum(n, 1)))(keys, lengths)


@struct.dataclass
class Plan:
    """What is noted of each row.

    Attributes:
      rolls_in: whether its roll-in is still being written.  # [B] bool
      cut_key: noise of its cut.  # [B] keys
      key: noise of its roll-out.  # [B] keys
      cut: as in `Rollouts`, once it is drawn.  # [B] int32
      roll_in: likewise.  # [B] int32
    """

    rolls_in: Array
    cut_key: Array
    key: Array
    cut: Array
    roll_in: Array


@dataclasses.dataclass(frozen=True)
class RollingOut:
    """The task of drawing spliced answers; see `decoding.Task`.

    A row goes from its roll-in straight on to its roll-out, beside rows that still roll in: rewinding it to the cut is
    setting its length, and with eta = inf its policy is the reference bit for bit.

    Attributes:
      config: cut and budget.
    """

    config: RolloutConfig

    @property
    def buffer(self) -> int:
        """The longest answer, in tokens."""
        return self.config.buffer

    def begin(self, stages: Array, examples: Array, samples: Array) -> tuple[Array, Array, Plan]:
        """Returns keys, limits and plan of roll-ins."""
        def keys(stage: str) -> Array:
            return decoding.keys_of(stages, stage, examples, samples)

        most = self.config.max_new_tokens if self.config.cut == 'uniform' else 1
        none = jnp.zeros(examples.shape, jnp.int32)
        plan = Plan(rolls_in=jnp.ones(examples.shape, bool), cut_key=keys('cut'), key=keys('roll_out'), cut=none,
                    roll_in=none)
        return keys('roll_in'), jnp.full(examples.shape, most, jnp.int32), plan

    def turn(self, pool: decoding.Pool, eos_ids: tuple[int, ...]) -> decoding.Pool:
        """Returns the pool with the rows whose roll-in has ended at the beginning of their roll-out."""
        config, state, plan = self.config, pool.state, pool.plan
        over = plan.rolls_in & ~state.active
        cut = draw_cuts(plan.cut_key, state.count) if config.cut == 'uniform' else jnp.zeros_like(state.count)
        limit = jnp.full_like(state.limit, config.max_new_tokens)
        if config.budget == 'fresh':
            # As in the official collection, a cut at the very end leaves the roll-in as it is.
            whole = (cut + 1 == state.count) & (config.cut == 'uniform')
            limit = cut + 1 + jnp.where(whole, 0, limit)
        rewound = decoding.rewind(
            state, jnp.where(over, cut + 1, state.count), jnp.where(over, limit, state.limit),
            jnp.where(over, plan.key, state.keys), eos_ids)
        # Rows that still roll in go on with what the value network knows of them.
        rewound = dataclasses.replace(
            rewound, value_length=jnp.where(over, rewound.value_length, state.value_length),
            log_weight=jnp.where(over, rewound.log_weight, state.log_weight))
        return decoding.Pool(
            state=rewound,
            policy=dataclasses.replace(pool.policy, eta=jnp.where(over, jnp.inf, pool.policy.eta)),
            plan=dataclasses.replace(
                plan, rolls_in=plan.rolls_in & ~over, cut=jnp.where(over, cut, plan.cut),
                roll_in=jnp.where(over, state.count, plan.roll_in)))

    def read(self, pool: decoding.Pool) -> Rollouts:
        """Returns the spliced answers."""
        state, plan = pool.state, pool.plan
        return Rollouts(tokens=state.tokens, count=state.count, cut=plan.cut, ended=state.ended, roll_in=plan.roll_in)
