"""The fit of one iteration: maximum likelihood of the returns in D, from the base network, with checkpoints."""
from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from qsharp_jax import calibration, checkpoint, collect, learner, progress, sharding
from qsharp_jax.data.dataset import AggregatedDataset
from qsharp_jax.data.packing import attention_mask, FitBatch, FitBatches, split_examples
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import replace_text, Writer
from qsharp_jax.models import networks
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.types import Array, Params

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A finished fit.

    Attributes:
      rate: of learning.
      params: of the network.
      quality: on held-out prompts; None if none are held out, or the loss is no number.
      diverged: what there is to say then; '' else.
    """

    rate: float
    params: Params
    quality: learner.FitEvaluation | None
    diverged: str = ''


def fit_iteration(experiment: Experiment, iteration: int, previous: Params) -> Params:
    """Returns the value network of an iteration: read back if it is finished, else fitted, on from a checkpoint.

    With several `fit.learning_rate_factors` one is fitted at each rate; that of the least loss on held-out prompts is
    kept.

    Args:
      experiment: the run.
      iteration: from 1; all of D up to it is used.
      previous: the network of the iteration before, where `fit.init` is 'previous'; else unused.
    """
    config = experiment.config
    directory = experiment.value_dir(iteration)
    if (directory / checkpoint.VALUE_FILE).exists():
        params, meta = checkpoint.restore_params(directory, experiment.value_target)
        checkpoint.check_value_meta(meta, experiment.value_meta())
        return params
    goes_on = config.fit.init == 'previous' and previous is not None
    start = previous if goes_on else experiment.init_value_params()
    train, heldout = batches(experiment, iteration)
    etas = tuple(sorted({float(config.eta), *(float(eta) for eta in config.eval.etas)}))
    best: _Fitted | None = None
    sweep: dict[str, float | None] = {}
    for rate in sorted(float(config.fit.learning_rate * factor) for factor in config.fit.learning_rate_factors):
        fitted = _fit(experiment, iteration, rate, start, train, heldout, etas)
        if fitted.quality is not None:
            sweep[f'{rate:g}'] = fitted.quality.loss
        elif fitted.diverged:
            sweep[f'{rate:g}'] = None
            _logger.warning('%s', fitted.diverged)
        if best is None or _loss(fitted) < _loss(best):
            best = fitted
    assert best is not None
    if best.diverged:  # all did
        raise ValueError(best.diverged)
    about = {'learning_rate': best.rate, 'sweep': sweep}
    if best.quality is not None:
        write_calibration(experiment, iteration, best.quality, etas, about)
    checkpoint.save_params(directory, best.params, {
        **experiment.value_meta(), **about, 'iteration': iteration, 'dataset': train.digest,
        'steps': _steps(experiment, train)})
    return best.params


def _loss(fitted: _Fitted) -> float:
    loss = fitted.quality.loss if fitted.quality is not None else math.inf
    return loss if math.isfinite(loss) else math.inf


def _steps(experiment: Experiment, train: FitBatches) -> int:
    return max(1, math.ceil(experiment.config.fit.epochs * train.steps_per_epoch))


def _fit(experiment: Experiment, iteration: int, rate: float, start: Params, train: FitBatches,
         heldout: list[FitBatch], etas: tuple[float, ...]) -> _Fitted:
    """Returns the fit at one learning rate, from `start` or on from its last checkpoint."""
    config, steps, digest = experiment.config, _steps(experiment, train), train.digest
    several = len(config.fit.learning_rate_factors) > 1
    name = f'fit_{iteration}' if experiment.role == 'value' else f'fit_{experiment.role}_{iteration}'
    stage, title = name, f'{name.replace("_", " ")}/{config.iterations}'
    if several:
        stage, title = f'{name}_{rate:g}', f'{title} at {rate:g}'
    optimizer = optimizer_config(config.fit, rate, steps)
    state = learner.init(start, optimizer)
    update = learner.make_update(scores_fn(experiment), experiment.distribution, optimizer, state,
                                 config.fit.accumulate)
    predict = learner.make_predict(scores_fn(experiment), experiment.distribution, etas)
    saved = checkpoint.Checkpoints(experiment.workdir / 'checkpoints' / stage, config.checkpoint.keep)
    found = saved.restore_latest(state)
    if found is not None:
        state, meta = found
        if meta['dataset'] != digest:
            raise ValueError(
                f'the checkpoint of {stage} was made on other data than {experiment.dataset_dir} holds now. '
                f'Delete {experiment.workdir / "checkpoints" / stage} to fit again.')
    first = int(state.step)
    writer = Writer(experiment.workdir)
    writer.resume(stage, first)
    quality: learner.FitEvaluation | None = None
    with progress.bar(title, total=steps, unit='steps', initial=first) as bar:
        for step in range(first, steps):
            state, metrics = update(state, sharding.shard_batch(experiment.mesh, train.batch(step)))
            done = step + 1
            last = done == steps
            bar.update(1)
            if last or done % config.logging.every_steps == 0:
                row = {name: float(value) for name, value in metrics.items()}
                if not math.isfinite(row['loss']):
                    saved.close()
                    writer.close()
                    return _Fitted(
                        rate, state.params, None, _diverged(stage, row['loss'], done, experiment.workdir))
                writer.write(stage, done, {**row, 'epoch': done / train.steps_per_epoch}, iteration=iteration)
                bar.update(0, loss=row['loss'])
            if heldout and (last or done % config.logging.heldout_every_steps == 0):
                quality = learner.evaluate_loss(predict, state.params, heldout, experiment.distribution)
                writer.write(stage, done, {'heldout_loss': quality.loss, 'heldout_accuracy': quality.accuracy,
                                           'heldout_brier': quality.brier,
                                           'heldout_ece': calibration.ece(_reliability(experiment, quality))},
                             iteration=iteration)
            # Of several fits each is kept until the last is done.
            wanted = several if last else done % config.fit.checkpoint_every_steps == 0
            if wanted and math.isfinite(metrics['loss']):
                saved.save(done, state, {'dataset': digest})
    saved.close()
    writer.close()
    if heldout and quality is None:  # it was finished before
        quality = learner.evaluate_loss(predict, state.params, heldout, experiment.distribution)
    return _Fitted(rate, state.params, quality)


def _diverged(stage: str, loss: float, step: int, workdir: Path) -> str:
    return (f'the loss of {stage} is {loss} at step {step}: lower fit.learning_rate, its factors or fit.clip_norm, in '
            f'a new --workdir with --relabel_from={workdir}, which takes over what was collected.')


def scores_fn(experiment: Experiment) -> learner.ScoresFn:
    """Returns the value network over packed rows, as the learner wants it."""

    def scores(params: Params, batch: FitBatch) -> Array:
        return networks.value_scores(
            experiment.value_shape, experiment.value_config, params, batch.tokens, batch.positions,
            attention_mask(batch.ends), batch.parents)

    return scores


def optimizer_config(fit: Any, rate: float, steps: int) -> OptimizerConfig:
    """Returns the optimizer of the config's section `fit` for a fit of `steps` steps at a learning rate."""
    return OptimizerConfig(
        learning_rate=rate, weight_decay=fit.weight_decay, clip_norm=fit.clip_norm or math.inf,
        schedule=fit.schedule, end_share=fit.end_share, warmup_steps=fit.warmup_steps, total_steps=steps,
        head_lr_multiplier=fit.head_lr_multiplier, frozen_layers=fit.frozen_layers, optimizer=fit.optimizer)


def batches(experiment: Experiment, iteration: int) -> tuple[FitBatches, list[FitBatch]]:
    """Returns the training batches and, on the devices, those of the held-out examples (none if none are held out).

    Held-out examples are whole prompts, the same in every iteration as far as D holds them. They keep their prompts
    without variation, which training may drop: calibration is judged on all.
    """
    config = experiment.config
    collect.label_missing(experiment, iteration)
    dataset = AggregatedDataset(experiment.dataset_dir, experiment.reward.digest, iteration,
                                skip_corrupt=config.fit.skip_corrupt)
    train, heldout = split_examples(
        dataset.examples, config.fit.heldout_fraction, config.seed, experiment.prompts('train').ids)
    if config.collect.drop_no_variation:
        train = np.intersect1d(train, dataset.varied_examples())
        if not len(train):
            raise ValueError('every prompt earned the same reward with all of its answers, and '
                             'collect.drop_no_variation left none to learn from. Raise collect.samples, choose prompts '
                             'that the reference gets partly right, or set the key to False.')
    parts = sharding.batch_shards(experiment.mesh) * config.fit.accumulate

    def packed(examples: np.ndarray) -> FitBatches:
        return FitBatches(dataset, config.fit.batch_size, config.fit.samples_per_row, config.seed + iteration,
                          examples=examples, tokens=config.fit.tokens, rows_divisible_by=parts)

    if not len(heldout):
        return packed(train), []
    held = packed(heldout)
    return packed(train), [sharding.shard_batch(experiment.mesh, held.batch(step))
                           for step in range(held.steps_per_epoch)]


def write_calibration(experiment: Experiment, iteration: int, quality: learner.FitEvaluation,
                      etas: tuple[float, ...], about: dict[str, Any]) -> None:
    """Writes what the held-out predictions of a finished fit are worth to calibration/iteration_<k>.json.

    Args:
      experiment, iteration, etas: of the fit.
      quality: of its predictions.
      about: more that is to be said of it there.
    """
    predictions, support = quality.predictions, experiment.distribution
    low, high = support.v_min, support.v_max
    bins = _reliability(experiment, quality)
    edges = calibration.position_edges(int(predictions.position.max()))
    positions = calibration.by_position(
        predictions.mean, predictions.reward, predictions.weight, predictions.position, edges, low, high)
    content = {
        **about, 'loss': quality.loss, 'accuracy': quality.accuracy, 'brier': quality.brier,
        'ece': calibration.ece(bins),
        'auc': calibration.auc(predictions.mean, predictions.reward > (low + high) / 2, predictions.weight),
        'samples': quality.num_samples,
        'bins': [
            {'low': float(lower), 'high': float(upper), 'mean_prediction': float(predicted),
             'mean_outcome': float(observed), 'standard_error': float(error), 'weight': float(weight)}
            for lower, upper, predicted, observed, error, weight in zip(
                bins.lower, bins.upper, bins.predicted, bins.observed, bins.standard_error, bins.weight)],
        'by_position': [{'position': row.first, 'last': row.last, 'loss': _loss_at(predictions, row.first, row.last),
                         'count': row.count, 'predicted': row.predicted, 'observed': row.observed, 'brier': row.brier,
                         'ece': row.ece, 'auc': row.auc} for row in positions],
        'weights': [_weights(predictions, column, eta, high, edges) for column, eta in enumerate(etas)],
    }
    name = 'iteration' if experiment.role == 'value' else experiment.role
    path = experiment.workdir / 'calibration' / f'{name}_{iteration}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    # NaN, where there is nothing to estimate an error from, is no JSON.
    text = json.dumps(content, indent=1).replace('NaN', 'null')
    replace_text(path, text + '\n')


def _reliability(experiment: Experiment, quality: learner.FitEvaluation) -> calibration.Reliability:
    predictions, support = quality.predictions, experiment.distribution
    return calibration.reliability(
        predictions.mean, predictions.reward, predictions.weight, predictions.example, support.v_min,
        support.v_max)


def _weights(predictions: learner.Predictions, column: int, eta: float, v_max: float,
             edges: list[int]) -> dict[str, Any]:
    """Returns how E exp(Z / eta) compares with what was observed, over all positions and for each range of them."""
    given = predictions.log_weight[:, column], predictions.reward, predictions.weight, predictions.example

    def plain(found: calibration.WeightCalibration) -> dict[str, Any]:
        return {name: dataclasses.asdict(mean) for name, mean in (
            ('predicted', found.predicted), ('observed', found.observed), ('difference', found.difference))}

    return {'eta': eta, **plain(calibration.weight_calibration(*given, eta, v_max)),
            'by_position': [{'position': first, **plain(found)} for first, found in calibration.weight_by_position(
                *given, predictions.position, edges, eta, v_max)]}


def _loss_at(predictions: learner.Predictions, first: int, last: int) -> float:
    at = (first <= predictions.position) & (predictions.position <= last)
    return float(np.average(predictions.loss[at], weights=predictions.weight[at]))
