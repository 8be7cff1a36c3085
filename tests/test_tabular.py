"""The oracle against itself, by ways that share no code, and against the theorems it must obey."""
from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, guidance, types
from tests import tabular

ETAS = (0.03, 0.1, 1.0, 20.0)
SEEDS = (0, 1, 2)
RETURNS = (-0.5, 0.0, 0.25, 1.0)


def language(seed):
    return tabular.random_language(seed, returns=RETURNS)


def random_policy(of, seed):
    return tabular.sampler_probs(np.random.default_rng(seed).normal(size=of.logits.shape))


def listed(of, policy, prompt):
    """Every answer with its probability and reward, by listing token sequences."""
    found = {}
    for length in range(1, of.horizon + 1):
        for answer in itertools.product(range(of.vocab_size), repeat=length):
            stops = [token in of.eos for token in answer]
            if any(stops[:-1]) or not (stops[-1] or length == of.horizon):
                continue
            nodes = [of.node(answer[:end]) for end in range(length + 1)]
            prob = math.prod(policy[prompt, node, token] for node, token in zip(nodes, answer))
            found[answer] = (prob, of.rewards[prompt, nodes[-1]])
    return found


@pytest.mark.parametrize('seed', SEEDS)
def test_answer_law_values_and_divergence_by_listing(seed):
    tree = language(seed)
    policy, reference = random_policy(tree, seed), tree.reference()
    for prompt in range(len(tree.prompts)):
        ours, theirs = listed(tree, policy, prompt), listed(tree, reference, prompt)
        law = tree.answer_law(policy)[prompt]
        assert sum(prob for prob, _ in ours.values()) == pytest.approx(1, abs=1e-12)
        assert set(np.flatnonzero(tree.ends)) == {tree.node(answer) for answer in ours}
        for answer, (prob, _) in ours.items():
            assert law[tree.node(answer)] == pytest.approx(prob, abs=1e-12)
        expected = sum(prob * reward for prob, reward in ours.values())
        divergence = sum(prob * math.log(prob / theirs[answer][0]) for answer, (prob, _) in ours.items())
        assert tree.values(policy)[prompt, 0] == pytest.approx(expected, abs=1e-12)
        assert tree.divergences(policy, reference)[prompt, 0] == pytest.approx(divergence, abs=1e-12)
        assert tree.regularised_values(policy, 0.3, reference)[prompt] == pytest.approx(
            expected - 0.3 * divergence, abs=1e-12)


@pytest.mark.parametrize('eta', ETAS)
@pytest.mark.parametrize('seed', SEEDS)
def test_soft_bellman_is_the_closed_form(seed, eta):
    # Theorem 2.2: V*,η = η ln E_{π_ref} exp(return / η), at every node.
    tree = language(seed)
    law = tree.return_law(tree.reference())
    closed = eta * np.log(law[:, tree.open | tree.ends] @ np.exp(tree.support / eta))
    soft = tree.soft_values(eta, tree.reference())[:, tree.open | tree.ends]
    np.testing.assert_allclose(soft, closed, atol=1e-10)


@pytest.mark.parametrize('eta', ETAS)
@pytest.mark.parametrize('seed', SEEDS)
def test_performance_difference(seed, eta):
    # V*(x) - V^π(x) = η · KL(π ‖ π*) over whole answers, for every π.
    tree = language(seed)
    reference = tree.reference(temperature=0.8)
    optimum, best = tree.optimal_policy(eta, reference), tree.soft_values(eta, reference)[:, 0]
    np.testing.assert_allclose(tree.regularised_values(optimum, eta, reference), best, atol=1e-10)
    for policy in (random_policy(tree, seed), reference):
        gap = best - tree.regularised_values(policy, eta, reference)
        assert (gap > 1e-4).all()
        np.testing.assert_allclose(gap, eta * tree.divergences(policy, optimum)[:, 0], atol=1e-6)


@pytest.mark.parametrize('eta', ETAS)
def test_the_optimum_tilts_whole_answers(eta):
    tree = language(3)
    reference = tree.reference()
    tilted = tree.answer_law(reference) * np.exp((tree.rewards - 1) / eta)
    expected = tilted / tilted.sum(-1, keepdims=True)
    np.testing.assert_allclose(tree.answer_law(tree.optimal_policy(eta, reference)), expected, atol=1e-12)


@pytest.mark.parametrize('p_left', (0.5, 0.1))
def test_theorem_tree(p_left):
    # CD goes left, where every answer is worth 0.1; Q# goes right, where 1 can be found.
    tree = tabular.theorem_tree(p_left)
    reference, eta = tree.reference(), 0.1
    means = tree.values(reference)
    np.testing.assert_allclose(means[0, 1:3], [0.1, 0.05], atol=1e-12)
    right = eta * math.log(0.05 * math.exp(1 / eta) + 0.95)
    np.testing.assert_allclose(tree.soft_values(eta, reference)[0, 1:3], [0.1, right], atol=1e-12)
    cd = tree.tilt(reference, means / eta)[0, 0, 0]
    qsharp = tree.optimal_policy(eta, reference)[0, 0, 0]
    odds = p_left / (1 - p_left)
    assert cd == pytest.approx(odds * math.exp(0.5) / (odds * math.exp(0.5) + 1), abs=1e-12)
    assert qsharp == pytest.approx(odds * math.e / (odds * math.e + 0.05 * math.exp(10) + 0.95), abs=1e-12)
    if p_left == 0.5:
        assert round(cd, 3) == 0.622 and round(qsharp, 4) == 0.0025


def decode_step(tree, reference, value, scores, answer, prompt, capacity=9):
    """Logits and candidate scores after a prefix, the prompt prefilled and the prefix fed token by token."""
    history = tree.prompts[prompt] + answer
    ask = jax.jit(reference.step), jax.jit(value.score)
    tokens, lengths = jnp.full((1, 6), 7, jnp.int32), jnp.array([len(tree.prompts[prompt]) - 1])
    tokens = tokens.at[0, :len(tree.prompts[prompt]) - 1].set(jnp.array(history[:lengths[0]], jnp.int32))
    caches = [net.prefill(None, tokens, lengths, net.init_cache(1, capacity), 0) for net in (reference, value)]
    candidates = jnp.arange(tree.vocab_size)[None]
    for position in range(int(lengths[0]), len(history)):
        token, length = jnp.array([history[position]]), jnp.array([position])
        logits, caches[0] = ask[0](tree.reference_params(), token, length, caches[0])
        found, caches[1] = ask[1](scores, tabular.block_after(token, candidates), length, caches[1])
    return logits[0], found


def test_networks_show_the_tables():
    tree = tabular.random_language(5, num_prompts=3)
    distribution = categorical.make('bernoulli', 0.0, 1.0)
    law = tree.return_law(tree.reference())
    scores = tree.scores(distribution, law)
    reference, value = tree.as_reference(), tree.as_value()
    for prompt, answer in itertools.product(range(3), [(), (0,), (1, 0), (1, 1)]):
        logits, found = decode_step(tree, reference, value, scores, answer, prompt)
        node = tree.node(answer)
        np.testing.assert_array_equal(logits, tree.logits[prompt, node])
        children = [tree.node(answer + (token,)) for token in range(3)]
        np.testing.assert_array_equal(found.candidates[0], scores[prompt, jnp.array(children)])
        if answer:
            np.testing.assert_array_equal(found.roots[0, 0], scores[prompt, node])
        else:
            assert np.isnan(found.roots).all()


@pytest.mark.parametrize('kind', ('bernoulli', 'categorical', 'mse'))
def test_scores_say_the_law(kind):
    tree = language(6) if kind == 'categorical' else tabular.random_language(6)
    distribution = categorical.make(kind, min(tree.support), max(tree.support), 7)
    law = tree.return_law(tree.reference())
    told = np.exp(distribution.log_probs(tree.scores(distribution, law))) @ np.array(distribution.atoms)
    reachable = tree.open | tree.ends
    np.testing.assert_allclose(told[:, reachable], (law @ tree.support)[:, reachable], atol=1e-6)
    if kind == 'categorical':
        with pytest.raises(ValueError, match='not all atoms'):
            tree.scores(categorical.make(kind, 0.0, 1.0, 3), law)


@pytest.mark.parametrize('temperature, top_p', ((1.0, 1.0), (0.7, 0.8)))
@pytest.mark.parametrize('eta', ETAS)
def test_guidance_with_exact_values_is_the_optimum(eta, temperature, top_p):
    tree = language(7)
    distribution = categorical.make('categorical', -0.5, 1.0, 7)
    reference = tree.reference(temperature, top_p=top_p)
    scores = tree.scores(distribution, tree.return_law(reference))
    nodes = np.flatnonzero(tree.open)
    children = jnp.asarray(nodes[:, None] * 3 + 1 + np.arange(3))
    rows = len(tree.prompts) * len(nodes)
    policy = types.Policy(
        eta=jnp.full((rows,), eta), temperature=jnp.full((rows,), temperature),
        top_k=jnp.zeros((rows,), jnp.int32), top_p=jnp.full((rows,), top_p),
        reference_temperature=jnp.full((rows,), temperature))
    weight = distribution.log_weight(scores[:, children], jnp.full((1, 1, 1), eta))
    logits, rule = jnp.asarray(tree.logits[:, nodes], jnp.float32).reshape(rows, 3), ('mean', 'after_sampler')
    weighing = jax.jit(guidance.weighing_logits, static_argnames=('outside', 'order'))(
        logits, policy, outside=rule[0], order=rule[1])
    log_probs = jax.jit(guidance.policy_log_probs, static_argnames=('outside', 'order'))(
        logits, weighing, weight.reshape(rows, 3), jnp.ones((rows, 3), bool), jnp.zeros(rows),
        jnp.ones((rows,), bool), policy, outside=rule[0], order=rule[1])
    optimum = tree.optimal_policy(eta, reference)[:, nodes].reshape(rows, 3)
    np.testing.assert_allclose(np.exp(log_probs), optimum, atol=1e-6 if eta >= 0.1 else 4e-6)


def test_counting_every_answer_by_its_probability_gives_the_law():
    tree = tabular.random_language(8, horizon=2)
    reference = np.full_like(tree.logits, 1 / 3)
    # Under a uniform reference an answer of length n stands for 3 ** (2 - n) draws out of 9.
    units = [(prompt, answer, 0, reward)
             for prompt in range(2) for answer, (prob, reward) in listed(tree, reference, prompt).items()
             for _ in range(round(prob * 9))]
    law, counted = tree.return_law(reference), tree.counted_law(units)
    seen = (tree.open | tree.ends) & (np.arange(tree.rewards.shape[1]) > 0)
    np.testing.assert_allclose(counted[:, seen], law[:, seen], atol=1e-12)
    late = tree.counted_law([(prompt, answer, 1, reward) for prompt, answer, _, reward in units])
    np.testing.assert_array_equal(late[:, 1:4], 1 / len(tree.support))
    np.testing.assert_allclose(late[:, seen][:, 3:], law[:, seen][:, 3:], atol=1e-12)


def test_dyadic_networks_read_the_history_and_nothing_else():
    reference, value = tabular.dyadic_reference(11), tabular.dyadic_value(2)
    tokens = jnp.array([[3, 1, 4, 9, 9], [3, 1, 4, 0, 2], [3, 1, 5, 0, 2]])
    cache = reference.prefill(None, tokens, jnp.array([2, 2, 3]), reference.init_cache(3, 8), 0)
    logits, after = reference.step(None, jnp.array([4, 4, 4]), jnp.array([2, 2, 2]), cache)
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits * 4, np.round(logits * 4))
    second = jax.tree.map(lambda leaf: leaf[1:2], cache)
    alone, _ = reference.step(None, jnp.array([4]), jnp.array([2]), second)
    np.testing.assert_array_equal(alone[0], logits[1])
    other, _ = reference.step(None, jnp.array([5]), jnp.array([2]), second)
    assert (other[0] != logits[1]).any()
    candidates, lengths = jnp.array([[0, 7]] * 3), jnp.array([2, 2, 2])
    scores, kept = value.score(None, tabular.block_after(jnp.array([4, 4, 4]), candidates), lengths, cache)
    following, _ = value.score(None, tabular.block_after(jnp.array([7, 7, 7]), candidates), lengths + 1, kept)
    np.testing.assert_array_equal(following.roots[:, 0], scores.candidates[:, 1])
    np.testing.assert_array_equal(kept['tokens'], after['tokens'])
