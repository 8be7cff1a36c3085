"""The decoder: cache, masks, gradients and every switch."""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models import layers, transformer
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

TINY = TransformerConfig(
    vocab_size=40, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=20, max_positions=32)
GPT2 = dataclasses.replace(
    TINY, kv_heads=4, norm='layernorm', positions='learned', activation='gelu_tanh', gated=False, qkv_bias=True,
    out_bias=True, mlp_bias=True)
QWEN3 = dataclasses.replace(TINY, kv_heads=1, head_dim=8, qk_norm=True, tied_embeddings=False)
# The window is shorter than the sequences of the tests, and two tokens of one position may lie in it.
GEMMA3 = dataclasses.replace(
    TINY, activation='gelu_tanh', qk_norm=True, norm_offset=1.0, output_norms=True, embedding_scale=24 ** 0.5,
    query_scale=0.3, logit_cap=5.0, layer_windows=(3, 0), rope_base=1e6, local_rope_base=100.0)
FAMILIES = {'llama': TINY, 'gpt2': GPT2, 'qwen3': QWEN3, 'gemma3': GEMMA3}

# Tiny networks compile longer than they run.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

family = pytest.mark.parametrize('config', FAMILIES.values(), ids=FAMILIES)


def make_params(config, seed=0):
    """Parameters far from their initial values, so that every one of them matters."""
    return shaken(jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0)), seed)


def shaken(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 1), leaf.dtype),
                        shapes)


def make_tokens(shape, seed=5, vocab_size=TINY.vocab_size):
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


def plain_hidden(config, params, tokens):
    return transformer.hidden_states(
        config, params, tokens, positions_of(tokens), transformer.causal_mask(tokens.shape[1]))


full_hidden = quick_jit(plain_hidden, static_argnums=0)


@functools.partial(quick_jit, static_argnums=0)
def prefill(config, params, tokens, cache):
    length = tokens.shape[1]
    _, cache = transformer.extend(
        config, params, cache, None, tokens, positions_of(tokens), transformer.causal_mask(length), commit=length)
    return cache


@functools.partial(quick_jit, static_argnums=0)
def decode(config, params, cache, length, token):
    return transformer.extend(
        config, params, cache, length, token[:, None], length[:, None], jnp.ones((1, 1), bool), commit=1)


@functools.partial(quick_jit, static_argnums=0)
def hidden_at(config, params, tokens, positions):
    return transformer.hidden_states(
        config, params, tokens, positions, transformer.causal_mask(tokens.shape[1]))


@family
def test_cached_decode_equals_full_forward_with_ragged_lengths(config):
    params, tokens = make_params(config), make_tokens((3, 12))
    length = jnp.array([5, 2, 3])
    expected = np.asarray(full_hidden(config, params, tokens))
    padded = jnp.where(jnp.arange(5)[None] < length[:, None], tokens[:, :5], 7)
    cache = prefill(config, params, padded, transformer.init_cache(config, 3, 14))
    rows = jnp.arange(3)
    for _ in range(6):
        hidden, cache = decode(config, params, cache, length, tokens[rows, length])
        np.testing.assert_allclose(hidden[:, 0], expected[rows, length], atol=2e-5, rtol=0)
        length = length + 1


def test_several_tokens_can_be_committed_at_once():
    config = TINY
    params, tokens = make_params(config), make_tokens((2, 9))
    expected = np.asarray(full_hidden(config, params, tokens))
    length, rows = jnp.array([4, 2]), jnp.arange(2)[:, None]
    cache = prefill(config, params, tokens[:, :4], transformer.init_cache(config, 2, 10))
    places = length[:, None] + jnp.arange(3)[None]
    hidden, cache = quick_jit(transformer.extend, static_argnums=(0, 7))(
        config, params, cache, length, tokens[rows, places], places, transformer.causal_mask(3), 2)
    np.testing.assert_allclose(hidden, expected[rows, places], atol=2e-5, rtol=0)
    # Only two of the three were kept: the next one goes where the third was.
    hidden, _ = decode(config, params, cache, length + 2, tokens[rows[:, 0], length + 2])
    np.testing.assert_allclose(hidden[:, 0], expected[rows[:, 0], length + 2], atol=2e-5, rtol=0)


@family
def test_causal_by_gradients(config):
    params = make_params(config)
    tokens = jnp.arange(6)[None]  # distinct, so that a row of the embedding table stands for one place

    @quick_jit
    def slope(table, place):
        def state(table):
            return jnp.sum(jnp.sin(plain_hidden(config, {**params, 'embedding': table}, tokens)[0, place]))
        return jax.grad(state)(table)

    for place in range(6):
        moved = np.abs(slope(params['embedding'], place))[:6].sum(axis=1)
        assert np.all(moved[:place + 1] > 0)
        assert np.all(moved[place + 1:] == 0)


def test_rewound_row_equals_fresh_one():
    params, first, second = make_params(TINY), make_tokens((2, 8)), make_tokens((2, 8), seed=6)
    start = jnp.array([3, 2])
    begin = prefill(TINY, params, first[:, :3], transformer.init_cache(TINY, 2, 12))
    used = begin
    for step in range(5):
        _, used = decode(TINY, params, used, start + step, first[:, 3 + step])
    fresh = begin
    for step in range(4):
        rewound, used = decode(TINY, params, used, start + step, second[:, step])
        expected, fresh = decode(TINY, params, fresh, start + step, second[:, step])
        np.testing.assert_array_equal(rewound, expected)


def test_slots_beyond_the_length_are_never_read():
    params, tokens, length = make_params(TINY), make_tokens((2, 4)), jnp.array([4, 2])
    cache = prefill(TINY, params, tokens, transformer.init_cache(TINY, 2, 6))
    used = jnp.arange(6)[None] < length[:, None]
    dirty = transformer.KVCache(
        keys=tuple(jnp.where(used[:, None, None, :], key, 1e4) for key in cache.keys),
        values=tuple(jnp.where(used[:, None, :, None], value, -1e4) for value in cache.values))
    token = jnp.array([1, 2])
    np.testing.assert_array_equal(
        decode(TINY, params, cache, length, token)[0], decode(TINY, params, dirty, length, token)[0])


def test_write_beyond_the_capacity_changes_nothing():
    params, tokens = make_params(TINY), make_tokens((2, 4))
    cache = prefill(TINY, params, tokens, transformer.init_cache(TINY, 2, 4))
    _, after = decode(TINY, params, cache, jnp.array([4, 3]), jnp.array([1, 2]))
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after)):
        np.testing.assert_array_equal(old[0], new[0])
        assert np.any(old[1] != new[1])


def test_packed_samples_are_isolated():
    """Two samples behind one prompt: each sees the prompt and itself, as if it were alone."""
    params, prompt, first, second = make_params(TINY), 3, 4, 2
    tokens = make_tokens((1, 9))
    segment = np.array([0] * prompt + [1] * first + [2] * second)
    positions = np.concatenate([np.arange(prompt), prompt + np.arange(first), prompt + np.arange(second)])
    sees = (segment[:, None] == segment[None]) | (segment[None] == 0)
    mask = jnp.asarray(sees & (positions[None] <= positions[:, None]))

    @quick_jit
    def run(tokens):
        return transformer.hidden_states(TINY, params, tokens, jnp.asarray(positions)[None], mask[None])[0]

    hidden = np.asarray(run(tokens))
    for number, size in ((1, first), (2, second)):
        alone = tokens[0, (segment == 0) | (segment == number)]
        alone = jnp.zeros((1, 7), jnp.int32).at[0, :len(alone)].set(alone)
        np.testing.assert_allclose(
            hidden[segment == number], full_hidden(TINY, params, alone)[0, prompt:prompt + size], atol=2e-5, rtol=0)
        other = (tokens + 1) % TINY.vocab_size
        changed = np.asarray(run(jnp.where(jnp.asarray(segment == number)[None], other, tokens)))
        np.testing.assert_array_equal(hidden[segment != number], changed[segment != number])
        assert np.all(np.any(hidden[segment == number] != changed[segment == number], axis=1))


def test_batch_equals_single_rows():
    params, tokens = make_params(TINY), make_tokens((2, 7))
    together = full_hidden(TINY, params, tokens)
    for row in range(2):
        np.testing.assert_allclose(together[row], full_hidden(TINY, params, tokens[row:row + 1])[0], atol=1e-5, rtol=0)


def test_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    params, tokens = make_params(TINY), make_tokens((2, 5))
    mask = jnp.broadcast_to(transformer.causal_mask(5)[None], (2, 5, 5)).at[1].set(False)

    def total(params):
        return jnp.sum(jnp.square(transformer.hidden_states(TINY, params, tokens, positions_of(tokens), mask)))

    value, gradient = quick_jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


SWITCHES = {
    'norm': (TINY, {'norm': 'layernorm'}),
    'norm_eps': (TINY, {'norm_eps': 1.0}),
    'positions': (TINY, {'positions': 'learned'}),
    'rope_base': (TINY, {'rope_base': 50.0}),
    'rope_linear': (TINY, {'rope_scaling': RopeScaling('linear', 4.0)}),
    'rope_llama3': (TINY, {'rope_scaling': RopeScaling('llama3', 4.0, original_max_positions=32)}),
    'activation': (TINY, {'activation': 'gelu_tanh'}),
    'gated': (TINY, {'gated': False}),
    'qkv_bias': (TINY, {'qkv_bias': True}),
    'out_bias': (TINY, {'out_bias': True}),
    'mlp_bias': (TINY, {'mlp_bias': True}),
    'tied_embeddings': (TINY, {'tied_embeddings': False}),
    'qk_norm': (TINY, {'qk_norm': True}),
    'norm_offset': (TINY, {'norm_offset': 1.0}),
    'output_norms': (TINY, {'output_norms': True}),
    'embedding_scale': (TINY, {'embedding_scale': 3.0}),
    'query_scale': (TINY, {'query_scale': 1.0}),
    'logit_cap': (TINY, {'logit_cap': 2.0}),
    'layer_windows': (TINY, {'layer_windows': (2, 0)}),
    'local_rope_base': (dataclasses.replace(TINY, layer_windows=(3, 3)), {'local_rope_base': 50.0}),
    'rope_factors': (TINY, {'rope_scaling': RopeScaling('factors', factors=(1.0, 2.0, 4.0))}),
}


@functools.partial(quick_jit, static_argnums=0)
def all_logits(config, params, tokens):
    return transformer.logits(config, params, plain_hidden(config, params, tokens))


def patterned(config):
    """Parameters in which only a switch can make a difference: every leaf is a fixed pattern of its shape."""
    shapes = jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size) * 1.7 + 0.5).reshape(leaf.shape), shapes)


@pytest.mark.parametrize('name', SWITCHES)
def test_every_switch_does_something(name):
    config, change = SWITCHES[name]
    tokens = make_tokens((2, 6))

    def run(config):
        params = patterned(config)
        if 'head' in params:
            params['head'] = params['head'] + 0.5
        return np.asarray(all_logits(config, params, tokens))

    assert np.abs(run(config) - run(dataclasses.replace(config, **change))).max() > 1e-3


@family
def test_biases_exist_where_the_switches_say(config):
    block = make_params(config)['layers_0']
    assert ('bias' in block['attention']['query']) == config.qkv_bias
    assert ('bias' in block['attention']['output']) == config.out_bias
    assert ('bias' in block['mlp']['down']) == config.mlp_bias
    assert ('gate' in block['mlp']) == config.gated


def test_linear_rope_scaling_stretches_positions():
    stretched = dataclasses.replace(TINY, rope_scaling=RopeScaling('linear', 3.0))
    params, tokens = make_params(TINY), make_tokens((2, 6))
    np.testing.assert_allclose(
        hidden_at(stretched, params, tokens, 3 * positions_of(tokens)), full_hidden(TINY, params, tokens),
        atol=1e-5, rtol=0)


def test_llama3_rope_scaling_keeps_fast_waves_and_stretches_slow_ones():
    config = dataclasses.replace(TINY, head_dim=64, rope_base=5e5)
    plain = layers.rope_frequencies(config)
    scaled = layers.rope_frequencies(dataclasses.replace(
        config, rope_scaling=RopeScaling('llama3', 8.0, 1.0, 4.0, original_max_positions=8192)))
    wave = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8, rtol=1e-6)
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_factors_divide_each_frequency():
    plain = layers.rope_frequencies(TINY)
    scaled = layers.rope_frequencies(
        dataclasses.replace(TINY, rope_scaling=RopeScaling('factors', factors=(1.0, 2.0, 8.0))))
    np.testing.assert_allclose(scaled * np.array([1.0, 2.0, 8.0]), plain, rtol=1e-6)


@pytest.mark.parametrize('windows, reach', [((3, 0), 9), ((3, 3), 5), ((1, 2), 2), ((4, 1), 4)])
def test_window_is_the_number_of_positions_that_a_token_sees(windows, reach):
    """One layer sees `window` positions, its own among them; layers add up."""
    config = dataclasses.replace(TINY, layer_windows=windows)
    params, tokens = make_params(config), jnp.arange(9)[None]
    expected = np.asarray(full_hidden(config, params, tokens))[0, 8]
    for place in range(9):
        changed = np.asarray(full_hidden(config, params, tokens.at[0, place].set(39)))[0, 8]
        assert np.array_equal(changed, expected) == (place <= 8 - reach), place


def test_shifting_rotary_positions_changes_nothing():
    params, tokens = make_params(TINY), make_tokens((2, 6))
    np.testing.assert_allclose(
        hidden_at(TINY, params, tokens, positions_of(tokens) + 11), full_hidden(TINY, params, tokens),
        atol=2e-5, rtol=0)


def test_remat_keeps_values_and_gradients():
    params, tokens = make_params(TINY), make_tokens((2, 6))

    def loss(params, config):
        return jnp.sum(jnp.sin(plain_hidden(config, params, tokens)))

    again = dataclasses.replace(TINY, remat=True)
    slope = quick_jit(jax.value_and_grad(loss), static_argnums=1)
    plain, recomputed = (slope(params, config) for config in (TINY, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), plain, recomputed)
    assert 'remat' in str(jax.make_jaxpr(lambda params: loss(params, again))(params))


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones():
    half = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    params, tokens = make_params(TINY), make_tokens((2, 6))
    hidden = full_hidden(half, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert transformer.init_cache(half, 1, 4).keys[0].dtype == jnp.bfloat16
    logits = transformer.logits(half, params, hidden)
    exact = transformer.logits(TINY, params, full_hidden(TINY, params, tokens))
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.05


def test_fresh_weights_keep_the_size_of_what_goes_through_them():
    wide = dataclasses.replace(TINY, width=64, mlp_width=256, layers=8)
    block = jax.jit(transformer.init_params, static_argnums=1)(jax.random.key(0), wide)['layers_3']
    deep = np.sqrt(2 * wide.layers)
    for part, expected in (
            (block['attention']['query'], 64 ** -0.5), (block['attention']['output'], 24 ** -0.5 / deep),
            (block['mlp']['up'], 64 ** -0.5), (block['mlp']['down'], 256 ** -0.5 / deep)):
        np.testing.assert_allclose(np.std(part['kernel']), expected, rtol=0.1)
    assert np.all(block['mlp_norm']['scale'] == 1)


@family
def test_logical_axes_name_every_dimension(config):
    params = make_params(config)
    axes = transformer.logical_axes(config)
    names = {None, 'vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp'}

    def check(leaf, axis):
        assert len(axis) == leaf.ndim
        assert set(axis) <= names

    jax.tree.map(check, params, axes)
    assert axes['layers_0']['attention']['key']['kernel'] == ('embed', 'kv_heads', 'head_dim')
    assert transformer.count_params(params) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('change, words', [
    ({'layers': 0}, 'layers is 0'),
    ({'kv_heads': 3}, r'heads \(4\) must be a multiple of kv_heads \(3\)'),
    ({'norm': 'batchnorm'}, 'rmsnorm, layernorm'),
    ({'positions': 'alibi'}, 'rope, learned'),
    ({'activation': 'relu'}, 'silu, gelu_tanh'),
    ({'head_dim': 5}, 'even head_dim'),
    ({'positions': 'learned', 'rope_scaling': RopeScaling('linear', 2.0)}, "needs positions='rope'"),
    ({'rope_scaling': RopeScaling('factors', factors=(1.0,))}, 'factors has 1 numbers.* = 3 of them'),
    ({'rope_scaling': RopeScaling('linear', 2.0, factors=(1.0,))}, 'other kinds none'),
    ({'layer_windows': (3,)}, 'layer_windows has 1 numbers.*2 layers'),
    ({'layer_windows': (3, -1)}, 'layer_windows has -1'),
])
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match='linear, llama3'):
        RopeScaling('yarn', 2.0)


@pytest.mark.parametrize('capacity', [0, TINY.max_positions + 1])
def test_impossible_cache_is_refused(capacity):
    with pytest.raises(ValueError, match=f'{capacity} slots.*1 to {TINY.max_positions}'):
        transformer.init_cache(TINY, 1, capacity)


def test_too_many_tokens_to_commit_are_refused():
    params, tokens = make_params(TINY), make_tokens((1, 4))
    with pytest.raises(ValueError, match='do not fit into a cache of 3 slots'):
        prefill(TINY, params, tokens, transformer.init_cache(TINY, 1, 3))
    with pytest.raises(ValueError, match='only 4 new tokens'):
        transformer.extend(TINY, params, transformer.init_cache(TINY, 1, 8), None, tokens, positions_of(tokens),
                           transformer.causal_mask(4), commit=5)
