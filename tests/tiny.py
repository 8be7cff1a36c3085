"""The whole job in seconds: a transformer of one layer, star graphs of five nodes, tens of prompts."""
from __future__ import annotations

from collections.abc import Iterator
import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from qsharp_jax import checkpoint
from qsharp_jax import config as config_lib
from qsharp_jax import experiment, sharding, train
from qsharp_jax.data.dataset import Manifest
from qsharp_jax.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
SPEC = str(ROOT / 'configs' / 'star_graph.py') + ':tiny'
REWARD = str(ROOT / 'tests' / 'tiny_reward.py') + ':starts_low'

# Every phase has several blocks or checkpoints, so that there is something to be killed between.
OVERRIDES = {
    'reward': REWARD,
    'iterations': '2',
    'task.max_prompt_tokens': '32',
    'task.star_graph.num_nodes': '8',
    'task.star_graph.pretrain_examples': '64',
    'task.star_graph.train_examples': '24',
    'task.star_graph.validation_examples': '8',
    'task.star_graph.test_examples': '8',
    'reference.transformer.layers': '1',
    'reference.transformer.width': '16',
    'reference.transformer.heads': '2',
    'reference.transformer.kv_heads': '2',
    'reference.transformer.mlp_width': '32',
    'reference.pretrain.optimizer': 'adamw',
    'reference.pretrain.steps': '4',
    'reference.pretrain.batch_size': '16',
    'reference.pretrain.warmup_steps': '1',
    'value.extra_layers': '0',
    'value.extra_input': 'stream',
    'sampling.max_new_tokens': '8',
    'guidance.candidates': '6',
    'collect.cut': 'uniform',
    'collect.samples': '2',
    'collect.block_examples': '8',
    'collect.batch_rows': '16',
    'fit.batch_size': '8',
    'fit.samples_per_row': '1',
    'fit.epochs': '2',
    'fit.warmup_steps': '1',
    'fit.frozen_layers': '0',
    'fit.checkpoint_every_steps': '2',
    'eval.etas': '0.1,0.5',
    'eval.samples': '2',
    'eval.maj_k': '2',
    'eval.reference_temperatures': '0.0',
    'eval.block_examples': '4',
    'eval.batch_rows': '16',
    'logging.every_steps': '1',
    'logging.heldout_every_steps': '4',
    'logging.report_examples': '1',
}


def overrides(data_dir: Path, **changes: Any) -> dict[str, str]:
    """Keys with their texts; `changes` have '__' for the dots of a key."""
    return {**OVERRIDES, 'task.data_dir': str(data_dir),
            **{key.replace('__', '.'): str(value) for key, value in changes.items()}}


def config(data_dir: Path, **changes: Any) -> ml_collections.ConfigDict:
    """The tiny configuration, its task's files below `data_dir`."""
    return config_lib.load(SPEC, list(overrides(data_dir, **changes).items()))


def arguments(data_dir: Path, workdir: Path, **changes: Any) -> list[str]:
    """The same as arguments of experiments/train.py."""
    return [f'--config={SPEC}', f'--workdir={workdir}',
            *(f'--config.{key}={text}' for key, text in overrides(data_dir, **changes).items())]


@contextlib.contextmanager
def devices(count: int) -> Iterator[None]:
    """Runs see only the first `count` devices of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:count]))
        yield


def run_of_opinions(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Makes a run whose first value network, random but strong in its opinions, is finished; returns `workdir`."""
    train.prepare(config, workdir)
    parts = experiment.load(experiment.outline(config, workdir))
    params = parts.init_value_params()
    params['head']['kernel'] = 100 * params['head']['kernel']
    checkpoint.save_params(parts.value_dir(1), params, parts.value_meta())
    return workdir


TIMES = 'seconds', 'seconds_per_answer', 'seconds_per_right_answer'


def outcome(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything that a run must leave the same however often it was stopped, by name; times are left out."""
    workdir = Path(workdir)
    manifest = Manifest(workdir / 'dataset')
    found: dict[str, Any] = {
        'results': [_without(row, *TIMES, 'commit') for row in read_rows(workdir / 'results.jsonl')],
        'metrics': read_rows(workdir / 'metrics.jsonl'),
        'shards': [(shard.name, shard.n, shard.sha256) for shard in manifest.upto(10 ** 6)],
    }
    for path in sorted((workdir / 'dataset' / 'labels').rglob('*.npy')):
        found[str(path.relative_to(workdir))] = np.load(path).tolist()
    for path in sorted((workdir / 'samples').rglob('*.jsonl')):
        found[str(path.relative_to(workdir))] = [_without(row, 'seconds') for row in read_rows(path)]
    for path in sorted((workdir / 'calibration').iterdir()):
        found[str(path.relative_to(workdir))] = path.read_text()
    for path in sorted((workdir / 'checkpoints').glob(f'*/{checkpoint.VALUE_FILE}')):
        # It holds a fingerprint of each array, which changes with any bit of it.
        found[str(path.relative_to(workdir))] = path.read_text()
    return found


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
