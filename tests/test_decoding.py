"""Writing answers: the law of what is sampled against the oracle, and that rows never touch each other."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qsharp_jax import categorical, decoding, guidance, types
from tests import tabular

VOCAB = 11
REFERENCE = tabular.dyadic_reference(VOCAB)
VALUE = tabular.dyadic_value()
BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
EOS = (2,)
ENDS = (2, 5, 7)
PLAIN = decoding.Guidance()
# Fewer candidates than tokens in the paper's order, fewer than the nucleus in the other.
PAPER = decoding.Guidance(VALUE, BERNOULLI, candidates=4)
AFTER = decoding.Guidance(VALUE, BERNOULLI, candidates=2, order='after_sampler')
PROMPTS = ((3,), (1, 4, 1, 5), (9, 2))  # a prompt may hold a token that ends answers


def policy_of(eta, temperature=1.0, top_k=0, top_p=1.0, reference_temperature=1.0):
    """One row per entry of `eta`; the other settings are given once or per row."""
    eta = np.asarray(eta, np.float32)
    each = [np.broadcast_to(np.asarray(value, kind), eta.shape)
            for value, kind in ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32),
                                (reference_temperature, np.float32))]
    return types.Policy(jnp.asarray(eta), *map(jnp.asarray, each))


def padded(prompts, filler=8):
    tokens = np.full((len(prompts), 10), filler, np.int32)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def write(how, policy, rows, samples, limit=6, *, prompts=PROMPTS, eos=EOS, reference=REFERENCE,
          params=(None, None), buffer=6):
    """The finished state of the answers to `prompts[rows]`, with the noise of (row, sample)."""
    rows, samples = jnp.asarray(rows, jnp.int32), jnp.asarray(samples, jnp.int32)
    keys = decoding.unit_keys(0, 0, 'evaluate', rows, samples)
    limit = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), rows.shape)
    state = decoding.start(reference, how.value, *params, *padded(prompts), rows, keys, limit, buffer)
    return decoding.decode(reference, how, *params, policy, state, eos)


def answers(state):
    tokens = np.asarray(state.tokens).tolist()
    return [tuple(row[:count]) for row, count in zip(tokens, np.asarray(state.count))]


ROWS, SAMPLES = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)  # twelve units, the usual batch


# The reference and values that say nothing.

@pytest.mark.parametrize('how', (PAPER, AFTER))
def test_rows_at_infinite_eta_are_the_reference(how):
    sampler = {'temperature': np.tile([1, 0.7, 1.3, 0.8], 3), 'top_p': np.tile([1, 0.9, 0.6], 4),
               'top_k': np.repeat([0, 5], 6)}
    plain = write(PLAIN, policy_of(np.full(12, np.inf), **sampler), ROWS, SAMPLES)
    for guided in (np.zeros(12, bool), np.arange(12) % 2 == 1):
        found = write(how, policy_of(np.where(guided, 0.05, np.inf), **sampler), ROWS, SAMPLES)
        same = [a == b for a, b in zip(answers(found), answers(plain))]
        assert all(same[row] for row in np.flatnonzero(~guided))
        np.testing.assert_array_equal(np.asarray(found.kl)[~guided], np.asarray(plain.kl)[~guided])
    assert not all(same)  # the guided rows went another way


def test_a_constant_value_changes_nothing_under_mean():
    def score(params, block, length, cache):
        found = (jnp.full((*tokens.shape, 1), 0.7) for tokens in (block.roots, block.candidates))
        return types.ValueScores(*found), cache
    constant = dataclasses.replace(VALUE, score=score, keep=None)
    etas = np.tile([1e-3, 0.1, 1.0, np.inf], 3)
    temperature = np.repeat([1.0, 0.7, 0.0], 4)
    plain = write(PLAIN, policy_of(etas, temperature, top_p=0.9), ROWS, SAMPLES)
    how = decoding.Guidance(constant, BERNOULLI, candidates=4)
    same = write(how, policy_of(etas, temperature, top_p=0.9), ROWS, SAMPLES)
    assert answers(same) == answers(plain)
    np.testing.assert_array_equal(same.kl, plain.kl)


# The law of whole answers.

DRAWS = 4000
ETA = 0.3
TREE = tabular.random_language(11, returns=(-0.5, 0.0, 1.0))
TREE_REFERENCE, TREE_VALUE = TREE.as_reference(), TREE.as_value()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Answers of a guided language: half of them to each of its two prompts, guided by the exact Z*."""

    policy: np.ndarray  # what the answers should follow  # [N, M, V]
    untruncated: np.ndarray  # what their KL is taken to  # [N, M, V]
    temperature: float
    prompt: np.ndarray  # [B]
    state: decoding.DecodeState


@functools.cache
def drawn(order, temperature, top_p, candidates, reference_temperature, draft=0, epsilon_cutoff=0.0):
    tree = TREE
    distribution = categorical.make('categorical', -0.5, 1.0, 4)
    sampler = tree.reference(temperature, top_p=top_p)
    law = tree.return_law(sampler)
    how = decoding.Guidance(TREE_VALUE, distribution, candidates, epsilon_cutoff, 'zero', order, draft=draft)
    prompt = np.arange(DRAWS) % 2
    state = write(how, policy_of(np.full(DRAWS, ETA), temperature, 0, top_p, reference_temperature), prompt,
                  np.arange(DRAWS) // 2, tree.horizon, prompts=tree.prompts, eos=tree.eos, reference=TREE_REFERENCE,
                  params=(tree.reference_params(), tree.scores(distribution, law)), buffer=tree.horizon)
    if order == 'after_sampler':
        policy = tree.optimal_policy(ETA, sampler)
    else:
        weight = law @ np.exp(tree.support / ETA)
        log_weight = np.log(weight, where=weight > 0, out=np.zeros_like(weight))
        likely = tree.reference(temperature) >= epsilon_cutoff
        offset = np.where(likely, tree.children(log_weight), 0.0)  # of others as the rule `zero` has it
        policy = tabular.sampler_probs(tree.logits + offset, temperature, 0, top_p)
    return Drawn(policy, tree.reference(reference_temperature), temperature, prompt, state)


SETTINGS = pytest.mark.parametrize('setting', (
    ('paper', 1.0, 1.0, 3, 1.0), ('paper', 0.8, 0.9, 3, 1.0), ('after_sampler', 0.8, 0.9, 1, 0.8),
    ('paper', 0.8, 0.9, 3, 1.0, 2), ('paper', 1.0, 1.0, 3, 1.0, 0, 0.2), ('paper', 0.8, 0.9, 3, 1.0, 1, 0.25)))


def chance(answered, prompts, policy):
    """p-value of the chi-square test that the answers follow the policy; rare ones are pooled."""
    law = TREE.answer_law(policy)
    statistic, freedom = 0.0, 0
    for prompt in range(len(TREE.prompts)):
        nodes = [TREE.node(answer) for answer, asked in zip(answered, prompts) if asked == prompt]
        counts, expected = np.bincount(nodes, minlength=law.shape[1]), law[prompt] * len(nodes)
        if counts[law[prompt] == 0].any():
            return 0.0
        often = expected >= 5
        counts = np.append(counts[often], counts[~often].sum())
        expected = np.append(expected[often], expected[~often].sum())
        counts, expected = counts[expected > 0], expected[expected > 0]
        statistic += ((counts - expected) ** 2 / expected).sum()
        freedom += len(expected) - 1
    return float(stats.chi2.sf(statistic, freedom))


@SETTINGS
def test_answers_follow_the_tilted_law(setting):
    found = drawn(*setting)
    answered = answers(found.state)
    assert chance(answered, found.prompt, found.policy) > 1e-3
    # The test can tell laws apart: the reference, guidance a little weaker, and without a cut-off.
    reference = TREE.reference(found.temperature, top_p=setting[2])
    weaker = TREE.optimal_policy(1.5 * ETA, reference)
    for wrong in (reference, weaker, *([drawn(*setting[:6]).policy] if setting[6:] else [])):
        assert chance(answered, found.prompt, wrong) < 1e-6
    if setting[0] == 'after_sampler':  # several chunks are needed: one candidate is not the support
        assert ((found.policy[:, TREE.open] > 0).sum(-1) > 1).any()


@SETTINGS
def test_kl_is_the_sum_of_the_steps(setting):
    found = drawn(*setting)
    log = functools.partial(np.log, where=found.policy > 0, out=np.zeros(found.policy.shape))
    steps = np.sum(found.policy * (log(found.policy) - np.log(found.untruncated)), axis=-1)  # [N, M]
    expected = [sum(steps[prompt, TREE.node(answer[:end])] for end in range(len(answer)))
                for answer, prompt in zip(answers(found.state), found.prompt)]
    np.testing.assert_allclose(found.state.kl, expected, atol=2e-5)
    assert (np.asarray(found.state.count)[np.asarray(found.state.ended)] < TREE.horizon).any()


@SETTINGS
def test_mean_kl_is_the_divergence_of_whole_answers(setting):
    found = drawn(*setting)
    kl = np.asarray(found.state.kl, np.float64)
    exact = TREE.divergences(found.policy, found.untruncated)[:, 0]
    for prompt in range(2):
        own = kl[found.prompt == prompt]
        assert abs(own.mean() - exact[prompt]) < 4 * own.std() / np.sqrt(len(own)) + 1e-6
        assert exact[prompt] > 0.05  # guided at all


# Rows on their own.

@pytest.mark.parametrize('ragged', (True, False))
@pytest.mark.parametrize('how', (PAPER, AFTER))
def test_values_are_the_expected_returns_of_chosen_tokens(how, ragged):
    how = dataclasses.replace(how, value=dataclasses.replace(VALUE, ragged=ragged))
    found = write(how, policy_of(np.tile([0.1, np.inf, 2.0], 4), top_p=0.8), ROWS, SAMPLES)
    places = [(row, place) for row, answer in enumerate(answers(found)) for place in range(len(answer))]
    histories = [PROMPTS[ROWS[row]] + answers(found)[row][:place + 1] for row, place in places]
    # The network once more, from each whole history: `root` is the token before the chosen one.
    tokens = jnp.asarray([history + (0,) * (16 - len(history)) for history in histories], jnp.int32)
    chosen, root = (jnp.asarray([history[-back] for history in histories]) for back in (1, 2))
    length = jnp.asarray([len(history) - 2 for history in histories])
    scores, _ = VALUE.score(None, tabular.block_after(root, chosen[:, None]), length, {'tokens': tokens})
    values, unknown = np.asarray(found.values), 0
    for (row, place), score in zip(places, np.asarray(scores.candidates)[:, 0, 0]):
        if np.isnan(values[row, place]):
            unknown += 1
            # Of what waits for the network at the end, nothing is known unless it was a candidate.
            assert place >= len(answers(found)[row]) - 4
        else:
            np.testing.assert_allclose(values[row, place], 1 / (1 + np.exp(-score)), atol=1e-6)
    assert unknown < len(places) / 2
    assert np.isnan(values[np.arange(6)[None] >= np.asarray(found.count)[:, None]]).all()


QUICK = ('paper', 'zero'), ('paper', 'mean'), ('paper', 'soft_bellman'), ('after_sampler', 'mean')


@pytest.mark.parametrize('order, outside, cutoff', [
    *(pytest.param(order, outside, 0.0, marks=() if (order, outside) in QUICK else pytest.mark.slow)
      for order in guidance.ORDERS for outside in guidance.OUTSIDE),
    ('paper', 'zero', 0.05), ('paper', 'mean', 0.1)])
def test_what_is_spared_changes_no_answer(order, outside, cutoff):
    """Rows without a choice, tokens that are cut whatever they weigh, chosen tokens that wait: the same answers."""
    policy = policy_of(np.tile([1.0, 2.0, 8.0, np.inf], 3), np.repeat([0.3, 0.6, 0.0], 4), top_p=np.tile([0.5, 0.8], 6))
    how = decoding.Guidance(VALUE, BERNOULLI, 6, cutoff, outside, order)
    plain = dataclasses.replace(how, value=dataclasses.replace(VALUE, ragged=False, keep=None))
    read_again = dataclasses.replace(how, value=dataclasses.replace(VALUE, keep=None))
    spared, again, whole = (write(each, policy, ROWS, SAMPLES) for each in (how, read_again, plain))
    for other in (spared, again):
        assert answers(other) == answers(whole)
        np.testing.assert_allclose(other.kl, whole.kl, rtol=1e-5, atol=1e-6)
    most = 1.0 if cutoff or (order, outside) == ('paper', 'soft_bellman') else 0.9
    for fewer, more, share in ((spared, again, 0.95), (again, whole, most)):
        assert np.all(np.asarray(fewer.value_tokens) <= np.asarray(more.value_tokens))
        assert np.sum(fewer.value_tokens) < share * np.sum(more.value_tokens)


def test_a_candidate_that_was_chosen_weighs_as_a_root_what_it_weighed():
    """What its candidates leave to other tokens is told by the weight of the token before."""
    how = decoding.Guidance(VALUE, BERNOULLI, candidates=3, outside='soft_bellman')
    again = dataclasses.replace(how, value=dataclasses.replace(VALUE, keep=None))
    policy = policy_of(np.tile([0.05, 0.2, 1.0, 3.0], 3))
    kept, read_again = (write(each, policy, ROWS, SAMPLES) for each in (how, again))
    assert np.sum(kept.value_tokens) < np.sum(read_again.value_tokens)
    assert answers(kept) == answers(read_again)
    np.testing.assert_allclose(kept.kl, read_again.kl, rtol=1e-5, atol=1e-6)


def test_all_policies_share_one_compilation():
    traces = []

    def step(params, token, length, cache):
        traces.append(token.shape)
        return REFERENCE.step(params, token, length, cache)
    counted = dataclasses.replace(REFERENCE, step=step)
    write(PAPER, policy_of(np.full(12, 0.1)), ROWS, SAMPLES, reference=counted)
    first = len(traces)
    assert first > 0
    for eta, temperature, top_k, top_p in ((np.inf, 1.0, 0, 1.0), (0.5, 0.0, 3, 1.0), (2.0, 0.7, 0, 0.8)):
        other = policy_of(np.full(12, eta), temperature, top_k, top_p)
        write(PAPER, other, ROWS, SAMPLES, 4, reference=counted)
    assert len(traces) == first


@pytest.mark.parametrize('how', (PAPER, AFTER))
def test_answers_belong_to_the_unit_whatever_its_batch(how):
    # Every unit has a policy of its own.
    each = {'eta': np.tile([0.05, 0.3, 2.0, np.inf], 3), 'temperature': np.repeat([1.0, 1.3, 0.6, 0.0], 3),
            'top_p': np.tile([0.95, 1.0, 0.8], 4), 'top_k': np.repeat([0, 7, 9], 4)}

    def ask(units, padding=0):
        units = np.asarray(units)
        rows = np.concatenate([units, np.repeat(units[-1:], padding)])
        limit = np.where(np.arange(len(rows)) < len(units), 6, 0)
        state = write(how, policy_of(**{name: values[rows] for name, values in each.items()}), ROWS[rows],
                      SAMPLES[rows], limit)
        kl.update(zip(units.tolist(), np.asarray(state.kl)))
        assert not np.asarray(state.count)[len(units):].any()
        assert not np.asarray(state.kl)[len(units):].any()
        return dict(zip(units.tolist(), answers(state)))

    kl = {}
    together, first = ask(np.arange(12)), kl.copy()
    assert ask(np.random.default_rng(0).permutation(12)) == together
    assert {**ask([11, 3, 7, 0, 5]), **ask([4, 8, 1, 10, 2]), **ask([9, 6], padding=3)} == together
    assert ask([3], padding=4) == {3: together[3]}
    if how == PAPER:
        for unit in range(12):
            assert ask([unit]) == {unit: together[unit]}
    np.testing.assert_allclose([kl[unit] for unit in first], list(first.values()), rtol=1e-5, atol=1e-6)
    assert len(set(together.values())) > 6


def test_prompts_shared_by_rows_are_prompts_of_their_own():
    policy = policy_of(np.tile([0.1, np.inf], 6))
    shared = write(PAPER, policy, ROWS, SAMPLES)
    keys = decoding.unit_keys(0, 0, 'evaluate', jnp.asarray(ROWS, jnp.int32), jnp.asarray(SAMPLES, jnp.int32))
    prompts = padded([PROMPTS[row] for row in ROWS], filler=1)
    state = decoding.start(REFERENCE, VALUE, None, None, *prompts, jnp.arange(12), keys, jnp.full(12, 6), 6)
    apart = decoding.decode(REFERENCE, PAPER, None, None, policy, state, EOS)
    assert answers(apart) == answers(shared)
    np.testing.assert_array_equal(apart.kl, shared.kl)


# Ends.

def test_answers_end_at_the_first_of_several_ends_or_at_the_limit():
    rows, samples = np.arange(60) % 3, np.arange(60) // 3
    limit = 1 + np.arange(60) % 6
    policy = policy_of(np.full(60, np.inf))
    found = write(PLAIN, policy, rows, samples, limit, eos=ENDS)
    endless = answers(write(PLAIN, policy, rows, samples, eos=()))
    assert {len(answer) for answer in endless} == {6}
    ends = set()
    for row, answer in enumerate(answers(found)):
        whole = endless[row][:limit[row]]
        stops = [place for place, token in enumerate(whole) if token in ENDS]
        expected = whole[:stops[0] + 1] if stops else whole
        assert answer == expected
        assert bool(found.ended[row]) == bool(stops)
        ends.add((len(answer) == 1, answer[-1] if stops else None))
    # Every end was met, as the first token too, and so was the limit.
    assert {end for _, end in ends} == {*ENDS, None}
    assert any(first and end is not None for first, end in ends)


def test_finished_rows_never_change():
    rows, samples = np.arange(12) % 3, 20 + np.arange(12) // 3
    limit, policy = jnp.asarray(1 + np.arange(12) % 6), policy_of(np.tile([0.2, np.inf, 1.0], 4))
    keys = decoding.unit_keys(0, 0, 'evaluate', jnp.asarray(rows, jnp.int32), jnp.asarray(samples, jnp.int32))
    state = decoding.start(REFERENCE, VALUE, None, None, *padded(PROMPTS), jnp.asarray(rows), keys, limit, 6)
    step = jax.jit(functools.partial(decoding.step, REFERENCE, PAPER, None, None, policy, EOS))
    fields = ('tokens', 'count', 'ended', 'pending', 'kl', 'values', 'limit', 'prompt_length')
    finished = 0
    for _ in range(7):
        after = step(state)
        done = ~np.asarray(state.active)
        finished += done.sum()
        for name in fields:
            np.testing.assert_array_equal(np.asarray(getattr(after, name))[done],
                                          np.asarray(getattr(state, name))[done], err_msg=name)
        np.testing.assert_array_equal(np.asarray(after.count) - np.asarray(state.count), ~done)
        state = after
    assert not state.active.any() and finished > 12
    assert answers(state) == answers(write(PAPER, policy, rows, samples, limit))


@pytest.mark.parametrize('how', (PAPER, AFTER))
def test_going_on_from_a_cut_is_starting_from_the_longer_prompt(how):
    # Greedy, since a fresh start has other noise; 'after_sampler' then has no choice, and the KL tells.
    etas = np.tile([0.1, 0.5, np.inf], 4)
    warm, policy = policy_of(etas, 1.5), policy_of(etas, 0.0)
    first = write(how, warm, ROWS, SAMPLES)
    drafts = answers(first)
    kept = np.minimum([len(draft) for draft in drafts], np.tile([1, 2, 5, 6], 3))
    keys = decoding.unit_keys(1, 0, 'evaluate', jnp.asarray(ROWS, jnp.int32), jnp.asarray(SAMPLES, jnp.int32))
    cut = decoding.rewind(first, jnp.asarray(kept), jnp.full(12, 6), keys, EOS)
    np.testing.assert_array_equal(cut.ended, [draft[n - 1] in EOS for draft, n in zip(drafts, kept)])
    went_on = decoding.decode(REFERENCE, how, None, None, policy, cut, EOS)
    prompts = [PROMPTS[row] + draft[:n] for row, draft, n in zip(ROWS, drafts, kept)]
    left = np.where([draft[n - 1] in EOS for draft, n in zip(drafts, kept)], 0, 6 - kept)
    fresh = write(how, policy, np.arange(12), SAMPLES, left, prompts=prompts)
    assert answers(went_on) == [draft[:n] + rest for draft, n, rest in zip(drafts, kept, answers(fresh))]
    np.testing.assert_allclose(went_on.kl, fresh.kl, rtol=1e-5, atol=1e-6)
    assert (np.asarray(fresh.count) > 1).any() and (left == 0).any()
    # What was cut off leaves nothing behind: values of kept tokens stay, the rest is written anew.
    for row, n in enumerate(kept):
        rest, anew = np.asarray(went_on.values)[row, n:], np.asarray(fresh.values)[row, :6 - n]
        both = ~np.isnan(rest) & ~np.isnan(anew)  # other tokens wait for the network at the end
        np.testing.assert_allclose(rest[both], anew[both], atol=1e-6)
        assert both[:max(int(fresh.count[row]) - 4, 0)].all()
