"""Pairs of a right and a wrong answer to the same question, drawn once: what DPO, RPO and off-line values learn from.

As in the paper's star-graph experiment (section 3.1, appendix C) the wrong one is an answer of the reference, which is
asked until it errs. Pairs are kept as a data set like D, each as two answers without a roll-in, in a work directory of
their own inside that of the run: whatever is fitted to D is fitted to them by the same code.
"""
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from qsharp_jax import collect, decoding, progress
from qsharp_jax.data.dataset import DatasetWriter, Manifest, Rollout
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
from qsharp_jax.queue import Queue
from qsharp_jax.types import Policy

SETTINGS = 'right', 'pair_tries'  # of `config.baselines`: what pairs depend on and a run may change

_RIGHT, _WRONG = 0, 1  # numbers of the two answers among those to their prompt
_NOISE = 1 << 20  # iteration of the first draw in the address of its noise, beyond those of any training


class Pair(NamedTuple):
    """Two answers to a prompt, as ids; each ends with its end token where it has one.

    Attributes:
      prompt: of both.  # [P]
      right: earned the greatest reward.  # [L]
      wrong: earned less.  # [L]
    """

    prompt: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


def beside(experiment: Experiment) -> Experiment:
    """Returns the experiment whose data set is the pairs of this one."""
    return dataclasses.replace(experiment, workdir=experiment.workdir / 'pairs')


def read(experiment: Experiment) -> tuple[list[Pair], int]:
    """Returns the pairs, drawn unless they are there, and how many answers were graded for them.

    Args:
      experiment: the run.

    Raises:
      ValueError: the task has no right answers, the reward does not take them for right, there is no pair at all, or
        they were drawn with other settings.
    """
    draw(experiment)
    manifest = Manifest(beside(experiment).dataset_dir)
    found: list[Pair] = []
    for shard in manifest.upto(1):
        units = {(one.example, one.sample): one for one in manifest.read(shard)}
        found += [Pair(right.prompt, right.answer, units[example, _WRONG].answer)
                  for (example, sample), right in units.items() if sample == _RIGHT]
    return found, sum(shard.meta['graded'] for shard in manifest.upto(1))


def draw(experiment: Experiment) -> None:
    """Adds the pairs of the first iteration's prompts and their labels to the data set beside, unless they are there.

    Raises:
      ValueError: as `read`, or pairs are there that were drawn with other settings.
    """
    config = experiment.config
    prompts = experiment.prompts('train')
    which = collect.choose_examples(config, prompts, 1)
    given = config.baselines.right == 'answer'
    if given and 'answer' not in prompts.columns:
        raise ValueError("baselines.right is 'answer', and the task's questions have none: use 'sampled'.")
    side = beside(experiment)
    settings = {name: config.baselines[name] for name in SETTINGS}
    _check_settings(side, settings)
    writer = DatasetWriter(side.dataset_dir)
    queue: Queue | None = None
    size = config.collect.block_examples
    with progress.bar('draw pairs', total=len(which), unit='questions') as bar:
        for number, first in enumerate(range(0, len(which), size)):
            block = which[first:first + size]
            if not writer.has(1, number):
                queue = queue or experiment.queue(
                    decoding.Guidance(), None, decoding.Answering(config.sampling.max_new_tokens), prompts,
                    config.collect.batch_rows, config.seed)
                right = _given(experiment, prompts, block) if given else {}
                wrong, graded = _search(experiment, queue, prompts, block, right)
                writer.write_shard(1, number, _units(prompts, block, right, wrong, config.baselines.pair_tries),
                                   {**settings, 'graded': graded})
            bar.update(len(block))
    collect.label_missing(side, 1)


def _check_settings(side: Experiment, settings: dict[str, Any]) -> None:
    """Raises ValueError if a block of pairs says that it was drawn with other settings."""
    for shard in Manifest(side.dataset_dir).upto(1):
        differ = [f'baselines.{name} was {shard.meta[name]!r}, now {value!r}' for name, value in settings.items()
                  if shard.meta.get(name, value) != value]
        if differ:
            raise ValueError(f'the pairs in {side.workdir} were drawn with other settings: {"; ".join(differ)}. Give '
                             'them back their values, or delete that directory to draw pairs anew.')


def untruncated(policies: Policy, temperature: float) -> Policy:
    """Returns policies, on the host, that sample from all tokens at a temperature."""
    return dataclasses.replace(
        policies, temperature=np.full_like(policies.temperature, temperature), top_k=np.zeros_like(policies.top_k),
        top_p=np.ones_like(policies.top_p))


def _given(experiment: Experiment, prompts: Prompts, block: np.ndarray) -> dict[int, Rollout]:
    """Returns the task's own answers by the row numbers of their prompts."""
    end = min(experiment.tokenizer.eos_ids)
    texts = [prompts.columns['answer'][index] for index in block]
    earned = grade(experiment, prompts, block, texts)
    for text, reward in zip(texts, earned):
        if not reward >= experiment.distribution.v_max:
            raise ValueError(f"baselines.right is 'answer', and the answer {text!r} earns {reward:g}, less than the "
                             f"greatest reward, {experiment.distribution.v_max:g}: use 'sampled'.")
    return {int(index): _unit(prompts, index, _RIGHT, [*experiment.tokenizer.encode(text), end], ended=True)
            for index, text in zip(block, texts)}


def _search(experiment: Experiment, queue: Queue, prompts: Prompts, block: np.ndarray,
            right: dict[int, Rollout]) -> tuple[dict[int, Rollout], int]:
    """Returns the first wrong answer to each prompt, and how many were graded; missing right ones go into `right`."""
    wrong: dict[int, Rollout] = {}
    graded = 0
    sampler = untruncated(experiment.policies([np.inf], [1.0]), 1.0)
    for attempt in range(experiment.config.baselines.pair_tries):
        asked = [int(index) for index in block if not (index in right and index in wrong)]
        if not asked:
            break
        queue.renew(experiment.reference_params, _NOISE + attempt)
        drawn = queue.draw(asked, 1, sampler)
        answers = [tokens[:count] for tokens, count in zip(drawn.read.tokens, drawn.read.count)]
        earned = grade(experiment, prompts, drawn.units.index, [experiment.answer_text(one) for one in answers])
        graded += len(answers)
        for index, answer, ended, reward in zip(drawn.units.index, answers, drawn.read.ended, earned, strict=True):
            if not np.isnan(reward):
                kind, sample = (right, _RIGHT) if reward >= experiment.distribution.v_max else (wrong, _WRONG)
                kind.setdefault(int(index), _unit(prompts, index, sample, answer, bool(ended)))
    return wrong, graded


def _units(prompts: Prompts, block: np.ndarray, right: dict[int, Rollout], wrong: dict[int, Rollout],
           tries: int) -> list[Rollout]:
    """Returns the two answers to each prompt that has both, in the order of the prompts."""
    both = [int(index) for index in block if index in right and index in wrong]
    if not both:
        raise ValueError(f'the reference answers none of {len(block)} questions both rightly and wrongly in {tries} '
                         'tries: raise baselines.pair_tries, or leave out the methods that learn from pairs.')
    return [one for index in both for one in (right[index], wrong[index])]


def _unit(prompts: Prompts, index: Any, sample: int, answer: Any, ended: bool) -> Rollout:
    return Rollout(iteration=1, example=int(prompts.ids[index]), sample=sample,
                   prompt=np.asarray(prompts.tokens[index], np.int32), answer=np.asarray(answer, np.int32), cut=0,
                   ended=ended, truncated=not ended)
