"""The fit of the value network: its state, one jitted update, and what held-out samples say of it.

The loss is the paper's (Q#, arXiv 2502.20548, section 2.2): the negative log-likelihood of the observed
return, averaged over each sample's tokens and then over samples. How samples are packed into rows, split into
micro-batches or laid over devices changes nothing but rounding.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax import optimizers, sharding
from qsharp_jax.categorical import ReturnDistribution
from qsharp_jax.data.packing import FitBatch
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.types import Array, Params

ScoresFn = Callable[[Params, FitBatch], Array]  # scores of each token as chosen  # [B, T, K]
Metrics = dict[str, Array]


@struct.dataclass
class LearnerState:
    """What an update reads and writes.

    Attributes:
      step: number of updates made.  # [] int32
      params: of the whole network, frozen ones included.
      opt_state: of the optimizer, for the trained parameters only.
    """

    step: Array
    params: Params
    opt_state: Any


def init(params: Params, config: OptimizerConfig) -> LearnerState:
    """Returns the state before the first update; its arrays live where `params` do.

    `params` are copied, since updates consume the state's arrays, and a trunk shares its own with the network
    that it was cut from. Raises ValueError when more layers are to be frozen than there are.
    """
    make = _starter(config)
    shardings = sharding.beside_params(params, jax.eval_shape(make, params))
    return jax.jit(make, out_shardings=shardings)(params)


def abstract_state(params: Params, config: OptimizerConfig) -> LearnerState:
    """Returns what `init` would, as jax.ShapeDtypeStructs with shardings; `params` are such as well."""
    shapes = jax.eval_shape(_starter(config), params)
    return sharding.abstract(shapes, sharding.beside_params(params, shapes))


def _starter(config: OptimizerConfig) -> Callable[[Params], LearnerState]:
    optimizer = optimizers.make(config)

    def make(params: Params) -> LearnerState:
        trained, _ = optimizers.split(params, config)
        return LearnerState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(trained))

    return make


def make_update(
    scores_fn: ScoresFn,
    distribution: ReturnDistribution,
    config: OptimizerConfig,
    state: LearnerState,
    accumulate: int = 1,
) -> jax.stages.Wrapped:
    """Returns one jitted update, (state, batch) -> (state, metrics), which consumes the state it is given.

    Args:
      scores_fn: (params, batch) -> the value network's scores of each token as chosen [B, T, K].
      distribution: gives those scores their meaning.
      config: as in `init`.
      state: from `init`, or anything with its shapes; read for where its arrays live, which updates keep.
      accumulate: number of micro-batches that a batch's rows are worked through in, to save memory.

    The update compiles once per shape of the batch. Metrics are scalars of the whole batch: `loss` (see
    `FitBatch.weights`), `accuracy` (share of tokens, weighted as in the loss, whose predicted mean is on the
    side of its reward; NaN when the rewards are not binary), `grad_norm` before clipping, `update_norm`,
    `learning_rate`. Raises ValueError on first use when `accumulate` does not divide the rows.
    """
    optimizer, rate = optimizers.make(config), optimizers.learning_rate(config)
    if accumulate < 1:
        raise ValueError(f'accumulate is {accumulate}: it must be at least 1.')

    def update(state: LearnerState, batch: FitBatch) -> tuple[LearnerState, Metrics]:
        trained, frozen = optimizers.split(state.params, config)
        # One divisor for every micro-batch, so that each sample counts the same in whichever it lands.
        num_samples = _num_samples(batch)

        def loss_fn(trained: Params, part: FitBatch) -> tuple[Array, tuple[Array, Array]]:
            scores = scores_fn(optimizers.merge(trained, frozen), part)
            loss = jnp.sum(part.weights * distribution.loss(scores, jnp.asarray(part.rewards))) / num_samples
            right = jnp.sum(part.weights * _right(distribution, scores, part)) / num_samples
            return loss, (loss, right)

        grad_fn = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            grads, sums = grad_fn(trained, batch)
        else:
            def add(total: Any, part: FitBatch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, grad_fn(trained, part)), None

            zero = jnp.zeros((), jnp.float32)
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
            (grads, sums), _ = jax.lax.scan(
                add, (zeros, (zero, zero)), micro_batches(batch, accumulate))
        loss, accuracy = sums
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = optimizers.merge(optax.apply_updates(trained, updates), frozen)
        metrics = {
            'loss': loss,
            'accuracy': accuracy,
            'grad_norm': optax.tree.norm(grads),
            'update_norm': optax.tree.norm(updates),
            'learning_rate': jnp.asarray(rate(state.step), jnp.float32),
        }
        return LearnerState(state.step + 1, params, opt_state), metrics

    # Left to itself the compiler may lay the new state out otherwise: the next update would compile again.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a value network said about N tokens with a loss, on the host.

    Attributes:
      mean: predicted mean of the return.  # [N]
      log_weight: log E exp(Z/eta), one column per eta asked for.  # [N, E]
      reward: the return that was observed.  # [N]
      position: of the token in its answer, from 0.  # [N]
      loss: as in the fit.  # [N]
      weight: its share in its sample's loss; they sum to 1 over a sample.  # [N]
      example: id of the prompt.  # [N]
    """

    mean: np.ndarray
    log_weight: np.ndarray
    reward: np.ndarray
    position: np.ndarray
    loss: np.ndarray
    weight: np.ndarray
    example: np.ndarray


@dataclasses.dataclass(frozen=True)
class FitEvaluation:
    """Quality of a value network on held-out samples.

    Attributes:
      loss: as in the fit.
      accuracy: as in the fit; NaN when the rewards are not binary.
      brier: squared error of the predicted mean, with returns scaled to 0 .. 1, weighted as the loss.
      num_samples: how many samples these are means over.
      predictions: what `calibration` works on.
    """

    loss: float
    accuracy: float
    brier: float
    num_samples: float
    predictions: Predictions


def make_predict(
    scores_fn: ScoresFn, distribution: ReturnDistribution, etas: Sequence[float] = ()
) -> Callable[[Params, FitBatch], Metrics]:
    """Returns a jitted (params, batch) -> {name: value per token}, for `evaluate_loss`.

    Args:
      scores_fn: as in `make_update`.
      distribution: gives those scores their meaning.
      etas: E values of eta whose guiding weights are wanted.

    The names: `loss`, `right`, `mean` [B, T] and `log_weight` [B, T, E].
    """
    def predict(params: Params, batch: FitBatch) -> Metrics:
        scores = scores_fn(params, batch)
        weights = [distribution.log_weight(scores, jnp.full(scores.shape[:-1], eta)) for eta in etas]
        return {
            'loss': distribution.loss(scores, jnp.asarray(batch.rewards)),
            'right': _right(distribution, scores, batch),
            'mean': distribution.mean(scores),
            'log_weight': jnp.stack(weights, -1) if weights else jnp.zeros((*scores.shape[:-1], 0)),
        }

    return jax.jit(predict)


def evaluate_loss(
    predict: Callable[[Params, FitBatch], Metrics],
    params: Params,
    batches: Iterable[FitBatch],
    distribution: ReturnDistribution,
) -> FitEvaluation:
    """Returns loss, accuracy, Brier score and the predictions themselves, over held-out batches.

    Args:
      predict: from `make_predict`.
      params: of the value network.
      batches: as in the fit.
      distribution: as in `make_predict`.

    Raises ValueError when no batch holds a token with a loss.
    """
    kept: list[dict[str, np.ndarray]] = []
    for batch in batches:
        out, batch = sharding.to_host((predict(params, batch), batch))
        out['example'], out['position'] = batch.examples, batch.answer_positions
        out['reward'], out['weight'] = batch.rewards, batch.weights
        kept.append({name: array[out['weight'] > 0] for name, array in out.items()})
    if not any(len(part['weight']) for part in kept):
        raise ValueError('there is no held-out sample to judge the value network on: hold out more examples.')
    all_ = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
    weight = all_['weight'].astype(np.float64)
    total = weight.sum()
    low, high = distribution.atoms[0], distribution.atoms[-1]
    error = (all_['mean'].astype(np.float64) - all_['reward']) / (high - low)
    return FitEvaluation(
        loss=float(np.sum(weight * all_['loss']) / total),
        accuracy=float(np.sum(weight * all_['right']) / total),
        brier=float(np.sum(weight * error ** 2) / total),
        num_samples=float(total),
        predictions=Predictions(**{name: all_[name] for name in Predictions.__dataclass_fields__}),
    )


def _num_samples(batch: FitBatch) -> Array:
    # Weights sum to 1 over each sample. A batch of padding alone has loss 0 rather than 0 / 0.
    total = jnp.sum(batch.weights)
    return jnp.where(total > 0, total, 1.0)


def _right(distribution: ReturnDistribution, scores: Array, batch: FitBatch) -> Array:
    """Returns whether each predicted mean is on the side of its reward [B, T]; NaN for a reward within."""
    low, high = distribution.atoms[0], distribution.atoms[-1]
    middle = (low + high) / 2
    right = (distribution.mean(scores) > middle) == (batch.rewards > middle)
    binary = (batch.rewards == low) | (batch.rewards == high) | (batch.weights == 0)
    return jnp.where(binary, right, jnp.nan)


def micro_batches(batch: Any, accumulate: int) -> Any:
    """Returns the rows of a batch in `accumulate` parts, along a new leading axis, inside jit.

    Raises ValueError unless it divides them.
    """
    rows = batch.tokens.shape[0]
    if rows % accumulate:
        raise ValueError(f'a batch of {rows} rows does not split into accumulate={accumulate} micro-batches: '
                         'give an accumulate that divides it.')

    def split(leaf: Array) -> Array:
        # Every `accumulate`-th row, so that each micro-batch has rows on every device and none has to move.
        return leaf.reshape(rows // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
