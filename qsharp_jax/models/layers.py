"""The layers of the decoder and the switches between families.

The layouts are chosen for XLA on CPU, which runs plain matrix products fastest and transposes what is not
laid out for them; they cost nothing elsewhere.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.types import Array

NORMS = ('rmsnorm', 'layernorm')
POSITIONS = ('rope', 'learned')
ACTIVATIONS = ('silu', 'gelu_tanh')
ROPE_SCALINGS = ('linear', 'llama3', 'factors')
SIZES = ('vocab_size', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_width', 'max_positions')


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to contexts longer than the original one.

    Attributes:
      kind: 'linear' divides every frequency by `factor`; 'llama3' divides the slow ones, keeps the fast ones
        and blends between them; 'factors' divides each by its own.
      factor: the stretch of 'linear' and 'llama3'.
      low_freq_factor: 'llama3' only; waves longer than original_max_positions / low_freq_factor are
        stretched.
      high_freq_factor: 'llama3' only; waves shorter than original_max_positions / high_freq_factor are kept.
      original_max_positions: 'llama3' only; the context length before stretching.
      factors: 'factors' only; one for each frequency, Dh / 2.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice('rope_scaling.kind', self.kind, ROPE_SCALINGS)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder and the switches between families.

    Attributes:
      vocab_size: V.
      width: D, of the residual stream.
      layers: number of blocks.
      heads: H, query heads.
      kv_heads: key and value heads; divides `heads`.
      head_dim: Dh; even under 'rope'.
      mlp_width: hidden width of the feed-forward network.
      max_positions: longest sequence; the size of the table under 'learned'.
      norm: 'rmsnorm' (scale only) or 'layernorm' (centred, scale and bias).
      norm_eps: added to the mean square.
      positions: 'rope' (rotate-half) or 'learned' (a table added to the embeddings).
      rope_base: wavelength base of 'rope'.
      rope_scaling: stretch of the rotary frequencies, or None.
      activation: 'silu' or 'gelu_tanh'.
      gated: whether the feed-forward network multiplies by an activated gate.
      qkv_bias: biases on query, key and value projections.
      out_bias: a bias on the attention output projection.
      mlp_bias: biases in the feed-forward network.
      tied_embeddings: whether logits reuse the token embeddings.
      restart_layer: before this layer (0: nowhere) the stream is replaced by its own norm plus the norm of the
        token's embedding, so that the layers from there on see prediction and token at one scale.
      lookahead: how often the layers below `restart_layer` are run again, each time on the embedding that is expected
        to come next, Σ_v p(v) e(v), in the token's place: they see what the token sees, keys and values as they were.
        Without gradients the expectation is that of the logits of the run before; the norms of all their states are
        added before `restart_layer`. Of a reference this is k tokens of its roll-out, in the mean.
      qk_norm: RMSNorm of each query and key head before the rotation.
      norm_offset: added to the scale of RMSNorm; 1 where a family stores scales as their distance from 1.
      output_norms: a norm of what attention and the feed-forward network give, before it is added to the stream.
      embedding_scale: multiplies the token embeddings.
      query_scale: multiplies attention scores; None for Dh ** -0.5.
      logit_cap: logits are cap * tanh(logits / cap); 0 leaves them as they are.
      layer_windows: for each layer how many positions a token sees, its own included; 0 for all. Empty: all layers see
        all.
      local_rope_base: wavelength base, without stretch, of the layers with a window; 0 for that of the others.
      dtype: of the computation; norms, softmax and logits are float32 always.
      param_dtype: of freshly initialised parameters.
      remat: recompute each block in the backward pass instead of storing its activations.
      scan_layers: run one compiled block over the stacked parameters of all layers instead of a copy of it for each.
        The same numbers; compiles many times faster, and runs slower where stacks are copied, as on CPU.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: str = 'rmsnorm'
    norm_eps: float = 1e-5
    positions: str = 'rope'
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: str = 'silu'
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = True
    restart_layer: int = 0
    lookahead: int = 0
    qk_norm: bool = False
    norm_offset: float = 0.0
    output_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    logit_cap: float = 0.0
    layer_windows: tuple[int, ...] = ()
    local_rope_base: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1.')
        if self.heads % self.kv_heads:
            raise ValueError(f'heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).')
        check_choice('norm', self.norm, NORMS)
        check_choice('positions', self.positions, POSITIONS)
        check_choice('activation', self.activation, ACTIVATIONS)
        if self.positions == 'rope' and self.head_dim % 2:
            raise ValueError(f'head_dim is {self.head_dim}; rotary positions need an even head_dim.')
        if self.rope_scaling is not None and self.positions != 'rope':
            raise ValueError("rope_scaling needs positions='rope'.")
        factors = () if self.rope_scaling is None else self.rope_scaling.factors
        if self.rope_scaling is not None and len(factors) != self.head_dim // 2 * (self.rope_scaling.kind == 'factors'):
            raise ValueError(f"rope_scaling.factors has {len(factors)} numbers; kind 'factors' needs head_dim / 2 = "
                             f'{self.head_dim // 2} of them, other kinds none.')
        if self.layer_windows and len(self.layer_windows) != self.layers:
            raise ValueError(f'layer_windows has {len(self.layer_windows)} numbers; it needs one for each of the '
                             f'{self.layers} layers, or none.')
        if self.lookahead < 0 or self.lookahead and not (self.restart_layer and self.tied_embeddings):
            raise ValueError(f'lookahead is {self.lookahead}; it is 0 or, with a restart_layer and tied embeddings, '
                             'more.')
        if self.lookahead and self.scan_layers:
            raise ValueError(f'lookahead is {self.lookahead}, which needs layers one by one: set scan_layers to False.')
        if min(self.layer_windows, default=0) < 0:
            raise ValueError(f'layer_windows has {min(self.layer_windows)}; a window is 0 (all) or more.')

    def window(self, layer: int) -> int:
        """Returns how many positions a token sees in this layer; 0 for all."""
        return self.layer_windows[layer] if self.layer_windows else 0


def rope_frequencies(config: TransformerConfig, windowed: bool = False) -> np.ndarray:
    """Returns the rotary frequencies in radians a position, of layers with or without a window. # [Dh / 2]"""
    half = config.head_dim // 2
    local = windowed and config.local_rope_base > 0
    base = config.local_rope_base if local else config.rope_base
    frequencies = base ** -(np.arange(half, dtype=np.float64) / half)
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == 'factors':
        return (frequencies / np.asarray(scaling.factors)).astype(np.float32)
    if scaling.kind == 'linear':
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * frequencies + (1 - keep) * frequencies / scaling.factor).astype(np.float32)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32."""

    config: TransformerConfig
    axis: str | None = 'embed'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        size, axes, dtype = (x.shape[-1],), (self.axis,), config.param_dtype
        draw = nn.initializers.constant(1.0 - config.norm_offset)
        scale = parameter(self, 'scale', draw, axes, size, dtype)
        wide = x.astype(jnp.float32)
        if config.norm == 'layernorm':
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
        wide = wide * _rows(scale.astype(jnp.float32) + config.norm_offset, wide)
        if config.norm == 'layernorm':
            bias = parameter(self, 'bias', nn.initializers.zeros_init(), axes, size, dtype)
            wide = wide + _rows(bias.astype(jnp.float32), wide)
        return wide.astype(config.dtype)


class Linear(nn.Module):
    """A projection of the last `len(inputs)` axes to `outputs`, done as one two-dimensional product."""

    config: TransformerConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]  # of the kernel: inputs, then outputs
    use_bias: bool
    scale: float = 1.0  # of the initial weights, whose deviation is scale / sqrt(fan-in)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, param_dtype = self.config.dtype, self.config.param_dtype
        fan_in = int(np.prod(self.inputs))
        draw = nn.initializers.normal(self.scale / np.sqrt(fan_in))
        kernel = parameter(self, 'kernel', draw, self.axes, self.inputs + self.outputs, param_dtype)
        leading = x.shape[:x.ndim - len(self.inputs)]
        y = x.astype(dtype).reshape(-1, fan_in) @ kernel.astype(dtype).reshape(fan_in, -1)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = parameter(self, 'bias', zeros, self.axes[len(self.inputs):], self.outputs, param_dtype)
            y = y + bias.astype(dtype).reshape(1, -1)
        return y.reshape(*leading, *self.outputs)


class MLP(nn.Module):
    """The feed-forward network, gated or plain."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        width, inner, bias = (config.width,), (config.mlp_width,), config.mlp_bias
        activate = nn.silu if config.activation == 'silu' else nn.gelu  # nn.gelu is the tanh form by default
        hidden = Linear(config, width, inner, ('embed', 'mlp'), bias, name='up')(x)
        if config.gated:
            hidden = activate(Linear(config, width, inner, ('embed', 'mlp'), bias, name='gate')(x)) * hidden
        else:
            hidden = activate(hidden)
        scale = 1 / np.sqrt(2 * config.layers)
        return Linear(config, inner, width, ('mlp', 'embed'), bias, scale, name='down')(hidden)


def parameter(
    module: nn.Module, name: str, draw: Callable[..., Any], axes: tuple[str | None, ...],
    shape: tuple[int, ...], dtype: Any,
) -> Array:
    """Returns a parameter of `module` that remembers the logical names of its axes when it is initialised."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(draw, axes), shape, dtype))


def _rows(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def check_choice(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f'{name} is {given!r}; allowed: {", ".join(allowed)}.')
