"""The mesh and the placement of arrays, on eight simulated devices and on two processes."""
from __future__ import annotations

import warnings

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from qsharp_jax import sharding
from tests.processes import run_two


@pytest.mark.parametrize('sizes,shape', [
    ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((1, 2, 4), (1, 2, 4))])
def test_mesh_gives_the_rest_of_the_devices_to_the_free_axis(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(('data', 'fsdp', 'tensor'), shape))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


def test_mesh_of_one_device():
    mesh = sharding.make_mesh(devices=jax.devices()[3:4])
    assert mesh.size == 1 and mesh.devices.item() == jax.devices()[3]


@pytest.mark.parametrize('sizes,words', [
    ((3, 1, 1), 'data=3, fsdp=1, tensor=1 takes 3 devices, and there are 8'),
    ((-1, 3, 1), 'takes a multiple of 3 devices, and there are 8'),
    ((2, 2, 1), 'takes 4 devices'), ((0, 1, 1), 'at least 1, or -1'),
    ((-1, -1, 1), 'only one size may be -1')])
def test_mesh_that_does_not_fit_is_refused_in_words(sizes, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(*sizes)


def test_params_are_split_as_the_table_says():
    mesh = sharding.make_mesh(2, 2, 2)
    axes = {'table': ('vocab', 'embed'), 'norm': (None,), 'query': PartitionSpec('embed', 'heads'),
            'free': None}
    shapes = {'table': (16, 8), 'norm': (8,), 'query': (8, 4, 2), 'free': (3, 3)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda place: place.spec, sharding.param_shardings(mesh, axes, shapes))
    assert specs == {'table': PartitionSpec('tensor', 'fsdp'), 'norm': PartitionSpec(),
                     'query': PartitionSpec('fsdp', 'tensor'), 'free': PartitionSpec()}


def test_an_axis_that_does_not_divide_is_kept_whole_and_said_once():
    mesh = sharding.make_mesh(1, 1, 8)
    shapes = [jax.ShapeDtypeStruct((6, 3), jnp.float32)] * 2
    axes = [('embed', 'kv_heads')] * 2
    with pytest.warns(UserWarning, match="'kv_heads' of size 3 .* does not split over tensor=8") as caught:
        places = sharding.param_shardings(mesh, axes, shapes)
    assert len(caught) == 1
    assert all(place.is_fully_replicated for place in places)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sharding.param_shardings(mesh, axes, shapes)


@pytest.mark.parametrize('axes,shape,words', [
    (('vocab', 'mlp'), (4, 4), "two of them are split over the mesh axis 'tensor'"),
    (('color',), (4,), "names the logical axis 'color'; known ones: vocab"),
    (('embed', 'mlp'), (4,), 'has 1 axes .* but 2 names')])
def test_wrong_names_are_refused_on_any_mesh(axes, shape, words):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=words):
        sharding.param_shardings(mesh, {'w': axes}, {'w': jax.ShapeDtypeStruct(shape, jnp.float32)})


def test_params_are_born_in_pieces_with_the_values_of_one_device():
    def init(key):
        # Whole numbers: XLA may round a normal draw otherwise for another shape of the shard.
        return {'w': jax.random.randint(key, (16, 8), 0, 1000).astype(jnp.float32), 'b': jnp.zeros((8,))}

    axes = {'w': ('vocab', 'embed'), 'b': ('embed',)}
    born = sharding.born_sharded(init, sharding.make_mesh(2, 2, 2), axes)(jax.random.key(1))
    assert {shard.data.shape for shard in born['w'].addressable_shards} == {(8, 4)}
    assert {shard.data.shape for shard in born['b'].addressable_shards} == {(4,)}
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    single = sharding.born_sharded(init, alone, axes)(jax.random.key(1))
    np.testing.assert_array_equal(born['w'], single['w'])
    np.testing.assert_array_equal(single['w'], init(jax.random.key(1))['w'])


def test_batches_are_split_by_rows_and_come_back_whole():
    mesh = sharding.make_mesh(2, 2, 2)
    batch = {'x': np.arange(24).reshape(8, 3), 'n': np.int32(5), 'y': np.arange(8.0)}
    placed = sharding.shard_batch(mesh, batch)
    for shard in placed['x'].addressable_shards:
        assert shard.data.shape == (2, 3)
        np.testing.assert_array_equal(shard.data, batch['x'][shard.index])
    assert placed['n'].is_fully_replicated
    back = sharding.to_host(placed)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(back))
    jax.tree.map(np.testing.assert_array_equal, back, batch)
    everywhere = sharding.replicate(mesh, batch)
    assert all(leaf.is_fully_replicated and len(leaf.addressable_shards) == 8
               for leaf in jax.tree.leaves(everywhere))


def test_rows_that_do_not_split_are_refused_or_padded():
    mesh = sharding.make_mesh(2, 2, 2)
    assert [sharding.pad_rows(n, mesh) for n in (1, 4, 5)] == [4, 4, 8]
    sharding.check_divisible(8, mesh)
    with pytest.raises(ValueError, match=r'fit.batch_size 6 .* 4 groups .* such as 4 or 8'):
        sharding.check_divisible(6, mesh, 'fit.batch_size')
    with pytest.raises(ValueError, match='multiple of 4, such as 4, or'):
        sharding.shard_batch(mesh, {'x': np.zeros((3, 2))})


def test_moments_live_beside_their_parameter():
    mesh = sharding.make_mesh(1, 4, 2)
    axes = {'a': {'w': ('embed', 'mlp')}, 'w': ('embed',)}
    params = {'a': {'w': np.zeros((4, 2))}, 'w': np.zeros((8,))}
    params = sharding.shard_params(params, sharding.param_shardings(mesh, axes, params))
    state = ({'mu': params}, jnp.zeros(()), {'w': jnp.zeros((3,))})
    places = sharding.beside_params(params, state)
    assert places[0]['mu']['a']['w'].spec == PartitionSpec('fsdp', 'tensor')
    assert places[0]['mu']['w'].spec == PartitionSpec('fsdp')
    assert places[1].is_fully_replicated and places[2]['w'].is_fully_replicated
    targets = sharding.abstract(params)
    assert targets['a']['w'].sharding == params['a']['w'].sharding and targets['w'].shape == (8,)


def test_bytes_per_device_are_those_of_its_pieces():
    mesh = sharding.make_mesh(2, 2, 2)
    axes = {'w': ('vocab', 'embed'), 'b': ('embed',), 'half': (None,)}
    params = {'w': np.zeros((16, 8), np.float32), 'b': np.zeros(8, np.float32),
              'half': np.zeros(3, jnp.bfloat16)}
    placed = sharding.shard_params(params, sharding.param_shardings(mesh, axes, params))
    pieces = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert sharding.bytes_per_device(mesh, axes, params) == pieces == 4 * 16 * 8 / 4 + 4 * 8 / 2 + 2 * 3


def test_arrays_made_under_jit_can_be_split_as_the_batch_is():
    def make(batch):
        return sharding.constrain_rows({'zeros': jnp.zeros((8, 3))}, batch)['zeros'], batch

    mesh = sharding.make_mesh(2, 2, 2)
    made, _ = jax.jit(make)(sharding.shard_batch(mesh, np.zeros((8, 1))))
    assert {shard.data.shape for shard in made.addressable_shards} == {(2, 3)}
    assert jax.jit(make)(jnp.zeros((8, 1)))[0].shape == (8, 3)


@pytest.mark.parametrize('sizes, spread, limit, at_once', [
    ((1, 1, 1), False, 10 ** 9, 16), ((1, 1, 1), False, 0, 2), ((2, 2, 2), False, 0, 16), ((2, 1, 1), False, 0, 4),
    ((2, 2, 2), True, 0, 16), ((1, 1, 4), False, 0, 8), ((1, 1, 4), True, 0, 8), ((2, 1, 2), False, 0, 8),
    ((4, 1, 1), True, 10 ** 9, 16)])
def test_rows_in_parts_are_rows_at_once(sizes, spread, limit, at_once, monkeypatch):
    """Values, gradients, and how many rows there are in a part, of which a device has room for two."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:int(np.prod(sizes))])
    rng, seen = np.random.default_rng(0), []
    x, y, fixed = (rng.normal(size=(16, 8)).astype(np.float32) for _ in range(3))
    x, y, fixed = sharding.shard_batch(mesh, (x, y, fixed))
    monkeypatch.setattr(sharding, '_PART', 2 * x.nbytes // 16)

    def fn(both, fixed):
        seen.append(fixed.shape[0])
        return {'sum': jnp.sin(both['x']) * both['y'] + fixed, 'first': both['x'][:, 0]}

    def parted(both):
        both = jax.tree.map(sharding.spread_rows, both) if spread else both
        return sharding.map_rows(fn, (both,), x.nbytes, limit, spread, (fixed,))

    def pulled(fn):
        return jax.jit(jax.grad(lambda both: jnp.sum(fn(both)['sum'] ** 2)))({'x': x, 'y': y})

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    found, grads = jax.jit(parted)({'x': x, 'y': y}), pulled(parted)
    assert set(seen) == {at_once}
    jax.tree.map(close, found, fn({'x': x, 'y': y}, fixed))
    jax.tree.map(close, grads, pulled(lambda both: fn(both, fixed)))


def test_rows_are_spread_over_all_devices_where_they_divide():
    mesh = sharding.make_mesh(2, 1, 4)
    for rows, local in ((16, 2), (6, 3)):
        x = sharding.shard_batch(mesh, np.zeros((rows, 3), np.float32))
        assert jax.jit(sharding.spread_rows)(x).sharding.shard_shape(x.shape) == (local, 3)
    assert sharding.spread_rows(jnp.zeros(3)).shape == (3,)


def test_caches_are_split_by_heads_and_products_left_where_the_table_is():
    @struct.dataclass
    class Cache:
        keys: jax.Array

        @property
        def axes(self):
            return None, 'kv_heads'

    @jax.jit
    def make(batch, table):
        cache = Cache(jnp.zeros((8, 4, 3)))
        scores = sharding.constrain_last(batch @ table, 'vocab')
        return sharding.constrain_rows({'cache': cache, 'row': jnp.zeros((8, 4))}, batch), scores

    mesh = sharding.make_mesh(2, 2, 2)
    batch = sharding.shard_batch(mesh, np.ones((8, 4), np.float32))
    made, scores = make(batch, sharding.replicate(mesh, np.ones((4, 6), np.float32)))
    assert {shard.data.shape for shard in made['cache'].keys.addressable_shards} == {(2, 2, 3)}
    assert {shard.data.shape for shard in made['row'].addressable_shards} == {(2, 4)}
    assert {shard.data.shape[1] for shard in scores.addressable_shards} == {3}
    np.testing.assert_array_equal(scores, np.full((8, 6), 4.0))
    alone = sharding.constrain_last(jnp.ones((2, 3)), 'vocab')
    np.testing.assert_array_equal(alone, jnp.ones((2, 3)))


PROCESS = '''
import numpy as np
from qsharp_jax import checkpoint, sharding
mesh = sharding.make_mesh(2, 2, 1)
x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
batch = sharding.shard_batch(mesh, {'x': x, 'n': np.int32(3)})
assert not batch['x'].is_fully_addressable
assert len(batch['x'].addressable_shards) == 2
np.testing.assert_array_equal(sharding.to_host(batch)['x'], x)
total = jax.jit(lambda b: b['x'].sum() + b['n'])(batch)
assert sharding.to_host(total) == x.sum() + 3
saved = checkpoint.Checkpoints(sys.argv[3], keep=1)
saved.save(1, batch, {'at': 1})
saved.save(2, batch, {'at': 2})
state, meta = saved.restore_latest(batch)
assert meta == {'at': 2} and saved.all_steps() == [2]
np.testing.assert_array_equal(sharding.to_host(state)['x'], x)
checkpoint.save_params(sys.argv[3] + '/value', batch, {})
params, _ = checkpoint.restore_params(sys.argv[3] + '/value', batch)
np.testing.assert_array_equal(sharding.to_host(params)['x'], x)
'''


def test_two_processes_share_batches_and_checkpoints(tmp_path):
    run_two(PROCESS, tmp_path / 'run', devices=2)
