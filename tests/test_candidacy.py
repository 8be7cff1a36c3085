"""Which tokens are candidates, and that what is not scored could not change a law that is said to be decided."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.decoding import candidacy
from tests.test_guidance import case, INF, law, make_policy, top_candidates, VOCAB, weighing_logits


@pytest.mark.parametrize('eta', (0.5, 2.0))
@pytest.mark.parametrize('outside', ('zero', 'remove', 'min', 'mean'))
def test_a_closed_row_has_its_law_whatever_the_other_weights(outside, eta):
    """Also at the ends of their range, all of them or some."""
    rows, count, random = 128, 12, np.random.default_rng(5)
    logits, _, _, root = case(5, rows, count=count)
    # In half of them three tokens are about as likely, and nothing else is.
    half, alike = np.arange(rows)[:, None] % 2 == 1, np.arange(VOCAB) < 3
    logits = np.where(half, np.where(alike, logits / 10, -30.0), logits).astype(np.float32)
    weight = np.clip(random.normal(size=logits.shape), 0.0, 1 / eta)
    policy = make_policy(
        rows, eta, random.choice([0.5, 0.8, 1.0], rows), top_p=random.choice([0.3, 0.6, 0.9], rows))
    ids = np.asarray(top_candidates(logits, count=count))
    weighing = weighing_logits(logits, policy, outside=outside, order='paper')
    there = np.arange(count)[None] < random.choice([2, 7, count], (rows, 1))  # some rows have fewer candidates
    candidates = np.zeros(logits.shape, bool)
    np.put_along_axis(candidates, ids, there, axis=-1)

    def at(array):
        return np.take_along_axis(np.asarray(array), ids, axis=-1)

    own, own_weighing = (np.where(there, at(each), -INF) for each in (logits, logits if weighing is None else weighing))
    others = np.where(np.asarray(candidates), -INF, np.asarray(logits)) / np.asarray(policy.temperature)[:, None]
    closed = 0
    for number in range(count):
        scored = np.zeros(logits.shape, bool)
        np.put_along_axis(scored, ids[:, :number], there[:, :number], axis=-1)
        is_open = np.asarray(candidacy.is_open(
            own, own_weighing, jax.nn.logsumexp(others, axis=-1), at(weight), at(scored), jnp.zeros(rows),
            jnp.full(rows, 1 / eta), policy, outside))
        closed += np.sum(~is_open)
        known = np.asarray(law(logits, weight, scored, root, policy, outside, 'paper'))
        for kind in range(6):
            rest = random.choice([0.0, 1 / eta], weight.shape) if kind > 2 else random.uniform(0, 1 / eta, weight.shape)
            rest = np.full_like(rest, kind / eta) if kind < 2 else rest
            whole = np.where(scored, weight, rest)
            found = np.asarray(law(logits, whole, candidates, root, policy, outside, 'paper'))
            if number:
                np.testing.assert_array_equal(np.isfinite(found[~is_open]), np.isfinite(known[~is_open]))
                np.testing.assert_allclose(found[~is_open], known[~is_open], atol=1e-5, rtol=0)
            else:  # one token alone, as if it weighed the least
                alone = np.zeros(logits.shape, bool)
                np.put_along_axis(alone, ids[:, :1], True, axis=-1)
                single = np.asarray(law(logits, np.zeros_like(weight), alone, root, policy, outside, 'paper'))
                np.testing.assert_array_equal(found[~is_open], single[~is_open])
                assert np.all(np.isfinite(found[~is_open]).sum(axis=-1) == 1)
    assert rows < closed < rows * count * 0.9


def test_a_row_is_open_where_a_token_that_is_no_candidate_is_before_one_in_the_nucleus():
    policy = make_policy(2, top_p=[0.63, 0.3])
    others = np.array([-0.02, -0.02])  # such a token, by the mean weight, is above the second candidate
    logits = np.tile([0.0, -0.01, -INF], (2, 1))  # and there is no third
    weight = np.tile([0.4, 0.0, 0.0], (2, 1))
    whole = np.column_stack([logits[:, :2], others])
    scored = np.array([[True, True, False]] * 2)
    found = law(whole, weight, scored, np.zeros(2), policy, 'mean', 'paper')
    assert np.isfinite(np.asarray(found)).tolist() == [[True, False, True], [True, False, False]]
    is_open = candidacy.is_open(logits, logits, others, weight, scored, jnp.zeros(2), jnp.ones(2), policy, 'mean')
    assert is_open.tolist() == [True, False]


def test_candidates_end_at_the_cutoff():
    logits = np.array(case(3)[0])
    logits[:, 7] = -INF
    logits[5] = np.where(np.arange(VOCAB) < 4, 0.0, -INF)  # a row of four tokens, none above the last
    temperature = np.array([0.5, 0.8, 1.0, 1.5, 0.0, 1.0])
    scaled = logits / np.where(temperature > 0, temperature, 1.0)[:, None]
    probs = np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)
    policy, ids = make_policy(6, temperature=temperature), top_candidates(logits, count=20)
    counts = []
    for cutoff in (0.0, 0.003, 0.01, 0.03, 0.3):
        found = np.asarray(candidacy.are_candidates(logits, ids, policy, cutoff))
        own = np.take_along_axis(probs, np.asarray(ids), axis=-1)
        expected = (own > 0) & (own >= cutoff)
        expected[:, 0] = True
        np.testing.assert_array_equal(found, expected)
        counts.append(found.sum(axis=-1))
    assert counts[0].tolist() == [20] * 5 + [4] and counts[-1].tolist()[-1] == 1 and (counts[2] < counts[1]).any()


@pytest.mark.parametrize('outside', ('zero', 'remove'))
def test_a_cutoff_moves_the_law_no_further_than_its_bound(outside):
    eta, ratios = 0.3, []
    for seed in range(4):
        logits, weight, scored, root = case(seed, rows=64)
        ids = top_candidates(logits, count=20)
        policy = make_policy(64, eta, temperature=np.tile([0.8, 1.0], 32))
        # Also where what is cut weighs as much as it can.
        weight = np.clip(weight, 0.0, 1 / eta) if seed % 2 else np.where(np.asarray(logits) < 3, 1 / eta, 0.0)
        kept = np.zeros(logits.shape, bool)
        likely = candidacy.are_candidates(logits, ids, policy, 0.02)
        np.put_along_axis(kept, np.asarray(ids), np.asarray(likely), axis=-1)
        whole, cut = (np.exp(law(logits, weight, mask, root, policy, outside, 'paper')) for mask in (scored, kept))
        moved = np.abs(whole - cut).sum(axis=-1) / 2
        high = np.where(np.asarray(scored), 1 / eta, 0.0 if outside == 'zero' else -INF)
        mass = np.exp((logits + np.where(kept, weight, high)) / np.asarray(policy.temperature)[:, None])
        ratios.append(moved / (np.sum(mass, axis=-1, where=~kept & np.asarray(scored)) / mass.sum(axis=-1)))
    assert 0.5 < np.max(ratios) <= 1 + 1e-5
