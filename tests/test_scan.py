"""Layers scanned over a stack of parameters are the layers one by one: forwards, caches, gradients, files, devices."""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import config_rules, learner, optimizers, sharding
from qsharp_jax.models import attention, networks, pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import export
from tests import tiny
from tests.test_transformer import FAMILIES, make_params, make_tokens, plain_hidden, quick_jit

NAMES = [*FAMILIES, 'restarted']
SHAPES = {**FAMILIES, 'restarted': dataclasses.replace(FAMILIES['llama'], restart_layer=1, remat=True)}
family = pytest.mark.parametrize('name', NAMES)


def scanned(config):
    return dataclasses.replace(config, scan_layers=True)


def both(name):
    """A shape and parameters of it, layer by layer and stacked."""
    config = SHAPES[name]
    params = make_params(config)
    return (config, params), (scanned(config), transformer.stack_layers(params, scanned(config)))


def close(first, second, tolerance=1e-5):
    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(a).max()))

    jax.tree.map(compare, first, second)


@family
def test_parameters_and_axes_are_those_of_the_layers(name):
    (config, params), (stacked, stack) = both(name)
    shapes = transformer.param_shapes(stacked)
    assert jax.tree.map(jnp.shape, stack) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    kernel = ('attention', 'query', 'kernel')
    axes = [functools.reduce(lambda tree, key: tree[key], (part, *kernel), transformer.logical_axes(shape))
            for shape, part in ((config, 'layers_0'), (stacked, 'layers'))]
    assert axes[1] == ('layers', *axes[0])
    drawn = [transformer.init_params(jax.random.key(3), shape) for shape in (config, stacked)]
    jax.tree.map(np.testing.assert_array_equal, transformer.stack_layers(drawn[0], stacked), drawn[1])
    jax.tree.map(np.testing.assert_array_equal, transformer.separate_layers(stack, stacked), params)


@family
def test_forward_and_gradients(name):
    one, other = both(name)
    tokens = make_tokens((2, 7))
    pull = jax.random.normal(jax.random.key(1), (2, 7, one[0].width))

    def total(config, params):
        return jnp.sum(pull * plain_hidden(config, params, tokens))

    assert abs(total(*one)) > 1
    found = [quick_jit(jax.grad(total, argnums=1), static_argnums=0)(*network) for network in (one, other)]
    close(transformer.stack_layers(found[0], other[0]), found[1])
    close(plain_hidden(*one, tokens), plain_hidden(*other, tokens))


@family
def test_prefill_and_ragged_decode(name):
    tokens, lengths = make_tokens((3, 9)), jnp.array([9, 4, 1])

    def written(config, params):
        reference = networks.reference(config)
        cache = reference.prefill(params, tokens[:, :4], jnp.full(3, 4), reference.init_cache(3, 16), 0)
        cache = reference.prefill(params, tokens[:, 4:], lengths - 4, cache, 4)
        first, cache = reference.step(params, tokens[:, 0], lengths, cache)
        second, cache = reference.step(params, tokens[:, 1], lengths + 1, cache)
        return (first, second), cache

    one, other = (quick_jit(written, static_argnums=0)(*network) for network in both(name))
    close(one[0], other[0])
    close(jnp.stack(one[1].keys, axis=1), other[1].keys[0])
    close(jnp.stack(one[1].values, axis=1).swapaxes(-1, -2), other[1].values[0])


@pytest.mark.parametrize('config', [
    value_lib.ValueConfig(num_scores=1, init='truncate', layers=1, head_init='normal'),
    value_lib.ValueConfig(num_scores=2, init='reference', kind='q', head_init='lm_head'),
    value_lib.ValueConfig(num_scores=1, init='reference', extra_layers=1, extra_input='restart', head_init='normal'),
    value_lib.ValueConfig(num_scores=1, init='scratch', layers=3, head_init='normal'),
], ids=['truncated', 'q', 'extra', 'scratch'])
def test_value_network_starts_alike_from_either_kind_of_reference(config):
    (shape, params), (stacked, stack) = both('llama')
    key = jax.random.key(2)
    expected = value_lib.init_value_params(key, config, params, shape)
    jax.tree.map(np.testing.assert_array_equal, value_lib.init_value_params(key, config, stack, shape), expected)
    trunk = value_lib.trunk_config(config, stacked)
    for base in (params, stack):
        found = value_lib.init_value_params(key, config, base, stacked)
        jax.tree.map(np.testing.assert_array_equal, found,
                     {**expected, 'trunk': transformer.stack_layers(expected['trunk'], trunk)})
    shapes = jax.tree.map(lambda leaf: leaf.shape, found)
    axes = jax.tree.map(len, value_lib.logical_axes(config, stacked), is_leaf=lambda node: isinstance(node, tuple))
    assert jax.tree.map(len, shapes, is_leaf=lambda node: isinstance(node, tuple)) == axes


def test_eight_devices_hold_and_compute_what_one_does():
    (shape, params), (stacked, stack) = both('llama')
    shape, stacked = (dataclasses.replace(config, vocab_size=40) for config in (shape, stacked))
    mesh = sharding.make_mesh(2, 2, 2)
    places = sharding.param_shardings(mesh, transformer.logical_axes(stacked), stack)
    placed = sharding.shard_params(stack, places)
    tokens = np.asarray(make_tokens((4, 6)))
    grad = jax.jit(jax.grad(lambda params, tokens: jnp.sum(plain_hidden(stacked, params, tokens) ** 2)))
    close(grad(stack, tokens), grad(placed, sharding.shard_batch(mesh, tokens)), 1e-4)

    # A cache has its heads where they are computed.
    @jax.jit
    def filled(params, tokens):
        reference = networks.reference(stacked)
        cache = reference.prefill(params, tokens, jnp.full(4, 6), reference.init_cache(4, 8), 0)
        return sharding.constrain_rows(cache, tokens)

    cache = filled(placed, sharding.shard_batch(mesh, tokens))
    assert {shard.data.shape for shard in cache.keys[0].addressable_shards} == {(1, 2, 1, 6, 8)}
    reference = networks.reference(shape)
    one = reference.prefill(params, tokens, jnp.full(4, 6), reference.init_cache(4, 8), 0)
    close(jnp.stack(one.values, axis=1).swapaxes(-1, -2), cache.values[0])


@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2)])
def test_stacks_are_filled_in_place_and_written_out_again(sizes, tmp_path: Path):
    config = dataclasses.replace(FAMILIES['llama'], width=24)
    params = make_params(config)
    export.write_model(tmp_path / 'one', config, params)
    file = pretrained.open_checkpoint(tmp_path / 'one')
    stacked = scanned(file.config)
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:int(np.prod(sizes))])
    places = sharding.param_shardings(mesh, transformer.logical_axes(stacked), transformer.param_shapes(stacked))
    stack = pretrained.load_params(file, places, np.dtype('float32'))
    jax.tree.map(np.testing.assert_array_equal, stack, transformer.stack_layers(params, stacked))
    assert all(jax.tree.leaves(jax.tree.map(
        lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), stack, places)))
    export.write_model(tmp_path / 'two', stacked, stack)
    one, two = ((tmp_path / folder / 'model.safetensors').read_bytes() for folder in ('one', 'two'))
    assert one == two


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_update_of_a_stack_is_that_of_its_layers(optimizer):
    (config, params), (stacked, _) = both('llama')
    optimizer = optimizers.make(optimizers.OptimizerConfig(learning_rate=0.1, optimizer=optimizer))
    grads = make_params(config, seed=7)

    @jax.jit
    def updated(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    found = [updated(transformer.stack_layers(params, shape), transformer.stack_layers(grads, shape))
             for shape in (config, stacked)]
    close(transformer.stack_layers(found[0], stacked), found[1])


def test_part_of_a_stack_cannot_be_frozen(tmp_path: Path):
    (_, _), (_, stack) = both('llama')
    with pytest.raises(ValueError, match='frozen_layers is 1, and the layers are stacked'):
        learner.init({'trunk': stack}, optimizers.OptimizerConfig(learning_rate=0.1, frozen_layers=1))
    with pytest.raises(ValueError, match='config.value.scan_layers is True: stacked layers are trained together'):
        tiny.config(tmp_path, fit__frozen_layers=1, value__scan_layers=True)
    assert config_rules.CHOICES['reference.scan_layers'] == ('auto', 'yes', 'no')


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_rows_that_attend_by_parts_see_what_all_see_at_once(name, stacked, monkeypatch):
    config, params = both(name)[stacked]
    tokens, lengths = make_tokens((4, 9)), jnp.array([9, 4, 1, 6])

    def written(params):
        reference = networks.reference(config)
        cache = reference.prefill(params, tokens, lengths, reference.init_cache(4, 16), 0)
        return reference.step(params, tokens[:, 0], lengths, cache)

    def pulled(params):
        return jax.grad(lambda params: jnp.sum(plain_hidden(config, params, tokens) ** 2))(params)

    expected = quick_jit(written)(params), quick_jit(pulled)(params)
    calls = []
    attend = attention.attend
    monkeypatch.setattr(attention, 'attend', lambda query, *others: calls.append(len(query)) or attend(query, *others))
    for limit in ('_SCORES', '_CACHED_SCORES'):
        monkeypatch.setattr(attention, limit, 0)
    monkeypatch.setattr(sharding, '_PART', 1)
    close(quick_jit(lambda params: written(params))(params), expected[0])
    jax.clear_caches()  # traced without the limits
    close(jax.jit(pulled)(params), expected[1])
    assert set(calls) == {1}
