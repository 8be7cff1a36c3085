"""Estimators against enumeration of what they are expectations of."""
from __future__ import annotations

import collections
import itertools
import math
import statistics

import numpy as np
import pytest

from qsharp_jax import estimators


@pytest.mark.parametrize('samples, k', ((1, 1), (5, 1), (5, 2), (6, 4), (6, 6)))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, k):
    correct = np.random.default_rng(samples * 10 + k).random((7, samples)) < 0.3
    correct[0], correct[1] = False, True
    shares = [statistics.mean(any(subset) for subset in itertools.combinations(row, k))
              for row in correct.tolist()]
    assert estimators.pass_at_k(correct, k) == pytest.approx(statistics.mean(shares), abs=1e-12)


@pytest.mark.parametrize('k', (0, 5))
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f'pass@{k} .* the 4 samples'):
        estimators.pass_at_k(np.ones((2, 4)), k)


def vote(texts, rewards):
    """The same votes counted in every order: of equally frequent answers the one that is met first wins.

    What a winner earns is the mean of its voters, since one of them speaks for all.
    """
    earned = []
    for order in itertools.permutations(range(len(texts))):
        counts = collections.Counter(texts[place] for place in order if texts[place])
        if not counts:
            earned.append(0.0)
            continue
        winner = next(texts[place] for place in order if counts[texts[place]] == max(counts.values()))
        earned.append(statistics.mean(reward for text, reward in zip(texts, rewards) if text == winner))
    return statistics.mean(earned)


def test_majority_is_the_expected_vote():
    random = np.random.default_rng(0)
    answers = [['a', 'b', 'a', 'b', 'c'], ['a', 'a', 'b', 'c', ''], [''] * 5, ['', '', '', 'a', 'b'],
               *(random.choice(['a', 'b', 'c', ''], 5).tolist() for _ in range(12))]
    rewards = random.random((len(answers), 5)).round(2)
    expected = [vote(texts, earned) for texts, earned in zip(answers, rewards.tolist())]
    np.testing.assert_allclose(estimators.majority(answers, rewards), expected, atol=1e-12)
    assert expected[2] == 0


def test_majority_needs_a_reward_for_each_answer():
    with pytest.raises(ValueError):
        estimators.majority([['a', 'b']], np.ones((1, 3)))


def test_the_standard_error_is_clustered_by_example():
    values = np.random.default_rng(1).normal(size=(9, 4))
    mean, error = estimators.mean_and_se(values)
    rows = [statistics.mean(row) for row in values.tolist()]
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(statistics.stdev(rows) / math.sqrt(9))
    # Saying everything five times is no news.
    assert estimators.mean_and_se(np.tile(values, (1, 5))) == pytest.approx((mean, error))
    assert math.isnan(estimators.mean_and_se(values[:1])[1])
    assert estimators.mean_and_se(values[:1])[0] == pytest.approx(values[0].mean())


def test_the_standard_error_is_the_spread_of_the_mean():
    # Examples differ more than samples of one example: 400 experiments of 30 examples with 5 samples each.
    random = np.random.default_rng(2)
    values = random.normal(size=(400, 30, 1)) + 0.5 * random.normal(size=(400, 30, 5))
    found = np.array([estimators.mean_and_se(experiment) for experiment in values])
    assert np.sqrt(np.mean(found[:, 1] ** 2)) == pytest.approx(found[:, 0].std(), rel=0.1)


def test_a_paired_difference_is_free_of_what_the_examples_share():
    random = np.random.default_rng(3)
    difficulty = 10 * random.normal(size=(20, 1))
    first = np.tile(difficulty + 0.25, (1, 4))
    mean, error = estimators.paired_difference(first, np.tile(difficulty, (1, 6)))
    assert mean == pytest.approx(0.25) and error == pytest.approx(0, abs=1e-12)
    noise = random.normal(size=(20, 4))
    mean, error = estimators.paired_difference(first + noise, np.tile(difficulty, (1, 6)))
    assert mean == pytest.approx(0.25 + noise.mean())
    assert error == pytest.approx(statistics.stdev(noise.mean(1).tolist()) / math.sqrt(20))
    with pytest.raises(ValueError, match='got 20 and 19'):
        estimators.paired_difference(first, first[1:])
