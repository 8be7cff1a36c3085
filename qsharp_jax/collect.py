"""Collection: the units of one iteration, block by block, into the aggregated dataset D.

A block of prompts is the unit of work: its answers are decoded, graded and written as one shard. A killed run
redoes the unfinished block whole, with the same noise, so it ends with the same data.
"""
from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qsharp_jax import decoding, progress, rollout, sharding, units
from qsharp_jax.data.dataset import DatasetWriter, Rollout
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
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
    sharding.check_divisible(collect.batch_rows, experiment.mesh, 'collect.batch_rows')
    how = decoding.Guidance() if iteration == 1 else experiment.guidance(config.guidance.offset)
    eta = np.inf if iteration == 1 else collect.eta
    meta = {
        'eta': float(eta), 'sampler': dict(config.sampling), 'budget': collect.budget, 'cut': collect.cut,
        'policy': experiment.value_digest(iteration - 1) if iteration > 1 else 'reference',
    }
    value_params = experiment.decoding_params(value_params)
    width = units.prompt_width(prompts)
    blocks = [which[i:i + collect.block_examples] for i in range(0, len(which), collect.block_examples)]
    with progress.bar(f'collect {iteration}/{config.iterations}', total=len(which) * collect.samples,
                      unit='answers') as bar:
        earned: list[float] = []
        for number, block in enumerate(blocks):
            if not writer.has(iteration, number):
                drawn = []
                for batch in units.batches(prompts, block, collect.samples, 1, collect.batch_rows, width):
                    drawn += _draw(experiment, how, value_params, eta, prompts, batch, iteration)
                # Kept before it is graded: a reward that raises costs no answer.
                writer.write_shard(iteration, number, drawn, meta)
            if (iteration, number) in writer.unlabelled(experiment.reward.digest, iteration):
                labels = label(experiment, prompts, writer.read_shard(iteration, number))
                writer.write_labels(iteration, number, experiment.reward.digest, labels)
                earned += labels[~np.isnan(labels)].tolist()
            bar.update(len(block) * collect.samples, **({'reward': float(np.mean(earned))} if earned else {}))
    return len(which) * collect.samples


def _draw(experiment: Experiment, how: decoding.Guidance, value_params: Params, eta: float, prompts: Prompts,
          batch: units.UnitBatch, iteration: int) -> list[Rollout]:
    """Returns the spliced answers of one batch, padding left out."""
    config = experiment.config
    rows = len(batch.policies)
    policy = experiment.policy(np.full(rows, eta), np.full(rows, config.sampling.temperature))
    drawn = sharding.to_host(rollout.collect(
        experiment.reference, how, experiment.reference_params, value_params, policy,
        experiment.place_units(batch.units), experiment.rollout, experiment.eos_ids, config.seed, iteration,
        batch.shared))
    return [
        Rollout(
            iteration=iteration, example=int(prompts.ids[batch.index[i]]), sample=int(batch.units.samples[i]),
            prompt=np.asarray(prompts.tokens[batch.index[i]], np.int32), answer=drawn.tokens[i, :drawn.count[i]],
            cut=int(drawn.cut[i]), ended=bool(drawn.ended[i]), truncated=not bool(drawn.ended[i]))
        for i in range(batch.real)
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
            rollouts = writer.read_shard(iteration, block)
            writer.write_labels(iteration, block, experiment.reward.digest, label(experiment, prompts, rollouts))
            bar.update(1)
