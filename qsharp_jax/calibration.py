"""How far predicted returns can be trusted: reliability, errors, ranking, and the guiding weight itself.

Plain numpy on N predictions, each with the return that was observed and a weight. Samples of one example are
alike, so every standard error here is clustered: it takes examples, not tokens, as independent.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

Floats = np.ndarray


@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean and its standard error, NaN with fewer than two clusters."""

    value: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predictions gathered into bins of equal width; bins without predictions are left out.

    Attributes:
      lower: left edge of each bin.  # [R]
      upper: right edge.  # [R]
      predicted: mean prediction.  # [R]
      observed: mean of the observed returns.  # [R]
      standard_error: of `observed`, clustered; NaN for a bin with one cluster.  # [R]
      weight: share of all weight; sums to 1.  # [R]
    """

    lower: Floats
    upper: Floats
    predicted: Floats
    observed: Floats
    standard_error: Floats
    weight: Floats


@dataclasses.dataclass(frozen=True)
class PositionQuality:
    """Quality of the predictions at positions first .. last; fields as the functions of those names."""

    first: int
    last: int
    count: int
    predicted: float
    observed: float
    brier: float
    ece: float
    auc: float


@dataclasses.dataclass(frozen=True)
class WeightCalibration:
    """Predicted against observed E exp((Z - v_max) / eta), the factor that guidance multiplies by.

    Attributes:
      eta: KL coefficient.
      predicted: mean of what the network says.
      observed: mean over the returns that were observed.
      difference: predicted - observed; a calibrated network has 0 within its standard error.
    """

    eta: float
    predicted: Mean
    observed: Mean
    difference: Mean


def clustered_mean(values: Floats, weights: Floats, clusters: Floats) -> Mean:
    """Returns the weighted mean of `values` [N], with the standard error over independent `clusters` [N].

    The error is the linearised one of a ratio of sums, with the usual m / (m - 1) for m clusters.
    """
    values, weights = _floats(values), _floats(weights)
    _, cluster = np.unique(clusters, return_inverse=True)
    total = weights.sum()
    mean = float(np.sum(weights * values) / total)
    residuals = np.bincount(cluster, weights * (values - mean))
    m = len(residuals)
    variance = np.sum(residuals ** 2) * m / (m - 1) / total ** 2 if m > 1 else np.nan
    return Mean(mean, float(np.sqrt(variance)))


def reliability(
    predicted: Floats, observed: Floats, weights: Floats, clusters: Floats,
    v_min: float = 0.0, v_max: float = 1.0, bins: int = 10,
) -> Reliability:
    """Returns the reliability diagram of predicted means [N] against observed returns [N].

    The bins are equal parts of v_min .. v_max; a prediction on an inner edge falls to the one above it.
    Raises ValueError for a prediction outside.
    """
    predicted, observed, weights, clusters = _check(predicted, observed, weights, clusters)
    edges = np.linspace(v_min, v_max, bins + 1)
    slack = 1e-5 * (v_max - v_min)
    if predicted.min() < v_min - slack or predicted.max() > v_max + slack:
        raise ValueError(f'predictions run from {predicted.min()} to {predicted.max()}, outside the support '
                         f'{v_min} .. {v_max}.')
    index = np.clip(np.searchsorted(edges, predicted, side='right') - 1, 0, bins - 1)
    rows = []
    for i in np.unique(index):
        inside = index == i
        seen = clustered_mean(observed[inside], weights[inside], clusters[inside])
        share = weights[inside].sum()
        mean = np.sum(weights[inside] * predicted[inside]) / share
        rows.append((edges[i], edges[i + 1], mean, seen.value, seen.standard_error, share / weights.sum()))
    return Reliability(*np.asarray(rows).T)


def ece(bins: Reliability) -> float:
    """Returns the expected calibration error: the weighted mean of |predicted - observed| over bins."""
    return float(np.sum(bins.weight * np.abs(bins.predicted - bins.observed)))


def brier(
    predicted: Floats, observed: Floats, weights: Floats, v_min: float = 0.0, v_max: float = 1.0
) -> float:
    """Returns the weighted mean squared error of predicted means [N], returns scaled to 0 .. 1."""
    predicted, observed, weights = _check(predicted, observed, weights)
    return float(np.sum(weights * ((predicted - observed) / (v_max - v_min)) ** 2) / weights.sum())


def auc(predicted: Floats, positive: Floats, weights: Floats) -> float:
    """Returns P(a positive is predicted above a negative), ties counting half; NaN without both kinds.

    Args:
      predicted: any score.  # [N]
      positive: whether the return was the good one.  # [N] bool
      weights: of each prediction; a pair weighs their product.  # [N]
    """
    predicted, weights = _check(predicted, weights)
    positive = np.asarray(positive, bool)
    _, value = np.unique(predicted, return_inverse=True)
    ups = np.bincount(value, weights * positive)
    downs = np.bincount(value, weights * ~positive)
    pairs = ups.sum() * downs.sum()
    if not pairs:
        return float('nan')
    below = np.cumsum(downs) - downs
    return float(np.sum(ups * (below + downs / 2)) / pairs)


def by_position(
    predicted: Floats, observed: Floats, weights: Floats, positions: Floats,
    edges: Sequence[int], v_min: float = 0.0, v_max: float = 1.0, bins: int = 10,
) -> list[PositionQuality]:
    """Returns the quality of predictions [N] in each range of positions [N] that has any.

    Args:
      predicted: predicted means.
      observed: observed returns.
      weights: of each prediction.
      positions: of each prediction, such as its distance from the start of the answer.
      edges: increasing; range i holds the positions edges[i] <= p < edges[i + 1].
      v_min: lowest return.
      v_max: highest return.
      bins: of the calibration error.

    A return above the middle of v_min .. v_max counts as positive for `auc`.
    """
    predicted, observed, weights, positions = _check(predicted, observed, weights, positions)
    rows = []
    for first, end in zip(edges[:-1], edges[1:]):
        inside = (first <= positions) & (positions < end)
        if not inside.any():
            continue
        p, o, w = predicted[inside], observed[inside], weights[inside]
        rows.append(PositionQuality(
            first=int(first), last=int(end) - 1, count=int(inside.sum()),
            predicted=float(np.sum(w * p) / w.sum()), observed=float(np.sum(w * o) / w.sum()),
            brier=brier(p, o, w, v_min, v_max),
            ece=ece(reliability(p, o, w, np.arange(len(p)), v_min, v_max, bins)),
            auc=auc(p, o > (v_min + v_max) / 2, w)))
    return rows


def weight_calibration(
    log_weight: Floats, observed: Floats, weights: Floats, clusters: Floats, eta: float, v_max: float,
) -> WeightCalibration:
    """Returns how predicted guiding weights compare with the returns that were observed.

    Args:
      log_weight: predicted log E exp(Z / eta).  # [N]
      observed: returns.  # [N]
      weights: of each prediction.  # [N]
      clusters: the example of each prediction.  # [N]
      eta: KL coefficient that `log_weight` was computed at.
      v_max: highest return; subtracting it keeps the exponentials at most 1 for any eta.
    """
    log_weight, observed, weights, clusters = _check(log_weight, observed, weights, clusters)
    predicted = np.exp(log_weight - v_max / eta)
    seen = np.exp((observed - v_max) / eta)
    return WeightCalibration(
        eta=eta,
        predicted=clustered_mean(predicted, weights, clusters),
        observed=clustered_mean(seen, weights, clusters),
        difference=clustered_mean(predicted - seen, weights, clusters))


def weight_by_position(
    log_weight: Floats, observed: Floats, weights: Floats, clusters: Floats, positions: Floats, edges: Sequence[int],
    eta: float, v_max: float,
) -> list[tuple[int, WeightCalibration]]:
    """Returns (first position, `weight_calibration`) of each range of positions that has any.

    Args:
      log_weight: as in `weight_calibration`, as the others.  # [N]
      observed: as above.  # [N]
      weights: as above.  # [N]
      clusters: as above.  # [N]
      positions: of each prediction, such as its distance from the start of the answer.  # [N]
      edges: increasing; range i holds the positions edges[i] <= p < edges[i + 1].
      eta: as above.
      v_max: as above.
    """
    found = []
    for first, end in zip(edges[:-1], edges[1:]):
        inside = (first <= positions) & (positions < end)
        if inside.any():
            found.append((int(first), weight_calibration(
                log_weight[inside], observed[inside], weights[inside], clusters[inside], eta, v_max)))
    return found


def position_edges(last: int, most: int = 40) -> list[int]:
    """Returns edges of at most `most` ranges of equal width that hold the positions 0 .. last and may go beyond.

    One range a position where there are no more: in long answers a single position has too few predictions.
    """
    width = -(-(last + 1) // most)
    return [*range(0, last + 1, width), -(-(last + 1) // width) * width]


def _floats(array: Floats) -> Floats:
    return np.asarray(array, np.float64)


def _check(*arrays: Floats) -> list[Floats]:
    """Returns the arrays in float64; raises ValueError unless they are non-empty vectors of one length."""
    shapes = {np.shape(array) for array in arrays}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
        raise ValueError(f'calibration needs vectors of one length, at least 1; given: {sorted(shapes)}.')
    return [_floats(array) for array in arrays]
