"""One decoder-only transformer for every model family, with an explicit cache addressed by position.

The families (GPT-2, Llama, Qwen, ...) differ by switches of `TransformerConfig`, not by code. Parameters are
a plain tree of arrays; `logical_axes` names their dimensions for sharding.
"""
from __future__ import annotations

from typing import cast

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.models.layers import Block, Norm, parameter, rope_frequencies, RopeScaling, TransformerConfig
from qsharp_jax.types import Array, Params

__all__ = [
    'KVCache', 'RopeScaling', 'Transformer', 'TransformerConfig', 'axis_names', 'causal_mask', 'count_params',
    'extend', 'hidden_states', 'init_cache', 'init_params', 'logical_axes', 'logits', 'param_shapes']


@struct.dataclass
class KVCache:
    """Keys (rotated) and values of the tokens so far; slot p of a row holds its position p.

    One array per layer rather than a stack, which XLA on CPU copies in every step; each laid out for the
    product that reads it, which makes attention in a decode step about three times faster there.
    """

    keys: tuple[Array, ...]  # layers x [B, Hkv, Dh, S]
    values: tuple[Array, ...]  # layers x [B, Hkv, S, Dh]

    @property
    def capacity(self) -> int:
        """Number of slots a row, S."""
        return self.keys[0].shape[-1]


def init_cache(config: TransformerConfig, batch: int, capacity: int) -> KVCache:
    """Returns an empty cache of `capacity` slots a row."""
    if not 1 <= capacity <= config.max_positions:
        raise ValueError(
            f'A cache of {capacity} slots was asked for; this model allows 1 to {config.max_positions} '
            'positions. Shorten the prompt or max_new_tokens.')
    keys = (batch, config.kv_heads, config.head_dim, capacity)
    values = (batch, config.kv_heads, capacity, config.head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(keys, config.dtype) for _ in range(config.layers)),
        values=tuple(jnp.zeros(values, config.dtype) for _ in range(config.layers)))


def causal_mask(length: int) -> Array:
    """Returns [length, length] bool: whether query i (row) may see key j (column), j <= i."""
    return jnp.tril(jnp.ones((length, length), bool))


class Transformer(nn.Module):
    """The decoder. Use through `hidden_states` and `logits` with a plain tree of parameters."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config

        def table(name: str, rows: int, axis: str | None) -> Array:
            draw = nn.initializers.normal(0.02)
            return parameter(self, name, draw, (axis, 'embed'), (rows, config.width), config.param_dtype)

        self.embedding = table('embedding', config.vocab_size, 'vocab')
        if config.positions == 'learned':
            self.position_embedding = table('position_embedding', config.max_positions, None)
        if not config.tied_embeddings:
            self.head = table('head', config.vocab_size, 'vocab')
        block = nn.remat(Block) if config.remat else Block
        self.layers = [block(config) for _ in range(config.layers)]
        self.final_norm = Norm(config)
        if config.restart_layer:
            self.restart_norm = Norm(config)
            self.restart_token_norm = Norm(config)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        block_mask: Array,
        cache: KVCache | None,
        cache_length: Array | None,
        commit: int,
    ) -> tuple[Array, KVCache | None]:
        config = self.config
        x = jnp.take(self.embedding, tokens, axis=0, mode='clip').astype(config.dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        if config.positions == 'learned':
            x = x + jnp.take(self.position_embedding, positions, axis=0, mode='clip').astype(config.dtype)
        block_mask = jnp.broadcast_to(block_mask, (tokens.shape[0], *block_mask.shape[-2:]))
        cache_mask = None
        if cache is not None and cache_length is not None:
            cache_mask = (jnp.arange(cache.capacity)[None] < cache_length[:, None])[:, None]
        # What layers of one window share: how tokens are rotated, and which of them see which.
        windows = sorted({config.window(index) for index in range(config.layers)})
        shared = {window: (_rotation(config, positions, window > 0),
                           *_within(window, positions, block_mask, cache_mask)) for window in windows}
        keys, values = [], []
        embedded = x
        for index, layer in enumerate(self.layers):
            if config.restart_layer and index == config.restart_layer:
                x = self.restart_norm(x) + self.restart_token_norm(embedded)
            old = None if cache is None else (cache.keys[index], cache.values[index])
            rotation, seen, cache_seen = shared[config.window(index)]
            x, key, value = layer(x, rotation, seen, None if cache_seen is None else old, cache_seen)
            if old is not None:
                keys.append(_write(old[0], key[..., :commit], cache_length, axis=3))
                values.append(_write(old[1], value[:, :, :commit], cache_length, axis=2))
        return self.final_norm(x), None if cache is None else KVCache(tuple(keys), tuple(values))

    def logits(self, hidden: Array) -> Array:
        """Returns float32 [..., V] from normalised hidden states [..., D]."""
        table = self.embedding if self.config.tied_embeddings else self.head
        dtype = self.config.dtype
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
        scores = jnp.matmul(flat, table.astype(dtype).T, preferred_element_type=jnp.float32)
        if self.config.logit_cap:
            scores = self.config.logit_cap * jnp.tanh(scores / self.config.logit_cap)
        return scores.reshape(*hidden.shape[:-1], table.shape[0])


def init_params(key: Array, config: TransformerConfig) -> Params:
    """Returns freshly drawn parameters, normal with mean 0.

    The deviation is 0.02 in the embeddings and 1 / sqrt(fan-in) in the products, which keeps the size of what goes
    through them at any width; that of the output projections is divided by sqrt(2 layers).
    """
    return nn.meta.unbox(_boxed_init(key, config))


def param_shapes(config: TransformerConfig) -> Params:
    """Returns a tree like the parameters whose leaves are jax.ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))


def logical_axes(config: TransformerConfig) -> Params:
    """Returns a tree like the parameters whose leaves are tuples of axis names (or None), one a dimension."""
    return axis_names(jax.eval_shape(lambda key: _boxed_init(key, config), jax.random.key(0)))


def axis_names(boxed: Params) -> Params:
    """Returns the axis names of a tree of parameters that still carry them."""
    def is_box(node: object) -> bool:
        return isinstance(node, nn.meta.AxisMetadata)
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)


def hidden_states(
    config: TransformerConfig,
    params: Params,
    tokens: Array,  # [B, T]
    positions: Array,  # [B, T]
    mask: Array,  # [T, T] or [B, T, T] bool
) -> Array:
    """Returns the normalised hidden states [B, T, D] of tokens that are all there is.

    Args:
      config: the decoder.
      params: its parameters.
      tokens: the tokens.
      positions: the position of each of them.
      mask: whether token i (row) sees token j (column).
    """
    hidden, _ = Transformer(config).apply({'params': params}, tokens, positions, mask, None, None, 0)
    return cast(Array, hidden)


def extend(
    config: TransformerConfig,
    params: Params,
    cache: KVCache,
    cache_length: Array | None,  # [B]
    tokens: Array,  # [B, T]
    positions: Array,  # [B, T]
    mask: Array,  # [T, T] or [B, T, T] bool
    commit: int,
) -> tuple[Array, KVCache]:
    """Returns the normalised hidden states [B, T, D] of tokens after the cached ones, and the new cache.

    Args:
      config: the decoder.
      params: its parameters.
      cache: keys and values of earlier tokens.
      cache_length: number of slots of each row that the new tokens see; the committed tokens go into the
        slots from there on. None means an empty cache, and spares the products with it.
      tokens: the new tokens.
      positions: the position of each of them.
      mask: whether new token i (row) sees new token j (column).
      commit: how many leading new tokens are written to the cache. A slot beyond the capacity is not written.

    Raises:
      ValueError: if `commit` exceeds the new tokens or the slots.
    """
    if commit > tokens.shape[1]:
        raise ValueError(f'commit is {commit}, but only {tokens.shape[1]} new tokens are given.')
    if commit > cache.capacity:
        raise ValueError(f'{commit} tokens do not fit into a cache of {cache.capacity} slots.')
    out = Transformer(config).apply(
        {'params': params}, tokens, positions, mask, cache, cache_length, commit)
    return cast(tuple[Array, KVCache], out)


def logits(config: TransformerConfig, params: Params, hidden: Array) -> Array:
    """Returns float32 logits [..., V] of the token after each hidden state [..., D]."""
    return cast(Array, Transformer(config).apply({'params': params}, hidden, method='logits'))


def count_params(params: Params) -> int:
    """Returns the number of scalars in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _boxed_init(key: Array, config: TransformerConfig) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, tokens, tokens, causal_mask(1), None, None, 0)['params']


def _rotation(config: TransformerConfig, positions: Array, windowed: bool) -> tuple[Array, Array] | None:
    """Returns cos and sin of each position's angles, [B, T, 1, Dh / 2], or None for learned positions."""
    if config.positions == 'learned':
        return None
    frequencies = rope_frequencies(config, windowed)[None, None, None]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _within(
    window: int, positions: Array, block_mask: Array, cache_mask: Array | None,
) -> tuple[Array, Array | None]:
    """Returns the masks of new tokens [B, T, T] and cached ones [B, 1 or T, S] for a window; 0 changes nothing."""
    if not window:
        return block_mask, cache_mask
    block_mask = block_mask & (positions[:, :, None] - positions[:, None] < window)
    if cache_mask is not None:
        slots = jnp.arange(cache_mask.shape[-1])[None, None]
        cache_mask = cache_mask & (positions[:, :, None] - slots < window)
    return block_mask, cache_mask


def _write(array: Array, new: Array, start: Array | None, axis: int) -> Array:
    """Returns `array` [B, Hkv, ...] with `new` in the slots of `axis` from `start` [B] on (None: from 0)."""
    count = new.shape[axis]
    if start is None:
        return jax.lax.dynamic_update_slice_in_dim(array, new, 0, axis)
    rows = jnp.arange(array.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(count)[None]
    # What is indexed comes first: [B, count, Hkv, Dh].
    place = (rows, slice(None), slice(None), slots) if axis == 3 else (rows, slice(None), slots)
    new = jnp.moveaxis(new, axis, 1)
    return array.at[place].set(new, mode='drop', unique_indices=True, indices_are_sorted=True)
