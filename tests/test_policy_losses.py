"""Losses of trained policies: by hand, against the oracle's exact gradients and optima, and on their edges."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import learner, optimizers
from qsharp_jax.baselines import losses, policies
from qsharp_jax.models import networks, transformer
from tests import tabular


@dataclasses.dataclass(frozen=True)
class Listed:
    """All answers of a language to its first prompt.

    Attributes:
      nodes: at which each token is chosen.  # [A, H]
      tokens: of each answer, 0 behind its end.  # [A, H]
      weights: 1 on tokens of the answer.  # [A, H]
      rewards: of the answers.  # [A]
    """

    nodes: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    rewards: np.ndarray

    def all_log_probs(self, logits: jax.Array) -> jax.Array:
        """[M, V] -> [A, H, V]"""
        return jax.nn.log_softmax(logits, axis=-1)[self.nodes]

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """[M, V] -> [A, H]"""
        return jnp.take_along_axis(self.all_log_probs(logits), self.tokens[..., None], axis=-1)[..., 0]

    def answer_log_probs(self, logits: jax.Array) -> jax.Array:
        """[M, V] -> [A]"""
        return losses.answer_log_probs(self.log_probs(logits), jnp.asarray(self.weights))


def listed(language: tabular.Language) -> Listed:
    ends = np.flatnonzero(language.ends)
    shape = len(ends), language.horizon
    nodes, tokens, weights = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, np.float32)
    for row, end in enumerate(ends):
        answer = language.answers[end]
        for place, token in enumerate(answer):
            nodes[row, place], tokens[row, place], weights[row, place] = language.node(answer[:place]), token, 1
    return Listed(nodes, tokens, weights, language.rewards[0, ends])


@pytest.fixture(scope='module')
def language() -> tabular.Language:
    return tabular.random_language(3, returns=(0.0, 0.25, 1.0))


@pytest.fixture(scope='module')
def answers(language: tabular.Language) -> Listed:
    return listed(language)


Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def expected_gradient(answers: Listed, logits: jax.Array, advantages_of: Callable[[np.ndarray], np.ndarray],
                      loss: Loss) -> jax.Array:
    """The gradient of a loss of two independent answers, in expectation over both.

    Args:
      answers: of the language.
      logits: of the policy that draws them.  # [M, V]
      advantages_of: from the rewards of two answers.
      loss: takes (logits, which two, their advantages).
    """
    law = np.exp(np.asarray(answers.answer_log_probs(logits), np.float64))
    pairs = np.array([(a, b) for a in range(len(law)) for b in range(len(law))])
    chance = jnp.asarray(law[pairs[:, 0]] * law[pairs[:, 1]])
    assert float(chance.sum()) == pytest.approx(1, abs=1e-5)
    advantages = jnp.asarray(np.stack([advantages_of(answers.rewards[pair]) for pair in pairs]))
    each = jax.vmap(loss, in_axes=(None, 0, 0))
    return jax.grad(lambda logits: jnp.sum(chance * each(logits, jnp.asarray(pairs), advantages)))(logits)


def value_gradient(answers: Listed, logits: jax.Array) -> jax.Array:
    return jax.grad(lambda logits: jnp.sum(jnp.exp(answers.answer_log_probs(logits)) * answers.rewards))(logits)


def test_reinforce_ascends_the_expected_reward(language: tabular.Language, answers: Listed) -> None:
    logits = jnp.asarray(language.logits[0], jnp.float32)

    def loss(logits: jax.Array, pair: jax.Array, advantages: jax.Array) -> jax.Array:
        return losses.reinforce(answers.log_probs(logits)[pair], jnp.asarray(answers.weights)[pair], advantages)

    found = expected_gradient(answers, logits, losses.over_mean, loss)
    exact = value_gradient(answers, logits)
    assert float(jnp.abs(exact).max()) > 0.05
    # The baseline holds the answer itself, which takes one part of B = 2 of the gradient.
    np.testing.assert_allclose(found, -exact / 2, atol=2e-6)


def test_grpo_ascends_the_expected_reward_where_it_drew(language: tabular.Language, answers: Listed) -> None:
    logits = jnp.asarray(language.logits[0], jnp.float32)
    drawn = answers.log_probs(logits)

    def loss(logits: jax.Array, pair: jax.Array, advantages: jax.Array) -> jax.Array:
        return losses.clipped(
            answers.log_probs(logits)[pair], drawn[pair], jnp.asarray(answers.weights)[pair], advantages, 0.2)

    found = expected_gradient(answers, logits, lambda rewards: losses.over_group(rewards[None], scaled=False)[0], loss)
    np.testing.assert_allclose(found, -value_gradient(answers, logits) / 2, atol=2e-6)


def test_the_divergence_is_the_oracles(language: tabular.Language, answers: Listed) -> None:
    other = tabular.random_language(4, returns=(0.0, 0.25, 1.0)).logits[0]
    log_p, log_q = (answers.all_log_probs(jnp.asarray(one, jnp.float32)) for one in (language.logits[0], other))
    each = [float(losses.divergence(log_p[a:a + 1], log_q[a:a + 1], answers.weights[a:a + 1]))
            for a in range(len(answers.rewards))]
    law = np.exp(np.asarray(answers.answer_log_probs(jnp.asarray(language.logits[0], jnp.float32)), np.float64))
    exact = language.divergences(language.reference(), tabular.sampler_probs(np.stack([other, other])))[0, 0]
    assert exact > 0.1 and law @ each == pytest.approx(exact, rel=1e-5)
    assert losses.divergence(log_p, log_p, answers.weights) == 0


def test_the_divergence_passes_over_ids_that_no_token_has() -> None:
    logits = jnp.asarray([[[1.0, -jnp.inf, 0.5]], [[0.0, -jnp.inf, 2.0]]])

    def divergence(logits: jax.Array) -> jax.Array:
        masked = jnp.where(jnp.asarray([True, False, True])[None, None], logits, -jnp.inf)
        log_q = jax.nn.log_softmax(jnp.asarray([[[0.0, -jnp.inf, 0.0]]] * 2), axis=-1)
        return losses.divergence(jax.nn.log_softmax(masked, axis=-1), log_q, jnp.ones((2, 1)))

    p = np.array([[1, math.exp(-0.5)], [math.exp(-2), 1]])
    p /= p.sum(-1, keepdims=True)
    assert float(divergence(logits)) == pytest.approx(np.sum(p * np.log(2 * p)) / 2, rel=1e-5)
    assert bool(jnp.all(jnp.isfinite(jax.grad(divergence)(jnp.zeros((2, 1, 3))))))


def test_grpo_adds_its_kl(answers: Listed) -> None:
    some = slice(0, 4)
    log_p = answers.all_log_probs(jnp.zeros((40, 3)))[some]
    log_q = answers.all_log_probs(jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32))[some]
    own, weights, advantages = answers.log_probs(jnp.zeros((40, 3)))[some], answers.weights[some], jnp.ones(4)
    without = losses.clipped(own, own, weights, advantages, 0.2)
    assert float(without) == pytest.approx(-weights.sum() / 4)  # the ratio is 1 at each token
    assert float(losses.grpo(own, own, weights, advantages, 0.2, log_p, log_q, 0.5)) == pytest.approx(
        float(without + 0.5 * losses.divergence(log_p, log_q, weights)), rel=1e-6)


@pytest.mark.parametrize('ratio,advantage,surrogate,slope', [
    (1.0, 2.0, 2.0, 2.0), (1.1, 2.0, 2.2, 2.2), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0),
    (1.5, -2.0, -3.0, -3.0), (0.5, -2.0, -1.6, 0.0), (0.9, -2.0, -1.8, -1.8)])
def test_the_surrogate_is_clipped_on_the_side_of_the_advantage(
        ratio: float, advantage: float, surrogate: float, slope: float) -> None:
    drawn, weights = jnp.asarray([[-1.0, -9.0]]), jnp.asarray([[1.0, 0.0]])

    def loss(log_probs: jax.Array) -> jax.Array:
        return losses.clipped(log_probs, drawn, weights, jnp.asarray([advantage]), 0.2)

    value, gradient = jax.value_and_grad(loss)(drawn + jnp.asarray([[math.log(ratio), 5.0]]))
    assert float(value) == pytest.approx(-surrogate, rel=1e-6)
    np.testing.assert_allclose(gradient, [[-slope, 0]], rtol=1e-5)


def test_advantages_by_hand() -> None:
    nan = math.nan
    np.testing.assert_allclose(losses.over_mean(np.array([1.0, 0, 0, nan])), [2 / 3, -1 / 3, -1 / 3, 0])
    np.testing.assert_array_equal(losses.over_mean(np.array([nan, nan])), [0, 0])
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, nan, 0, nan], [nan] * 4])
    plain = [[0.75, -0.25, -0.25, -0.25], [0] * 4, [0.5, 0, -0.5, 0], [0] * 4]
    np.testing.assert_allclose(losses.over_group(rewards, scaled=False), plain)
    spread = math.sqrt(3) / 4
    np.testing.assert_allclose(losses.over_group(rewards, scaled=True), [
        [one / spread for one in plain[0]], [0] * 4, [1, 0, -1, 0], [0] * 4])


def test_dpo_and_rpo_by_hand() -> None:
    zero = jnp.zeros(2)
    assert float(losses.dpo(zero, zero, zero, zero, 0.1)) == pytest.approx(math.log(2))
    chosen, rejected = jnp.asarray([-1.0, -4.0]), jnp.asarray([-3.0, -1.0])
    reference = jnp.asarray([-2.0, -3.0]), jnp.asarray([-2.0, -2.5])
    margins = np.array([(-1 + 2) - (-3 + 2), (-4 + 3) - (-1 + 2.5)])
    expected = np.mean(np.log1p(np.exp(-0.5 * margins)))
    assert float(losses.dpo(chosen, rejected, *reference, 0.5)) == pytest.approx(expected, rel=1e-6)
    assert float(losses.rpo(chosen, rejected, *reference, 0.5, 2.0)) == pytest.approx(expected + 2 * 2.5, rel=1e-6)


def test_the_optimum_of_dpo_is_the_oracles(language: tabular.Language, answers: Listed) -> None:
    beta = 0.7
    reference = answers.answer_log_probs(jnp.asarray(language.logits[0], jnp.float32))
    a, b = (grid.ravel() for grid in np.meshgrid(*[np.arange(len(answers.rewards))] * 2))
    # How often a is preferred to b if preferences are Bradley and Terry's with the rewards as scores.
    preferred = jnp.asarray(1 / (1 + np.exp(answers.rewards[b] - answers.rewards[a])))

    def loss(logits: jax.Array) -> jax.Array:
        own = answers.answer_log_probs(logits)
        each = jax.vmap(lambda *four: losses.dpo(*(one[None] for one in four), beta))(
            own[a], own[b], reference[a], reference[b])
        return jnp.mean(preferred * each)

    with np.errstate(divide='ignore'):
        optimum = np.log(language.optimal_policy(beta, language.reference())[0])
    optimal = jnp.asarray(np.nan_to_num(optimum), jnp.float32)
    value, gradient = jax.value_and_grad(loss)(optimal)
    at_reference = jax.grad(loss)(jnp.asarray(language.logits[0], jnp.float32))
    assert float(jnp.abs(gradient).max()) < 1e-6 < 1e-3 < float(jnp.abs(at_reference).max())
    noise = np.random.default_rng(1)
    for _ in range(5):
        assert float(loss(optimal + 0.3 * jnp.asarray(noise.normal(size=optimal.shape), jnp.float32))) > float(value)


def test_texts_are_laid_out_and_read_at_their_own_places() -> None:
    batch = policies.lay_out([[5, 6], [7]], [([1], [2, 3]), ([1, 2, 3], [4])], 6)
    assert batch.tokens.tolist() == [[[5, 6, 1, 0, 0, 0], [5, 6, 2, 3, 0, 0]], [[7, 1, 2, 3, 0, 0], [7, 4, 0, 0, 0, 0]]]
    assert batch.weights.tolist() == [
        [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]], [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]]
    every = jnp.log(jnp.arange(1.0, 41).reshape(1, 5, 8))
    np.testing.assert_allclose(
        policies.chosen_log_probs(every, batch.tokens[0, :1]), np.log([[7, 10, 17, 25, 33]]), rtol=1e-6)


def test_log_probs_of_texts_are_of_real_ids_at_the_temperature() -> None:
    shape = transformer.TransformerConfig(
        vocab_size=9, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp_width=16, max_positions=8)
    params = jax.tree.map(lambda leaf: 5 * leaf, transformer.init_params(jax.random.key(0), shape))
    tokens = jnp.asarray([[1, 2, 3, 0], [4, 5, 0, 0]])
    found = policies.network_log_probs(shape, 7, (6,), 0.5)(params, tokens)
    logits = networks.text_logits(shape, params, tokens)[..., :6] / 0.5
    np.testing.assert_allclose(found[..., :6], jax.nn.log_softmax(logits, axis=-1), rtol=1e-5, atol=1e-6)
    assert found.shape == (2, 3, 7) and bool(jnp.all(jnp.isneginf(found[..., 6])))


@pytest.mark.parametrize('name', list(policies.METHODS))
def test_padding_and_prompts_have_no_loss(name: str) -> None:
    random = np.random.default_rng(0)
    pairs = policies.METHODS[name].pairs
    batch = policies.lay_out([[1, 2], [3]], [([4, 5], [6])[:1 + pairs], ([6], [5, 4])[:1 + pairs]], 5)
    batch = dataclasses.replace(batch, advantages=np.array([1, -1], np.float32))
    settings = {'clip': 0.2, 'kl': 0.1, 'beta': 0.1, 'nll_weight': 1.0}
    table = jnp.asarray(random.normal(size=(2 + 2 * pairs, 4, 8)), jnp.float32)
    other = jnp.asarray(random.normal(size=table.shape), jnp.float32)

    def loss(table: jax.Array) -> jax.Array:
        return policies.loss_of(name, settings, lambda params, tokens: jax.nn.log_softmax(params, axis=-1), table,
                                other, batch)[0]

    moved = np.abs(np.asarray(jax.grad(loss)(table))).max(-1) > 0
    np.testing.assert_array_equal(moved, batch.weights.reshape(len(moved), -1)[:, 1:] > 0)


@pytest.mark.parametrize('name', list(policies.METHODS))
def test_parts_of_a_batch_change_nothing(name: str) -> None:
    random = np.random.default_rng(0)
    pairs = policies.METHODS[name].pairs
    prompts = [[1, 2], [3], [4, 5], [6]]
    batch = policies.lay_out(prompts, [([7], [2, 3])[:1 + pairs]] * 4, 5)
    batch = dataclasses.replace(batch, advantages=np.array([1, -1, 2, 0.5], np.float32))
    settings = {'clip': 0.2, 'kl': 0.1, 'beta': 0.1, 'nll_weight': 1.0}
    table, other = ({'w': jnp.asarray(random.normal(size=(8, 8)), jnp.float32)} for _ in range(2))
    optimizer = optimizers.OptimizerConfig(learning_rate=0.1)

    def log_probs(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(params['w'][tokens[:, :-1]], axis=-1)

    found = []
    for accumulate in (1, 2, 4):
        state = learner.init(table, optimizer)
        update = policies.make_update(name, settings, log_probs, optimizer, state, accumulate)
        state, metrics = update(state, other, batch)
        found.append((state.params['w'], metrics['loss'], metrics['grad_norm']))
    assert float(jnp.abs(found[0][0] - table['w']).max()) > 0.05
    for one in found[1:]:
        for a, b in zip(one, found[0]):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
