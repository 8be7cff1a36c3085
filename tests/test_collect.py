"""What a run collects."""
from __future__ import annotations

from pathlib import Path

import pytest

from qsharp_jax import train
from qsharp_jax.data.dataset import Manifest
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
