"""Calibration against loops over all pairs, bins and clusters."""
from __future__ import annotations

import numpy as np
import pytest

from qsharp_jax import calibration


def _data(n=300, seed=0):
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 40, n)
    predicted = np.round(rng.uniform(size=n), 1 + seed)  # rounding makes ties
    observed = (rng.uniform(size=n) < predicted).astype(float)
    return predicted, observed, rng.uniform(0.1, 2, n), clusters


@pytest.mark.parametrize('seed', [0, 1])
def test_auc_counts_weighted_pairs_and_half_of_the_ties(seed):
    predicted, observed, weights, _ = _data(80, seed)
    won = pairs = 0.0
    for i in np.flatnonzero(observed == 1):
        for j in np.flatnonzero(observed == 0):
            pair = weights[i] * weights[j]
            pairs += pair
            won += pair * ((predicted[i] > predicted[j]) + 0.5 * (predicted[i] == predicted[j]))
    assert calibration.auc(predicted, observed > 0, weights) == pytest.approx(won / pairs, abs=1e-12)


@pytest.mark.filterwarnings('error')
def test_auc_of_perfect_reversed_constant_and_one_sided_predictions():
    positive, ones = np.array([0, 0, 1, 1]), np.ones(4)
    assert calibration.auc(np.arange(4), positive, ones) == 1
    assert calibration.auc(-np.arange(4), positive, ones) == 0
    assert calibration.auc(np.zeros(4), positive, ones) == 0.5
    assert np.isnan(calibration.auc(np.arange(4), ones, ones))


@pytest.mark.parametrize('v_min,v_max', [(0.0, 1.0), (-2.0, 3.0)])
def test_reliability_bins_are_what_a_loop_gathers(v_min, v_max):
    predicted, observed, weights, clusters = _data()
    predicted, observed = v_min + (v_max - v_min) * predicted, v_min + (v_max - v_min) * observed
    bins = calibration.reliability(predicted, observed, weights, clusters, v_min, v_max, 10)
    edges = np.linspace(v_min, v_max, 11)
    gathered = {}
    for p, o, w in zip(predicted, observed, weights):
        i = max(i for i in range(10) if p >= edges[i])
        gathered.setdefault(i, []).append((p, o, w))
    error = 0.0
    assert len(bins.lower) == len(gathered)
    for row, i in enumerate(sorted(gathered)):
        p, o, w = np.array(gathered[i]).T
        assert bins.lower[row] == edges[i] and bins.upper[row] == edges[i + 1]
        assert bins.predicted[row] == pytest.approx(np.average(p, weights=w))
        assert bins.observed[row] == pytest.approx(np.average(o, weights=w))
        assert bins.weight[row] == pytest.approx(w.sum() / weights.sum())
        error += abs(np.average(p - o, weights=w)) * w.sum() / weights.sum()
    assert bins.weight.sum() == pytest.approx(1)
    assert calibration.ece(bins) == pytest.approx(error)


def test_reliability_keeps_the_ends_and_refuses_predictions_outside_the_support():
    ends = np.array([0.0, 1.0])
    bins = calibration.reliability(ends, ends, np.ones(2), np.arange(2))
    assert bins.lower[0] == 0 and bins.upper[-1] == 1 and calibration.ece(bins) == 0
    with pytest.raises(ValueError, match='outside the support 0.0 .. 1.0'):
        calibration.reliability(ends * 2, ends, np.ones(2), np.arange(2))


def test_brier_is_the_weighted_squared_error_on_returns_scaled_to_one():
    predicted, observed, weights, _ = _data()
    wanted = sum(w * (p - o) ** 2 for p, o, w in zip(predicted, observed, weights)) / sum(weights)
    assert calibration.brier(predicted, observed, weights) == pytest.approx(wanted)
    scaled = calibration.brier(4 * predicted - 1, 4 * observed - 1, weights, -1, 3)
    assert scaled == pytest.approx(wanted)


def test_clustered_error_ignores_copies_and_equals_the_plain_one_for_single_samples():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    ones = np.ones(50)
    single = calibration.clustered_mean(values, ones, np.arange(50))
    assert single.value == pytest.approx(values.mean())
    assert single.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    copies = calibration.clustered_mean(np.tile(values, 4), np.ones(200), np.tile(np.arange(50), 4))
    assert copies.standard_error == pytest.approx(single.standard_error)
    assert np.isnan(calibration.clustered_mean(values, ones, np.zeros(50)).standard_error)


def test_clustered_error_is_the_spread_of_the_mean_over_repeated_draws():
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        clusters = np.repeat(np.arange(30), rng.integers(1, 6, 30))
        values = rng.normal(size=30)[clusters] + 0.3 * rng.normal(size=len(clusters))
        mean = calibration.clustered_mean(values, rng.uniform(0.5, 1.5, len(clusters)), clusters)
        means.append(mean.value)
        errors.append(mean.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


def test_by_position_is_the_same_measures_on_each_range_alone():
    predicted, observed, weights, _ = _data()
    positions = np.arange(300) % 30
    rows = calibration.by_position(predicted, observed, weights, positions, [0, 1, 8, 30, 50])
    assert [(row.first, row.last) for row in rows] == [(0, 0), (1, 7), (8, 29)]
    assert sum(row.count for row in rows) == 300
    for row in rows:
        inside = np.array([row.first <= p <= row.last for p in positions])
        p, o, w = predicted[inside], observed[inside], weights[inside]
        assert row.count == inside.sum()
        assert row.predicted == pytest.approx(np.average(p, weights=w))
        assert row.observed == pytest.approx(np.average(o, weights=w))
        assert row.brier == pytest.approx(calibration.brier(p, o, w))
        assert row.auc == pytest.approx(calibration.auc(p, o == 1, w))
        bins = calibration.reliability(p, o, w, np.arange(len(p)))
        assert row.ece == pytest.approx(calibration.ece(bins))


@pytest.mark.parametrize('eta', [0.01, 0.1, 1.0, np.inf])
def test_weight_of_a_calibrated_network_is_what_is_observed(eta):
    rng = np.random.default_rng(2)
    v_min, v_max = -1.0, 2.0
    p = rng.uniform(0.05, 0.95, 4000)
    observed = np.where(rng.uniform(size=4000) < p, v_max, v_min)
    log_weight = np.logaddexp(np.log(p) + v_max / eta, np.log1p(-p) + v_min / eta)
    clusters, ones = np.arange(4000), np.ones(4000)
    found = calibration.weight_calibration(log_weight, observed, ones, clusters, eta, v_max)
    exact = p + (1 - p) * np.exp((v_min - v_max) / eta)
    assert found.predicted.value == pytest.approx(exact.mean())
    assert found.observed.value == pytest.approx(np.exp((observed - v_max) / eta).mean())
    assert found.difference.value == pytest.approx(found.predicted.value - found.observed.value, abs=1e-12)
    assert abs(found.difference.value) <= 3 * found.difference.standard_error + 1e-12
    if np.isfinite(eta):
        bold = calibration.weight_calibration(log_weight + 0.5, observed, ones, clusters, eta, v_max)
        assert bold.difference.value > 5 * bold.difference.standard_error


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='one length'):
        calibration.brier(np.zeros(3), np.zeros(4), np.ones(3))
    with pytest.raises(ValueError, match='at least 1'):
        calibration.brier(np.zeros(0), np.zeros(0), np.ones(0))


def test_weights_are_compared_range_by_range():
    predicted, observed, weights, clusters = _data(300, 1)
    positions = np.random.default_rng(9).integers(0, 7, 300)
    log_weight = np.log(1 + predicted * (np.exp(1 / 0.3) - 1))
    found = dict(calibration.weight_by_position(
        log_weight, observed, weights, clusters, positions, [0, 2, 3, 9], 0.3, 1.0))
    assert list(found) == [0, 2, 3]
    for first, end in ((0, 2), (2, 3), (3, 9)):
        inside = (first <= positions) & (positions < end)
        alone = calibration.weight_calibration(
            log_weight[inside], observed[inside], weights[inside], clusters[inside], 0.3, 1.0)
        assert found[first] == alone
    assert [first for first, _ in calibration.weight_by_position(
        log_weight, observed, weights, clusters, positions, [0, 7, 20], 0.3, 1.0)] == [0]


@pytest.mark.parametrize('last', (0, 5, 39, 40, 79, 80, 1023))
def test_ranges_of_positions_hold_each_once(last):
    edges = calibration.position_edges(last)
    assert edges[0] == 0 and edges[-2] <= last < edges[-1] and len(edges) - 1 <= 40
    assert len(set(np.diff(edges))) == 1
    assert last > 39 or len(edges) == last + 2  # one a position
