"""What graded answers amount to, on rows written by hand; and that finished blocks are not done again."""
from __future__ import annotations

import itertools
import json
import math
import statistics
import types

import numpy as np
import pytest

from qsharp_jax import estimators, evaluate
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.evaluate import Evaluated


def row(example, sample, text, reward, *, kl=0.0, tokens=1, truncated=False, seconds=0.5, flops=1e9):
    return {'id': example, 'sample': sample, 'text': text, 'vote': text.strip(), 'reward': reward, 'kl': kl,
            'tokens': [0] * tokens,
            'truncated': truncated, 'seconds': seconds, 'reference_tokens': tokens + 1.5, 'value_tokens': 4.0 * tokens,
            'temperature': 1.0, 'flops': flops, 'bytes': 2e9, 'occupancy': 0.75 if sample % 2 else 0.95}


# Two examples, four samples each, in no order. Example 3: a tie between a right and a wrong answer, and one
# abstention. Example 7: a wrong majority.
ROWS = [
    row(7, 1, '5', 0.0, kl=1.0, tokens=2), row(3, 0, 'x', 1.0, kl=2.0, tokens=3),
    row(7, 0, ' 5\n', 0.0, tokens=2),
    row(3, 2, 'y', 0.0, kl=0.5, tokens=1), row(7, 3, '6', 1.0, kl=4.0, tokens=4, truncated=True),
    row(3, 1, 'x ', 1.0, tokens=1), row(3, 3, 'y', None, kl=0.5, tokens=6), row(7, 2, '5', 0.0, tokens=1),
]


def test_rows_are_grouped_by_example_and_ordered_by_sample():
    table = evaluate.by_example(ROWS, 0.0)
    assert table['id'] == [3, 7]
    np.testing.assert_array_equal(table['reward'], [[1, 1, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(table['kl'], [[2, 0, 0.5, 0.5], [0, 1, 0, 4]])
    assert table['text'] == [['x', 'x', 'y', 'y'], ['5', '5', '5', '6']]
    # An abstention earns the least there is.
    assert evaluate.by_example(ROWS, -1.0)['reward'][0, 3] == -1


def test_the_summary_of_rows_counted_by_hand():
    found = evaluate.summarise(ROWS, 4, 0.0, 1.0, 5)
    assert found['pass@1'] == pytest.approx(3 / 8)
    assert found['pass@1_se'] == pytest.approx(statistics.stdev([0.5, 0.25]) / math.sqrt(2))
    assert found['pass@k'] == 1 and found['pass@k_se'] == 0 and found['k'] == 4
    # The tie is right under one seed and wrong under another.
    assert {evaluate.summarise(ROWS, 4, 0.0, 1.0, seed)['maj@k'] for seed in range(20)} == {0, 0.5}
    assert found['maj@k_se'] == pytest.approx(statistics.stdev([2 * found['maj@k'], 0]) / math.sqrt(2))
    assert found['best_of_k'] is None and found['weighted_maj@k_se'] is None  # nothing has scored them
    assert found['kl'] == pytest.approx(8 / 8)
    assert found['kl_se'] == pytest.approx(statistics.stdev([3 / 4, 5 / 4]) / math.sqrt(2))
    assert found['kl_per_token'] == pytest.approx(8 / 20)
    assert found['truncated'] == pytest.approx(1 / 8) and found['abstained'] == pytest.approx(1 / 8)
    assert found['tokens_per_answer'] == pytest.approx(20 / 8) and found['occupancy'] == pytest.approx(0.85)
    assert (found['n_examples'], found['n_samples'], found['seconds']) == (2, 4, 4)
    json.dumps(found)


def test_costs_are_shared_by_the_right_answers():
    found = evaluate.summarise(ROWS, 4, 0.0, 1.0, 5)  # three of eight are right
    assert found['reference_tokens_per_answer'] == pytest.approx(20 / 8 + 1.5)
    assert found['reference_tokens_per_right_answer'] == pytest.approx((20 + 12) / 3)
    assert found['value_tokens_per_right_answer'] == pytest.approx(80 / 3)
    assert found['flops_per_answer'] == 1e9 and found['bytes_per_right_answer'] == pytest.approx(16e9 / 3)
    assert found['seconds_per_answer'] == 0.5 and found['seconds_per_right_answer'] == pytest.approx(4 / 3)
    # A greedy answer is drawn once, and is all samples: the time it took is that of one, and so is what it costs.
    rows = [{**row(0, sample, 'a', 1.0), 'temperature': 0.0} for sample in range(4)]
    greedy = evaluate.summarise(rows, 4, 0.0, 1.0, 0)
    assert (greedy['seconds'], greedy['seconds_per_answer'], greedy['flops_per_answer']) == (0.5, 0.5, 1e9)
    none = evaluate.summarise([row(0, 0, 'a', 0.0), row(1, 0, 'b', None)], 1, 0.0, 1.0, 0)
    assert none['flops_per_answer'] == 1e9 and math.isnan(none['flops_per_right_answer'])


@pytest.mark.parametrize('k', (1, 2, 3))
def test_votes_have_k_voters(k):
    # As many disjoint votes as there are answers for; with one voter each that is pass@1.
    table = evaluate.by_example(ROWS, 0.0)
    votes = [[estimators.majority([texts[first:first + k]], earned[None, first:first + k],
                                  [f'3 tie {example} {first}'], 0.0)[0] for first in range(0, 4 - k + 1, k)]
             for example, texts, earned in zip(table['id'], table['text'], table['reward'])]
    found = evaluate.summarise(ROWS, k, 0.0, 1.0, 3)
    assert found['maj@k'] == pytest.approx(np.mean(votes)) and found['k'] == k
    assert (found['pass@k'], found['pass@k_se']) == pytest.approx(estimators.pass_at_k(table['reward'], k))
    if k == 1:
        assert found['maj@k'] == pytest.approx(found['pass@1'])


def test_right_is_what_earns_the_most():
    rows = [row(0, 0, 'a', 0.5), row(0, 1, 'b', 2.0), row(1, 0, 'c', 0.5), row(1, 1, 'd', 1.9)]
    found = evaluate.summarise(rows, 2, -1.0, 2.0, 0)
    assert found['pass@1'] == pytest.approx(4.9 / 4)
    assert found['pass@k'] == 0.5
    assert evaluate.summarise(rows, 9, -1.0, 2.0, 0)['k'] == 2  # no more than there are
    silent = [row(0, 0, '', -1.0), row(1, 0, 'c', 0.5)]
    assert evaluate.summarise(silent, 1, -1.0, 2.0, 0)['maj@k'] == -0.25  # who says nothing has the least reward


def test_policies_are_compared_example_by_example():
    worse = [{**own, 'reward': None if own['reward'] is None else own['reward'] - 0.25 * (own['id'] == 7)}
             for own in reversed(ROWS)]
    found = evaluate.compare(ROWS, worse, 0.0, 'a')
    assert found[''] == pytest.approx(0.125)
    assert (found['_low'], found['_high']) == (0, 0.25)  # of two examples, both may be either
    assert found['_se'] == pytest.approx(statistics.stdev([0, 0.25]) / math.sqrt(2))
    with pytest.raises(ValueError, match='same examples'):
        evaluate.compare(ROWS, [{**own, 'id': own['id'] + 1} for own in ROWS], 0.0, 'a')


def test_scores_choose_among_k_answers():
    """Best-of-k and the weighted vote, by hand: the score of an answer is beside its text."""
    rows = [{**row(example, sample, text, reward), 'score': score} for example, sample, text, reward, score in (
        (3, 0, 'x', 1.0, 0.2), (3, 1, 'x', 1.0, 0.3), (3, 2, 'y', 0.0, 0.4), (3, 3, '', 0.0, 0.1),
        (7, 0, 'a', 0.0, -0.3), (7, 1, 'b', 1.0, 0.9), (7, 2, 'a', 0.0, -0.3), (7, 3, 'a', 0.0, -0.3))]
    found = evaluate.summarise(rows, 4, -1.0, 1.0, 0)
    assert found['best_of_k'] == 0.5 and found['best_of_k_se'] == pytest.approx(0.5)
    # Above v_min, x has 1.2 + 1.3 against 1.4 of y, and a three times .7 against 1.9 of b.
    assert found['weighted_maj@k'] == 0.5 and found['maj@k'] == 0.5
    higher = [{**own, 'score': 0.99} if own['text'] == 'b' else {**own, 'score': -0.4} if own['text'] == 'a' else own
              for own in rows]
    assert evaluate.summarise(higher, 4, -1.0, 1.0, 0)['weighted_maj@k'] == 1
    pairs = evaluate.summarise(rows, 2, -1.0, 1.0, 0)
    assert pairs['best_of_k'] == pytest.approx((1 + 0 + 1 + 0) / 4)
    one = evaluate.summarise(rows, 1, -1.0, 1.0, 0)
    assert one['best_of_k'] == pytest.approx(one['pass@1']) and one['pass@1'] == pytest.approx(3 / 8)
    # One answer without a score is enough to know nothing.
    assert evaluate.summarise([*rows[:-1], row(7, 3, 'a', 0.0)], 4, -1.0, 1.0, 0)['best_of_k'] is None


PROMPTS = Prompts(np.array([4, 2, 9, 6, 8]), [[1], [2, 3], [4], [5], [6]], list('abcde'), {})


@pytest.fixture(name='asked')
def fixture_asked(monkeypatch):
    """The units that were answered, by answers that cost nothing."""
    asked = []

    def answer(experiment, prompts, policies, split, queue, which, samples, ended, divergence):
        rows = []
        for index, sample, policy in itertools.product(which, range(samples), range(len(policies))):
            unit = int(prompts.ids[index]), int(sample), int(policy)
            asked.append(unit)
            rows.append({'id': unit[0], 'sample': unit[1], 'policy': unit[2], 'eta': policies[unit[2]].eta,
                         'prompt': prompts.texts[index],
                         'text': 'a', 'vote': 'a', 'reward': 0.5, 'reward_digest': experiment.reward.digest})
        return rows
    monkeypatch.setattr(evaluate, '_answer', answer)
    return asked


@pytest.fixture(name='experiment')
def fixture_experiment(tmp_path):
    return types.SimpleNamespace(
        workdir=tmp_path, decoding_params=lambda params: params, guidance=lambda offset: None,
        queue=lambda *arguments: object(), value_digest=lambda iteration: f'network {iteration}',
        reward=types.SimpleNamespace(digest='reward'),
        config=types.SimpleNamespace(
            seed=0, sampling=types.SimpleNamespace(max_new_tokens=4),
            reward_options=types.SimpleNamespace(workers=0, timeout_seconds=1.0)))


def test_finished_blocks_are_read_back(tmp_path, asked, experiment):
    policies = [Evaluated('qsharp', 1, 0.1, 1.0), Evaluated('qsharp', 1, math.inf, 1.0)]

    def ask(of=policies, samples=3):
        del asked[:]
        return evaluate.samples_of(experiment, PROMPTS, np.arange(5), of, None, 'test', samples, 4, 2)

    first = ask()
    assert sorted(asked) == sorted((unit['id'], unit['sample'], unit['policy']) for unit in first)
    assert len(set(asked)) == len(asked) == 5 * 3 * 2
    # Within a block rows are in order of policy, example and sample, however they were decoded.
    block = [(unit['policy'], unit['id'], unit['sample']) for unit in first[:12]]
    assert block == sorted(block) and {example for _, example, _ in block} == {2, 4}
    assert ask() == first and not asked
    # A run that was killed lacks blocks; only those are done again.
    lost = sorted(tmp_path.rglob('block_*.jsonl'))[1]
    lost.unlink()
    assert ask() == first and {example for example, _, _ in asked} == {9, 6}
    # Other settings, or another network, never read these blocks.
    ask(samples=2)
    assert len(asked) == 5 * 2 * 2
    ask(of=policies[:1])
    assert len(asked) == 5 * 3
    experiment.value_digest = lambda iteration: 'another network'
    ask()
    assert len(asked) == 5 * 3 * 2


def test_a_greedy_answer_is_drawn_once_and_is_every_sample(experiment, monkeypatch):
    drawn = []

    def draw(experiment, prompts, policies, split, queue, which, samples, ended, divergence):
        drawn.append(([policy.temperature for policy in policies], samples))
        return [{'id': int(prompts.ids[index]), 'sample': sample, 'policy': number, 'text': f'{policy.temperature}'}
                for index, sample, (number, policy) in itertools.product(which, range(samples), enumerate(policies))]
    monkeypatch.setattr(evaluate, '_drawn', draw)
    monkeypatch.setattr(evaluate, '_vote', lambda experiment, rows: None)
    policies = [Evaluated('reference', 0, math.inf, temperature) for temperature in (1.0, 0.0, 0.7)]
    rows = evaluate.samples_of(experiment, PROMPTS, np.arange(5), policies, None, 'test', 3, 4, 5)
    assert drawn == [([1.0, 0.7], 3), ([0.0], 1)]
    assert [(row['policy'], row['id'], row['sample']) for row in rows] == [
        (policy, example, sample) for policy in range(3) for example in (2, 4, 6, 8, 9) for sample in range(3)]
    assert all(row['text'] == f'{policies[row["policy"]].temperature}' for row in rows)


def test_a_changed_reward_grades_finished_blocks_anew(tmp_path, asked, experiment, monkeypatch):
    def ask():
        del asked[:]
        policies = [Evaluated('qsharp', 1, 0.1, 1.0)]
        return evaluate.samples_of(experiment, PROMPTS, np.arange(5), policies, None, 'test', 1, 4, 2)

    def grade(experiment, prompts, index, texts):
        assert texts == ['a'] * len(index)
        return np.where(index == 2, np.nan, index / 10)
    monkeypatch.setattr(evaluate, 'grade', grade)
    # Another reward may know other answers as one.
    monkeypatch.setattr(evaluate.rewards, 'votes', lambda reward, texts, **options: [['b'] * len(own) for own in texts])
    first = ask()
    experiment.reward.digest = 'another'
    again = ask()
    assert not asked
    place = {4: 0.0, 2: 0.1, 9: None, 6: 0.3, 8: 0.4}  # None: the new reward abstained
    assert again == [{**own, 'reward': place[own['id']], 'reward_digest': 'another', 'vote': 'b'} for own in first]
    monkeypatch.setattr(evaluate, 'grade', None)  # the new rewards are kept
    assert ask() == again and not asked


def test_blocks_without_votes_are_counted_and_not_decoded_again(tmp_path, asked, experiment, monkeypatch):
    policies = [Evaluated('qsharp', 1, 0.1, 1.0)]
    arguments = experiment, PROMPTS, np.arange(5), policies, None, 'test', 1, 4, 2
    evaluate.samples_of(*arguments)
    for path in tmp_path.rglob('block_*.jsonl'):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(''.join(json.dumps({name: own[name] for name in own if name != 'vote'}) + '\n' for own in rows))
    del asked[:]
    monkeypatch.setattr(evaluate.rewards, 'votes', lambda reward, texts, **options: [['b'] * len(own) for own in texts])
    found = evaluate.samples_of(*arguments)
    assert not asked and [own['vote'] for own in found] == ['b'] * 5
    monkeypatch.setattr(evaluate.rewards, 'votes', None)  # they are kept
    assert evaluate.samples_of(*arguments) == found


@pytest.mark.parametrize('change', [
    lambda rows: rows[:-1], lambda rows: [], lambda rows: [*rows, rows[0]],
    lambda rows: [{**rows[0], 'prompt': 'another question'}, *rows[1:]],
    lambda rows: [{**rows[0], 'id': 77}, *rows[1:]]])
def test_a_block_of_other_answers_than_were_asked_is_named(tmp_path, asked, experiment, change):
    arguments = experiment, PROMPTS, np.arange(5), [Evaluated('qsharp', 1, 0.1, 1.0)], None, 'test', 1, 4, 2
    evaluate.samples_of(*arguments)
    path = sorted(tmp_path.rglob('block_*.jsonl'))[1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(row) + '\n' for row in change(rows)))
    with pytest.raises(ValueError, match='block_00001.jsonl is damaged .* not the answers to the questions .*Delete'):
        evaluate.samples_of(*arguments)


def test_a_damaged_block_is_named(tmp_path, asked, experiment):
    policies = [Evaluated('qsharp', 1, 0.1, 1.0)]
    evaluate.samples_of(experiment, PROMPTS, np.arange(5), policies, None, 'test', 1, 4, 2)
    damaged = sorted(tmp_path.rglob('block_*.jsonl'))[1]
    damaged.write_text(damaged.read_text()[:20])
    with pytest.raises(ValueError, match='block_00001.jsonl is damaged.*Delete it'):
        evaluate.samples_of(experiment, PROMPTS, np.arange(5), policies, None, 'test', 1, 4, 2)


def test_policies_of_two_networks_do_not_decode_together(experiment):
    policies = [Evaluated('qsharp', 1, 0.1, 1.0), Evaluated('qsharp', 2, 0.1, 1.0)]
    with pytest.raises(ValueError, match='share one method, iteration and network'):
        evaluate.samples_of(experiment, PROMPTS, np.arange(5), policies, None, 'test', 1, 4, 2)
