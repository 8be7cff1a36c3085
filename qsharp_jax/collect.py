"""Collection: the units of one iteration, block by block, into the aggregated dataset D.

A block of prompts is the unit of work: its answers are decoded, graded and written as one shard. A killed run
redoes the unfinished block whole, with the same noise, so it ends with the same data.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qsharp_jax import decoding, progress, rollout
from qsharp_jax.data.dataset import DatasetWriter, Manifest, Rollout
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
from qsharp_jax.queue import Drawn, Queue
from qsharp_jax.types import Params


def choose_examples(config: Any, prompts: Prompts, iteration: int) -> np.ndarray:
    """Returns the row numbers of the prompts that an iteration asks.  # [N]

    With `collect.examples` below the number of prompts, each iteration asks the next ones of one fixed shuffle, so
    that new prompts come before old ones.
    """
    total = len(prompts.ids)
    count = config.collect.examples or total
    if count > total:
        raise ValueError(f'collect.examples is {count}, but the train split has {total} prompts: lower it, or enlarge '
                         'the split.')
    order = np.random.default_rng([config.seed, 0xc011ec7]).permutation(total)
    return order[((iteration - 1) * count + np.arange(count)) % total]


def collect_iteration(experiment: Experiment, iteration: int, value_params: Params) -> int:
    """Adds one iteration's units and their labels to D, unless they are there, and returns how many D has of it.

    Args:
      experiment: the run.
      iteration: from 1; the first rolls in with the reference, the others with the last fit at `collect.eta`.
      value_params: of the last fit; None in the first iteration.
    """
    config = experiment.config
    collect = config.collect
    prompts = experiment.prompts('train')
    which = choose_examples(config, prompts, iteration)
    writer = DatasetWriter(experiment.dataset_dir)
    drawn_by = experiment.rollout(iteration)
    how = decoding.Guidance() if iteration == 1 else experiment.guidance(config.guidance.offset)
    eta = np.inf if iteration == 1 else collect.eta
    meta = {
        'eta': float(eta), 'sampler': dict(config.sampling), 'budget': collect.budget, 'cut': drawn_by.cut,
        'policy': experiment.value_digest(iteration - 1) if iteration > 1 else 'reference',
    }
    policies = experiment.policies([eta], [config.sampling.temperature])
    queue: Queue | None = None
    blocks = [which[i:i + collect.block_examples] for i in range(0, len(which), collect.block_examples)]
    with progress.bar(f'collect {iteration}/{config.iterations}', total=len(which) * collect.samples,
                      unit='answers') as bar:
        earned: list[float] = []
        for number, block in enumerate(blocks):
            if writer.has(iteration, number):
                bar.update(len(block) * collect.samples)
            else:
                # Made for the first block that is missing: rows and their caches take memory.
                queue = queue or experiment.queue(
                    how, experiment.decoding_params(value_params), rollout.RollingOut(drawn_by), prompts,
                    collect.batch_rows, config.seed, iteration)
                drawn = queue.draw(block, collect.samples, policies,
                                   lambda count, occupancy: bar.update(count, occupancy=occupancy))
                # Kept before it is graded: a reward that raises costs no answer.
                writer.write_shard(iteration, number, _rollouts(prompts, drawn, iteration),
                                   {**meta, 'occupancy': drawn.occupancy})
            if (iteration, number) in writer.unlabelled(experiment.reward.digest, iteration):
                labels = label(experiment, prompts, writer.read_shard(iteration, number))
                writer.write_labels(iteration, number, experiment.reward.digest, labels)
                earned += labels[~np.isnan(labels)].tolist()
            if earned:
                bar.update(0, reward=float(np.mean(earned)))
    return len(which) * collect.samples


def _rollouts(prompts: Prompts, drawn: Drawn, iteration: int) -> list[Rollout]:
    """Returns the spliced answers of a block, in the order of their units."""
    units, read = drawn.units, drawn.read
    return [
        Rollout(
            iteration=iteration, example=int(prompts.ids[index]), sample=int(sample),
            prompt=np.asarray(prompts.tokens[index], np.int32), answer=tokens[:count], cut=int(cut),
            ended=bool(ended), truncated=not ended)
        for index, sample, tokens, count, cut, ended in zip(
            units.index, units.samples, read.tokens, read.count, read.cut, read.ended, strict=True)
    ]


def label(experiment: Experiment, prompts: Prompts, rollouts: list[Rollout]) -> np.ndarray:
    """Returns the reward of each answer, NaN where the reward abstained.  # [n] float64"""
    place = {int(example): row for row, example in enumerate(prompts.ids)}
    return grade(experiment, prompts, np.array([place[r.example] for r in rollouts]),
                 [experiment.answer_text(r.answer) for r in rollouts])


def label_missing(experiment: Experiment, iterations: int) -> None:
    """Grades every shard of the first `iterations` that the current reward has no labels for.

    D stores answers, never rewards: roll-outs are drawn under π_ref whatever the reward, so another reward only needs
    new labels.
    """
    writer = DatasetWriter(experiment.dataset_dir)
    prompts = experiment.prompts('train')
    missing = writer.unlabelled(experiment.reward.digest, iterations)
    if not missing or jax.process_index() != 0:
        return
    with progress.bar('label', total=len(missing), unit='shards') as bar:
        for iteration, block in missing:
            bar.update(1)
            try:
                rollouts = writer.read_shard(iteration, block)
            except ValueError:
                if experiment.config.fit.skip_corrupt:
                    continue  # it is left out of the fit, with a warning
                raise
            writer.write_labels(iteration, block, experiment.reward.digest, label(experiment, prompts, rollouts))


def check_questions(experiment: Experiment) -> None:
    """Raises ValueError if a roll-out in D answers another question than its example has now.

    Shards that cannot be read are passed over: what needs them says so.
    """
    manifest = Manifest(experiment.dataset_dir)
    for shard in manifest.shards.values():
        try:
            rollouts = manifest.read(shard)
        except ValueError:
            continue
        changed = answering_others(experiment.prompts('train'), rollouts)
        if changed:
            raise ValueError(f'example {changed[0]} has another prompt in {experiment.dataset_dir} than the questions '
                             'have now: their files, or the tokenizer, were changed since. Bring them back, or choose '
                             'another --workdir.')


def answering_others(prompts: Prompts, rollouts: Sequence[Rollout]) -> list[int]:
    """Returns the ids of the examples that have another prompt in a roll-out than among these."""
    here = {int(example): tokens for example, tokens in zip(prompts.ids, prompts.tokens, strict=True)}
    return [one.example for one in rollouts if not np.array_equal(one.prompt, here.get(one.example, []))]
