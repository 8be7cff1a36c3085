"""Drafted tokens: they save passes of the value network and change no answer."""
from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import guidance, rollout
from tests import test_queue as queues
from tests.test_decoding import AFTER, answers, ENDS, PAPER, policy_of, REFERENCE, ROWS, SAMPLES, VALUE, write

MIXED = policy_of(np.tile([0.5, 1.5, 4.0, np.inf], 3), np.repeat([1.0, 0.7, 0.0], 4), top_p=np.tile([0.8, 1.0], 6))
WHOLE = dataclasses.replace(VALUE, ragged=False)  # passes of whole blocks


def drafting(how, draft):
    return dataclasses.replace(how, draft=draft)


@pytest.mark.parametrize('how, value, draft', (
    (PAPER, VALUE, 1), (PAPER, VALUE, 4), (PAPER, WHOLE, 2), (AFTER, VALUE, 2), (AFTER, WHOLE, 1)))
def test_what_is_drafted_changes_no_answer(how, value, draft):
    how = dataclasses.replace(how, value=value)
    plain, found = (write(each, MIXED, ROWS, SAMPLES, np.tile([6, 1, 4], 4), eos=ENDS) for each in
                    (how, drafting(how, draft)))
    assert answers(found) == answers(plain)
    np.testing.assert_array_equal(found.ended, plain.ended)
    np.testing.assert_allclose(found.kl, plain.kl, rtol=1e-5, atol=1e-6)
    known = ~np.isnan(found.values) & ~np.isnan(plain.values)
    np.testing.assert_allclose(np.asarray(found.values)[known], np.asarray(plain.values)[known], rtol=1e-6)
    written = np.arange(6)[None] < np.asarray(plain.count)[:, None]
    assert not (~written & ~np.isnan(found.values)).any()
    assert (known & written).sum() > 0.6 * (~np.isnan(plain.values)).sum()


def test_the_rule_that_reads_the_pending_token_has_that_of_each_place():
    how = dataclasses.replace(PAPER, outside='soft_bellman')
    plain, found = (write(each, MIXED, ROWS, SAMPLES, eos=()) for each in (how, drafting(how, 3)))
    assert answers(found) == answers(plain)
    np.testing.assert_allclose(found.kl, plain.kl, rtol=1e-5, atol=1e-6)


def test_a_network_that_scores_all_next_tokens_at_once():
    """Its candidates stand behind roots of the same pass, and it says nothing of roots."""
    def score(params, block, length, cache):
        assert block.roots.shape[1] > 0
        scores, cache = VALUE.score(params, block, length, cache)
        inside = block.parents >= 0
        return dataclasses.replace(
            scores, roots=jnp.full_like(scores.roots, jnp.nan),
            candidates=jnp.where((inside & (block.parents < block.known[:, None]))[..., None], scores.candidates,
                                 jnp.nan)), cache
    value = dataclasses.replace(VALUE, score=score, scores_root=False)
    # Of the other order, which makes further passes.
    how = dataclasses.replace(AFTER, value=value)
    plain, found = (write(each, MIXED, ROWS, SAMPLES, eos=ENDS) for each in (how, drafting(how, 2)))
    assert answers(found) == answers(plain)


def test_a_step_writes_all_that_is_drafted_where_nothing_guides():
    how = drafting(PAPER, 2)
    for eta, limit in ((np.inf, 6), (np.inf, 5), (0.05, 6)):
        found = write(how, policy_of(np.full(12, eta)), ROWS, SAMPLES, limit, eos=())
        steps = np.asarray(found.reference_tokens) / 3
        if np.isinf(eta):
            np.testing.assert_array_equal(steps, 2)
        else:
            assert 2 <= steps.min() and steps.mean() < 5 and steps.max() > 2


def test_a_draft_is_taken_as_often_as_a_shared_noise_agrees():
    """P(same draw) of two laws p and q under one Gumbel noise is Σ_i 1 / Σ_j max(p_j / p_i, q_j / q_i)."""
    size, draws = 11, 20_000
    logits = np.asarray(REFERENCE.step(None, jnp.array([3]), jnp.array([0]), REFERENCE.init_cache(1, 4))[0])[0]
    p = np.exp(logits) / np.exp(logits).sum()
    q = p * np.exp(np.linspace(-0.5, 0.5, size))
    q /= q.sum()
    exact = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(size))
    keys = jax.random.split(jax.random.key(0), draws)
    laws = [jnp.broadcast_to(jnp.log(jnp.asarray(law, jnp.float32)), (draws, size)) for law in (p, q)]
    agreed = np.mean(np.asarray(guidance.sample(keys, laws[0]) == guidance.sample(keys, laws[1])))
    assert abs(agreed - exact) < 4 * np.sqrt(exact * (1 - exact) / draws)
    distance = 0.5 * np.abs(p - q).sum()
    assert (1 - distance) / (1 + distance) <= exact < 1 - distance


def test_a_queue_draws_the_same_in_fewer_steps():
    task, of = rollout.RollingOut(rollout.RolloutConfig(queues.MOST)), queues.policies((0.5, 1.0, np.inf))
    plain, found = (queues.queue_of(task, 4, how=drafting(queues.GUIDED['paper'], draft)).draw(range(6), 3, of)
                    for draft in (0, 2))
    queues.assert_same(found.read, plain.read, queues.SPLICED)
    assert found.steps < plain.steps and found.value_passes < plain.value_passes
    assert found.reference_passes > plain.reference_passes - plain.steps + found.steps
    assert found.occupancy > 0.8
