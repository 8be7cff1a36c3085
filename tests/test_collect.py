"""What a run collects."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsharp_jax import collect, experiment, train
from qsharp_jax.data.dataset import AggregatedDataset, Manifest
from tests import tiny


@pytest.mark.whole
@pytest.mark.usefixtures('one_device')
def test_answers_of_the_reference_are_cut_at_their_start_and_guided_ones_anywhere(data: Path, tmp_path: Path) -> None:
    train.run(tiny.config(data, collect__cut='guided'), tmp_path)
    manifest = Manifest(tmp_path / 'dataset')
    cuts: dict[int, list[int]] = {1: [], 2: []}
    for shard in manifest.upto(2):
        assert shard.meta['cut'] == ('start' if shard.iteration == 1 else 'uniform')
        cuts[shard.iteration] += [answer.cut for answer in manifest.read(shard)]
    assert set(cuts[1]) == {0} and len(set(cuts[2])) > 2


@pytest.mark.usefixtures('one_device')
def test_questions_that_were_changed_and_shards_that_are_damaged(data: Path, tmp_path: Path) -> None:
    config = tiny.config(data, iterations=1, fit__skip_corrupt=True)
    train.prepare(config, tmp_path)
    parts = experiment.load(experiment.outline(config, tmp_path))
    collect.collect_iteration(parts, 1, None)
    collect.check_questions(parts)
    prompts = parts.prompts('train')
    other = dataclasses.replace(prompts, tokens=[*prompts.tokens[:3], prompts.tokens[4], *prompts.tokens[4:]])
    with pytest.raises(ValueError, match=f'example {prompts.ids[3]} has another prompt in .* Bring them back'):
        collect.check_questions(dataclasses.replace(parts, splits={'train': other}))
    # A reward that was edited grades all shards but the damaged one, which the fit leaves out.
    manifest = Manifest(parts.dataset_dir)
    path = manifest.path_of(manifest.shards[1, 1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    edited = dataclasses.replace(parts, reward=dataclasses.replace(parts.reward, digest='edited'))
    collect.label_missing(edited, 1)
    collect.check_questions(edited)
    assert len(AggregatedDataset(parts.dataset_dir, 'edited', 1, skip_corrupt=True)) == 32
    strict = dataclasses.replace(edited, config=tiny.config(data, iterations=1))
    with pytest.raises(ValueError, match='00001-00001.array_record.* is damaged'):
        collect.label_missing(strict, 1)
