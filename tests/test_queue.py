"""Rows that are filled again: every unit is what it would be alone, whatever rows, devices, order and kind of work."""
from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, decoding, queue, rollout, sharding, units
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.types import Policy
from tests import tabular
from tests.processes import run_two

VOCAB, MOST, SEED, ITERATION = 11, 6, 5, 2
ENDS = (2, 5)
REFERENCE, VALUE = tabular.dyadic_reference(VOCAB), tabular.dyadic_value()
BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
GUIDED = {'paper': decoding.Guidance(VALUE, BERNOULLI, candidates=4),
          'after_sampler': decoding.Guidance(VALUE, BERNOULLI, candidates=2, order='after_sampler')}
# Of three widths; all begin alike.
TOKENS = [[7, 7, 3], [7, 7, 1, 4, 1, 5], [7, 7, 9, 2], [7, 7] + [8] * 21, [7, 7, 6, 6], [7, 7, 2] + [1] * 12]
PROMPTS = Prompts(np.array([10, 13, 11, 40, 25, 12]), TOKENS, [str(tokens) for tokens in TOKENS], {})


def policies(etas=(0.1, 0.5, np.inf), temperatures=(1.0, 0.0, 1.3), top_p=0.9):
    eta = np.asarray(etas, np.float32)
    temperature = np.resize(np.asarray(temperatures, np.float32), eta.shape)
    return Policy(eta, temperature, np.zeros(eta.shape, np.int32), np.full(eta.shape, top_p, np.float32),
                  np.ones(eta.shape, np.float32))


def mesh_of(count):
    return sharding.make_mesh(devices=jax.devices()[:count])


def queue_of(task, rows, *, how=GUIDED['paper'], mesh=None, ends=ENDS, prompts=PROMPTS):
    return queue.Queue(mesh or mesh_of(1), REFERENCE, how, None, None, ends, task, prompts, rows, SEED, ITERATION)


def rows_of(which, samples, of, how):
    """Every unit as a row of one batch: its policy, and a function that starts it with the noise of a stage."""
    every = units.units(which, samples, len(of.eta))
    policy = jax.tree.map(lambda leaf: jnp.asarray(leaf[every.policies]), of)
    tokens = np.zeros((len(every.index), 32), np.int32)
    for row, index in zip(tokens, every.index):
        row[:len(TOKENS[index])] = TOKENS[index]
    lengths = jnp.asarray([len(TOKENS[index]) for index in every.index], jnp.int32)

    def keys(stage):
        return decoding.unit_keys(SEED, ITERATION, stage, jnp.asarray(PROMPTS.ids[every.index], jnp.int32),
                                  jnp.asarray(every.samples, jnp.int32))

    def start(stage, limit, buffer):
        rows = jnp.arange(len(tokens), dtype=jnp.int32)
        return decoding.start(REFERENCE, how.value, None, None, jnp.asarray(tokens), lengths, rows, keys(stage),
                              jnp.full(len(tokens), limit, jnp.int32), buffer)
    return policy, keys, start


def answered(which, samples, of, how=GUIDED['paper'], ends=ENDS, most=MOST):
    """Whole answers, without a queue."""
    policy, _, start = rows_of(which, samples, of, how)
    return decoding.decode(REFERENCE, how, None, None, policy, start('evaluate', most, most), ends)


def rolled_out(which, samples, of, config, how=GUIDED['paper'], ends=ENDS):
    """Spliced answers in two passes over all units: every roll-in to its end, then every roll-out."""
    policy, keys, start = rows_of(which, samples, of, how)
    most = config.max_new_tokens
    state = start('roll_in', most if config.cut == 'uniform' else 1, config.buffer)
    state = decoding.decode(REFERENCE, how, None, None, policy, state, ends)
    roll_in = np.asarray(state.count)
    cut = np.zeros_like(roll_in)
    if config.cut == 'uniform':
        cut = np.asarray([jax.random.randint(key, (), 0, count) for key, count in zip(keys('cut'), roll_in)])
    limit = np.full_like(roll_in, most)
    if config.budget == 'fresh':
        limit = np.where((cut + 1 == roll_in) & (config.cut == 'uniform'), roll_in, cut + 1 + most)
    state = decoding.rewind(state, jnp.asarray(cut + 1), jnp.asarray(limit), keys('roll_out'), ends)
    state = decoding.decode(REFERENCE, decoding.Guidance(), None, None, policy, state.replace(value_cache=None), ends)
    return rollout.Rollouts(state.tokens, state.count, cut, state.ended, roll_in)


def assert_same(found, expected, names):
    found, expected = (jax.tree.map(np.asarray, {name: getattr(one, name) for name in names})
                       for one in (found, expected))
    written = np.arange(expected['tokens'].shape[1])[None] < expected['count'][:, None]
    for name in names:
        mask = written if found[name].ndim == 2 else np.ones(len(written), bool)
        np.testing.assert_array_equal(found[name][mask], expected[name][mask], err_msg=name)


ANSWER = 'tokens', 'count', 'ended', 'values'
SPLICED = 'tokens', 'count', 'ended', 'cut', 'roll_in'


@pytest.mark.parametrize('rows, order', ((1, 'paper'), (5, 'after_sampler'), (64, 'paper')))
def test_answers_are_those_of_units_alone(rows, order):
    of = policies()
    drawn = queue_of(decoding.Answering(MOST), rows, how=GUIDED[order]).draw(range(6), 3, of)
    expected = answered(range(6), 3, of, GUIDED[order])
    assert_same(drawn.read, expected, ANSWER)
    np.testing.assert_allclose(drawn.read.kl, expected.kl, atol=1e-5)
    # In the other order the passes of a step are those of its largest nucleus.
    if order == 'paper':
        np.testing.assert_array_equal(drawn.read.value_tokens, expected.value_tokens)
    assert drawn.written == expected.count.sum() and len(set(np.asarray(expected.count).tolist())) > 3
    assert drawn.occupancy == drawn.written / (rows * drawn.steps)
    assert rows > 5 or drawn.occupancy > 0.9


@pytest.mark.parametrize('rows, cut, budget', (
    (1, 'uniform', 'total'), (32, 'uniform', 'total'), (5, 'uniform', 'fresh'), (5, 'start', 'total'),
    (5, 'start', 'fresh')))
def test_spliced_answers_are_those_of_two_passes(rows, cut, budget):
    of, config = policies(), rollout.RolloutConfig(MOST, cut, budget)
    drawn = queue_of(rollout.RollingOut(config), rows).draw(range(6), 3, of)
    expected = rolled_out(range(6), 3, of, config)
    assert_same(drawn.read, expected, SPLICED)
    assert drawn.written == sum(expected.roll_in + np.asarray(expected.count) - expected.cut - 1)


@pytest.mark.parametrize('rows', (pytest.param(8, marks=pytest.mark.slow), 32))
def test_eight_devices_draw_the_same(rows):
    of, config = policies(), rollout.RolloutConfig(MOST)
    eight = mesh_of(8)
    drawn = queue_of(rollout.RollingOut(config), rows, mesh=eight).draw((4, 0, 3, 1, 5), 5, of)
    assert_same(drawn.read, rolled_out((4, 0, 3, 1, 5), 5, of, config), SPLICED)
    drawn = queue_of(decoding.Answering(MOST), rows, mesh=eight).draw(range(3), 1, of)
    assert_same(drawn.read, answered(range(3), 1, of), ANSWER)


@pytest.mark.parametrize('ends, most', ((tuple(range(VOCAB)), MOST), ((), 1), ((), MOST)))
def test_answers_of_one_token_and_of_all(ends, most):
    of = policies()
    drawn = queue_of(decoding.Answering(most), 4, ends=ends).draw(range(6), 2, of)
    assert_same(drawn.read, answered(range(6), 2, of, ends=ends, most=most), ANSWER)
    assert set(drawn.read.count.tolist()) == {1 if ends else most}
    config = rollout.RolloutConfig(most)
    drawn = queue_of(rollout.RollingOut(config), 4, ends=ends).draw(range(6), 2, of)
    assert_same(drawn.read, rolled_out(range(6), 2, of, config, ends=ends), SPLICED)


def test_prompts_that_are_prefilled_together_are_those_of_their_units():
    of = policies((0.1,))
    assert units.prefilled_prompts(64, 2, 1) == 4  # of six: the second time two of them twice
    drawn = queue_of(decoding.Answering(MOST), 64).draw(range(6), 2, of)
    assert_same(drawn.read, answered(range(6), 2, of), ANSWER)
    # What all begin with is prefilled, and twice four prompts.
    assert drawn.value_passes == drawn.reference_passes == drawn.steps + 3


def test_one_unit_alone():
    of = policies((0.1,))
    drawn = queue_of(decoding.Answering(MOST), 4).draw([3], 1, of)
    assert_same(drawn.read, answered([3], 1, of), ANSWER)
    assert drawn.steps == drawn.written == drawn.read.count[0]


def test_a_call_does_the_same_after_other_calls_and_tells_how_far_it_is():
    """So a block that is done again is bit-equal, also where rounding counts."""
    of, task = policies(), rollout.RollingOut(rollout.RolloutConfig(MOST))
    used, calls = queue_of(task, 5), []
    used.draw((2, 5, 4), 3, of)
    again = used.draw((0, 1), 4, of, lambda count, occupancy: calls.append((count, occupancy)))
    fresh = queue_of(task, 5).draw((0, 1), 4, of)
    assert again[2:] == fresh[2:] and again.units.index.tolist() == fresh.units.index.tolist()
    for mine, other in zip(again.read, fresh.read):
        np.testing.assert_array_equal(mine, other)
    assert sum(count for count, _ in calls) == 2 * 4 * 3 and calls[-1][1] == again.occupancy


def test_nothing_compiles_anew():
    traces = []

    def step(params, token, length, cache):
        traces.append(token.shape)
        return REFERENCE.step(params, token, length, cache)

    def prefill(params, tokens, lengths, cache, start):
        traces.append(tokens.shape)
        return REFERENCE.prefill(params, tokens, lengths, cache, start)
    counted = dataclasses.replace(REFERENCE, step=step, prefill=prefill)
    task = rollout.RollingOut(rollout.RolloutConfig(MOST))

    def draw(*asked, seed=0, iteration=1):
        made = queue.Queue(mesh_of(1), counted, GUIDED['paper'], None, None, ENDS, task, PROMPTS, 4, seed, iteration)
        made.draw(*asked)
    draw(range(6), 4, policies())
    first = len(traces)
    # Prompts are padded to three widths, less what all begin with.
    assert {shape for shape in traces if len(shape) == 2} >= {(1, 2), (1, 6), (1, 14), (1, 22)}
    draw((5, 0, 3), 2, policies((0.2,), (0.7,)))
    draw((4,), 1, policies((np.inf, 2.0)), seed=3, iteration=4)
    assert len(traces) == first


@pytest.mark.parametrize('devices', (1, 8))
def test_rows_are_filled_in_place(devices):
    """No copy is made of the caches of the other rows, and none is gathered from other devices."""
    shape = (16, 64)
    mesh = mesh_of(devices)
    task = rollout.RollingOut(rollout.RolloutConfig(shape[1] - 24))
    like = sharding.shard_batch(mesh, np.zeros(shape[0], np.int32))
    pool = decoding.vacant(REFERENCE, VALUE, None, None, task, shape[1], like)
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == shape[0] // devices for leaf in jax.tree.leaves(pool))
    prompts = sharding.shard_batch(mesh, (np.ones((8, 24), np.int32), np.full(8, 3, np.int32)))
    prefilled = decoding.prefill(REFERENCE, VALUE, None, None, None, *prompts, 0)
    none = np.zeros(1, np.int32)
    orders = decoding.Orders(none, none, none, none, policies((0.1,)))
    stages = sharding.replicate(mesh, np.asarray(jax.random.key_data(decoding.stage_keys(0, 0))))
    compiled = decoding.refill.lower(pool, prefilled, stages, orders, task).compile()
    memory = compiled.memory_analysis()
    caches = 2 * 4 * shape[0] * shape[1] // devices
    assert memory.alias_size_in_bytes >= 0.9 * memory.output_size_in_bytes > caches
    text = compiled.as_text()
    assert f's32[{shape[0]},{shape[1]}]' not in text or devices == 1
    held = [pool.state.reference_cache['tokens'].unsafe_buffer_pointer()] if devices == 1 else []
    pool = decoding.refill(pool, prefilled, stages, orders, task)
    assert not held or held == [pool.state.reference_cache['tokens'].unsafe_buffer_pointer()]


TWO = '''
import numpy as np
from qsharp_jax import decoding, rollout, sharding
from tests import test_queue
assert jax.process_count() == 2 and len(jax.devices()) == 4
for number, task in enumerate((decoding.Answering(6), rollout.RollingOut(rollout.RolloutConfig(6)))):
    read = test_queue.queue_of(task, 8, mesh=sharding.make_mesh()).draw(range(4), 3, test_queue.policies()).read
    np.savez(f'{sys.argv[3]}/{number}_{jax.process_index()}.npz', **read._asdict())
'''


@pytest.mark.slow
def test_two_processes_draw_the_same(tmp_path):
    run_two(TWO, tmp_path, devices=2)
    of = policies()
    expected = answered(range(4), 3, of), rolled_out(range(4), 3, of, rollout.RolloutConfig(6))
    for number, names in enumerate((ANSWER, SPLICED)):
        for process in range(2):
            with np.load(tmp_path / f'{number}_{process}.npz') as found:
                assert_same(SimpleNamespace(**found), expected[number], names)


def test_a_queue_needs_rows_for_every_device():
    with pytest.raises(ValueError, match='the number of rows 12 does not split over 8'):
        queue_of(decoding.Answering(MOST), 12, mesh=mesh_of(8))
