"""Estimators over graded samples: arrays of [N examples, M samples] in, numbers with standard errors out.

Samples of one example are not independent of each other, so every standard error is clustered by example.
"""
from __future__ import annotations

from collections.abc import Sequence
import hashlib
import math

import numpy as np

_RESAMPLES = 10_000  # of the bootstrap: its bounds then move by a fortieth of a standard error between draws


def mean_and_se(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean over everything and its standard error, clustered by row.

    Args:
      values: one row per example.  # [N, M]

    Returns:
      (mean, standard error); the error is NaN for fewer than two examples.
    """
    rows = np.asarray(values, np.float64).mean(axis=1)
    error = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan
    return float(rows.mean()), error


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Returns mean(first − second) over the same examples and its clustered standard error. Shapes [N, M], [N, M']."""
    return mean_and_se(_differences(first, second)[:, None])


def pass_at_k(correct: np.ndarray, k: int) -> tuple[float, float]:
    """Returns the probability that one of k samples drawn without replacement is right, and its clustered error.

    The estimate is unbiased for pass@k (Chen et al. 2021, arXiv 2107.03374).

    Args:
      correct: 0 or 1 per sample.  # [N, M]
      k: 1 <= k <= M.

    Returns:
      (mean over the examples, standard error), as `mean_and_se`.

    Raises:
      ValueError: there are fewer than k samples, or k is below 1.
    """
    correct = np.asarray(correct)
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f'pass@{k} needs 1 <= k <= the {samples} samples of each example.')
    wrong = samples - correct.astype(int).sum(axis=1)
    total = math.comb(samples, k)
    return mean_and_se(np.array([[1.0 - math.comb(int(w), k) / total] for w in wrong]))


def bootstrap_interval(first: np.ndarray, second: np.ndarray, address: str) -> tuple[float, float]:
    """Returns the 95 % interval of mean(first − second) over the same examples, by the paired bootstrap.

    Examples are drawn with replacement, each with all of its samples (Efron and Tibshirani 1993, chapter 13: the
    percentile interval). Equal addresses and numbers of examples draw the same examples.

    Args:
      first: one row per example.  # [N, M]
      second: of the same examples.  # [N, M']
      address: of the draws, such as seed and split.

    Returns:
      (low, high); NaN for fewer than two examples.
    """
    difference = _differences(first, second)
    count = len(difference)
    if count < 2:
        return math.nan, math.nan
    random = np.random.default_rng(address_seed(f'bootstrap {address}'))
    means = np.concatenate([
        difference[random.integers(0, count, (size, count))].mean(axis=1) for size in _chunks(_RESAMPLES, count)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def majority(votes: Sequence[Sequence[str]], rewards: np.ndarray, addresses: Sequence[str], v_min: float,
             weights: np.ndarray | None = None) -> np.ndarray:
    """Returns what each example's most frequent answer earns; ties are broken at random.  # [N]

    The draw depends on the example's address and on the tied answers, never on the order of the samples. An example
    without any vote earns `v_min`: without an answer there is nothing better.

    Args:
      votes: the class of answers that each sample votes for, by name; '' does not vote.
      rewards: of the same samples; a class has the mean reward of its members.  # [N, M]
      addresses: of the examples' draws.
      v_min: least reward.
      weights: of the votes, at least 0; None weighs all alike. The weight of a class is their sum.  # [N, M]
    """
    result = np.full(len(votes), v_min, np.float64)
    weights = np.ones_like(rewards, np.float64) if weights is None else weights
    for i, names in enumerate(votes):
        members: dict[str, list[int]] = {}
        for j, name in enumerate(names):
            if name:
                members.setdefault(name, []).append(j)
        if members:
            # In one order, so that equal sums are equal to the last bit.
            heights = {name: math.fsum(weights[i, places]) for name, places in members.items()}
            most = max(heights.values())
            tied = [name for name, height in heights.items() if height == most]
            result[i] = rewards[i, members[_drawn(tied, addresses[i])]].mean()
    return result


def best_of(scores: np.ndarray, rewards: np.ndarray, texts: Sequence[Sequence[str]],
            addresses: Sequence[str]) -> np.ndarray:
    """Returns what each example's best scored answer earns; ties are broken at random, as in `majority`.  # [N]

    Args:
      scores: of the samples.  # [N, M]
      rewards: of the same samples; equal texts with equal scores have the mean of theirs.  # [N, M]
      texts: of the same samples.
      addresses: of the examples' draws.
    """
    result = np.zeros(len(rewards))
    for i, (own, given) in enumerate(zip(scores, texts, strict=True)):
        best = [int(j) for j in np.flatnonzero(own == own.max())]
        chosen = _drawn(sorted({given[j] for j in best}), addresses[i])
        result[i] = rewards[i, [j for j in best if given[j] == chosen]].mean()
    return result


def address_seed(address: str) -> int:
    """Returns a seed that depends on a text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], 'big')


def _drawn(names: Sequence[str], address: str) -> str:
    """Returns one of the names, each with the same probability, whatever their order."""
    return min(names, key=lambda name: (address_seed(f'{address} {name}'), name))


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f'a paired difference needs the same examples: got {len(first)} and {len(second)}.')
    return np.asarray(first, np.float64).mean(1) - np.asarray(second, np.float64).mean(1)


def _chunks(total: int, width: int) -> list[int]:
    """Returns sizes that sum to `total`: arrays of so many rows of `width` take some tens of megabytes."""
    size = max(1, 2 ** 22 // width)
    return [min(size, total - first) for first in range(0, total, size)]
