"""The roll-outs of a run under another reward: nothing is decoded again, only graded.

Roll-outs are finished by the reference, so the reward of an answer is a draw of the reward-to-go of its tokens from the
cut on, whatever the reward (paper, theorem 2.2). What an earlier reward leaves behind is where later iterations looked:
their roll-ins were guided towards it.
"""
from __future__ import annotations

import fnmatch
from pathlib import Path

import jax
import ml_collections

from qsharp_jax import checkpoint, collect
from qsharp_jax import config as config_lib
from qsharp_jax.data.dataset import DatasetWriter, Manifest, Shard
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows, replace_text

# What roll-outs depend on; the reward and all that comes after them may differ.
_DRAWN_BY = ('seed', 'task.*', 'reference.*', 'sampling.*', 'collect.examples', 'collect.samples', 'collect.cut',
             'collect.budget', 'collect.block_examples')
_WHEREVER = ('task.data_dir', 'task.*.folder', 'task.math.test_folder', 'reference.scan_layers',
             'reference.pretrain.run')


def adopt(parts: Experiment, source: Path, iterations: int = 0) -> str:
    """Puts the roll-outs of another run into this run's D, and returns a sentence on what their labels are worth.

    The reference's own answers to the questions that both runs evaluate come along.

    Args:
      parts: the run, loaded.
      source: work directory of the other run. It is only read.
      iterations: how many of its iterations are taken; 0 for all.

    Raises:
      ValueError: it holds no roll-outs, or such that this run would not have drawn; or D has others already.
    """
    other = check_source(parts.config, source)
    _check_reference(parts, source)
    manifest = Manifest(source / 'dataset')
    shards = manifest.upto(min(parts.config.iterations, iterations or parts.config.iterations))
    if jax.process_index() == 0:
        writer = DatasetWriter(parts.dataset_dir)
        for shard in shards:
            _check_prompts(parts, manifest, shard)
            writer.adopt(manifest, shard, {
                'relabelled_from': str(source), 'roll_in_reward': _rolled_in_by(shard, other)})
        _adopt_answers(parts, source)
    last = shards[-1].iteration
    found = (f'{sum(shard.n for shard in shards)} roll-outs of {last} iteration{"s" * (last > 1)} come from {source} '
             f'and are graded anew, by {parts.reward.spec}: the reference finished each of them, so labels of any '
             'reward are valid.')
    if last > 1:
        rewards = dict.fromkeys(_rolled_in_by(shard, other) for shard in shards if shard.iteration > 1)
        found += (f' But iterations 2 to {last} were rolled in with a policy guided by {" and ".join(rewards)}: they '
                  'cover what that reward led to, not what this one would.')
    return found


def check_source(config: ml_collections.ConfigDict, source: Path) -> ml_collections.ConfigDict:
    """Returns the config of a run whose roll-outs a run of this config would have drawn as well.

    Args:
      config: of the run that takes them.
      source: work directory of the other.

    Raises:
      ValueError: it holds no roll-outs, or such that this run would not draw.
    """
    path = source / 'config.json'
    if not path.exists():
        raise ValueError(f'--relabel_from {source} holds no run: it has no config.json.')
    other = config_lib.from_json(path.read_text())
    differ = drawn_otherwise(other, config)
    if differ:
        raise ValueError(f'--relabel_from {source} has roll-outs that this run would not draw: {"; ".join(differ)}. '
                         'Give these keys the values they had.')
    if not Manifest(source / 'dataset').shards:
        raise ValueError(f'--relabel_from {source} has no roll-outs yet.')
    return other


def _rolled_in_by(shard: Shard, run: ml_collections.ConfigDict) -> str:
    """Returns the reward that roll-ins were guided by: that of the run, unless it has them from another."""
    return str(shard.meta.get('roll_in_reward', run.reward))


def _adopt_answers(parts: Experiment, source: Path) -> None:
    """Copies the blocks of the reference's answers to the questions that are here too.

    A directory's name says what else they depend on.
    """
    for path in sorted((source / 'samples').glob('*/reference-*/block_*.jsonl')):
        target = parts.workdir / path.relative_to(source)
        if target.exists():
            continue
        prompts = parts.prompts(path.parts[-3])
        asked = set(zip(prompts.ids.tolist(), prompts.texts, strict=True))
        if all((row['id'], row['prompt']) in asked for row in read_rows(path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_text(target, path.read_text(encoding='utf-8'))


def drawn_otherwise(theirs: ml_collections.ConfigDict, ours: ml_collections.ConfigDict) -> list[str]:
    """Returns, in words, each key of which roll-outs depend and that two runs have otherwise."""
    old, new = config_lib.flatten(theirs), config_lib.flatten(ours)
    return [f'{key} was {old[key]!r}, now {new[key]!r}' for key in new
            if old[key] != new[key] and _matches(key, _DRAWN_BY) and not _matches(key, _WHEREVER)]


def _check_reference(parts: Experiment, source: Path) -> None:
    """Raises ValueError if the other run's value network says that its roll-outs are of another reference."""
    fitted = source / parts.value_dir(1).relative_to(parts.workdir)
    if (fitted / checkpoint.VALUE_FILE).exists():
        digest = checkpoint.load_meta(fitted)['reference']
        if digest != parts.reference_digest:
            raise ValueError(f'--relabel_from {source} has roll-outs of the reference {digest}, and that of this run '
                             f'is {parts.reference_digest}: a value is valid for one reference.')


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _check_prompts(parts: Experiment, manifest: Manifest, shard: Shard) -> None:
    """Raises ValueError unless every roll-out answers the prompt that its example has here."""
    others = collect.answering_others(parts.prompts('train'), manifest.read(shard))
    if others:
        raise ValueError(f'--relabel_from {manifest.directory.parent}: example {others[0]} has another prompt there '
                         'than in this run. Use the data and the tokenizer of that run.')
