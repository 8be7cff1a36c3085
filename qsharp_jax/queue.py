"""The queue from which rows are filled: a row that has ended its unit begins the next one."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from qsharp_jax import decoding, sharding
from qsharp_jax import units as units_lib
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.types import Params, Policy, Reference
from qsharp_jax.units import Units

_TURNOVER = 16  # of so many rows one may wait to be filled


def turnover(rows: int) -> int:
    """Returns how many rows end before the host fills them again, and how many it fills at once.

    The wait of half of them costs three rows in a hundred; a fixed number of steps costs more where answers are short,
    and asks the host in vain where they are long.
    """
    return max(rows // _TURNOVER, 1)


class Drawn(NamedTuple):
    """What became of units.

    Attributes:
      units: which they were.
      read: what the task keeps of each, in their order.  # [N, ...] each
      steps: that were made for them.
      written: steps of rows in which one of them was written.
      reference_passes: of the reference over its parameters: steps, with what is drafted in them, and prefills.
      value_passes: of the value network, the further ones of a step not counted.
      occupancy: share of the steps of all rows in which a unit was written.
    """

    units: Units
    read: Any
    steps: int
    written: int
    reference_passes: int
    value_passes: int
    occupancy: float


@dataclasses.dataclass
class _Progress:
    """How far the units of one call are.

    Attributes:
      units: in the order in which they begin.
      policies: of which each has one.  # [M] each
      per_example: units of each prompt.
      group: prompts that are prefilled together.
      owners: which unit each row is at, or -1.  # [B]
      begun: how many have.
      before: caches with what all prompts begin with.
      prompts: prefilled.
      prefills: passes that were made for them.
    """

    units: Units
    policies: Policy
    per_example: int
    group: int
    owners: np.ndarray
    begun: int = 0
    before: Any = None
    prompts: Any = None
    prefills: int = 0

    @property
    def left(self) -> int:
        """Units that have not begun."""
        return len(self.units.index) - self.begun

    @property
    def place(self) -> int:
        """Number of the next unit among those whose prompts are prefilled together."""
        return self.begun % (self.group * self.per_example)


class Queue:
    """Draws units in a fixed number of rows.

    What is scheduled when depends on the units of one call alone, so a call that is made again, in another process or
    after other calls, does the same. Every process of a run makes the same calls.
    """

    def __init__(self, mesh: Mesh, reference: Reference, how: decoding.Guidance, reference_params: Params,
                 value_params: Params, eos_ids: tuple[int, ...], task: decoding.Task, prompts: Prompts, rows: int,
                 seed: int, iteration: int = 0) -> None:
        """Makes the rows.

        Args:
          mesh: the devices.
          reference: π_ref.
          how: the guidance.
          reference_params: of the reference.
          value_params: of the value network.
          eos_ids: tokens that end an answer.
          task: what units are drawn for.
          prompts: of a split, also those that will not be asked: all have one shape.
          rows: B.
          seed: of the run.
          iteration: outer iteration, part of the noise's address.
        """
        sharding.check_divisible(rows, mesh, 'the number of rows')
        self._mesh, self._prompts, self._rows, self._task = mesh, prompts, rows, task
        self._reference, self._how, self._eos_ids = reference, how, eos_ids
        self._params = reference_params, value_params
        self._shared = units_lib.shared_prefix(prompts)
        self._widths = units_lib.widths(max(len(tokens) for tokens in prompts.tokens), self._shared)
        self._turnover = turnover(rows)
        self._seed = seed
        self._stages = self._noise(iteration)
        self._pool = decoding.vacant(
            reference, how.value, reference_params, value_params, task, self._widths[-1] + task.buffer,
            sharding.shard_batch(mesh, np.zeros(rows, np.int32)))

    def renew(self, reference_params: Params, iteration: int) -> None:
        """Goes on with other parameters of the reference and other noise; nothing is compiled again.

        Args:
          reference_params: of the same shapes, on the same devices.
          iteration: as in `__init__`.
        """
        self._params = reference_params, self._params[1]
        self._stages = self._noise(iteration)

    def draw(self, which: Sequence[int] | np.ndarray, samples: int, policies: Policy,
             ended: Callable[[int, float], None] = lambda count, occupancy: None) -> Drawn:
        """Returns what became of every (example, sample, policy).

        Args:
          which: row numbers of the prompts, at least one.
          samples: answers per example and policy.
          policies: on the host.  # [M] each
          ended: called with the number of units that have just ended, and the occupancy so far.
        """
        per_example = samples * len(policies.eta)
        group = units_lib.prefilled_prompts(self._rows, per_example, sharding.batch_shards(self._mesh))
        now = _Progress(units_lib.units(which, samples, len(policies.eta)), policies, per_example, group,
                        owners=np.full(self._rows, -1))
        steps = written = 0
        kept: Any = None
        while now.left or (now.owners >= 0).any():
            self._fill(now)
            self._pool, block = decoding.advance(
                self._reference, self._how, *self._params, self._pool, self._eos_ids, self._task,
                np.int32(self._turnover))
            block, read = sharding.to_host((block, self._task.read(self._pool)))
            steps, written = steps + int(block.steps), written + int(block.written)
            rows = np.flatnonzero((now.owners >= 0) & ~block.active)
            if kept is None:
                total = len(now.units.index)
                kept = jax.tree.map(lambda leaf: np.zeros((total, *leaf.shape[1:]), leaf.dtype), read)
            for into, leaf in zip(jax.tree.leaves(kept), jax.tree.leaves(read), strict=True):
                into[now.owners[rows]] = leaf[rows]
            now.owners[rows] = -1
            ended(len(rows), written / (self._rows * steps))
        return Drawn(now.units, kept, steps, written, steps * self._how.places + now.prefills, steps + now.prefills,
                     written / (self._rows * steps))

    def _noise(self, iteration: int) -> Any:
        """Returns the keys of an iteration's draws, on the devices."""
        keys = jax.random.key_data(decoding.stage_keys(self._seed, iteration))
        return sharding.replicate(self._mesh, sharding.to_host(keys))

    def _fill(self, now: _Progress) -> None:
        """Begins units in the rows that have none."""
        free = np.flatnonzero(now.owners < 0)
        while len(free) and now.left:
            if now.place == 0:
                self._prefill(now)
            count = min(len(free), now.left, now.group * now.per_example - now.place, self._turnover)
            self._begin(now, free[:count])
            free = free[count:]

    def _prefill(self, now: _Progress) -> None:
        """Prefills the prompts of the next group."""
        networks = self._reference, self._how.value, *self._params
        if self._shared and now.before is None:
            first = np.asarray([self._prompts.tokens[0][:self._shared]], np.int32)
            now.before = decoding.prefix(*networks, sharding.replicate(self._mesh, first))
            now.prefills += 1
        index = now.units.index[now.begun::now.per_example][:now.group]
        # The last group may have fewer prompts than its shape: the last of them, again.
        index = np.pad(index, (0, now.group - len(index)), mode='edge')
        texts = [self._prompts.tokens[one] for one in index]
        longest = max(map(len, texts))
        tokens = np.zeros((len(texts), min(width for width in self._widths if width >= longest)), np.int32)
        for row, text in zip(tokens, texts):
            row[:len(text)] = text
        lengths = np.array([len(text) for text in texts], np.int32)
        now.prompts = decoding.prefill(
            *networks, now.before, *sharding.shard_batch(self._mesh, (tokens, lengths)), self._shared)
        now.prefills += 1

    def _begin(self, now: _Progress, rows: np.ndarray) -> None:
        """Puts the next units into rows of the pool."""
        missing = self._turnover - len(rows)
        unit = now.begun + np.arange(len(rows))

        def chosen(values: np.ndarray) -> np.ndarray:
            return np.pad(values[unit], (0, missing), mode='edge').astype(np.int32)

        policy = chosen(now.units.policies)
        orders = decoding.Orders(
            # Beyond the last row nothing is written.
            rows=np.concatenate([rows, self._rows + np.arange(missing)]).astype(np.int32),
            sources=np.pad((now.place + np.arange(len(rows))) // now.per_example, (0, missing)).astype(np.int32),
            examples=self._prompts.ids[chosen(now.units.index)].astype(np.int32),
            samples=chosen(now.units.samples),
            policy=jax.tree.map(lambda leaf: leaf[policy], now.policies))
        self._pool = decoding.refill(self._pool, now.prompts, self._stages, orders, self._task)
        now.owners[rows] = unit
        now.begun += len(rows)
