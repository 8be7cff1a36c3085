"""Roll-in, cut, roll-out: who wrote which token, where the cut falls, and the law of what follows it."""
from __future__ import annotations

import collections
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qsharp_jax import categorical, decoding, rollout, types
from tests import pools, tabular
from tests.test_decoding import padded, policy_of

BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
PLAIN = decoding.Guidance()
MOST = 4


def units_of(prompts, rows, samples, real=None):
    rows, samples = np.asarray(rows, np.int32), np.asarray(samples, np.int32)
    tokens, lengths = padded(prompts)
    real = np.ones(len(rows), bool) if real is None else np.asarray(real)
    return pools.Units(tokens, lengths, jnp.asarray(rows), jnp.asarray(100 + rows), jnp.asarray(samples),
                       jnp.asarray(real))


def answers(drawn):
    tokens = np.asarray(drawn.tokens).tolist()
    return [tuple(row[:count]) for row, count in zip(tokens, np.asarray(drawn.count))]


# A reference that always says A, and a value that wants B.

A, B = 0, 1


def _step(params, token, length, cache):
    return jnp.zeros((len(token), 3)) - jnp.array([[0.0, 20.0, 40.0]]), cache


def _score(params, block, length, cache):
    logit = jnp.where(block.candidates == B, 60.0, -60.0)[..., None]
    return types.ValueScores(jnp.zeros((*block.roots.shape, 1)), logit), cache


SAYS_A = dataclasses.replace(tabular.dyadic_reference(3), step=_step)
WANTS_B = decoding.Guidance(types.Value(SAYS_A.init_cache, SAYS_A.prefill, _score), BERNOULLI, candidates=3)
AS_AND_BS = units_of(((A,), (B, B)), np.arange(64) % 2, np.arange(64) // 2)


@pytest.mark.parametrize('cut, budget', (
    ('uniform', 'total'), ('uniform', 'fresh'), ('start', 'total'), ('start', 'fresh')))
def test_the_guided_policy_writes_up_to_the_cut_and_the_reference_after(cut, budget):
    config = rollout.RolloutConfig(MOST, cut, budget)
    policy = policy_of(np.full(64, 0.02))
    drawn = pools.collect(SAYS_A, WANTS_B, None, None, policy, AS_AND_BS, config, (2,), 0, 1)
    cuts = np.asarray(drawn.cut)
    assert set(cuts.tolist()) == (set(range(MOST)) if cut == 'uniform' else {0})
    for answer, place in zip(answers(drawn), cuts):
        total = MOST if budget == 'total' else place + 1 + MOST
        if cut == 'uniform' and place == MOST - 1:
            total = MOST  # the roll-in ended there, and stays as it is
        assert answer == (B,) * (place + 1) + (A,) * (total - place - 1)
    assert max(map(len, answers(drawn))) <= config.buffer == drawn.tokens.shape[1]
    assert not np.asarray(drawn.ended).any()
    assert set(np.asarray(drawn.roll_in).tolist()) == {MOST if cut == 'uniform' else 1}


# Answers of many lengths, under hashed networks.

HASHED = tabular.dyadic_reference(11)
GUIDED = decoding.Guidance(tabular.dyadic_value(), BERNOULLI, candidates=4)
ENDS = (2, 5)
PROMPTS = ((3,), (1, 4, 1, 5), (9, 2))
MANY = 48


def collect(*arguments, **named):
    task, pool = pool_of(*arguments, **named)
    return task.read(pool)


def pool_of(rows, samples, config, real=None, seed=0, iteration=1, etas=None):
    etas = np.where(np.asarray(samples) % 2, 0.2, np.inf) if etas is None else etas
    units = units_of(PROMPTS, rows, samples, real)
    return pools.ended(HASHED, GUIDED, None, None, policy_of(etas), units, config, ENDS, seed, iteration)


@pytest.mark.parametrize('cut, budget', (('uniform', 'total'), ('uniform', 'fresh'), ('start', 'fresh')))
def test_every_answer_has_its_budget_and_its_end(cut, budget):
    config = rollout.RolloutConfig(MOST, cut, budget)
    rows, samples = np.arange(MANY) % 3, np.arange(MANY) // 3
    task, pool = pool_of(rows, samples, config)
    drawn = task.read(pool)
    # The roll-in by itself, with the same noise.
    keys = decoding.unit_keys(0, 1, 'roll_in', jnp.asarray(100 + rows), jnp.asarray(samples))
    state = decoding.start(HASHED, GUIDED.value, None, None, *padded(PROMPTS), jnp.asarray(rows), keys,
                           jnp.full(MANY, MOST), MOST)
    policy = policy_of(np.where(samples % 2, 0.2, np.inf))
    roll_in = decoding.decode(HASHED, GUIDED, None, None, policy, state, ENDS)
    if (cut, budget) == ('uniform', 'total'):  # rows that go on rolling in read no token again; roll-outs are short
        np.testing.assert_array_equal(pool.state.value_tokens, roll_in.value_tokens)
    met = collections.Counter()
    for answer, draft, place, ended in zip(answers(drawn), answers(roll_in), np.asarray(drawn.cut),
                                           np.asarray(drawn.ended)):
        assert 0 <= place < len(draft)
        assert answer[:place + 1] == draft[:place + 1]
        assert not set(answer[:-1]) & set(ENDS)
        assert ended == (answer[-1] in ENDS)
        if draft[place] in ENDS:  # a cut at the end ends the row
            assert len(answer) == place + 1 and ended
            met['end'] += 1
        elif cut == 'uniform' and place == MOST - 1:  # nothing is left, and the answer is marked truncated
            assert len(answer) == MOST and not ended
            met['limit'] += 1
        else:
            most = MOST if budget == 'total' else place + 1 + MOST
            assert len(answer) <= most and (ended or len(answer) == most)
            met['inside'] += 1
            met['longer'] += len(answer) > MOST
    assert met['end'] and met['inside'] and bool(met['limit']) == (cut == 'uniform')
    assert bool(met['longer']) == (budget == 'fresh')
    if cut == 'uniform':
        np.testing.assert_array_equal(drawn.roll_in, roll_in.count)


@pytest.mark.parametrize('cut, budget', (('uniform', 'total'), ('start', 'fresh')))
def test_units_do_not_depend_on_their_batch_and_padding_stays_empty(cut, budget):
    config = rollout.RolloutConfig(MOST, cut, budget)
    rows, samples = np.arange(MANY) % 3, np.arange(MANY) // 3

    def ask(units, padding=0):
        each = np.concatenate([units, np.repeat(units[-1:], padding)])
        drawn = collect(rows[each], samples[each], config, real=np.arange(len(each)) < len(units))
        for field in (drawn.count, drawn.cut, drawn.roll_in, drawn.ended):
            assert not np.asarray(field)[len(units):].any()
        found = zip(answers(drawn), *(np.asarray(field).tolist() for field in drawn[2:]))
        return dict(zip(each[:len(units)].tolist(), found))

    together = ask(np.arange(MANY))
    apart = np.random.default_rng(0).permutation(MANY)
    assert {**ask(apart[:30], padding=18), **ask(apart[30:], padding=30)} == together
    assert ask(apart[:5], padding=2) == {unit: together[unit] for unit in apart[:5].tolist()}


def test_noise_is_addressed_by_seed_iteration_example_and_sample():
    config = rollout.RolloutConfig(MOST)
    same, etas = np.zeros(MANY, int), np.full(MANY, np.inf)

    def ask(rows=same, samples=np.arange(MANY), seed=0, iteration=1):
        drawn = collect(rows, samples, config, seed=seed, iteration=iteration, etas=etas)
        return list(zip(answers(drawn), np.asarray(drawn.cut).tolist()))

    first = ask()
    assert ask() == first
    assert len(set(ask(samples=same))) == 1
    for other in (ask(seed=1), ask(iteration=2), ask(samples=MANY + np.arange(MANY))):
        assert sum(a == b for a, b in zip(first, other)) < MANY / 2


# Laws, from thousands of units of a small language.

DRAWS = 6000


@functools.cache
def of_language():
    tree = tabular.random_language(4, horizon=4, returns=(0.0, 1.0))
    how = decoding.Guidance(tree.as_value(), BERNOULLI, candidates=3)
    params = tree.reference_params(), tree.scores(BERNOULLI, tree.return_law(tree.reference()))
    prompt = np.arange(DRAWS) % 2
    drawn = pools.collect(
        tree.as_reference(), how, *params, policy_of(np.full(DRAWS, 0.3)),
        units_of(tree.prompts, prompt, np.arange(DRAWS) // 2), rollout.RolloutConfig(4), tree.eos, 0, 1)
    return tree, prompt, drawn


def test_cuts_are_uniform_over_the_length_of_the_roll_in():
    _, _, drawn = of_language()
    lengths, cuts = np.asarray(drawn.roll_in), np.asarray(drawn.cut)
    for length in range(1, 5):
        counts = np.bincount(cuts[lengths == length])
        assert len(counts) == length and counts.sum() > 200
        if length > 1:
            assert stats.chisquare(counts).pvalue > 1e-3


def test_kept_prefixes_are_the_guided_policys_and_the_rest_is_the_references():
    tree, prompt, drawn = of_language()
    reference, guided = tree.reference(), tree.optimal_policy(0.3, tree.reference())
    met = collections.defaultdict(collections.Counter)
    for asked, answer, cut in zip(prompt, answers(drawn), np.asarray(drawn.cut)):
        met[asked, answer[:cut + 1]][answer] += 1

    def chance(policy):
        law = tree.answer_law(policy)
        statistic, freedom = 0.0, 0
        for (asked, prefix), found in met.items():
            if not tree.open[tree.node(prefix)]:
                assert set(found) == {prefix}
                continue
            below = {answer: law[asked, tree.node(answer)] for answer in tree.answers
                     if answer[:len(prefix)] == prefix and law[asked, tree.node(answer)] > 0}
            scale = sum(found.values()) / sum(below.values())
            often = [answer for answer in below if below[answer] * scale >= 5]
            rare = below.keys() - set(often)
            pairs = [(found[answer], below[answer] * scale) for answer in often]
            pairs += [(sum(found[answer] for answer in rare), sum(below[answer] for answer in rare) * scale)]
            pairs = [pair for pair in pairs if pair[1] > 0]
            statistic += sum((count - expected) ** 2 / expected for count, expected in pairs)
            freedom += len(pairs) - 1
        assert freedom > 20
        return stats.chi2.sf(statistic, freedom)

    assert chance(reference) > 1e-3
    assert chance(guided) < 1e-6
    # Every answer keeps the roll-in's first token.
    for asked in range(2):
        counts = np.bincount(np.asarray(drawn.tokens)[prompt == asked, 0], minlength=3)
        assert stats.chisquare(counts, guided[asked, 0] * counts.sum()).pvalue > 1e-3
        assert stats.chisquare(counts, reference[asked, 0] * counts.sum()).pvalue < 1e-6


def test_the_roll_ins_own_rest_would_be_biased_and_the_redrawn_one_is_not():
    # Token 1 ends an answer with probability 1/2 at every step; answers of at most two tokens are worth 1.
    # A short answer is cut at its first token more often than a long one, so given that cut the roll-in's own
    # rest is too short, although the reference wrote it.
    num_nodes = 2 ** 7 - 1
    tree = tabular.Language(((0,),), 6, (1,), np.zeros((1, num_nodes, 2)), np.zeros((1, num_nodes)))
    tree.rewards[0, [len(answer) <= 2 for answer in tree.answers]] = 1
    reference, params = tree.as_reference(), tree.reference_params()
    units = units_of(tree.prompts, np.zeros(DRAWS, int), np.arange(DRAWS))
    policy = policy_of(np.full(DRAWS, np.inf))
    config = rollout.RolloutConfig(6)
    drawn = pools.collect(reference, PLAIN, params, None, policy, units, config, (1,), 0, 1)
    here = (np.asarray(drawn.cut) == 0) & (np.asarray(drawn.tokens)[:, 0] == 0)
    expected = tree.values(tree.reference())[0, tree.node((0,))]  # Z* of token 0 at the empty answer
    error = 0.5 / np.sqrt(here.sum())
    redrawn = (np.asarray(drawn.count)[here] <= 2).mean()
    own = (np.asarray(drawn.roll_in)[here] <= 2).mean()
    assert abs(redrawn - expected) < 4 * error
    assert own - expected > 6 * error
    # The bias is that of weighing each length by the chance of the cut.
    law = 0.5 ** np.array([2, 3, 4, 5, 5]) / np.arange(2, 7)
    assert abs(own - law[0] / law.sum()) < 4 * error


@pytest.mark.parametrize('changes, says', (
    ({'max_new_tokens': 0}, 'max_new_tokens is 0'), ({'cut': 'middle'}, 'uniform, start'),
    ({'budget': 'own'}, 'total, fresh')))
def test_a_setting_without_meaning_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        rollout.RolloutConfig(**{'max_new_tokens': 4, **changes})
