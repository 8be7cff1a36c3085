"""The fit: its loss against a loop, and that packing, accumulation and the layout over devices keep it."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qsharp_jax import categorical, learner, optimizers, sharding
from qsharp_jax.data.packing import FitBatch

WIDTH, VOCAB = 8, 16
BERNOULLI = categorical.make('bernoulli', 0.0, 1.0)
CATEGORICAL = categorical.make('categorical', -1.0, 1.0, num_atoms=5, projection='two_hot')
ADAM = optimizers.OptimizerConfig(learning_rate=0.01, weight_decay=0.5)
MUON = dataclasses.replace(ADAM, optimizer='muon')
AXES = {
    'trunk': {
        'embedding': ('vocab', 'embed'),
        **{f'layers_{i}': {
            'norm': {'scale': ('embed',)},
            'attention': {'query': {'kernel': ('embed', 'heads', 'head_dim'), 'bias': ('heads', 'head_dim')},
                          'output': {'kernel': ('heads', 'head_dim', 'embed')}}} for i in range(2)}},
    'head': {'kernel': (None, 'embed'), 'bias': (None,)},
}


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
    return _token_scores(params, batch.tokens)


def _token_scores(params, tokens):  # [B, T] -> [B, T, K]
    """A network of single tokens: what stands around a token cannot matter, so any packing must be equal."""
    trunk = params['trunk']
    x = trunk['embedding'][tokens]
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


def _pack(samples, per_row, rows=16, length=16, examples=None):
    """Returns a batch whose rows hold a prompt of one token and `per_row` samples; the rest is padding."""
    shape = rows, length
    batch = FitBatch(
        tokens=np.zeros(shape, np.int32), ends=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32), parents=np.zeros(shape, np.int32),
        examples=np.full(shape, -1, np.int32), answer_positions=np.full(shape, -1, np.int32),
        rewards=np.zeros(shape, np.float32), weights=np.zeros(shape, np.float32))
    for row, start in enumerate(range(0, len(samples), per_row)):
        batch.tokens[row, 0] = row % VOCAB if examples is None else examples[row]
        end = 1
        for tokens, reward in samples[start:start + per_row]:
            inside = slice(end, end + len(tokens))
            batch.tokens[row, inside] = tokens
            batch.examples[row, inside] = row if examples is None else examples[row]
            batch.answer_positions[row, inside] = np.arange(len(tokens))
            batch.positions[row, inside] = 1 + np.arange(len(tokens))
            batch.rewards[row, inside] = reward
            batch.weights[row, inside] = 1 / len(tokens)
            end += len(tokens)
    return batch


@functools.lru_cache
def _compiled(config, distribution, sizes, accumulate):
    devices = jax.devices()[:int(np.prod(sizes))]
    mesh, params = sharding.make_mesh(*sizes, devices=devices), _params(distribution)
    state = learner.init(sharding.shard_params(params, sharding.param_shardings(mesh, AXES, params)), config)
    return mesh, state, learner.make_update(_scores, distribution, config, state, accumulate)


def _run(batch, config=ADAM, distribution=BERNOULLI, sizes=(1, 1, 1), accumulate=1, steps=3):
    """Returns the state and the metrics after some updates with one batch."""
    mesh, state, update = _compiled(config, distribution, sizes, accumulate)
    state = jax.tree.map(jnp.copy, state)
    metrics = {}
    for _ in range(steps):
        state, metrics = update(state, sharding.shard_batch(mesh, batch))
    return state, {name: float(value) for name, value in metrics.items()}


@functools.lru_cache
def _table(distribution):
    """Returns the scores of every token under `_params`.  # [V, K]"""
    return np.asarray(_token_scores(_params(distribution), np.arange(VOCAB)[None])[0])


def _close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


def test_loss_is_the_mean_over_tokens_then_over_samples():
    samples = _samples()
    _, metrics = _run(_pack(samples, 3), steps=1)
    logits = _table(BERNOULLI)[:, 0]
    losses = [np.mean(np.logaddexp(0, logits[tokens] * (1 - 2 * reward))) for tokens, reward in samples]
    assert metrics['loss'] == pytest.approx(np.mean(losses), abs=1e-5)


def test_gradient_is_that_of_the_loss():
    batch = _pack(_samples(), 3)

    def loss(params):
        scores = _scores(params, batch)[..., 0]
        return jnp.sum(batch.weights * jax.nn.softplus(scores * (1 - 2 * batch.rewards))) / 12

    grads = jax.jit(jax.grad(loss))(_params())
    state, metrics = _run(batch, steps=1)
    assert metrics['grad_norm'] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    _close(optax.tree.get(state.opt_state, 'mu'), jax.tree.map(lambda grad: 0.1 * grad, grads), 1e-7)


@pytest.mark.parametrize('config', [ADAM, MUON])
def test_packing_and_padding_change_nothing(config):
    samples = _samples()
    wanted, metrics = _run(_pack(samples, 1), config)
    packs = [_pack(samples, 3), _pack(samples, 2)] + [_pack(samples, 12, length=64)] * (config == ADAM)
    for pack in packs:
        packed, other = _run(pack, config)
        _close(packed.params, wanted.params)
        assert other == pytest.approx(metrics, abs=1e-5)


def test_accumulation_changes_nothing():
    # Most rows hold nothing, so micro-batches have unequal numbers of samples.
    batch = _pack(_samples(), 2)
    wanted, metrics = _run(batch)
    state, other = _run(batch, accumulate=8)
    _close(state.params, wanted.params)
    assert other == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize('sizes,accumulate', [((8, 1, 1), 1), ((1, 8, 1), 2), ((2, 2, 2), 2)])
def test_eight_devices_are_equal_to_one(sizes, accumulate):
    batch = _pack(_samples(), 1)
    wanted, metrics = _run(batch)
    state, other = _run(batch, sizes=sizes, accumulate=accumulate)
    _close(sharding.to_host(state.params), sharding.to_host(wanted.params))
    assert other == pytest.approx(metrics, abs=1e-5)
    params = _params()
    places = sharding.param_shardings(sharding.make_mesh(*sizes), AXES, params)
    for tree in (state.params, optax.tree.get(state.opt_state, 'mu'), optax.tree.get(state.opt_state, 'nu')):
        assert jax.tree.all(jax.tree.map(
            lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), tree, places))
    assert state.step.sharding.is_fully_replicated and int(state.step) == 3


def test_one_compile_for_each_shape_and_layout():
    traces = []

    def counted(params, batch):
        traces.append(batch.tokens.shape)
        return params['trunk']['embedding'][batch.tokens] @ params['head']['kernel'].T

    mesh = sharding.make_mesh(2, 2, 2)
    trunk, head = _params()['trunk'], _params()['head']
    params = {'trunk': {'embedding': trunk['embedding']}, 'head': {'kernel': head['kernel']}}
    axes = {'trunk': {'embedding': ('vocab', 'embed')}, 'head': {'kernel': (None, 'embed')}}
    state = learner.init(sharding.shard_params(params, sharding.param_shardings(mesh, axes, params)), ADAM)
    update = learner.make_update(counted, BERNOULLI, ADAM, state)
    predict = learner.make_predict(counted, BERNOULLI)
    for seed in range(4):
        batch = sharding.shard_batch(mesh, _pack(_samples(8, seed), 1))
        state, _ = update(state, batch)
        predict(state.params, batch)
    assert traces == [(16, 16), (16, 16)] and update._cache_size() == predict._cache_size() == 1
    update(state, sharding.shard_batch(mesh, _pack(_samples(8), 2, rows=4)))
    assert traces[2:] == [(4, 16)]


def test_updates_consume_the_state_but_never_the_parameters_it_was_made_from():
    mesh, _, update = _compiled(ADAM, BERNOULLI, (1, 1, 1), 1)
    params = sharding.replicate(mesh, _params())
    state = learner.init(params, ADAM)
    update(state, sharding.shard_batch(mesh, _pack(_samples(), 3)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    _close(params, _params(), 0)


@pytest.mark.parametrize('config', [ADAM, MUON])
def test_weight_decay_spares_biases_and_scales_and_padding_alone_has_no_loss(config):
    state, metrics = _run(_pack([], 1), config, steps=1)
    assert metrics['loss'] == metrics['grad_norm'] == 0

    def check(path, new, old):
        spared = path[-1].key in ('bias', 'scale')
        np.testing.assert_allclose(new, old if spared else old * (1 - 0.01 * 0.5), rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, state.params, _params())


def test_gradients_are_clipped_as_a_whole():
    state, metrics = _run(_pack(_samples(), 3), dataclasses.replace(ADAM, clip_norm=1e-3), steps=1)
    assert metrics['grad_norm'] > 0.1
    assert float(optax.tree.norm(optax.tree.get(state.opt_state, 'mu'))) == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize('schedule,warmup,total,wanted', [
    ('constant', 0, 0, [1, 1, 1, 1]), ('constant', 2, 0, [0.5, 1, 1, 1]),
    ('cosine', 0, 4, [1, 0.853553, 0.5, 0.146447]), ('cosine', 2, 4, [0.5, 1, 1, 0.5])])
def test_learning_rate_follows_its_schedule(schedule, warmup, total, wanted):
    config = optimizers.OptimizerConfig(0.01, schedule=schedule, warmup_steps=warmup, total_steps=total)
    rate = optimizers.learning_rate(config)
    np.testing.assert_allclose([rate(step) for step in range(4)], 0.01 * np.array(wanted), rtol=1e-5)


def test_the_reported_learning_rate_is_the_one_that_is_used():
    config = dataclasses.replace(ADAM, weight_decay=0.0, schedule='cosine', warmup_steps=2, total_steps=4)
    for steps, rate in enumerate([0.005, 0.01, 0.01, 0.005], start=1):
        before, _ = _run(_pack(_samples(), 3), config, steps=steps - 1)
        state, metrics = _run(_pack(_samples(), 3), config, steps=steps)
        # Under a steady gradient Adam's steps are as long as its rate.
        step = abs(float((state.params['head']['bias'] - before.params['head']['bias'])[0]))
        assert metrics['learning_rate'] == pytest.approx(rate) and step == pytest.approx(rate, rel=0.2)


def test_head_learns_at_its_own_rate():
    batch, old = _pack(_samples(), 3), _params()
    plain, _ = _run(batch, steps=1)
    fast, _ = _run(batch, dataclasses.replace(ADAM, head_lr_multiplier=5.0), steps=1)
    _close(fast.params['trunk'], plain.params['trunk'], 0)
    slow_move, fast_move = (jax.tree.map(lambda new, before: new - before, state.params['head'], old['head'])
                            for state in (plain, fast))
    _close(fast_move, jax.tree.map(lambda x: 5 * x, slow_move), 1e-6)


def test_frozen_layers_stay_and_cost_no_moments():
    batch, frozen = _pack(_samples(), 3), ('embedding', 'layers_0')
    state, metrics = _run(batch, dataclasses.replace(ADAM, frozen_layers=1), steps=1)
    old, new = _params()['trunk'], state.params['trunk']
    _close([new[name] for name in frozen], [old[name] for name in frozen], 0)
    assert not np.allclose(new['layers_1']['norm']['scale'], old['layers_1']['norm']['scale'])
    moments = optax.tree.get(state.opt_state, 'mu')['trunk']
    assert not jax.tree.leaves([moments[name] for name in frozen]) and jax.tree.leaves(moments['layers_1'])
    assert metrics['grad_norm'] < _run(batch, steps=1)[1]['grad_norm']
    with pytest.raises(ValueError, match='frozen_layers is 3, but the trunk has 2 layers'):
        learner.init(_params(), dataclasses.replace(ADAM, frozen_layers=3))


def test_muon_orthogonalises_the_matrices_of_layers_and_nothing_else():
    batch, old = _pack(_samples(48), 3), _params()
    (state, _), (adam, _) = _run(batch, MUON, steps=1), _run(batch, steps=1)
    new, before = state.params['trunk']['layers_0']['attention'], old['trunk']['layers_0']['attention']
    for name, shape in (('query', (WIDTH, 8)), ('output', (8, WIDTH))):
        decayed = before[name]['kernel'] * (1 - 0.01 * 0.5)
        change = np.asarray(new[name]['kernel'] - decayed).reshape(shape)
        values = np.linalg.svd(change, compute_uv=False)
        # Adam's steps, and Muon's with heads taken for inputs, have one or two.
        assert np.sum(values > 0.5 * values[0]) >= 5
        assert np.sqrt(np.mean(change ** 2)) == pytest.approx(0.2 * 0.01, rel=0.4)
    other = adam.params['trunk']
    _close(new['query']['bias'], other['layers_0']['attention']['query']['bias'], 1e-7)
    _close(state.params['trunk']['embedding'], other['embedding'], 1e-7)
    _close(state.params['head'], adam.params['head'], 1e-7)


def test_accuracy_weighs_as_the_loss_and_is_of_binary_rewards_only():
    samples = _samples()
    _, metrics = _run(_pack(samples, 3), steps=1)
    logits = _table(BERNOULLI)[:, 0]
    right = [np.mean((logits[tokens] > 0) == (reward == 1)) for tokens, reward in samples]
    assert 0 < metrics['accuracy'] < 1
    assert metrics['accuracy'] == pytest.approx(np.mean(right), abs=1e-6)
    _, metrics = _run(_pack(_samples(rewards=(0.0, 0.5)), 3), steps=1)
    assert np.isnan(metrics['accuracy']) and np.isfinite(metrics['loss'])


def test_fit_finds_the_share_of_successes_of_each_token():
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.2, 0.8, VOCAB)
    tokens = rng.integers(0, VOCAB, 1000)
    samples = [([token], float(rng.uniform() < chances[token])) for token in tokens]
    config = dataclasses.replace(ADAM, weight_decay=0.0, learning_rate=0.03)
    state, _ = _run(_pack(samples, 63, length=64), config, steps=400)
    shares = [np.mean([reward for (token,), reward in samples if token == v]) for v in range(VOCAB)]
    fitted = BERNOULLI.mean(_token_scores(state.params, np.arange(VOCAB)[None]))[0]
    np.testing.assert_allclose(fitted, shares, atol=0.02)


@pytest.mark.parametrize('distribution,rewards', [(BERNOULLI, (0.0, 1.0)), (CATEGORICAL, (-1.0, 0.3, 1.0))])
def test_evaluation_is_a_loop_over_all_batches(distribution, rewards):
    mesh = sharding.make_mesh(2, 2, 2)
    parts = [_samples(14, 14, rewards), _samples(7, 7, rewards)]
    # Example 3 has the first and the last row of the first batch, and the first of the second.
    examples = [[3, 4, 5, 6, 7, 8, 3], [3, 9, 10, 11]]
    packs = [_pack(samples, 2, rows=8, examples=ids) for samples, ids in zip(parts, examples)]
    predict = learner.make_predict(_scores, distribution, (0.1, np.inf))
    found = learner.evaluate_loss(
        predict, sharding.replicate(mesh, _params(distribution)),
        (sharding.shard_batch(mesh, pack) for pack in packs), distribution)
    scores = _table(distribution)
    means = np.asarray(distribution.mean(scores))
    log_weights = np.asarray(distribution.log_weight(scores, jnp.full(VOCAB, 0.1)))
    loss_of = {reward: np.asarray(distribution.loss(scores, jnp.full(VOCAB, reward))) for reward in rewards}
    span = distribution.v_max - distribution.v_min
    losses, briers, rows = [], [], []
    for samples, ids in zip(parts, examples):
        for i, (tokens, reward) in enumerate(samples):
            losses.append(np.mean(loss_of[reward][tokens]))
            briers.append(np.mean(((means[tokens] - reward) / span) ** 2))
            rows += [(loss_of[reward][token], means[token], reward, t, 1 / len(tokens), ids[i // 2],
                      log_weights[token], 0.0) for t, token in enumerate(tokens)]
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.brier == pytest.approx(np.mean(briers), abs=1e-5)
    assert found.num_samples == pytest.approx(21)
    assert np.isnan(found.accuracy) == (len(rewards) == 3)
    out = found.predictions
    table = np.column_stack(
        [out.loss, out.mean, out.reward, out.position, out.weight, out.example, out.log_weight])
    np.testing.assert_allclose(table, np.array(rows, float), atol=1e-4)


def test_evaluation_of_nothing_is_refused():
    predict = learner.make_predict(_scores, BERNOULLI)
    for batches in ([], [_pack([], 1, rows=2)]):
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
    with pytest.raises(ValueError, match='16 rows does not split into accumulate=3'):
        _run(_pack(_samples(), 2), accumulate=3)
    with pytest.raises(ValueError, match='accumulate is 0'):
        _run(_pack(_samples(), 2), accumulate=0)
