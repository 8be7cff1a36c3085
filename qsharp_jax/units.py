"""Units of work, (example, sample, policy), and the shapes that their prompts come in."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from qsharp_jax.data.prompts import Prompts

_PREFILLED = 8  # for so many rows at least one more holds a prompt from which they are filled
_WIDTHS = 3  # that prompts are padded to


@dataclasses.dataclass(frozen=True)
class Units:
    """Units, example by example.

    Attributes:
      index: row number of each unit's example in `Prompts`.  # [N] int64
      samples: number of the unit among those of its example.  # [N] int64
      policies: number of its policy in the list the caller has in mind.  # [N] int64
    """

    index: np.ndarray
    samples: np.ndarray
    policies: np.ndarray


def units(which: Sequence[int] | np.ndarray, samples: int, policies: int) -> Units:
    """Returns every (example, sample, policy) once.

    Args:
      which: row numbers of the prompts.
      samples: answers per example and policy.
      policies: number of policies.
    """
    place, rest = np.divmod(np.arange(len(which) * samples * policies), samples * policies)
    sample, policy = np.divmod(rest, policies)
    return Units(np.asarray(which, np.int64)[place], sample, policy)


def round_up(number: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def prompt_width(prompts: Prompts) -> int:
    """Returns one width that holds each of the prompts."""
    return round_up(max(len(tokens) for tokens in prompts.tokens), 8)


def shared_prefix(prompts: Prompts) -> int:
    """Returns how many leading tokens all prompts have in common, at least one of each prompt left out."""
    first, last = min(prompts.tokens), max(prompts.tokens)  # of sorted prompts, these differ earliest
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(same, *(len(tokens) - 1 for tokens in prompts.tokens))


def widths(longest: int, shared: int) -> list[int]:
    """Returns the few widths that prompts are padded to, ascending: each has half the room of the next.

    Args:
      longest: tokens of the longest prompt.
      shared: tokens that every prompt begins with.
    """
    return sorted({round_up(shared + -(-(longest - shared) // 2 ** halved), 8) for halved in range(_WIDTHS)})


def prefilled_prompts(rows: int, per_example: int, shards: int) -> int:
    """Returns how many prompts are prefilled together.

    Few, since each takes the memory of its part of a cache until its units have begun; and split over the devices.

    Args:
      rows: B.
      per_example: units of each prompt.
      shards: parts that rows are split into.
    """
    return round_up(max(rows // (_PREFILLED * per_example), 1), shards)
