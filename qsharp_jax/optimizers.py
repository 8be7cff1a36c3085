"""How parameters are trained: the optimizer that a config names, and which parameters it trains."""
from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import optax

from qsharp_jax.types import Array, Params

SCHEDULES = ('constant', 'cosine')
OPTIMIZERS = ('adamw', 'muon')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are trained.

    Attributes:
      learning_rate: the highest of the schedule.
      weight_decay: decoupled, times the learning rate; biases and scales of norms are spared.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      clip_norm: gradients are scaled down to this global norm; `inf` never.
      schedule: 'constant', or 'cosine' down to `end_share` at `total_steps`; either starts with a linear warm-up.
      end_share: share of the learning rate that 'cosine' ends at.
      warmup_steps: updates until the learning rate is reached.
      total_steps: updates of the whole fit; only 'cosine' needs it.
      head_lr_multiplier: the learning rate of the freshly drawn head over that of the trunk.
      frozen_layers: number of first layers of the trunk that are not trained; with any, its embeddings are
        not either.
      optimizer: 'adamw', or 'muon' for the matrices of the trunk's layers, its updates scaled to the size of
        Adam's, with AdamW for everything else.
    """

    learning_rate: float
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 5.0
    schedule: str = 'constant'
    end_share: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 0
    head_lr_multiplier: float = 1.0
    frozen_layers: int = 0
    optimizer: str = 'adamw'

    def __post_init__(self) -> None:
        for name in ('learning_rate', 'clip_norm', 'head_lr_multiplier'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be above 0.')
        for name in ('weight_decay', 'warmup_steps', 'total_steps', 'frozen_layers'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be 0 or more.')
        for name in ('b1', 'b2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}: it must be at least 0 and below 1.')
        for name, allowed in (('schedule', SCHEDULES), ('optimizer', OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} is {getattr(self, name)!r}; allowed: {", ".join(allowed)}.')
        if not 0 <= self.end_share <= 1:
            raise ValueError(f'end_share is {self.end_share}: it is a share, 0 to 1.')
        if self.schedule == 'cosine' and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f'the schedule cosine needs total_steps above warmup_steps; they are {self.total_steps} and '
                f'{self.warmup_steps}.')


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate of the trunk as a function of the number of updates made before."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = optax.constant_schedule(peak)
    if config.schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, config.total_steps - warmup, config.end_share)
    # (step + 1) / warmup: an update at rate 0 would be wasted.
    return optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), after], [warmup])


def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optimizer; it tells layers, head, biases and norms by the names in parameters' paths."""
    direction = optax.scale_by_adam(config.b1, config.b2)
    if config.optimizer == 'muon':
        # optax's own mixture of the two would let Adam's part decay biases.
        muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=_matrices, consistent_rms=0.2)
        both = {'muon': optax.chain(muon, optax.scale(-1.0)), 'adam': direction}
        direction = optax.partition(both, _labels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.masked(optax.scale(config.head_lr_multiplier), _heads),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def split(params: Params, config: OptimizerConfig) -> tuple[Params, Params]:
    """Returns the trained parameters and the frozen ones, each with None in the place of the other's."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = 1 + max((layer for path in paths if (layer := _layer(path)) is not None), default=-1)
    if config.frozen_layers and any('layers' in _names(path) for path in paths):
        raise ValueError(f'frozen_layers is {config.frozen_layers}, and the layers are stacked, which are trained '
                         'together or not at all: set value.scan_layers to False.')
    if config.frozen_layers > layers:
        raise ValueError(f'frozen_layers is {config.frozen_layers}, but the trunk has {layers} layers.')

    def is_frozen(path: Any) -> bool:
        layer, names = _layer(path), _names(path)
        below = layer is not None and layer < config.frozen_layers
        return below or (config.frozen_layers > 0 and names[-1] in ('embedding', 'position_embedding'))

    pick = jax.tree_util.tree_map_with_path
    return (pick(lambda path, leaf: None if is_frozen(path) else leaf, params),
            pick(lambda path, leaf: leaf if is_frozen(path) else None, params))


def merge(trained: Params, frozen: Params) -> Params:
    """Returns the parameters that `split` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def _layer(path: Any) -> int | None:
    found = [re.fullmatch(r'layers_(\d+)', name) for name in _names(path)]
    return next((int(match[1]) for match in found if match), None)


def _heads(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: 'head' in _names(path), params)


def _decayed(params: Params) -> Any:
    def decays(path: Any, leaf: Array) -> bool:
        return _names(path)[-1] not in ('bias', 'scale') and leaf.ndim > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def _matrices(params: Params) -> Any:
    """Returns Muon's view of each kernel of the trunk's layers as a matrix, None for what AdamW trains."""
    def view(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if _layer(path) is None and 'layers' not in _names(path) or _names(path)[-1] != 'kernel' or leaf.ndim < 2:
            return None
        # The layers of a stack are matrices each.
        first = int('layers' in _names(path))
        # Attention's output kernel is [heads, head_dim, embed]; every other one has a single input axis.
        inputs = leaf.ndim - 1 if _names(path)[-2] == 'output' else first + 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, inputs)), tuple(range(inputs, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(view, params)


def _labels(params: Params) -> Any:
    return jax.tree.map(lambda _, view: 'adam' if view is None else 'muon', params, _matrices(params))
