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

import jax
import jax.numpy as jnp

from qsharp_jax import decoding
from qsharp_jax.types import Array, Params, Policy, Reference

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


class Units(NamedTuple):
    """A batch of units to draw; a row with `real` False is padding and stays empty.

    Attributes:
      prompts: distinct prompts, right-padded.  # [U, P] int32
      lengths: their lengths.  # [U] int32
      rows: which prompt each unit answers.  # [B] int32
      examples: ids of the prompts, for the noise.  # [B] int32
      samples: number of the unit among those of its example.  # [B] int32
      real: False for padding.  # [B] bool
    """

    prompts: Array
    lengths: Array
    rows: Array
    examples: Array
    samples: Array
    real: Array


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


def collect(reference: Reference, how: decoding.Guidance, reference_params: Params, value_params: Params,
            policy: Policy, units: Units, config: RolloutConfig, eos_ids: tuple[int, ...], seed: int,
            iteration: int, shared: int = 0) -> Rollouts:
    """Returns one spliced answer per unit.

    Args:
      reference: π_ref.
      how: guidance of the roll-in; `Guidance()` rolls in with the reference.
      reference_params: of the reference.
      value_params: of the value network.
      policy: of the roll-in, per row; the roll-out has its sampler without its eta.
      units: what to draw.
      config: cut and budget.
      eos_ids: tokens that end an answer.
      seed: of the run.
      iteration: outer iteration, part of the noise's address.
      shared: number of leading tokens that are the same in every prompt.
    """

    def keys(stage: str) -> Array:
        return decoding.unit_keys(seed, iteration, stage, units.examples, units.samples)

    most = jnp.where(units.real, config.max_new_tokens, 0).astype(jnp.int32)
    first = most if config.cut == 'uniform' else jnp.minimum(most, 1)
    state = decoding.start(
        reference, how.value, reference_params, value_params, units.prompts, units.lengths, units.rows,
        keys('roll_in'), first, config.buffer, shared)
    state = decoding.decode(reference, how, reference_params, value_params, policy, state, eos_ids)

    roll_in = state.count + 0  # a copy: the state is given up below
    cut = draw_cuts(keys('cut'), roll_in) if config.cut == 'uniform' else jnp.zeros_like(roll_in)
    kept = jnp.where(units.real, cut + 1, 0)
    if config.budget == 'total':
        limit = most
    else:
        # As in the official collection, a cut at the very end leaves the roll-in as it is.
        whole = (kept == roll_in) & (config.cut == 'uniform')
        limit = jnp.where(whole, kept, kept + most)
    state = decoding.rewind(state, kept, limit, keys('roll_out'), eos_ids)
    # The reference finishes alone: without the value cache no value forward runs.
    state = decoding.decode(
        reference, decoding.Guidance(), reference_params, None, policy, state.replace(value_cache=None), eos_ids)
    return Rollouts(tokens=state.tokens, count=state.count, cut=cut, ended=state.ended, roll_in=roll_in)
