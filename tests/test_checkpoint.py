"""Checkpoints: bit-equal, whole or absent, damaged ones passed over, on any number of devices."""
from __future__ import annotations

import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import checkpoint, sharding

# Left behind by orbax when what it reads turns out to be damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    rest: tuple


def _state(seed=0, mesh=None):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2 ** 32, (40, 30), dtype=np.uint32)  # any bit pattern, NaNs included
    state = State(
        step=np.int32(seed),
        params={'w': bits.view(np.float32), 'half': rng.normal(size=(4,)).astype(jnp.bfloat16), 'none': None},
        rest=(np.array([True, False]), {'count': rng.integers(0, 9, 3).astype(np.int32)}))
    return sharding.replicate(mesh or sharding.make_mesh(devices=jax.devices()[:1]), state)


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _largest_file(path):
    return max((file for file in path.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_what_is_restored_is_bit_for_bit_what_was_saved_and_older_ones_go(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    assert saved.restore_latest(_state()) is None
    for step in (3, 5, 10):
        saved.save(step, _state(step), {'position': [step, {'epoch': 0.1}], 'ids': {9: 1, 10: 2}})
    assert saved.all_steps() == [5, 10]
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    state, meta = again.restore_latest(sharding.abstract(_state()))
    _same(state, _state(10))
    assert meta == {'position': [10, {'epoch': 0.1}], 'ids': {'9': 1, '10': 2}}
    with pytest.raises(ValueError, match='step 10 cannot be saved'):
        again.save(10, _state(10), {})


def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        saved.save(step, _state(step), {'at': step})
    _flip(_largest_file(tmp_path / '2' / 'state' / 'ocdbt.process_0'))
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    with pytest.warns(UserWarning, match=r'checkpoint .*/2 cannot be read'):
        state, meta = saved.restore_latest(_state())
    _same(state, _state(1))
    assert meta == {'at': 1} and saved.all_steps() == [1]
    saved.save(2, _state(2), {'at': 'again'})  # the run makes that step anew
    assert saved.restore_latest(_state())[1] == {'at': 'again'}


def test_a_changed_number_in_the_meta_is_noticed(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=1)
    saved.save(1, _state(1), {'at': 12345})
    file = tmp_path / '1' / 'meta' / 'metadata'
    file.write_text(file.read_text().replace('12345', '12346'))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='JSON is not what was saved'):
        saved.restore_latest(_state())


def test_any_changed_byte_is_either_harmless_or_noticed(tmp_path):
    checkpoint.Checkpoints(tmp_path / 'good', keep=1).save(1, _state(1), {'at': 1})
    noticed = 0
    files = [file.relative_to(tmp_path / 'good') for file in (tmp_path / 'good').rglob('*') if file.is_file()]
    for i, file in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(tmp_path / 'good', copy)
        _flip(copy / file)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                state, meta = checkpoint.Checkpoints(copy, keep=1).restore_latest(_state())
            except ValueError as error:
                assert 'no checkpoint in' in str(error) and 'can be read' in str(error)
                noticed += 1
            else:
                _same(state, _state(1))
                assert meta == {'at': 1}
    assert noticed >= 3


def test_missing_files_are_damage_too_and_nothing_readable_is_an_error(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    saved.save(1, _state(1), {})
    saved.save(2, _state(2), {})
    shutil.rmtree(tmp_path / '1' / 'state')
    (tmp_path / '2' / 'meta' / 'metadata').write_text('{"meta"')
    words = r'no checkpoint .*\(step 2: .*; step 1: '
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=words):
        checkpoint.Checkpoints(tmp_path, keep=2).restore_latest(_state())
    assert (tmp_path / '1').exists() and (tmp_path / '2').exists()


@pytest.mark.parametrize('change', [
    lambda state: state.replace(params={**state.params, 'w': jnp.zeros((40, 31))}),
    lambda state: state.replace(params={**state.params, 'half': jnp.zeros((4,))}),
    lambda state: state.replace(params={**state.params, 'new': jnp.zeros((4,))})])
def test_another_network_is_refused_by_name_of_its_arrays(tmp_path, change):
    saved = checkpoint.Checkpoints(tmp_path, keep=1)
    saved.save(1, _state(1), {})
    with pytest.raises(ValueError, match=r"1 arrays differ \(\.params\['(w|half|new)'\]: saved .*, wanted"):
        saved.restore_latest(change(_state()))
    assert saved.all_steps() == [1]


def test_half_written_checkpoints_are_ignored_and_cleared(tmp_path):
    checkpoint.Checkpoints(tmp_path, keep=2).save(1, _state(1), {'at': 1})
    partial = tmp_path / '2.orbax-checkpoint-tmp'
    shutil.copytree(tmp_path / '1', partial)
    shutil.rmtree(partial / 'state' / 'd')
    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    state, meta = saved.restore_latest(_state())
    _same(state, _state(1))
    assert meta == {'at': 1} and saved.all_steps() == [1]
    deadline = time.monotonic() + 30  # orbax clears in the background
    while partial.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not partial.exists()
    saved.save(2, _state(2), {'at': 2})
    assert saved.all_steps() == [1, 2]


SAVER = textwrap.dedent('''
    import sys
    import jax.numpy as jnp
    from qsharp_jax import checkpoint
    saved = checkpoint.Checkpoints(sys.argv[1], keep=2)
    last = max(saved.all_steps(), default=0)
    for step in range(last + 1, last + 10 ** 6):
        saved.save(step, {'w': jnp.full((300, 400), float(step))}, {'at': step})
        print(step, flush=True)
''')


def test_kill_in_the_middle_of_saving_loses_nothing_finished(tmp_path):
    target = {'w': jnp.zeros((300, 400))}
    for delay in (0.01, 0.03):
        process = subprocess.Popen([sys.executable, '-c', SAVER, str(tmp_path)], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        told = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(delay)  # into the next save
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # nothing that bears a step's name is broken
            state, meta = checkpoint.Checkpoints(tmp_path, keep=2).restore_latest(target)
        assert meta['at'] == max(finished) >= told[-1]
        np.testing.assert_array_equal(state['w'], meta['at'])


AXES = {'w': ('vocab', 'embed'), 'b': ('embed',)}
ONE_DEVICE = textwrap.dedent('''
    import sys
    import jax
    import numpy as np
    from qsharp_jax import checkpoint, sharding
    assert jax.device_count() == 1
    target = {'w': np.zeros((16, 8), np.float32), 'b': np.zeros(8, np.float32)}
    target = sharding.replicate(sharding.make_mesh(), target)
    state, meta = checkpoint.Checkpoints(sys.argv[1], keep=1).restore_latest(target)
    np.save(sys.argv[2], np.asarray(state['w']))
''')


def test_eight_devices_save_what_one_restores_and_the_other_way(tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    rng = np.random.default_rng(0)
    host = {'w': rng.normal(size=(16, 8)).astype(np.float32), 'b': np.zeros(8, np.float32)}
    spread = sharding.shard_params(host, sharding.param_shardings(mesh, AXES, host))
    checkpoint.Checkpoints(tmp_path / 'run', keep=1).save(1, spread, {})
    env = {'JAX_PLATFORMS': 'cpu', 'PATH': ''}
    command = [sys.executable, '-c', ONE_DEVICE, str(tmp_path / 'run'), str(tmp_path / 'w.npy')]
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    assert np.load(tmp_path / 'w.npy').tobytes() == host['w'].tobytes()

    alone = sharding.replicate(sharding.make_mesh(devices=jax.devices()[:1]), host)
    checkpoint.save_params(tmp_path / 'value', alone, {})
    params, _ = checkpoint.restore_params(tmp_path / 'value', sharding.abstract(spread))
    _same(params, spread)
    assert params['w'].sharding == spread['w'].sharding


def test_fingerprint_notices_any_element_and_any_two_that_change_places():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    marks = {int(checkpoint._fingerprint(jnp.asarray(x)))}
    for i in range(x.size):
        y = x.copy()
        y.flat[i] = np.nextafter(y.flat[i], np.float32(9))
        marks.add(int(checkpoint._fingerprint(jnp.asarray(y))))
        z = x.copy()
        z.flat[i], z.flat[(i + 7) % x.size] = x.flat[(i + 7) % x.size], x.flat[i]
        marks.add(int(checkpoint._fingerprint(jnp.asarray(z))))
    assert len(marks) == 1 + 2 * x.size


META = {'reference': 'r', 'tokenizer': 't', 'support': (0.0, 1.0), 'sampler': {'temperature': 1.0},
        'budget': 'total', 'reward': 'boxed'}


def test_network_directory_round_trip_and_replacement(tmp_path):
    checkpoint.save_params(tmp_path / 'v', _state(1), META)
    checkpoint.save_params(tmp_path / 'v', _state(2), {**META, 'reward': 'other'})
    params, meta = checkpoint.restore_params(tmp_path / 'v', sharding.abstract(_state()))
    _same(params, _state(2))
    assert meta['reward'] == 'other' and checkpoint.load_meta(tmp_path / 'v') == meta
    checkpoint.check_value_meta(meta, {**META, 'reward': 'other'})  # tuples have become lists
    with pytest.raises(ValueError, match='another network .* arrays differ'):
        checkpoint.restore_params(tmp_path / 'v', {'w': jnp.zeros(3)})


def test_network_directory_that_is_unfinished_or_damaged_is_refused(tmp_path):
    with pytest.raises(ValueError, match='value.json is missing'):
        checkpoint.restore_params(tmp_path, _state())
    checkpoint.save_params(tmp_path, _state(1), META)
    _flip(_largest_file(tmp_path / 'params' / 'ocdbt.process_0'))
    with pytest.raises(ValueError, match='cannot be read'):
        checkpoint.restore_params(tmp_path, _state())
    (tmp_path / 'value.json').write_text('{')
    with pytest.raises(ValueError, match='value.json cannot be read'):
        checkpoint.load_meta(tmp_path)


@pytest.mark.parametrize('name', ['reference', 'tokenizer', 'support'])
def test_another_reference_or_support_is_refused_unless_allowed(name):
    with pytest.raises(ValueError, match=f'fitted with {name} .* this run has'):
        checkpoint.check_value_meta(META, {**META, name: 'other'})
    with pytest.warns(UserWarning, match=f'{name} .* as asked'):
        checkpoint.check_value_meta(META, {**META, name: 'other'}, allow_other=True)


@pytest.mark.parametrize('name', ['sampler', 'budget', 'reward'])
def test_another_sampler_warns(name):
    with pytest.warns(UserWarning, match=f'fitted with {name}'):
        checkpoint.check_value_meta(META, {**META, name: 'other'})


def test_equal_meta_is_silent_and_missing_keys_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        checkpoint.check_value_meta(META, dict(META))
    with pytest.raises(ValueError, match='the saved value network does not say its budget'):
        checkpoint.check_value_meta({name: META[name] for name in META if name != 'budget'}, META)


def test_keep_must_be_positive(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match='keep is 0'):
        checkpoint.Checkpoints(tmp_path, keep=0)
