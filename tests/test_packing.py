"""Packed rows compute what separate rows would, and every epoch holds every answer once."""
from __future__ import annotations

import jax
import numpy as np
import pytest

from qsharp_jax.data.dataset import AggregatedDataset, DatasetWriter, Rollout
from qsharp_jax.data.packing import attention_mask, FitBatches, lay_out, split_examples

ANSWERS = {3: 5, 4: 1, 8: 2, 9: 7, 20: 4}  # number of answers by example


def make(directory, answers=ANSWERS, iterations=1, seed=0):
    """D with tokens that are all different, so that each can be found again."""
    writer = DatasetWriter(directory)
    rng = np.random.default_rng(seed)
    token = 1000
    for iteration in range(1, iterations + 1):
        rollouts = []
        for example, count in answers.items():
            prompt = example * 10 + np.arange(1 + example % 4, dtype=np.int32)
            for sample in range(count):
                length = int(rng.integers(1, 7))
                answer = np.arange(token, token + length, dtype=np.int32)
                token += length
                rollouts.append(Rollout(iteration, example, sample, prompt, answer, int(rng.integers(length)),
                                        bool(rng.integers(2)), False))
        writer.write_shard(iteration, 0, rollouts, {})
        writer.write_labels(iteration, 0, 'reward', rng.uniform(0.2, 0.9, len(rollouts)))
    return AggregatedDataset(directory, 'reward', iterations)


def tokens_of(data):
    """The answer tokens with loss of every row of D."""
    return {index: (rollout.answer, rollout.cut) for index, rollout in enumerate(data.read(range(len(data))))}


def as_rows(batch):
    """Each answer of a batch: its row, and the indices of its prompt and of its own tokens along the row."""
    for row, place in zip(*np.nonzero(batch.answer_positions == 0)):
        here = [place]
        while here[-1] + 1 < batch.tokens.shape[1] and batch.answer_positions[row, here[-1] + 1] == len(here):
            here.append(here[-1] + 1)
        above = [batch.parents[row, place]]
        while batch.parents[row, above[0]] != above[0]:
            above.insert(0, batch.parents[row, above[0]])
        yield row, np.array(above), np.array(here)


@pytest.fixture(name='data', scope='module')
def data_fixture(tmp_path_factory):
    return make(tmp_path_factory.mktemp('d'), iterations=2)


@pytest.mark.parametrize('tokens', ['all', 'single'])
@pytest.mark.parametrize('samples_per_row, batch_size', [(1, 4), (3, 2), (3, 8), (100, 3), (1, 100)])
def test_every_answer_is_once_in_every_epoch_whole_and_with_its_reward(data, tokens, samples_per_row, batch_size):
    batches = FitBatches(data, batch_size, samples_per_row, seed=0, tokens=tokens)
    answers = tokens_of(data)
    starts = {int(answer[0]): index for index, (answer, _) in answers.items()}
    for epoch in range(2):
        found = []
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch * batches.steps_per_epoch + step)
            assert all(leaf.shape == batches.shape for leaf in jax.tree.leaves(batch))
            for row, before, here in as_rows(batch):
                index = starts[int(batch.tokens[row, here[0]])]
                answer, cut = answers[index]
                answer = answer if tokens == 'all' else answer[:cut + 1]
                prompt = data[index].prompt
                np.testing.assert_array_equal(batch.tokens[row, here], answer)
                np.testing.assert_array_equal(batch.tokens[row, before], prompt)
                np.testing.assert_array_equal(batch.positions[row, before], np.arange(len(prompt)))
                np.testing.assert_array_equal(batch.positions[row, here], len(prompt) + np.arange(len(answer)))
                np.testing.assert_array_equal(batch.rewards[row, here], np.float32(data.rewards[index]))
                np.testing.assert_array_equal(batch.examples[row, here], data[index].example)
                weights = np.zeros(len(answer), np.float32)
                weights[cut:] = 1 / (len(answer) - cut)
                np.testing.assert_array_equal(batch.weights[row, here], weights)
                found.append(index)
        assert sorted(found) == list(range(len(data)))
    assert batches.num_samples == len(data) and batches.num_examples == len(ANSWERS)


def test_weights_sum_to_the_number_of_answers_and_lie_on_answers_alone(data):
    batches = FitBatches(data, 3, 2, seed=1)
    total = 0.0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert np.sum(batch.weights) == pytest.approx(sum(1 for _ in as_rows(batch)), rel=1e-6)
        assert not batch.weights[batch.examples < 0].any()
        total += batch.weights.sum()
    assert total == pytest.approx(len(data), rel=1e-6)


def test_single_has_loss_on_the_cut_token_alone(data):
    batch = FitBatches(data, 64, 4, seed=0, tokens='single').batch(0)
    cuts = {int(answer[cut]) for answer, cut in tokens_of(data).values()}
    assert set(batch.tokens[batch.weights > 0].tolist()) == cuts
    assert set(batch.weights[batch.weights > 0].tolist()) == {1.0}


def test_single_needs_no_token_after_the_cut(tmp_path):
    writer = DatasetWriter(tmp_path)
    writer.write_shard(1, 0, [Rollout(1, 0, 0, np.ones(3, np.int32), np.ones(40, np.int32), 4, True, False)], {})
    writer.write_labels(1, 0, 'reward', np.ones(1))
    data = AggregatedDataset(tmp_path, 'reward', 1)
    assert FitBatches(data, 1, 1, 0, tokens='all', multiple=4).shape == (1, 44)
    assert FitBatches(data, 1, 1, 0, tokens='single', multiple=4).shape == (1, 8)


def test_a_cut_at_the_last_token_leaves_that_one_with_loss(tmp_path):
    writer = DatasetWriter(tmp_path)
    writer.write_shard(1, 0, [Rollout(1, 0, 0, np.ones(2, np.int32), np.array([5, 6, 7], np.int32), 2, True, False),
                              Rollout(1, 0, 1, np.ones(2, np.int32), np.array([8], np.int32), 0, False, True)], {})
    writer.write_labels(1, 0, 'reward', np.ones(2))
    data = AggregatedDataset(tmp_path, 'reward', 1)
    for tokens in ('all', 'single'):
        batch = FitBatches(data, 1, 2, 0, tokens=tokens).batch(0)
        assert {int(t): w for t, w in zip(batch.tokens[0], batch.weights[0], strict=True) if w} == {7: 1, 8: 1}


def test_samples_of_an_example_share_one_copy_of_the_prompt(data):
    batch = FitBatches(data, 64, 4, seed=0, rows_divisible_by=64).batch(0)
    sizes = np.array([count for row in batch.answer_positions if (count := (row == 0).sum())])
    assert sizes.max() == 4 and sizes.sum() == len(data)
    prompts = sum(len(data[index].prompt) for index in range(len(data)) if data[index].example == 9)
    assert prompts > (batch.tokens // 10 == 9).sum() == 2 * -(-14 // 4)
    assert sorted(sizes) == sorted(len(part) for count in ANSWERS.values()
                                   for part in np.array_split(np.arange(2 * count), -(-2 * count // 4)))


def separate_rows(batch):
    """Each answer of a batch with its prompt, as indices into its packed row."""
    for row, before, here in as_rows(batch):
        yield row, np.concatenate([before, here])


LAYOUTS = pytest.mark.parametrize('layout', [{'batch_size': 8, 'samples_per_row': 3, 'rows_divisible_by': 8},
                                             {'batch_size': 16, 'samples_per_row': 2, 'multiple': 64}])


@LAYOUTS
def test_the_mask_lets_each_token_see_what_separate_causal_rows_would(data, layout):
    batch = FitBatches(data, seed=0, **layout).batch(0)
    mask = np.asarray(jax.jit(attention_mask)(batch.ends))
    expected = np.zeros_like(mask)
    for row, places in separate_rows(batch):
        for i, place in enumerate(places):
            expected[row, place, places[:i + 1]] = True
    padding = ~expected.any(axis=2)
    assert padding.any()
    expected |= padding[:, :, None] & np.eye(mask.shape[1], dtype=bool)[None]
    np.testing.assert_array_equal(mask, expected)


@LAYOUTS
def test_attention_over_packed_rows_equals_attention_over_separate_rows(data, layout):
    batch = FitBatches(data, seed=0, **layout).batch(0)
    mask = np.asarray(attention_mask(batch.ends))
    inputs = np.random.default_rng(0).normal(size=(3000, 8))[batch.tokens] + batch.positions[..., None] / 10

    def attend(x, allowed):
        scores = np.where(allowed, np.exp(x @ x.T), 0)
        return scores @ x / scores.sum(axis=-1, keepdims=True)

    for row, places in separate_rows(batch):
        alone = attend(inputs[row, places], np.tril(np.ones((len(places), len(places)), bool)))
        np.testing.assert_allclose(attend(inputs[row], mask[row])[places], alone, rtol=1e-9)
    assert all(np.isfinite(attend(inputs[row], mask[row])).all() for row in range(len(mask)))


@LAYOUTS
def test_parents_are_the_tokens_before_in_the_same_answer(data, layout):
    batch = FitBatches(data, seed=0, **layout).batch(0)
    assert ((batch.parents >= 0) & (batch.parents < batch.tokens.shape[1])).all()
    for row, places in separate_rows(batch):
        np.testing.assert_array_equal(batch.parents[row, places[1:]], places[:-1])
        assert batch.parents[row, places[0]] == places[0]


def test_rewards_off_the_answers_are_rewards_that_there_are(data):
    batch = FitBatches(data, 64, 3, seed=0).batch(0)
    assert set(np.unique(batch.rewards)) <= set(data.rewards.astype(np.float32))


def test_a_batch_depends_on_nothing_but_its_step(data):
    one, other = FitBatches(data, 2, 2, seed=5), FitBatches(data, 2, 2, seed=5)
    assert one.digest == other.digest
    straight = [one.batch(step) for step in range(2 * one.steps_per_epoch)]
    for step in np.random.default_rng(0).permutation(len(straight)):
        jax.tree.map(np.testing.assert_array_equal, other.batch(int(step)), straight[step])


def order(batches, epoch):
    """First tokens of the answers of each step of an epoch."""
    steps = [batches.batch(epoch * batches.steps_per_epoch + step) for step in range(batches.steps_per_epoch)]
    return [tuple(sorted(batch.tokens[batch.answer_positions == 0].tolist())) for batch in steps]


def test_epochs_and_seeds_have_orders_of_their_own(data):
    orders = [order(FitBatches(data, 4, 1, seed, rows_divisible_by=2), epoch)
              for seed in range(3) for epoch in range(3)]
    assert len({tuple(one) for one in orders}) == len({frozenset(one) for one in orders}) == 9
    assert len({tuple(sorted(sum(one, ()))) for one in orders}) == 1


def test_the_digest_tells_layouts_and_data_apart(data, tmp_path):
    variants = [
        FitBatches(data, 2, 2, 0), FitBatches(data, 4, 2, 0), FitBatches(data, 2, 3, 0), FitBatches(data, 2, 2, 1),
        FitBatches(data, 2, 2, 0, tokens='single'),
        FitBatches(data, 2, 2, 0, examples=[3, 4]),
        FitBatches(make(tmp_path, iterations=2, seed=1), 2, 2, 0)]
    assert len({batches.digest for batches in variants}) == len(variants)
    # A fit may go on with other devices, which rows are shared out to.
    assert FitBatches(data, 2, 2, 0, rows_divisible_by=4).digest == variants[0].digest


def test_chosen_examples_alone_are_used(data):
    batches = FitBatches(data, 64, 2, seed=0, examples=np.array([4, 9, 777]))
    batch = batches.batch(0)
    assert {*batch.examples.ravel().tolist()} == {-1, 4, 9}
    assert batches.num_examples == 2 and batches.num_samples == 2 * (ANSWERS[4] + ANSWERS[9])


@pytest.mark.parametrize('arguments, words', [
    ({'batch_size': 0}, 'batch_size is 0'), ({'samples_per_row': 0}, 'samples_per_row is 0'),
    ({'tokens': 'first'}, "tokens is 'first'"), ({'examples': [777]}, 'no answers to the 1 chosen prompts')])
def test_impossible_batches_are_refused(data, arguments, words):
    with pytest.raises(ValueError, match=words):
        FitBatches(data, **{'batch_size': 4, 'samples_per_row': 1, 'seed': 0, **arguments})


def test_a_prompt_that_changed_is_refused(tmp_path):
    writer = DatasetWriter(tmp_path)
    for iteration in (1, 2):
        writer.write_shard(iteration, 0, [Rollout(iteration, 5, 0, np.full(2, iteration, np.int32),
                                                  np.ones(1, np.int32), 0, True, False)], {})
        writer.write_labels(iteration, 0, 'reward', np.ones(1))
    batches = FitBatches(AggregatedDataset(tmp_path, 'reward', 2), 1, 2, 0)
    with pytest.raises(ValueError, match='has another prompt than unit'):
        batches.batch(0)


def test_prompts_of_a_row_share_what_they_begin_with(tmp_path):
    prompts = {0: [7, 8, 1, 2], 1: [7, 8, 1, 3], 2: [7, 8], 3: [6, 8, 1], 4: [7, 8, 1, 2]}
    writer = DatasetWriter(tmp_path)
    writer.write_shard(1, 0, [Rollout(1, example, 0, np.array(prompt, np.int32), np.array([20 + example], np.int32),
                                      0, True, False) for example, prompt in prompts.items()], {})
    writer.write_labels(1, 0, 'reward', np.linspace(0, 1, 5))
    data = AggregatedDataset(tmp_path, 'reward', 1)
    assert data.shared_prefix == 0
    batches = FitBatches(data, 5, 1, 0, multiple=32)
    batch = batches.batch(0)
    # 6 8 1 · 7 8 · 1 · 2 · 3, each once, and five answers.
    assert batches.shape == (1, 32) and batch.ends[0, 8 + 5:].tolist() == list(range(8 + 5 + 1, 32 + 1))
    for _, before, here in as_rows(batch):
        example = batch.examples[0, here[0]]
        assert batch.tokens[0, before].tolist() == prompts[example] and batch.tokens[0, here] == [20 + example]
        assert batch.positions[0, here] == len(prompts[example])


def padding(batch):
    """Tokens that no other one sees and that answer nothing."""
    return (batch.ends == 1 + np.arange(batch.ends.shape[1])) & (batch.examples < 0)


def lengths_of(directory, prompts, answers, shared=0):
    """D with prompts and answers of these lengths, an answer a prompt; the prompts begin with `shared` equal tokens."""
    writer = DatasetWriter(directory)
    rollouts = [Rollout(1, example, 0, np.r_[np.zeros(shared), np.full(prompt, 1 + example)].astype(np.int32),
                        np.ones(answer, np.int32), 0, True, False)
                for example, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]
    writer.write_shard(1, 0, rollouts, {})
    writer.write_labels(1, 0, 'reward', np.ones(len(rollouts)))
    return AggregatedDataset(directory, 'reward', 1)


@pytest.mark.parametrize('batch_size, rows_divisible_by', [(16, 1), (32, 4), (128, 8)])
def test_answers_of_very_unequal_lengths_leave_little_padding(tmp_path, batch_size, rows_divisible_by):
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(40, 201, 2560), rng.integers(20, 257, 2560)
    batches = FitBatches(
        lengths_of(tmp_path, prompts, answers), batch_size, 1, 0, rows_divisible_by=rows_divisible_by)
    assert batches.steps_per_epoch == len(prompts) // batch_size
    rows, length = batches.shape
    assert rows % rows_divisible_by == 0
    assert (prompts.sum() + answers.sum()) / batches.steps_per_epoch / (rows * length) > 0.9
    for step in range(0, 3 * batches.steps_per_epoch, 7):
        assert padding(batches.batch(step)).mean() < 0.1


def test_what_all_prompts_begin_with_is_once_in_each_row(tmp_path):
    data = lengths_of(tmp_path, [3] * 64, [5] * 64, shared=100)
    assert data.shared_prefix == 100
    batches = FitBatches(data, 32, 1, 0)
    assert np.prod(batches.shape) < 32 * 8 + 2 * 112
    batch = batches.batch(0)
    assert (batch.tokens[~padding(batch)] == 0).sum() == batches.shape[0] * 100


@pytest.mark.parametrize('batch_size, rows_divisible_by', [(32, 1), (32, 4), (128, 8)])
def test_a_few_long_answers_do_not_make_all_rows_long_and_empty(tmp_path, batch_size, rows_divisible_by):
    rng = np.random.default_rng(0)
    answers = np.minimum(rng.lognormal(4.8, 0.5, 2560), 1024).astype(int)
    answers[rng.random(len(answers)) < 0.01] = 1024  # cut off at the limit
    batches = FitBatches(
        lengths_of(tmp_path, np.full(2560, 40), answers), batch_size, 1, 0, rows_divisible_by=rows_divisible_by)
    tokens = (40 * 2560 + answers.sum()) / batches.steps_per_epoch
    assert 0.85 * np.prod(batches.shape) < tokens < 0.35 * batch_size * 1064  # a row each


@pytest.mark.parametrize('shared', [0, 50])
@pytest.mark.parametrize('multiple, rows_divisible_by', [(1, 1), (16, 4)])
@pytest.mark.parametrize('classes', [1, 2, 3, 7, 30])
def test_layouts_hold_every_group_and_take_no_more_than_a_row_for_each(shared, multiple, rows_divisible_by, classes):
    steps = 5
    sizes = -np.sort(-np.random.default_rng(classes).integers(1, 200, classes * steps)).reshape(classes, steps)
    rows, length = lay_out(sizes, shared, multiple, rows_divisible_by)
    assert sorted(number for row in rows for number, _ in row) == list(range(classes))
    assert all(sorted(columns) == list(range(steps)) for row in rows for _, columns in row)
    totals = [sum(sizes[number, columns] for number, columns in row) for row in rows]
    assert max(np.max(total) for total in totals) + shared == pytest.approx(length, abs=multiple - 1)
    assert length % multiple == 0 and len(rows) % rows_divisible_by == 0
    most = -(-classes // rows_divisible_by) * rows_divisible_by
    assert len(rows) * length <= most * (-(-(sizes.max() + shared) // multiple) * multiple)


@pytest.mark.parametrize('fraction, count', [(0.0, 0), (0.001, 1), (0.25, 25), (0.999, 99)])
def test_held_out_examples_are_the_share_asked_for(fraction, count):
    ids = np.arange(0, 300, 3)
    train, held = split_examples(ids[::-1], fraction, seed=0)
    assert len(held) == count
    assert sorted([*train, *held]) == ids.tolist()
    assert train.tolist() == sorted(train) and held.tolist() == sorted(held)


def test_held_out_examples_depend_on_the_seed_and_hardly_on_the_others():
    ids = np.arange(100)
    held = set(split_examples(ids, 0.2, 0)[1].tolist())
    assert held == set(split_examples(ids, 0.2, 0)[1].tolist()) != set(split_examples(ids, 0.2, 1)[1].tolist())
    assert len(held & set(split_examples(np.arange(120), 0.2, 0)[1].tolist())) >= 14


@pytest.mark.parametrize('seed', range(5))
def test_what_is_held_out_stays_so_when_more_examples_come(seed):
    every = np.random.default_rng(seed).permutation(1000)[:200]
    first, more = every[:100], every
    train, held = split_examples(first, 0.05, seed, every)
    train_more, held_more = split_examples(more, 0.05, seed, every)
    assert len(held_more) == 10 and set(held) <= set(held_more) and set(train) <= set(train_more)
    # All there are: as without them. None of the share here: some of these.
    assert held_more.tolist() == split_examples(more, 0.05, seed)[1].tolist()
    few = np.setdiff1d(every, held_more)[:7]
    assert [len(part) for part in split_examples(few, 0.05, seed, every)] == [6, 1]


@pytest.mark.parametrize('ids, fraction, words', [([1, 2], 1.0, 'below 1'), ([1, 2], -0.1, 'at least 0'),
                                                  ([1], 0.5, '1 example cannot be split')])
def test_impossible_splits_are_refused(ids, fraction, words):
    with pytest.raises(ValueError, match=words):
        split_examples(ids, fraction, 0)
