"""D: what is written is read back, a kill leaves it whole, damage is named, units are there once."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from qsharp_jax.data.dataset import AggregatedDataset, DatasetWriter, Manifest, Rollout

META = {'eta': 0.1, 'sampler': {'temperature': 1.0}}


def rollout(iteration, example, sample, seed=0):
    rng = np.random.default_rng([iteration, example, sample, seed])
    answer = rng.integers(0, 50_000, rng.integers(1, 9), np.int32)
    return Rollout(iteration, example, sample, np.arange(1, example + 2, dtype=np.int32), answer,
                   int(rng.integers(len(answer))), bool(rng.integers(2)), bool(rng.integers(2)))


def block(iteration, number, examples=3, samples=2):
    return [rollout(iteration, number * examples + example, sample)
            for example in range(examples) for sample in range(samples)]


def label(rollouts):
    return np.array([float(r.answer[0] % 2) for r in rollouts])


def fill(directory, iterations=2, blocks=2):
    writer = DatasetWriter(directory)
    for iteration in range(1, iterations + 1):
        for number in range(blocks):
            writer.write_shard(iteration, number, block(iteration, number), META)
            writer.write_labels(iteration, number, 'reward', label(block(iteration, number)))
    return writer


def same(one, other):
    return (one.unit == other.unit and (one.cut, one.ended, one.truncated) == (other.cut, other.ended, other.truncated)
            and np.array_equal(one.prompt, other.prompt) and np.array_equal(one.answer, other.answer))


def test_records_hold_a_rollout_exactly():
    for seed in range(20):
        original = dataclasses.replace(rollout(3, 5, seed), example=2 ** 33 + seed)
        read = Rollout.from_bytes(original.to_bytes())
        assert same(read, original)
        assert read.prompt.dtype == read.answer.dtype == np.int32


@pytest.mark.parametrize('prompt, answer, cut', [(0, 3, 0), (2, 0, 0), (2, 3, 3), (2, 3, -1)])
def test_impossible_rollouts_are_refused(prompt, answer, cut):
    with pytest.raises(ValueError, match=r'unit \(1, 2, 3\)'):
        Rollout(1, 2, 3, np.ones(prompt, np.int32), np.ones(answer, np.int32), cut, False, True)


def test_what_is_written_is_read_back_in_order(tmp_path):
    writer = fill(tmp_path)
    for again in (writer, DatasetWriter(tmp_path)):
        assert again.has(1, 0) and again.has(2, 1) and not again.has(2, 2) and not again.has(3, 0)
        assert all(map(same, again.read_shard(2, 1), block(2, 1)))
    assert Manifest(tmp_path).shards[1, 0].meta == META
    data = AggregatedDataset(tmp_path, 'reward', 2)
    expected = [unit for iteration in (1, 2) for number in (0, 1) for unit in block(iteration, number)]
    assert len(data) == len(expected) == 24
    order = np.random.default_rng(0).permutation(24)
    assert all(map(same, data.read(order), [expected[i] for i in order]))
    assert same(data[5], expected[5])
    assert data.rewards.tolist() == label(expected).tolist()
    assert data.units.tolist() == [list(unit.unit) for unit in expected]
    assert data.lengths.tolist() == [[len(unit.prompt), len(unit.answer)] for unit in expected]
    assert data.cuts.tolist() == [unit.cut for unit in expected]
    assert data.examples.tolist() == sorted({unit.example for unit in expected})


def test_only_the_iterations_asked_for_are_read(tmp_path):
    fill(tmp_path)
    assert set(AggregatedDataset(tmp_path, 'reward', 1).units[:, 0]) == {1}


def test_d_only_grows(tmp_path):
    writer = fill(tmp_path)
    with pytest.raises(ValueError, match='block 1 of iteration 2 is in .* already'):
        writer.write_shard(2, 1, block(2, 1), META)


@pytest.mark.parametrize('rollouts, words', [
    ([], 'no roll-outs'), ([rollout(2, 1, 0)], r'other iterations: \[\(2, 1, 0\)\]'),
    ([rollout(1, 1, 0), rollout(1, 1, 0)], 'a unit twice')])
def test_blocks_that_are_no_blocks_are_refused(tmp_path, rollouts, words):
    writer = DatasetWriter(tmp_path)
    with pytest.raises(ValueError, match=words):
        writer.write_shard(1, 0, rollouts, META)
    assert not writer.has(1, 0)


def test_units_that_come_twice_are_there_once(tmp_path, caplog):
    writer = DatasetWriter(tmp_path)
    first, again = [rollout(1, 1, 0), rollout(1, 2, 0)], [rollout(1, 2, 0, seed=9), rollout(1, 3, 0)]
    for number, rollouts in enumerate((first, again)):
        writer.write_shard(1, number, rollouts, META)
        writer.write_labels(1, number, 'reward', np.full(2, float(number)))
    with caplog.at_level(logging.WARNING):
        data = AggregatedDataset(tmp_path, 'reward', 1)
    assert data.duplicates == 1 and data.units[:, 1].tolist() == [1, 2, 3] and data.rewards.tolist() == [0, 0, 1]
    assert all(map(same, data.read([0, 1, 2]), [*first, again[1]]))
    assert '1 roll-outs of' in caplog.text and 'repeat a unit' in caplog.text


def test_abstained_rollouts_are_counted_and_left_out(tmp_path, caplog):
    writer = DatasetWriter(tmp_path)
    writer.write_shard(1, 0, block(1, 0), META)
    writer.write_labels(1, 0, 'reward', np.array([1, np.nan, 0, np.nan, 1, 0]))
    data = AggregatedDataset(tmp_path, 'reward', 1)
    assert data.abstained == 2 and len(data) == 4 and not np.isnan(data.rewards).any()
    assert '2 of 6 roll-outs of' in caplog.text and 'the reward abstained, or took too long' in caplog.text
    assert all(map(same, data.read(range(4)), [block(1, 0)[i] for i in (0, 2, 4, 5)]))
    writer.write_labels(1, 0, 'reward', np.full(6, np.nan))
    with pytest.raises(ValueError, match='no labelled roll-outs .*6 were left out'):
        AggregatedDataset(tmp_path, 'reward', 1)


def test_another_reward_needs_its_own_labels(tmp_path):
    writer = fill(tmp_path)
    assert writer.unlabelled('reward', 2) == []
    assert writer.unlabelled('other', 1) == [(1, 0), (1, 1)]
    with pytest.raises(ValueError, match='block 0 of iteration 1 has no labels of reward other'):
        AggregatedDataset(tmp_path, 'other', 2)
    writer.write_labels(1, 0, 'other', np.arange(6.0))
    assert writer.unlabelled('other', 2) == [(1, 1), (2, 0), (2, 1)]
    writer.write_labels(1, 1, 'other', np.arange(6.0))
    assert AggregatedDataset(tmp_path, 'other', 1).rewards.tolist() == [*range(6), *range(6)]
    assert AggregatedDataset(tmp_path, 'reward', 1).rewards.tolist() == label([*block(1, 0), *block(1, 1)]).tolist()


def test_labels_of_a_wrong_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'6 roll-outs .* shape \(5,\)'):
        fill(tmp_path).write_labels(1, 0, 'reward', np.zeros(5))
    with pytest.raises(ValueError, match='no block 7 of iteration 1'):
        fill(tmp_path / 'other').write_labels(1, 7, 'reward', np.zeros(6))


@pytest.mark.parametrize('damage', ['flip', 'cut', 'gone'])
def test_a_damaged_shard_is_named_and_the_others_stay_readable(tmp_path, caplog, damage):
    fill(tmp_path)
    path = Manifest(tmp_path).path_of(Manifest(tmp_path).shards[1, 1])
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    if damage == 'gone':
        path.unlink()
    else:
        path.write_bytes(content if damage == 'flip' else content[:len(content) // 2])
    words = f'{path}, block 1 of iteration 1 with 6 roll-outs, is {"missing" if damage == "gone" else "damaged"}'
    with pytest.raises(ValueError, match=words):
        AggregatedDataset(tmp_path, 'reward', 2)
    with pytest.raises(ValueError, match='delete it: the same command then collects that block again'):
        DatasetWriter(tmp_path).read_shard(1, 1)
    with caplog.at_level(logging.WARNING):
        data = AggregatedDataset(tmp_path, 'reward', 2, skip_corrupt=True)
    assert words in caplog.text
    expected = [unit for key in ((1, 0), (2, 0), (2, 1)) for unit in block(*key)]
    assert all(map(same, data.read(range(18)), expected)) and len(data) == 18


def test_a_deleted_shard_is_collected_again_and_its_old_labels_are_not_used(tmp_path):
    writer = fill(tmp_path)
    digest = writer.digest(2)
    path = Manifest(tmp_path).path_of(Manifest(tmp_path).shards[1, 1])
    path.unlink()
    writer = DatasetWriter(tmp_path)
    assert not writer.has(1, 1) and writer.has(1, 0)
    other = [rollout(1, 3, 0, seed=4), rollout(1, 3, 1, seed=4)]
    writer.write_shard(1, 1, other, META)
    assert writer.unlabelled('reward', 2) == [(1, 1)] and writer.digest(2) != digest
    path.unlink()
    writer.write_shard(1, 1, block(1, 1), META)
    assert writer.unlabelled('reward', 2) == [] and writer.digest(2) == digest
    assert len(AggregatedDataset(tmp_path, 'reward', 2)) == 24


@pytest.mark.parametrize('content', [b'', b'\x93NUMPY', b'hello', None])
def test_damaged_labels_are_named(tmp_path, content):
    fill(tmp_path)
    manifest = Manifest(tmp_path)
    path = manifest.labels_path(manifest.shards[1, 0], 'reward')
    if content is None:
        np.save(path, np.zeros(5))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f'{path} are damaged .* Delete the file'):
        AggregatedDataset(tmp_path, 'reward', 1)


@pytest.mark.parametrize('content, words', [
    ('{"format": 1, "shards": [', 'it is damaged'), ('{"format": 1}', 'it is damaged'),
    ('{"format": 9, "shards": []}', 'format 9, and this version reads 1')])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path, content, words):
    (tmp_path / 'manifest.json').write_text(content)
    with pytest.raises(ValueError, match=words):
        DatasetWriter(tmp_path)


def test_the_digest_changes_with_any_token_of_the_iterations_it_covers(tmp_path):
    def digests(directory, first, second):
        writer = DatasetWriter(directory)
        writer.write_shard(1, 0, [first], META)
        writer.write_shard(2, 0, [second], {'eta': directory.name})
        return writer.digest(1), writer.digest(2)

    one = rollout(1, 4, 0)
    changed = Rollout(*one.unit, one.prompt, one.answer + 1, one.cut, one.ended, one.truncated)
    a = digests(tmp_path / 'a', one, rollout(2, 4, 0))
    assert a[0] != a[1]
    assert digests(tmp_path / 'b', one, rollout(2, 4, 0)) == a
    assert digests(tmp_path / 'c', one, rollout(2, 5, 0))[0] == a[0]
    assert digests(tmp_path / 'd', one, rollout(2, 5, 0))[1] != a[1]
    assert digests(tmp_path / 'e', changed, rollout(2, 4, 0))[0] != a[0]


def test_the_datasets_digest_changes_with_labels_too(tmp_path):
    writer = fill(tmp_path, 1, 1)
    before = AggregatedDataset(tmp_path, 'reward', 1).digest
    assert AggregatedDataset(tmp_path, 'reward', 1).digest == before
    writer.write_labels(1, 0, 'reward', 1 - label(block(1, 0)))
    assert AggregatedDataset(tmp_path, 'reward', 1).digest != before


def test_varied_examples_are_those_with_two_rewards_over_all_iterations(tmp_path):
    writer = DatasetWriter(tmp_path)
    for iteration, rewards in ((1, [0, 0, 1, 1, 0, 0]), (2, [0, 0, 0, 1, np.nan, 0])):
        writer.write_shard(iteration, 0, block(iteration, 0), META)
        writer.write_labels(iteration, 0, 'reward', np.array(rewards, float))
    assert AggregatedDataset(tmp_path, 'reward', 1).varied_examples().tolist() == []
    assert AggregatedDataset(tmp_path, 'reward', 2).varied_examples().tolist() == [1]


KILLED_AT = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from test_dataset import *
writer = DatasetWriter({directory!r})
calls = []
def counted(original):
    def call(*args, **kwargs):
        calls.append(original.__name__)
        if len(calls) == {when}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
writer.write_shard(1, 1, block(1, 1), META)
writer.write_labels(1, 1, 'reward', label(block(1, 1)))
"""


def test_a_kill_at_any_step_leaves_d_whole_and_the_block_can_be_done_again(tmp_path):
    fill(tmp_path / 'straight', 1, 2)
    straight = AggregatedDataset(tmp_path / 'straight', 'reward', 1)
    seen = set()
    for when in (2, 5, 6, 8):
        directory = tmp_path / str(when)
        fill(directory, 1, 1)
        script = KILLED_AT.format(tests=os.path.dirname(__file__), directory=str(directory), when=when)
        done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        writer = DatasetWriter(directory)
        listed = [(entry['iteration'], entry['block'])
                  for entry in json.loads((directory / 'manifest.json').read_text())['shards']]
        assert listed == [(1, 0), (1, 1)][:1 + writer.has(1, 1)]
        seen.add((writer.has(1, 1), (1, 1) in writer.unlabelled('reward', 1)))
        if not writer.has(1, 1):
            assert len(AggregatedDataset(directory, 'reward', 1)) == 6
            writer.write_shard(1, 1, block(1, 1), META)
        for iteration, number in writer.unlabelled('reward', 1):
            writer.write_labels(iteration, number, 'reward', label(writer.read_shard(iteration, number)))
        again = AggregatedDataset(directory, 'reward', 1)
        assert again.digest == straight.digest and again.rewards.tolist() == straight.rewards.tolist()
        assert not list(directory.rglob('*.tmp'))
    assert seen == {(False, False), (True, True)}


def test_reading_needs_no_array_library():
    script = 'import sys, qsharp_jax.data.dataset; assert "jax" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', script], check=False)
    assert done.returncode == 0
