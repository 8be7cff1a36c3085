"""The whole algorithm on the oracle: collect, aggregate, fit, guide, and reach π* as fast as it should."""
from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

from tests import oracle_convergence as oracle

NUMBERS = (1024, 4096, 8192)
SEEDS = 16


@functools.cache
def noisy():
    return oracle.curve(oracle.NOISY, NUMBERS, SEEDS)


def test_the_quick_fit_is_the_oracles():
    tree = oracle.NOISY
    data = oracle.draw(tree, None, 300, 0, 1)
    units = [(prompt, answer[:count], cut, tree.rewards[prompt, tree.node(answer[:count])])
             for prompt, cut, count, *answer in data]
    np.testing.assert_allclose(oracle.fit(tree, data), tree.counted_law(units), atol=1e-12)


@pytest.mark.slow
def test_the_distances_shrink_with_the_roll_outs_as_they_should():
    for name, exponent in (('kl', -1), ('value_gap', -1), ('total_variation', -0.5)):
        found, error = oracle.slope(NUMBERS, noisy()[name])
        assert error < 0.15 * -exponent
        assert abs(found - exponent) < 3 * error, name
    assert noisy()['kl'][-1].max() < 0.01


@pytest.mark.slow
def test_the_value_gap_is_eta_times_the_divergence():
    np.testing.assert_allclose(noisy()['value_gap'], oracle.ETA * noisy()['kl'], atol=1e-9)


def test_without_variance_of_the_return_the_optimum_is_reached():
    # Z* is certain at every prefix, so one visit tells all: nothing is left to learn once all are covered.
    tree = oracle.SETTLED
    met = set()
    for number, seed in [(64, seed) for seed in range(4)] + [(NUMBERS[0], seed) for seed in range(4)]:
        data = np.concatenate(oracle.collect(tree, number, seed))
        distance = oracle.distances(tree, oracle.guide(tree, oracle.fit(tree, data)))
        complete = oracle.covered(tree, data)
        assert (distance['kl'] < 1e-12) == complete
        assert (distance['total_variation'] < 1e-9) == complete
        met.add((number, complete))
    assert (64, False) in met and (NUMBERS[0], True) in met
    # As many roll-outs leave the language with varying returns far away.
    assert noisy()['kl'][0].min() > 1e-5


def test_the_data_of_both_iterations_count():
    tree = oracle.NOISY
    found = []
    for seed in range(8):
        first, second = oracle.collect(tree, NUMBERS[1], seed)
        both = np.concatenate([first, second])
        found.append([oracle.distances(tree, oracle.guide(tree, oracle.fit(tree, data)))['kl']
                      for data in (first, second, both)])
        # Every answer keeps the first token of its roll-in, which the second time is guided by the first fit.
        guided = oracle.guide(tree, oracle.fit(tree, first))
        for data, policy in ((first, tree.reference()), (second, guided)):
            counts = np.bincount(data[data[:, 0] == 0, 3], minlength=3)
            assert stats.chisquare(counts, policy[0, 0] * counts.sum()).pvalue > 1e-4
        assert stats.chisquare(counts, tree.reference()[0, 0] * counts.sum()).pvalue < 1e-9
    first, second, both = np.mean(found, axis=0)
    assert both < 0.75 * first and both < 0.9 * second
