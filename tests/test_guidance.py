"""The sampled law against literal numpy, and the invariants that hold bit for bit."""
from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import guidance, types
from tests import tabular

INF = math.inf
VOCAB = 300  # more than the head of the nucleus search, so that both its ways are taken
RULES = [(outside, 'paper') for outside in guidance.OUTSIDE] + [('mean', 'after_sampler')]
policy_log_probs = jax.jit(guidance.policy_log_probs, static_argnames=('outside', 'order'))
weighing_logits = jax.jit(guidance.weighing_logits, static_argnames=('outside', 'order'))
jitted_sampler = jax.jit(guidance.sampler_log_probs)
offsets = jax.jit(guidance.offsets, static_argnames='outside')
sample = jax.jit(guidance.sample)
top_candidates = jax.jit(guidance.top_candidates, static_argnames='count')


def make_policy(rows, eta=0.1, temperature=1.0, top_k=0, top_p=1.0):
    return types.Policy(*(jnp.broadcast_to(jnp.asarray(value, dtype), (rows,)) for value, dtype in (
        (eta, jnp.float32), (temperature, jnp.float32), (top_k, jnp.int32), (top_p, jnp.float32), (1.0, jnp.float32))))


def case(seed, rows=6, vocab=VOCAB, count=20, scale=3.0):
    """Random logits, weights of the `count` best tokens (garbage elsewhere), those, a weight of the root."""
    random = np.random.default_rng(seed)
    logits = jnp.asarray(random.normal(size=(rows, vocab)) * 2, jnp.float32)
    weight = random.normal(size=(rows, vocab)) * scale
    candidates = np.asarray(top_candidates(logits, count=count))
    scored = np.zeros((rows, vocab), bool)
    np.put_along_axis(scored, candidates, True, axis=-1)
    weight[~scored] = random.choice([np.nan, -INF, INF, 1e30], size=(~scored).sum())
    root = random.normal(size=rows) * scale
    return logits, jnp.asarray(weight, jnp.float32), jnp.asarray(scored), jnp.asarray(root, jnp.float32)


def sampler_log_probs(logits, policy):
    return jitted_sampler(np.asarray(logits, np.float32), policy)


def law(logits, weight, scored, root, policy, outside, order, first=False):
    # Equal types whatever the caller computed with: one compiled program per rule.
    logits, weight, root = (np.asarray(each, np.float32) for each in (logits, weight, root))
    weighing = weighing_logits(logits, policy, outside=outside, order=order)
    return policy_log_probs(logits, weighing, weight, np.asarray(scored), root, np.full(root.shape, first), policy,
                            outside=outside, order=order)


def slow_offsets(pi, weight, scored, root, first, outside):
    """One row, in plain weights and float64."""
    ids = np.flatnonzero(scored)
    w: dict = {j: math.exp(weight[j]) for j in ids}
    mean = sum(pi[j] * w[j] for j in ids) / sum(pi[j] for j in ids)
    if outside == 'zero':
        rest = 1.0
    elif outside == 'remove':
        rest = 0.0
    elif outside == 'min':
        rest = min(w.values())
    elif outside == 'average':
        rest = math.exp(sum(weight[j] for j in ids) / len(ids))
    else:
        left = 1 - sum(pi[j] for j in ids)
        rest = mean
        if outside == 'soft_bellman' and not first and left >= 1e-3:
            rest = (math.exp(root) - sum(pi[j] * w[j] for j in ids)) / left
            rest = min(max(rest, min(w.values())), max(w.values()))
    return np.array([math.log(w.get(j, rest) / max(w.values())) if w.get(j, rest) > 0 else -INF
                     for j in range(len(pi))])


@pytest.mark.parametrize('vocab', (11, VOCAB))
@pytest.mark.parametrize('ties', (False, True))
def test_sampler_is_temperature_then_top_k_then_top_p(vocab, ties):
    random, rows = np.random.default_rng(0), 6
    for temperature, top_k, top_p in (
            (1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.8), (0.8, 6, 0.9), (1.0, 290, 0.97), (1.0, 280, 1.0),
            (2.0, 0, 0.99), (1.0, 0, 0.0), (1.0, vocab + 5, 1.0)):
        logits = random.normal(size=(rows, vocab))
        logits[0] *= 5
        if ties:
            logits = np.round(logits) * random.choice([-1.0, 1.0], size=logits.shape)  # 0 and -0 among them
        logits = logits.astype(np.float32)
        got = np.exp(sampler_log_probs(logits, make_policy(rows, 0.1, temperature, top_k, top_p)))
        expected = tabular.sampler_probs(logits / np.float32(temperature), 1.0, top_k, top_p)
        np.testing.assert_array_equal(got > 0, expected > 0, err_msg=str((temperature, top_k, top_p)))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-8)


def test_cuts_are_exact_among_tokens_a_few_last_digits_apart():
    random = np.random.default_rng(1)
    logits = (1 + np.stack([random.permutation(VOCAB) for _ in range(6)]) * 2.0 ** -22).astype(np.float32)
    for top_k, top_p in ((280, 1.0), (0, 0.9313), (290, 0.9313)):
        got = sampler_log_probs(logits, make_policy(6, top_k=top_k, top_p=top_p))
        np.testing.assert_array_equal(got > -INF, tabular.sampler_probs(logits, 1.0, top_k, top_p) > 0)


def test_sampler_row_by_row_settings_do_not_touch_each_other():
    logits = case(1)[0] * 0.3
    settings: dict[str, list] = dict(
        temperature=[0.0, 1.0, 0.5, 1.0, 2.0, 0.0], top_k=[0, 5, 0, 280, 0, 2],
        top_p=[1.0, 1.0, 0.9, 0.5, 1.0, 0.3])
    together = sampler_log_probs(logits, make_policy(6, **settings))
    for row in range(6):
        alone = sampler_log_probs(logits[row:row + 1],
                                  make_policy(1, **{name: value[row] for name, value in settings.items()}))
        np.testing.assert_array_equal(together[row], alone[0])
        expected = tabular.sampler_probs(np.asarray(logits[row]), settings['temperature'][row],
                                         settings['top_k'][row], settings['top_p'][row])
        np.testing.assert_allclose(np.exp(together[row]), expected, rtol=1e-4)


@pytest.mark.parametrize('first', (False, True))
@pytest.mark.parametrize('outside', guidance.OUTSIDE)
def test_offsets_match_a_slow_implementation(outside, first):
    kinds = set()
    for seed in range(20):
        # Concentrated logits in some cases, so that the outside mass falls below its floor.
        logits, weight, scored, root = case(seed, scale=1.5)
        sampler = jax.nn.log_softmax(logits * (1, 3, 9)[seed % 3], axis=-1)
        got = np.asarray(offsets(sampler, weight, scored, root, jnp.full((6,), first), jnp.ones(6), outside))
        for row, inside in enumerate(np.asarray(scored)):
            pi = np.exp(np.asarray(sampler[row], np.float64))
            expected = slow_offsets(pi / pi.sum(), np.asarray(weight[row], np.float64), inside,
                                    float(root[row]), first, outside)
            np.testing.assert_allclose(got[row], expected, atol=2e-4, rtol=1e-4)
            rest, outside_mass = expected[~inside][0], pi[~inside].sum()
            assert abs(outside_mass - 1e-3) > 1e-6
            kinds.add('mean' if outside_mass < 1e-3 else 'top' if rest == 0 else
                      'bottom' if rest == expected[inside].min() else 'in')
    assert outside != 'soft_bellman' or first or kinds == {'mean', 'top', 'bottom', 'in'}


@pytest.mark.parametrize('outside, order', RULES)
def test_policy_is_reference_times_weight_then_the_sampler(outside, order):
    logits, weight, scored, root = case(3)
    temperature, top_p = 0.8, 0.95
    policy = make_policy(6, temperature=temperature, top_p=top_p)
    if order == 'after_sampler':
        scored = jnp.asarray(tabular.sampler_probs(np.asarray(logits), temperature, 0, top_p) > 0) | scored
        weight = jnp.where(jnp.abs(weight) < 1e3, weight, 0.3)
    got = law(logits, weight, scored, root, policy, outside, order)
    for row in range(6):
        pi = tabular.sampler_probs(np.asarray(logits[row]), temperature, 0, top_p)
        added = slow_offsets(pi, np.asarray(weight[row], np.float64), np.asarray(scored[row]),
                             float(root[row]), False, outside)
        if order == 'paper':
            expected = tabular.sampler_probs(np.asarray(logits[row]) + added, temperature, 0, top_p)
        else:
            expected = pi * np.exp(added) / (pi * np.exp(added)).sum()
        np.testing.assert_allclose(np.exp(got[row]), expected, atol=2e-5)


@pytest.mark.parametrize('outside, order', RULES)
def test_infinite_eta_is_the_reference_bit_for_bit(outside, order):
    rows = 6
    logits, weight, scored, root = case(4)
    scored = scored & (jnp.arange(rows) != 1)[:, None]  # row 1 has no scores at all
    policy = make_policy(rows, [INF, 0.1] + [INF] * (rows - 2), [1.0, 0.8] + [0.9] * (rows - 2), 0,
                         [1.0, 0.95] + [0.9] * (rows - 2))
    sampler = sampler_log_probs(logits, policy)
    got = law(logits, weight, scored, root, policy, outside, order)
    np.testing.assert_array_equal(got, sampler)
    zero = law(logits, jnp.zeros_like(weight), ~scored, 0 * root, make_policy(rows, INF), outside, order)
    np.testing.assert_array_equal(zero, sampler_log_probs(logits, make_policy(rows)))


@pytest.mark.parametrize('outside, order', [rule for rule in RULES if rule[0] != 'remove'])
def test_a_constant_value_leaves_the_reference_bit_for_bit(outside, order):
    logits, _, scored, _ = case(5)
    policy = make_policy(6, eta=[0.001, 0.1, 1.0, 0.1, 1.0, 10.0], temperature=[1.0, 0.8, 0.0, 0.6, 1.0, 0.9],
                         top_k=[0, 0, 0, 280, 0, 3], top_p=[1.0, 0.9, 1.0, 0.8, 1.0, 1.0])
    sampler = sampler_log_probs(logits, policy)
    for constant in (0.0, 0.1, 9.3, -700.0, -INF):
        # Under 'zero' an unscored token weighs 1, so that only the constant 0 is its equal.
        some = scored if outside != 'zero' or constant == 0 else scored | True
        for which in (some, scored | True):
            weight, root = jnp.full(logits.shape, constant), jnp.full((6,), constant)
            got = law(logits, weight, which, root, policy, outside, order)
            np.testing.assert_array_equal(got, sampler)


def test_zero_and_remove_change_a_constant_value_only_where_tokens_are_unscored():
    logits, _, scored, root = case(6)
    weight, policy = jnp.full(logits.shape, 2.0), make_policy(6)
    for outside in ('zero', 'remove'):
        part = law(logits, weight, scored, root, policy, outside, 'paper')
        assert (np.abs(part - sampler_log_probs(logits, policy)).max(-1) > 0.01).all()
        full = law(logits, weight, scored | True, root, policy, outside, 'paper')
        np.testing.assert_array_equal(full, sampler_log_probs(logits, policy))


def test_soft_bellman_recovers_the_mean_weight_of_the_unscored_tokens():
    # Exactly, the root's weight is the mean of its tokens' weights under the sampler that collected D.
    random = np.random.default_rng(7)
    logits, _, scored, _ = case(7)
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.5, 0.98)):
        pi = tabular.sampler_probs(np.asarray(logits), temperature, 0, top_p)
        outside_mass = np.where(scored, 0, pi).sum(-1)
        weight = random.uniform(0.5, 1.5, size=logits.shape)
        # The least and the most are scored, so that the true mean lies within the range.
        best = np.asarray(top_candidates(logits, count=2))
        np.put_along_axis(weight, best, np.array([[0.5, 1.5]]), axis=-1)
        root = (pi * weight).sum(-1)
        exact = np.where(scored, 0, pi * weight).sum(-1) / np.maximum(outside_mass, 1e-9)
        policy = make_policy(6, 0.1, temperature, 0, top_p)
        log_weight, log_root = (jnp.asarray(np.log(exactly), jnp.float32) for exactly in (weight, root))
        got = np.asarray(law(logits, log_weight, scored, log_root, policy, 'soft_bellman', 'paper'))
        added = np.log(np.where(scored, weight, exact[:, None]))
        expected = tabular.sampler_probs(np.asarray(logits) + added, temperature, 0, top_p)
        clear = outside_mass > 0.01
        assert clear.sum() >= 3
        np.testing.assert_allclose(np.exp(got[clear]), expected[clear], atol=2e-5)


def test_the_weight_of_the_root_is_ignored_at_the_first_token():
    logits, weight, scored, root = case(8)
    first = law(logits, weight, scored, root * jnp.nan, make_policy(6), 'soft_bellman', 'paper', first=True)
    mean = law(logits, weight, scored, root, make_policy(6), 'mean', 'paper', first=True)
    np.testing.assert_allclose(first, mean, atol=1e-6)


@pytest.mark.parametrize('outside, order', RULES)
def test_greedy_rows_are_one_hot_on_the_best_guided_token(outside, order):
    logits, weight, scored, root = case(9)
    weight = jnp.where(scored, weight * 100, weight)
    policy = make_policy(6, [0.1, 0.1, INF, 1.0, 0.1, INF], [0.0, 1.0, 0.0, 0.0, 0.5, 1.0], 0,
                         [1.0, 1.0, 1.0, 0.9, 1.0, 1.0])
    got = np.asarray(law(logits, weight, scored, root, policy, outside, order))
    assert not np.isnan(got).any()
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(-1), 1, atol=1e-5)
    warm = dataclasses.replace(policy, temperature=jnp.ones(6))
    guided = np.asarray(law(logits, weight, scored, root, warm, outside, order))
    for row in (0, 2, 3):
        # After the sampler a greedy row has no choice left.
        best = np.argmax(logits[row] if order == 'after_sampler' else guided[row])
        np.testing.assert_array_equal(got[row], np.where(np.arange(VOCAB) == best, 0.0, -INF))


def test_greedy_takes_the_first_of_equals():
    got = sampler_log_probs(jnp.array([[1.0, 2.0, 2.0], [-0.0, 0.0, 0.0]]), make_policy(2, temperature=0.0))
    np.testing.assert_array_equal(np.argmax(got, -1), [1, 0])
    np.testing.assert_array_equal(np.sort(got, -1), [[-INF, -INF, 0]] * 2)


@pytest.mark.parametrize('outside, order', RULES)
def test_a_larger_weight_never_lowers_the_tokens_probability(outside, order):
    # Not with top-p in the order 'paper': there a better token can pull a further one into the nucleus.
    for seed in range(25):
        logits, weight, scored, root = case(100 + seed)
        random = np.random.default_rng(seed)
        token = np.array([random.choice(np.flatnonzero(row)) for row in np.asarray(scored)])
        more = np.array(weight)
        more[np.arange(6), token] += random.exponential(size=6) * 2
        policy = make_policy(6, 0.1, random.choice([0.5, 1.0, 2.0], size=6),
                             random.choice([0, 3, 60], size=6), 0.9 if order == 'after_sampler' else 1.0)
        before, after = (
            np.exp(law(logits, jnp.asarray(each), scored, root, policy, outside, order))[np.arange(6), token]
            for each in (weight, more))
        assert (after >= before * (1 - 2e-6)).all()


@pytest.mark.parametrize('outside, order', RULES)
def test_weights_far_apart_stay_finite(outside, order):
    logits, _, scored, root = case(10)
    weight = jnp.where(scored, jnp.where(jnp.arange(VOCAB) % 2 == 0, 1000.0, -1000.0)[None], 0.0)
    for sharp in (1.0, 40.0):
        got = np.exp(law(logits * sharp, weight, scored, root * 700, make_policy(6, 0.001), outside, order))
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_unknown_rules_are_refused():
    logits, weight, scored, root = case(11)
    for bad in (dict(outside='median', order='paper'), dict(outside='mean', order='before')):
        with pytest.raises(ValueError, match='must be one of'):
            law(logits, weight, scored, root, make_policy(6), **bad)


def test_kl_divergence():
    p, q = (np.random.default_rng(seed).dirichlet(np.ones(9), size=5) for seed in (0, 1))
    p[0, 3] = p[1, 4] = q[1, 4] = q[2, 5] = 0
    p, q = (mass / mass.sum(-1, keepdims=True) for mass in (p, q))
    with np.errstate(divide='ignore'):
        log_p, log_q = (jnp.asarray(np.log(mass), jnp.float32) for mass in (p, q))
    got = np.asarray(guidance.kl_divergence(log_p, log_q))
    for row in range(5):
        terms = [a * math.log(a / b) if b > 0 else INF for a, b in zip(p[row], q[row]) if a > 0]
        assert got[row] == pytest.approx(sum(terms), abs=1e-6)
    assert got[2] == INF
    np.testing.assert_array_equal(guidance.kl_divergence(log_p, log_p), 0)
    near = guidance.kl_divergence(log_p, jax.nn.log_softmax(log_p + 1e-7, axis=-1))
    assert ((near >= 0) & (near < 1e-6)).all()


def test_reference_log_probs_is_the_sampler_that_cuts_nothing():
    logits = case(12)[0]
    for temperature in (1.0, 0.3, 2.0):
        sampler = sampler_log_probs(logits, make_policy(6, temperature=temperature))
        reference = jax.jit(guidance.reference_log_probs)(logits, jnp.full((6,), temperature))
        np.testing.assert_allclose(reference, sampler, atol=4e-6)
        if temperature == 1:
            np.testing.assert_array_equal(guidance.kl_divergence(sampler, reference), 0)


def test_top_candidates_puts_the_lower_id_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(guidance.top_candidates(logits, 4), [[1, 3, 2, 4], [0, 1, 2, 3]])


@pytest.mark.parametrize('vocab', (5, 600))
def test_draws_follow_the_law(vocab):
    random = np.random.default_rng(0)
    probs = np.zeros(vocab)
    drawable = np.array([0, 2, 3, 4]) if vocab == 5 else np.array([1, 255, 256, 511, 512, 599])
    probs[drawable] = random.dirichlet(np.ones(len(drawable)) * 3)
    draws, chunk = 20000, 2000
    with np.errstate(divide='ignore'):
        log_probs = jnp.asarray(np.tile(np.log(probs), (chunk, 1)), jnp.float32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(draws))
    tokens = np.concatenate(
        [sample(keys[start:start + chunk], log_probs) for start in range(0, draws, chunk)])
    assert tokens.dtype == np.int32
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[probs == 0].sum() == 0
    expected = probs[drawable] * draws
    chi_square = ((counts[drawable] - expected) ** 2 / expected).sum()
    freedom = len(drawable) - 1
    # Mean and spread of a chi-square law: five standard deviations beyond its mean.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_draw_depends_on_its_key_and_row_alone():
    log_probs = jax.nn.log_softmax(case(13, rows=8)[0], axis=-1)
    keys = jax.random.split(jax.random.key(2), 8)
    together = sample(keys, log_probs)
    order = jnp.array([5, 2, 7, 0, 1, 3, 6, 4])
    np.testing.assert_array_equal(sample(keys[order], log_probs[order]), together[order])
    np.testing.assert_array_equal(sample(keys[3:4], log_probs[3:4]), together[3:4])
    assert len(set(np.asarray(sample(keys, jnp.tile(log_probs[:1], (8, 1)))))) > 1
