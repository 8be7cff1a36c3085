"""The training of a policy by one method at one learning rate: from the reference, in rounds, with checkpoints.

A round is drawn under one policy and depends on its number and on that policy alone, and checkpoints lie between
rounds: a run that was killed ends with the same numbers.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import hashlib
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import (checkpoint, decoding, estimators, guidance, learner, pairs, policy_settings, progress, sharding,
                        units)
from qsharp_jax.baselines import losses, policies, pretraining
from qsharp_jax.baselines.policies import Batch
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment, grade
from qsharp_jax.metrics import Writer
from qsharp_jax.models import transformer
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.queue import Drawn, Queue
from qsharp_jax.types import Array, Params, Policy

_ORDER, _SHUFFLE = 0x90c, 0x5f1  # of prompts, and of the answers of a round

_logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A finished policy.

    Attributes:
      params: on the mesh, float32.
      digest: names them.
      answers: how many were graded for it.
      name: of its directory below checkpoints/.
    """

    params: Params
    digest: str
    answers: int
    name: str


class _Source(Protocol):
    """Where rounds come from.

    Attributes:
      rounds: how many there are.
      steps: gradient steps of each.
    """

    rounds: int
    steps: int

    def round(self, number: int, params: Params) -> tuple[list[Batch], dict[str, float]]:
        """Returns the batches of a round, on the host, and what is known of its answers.

        Args:
          number: of the round, from 0.
          params: of the policy as it is now.
        """


def train(experiment: Experiment, method: str, learning_rate: float) -> Trained:
    """Returns the policy of a method: read back if it is finished, else trained, on from a checkpoint if there is one.

    Args:
      experiment: the run.
      method: of `baselines.policies.METHODS`.
      learning_rate: the highest of the schedule.

    Raises:
      ValueError: it was trained with other settings, or there is nothing to learn from; in words.
    """
    config = experiment.config
    stage = f'{method}_{learning_rate:g}'
    name = policy_settings.name_of(method, learning_rate)
    directory = experiment.workdir / 'checkpoints' / name
    start = float32_start(experiment)
    settings = policy_settings.settings_of(config, method, learning_rate, len(experiment.prompts('train')))
    if (directory / checkpoint.VALUE_FILE).exists():
        params, meta = checkpoint.restore_params(directory, start)
        policy_settings.check(meta['settings'], settings, directory)
        if meta.get('reward', experiment.reward.digest) != experiment.reward.digest:
            _logger.warning('%s was trained on another reward, or on this one before its files were changed. Delete '
                            'that directory to train again.', directory)
        return Trained(params, _digest(directory), meta['answers'], name)
    source, answers = _source(experiment, method)
    steps = source.rounds * source.steps
    optimizer = optimizer_config(config.baselines, learning_rate, steps)
    state = learner.init(start, optimizer)
    update = make_update(experiment, method, optimizer, state)
    asked = experiment.reference_params if policies.METHODS[method].reference else None
    saved = checkpoint.Checkpoints(experiment.workdir / 'checkpoints' / f'unfinished_{stage}', config.checkpoint.keep)
    found = saved.restore_latest(state)
    if found is not None:
        state, meta = found
        policy_settings.check(meta['settings'], settings, experiment.workdir / 'checkpoints' / f'unfinished_{stage}')
    first = int(state.step)
    curve = _Curve(experiment)
    writer = Writer(experiment.workdir)
    writer.resume(stage, first)
    with progress.bar(f'train {stage.replace("_", " ")}', total=steps, unit='steps', initial=first) as bar:
        for number in range(first // source.steps, source.rounds):
            batches, row = source.round(number, state.params)
            for batch in batches:
                state, metrics = update(state, asked, sharding.shard_batch(experiment.mesh, batch))
            before, done, last = number * source.steps, (number + 1) * source.steps, number + 1 == source.rounds
            bar.update(source.steps)
            if last or _crosses(before, done, config.logging.every_steps):
                row |= {key: float(value) for key, value in metrics.items()}
                if not math.isfinite(row['loss']):
                    raise ValueError(f'the loss of {method} is {row["loss"]} at step {done}: lower its learning rate, '
                                     f'{learning_rate:g}, or baselines.clip_norm.')
                writer.write(stage, done, row)
                bar.update(0, loss=row['loss'])
            if curve.wanted(number + 1, last):
                writer.write(stage, done, {**curve.measure(state.params), 'answers': row['answers']})
            if not last and _crosses(before, done, config.fit.checkpoint_every_steps):
                saved.save(done, state, {'settings': settings})
    saved.close()
    writer.close()
    checkpoint.save_params(directory, state.params, {
        'reference': experiment.reference_digest, 'reward': experiment.reward.digest, 'settings': settings,
        'answers': answers})
    return Trained(state.params, _digest(directory), answers, name)


def make_update(experiment: Experiment, method: str, optimizer: OptimizerConfig,
                state: learner.LearnerState) -> jax.stages.Wrapped:
    """Returns the jitted update of a method in this run; see `policies.make_update`."""
    baselines = experiment.config.baselines
    return policies.make_update(method, {**baselines[policies.METHODS[method].section]}, log_probs_fn(experiment),
                                optimizer, state, baselines.accumulate)


def log_probs_fn(experiment: Experiment, temperature: float | None = None) -> policies.LogProbsFn:
    """Returns the log-probabilities of texts under the reference or a policy, as they are sampled, none cut off.

    Args:
      experiment: the run.
      temperature: above 0; None for the sampler's, and 1 if that is greedy.
    """
    shape = dataclasses.replace(experiment.reference_config, remat=experiment.config.baselines.remat)
    return policies.network_log_probs(
        shape, experiment.reference.vocab_size, experiment.tokenizer.holes,
        temperature or experiment.config.sampling.temperature or 1.0)


def make_divergence(experiment: Experiment, params: Params, sampled: Policy) -> Callable[[Prompts, Drawn], np.ndarray]:
    """Returns a function to the KL(policy ‖ π_ref) of drawn answers: exact at each token, summed over them, in nats.

    As for guided policies, of the policy as it is sampled, to π_ref without truncation.

    Args:
      experiment: the run.
      params: of the policy.
      sampled: the one sampler that all answers are of, on the host.  # [1] each
    """
    raw = log_probs_fn(experiment, 1.0)

    @jax.jit
    def of_texts(params: Params, reference_params: Params, batch: Batch) -> Array:
        tokens, weights = batch.tokens[:, 0], batch.weights[:, 0, 1:]

        def flat(params: Params) -> Array:
            found = raw(params, tokens)
            return found.reshape(-1, found.shape[-1])

        law = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (weights.size,)), sampled)
        each = guidance.kl_divergence(
            guidance.sampler_log_probs(flat(params), law),
            guidance.reference_log_probs(flat(reference_params), law.reference_temperature))
        return jnp.sum(each.reshape(weights.shape) * weights, axis=-1)

    def divergence(prompts: Prompts, drawn: Drawn) -> np.ndarray:
        index = drawn.units.index
        answers = [[tokens[:count]] for tokens, count in zip(drawn.read.tokens, drawn.read.count)]
        rows, length = experiment.config.eval.batch_rows, _length(experiment, prompts)
        found = []
        for first in range(0, len(index), rows):
            # The last batch is filled up with its last text: one shape serves all.
            places = np.minimum(np.arange(first, first + rows), len(index) - 1)
            batch = policies.lay_out([prompts.tokens[index[i]] for i in places], [answers[i] for i in places], length)
            found.append(sharding.to_host(of_texts(
                params, experiment.reference_params, sharding.shard_batch(experiment.mesh, batch))))
        return np.concatenate(found)[:len(index)]

    return divergence


class _OwnAnswers:
    """Rounds of answers that the policy draws itself, graded; see `_Source`."""

    def __init__(self, experiment: Experiment, method: str) -> None:
        config = experiment.config.baselines
        self._experiment, self._method = experiment, policies.METHODS[method]
        self._prompts = experiment.prompts('train')
        self._samples, batches, self._passes = round_shape(config, method)
        self._scaled = config.grpo.scaled if method == 'grpo' else None
        self._size = config.batch_size
        self._asked = config.batch_size * batches // self._samples
        if self._asked > len(self._prompts):
            raise ValueError(f'a round of {method} asks {self._asked} questions, and there are {len(self._prompts)}: '
                             'lower baselines.batch_size, or enlarge the train split.')
        self.rounds = math.ceil(
            policy_settings.answers_of(experiment.config, len(self._prompts)) / (self._asked * self._samples))
        self.steps = self._passes * batches
        self._length = _length(experiment, self._prompts)
        self._queue: Queue | None = None
        self._drawn = policies.make_drawn(log_probs_fn(experiment))
        greedy = 0.0 if self._method.greedy else experiment.config.sampling.temperature or 1.0
        self._sampler = pairs.untruncated(experiment.policies([np.inf], [greedy]), greedy)

    @property
    def answers(self) -> int:
        """Graded in all rounds."""
        return self.rounds * self._asked * self._samples

    def round(self, number: int, params: Params) -> tuple[list[Batch], dict[str, float]]:
        config = self._experiment.config
        # A row without an answer would be decoded as well.
        self._queue = self._queue or _answering(self._experiment, self._prompts, min(
            config.collect.batch_rows, self._asked * self._samples))
        # The noise of iteration 0 is the evaluation's.
        self._queue.renew(params, number + 1)
        drawn = self._queue.draw(self._which(number), self._samples, self._sampler)
        index = drawn.units.index
        answers = [tokens[:count] for tokens, count in zip(drawn.read.tokens, drawn.read.count)]
        earned = grade(self._experiment, self._prompts, index, [self._experiment.answer_text(one) for one in answers])
        batch = policies.lay_out([self._prompts.tokens[i] for i in index], [[one] for one in answers], self._length)
        advantages = losses.over_mean(earned) if self._scaled is None else losses.over_group(
            earned.reshape(self._asked, self._samples), self._scaled).ravel()
        batch = dataclasses.replace(batch, advantages=advantages.astype(np.float32))
        parts = [np.arange(first, first + self._size) for first in range(0, len(index), self._size)]
        if self._scaled is not None:  # its ratio is to the policy that drew, in the first step too
            drawn_log_probs = [sharding.to_host(self._drawn(params, sharding.shard_batch(
                self._experiment.mesh, batch.tokens[part]))) for part in parts]
            batch = dataclasses.replace(batch, drawn=np.concatenate(drawn_log_probs))
        batches = []
        for turn in range(self._passes):
            order = np.arange(len(index)) if self.steps == 1 else np.random.default_rng(
                [config.seed, _SHUFFLE, number, turn]).permutation(len(index))
            batches += [jax.tree.map(lambda leaf: leaf[order[part]], batch) for part in parts]
        graded = earned[~np.isnan(earned)]
        return batches, {
            'answers': (number + 1) * len(index), 'reward': float(graded.mean()) if len(graded) else math.nan,
            'abstained': 1 - len(graded) / len(earned), 'truncated': float(np.mean(~drawn.read.ended))}

    def _which(self, number: int) -> np.ndarray:
        """Returns the prompts of a round: those of one pass over the split differ, and each pass has its own order."""
        turns = len(self._prompts) // self._asked
        turn, place = divmod(number, turns)
        order = np.random.default_rng([self._experiment.config.seed, _ORDER, turn]).permutation(len(self._prompts))
        return order[place * self._asked:(place + 1) * self._asked]


class _Pairs:
    """Rounds of one batch of pairs each; see `_Source`."""

    steps = 1

    def __init__(self, experiment: Experiment) -> None:
        self._pairs, self.answers = pairs.read(experiment)
        config = experiment.config
        self._seed, self._size = config.seed, config.baselines.batch_size
        self.rounds = math.ceil(config.baselines.epochs * len(self._pairs) / self._size)
        self._length = units.round_up(
            max(len(pair.prompt) + max(len(pair.right), len(pair.wrong)) for pair in self._pairs), 8)

    def round(self, number: int, params: Params) -> tuple[list[Batch], dict[str, float]]:
        del params
        chosen = [self._pairs[i] for i in pretraining.batch_rows(self._seed, number, self._size, len(self._pairs))]
        batch = policies.lay_out([pair.prompt.tolist() for pair in chosen],
                                 [(pair.right.tolist(), pair.wrong.tolist()) for pair in chosen], self._length)
        return [batch], {'answers': self.answers, 'epoch': (number + 1) * self._size / len(self._pairs)}


class _Curve:
    """Accuracy on a few prompts of the split that choices are made on, whenever the number of rounds has doubled."""

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        self._experiment, self._split = experiment, config.eval.select_split
        self._count = config.baselines.curve_examples if self._split else 0
        self._queue: Queue | None = None

    def wanted(self, rounds: int, last: bool) -> bool:
        """Returns whether to measure after so many rounds."""
        return bool(self._count) and (last or rounds & (rounds - 1) == 0)

    def measure(self, params: Params) -> dict[str, float]:
        """Returns pass@1 and its standard error, of one answer a prompt."""
        experiment = self._experiment
        prompts = experiment.prompts(self._split)
        self._queue = self._queue or _answering(experiment, prompts, experiment.config.eval.batch_rows)
        self._queue.renew(params, 0)
        drawn = self._queue.draw(np.arange(min(self._count, len(prompts))), 1,
                                 experiment.policies([np.inf], [experiment.config.sampling.temperature]))
        texts = [experiment.answer_text(tokens[:count])
                 for tokens, count in zip(drawn.read.tokens, drawn.read.count)]
        earned = np.nan_to_num(grade(experiment, prompts, drawn.units.index, texts), nan=experiment.distribution.v_min)
        mean, error = estimators.mean_and_se(earned[:, None])
        return {'pass@1': mean, 'pass@1_se': error}


def round_shape(baselines: Any, method: str) -> tuple[int, int, int]:
    """Returns answers a question, batches, and passes over these, in a round of a method that draws its own answers.

    Args:
      baselines: section of the config.
      method: of `baselines.policies.METHODS`.
    """
    grpo = baselines.grpo
    return (grpo.samples, grpo.batches, grpo.passes) if method == 'grpo' else (1, 1, 1)


def _source(experiment: Experiment, method: str) -> tuple[_Source, int]:
    """Returns the rounds of a method, and how many answers are graded for all of them."""
    source: _Pairs | _OwnAnswers = (
        _Pairs(experiment) if policies.METHODS[method].pairs else _OwnAnswers(experiment, method))
    return source, source.answers


def _answering(experiment: Experiment, prompts: Prompts, rows: int) -> Queue:
    return experiment.queue(decoding.Guidance(), None, decoding.Answering(experiment.config.sampling.max_new_tokens),
                            prompts, rows, experiment.config.seed)


def float32_start(experiment: Experiment) -> Params:
    """Returns the reference's parameters to start from, where they are and in float32, to be trained."""
    shardings = transformer.param_shardings(experiment.reference_config, experiment.mesh)
    return jax.jit(lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
                   out_shardings=shardings)(experiment.reference_params)


def optimizer_config(baselines: Any, learning_rate: float, steps: int) -> OptimizerConfig:
    """Returns the optimizer of the config's section `baselines` for a training of `steps` steps."""
    return OptimizerConfig(
        learning_rate=learning_rate, weight_decay=baselines.weight_decay, clip_norm=baselines.clip_norm or math.inf,
        schedule=baselines.schedule, end_share=baselines.end_share,
        warmup_steps=math.floor(baselines.warmup_share * steps), total_steps=steps, optimizer=baselines.optimizer)


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / checkpoint.VALUE_FILE).read_bytes()).hexdigest()[:16]


def _length(experiment: Experiment, prompts: Prompts) -> int:
    """Returns one length that holds each prompt with an answer."""
    return units.prompt_width(prompts) + experiment.config.sampling.max_new_tokens


def _crosses(before: int, after: int, every: int) -> bool:
    return before // every < after // every
