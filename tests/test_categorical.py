"""Return distributions against float64 recomputation."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical

ETAS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e6, math.inf)
KINDS = ('bernoulli', 'categorical', 'mse')
ELEVEN = categorical.make('categorical', 0.0, 1.0, 11)
UNEVEN = categorical.ReturnDistribution('categorical', (-1.0, -0.5, 0.25, 2.0))


def make(kind, v_min=-0.5, v_max=1.5):
    return categorical.make(kind, v_min, v_max, 5)


def exact_pmf(distribution, scores):
    scores = np.asarray(scores, np.float64)
    if distribution.kind == 'categorical':
        mass = np.exp(scores - scores.max(-1, keepdims=True))
    else:
        mass = np.concatenate([np.ones_like(scores), np.exp(scores)], axis=-1)
    return mass / mass.sum(-1, keepdims=True)


def random_scores(distribution, scale=3.0, shape=(40,)):
    scores = np.random.default_rng(0).normal(size=shape + (distribution.num_scores,)) * scale
    return jnp.asarray(scores, jnp.float32)


@pytest.mark.parametrize('kind', KINDS)
def test_log_probs_and_mean_are_the_pmfs(kind):
    distribution = make(kind)
    scores = random_scores(distribution, shape=(7, 6))
    pmf = exact_pmf(distribution, scores)
    np.testing.assert_allclose(np.exp(distribution.log_probs(scores)), pmf, atol=1e-6)
    np.testing.assert_allclose(distribution.mean(scores), pmf @ np.array(distribution.atoms), atol=1e-6)
    assert distribution.log_probs(scores).shape == (7, 6, len(distribution.atoms))


@pytest.mark.parametrize('scale', (0.1, 3.0, 30.0))
@pytest.mark.parametrize('kind', KINDS)
def test_qsharp_weight_matches_float64(kind, scale):
    distribution = make(kind)
    scores = random_scores(distribution, scale)
    got = np.asarray(distribution.log_weight(
        jnp.tile(scores[None], (len(ETAS), 1, 1)), jnp.tile(jnp.array(ETAS)[:, None], (1, 40))))
    for eta, weight in zip(ETAS[:-1], got):
        exponents = np.log(exact_pmf(distribution, scores)) + np.array(distribution.atoms) / eta
        top = exponents.max(-1, keepdims=True)
        expected = np.log(np.exp(exponents - top).sum(-1)) + top[..., 0]
        # Large η: relative to the exponents themselves, however small. Small η: a few last digits.
        bound = 6e-7 * 1.5 / eta if eta > 1 else 4e-7 * (np.abs(expected).max() + 30)
        assert np.abs(weight - expected).max() <= bound, eta
    assert (got[-1] == 0).all()


@pytest.mark.parametrize('offset', categorical.OFFSETS)
@pytest.mark.parametrize('kind', KINDS)
def test_weight_at_infinite_eta_is_exactly_zero_row_by_row(kind, offset):
    distribution = make(kind)
    scores = random_scores(distribution)
    eta = jnp.where(jnp.arange(40) % 2 == 0, jnp.inf, 0.1)
    weight = np.asarray(distribution.log_weight(scores, eta, offset))
    assert (weight[::2] == 0).all() and (weight[1::2] != 0).all()


def test_weights_of_the_binary_reward_at_eta_a_tenth():
    distribution = categorical.make('bernoulli', 0.0, 1.0)
    success = np.array([0, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0])
    with np.errstate(divide='ignore'):
        scores = jnp.asarray(np.log(success) - np.log(1 - success), jnp.float32)[:, None]
    eta = jnp.full((8,), 0.1)
    expected = np.log(success * math.exp(10) + 1 - success)
    np.testing.assert_allclose(distribution.log_weight(scores, eta), expected, atol=2e-6)
    np.testing.assert_allclose(distribution.log_weight(scores, eta, 'cd'), 10 * success, atol=2e-6)
    with np.errstate(divide='ignore'):
        np.testing.assert_allclose(distribution.log_weight(scores, eta, 'fudge'), np.log(success), rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_cd_and_fudge_read_the_mean(kind):
    distribution = make(kind)
    scores = random_scores(distribution)
    mean = exact_pmf(distribution, scores) @ np.array(distribution.atoms)
    eta = jnp.linspace(0.05, 2.0, 40)
    cd = distribution.log_weight(scores, eta, 'cd')
    np.testing.assert_allclose(cd, mean / np.asarray(eta), rtol=1e-5, atol=1e-5)
    share = (mean - distribution.v_min) / (distribution.v_max - distribution.v_min)
    np.testing.assert_allclose(distribution.log_weight(scores, eta, 'fudge'), np.log(share), atol=2e-6)


def test_fudge_keeps_its_digits_where_success_is_rare():
    distribution = categorical.make('bernoulli', 0.0, 1.0)
    weight = distribution.log_weight(jnp.array([[-80.0], [-200.0]]), jnp.ones(2), 'fudge')
    np.testing.assert_allclose(weight, [-80.0, -200.0], rtol=1e-6)


def test_weight_is_monotone_in_eta_between_mean_and_maximum():
    # η · log E exp(Z / η) falls from max Z to E[Z] as η grows.
    scores = jnp.zeros((1, 11))
    values = [float(eta * ELEVEN.log_weight(scores, jnp.array([eta]))[0]) for eta in ETAS[:-1]]
    assert all(a > b for a, b in zip(values[:-2], values[1:-1]))
    assert 0.99 < values[0] < 1 and abs(values[-1] - 0.5) < 1e-5


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_finite(kind):
    distribution = make(kind)
    scores = jnp.concatenate([random_scores(distribution), random_scores(distribution, 100.0)])
    rewards = jnp.linspace(-0.5, 1.5, 80)
    for offset in categorical.OFFSETS:
        grad = jax.jit(jax.grad(lambda scores, eta: distribution.log_weight(scores, eta, offset).sum()))
        for eta in ETAS:
            assert np.isfinite(grad(scores, jnp.full((80,), eta))).all()
    grad = jax.jit(jax.grad(lambda scores: distribution.loss(scores, rewards).sum()))
    assert np.isfinite(grad(scores)).all()


def test_weight_gradient_is_the_tilted_law_less_the_law():
    scores = random_scores(ELEVEN, shape=(6,))
    pmf, atoms = exact_pmf(ELEVEN, scores), np.array(ELEVEN.atoms)
    grad = jax.jit(jax.grad(lambda scores, eta: ELEVEN.log_weight(scores, eta).sum()))
    for eta in (0.01, 0.1, 1.0, 100.0):
        tilted = pmf * np.exp((atoms - 1) / eta)
        expected = tilted / tilted.sum(-1, keepdims=True) - pmf
        np.testing.assert_allclose(grad(scores, jnp.full((6,), eta)), expected, atol=1e-6)


@pytest.mark.parametrize('atoms', (ELEVEN.atoms, UNEVEN.atoms, (0.0, 1.0)))
@pytest.mark.parametrize('projection', ('nearest', 'two_hot'))
def test_projection_matches_a_slow_one(atoms, projection):
    distribution = categorical.ReturnDistribution('categorical', atoms, projection)
    rewards = np.linspace(atoms[0], atoms[-1], 203)
    expected = np.zeros((203, len(atoms)))
    for row, reward in zip(expected, rewards):
        if projection == 'nearest':
            row[min(range(len(atoms)), key=lambda k: (abs(reward - atoms[k]), k))] = 1
        else:
            upper = next(k for k in range(1, len(atoms)) if reward <= atoms[k])
            share = (reward - atoms[upper - 1]) / (atoms[upper] - atoms[upper - 1])
            row[upper - 1], row[upper] = 1 - share, share
    middles = (np.array(atoms[1:]) + atoms[:-1]) / 2
    clear = np.abs(rewards[:, None] - middles).min(-1) > 1e-6
    got = np.asarray(distribution.target(jnp.asarray(rewards, jnp.float32)))
    np.testing.assert_allclose(got[clear], expected[clear], atol=3e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


def test_two_hot_keeps_the_mean_and_atoms_are_fixed_points():
    for atoms in (ELEVEN.atoms, UNEVEN.atoms):
        distribution = categorical.ReturnDistribution('categorical', atoms, 'two_hot')
        rewards = np.random.default_rng(2).uniform(atoms[0], atoms[-1], 500)
        target = np.asarray(distribution.target(jnp.asarray(rewards, jnp.float32)), np.float64)
        np.testing.assert_allclose(target @ np.array(atoms), rewards, atol=3e-7)
        np.testing.assert_allclose(distribution.target(jnp.array(atoms)), np.eye(len(atoms)), atol=1e-6)


def test_nearest_gives_a_tie_to_the_lower_atom():
    distribution = categorical.make('categorical', 0.0, 4.0, 5)
    got = distribution.target(jnp.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(np.argmax(got, -1), [0, 1, 2, 3])


def test_returns_beyond_the_support_count_as_its_ends():
    for projection in categorical.PROJECTIONS:
        distribution = categorical.make('categorical', 0.0, 1.0, 11, projection)
        np.testing.assert_allclose(distribution.target(jnp.array([-3.0, 9.0])),
                                   distribution.target(jnp.array([0.0, 1.0])), atol=0)


@pytest.mark.parametrize('sigma', (0.1, 0.75, 3.0))
def test_hl_gauss_is_the_truncated_normal_over_the_cells(sigma):
    distribution = categorical.make('categorical', -1.0, 1.0, 9, 'hl_gauss', sigma)
    rewards = np.linspace(-1, 1, 41)
    gap = 0.25
    edges = np.linspace(-1 - gap / 2, 1 + gap / 2, 10)
    cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    mass = np.diff(cdf((edges - rewards[:, None]) / (sigma * gap)), axis=-1)
    expected = mass / mass.sum(-1, keepdims=True)
    got = np.asarray(distribution.target(jnp.asarray(rewards, jnp.float32)))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize('projection', categorical.PROJECTIONS)
def test_loss_is_the_cross_entropy_and_least_at_the_target(projection):
    distribution = categorical.make('categorical', 0.0, 1.0, 11, projection)
    scores, rewards = random_scores(distribution), jnp.linspace(0, 1, 40)
    target = np.asarray(distribution.target(rewards), np.float64)
    expected = -(target * np.log(exact_pmf(distribution, scores))).sum(-1)
    np.testing.assert_allclose(distribution.loss(scores, rewards), expected, rtol=1e-5)
    best = distribution.loss(jnp.log(jnp.maximum(target, 1e-30)).astype(jnp.float32), rewards)
    assert (best < distribution.loss(scores, rewards)).all()


def test_bernoulli_loss_is_binary_cross_entropy():
    distribution = categorical.make('bernoulli', 0.0, 1.0)
    scores = jnp.array([[-3.0], [0.5], [90.0], [-90.0]])
    expected = [math.log1p(math.exp(-3)), math.log1p(math.exp(-0.5)), 90.0, 90.0]
    loss = distribution.loss(scores, jnp.array([0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_mse_loss_is_in_units_of_the_reward():
    distribution = categorical.make('mse', -2.0, 2.0)
    scores = jnp.array([[0.0], [math.log(3)]])
    np.testing.assert_allclose(distribution.loss(scores, jnp.array([1.0, -1.0])), [1.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize('change, words', [
    (dict(kind='bernouli'), 'kind is'), (dict(projection='one_hot'), 'projection is'),
    (dict(v_min=1.0), 'the smaller'), (dict(v_max=math.inf), 'finite'), (dict(num_atoms=1), 'num_atoms is 1'),
    (dict(sigma=0.0), 'sigma is 0'), (dict(kind='bernoulli', projection='hl_gauss'), 'needs the kind')])
def test_make_refuses_what_has_no_meaning(change, words):
    good = dict(kind='categorical', v_min=0.0, v_max=1.0, num_atoms=11, projection='hl_gauss', sigma=0.75)
    categorical.make(**good)
    with pytest.raises(ValueError, match=words):
        categorical.make(**good | change)
    with pytest.raises(ValueError, match='offset is'):
        ELEVEN.log_weight(jnp.zeros((1, 11)), jnp.ones(1), 'q_sharp')


def test_rewards_that_miss_an_end_by_a_rounding_are_at_it():
    low, high = -1.0, 2.0
    distribution = categorical.make('categorical', low, high, 7)
    exact = [low, high, 0.0, 1.9, low + 1e-5, high - 1e-5]
    np.testing.assert_array_equal(distribution.at_ends(np.array([*exact, np.nan])), [*exact, np.nan])
    missed = np.nextafter(np.nextafter([low, low, high, high], [-9, 9, -9, 9]), [-9, 9, -9, 9])
    assert not set(missed) & {low, high}
    np.testing.assert_array_equal(distribution.at_ends(missed), [low, low, high, high])


def test_check_rewards():
    ELEVEN.check_rewards(np.array([0.0, 0.33, 1.0, np.nan]))
    bernoulli = categorical.make('bernoulli', 0.0, 1.0)
    bernoulli.check_rewards(np.array([0.0, 1.0, np.nan]))
    categorical.make('bernoulli', 0.0, 1.0, projection='two_hot').check_rewards(np.array([0.3]))
    for rewards in ([0.5, 1.2], [-0.1], [np.inf]):
        with pytest.raises(ValueError, match='outside'):
            ELEVEN.check_rewards(np.array(rewards))
    with pytest.raises(ValueError, match='neither'):
        bernoulli.check_rewards(np.array([0.0, 0.5]))
