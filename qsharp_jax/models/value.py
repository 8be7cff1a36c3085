"""The value model: a decoder trunk and a head that scores the return distribution of a token.

V-type reads the hidden state *at* a token, which has seen it; Q-type reads the hidden state before it and
scores the whole vocabulary at once (paper App. D).
"""
from __future__ import annotations

import dataclasses
from typing import cast

from flax import linen as nn
import jax
import jax.numpy as jnp

from qsharp_jax.models import transformer
from qsharp_jax.models.layers import parameter
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Array, Params

KINDS = ('v', 'q')
INITS = ('truncate', 'reference', 'pretrained', 'scratch')
WHOLE = ('reference', 'pretrained')  # that copy every layer
EXTRA_INPUTS = ('stream', 'restart')
HEAD_INITS = ('zero', 'normal', 'lm_head')


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """The shape and the start of a value model.

    Attributes:
      num_scores: K, scores of one return distribution (`ReturnDistribution.num_scores`).
      kind: 'v' scores a token from its own hidden state; 'q' scores all next tokens from their parent's.
      init: 'truncate' copies the first `layers` blocks of the base, which is the reference or another checkpoint;
        'reference' and 'pretrained' copy all of them, of the reference and of another checkpoint; 'scratch' draws
        `layers` fresh blocks of the base's widths.
      layers: number of blocks under 'truncate' and 'scratch'; None under the others.
      extra_layers: fresh blocks on top of the copied ones; on the copied blocks' own stream they change nothing at
        the start.
      extra_input: what the extra blocks read: 'stream', the copied blocks' own; or 'restart', its norm plus the norm
        of the token's embedding. With tied embeddings the last state of a language model points at the token it
        expects next, so 'restart' shows the token and the expectation in one space, where they can be compared.
      lookahead: under 'restart', how many expected tokens further the copied blocks are run for the extra ones to read
        (`TransformerConfig.lookahead`).
      head_init: 'zero' (a constant value, so that a fresh value guides nowhere), 'normal', or 'lm_head' (kind
        'q' only: every score of a token starts as its logit).
      head_bias: whether the head has a bias.
    """

    num_scores: int
    kind: str = 'v'
    init: str = 'truncate'
    layers: int | None = None
    extra_layers: int = 0
    extra_input: str = 'stream'
    lookahead: int = 0
    head_init: str = 'zero'
    head_bias: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
                ('kind', KINDS), ('init', INITS), ('extra_input', EXTRA_INPUTS), ('head_init', HEAD_INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f'value {name} is {getattr(self, name)!r}; allowed: {", ".join(allowed)}.')
        if self.num_scores < 1:
            raise ValueError(f'num_scores is {self.num_scores}; it must be at least 1.')
        if self.extra_layers < 0:
            raise ValueError(f'extra_layers is {self.extra_layers}; it must be at least 0.')
        if self.extra_input == 'restart' and not self.extra_layers:
            raise ValueError("value extra_input is 'restart', but extra_layers is 0: there is nothing to read it.")
        if self.lookahead and (self.extra_input != 'restart' or self.init not in WHOLE):
            raise ValueError(f"value lookahead is {self.lookahead}, but init is {self.init!r} and extra_input "
                             f"{self.extra_input!r}: a look ahead needs every layer of a language model, and layers "
                             "that read it. Use init 'reference' or 'pretrained' and extra_input 'restart'.")
        if self.init in WHOLE and self.layers is not None:
            raise ValueError(f'value layers is {self.layers}, but init {self.init!r} copies every layer: leave '
                             "out layers, or use init 'truncate'.")
        if self.init not in WHOLE and (self.layers is None or self.layers < 1):
            raise ValueError(f'value layers is {self.layers}; init {self.init!r} needs at least 1.')
        if self.head_init == 'lm_head' and self.kind != 'q':
            raise ValueError("head_init 'lm_head' needs kind 'q': a V-type head has no score per vocabulary "
                             'entry.')


class ValueHead(nn.Module):
    """A linear map from hidden states to scores; under 'q' one map for each vocabulary entry."""

    value_config: ValueConfig
    config: TransformerConfig

    @nn.compact
    def __call__(self, hidden: Array, tokens: Array) -> Array:  # [..., D], [...] -> [..., K]
        value_config, config = self.value_config, self.config
        q_type = value_config.kind == 'q'
        shape = (config.vocab_size,) * q_type + (value_config.num_scores,)
        axes: tuple[str | None, ...] = ('vocab',) * q_type + (None,)
        zeros = nn.initializers.zeros_init()
        draw = nn.initializers.normal(0.02) if value_config.head_init == 'normal' else zeros
        kernel = parameter(self, 'kernel', draw, (*axes, 'embed'), (*shape, config.width), config.param_dtype)
        hidden = hidden.astype(jnp.float32)
        if q_type:
            scores = jnp.einsum('...d,...kd->...k', hidden, kernel[tokens].astype(jnp.float32))
        else:
            flat = hidden.reshape(-1, config.width) @ kernel.astype(jnp.float32).T
            scores = flat.reshape(*hidden.shape[:-1], value_config.num_scores)
        if value_config.head_bias:
            bias = parameter(self, 'bias', zeros, axes, shape, config.param_dtype).astype(jnp.float32)
            scores = scores + (bias[tokens] if q_type else jnp.broadcast_to(bias, scores.shape))
        return scores


def trunk_config(value_config: ValueConfig, base_config: TransformerConfig) -> TransformerConfig:
    """Returns the config of the value model's trunk: its base's, with its own layers and no LM head.

    Raises:
      ValueError: if 'truncate' asks for more layers than the base has, or 'lm_head' for a head that is not linear.
    """
    layers = value_config.layers or base_config.layers
    if value_config.init == 'truncate' and layers > base_config.layers:
        raise ValueError(f'value layers is {layers}, but the reference has {base_config.layers}, or the checkpoint of '
                         'value.source. Lower it, or add fresh layers with extra_layers.')
    if value_config.head_init == 'lm_head' and base_config.logit_cap:
        raise ValueError(f"value head_init is 'lm_head', but this model caps its logits at {base_config.logit_cap:g}, "
                         "which no head of ours does: use 'zero' or 'normal'.")
    if value_config.lookahead and not base_config.tied_embeddings:
        raise ValueError(f'value lookahead is {value_config.lookahead}, but this model has an output layer of its own, '
                         'which a value network has not: only models with tied embeddings can look ahead.')
    # Layers of a model from scratch go on with the pattern of the base's last ones; those on top see all positions.
    near = base_config.layer_windows and tuple(
        base_config.layer_windows[index % base_config.layers] for index in range(layers))
    return dataclasses.replace(
        base_config, layers=layers + value_config.extra_layers, tied_embeddings=True,
        layer_windows=near and near + (0,) * value_config.extra_layers,
        restart_layer=layers if value_config.extra_input == 'restart' else 0, lookahead=value_config.lookahead)


def is_copied(value_config: ValueConfig, base_config: TransformerConfig, path: tuple[str, ...]) -> bool:
    """Returns whether a parameter of the base, by its keys, has a part in the start of the value model."""
    name = path[0]
    if name == ('embedding' if base_config.tied_embeddings else 'head') and value_config.head_init == 'lm_head':
        return True
    if value_config.init == 'scratch' or name == 'head':
        return False
    copied = trunk_config(value_config, base_config).layers - value_config.extra_layers
    return not name.startswith(transformer.LAYER) or int(name.removeprefix(transformer.LAYER)) < copied


def init_value_params(
    key: Array,
    value_config: ValueConfig,
    base_params: Params,
    base_config: TransformerConfig,
) -> Params:
    """Returns {'trunk': ..., 'head': ...} started as `value_config` says; copies are new arrays.

    Args:
      key: for what is drawn fresh.
      value_config: the shape and the start.
      base_params: parameters of the base, of which those are read that `is_copied` names; its layers may be stacked or
        not, whatever those of the value model are.
      base_config: the base's config.
    """
    config = trunk_config(value_config, base_config)
    trunk_key, head_key = jax.random.split(key)
    separate = dataclasses.replace(config, scan_layers=False)
    stacked = dataclasses.replace(base_config, scan_layers=transformer.STACK in base_params)
    base_params = transformer.separate_layers(base_params, stacked)
    trunk = dict(transformer.init_params(trunk_key, separate))
    extra = {f'{transformer.LAYER}{config.layers - 1 - index}' for index in range(value_config.extra_layers)}
    for name in trunk:
        if name in extra:
            if value_config.extra_input == 'stream':
                trunk[name] = _silenced(trunk[name])
        elif name in ('restart_norm', 'expectation_norm') and value_config.init != 'scratch':
            trunk[name] = _copy(base_params['final_norm'], config)
        elif value_config.init != 'scratch' and name != 'restart_token_norm':
            trunk[name] = _copy(base_params[name], config)
    head = nn.meta.unbox(_boxed_head(head_key, value_config, config))
    if value_config.head_init == 'lm_head':
        table = base_params['embedding' if base_config.tied_embeddings else 'head']
        head['kernel'] = jnp.broadcast_to(table[:, None], head['kernel'].shape).astype(config.param_dtype)
    return {'trunk': transformer.stack_layers(trunk, config), 'head': head}


def decoding_params(params: Params, value_config: ValueConfig, base_config: TransformerConfig) -> Params:
    """Returns value parameters to decode with: those of the trunk's products in its `dtype`, which they are cast to in
    any case; the head, which is computed in float32, as it is."""
    trunk = transformer.decoding_params(params['trunk'], trunk_config(value_config, base_config))
    return {**params, 'trunk': trunk}


def logical_axes(value_config: ValueConfig, base_config: TransformerConfig) -> Params:
    """Returns the axis names of the value parameters, as `transformer.logical_axes`."""
    config = trunk_config(value_config, base_config)
    head = jax.eval_shape(lambda key: _boxed_head(key, value_config, config), jax.random.key(0))
    return {'trunk': transformer.logical_axes(config), 'head': transformer.axis_names(head)}


def head_scores(
    value_config: ValueConfig, config: TransformerConfig, params: Params, hidden: Array, tokens: Array,
) -> Array:
    """Returns float32 scores [..., K] of `tokens` [...] read at `hidden` [..., D].

    `hidden` is the token's own state for kind 'v' (which ignores `tokens`) and its parent's for kind 'q'.
    """
    scores = ValueHead(value_config, config).apply({'params': params['head']}, hidden, tokens)
    return cast(Array, scores)


def _boxed_head(key: Array, value_config: ValueConfig, config: TransformerConfig) -> Params:
    hidden, token = jnp.zeros((1, config.width)), jnp.zeros((1,), jnp.int32)
    return dict(ValueHead(value_config, config).init(key, hidden, token)['params'])


def _copy(tree: Params, config: TransformerConfig) -> Params:
    return jax.tree.map(lambda array: jnp.array(array, config.param_dtype, copy=True), tree)


def _silenced(block: Params) -> Params:
    """Returns a block whose two output projections are zero: the identity, with gradients to learn from."""
    def silence(part: Params) -> Params:
        return jax.tree.map(jnp.zeros_like, part)
    return {**block,
            'attention': {**block['attention'], 'output': silence(block['attention']['output'])},
            'mlp': {**block['mlp'], 'down': silence(block['mlp']['down'])}}
