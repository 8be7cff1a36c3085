"""Units of work, (example, sample, policy), in batches of one fixed shape."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from qsharp_jax.data.prompts import Prompts
from qsharp_jax.rollout import Units


@dataclasses.dataclass(frozen=True)
class UnitBatch:
    """Arguments of one call, on the host.

    Attributes:
      units: what to draw; padding rows at the end are not `real`.
      policies: number of each row's policy in the list the caller had in mind.  # [B] int32
      index: row number of each unit's example in `Prompts`; padding repeats the last.  # [B] int64
      real: number of rows that are no padding.
      shared: number of leading tokens that are the same in every prompt, also of other batches.
    """

    units: Units
    policies: np.ndarray
    index: np.ndarray
    real: int
    shared: int


def round_up(number: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def prompt_width(prompts: Prompts) -> int:
    """Returns one width for all the prompts, so that every batch has one compiled shape."""
    return round_up(max(len(tokens) for tokens in prompts.tokens), 8)


def shared_prefix(prompts: Prompts) -> int:
    """Returns how many leading tokens all prompts have in common, at least one of each prompt left out."""
    first, last = min(prompts.tokens), max(prompts.tokens)  # of sorted prompts, these differ earliest
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(same, *(len(tokens) - 1 for tokens in prompts.tokens))


def batches(prompts: Prompts, which: Sequence[int] | np.ndarray, samples: int, policies: int, batch_rows: int,
            width: int) -> Iterator[UnitBatch]:
    """Yields every (example, sample, policy) once, example by example, in batches of one shape.

    Args:
      prompts: all prompts of a split.
      which: row numbers of `prompts` to use.
      samples: answers per example and policy.
      policies: number of policies.
      batch_rows: B of every batch.
      width: P of every batch, at least the longest prompt.
    """
    per_example = samples * policies
    total = len(which) * per_example
    shared = shared_prefix(prompts)
    # A batch that starts inside an example touches one example more than its rows would fill.
    most_prompts = min(len(which), -(-batch_rows // per_example) + 1)
    for first in range(0, total, batch_rows):
        unit = np.arange(first, min(first + batch_rows, total))
        real = len(unit)
        unit = np.concatenate([unit, np.full(batch_rows - real, unit[-1])])
        place, rest = np.divmod(unit, per_example)
        sample, policy = np.divmod(rest, policies)
        index = np.asarray(which)[place]
        distinct, rows = np.unique(place, return_inverse=True)
        tokens = np.zeros((most_prompts, width), np.int32)
        lengths = np.zeros(most_prompts, np.int32)
        # A slot that no row reads still needs a prompt: the last one, again.
        for slot, chosen in enumerate(np.pad(distinct, (0, most_prompts - len(distinct)), mode='edge')):
            text = prompts.tokens[which[chosen]]
            tokens[slot, :len(text)] = text
            lengths[slot] = len(text)
        yield UnitBatch(
            units=Units(
                prompts=tokens, lengths=lengths, rows=rows.astype(np.int32),
                examples=prompts.ids[index].astype(np.int32), samples=sample.astype(np.int32),
                real=np.arange(batch_rows) < real),
            policies=policy.astype(np.int32), index=index, real=real, shared=shared)
