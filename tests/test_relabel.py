"""The roll-outs of a run under another reward: the same tokens, other labels, nothing decoded."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qsharp_jax import experiment, relabel, rollout, train
from qsharp_jax.data.dataset import AggregatedDataset, Manifest
from qsharp_jax.metrics import read_rows
from tests import tiny

LONG = 'def long(completions):\n    return [min(len(text), 8) / 8 for text in completions]\n'


pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.usefixtures('one_device')]


@pytest.fixture(scope='module')
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of two iterations."""
    workdir = tmp_path_factory.mktemp('runs') / 'first'
    # At such a rate a few steps guide so much that tokens change.
    train.run(tiny.config(data, fit__learning_rate=0.1), workdir)
    return workdir


@pytest.fixture(scope='module')
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('rewards') / 'mine.py'
    path.write_text(LONG)
    return f'{path}:long'


def refuse_to_roll_out(*args: object) -> None:
    raise AssertionError('decoded')


def test_another_reward_grades_the_rollouts_of_every_iteration_and_draws_none(
        first: Path, data: Path, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rollout, 'RollingOut', refuse_to_roll_out)
    config = tiny.config(data, reward=reward, value__head='categorical', value__num_atoms=9)
    workdir = tmp_path / 'second'
    train.run(config, workdir, relabel_from=first)

    said = capsys.readouterr().out
    assert f'96 roll-outs of 2 iterations come from {first} and are graded anew, by {reward}' in said
    assert f'iterations 2 to 2 were rolled in with a policy guided by {tiny.REWARD}: they cover' in said
    old, new = Manifest(first / 'dataset'), Manifest(workdir / 'dataset')
    assert [shard.sha256 for shard in new.upto(2)] == [shard.sha256 for shard in old.upto(2)]
    for shard in new.upto(2):
        assert shard.meta['relabelled_from'] == str(first) and shard.meta['roll_in_reward'] == tiny.REWARD
    parts = experiment.outline(config, workdir)
    dataset = AggregatedDataset(workdir / 'dataset', parts.reward.digest, 2)
    texts = [parts.answer_text(answer.answer) for answer in dataset.read(range(len(dataset)))]
    np.testing.assert_array_equal(dataset.rewards, [min(len(text), 8) / 8 for text in texts])
    assert len(set(dataset.rewards)) > 2
    methods = {(row['method'], row['iteration']) for row in read_rows(workdir / 'results.jsonl')}
    assert methods == {('reference', 0), ('cd', 1), ('qsharp', 1), ('qsharp', 2)}
    # The same command goes on.
    train.run(config, workdir, relabel_from=first)
    train.run(config, workdir)
    # What guided the roll-ins is not forgotten on the way to a third run.
    capsys.readouterr()
    train.run(tiny.config(data, reward=tiny.REWARD), tmp_path / 'third', relabel_from=workdir)
    assert f'guided by {tiny.REWARD}: they cover' in capsys.readouterr().out
    assert {shard.meta['roll_in_reward'] for shard in Manifest(tmp_path / 'third' / 'dataset').upto(2)} == {tiny.REWARD}


def test_later_iterations_are_drawn_and_one_alone_says_nothing_of_coverage(
        first: Path, data: Path, reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(data, reward=reward, value__head='categorical', iterations=1)
    train.run(config, tmp_path / 'one', relabel_from=first)
    said = capsys.readouterr().out
    assert '48 roll-outs of 1 iteration come from' in said and 'they cover' not in said
    train.run(tiny.config(data, reward=reward, value__head='categorical'), tmp_path / 'one')
    shards = Manifest(tmp_path / 'one' / 'dataset').upto(2)
    assert [shard.meta.get('roll_in_reward') for shard in shards] == [tiny.REWARD] * 3 + [None] * 3
    assert shards[3].sha256 != Manifest(first / 'dataset').upto(2)[3].sha256
    # It has roll-outs of its own now, which are not given up for others.
    with pytest.raises(ValueError, match='block 0 of iteration 2 .* has other roll-outs than in .* D only grows'):
        train.run(tiny.config(data, reward=reward, value__head='categorical'), tmp_path / 'one', relabel_from=first)


def test_rollouts_that_this_run_would_not_draw_are_refused(
        first: Path, data: Path, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='collect.samples was 2, now 3; sampling.top_p was 1.0, now 0.9'):
        train.run(tiny.config(data, reward=reward, sampling__top_p=0.9, collect__samples=3), tmp_path / 'a',
                  relabel_from=first)
    with pytest.raises(ValueError, match='holds no run: it has no config.json'):
        train.run(tiny.config(data, reward=reward), tmp_path / 'b', relabel_from=tmp_path)
    assert not (tmp_path / 'a').exists() and not (tmp_path / 'b').exists()  # their place is free for the mended command
    parts = experiment.load(experiment.outline(tiny.config(data, reward=reward), tmp_path / 'c'))
    prompts = parts.prompts('train')
    prompts.tokens[3] = prompts.tokens[3][::-1]
    with pytest.raises(ValueError, match=f'example {prompts.ids[3]} has another prompt there'):
        relabel.adopt(parts, first)
    monkeypatch.setattr(relabel.checkpoint, 'load_meta', lambda directory: {'reference': 'another'})
    with pytest.raises(ValueError, match='of the reference another, and that of this run is'):
        relabel.adopt(parts, first)
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'config.json').write_text((first / 'config.json').read_text())
    with pytest.raises(ValueError, match='has no roll-outs yet'):
        relabel.adopt(parts, tmp_path / 'd')
    assert json.loads((first / 'config.json').read_text())['reward'] == tiny.REWARD
