"""Pairs of a right and a wrong answer to the same question, drawn once: what DPO, RPO and off-line values learn from.

As in the paper's star-graph experiment (section 3.1, appendix C) the wrong one is an answer of the reference, which is
asked until it errs. Pairs are kept as a data set like D, each as two answers without a roll-in, in a work directory of
their own inside that of the run: whatever is fitted to D is fitted to them by the same code.
"""
from __future__ import annotations

import collections
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qsharp_jax import collect, decoding, progress
from qsharp_jax.data.dataset import DatasetWriter, Manifest, Rollout
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
from qsharp_jax.metrics import replace_text
from qsharp_jax.queue import Queue
from qsharp_jax.types import Policy

SETTINGS = 'right', 'pair_tries'  # of `config.baselines`: what pairs depend on and a run may change

_RIGHT, _WRONG = 0, 1  # numbers of the two answers among those to their prompt
_NOISE = 1 << 20  # iteration of the first draw in the address of its noise, beyond those of any training

_logger = logging.getLogger(__name__)


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

    Those whose answers the reward takes otherwise than when they were drawn, because it was edited since, are left out.

    Args:
      experiment: the run.

    Raises:
      ValueError: the task has no right answers, the reward does not take them for right, there is no pair at all, or
        they were drawn with other settings.
    """
    draw(experiment)
    side = beside(experiment)
    manifest = Manifest(side.dataset_dir)
    found: list[Pair] = []
    others = 0
    for shard in manifest.upto(1):
        earned = manifest.read_labels(shard, experiment.reward.digest)
        units = {(one.example, one.sample): (one, reward >= experiment.distribution.v_max)
                 for one, reward in zip(manifest.read(shard), earned, strict=True)}
        for (example, sample), (right, is_right) in units.items():
            if sample == _RIGHT:
                wrong, is_also = units[example, _WRONG]
                if is_right and not is_also:
                    found.append(Pair(right.prompt, right.answer, wrong.answer))
                else:
                    others += 1
    if others:
        message = (f'{others} of {others + len(found)} pairs in {side.workdir} are no right and wrong answer to the '
                   'reward as it is now')
        if not found:
            raise ValueError(f'{message}: delete that directory to draw pairs anew.')
        _logger.warning('%s, and are left out.', message)
    return found, sum(meta['graded'] for meta in _metas(side))


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
    collect.check_questions(side)
    writer = DatasetWriter(side.dataset_dir)
    empty = _empty_blocks(side)
    queue: Queue | None = None
    size = config.collect.block_examples
    with progress.bar('draw pairs', total=len(which), unit='questions') as bar:
        for number, first in enumerate(range(0, len(which), size)):
            block = which[first:first + size]
            if not writer.has(1, number) and str(number) not in empty:
                queue = queue or experiment.queue(
                    decoding.Guidance(), None, decoding.Answering(config.sampling.max_new_tokens), prompts,
                    config.collect.batch_rows, config.seed)
                right, wrong, graded = _search(
                    experiment, queue, prompts, block, _given(experiment, prompts, block) if given else {})
                units = _units(block, right, wrong)
                if units:
                    writer.write_shard(1, number, units, {**settings, 'graded': graded})
                else:
                    empty[str(number)] = {**settings, 'graded': graded}
                    replace_text(_empty_path(side), json.dumps(empty))
            bar.update(len(block))
    if not Manifest(side.dataset_dir).shards:
        _empty_path(side).unlink()  # nothing is there that a change of settings would contradict
        raise ValueError(f'the reference answers none of {len(which)} questions both rightly and wrongly in '
                         f'{config.baselines.pair_tries} tries: raise baselines.pair_tries, or leave out the methods '
                         'that learn from pairs.')
    collect.label_missing(side, 1)


def _empty_path(side: Experiment) -> Path:
    return side.workdir / 'empty_blocks.json'


def _empty_blocks(side: Experiment) -> dict[str, dict[str, Any]]:
    """Returns what is known of each block without a pair, by its number."""
    path = _empty_path(side)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _metas(side: Experiment) -> list[dict[str, Any]]:
    """Returns what is known of each block that was drawn."""
    return [*(shard.meta for shard in Manifest(side.dataset_dir).upto(1)), *_empty_blocks(side).values()]


def _check_settings(side: Experiment, settings: dict[str, Any]) -> None:
    """Raises ValueError if a block of pairs says that it was drawn with other settings."""
    for meta in _metas(side):
        differ = [f'baselines.{name} was {meta[name]!r}, now {value!r}' for name, value in settings.items()
                  if meta.get(name, value) != value]
        if differ:
            raise ValueError(f'the pairs in {side.workdir} were drawn with other settings: {"; ".join(differ)}. Give '
                             'them back their values, or delete that directory to draw pairs anew.')


def untruncated(policies: Policy, temperature: float) -> Policy:
    """Returns policies, on the host, that sample from all tokens at a temperature."""
    return dataclasses.replace(
        policies, temperature=np.full_like(policies.temperature, temperature), top_k=np.zeros_like(policies.top_k),
        top_p=np.ones_like(policies.top_p))


def _given(experiment: Experiment, prompts: Prompts, block: np.ndarray) -> dict[int, list[int]]:
    """Returns the ids of the task's own answers, without an end, by the row numbers of their prompts."""
    texts = [prompts.columns['answer'][index] for index in block]
    earned = grade(experiment, prompts, block, texts)
    for text, reward in zip(texts, earned):
        if not reward >= experiment.distribution.v_max:
            raise ValueError(f"baselines.right is 'answer', and the answer {text!r} earns {reward:g}, less than the "
                             f"greatest reward, {experiment.distribution.v_max:g}: use 'sampled'.")
    return {int(index): experiment.tokenizer.encode(text) for index, text in zip(block, texts)}


def _search(experiment: Experiment, queue: Queue, prompts: Prompts, block: np.ndarray,
            given: dict[int, list[int]]) -> tuple[dict[int, Rollout], dict[int, Rollout], int]:
    """Returns a right and the first wrong answer by the row numbers of prompts, and how many answers were graded.

    Right is what is given, or else the first right answer. Given ones end as most of the answers do: of several end
    tokens a model writes one, and any other would tell right from wrong by itself.
    """
    right: dict[int, Rollout] = {}
    wrong: dict[int, Rollout] = {}
    ends: collections.Counter[int] = collections.Counter()
    graded = 0
    sampler = untruncated(experiment.policies([np.inf], [1.0]), 1.0)
    for attempt in range(experiment.config.baselines.pair_tries):
        asked = [int(index) for index in block if not ((index in right or index in given) and index in wrong)]
        if not asked:
            break
        queue.renew(experiment.reference_params, _NOISE + attempt)
        drawn = queue.draw(asked, 1, sampler)
        answers = [tokens[:count] for tokens, count in zip(drawn.read.tokens, drawn.read.count)]
        earned = grade(experiment, prompts, drawn.units.index, [experiment.answer_text(one) for one in answers])
        graded += len(answers)
        for index, answer, ended, reward in zip(drawn.units.index, answers, drawn.read.ended, earned, strict=True):
            if ended:
                ends[int(answer[-1])] += 1
            if not np.isnan(reward):
                kind, sample = (right, _RIGHT) if reward >= experiment.distribution.v_max else (wrong, _WRONG)
                kind.setdefault(int(index), _unit(prompts, index, sample, answer, bool(ended)))
    end = max(sorted(ends) or experiment.eos_ids, key=lambda token: ends[token])
    right |= {index: _unit(prompts, index, _RIGHT, [*answer, end], ended=True) for index, answer in given.items()}
    return right, wrong, graded


def _units(block: np.ndarray, right: dict[int, Rollout], wrong: dict[int, Rollout]) -> list[Rollout]:
    """Returns the two answers to each prompt that has both, in the order of the prompts."""
    both = [int(index) for index in block if index in right and index in wrong]
    return [one for index in both for one in (right[index], wrong[index])]


def _unit(prompts: Prompts, index: Any, sample: int, answer: Any, ended: bool) -> Rollout:
    return Rollout(iteration=1, example=int(prompts.ids[index]), sample=sample,
                   prompt=np.asarray(prompts.tokens[index], np.int32), answer=np.asarray(answer, np.int32), cut=0,
                   ended=ended, truncated=not ended)
