"""Estimators over graded samples: arrays of [N examples, M samples] in, numbers with standard errors out.

Samples of one example are not independent of each other, so every standard error is clustered by example.
"""
from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np


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
    if len(first) != len(second):
        raise ValueError(f'a paired difference needs the same examples: got {len(first)} and {len(second)}.')
    return mean_and_se((np.asarray(first, np.float64).mean(1) - np.asarray(second, np.float64).mean(1))[:, None])


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Returns the probability that one of k samples drawn without replacement is right: unbiased for pass@k.

    Args:
      correct: 0 or 1 per sample.  # [N, M]
      k: 1 <= k <= M.
    """
    correct = np.asarray(correct)
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f'pass@{k} needs 1 <= k <= the {samples} samples of each example.')
    wrong = samples - correct.astype(int).sum(axis=1)
    total = math.comb(samples, k)
    return float(np.mean([1.0 - math.comb(int(w), k) / total for w in wrong]))


def majority(answers: Sequence[Sequence[str]], rewards: np.ndarray) -> np.ndarray:
    """Returns the expected reward of each example's most frequent answer, ties broken at random.  # [N]

    The expectation over the tie-break is taken exactly: the mean over the tied classes. Empty answers do not vote; an
    example with none but empty answers earns 0 (no answer is never right).

    Args:
      answers: the text that votes, per example and sample.
      rewards: of the same samples; a class has the mean reward of its members.  # [N, M]
    """
    result = np.zeros(len(answers))
    for i, texts in enumerate(answers):
        classes: dict[str, list[float]] = {}
        for text, reward in zip(texts, rewards[i], strict=True):
            if text:
                classes.setdefault(text, []).append(float(reward))
        if classes:
            most = max(len(members) for members in classes.values())
            result[i] = np.mean([np.mean(members) for members in classes.values() if len(members) == most])
    return result
