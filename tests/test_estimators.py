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
    mean, error = estimators.pass_at_k(correct, k)
    assert mean == pytest.approx(statistics.mean(shares), abs=1e-12)
    assert error == pytest.approx(statistics.stdev(shares) / math.sqrt(7), abs=1e-12)  # clustered by example


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
            earned.append(-0.5)
            continue
        winner = next(texts[place] for place in order if counts[texts[place]] == max(counts.values()))
        earned.append(statistics.mean(reward for text, reward in zip(texts, rewards) if text == winner))
    return statistics.mean(earned)


def some_votes():
    random = np.random.default_rng(0)
    votes = [['a', 'b', 'a', 'b', 'c'], ['a', 'a', 'b', 'c', ''], [''] * 5, ['', '', '', 'a', 'b'],
             *(random.choice(['a', 'b', 'c', ''], 5).tolist() for _ in range(12))]
    return votes, random.random((len(votes), 5)).round(2)


def test_the_mean_over_draws_is_the_expected_vote():
    votes, rewards = some_votes()
    expected = [vote(texts, earned) for texts, earned in zip(votes, rewards.tolist())]
    draws = 2000
    found = np.mean([estimators.majority(votes, rewards, [f'{draw} {i}' for i in range(len(votes))], -0.5)
                     for draw in range(draws)], axis=0)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / math.sqrt(draws))
    assert found[2] == expected[2] == -0.5  # nobody votes: the least reward, which may be below 0


def test_a_tie_is_broken_by_address_and_never_by_order():
    votes, rewards = some_votes()
    addresses = [f'0 {i}' for i in range(len(votes))]
    first = estimators.majority(votes, rewards, addresses, 0.0)
    random = np.random.default_rng(1)
    for _ in range(10):
        order = random.permutation(5)
        shuffled = [[texts[place] for place in order] for texts in votes]
        np.testing.assert_allclose(estimators.majority(shuffled, rewards[:, order], addresses, 0.0), first)
        examples = random.permutation(len(votes))
        np.testing.assert_allclose(estimators.majority(
            [votes[i] for i in examples], rewards[examples], [addresses[i] for i in examples], 0.0), first[examples])


def test_weights_are_summed_over_a_class():
    votes, rewards = [['a', 'b', 'b', '']], np.array([[1.0, 0.5, 0.5, 0.0]])
    for weights, earned in (([1, 1, 1, 9], 0.5), ([3, 1, 1, 9], 1.0), ([0, 0.1, 0, 9], 0.5)):
        assert estimators.majority(votes, rewards, ['x'], 0.0, np.array([weights], float))[0] == earned
    # Sums that are equal are a tie, in whatever order they are added.
    tied = {estimators.majority([['a'] * 3 + ['b'] * 3], np.array([[1.0] * 3 + [0.0] * 3]), [f'{draw}'], 0.0,
                                np.array([[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]]))[0] for draw in range(30)}
    assert tied == {0, 1}


def test_the_best_scored_answer_is_chosen():
    random = np.random.default_rng(4)
    scores, rewards = random.random((20, 6)), random.random((20, 6))
    texts = random.choice(list('abc'), (20, 6)).tolist()
    addresses = [str(i) for i in range(20)]
    found = estimators.best_of(scores, rewards, texts, addresses)
    np.testing.assert_array_equal(found, rewards[np.arange(20), scores.argmax(axis=1)])
    # Without a difference in scores each text is as good as the others, in whatever order they come.
    drawn = np.array([estimators.best_of(np.zeros((1, 3)), np.array([[1.0, 0.0, 0.0]]), [['r', 'w', 'w']], [str(draw)])
                      for draw in range(2000)])
    assert drawn.mean() == pytest.approx(1 / 2, abs=0.045)
    again = np.array([estimators.best_of(np.zeros((1, 3)), np.array([[0.0, 1.0, 0.0]]), [['w', 'r', 'w']], [str(draw)])
                      for draw in range(2000)])
    np.testing.assert_array_equal(drawn, again)


def test_majority_needs_a_reward_for_each_answer():
    with pytest.raises(IndexError):
        estimators.majority([['a', 'b', 'b']], np.ones((1, 2)), ['x'], 0.0)


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


def test_the_bootstrap_covers_the_difference_nineteen_times_of_twenty():
    # 300 experiments of 40 examples, which differ more than samples of one example do.
    random = np.random.default_rng(5)
    hits, widths, errors = [], [], []
    for number in range(300):
        difficulty = random.normal(size=(40, 1))
        first = difficulty + 0.3 + random.normal(size=(40, 3))
        second = difficulty + random.normal(size=(40, 2))
        low, high = estimators.bootstrap_interval(first, second, f'{number}')
        hits.append(low <= 0.3 <= high)
        widths.append(high - low)
        errors.append(estimators.paired_difference(first, second)[1])
    assert np.mean(hits) == pytest.approx(0.95, abs=0.035)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.mean(errors), rel=0.03)


def test_the_bootstrap_depends_on_its_address_alone():
    values = np.random.default_rng(6).normal(size=(25, 2))
    found = estimators.bootstrap_interval(values, 0 * values, '0 test')
    assert found == estimators.bootstrap_interval(values, 0 * values, '0 test')
    assert found != estimators.bootstrap_interval(values, 0 * values, '1 test')
    assert np.isnan(estimators.bootstrap_interval(values[:1], values[:1], '0')).all()
    with pytest.raises(ValueError, match='got 25 and 24'):
        estimators.bootstrap_interval(values, values[1:], '0')
