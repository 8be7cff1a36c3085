"""The fit: its loss against a loop, and what must not change it: packing, accumulation, the layout over devices."""
from __future__ import annotations

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qsharp_jax import categorical, learner, sharding

WIDTH, VOCAB = 8, 16
BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
CATEGORICAL = categorical.make('categorical', -1.0, 1.0, num_atoms=5, projection='two_hot')
ADAM = learner.OptimizerConfig(learning_rate=0.01)
AXES = {
    'trunk': {
        'embedding': ('vocab', 'embed'),
        **{f'layers_{i}': {
            'norm': {'scale': ('embed',)},
            'attention': {'query': {'kernel': ('embed', 'heads', 'head_dim'), 'bias': ('heads', 'head_dim')},
                          'output': {'kernel': ('heads', 'head_dim', 'embed')}}} for i in range(2)}},
    'head': {'kernel': (None, 'embed'), 'bias': (None,)},
}


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, T]
    positions: jax.Array  # [B, T]
    rewards: jax.Array  # [B, T]
    weights: jax.Array  # [B, T]


def _params(distribution=BERNOULLI, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32) * 0.5

    layers = {f'layers_{i}': {
        'norm': {'scale': 1 + draw(WIDTH)},
        'attention': {'query': {'kernel': draw(WIDTH, 2, 4), 'bias': draw(2, 4)},
                      'output': {'kernel': draw(2, 4, WIDTH)}}} for i in range(2)}
    scores = distribution.num_scores
    return {'trunk': {'embedding': draw(VOCAB, WIDTH), **layers},
            'head': {'kernel': draw(scores, WIDTH), 'bias': draw(scores)}}


def _scores(params, batch):
    """A network of single tokens: what stands around a token cannot matter, so any packing must be equal."""
    trunk = params['trunk']
    x = trunk['embedding'][batch.tokens]
    for i in range(2):
        layer = trunk[f'layers_{i}']
        query, output = layer['attention']['query'], layer['attention']['output']
        inner = jnp.einsum('btd,dhk->bthk', x * layer['norm']['scale'][None, None], query['kernel'])
        x = x + jnp.einsum('bthk,hkd->btd', jnp.tanh(inner + query['bias'][None, None]), output['kernel'])
    return jnp.einsum('btd,kd->btk', x, params['head']['kernel']) + params['head']['bias'][None, None]


def _samples(count=12, seed=0, rewards=(0.0, 1.0)):
    """Samples of unequal lengths: (tokens [n], reward)."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, VOCAB, rng.integers(1, 6)), float(rng.choice(rewards))) for _ in range(count)]


def _pack(samples, per_row, rows, length=16):
    """Returns a batch with `per_row` samples one after another in a row, the rest of it padding."""
    batch = Batch(np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32),
                  np.full((rows, length), -7.0, np.float32), np.zeros((rows, length), np.float32))
    for row, start in enumerate(range(0, len(samples), per_row)):
        end = 0
        for tokens, reward in samples[start:start + per_row]:
            inside = slice(end, end + len(tokens))
            batch.tokens[row, inside] = tokens
            batch.positions[row, inside] = np.arange(len(tokens))
            batch.rewards[row, inside] = reward
            batch.weights[row, inside] = 1 / len(tokens)
            end += len(tokens)
    return batch


def _run(batch, config=ADAM, distribution=BERNOULLI, mesh=None, accumulate=1, steps=3):
    """Returns the state and the metrics after some updates with one batch."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    params = _params(distribution)
    state = learner.init(sharding.shard_params(params, sharding.param_shardings(mesh, AXES, params)), config)
    update = learner.make_update(_scores, distribution, config, state, accumulate)
    for _ in range(steps):
        state, metrics = update(state, sharding.shard_batch(mesh, batch))
    return state, {name: float(value) for name, value in metrics.items()}


def _close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


@pytest.mark.parametrize('distribution,rewards', [
    (BERNOULLI, (0.0, 1.0)), (CATEGORICAL, (-1.0, 0.3, 1.0)), (categorical.make('mse', 0.0, 1.0), (0.0, 1.0))])
def test_loss_is_the_mean_over_tokens_then_over_samples(distribution, rewards):
    samples = _samples(rewards=rewards)
    _, metrics = _run(_pack(samples, 3, 5), distribution=distribution, steps=1)
    losses = []
    for tokens, reward in samples:
        batch = Batch(tokens[None], None, None, None)
        scores = _scores(_params(distribution), batch)[0]
        losses.append(np.mean([distribution.loss(score, jnp.float32(reward)) for score in scores]))
    assert metrics['loss'] == pytest.approx(np.mean(losses), abs=1e-5)


def test_gradient_is_that_of_the_loss():
    batch = _pack(_samples(), 3, 4)

    def loss(params):
        scores = _scores(params, batch)[..., 0]
        signs = jnp.where(batch.rewards == 1, scores, -scores)
        return -jnp.sum(batch.weights * jax.nn.log_sigmoid(signs)) / 12

    grads = jax.grad(loss)(_params())
    state, metrics = _run(batch, dataclasses.replace(ADAM, clip_norm=np.inf), steps=1)
    assert metrics['grad_norm'] == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
    _close(optax.tree.get(state.opt_state, 'mu'), jax.tree.map(lambda grad: 0.1 * grad, grads), 1e-7)


@pytest.mark.parametrize('optimizer', learner.OPTIMIZERS)
def test_packing_and_padding_change_nothing(optimizer):
    config = dataclasses.replace(ADAM, optimizer=optimizer)
    samples = _samples()
    wanted, metrics = _run(_pack(samples, 1, 12), config)
    for per_row, rows in ((3, 4), (2, 8), (12, 1)):
        packed, other = _run(_pack(samples, per_row, rows, length=64), config)
        _close(packed.params, wanted.params)
        assert other == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize('accumulate', [2, 4, 8])
def test_accumulation_changes_nothing(accumulate):
    # The last rows hold nothing: micro-batches have unequal numbers of samples.
    batch = _pack(_samples(), 2, 8)
    wanted, metrics = _run(batch)
    state, other = _run(batch, accumulate=accumulate)
    _close(state.params, wanted.params)
    assert other == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_eight_devices_are_equal_to_one(sizes, accumulate):
    batch = _pack(_samples(20), 1, 32)
    wanted, metrics = _run(batch)
    mesh = sharding.make_mesh(*sizes)
    state, other = _run(batch, mesh=mesh, accumulate=accumulate)
    _close(sharding.to_host(state.params), sharding.to_host(wanted.params))
    assert other == pytest.approx(metrics, abs=1e-5)
    params = _params()
    places = sharding.param_shardings(mesh, AXES, params)
    for tree in (state.params, optax.tree.get(state.opt_state, 'mu'), optax.tree.get(state.opt_state, 'nu')):
        jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim) or 1 / 0, tree, places)
    assert state.step.sharding.is_fully_replicated and int(state.step) == 3


def test_one_compile_for_each_shape_and_layout():
    traces = []

    def counted(params, batch):
        traces.append(batch.tokens.shape)
        return _scores(params, batch)

    mesh = sharding.make_mesh(2, 2, 2)
    params = _params()
    state = learner.init(sharding.shard_params(params, sharding.param_shardings(mesh, AXES, params)), ADAM)
    update = learner.make_update(counted, BERNOULLI, ADAM, state)
    predict = learner.make_predict(counted, BERNOULLI)
    for seed in range(4):
        batch = sharding.shard_batch(mesh, _pack(_samples(8, seed), 1, 8))
        state, _ = update(state, batch)
        predict(state.params, batch)
    assert traces == [(8, 16), (8, 16)] and update._cache_size() == predict._cache_size() == 1
    update(state, sharding.shard_batch(mesh, _pack(_samples(8), 2, 4)))
    assert traces[2:] == [(4, 16)]


def test_updates_consume_the_state_but_never_the_parameters_it_was_made_from():
    params = jax.tree.map(jnp.asarray, _params())
    state = learner.init(params, ADAM)
    update = learner.make_update(_scores, BERNOULLI, ADAM, state)
    update(state, jax.tree.map(jnp.asarray, _pack(_samples(), 3, 4)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    _close(params, _params(), 0)


def test_weight_decay_spares_biases_and_scales_and_padding_alone_has_no_loss():
    batch = _pack([], 1, 2)
    for optimizer in learner.OPTIMIZERS:
        config = dataclasses.replace(ADAM, weight_decay=0.5, optimizer=optimizer)
        state, metrics = _run(batch, config, steps=1)
        assert metrics['loss'] == metrics['grad_norm'] == 0

        def check(path, new, old):
            spared = path[-1].key in ('bias', 'scale')
            np.testing.assert_allclose(new, old if spared else old * (1 - 0.01 * 0.5), rtol=1e-6)

        jax.tree_util.tree_map_with_path(check, state.params, _params())


def test_gradients_are_clipped_as_a_whole():
    state, metrics = _run(_pack(_samples(), 3, 4), dataclasses.replace(ADAM, clip_norm=1e-3), steps=1)
    assert metrics['grad_norm'] > 0.1
    assert float(optax.global_norm(optax.tree.get(state.opt_state, 'mu'))) == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize('schedule,warmup,total,wanted', [
    ('constant', 0, 0, [1, 1, 1, 1]), ('constant', 2, 0, [0.5, 1, 1, 1]),
    ('cosine', 0, 4, [1, 0.853553, 0.5, 0.146447]), ('cosine', 2, 4, [0.5, 1, 1, 0.5])])
def test_learning_rate_follows_its_schedule(schedule, warmup, total, wanted):
    config = learner.OptimizerConfig(0.01, 0.0, schedule=schedule, warmup_steps=warmup, total_steps=total)
    params = jax.tree.map(jnp.asarray, _params())
    state = learner.init(params, config)
    update = learner.make_update(_scores, BERNOULLI, config, state)
    batch = jax.tree.map(jnp.asarray, _pack(_samples(), 3, 4))
    rates, steps = [], []
    for _ in range(4):
        before = float(state.params['head']['bias'][0])
        state, metrics = update(state, batch)
        rates.append(float(metrics['learning_rate']))
        steps.append(abs(float(state.params['head']['bias'][0]) - before))
    np.testing.assert_allclose(rates, 0.01 * np.array(wanted), rtol=1e-5)
    # Adam's steps under a steady gradient are as long as its rate: what is reported is what is used.
    np.testing.assert_allclose(steps, rates, rtol=0.2)


def test_head_learns_at_its_own_rate():
    batch = _pack(_samples(), 3, 4)
    old = _params()
    plain, _ = _run(batch, dataclasses.replace(ADAM, weight_decay=0.0), steps=1)
    fast, _ = _run(batch, dataclasses.replace(ADAM, weight_decay=0.0, head_lr_multiplier=5.0), steps=1)
    _close(fast.params['trunk'], plain.params['trunk'], 0)
    moved = jax.tree.map(lambda new, before: new - before, (plain.params['head'], fast.params['head']),
                         (old['head'], old['head']))
    _close(moved[1], jax.tree.map(lambda x: 5 * x, moved[0]), 1e-6)


def test_frozen_layers_stay_and_cost_no_moments():
    batch = _pack(_samples(), 3, 4)
    state, metrics = _run(batch, dataclasses.replace(ADAM, frozen_layers=1))
    old, new = _params()['trunk'], state.params['trunk']
    _close([new[name] for name in ('embedding', 'layers_0')], [old[name] for name in ('embedding', 'layers_0')], 0)
    assert not np.allclose(new['layers_1']['norm']['scale'], old['layers_1']['norm']['scale'])
    moments = optax.tree.get(state.opt_state, 'mu')
    assert moments['trunk']['embedding'] is None and not jax.tree.leaves(moments['trunk']['layers_0'])
    assert metrics['grad_norm'] < _run(batch)[1]['grad_norm']
    with pytest.raises(ValueError, match='frozen_layers is 3, but the trunk has 2 layers'):
        _run(batch, dataclasses.replace(ADAM, frozen_layers=3))


def test_muon_orthogonalises_the_matrices_of_layers_and_nothing_else():
    config = dataclasses.replace(ADAM, weight_decay=0.0, optimizer='muon', frozen_layers=1)
    batch = _pack(_samples(60), 3, 20)
    state, _ = _run(batch, config, steps=1)
    adam, _ = _run(batch, dataclasses.replace(config, optimizer='adamw'), steps=1)
    old = _params()
    attention, before = state.params['trunk']['layers_1']['attention'], old['trunk']['layers_1']['attention']
    for name, shape in (('query', (WIDTH, 8)), ('output', (8, WIDTH))):
        change = np.asarray(attention[name]['kernel'] - before[name]['kernel']).reshape(shape)
        values = np.linalg.svd(change, compute_uv=False)
        assert values[-1] > 0.3 * values[0]
        assert np.sqrt(np.mean(change ** 2)) == pytest.approx(0.2 * 0.01, rel=0.4)
    _close(state.params['head'], adam.params['head'], 1e-7)
    np.testing.assert_allclose(attention['query']['bias'],
                               adam.params['trunk']['layers_1']['attention']['query']['bias'], atol=1e-7)


def test_accuracy_weighs_as_the_loss_and_is_of_binary_rewards_only():
    samples = _samples()
    _, metrics = _run(_pack(samples, 3, 4), steps=1)
    right = []
    for tokens, reward in samples:
        scores = np.asarray(_scores(_params(), Batch(tokens[None], None, None, None))[0, :, 0])
        right.append(np.mean((scores > 0) == (reward == 1)))
    assert 0 < metrics['accuracy'] < 1
    assert metrics['accuracy'] == pytest.approx(np.mean(right), abs=1e-6)
    _, metrics = _run(_pack(_samples(rewards=(0.0, 0.5)), 3, 4), steps=1)
    assert np.isnan(metrics['accuracy']) and np.isfinite(metrics['loss'])


def test_fit_finds_the_share_of_successes_of_each_token():
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.1, 0.9, VOCAB)
    tokens = rng.integers(0, VOCAB, 4000)
    samples = [([token], float(rng.uniform() < chances[token])) for token in tokens]
    config = learner.OptimizerConfig(0.1, 0.0, schedule='cosine', total_steps=300)
    state, _ = _run(_pack(samples, 16, 250), config, steps=300)
    alone = Batch(np.arange(VOCAB)[None], None, None, None)
    shares = [np.mean([reward for (token,), reward in samples if token == v]) for v in range(VOCAB)]
    np.testing.assert_allclose(BERNOULLI.mean(_scores(state.params, alone))[0], shares, atol=0.01)


@pytest.mark.parametrize('distribution,rewards', [(BERNOULLI, (0.0, 1.0)), (CATEGORICAL, (-1.0, 0.3, 1.0))])
def test_evaluation_is_a_loop_over_all_batches(distribution, rewards):
    mesh = sharding.make_mesh(2, 2, 2)
    packs = [_pack(_samples(n, n, rewards), 2, 8) for n in (14, 7)]
    params = sharding.replicate(mesh, _params(distribution))
    etas = (0.1, np.inf)
    predict = learner.make_predict(_scores, distribution, etas)
    found = learner.evaluate_loss(
        predict, params, (sharding.shard_batch(mesh, pack) for pack in packs), distribution)
    losses, briers, rows = [], [], []
    half = (distribution.v_max - distribution.v_min)
    for n, pack in zip((14, 7), packs):
        for i, (tokens, reward) in enumerate(_samples(n, n, rewards)):
            scores = _scores(_params(distribution), Batch(tokens[None], None, None, None))[0]
            mean = np.asarray(distribution.mean(scores))
            losses.append(np.mean([distribution.loss(score, jnp.float32(reward)) for score in scores]))
            briers.append(np.mean(((mean - reward) / half) ** 2))
            rows += [(mean[t], reward, t, 1 / len(tokens), i // 2 + 8 * (n == 7),
                      distribution.log_weight(scores[t], jnp.float32(0.1)), 0.0) for t in range(len(tokens))]
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.brier == pytest.approx(np.mean(briers), abs=1e-5)
    assert found.num_samples == pytest.approx(21)
    assert np.isnan(found.accuracy) == (len(rewards) == 3)
    out = found.predictions
    table = np.column_stack([out.mean, out.reward, out.position, out.weight, out.row, out.log_weight])
    np.testing.assert_allclose(table, np.array(rows, float), atol=1e-4)


def test_evaluation_of_nothing_is_refused():
    predict = learner.make_predict(_scores, BERNOULLI)
    for batches in ([], [jax.tree.map(jnp.asarray, _pack([], 1, 2))]):
        with pytest.raises(ValueError, match='no held-out sample'):
            learner.evaluate_loss(predict, _params(), batches, BERNOULLI)


@pytest.mark.parametrize('change,words', [
    ({'learning_rate': 0.0}, 'learning_rate is 0.0: it must be above 0'), ({'b2': 1.0}, 'b2 is 1.0'),
    ({'weight_decay': -1.0}, 'weight_decay is -1.0'), ({'schedule': 'linear'}, 'allowed: constant, cosine'),
    ({'optimizer': 'sgd'}, 'allowed: adamw, muon'), ({'clip_norm': float('nan')}, 'clip_norm is nan'),
    ({'schedule': 'cosine', 'total_steps': 5, 'warmup_steps': 5}, 'total_steps above warmup_steps')])
def test_optimizer_settings_out_of_range_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ADAM, **change)


def test_accumulation_that_does_not_divide_the_rows_is_refused_in_words():
    with pytest.raises(ValueError, match='8 rows does not split into accumulate=3'):
        _run(_pack(_samples(), 2, 8), accumulate=3)
    with pytest.raises(ValueError, match='accumulate is 0'):
        _run(_pack(_samples(), 2, 8), accumulate=0)
