"""One decoder-only transformer for every model family, with an explicit cache addressed by position.

The families (GPT-2, Llama, Qwen, ...) differ by switches of `TransformerConfig`, not by code. Parameters are
a plain tree of arrays; `logical_axes` names their dimensions for sharding.
"""
from __future__ import annotations

import dataclasses
from typing import Any, cast

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from qsharp_jax import sharding
from qsharp_jax.models import cache as cache_lib
from qsharp_jax.models.attention import Block
from qsharp_jax.models.cache import init_cache, KVCache, slots_last
from qsharp_jax.models.layers import Norm, parameter, rope_frequencies, RopeScaling, TransformerConfig
from qsharp_jax.models.ragged import Ragged
from qsharp_jax.types import Array, Params

__all__ = [
    'KVCache', 'LAYER', 'RopeScaling', 'STACK', 'Transformer', 'TransformerConfig', 'axis_names', 'causal_mask',
    'count_params', 'decoding_params', 'extend', 'hidden_states', 'init_cache', 'init_params', 'logical_axes', 'logits',
    'param_shapes', 'param_shardings', 'read', 'separate_layers', 'stack_layers']


LAYER = 'layers_'  # begins the name of a layer in a tree of parameters, before its number
STACK = 'layers'  # the name of all of them, stacked, where they are scanned

# Of the layers with one window: rotation, mask of the new tokens, mask of the cached ones.
Shared = tuple[tuple[Array, Array] | None, Array, Array | None]


def causal_mask(length: int) -> Array:
    """Returns [length, length] bool: whether query i (row) may see key j (column), j <= i."""
    return jnp.tril(jnp.ones((length, length), bool))


class Transformer(nn.Module):
    """The decoder. Use through `hidden_states` and `logits` with a plain tree of parameters."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config

        def table(name: str, rows: int, axis: str | None) -> Array:
            draw = nn.initializers.normal(config.width ** -0.5)
            return parameter(self, name, draw, (axis, 'embed'), (rows, config.width), config.param_dtype)

        self.embedding = table('embedding', config.vocab_size, 'vocab')
        if config.positions == 'learned':
            self.position_embedding = table('position_embedding', config.max_positions, None)
        if not config.tied_embeddings:
            self.head = table('head', config.vocab_size, 'vocab')
        block = nn.remat(Block) if config.remat else Block
        if config.scan_layers:
            self.block = block(config, parent=None)
        else:
            self.layers = [block(config) for _ in range(config.layers)]
        self.final_norm = Norm(config)
        if config.restart_layer:
            self.restart_norm = Norm(config)
            self.restart_token_norm = Norm(config)
        if config.lookahead:
            # Apart from `restart_norm`, which is trained: what is expected stays what the base expects.
            self.expectation_norm = Norm(config)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        block_mask: Array,
        cache: KVCache | None,
        cache_length: Array | None,
        commit: int,
        layout: Ragged | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Returns hidden states and, where layers are scanned, the new cache; else what the cache is to get."""
        config = self.config
        batch, row_positions = tokens.shape[0], positions
        if layout is not None:
            tokens, positions = layout.gather(tokens), layout.gather(positions)
        x = self._placed(jnp.take(self.embedding, tokens, axis=0, mode='clip'), positions)
        block_mask = jnp.broadcast_to(block_mask, (batch, *block_mask.shape[-2:]))
        cache_mask = None
        if cache is not None and cache_length is not None:
            cache_mask = (jnp.arange(cache_lib.capacity(config, cache))[None] < cache_length[:, None])[:, None]
        # What layers of one window share: how tokens are rotated, and which of them see which.
        windows = sorted({config.window(index) for index in range(config.layers)})

        def rotations(ahead: int) -> list[tuple[Array, Array] | None]:
            return [_rotation(config, positions + ahead, window > 0) for window in windows]

        turned = rotations(0)
        seen_of = [_within(window, row_positions, block_mask, cache_mask) for window in windows]
        which = [windows.index(config.window(index)) for index in range(config.layers)]
        if config.scan_layers:
            shared = [(rotation, *seen) for rotation, seen in zip(turned, seen_of)]
            x, cache = self._scanned(x, shared, which, cache, cache_length, commit)
            return self.final_norm(x), cache
        embedded, keys, values = x, list[Array](), list[Array]()

        def run(index: int, x: Array, rotations: list[tuple[Array, Array] | None],
                made: tuple[Array, Array] | None = None) -> tuple[Array, Array, Array]:
            kind = which[index]
            old = None if cache is None or cache_mask is None else (cache.keys[index], cache.values[index])
            return self.layers[index](x, rotations[kind], seen_of[kind][0], old, seen_of[kind][1], layout, made)

        def one_further(x: Array, ahead: int) -> Array:
            x, turned = self._placed(self._expected(x), positions + ahead), rotations(ahead)
            for index in range(config.restart_layer):
                x, _, _ = run(index, x, turned, (keys[index], values[index]))
            return x

        for index in range(config.layers):
            if config.restart_layer and index == config.restart_layer:
                states = [x]
                for ahead in range(1, config.lookahead + 1):
                    states.append(one_further(states[-1], ahead))
                x = self._restarted(states, embedded)
            x, key, value = run(index, x, turned)
            keys.append(key)
            values.append(value)
        x = self.final_norm(x)
        keys, values = [key[..., :commit] for key in keys], [value[:, :, :commit] for value in values]
        return x if layout is None else layout.scatter(x, batch), KVCache(tuple(keys), tuple(values))

    def _placed(self, embedding: Array, positions: Array) -> Array:
        """Returns what the first layer reads of token embeddings."""
        config = self.config
        x = embedding.astype(config.dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        if config.positions == 'learned':
            x = x + jnp.take(self.position_embedding, positions, axis=0, mode='clip').astype(config.dtype)
        return x

    def _expected(self, x: Array) -> Array:
        """Returns the mean embedding of the token that the last state of a language model expects to come."""
        share = jax.nn.softmax(self.logits(self.expectation_norm(x)), axis=-1).astype(self.config.dtype)
        return jax.lax.stop_gradient(share @ self.embedding.astype(self.config.dtype))

    def _restarted(self, states: list[Array], embedded: Array) -> Array:
        return sum(map(self.restart_norm, states), self.restart_token_norm(embedded))

    def _scanned(
        self, x: Array, shared: list[Shared], which: list[int], cache: KVCache | None, cache_length: Array | None,
        commit: int,
    ) -> tuple[Array, KVCache | None]:
        """Returns what the layers make of `x` [B, T, D], and the new cache: one block, over stacked parameters."""
        config, embedded = self.config, x
        # Without a window every new token sees the same cached ones, and the mask has one row for all.
        several = jax.tree.map(lambda *kinds: jnp.stack(jnp.broadcast_arrays(*kinds)), *shared)
        restarted = None if not config.restart_layer else self._restarted

        def one(carry: tuple[Array, KVCache | None], layer: tuple[Params, Array, Array]) -> tuple[Any, None]:
            x, cache = carry
            params, index, kind = layer
            if restarted is not None:
                x = jnp.where(index == config.restart_layer, restarted([x], embedded), x)
            mine: Shared = jax.tree.map(lambda kinds: _layer(kinds, kind, axis=0), several)
            rotation, seen, cache_seen = mine
            # The cache is carried whole and written in place: as an input and output of each layer it would be copied.
            old = None
            if cache is not None and cache_seen is not None:
                old = cache.keys[0], cache.values[0], index
            x, key, value = cast(tuple[Array, Array, Array], self.block.apply(
                {'params': params}, x, rotation, seen, old, cache_seen, None))
            if cache is not None:
                last = slots_last(config)[0]
                new = (key, value.swapaxes(-1, -2)) if last else (key.swapaxes(-1, -2), value)
                cache = KVCache(*(
                    (cache_lib.write(stack, part[..., :commit] if last else part[:, :, :commit], cache_length,
                                     -1 if last else -2, index),)
                    for stack, part in zip((cache.keys[0], cache.values[0]), new)))
            return (x, cache), None

        layers = self.variables['params'][STACK], jnp.arange(config.layers), jnp.asarray(which)
        (x, cache), _ = jax.lax.scan(one, (x, cache), layers)
        return x, cache

    def logits(self, hidden: Array) -> Array:
        """Returns float32 [..., V] from normalised hidden states [..., D]."""
        table = self.embedding if self.config.tied_embeddings else self.head
        dtype = self.config.dtype
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
        scores = jnp.matmul(flat, table.astype(dtype).T, preferred_element_type=jnp.float32)
        scores = sharding.constrain_last(scores, 'vocab')
        if self.config.logit_cap:
            scores = self.config.logit_cap * jnp.tanh(scores / self.config.logit_cap)
        return scores.reshape(*hidden.shape[:-1], table.shape[0])


def init_params(key: Array, config: TransformerConfig) -> Params:
    """Returns freshly drawn parameters, normal with mean 0.

    The deviation is 1 / sqrt(fan-in), which keeps the size of what goes through them at any width, in the embeddings as
    well, whose rows are the output layer's; that of the output projections is divided by sqrt(2 layers). Narrow models
    with embeddings of 0.02, which is GPT-2's at a width of 768, learn to look up tokens many times later.
    """
    return nn.meta.unbox(_boxed_init(key, config))


def param_shapes(config: TransformerConfig) -> Params:
    """Returns a tree like the parameters whose leaves are jax.ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))


def param_shardings(config: TransformerConfig, mesh: Mesh) -> Params:
    """Returns a tree like the parameters whose leaves are NamedShardings on `mesh`."""
    return sharding.param_shardings(mesh, logical_axes(config), param_shapes(config))


def decoding_params(params: Params, config: TransformerConfig) -> Params:
    """Returns the parameters as the products read them, in the config's `dtype`: the same results, less to read.

    Norms stay as they are: they are computed in float32.
    """
    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf if any(str(key.key).endswith('norm') for key in path) else leaf.astype(config.dtype)

    return cast(Params, jax.tree_util.tree_map_with_path(one, params))


def logical_axes(config: TransformerConfig) -> Params:
    """Returns a tree like the parameters whose leaves are tuples of axis names (or None), one a dimension."""
    return axis_names(jax.eval_shape(lambda key: _boxed_init(key, config), jax.random.key(0)))


def axis_names(boxed: Params) -> Params:
    """Returns the axis names of a tree of parameters that still carry them."""
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


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


def read(
    config: TransformerConfig,
    params: Params,
    cache: KVCache,
    cache_length: Array | None,  # [B]
    tokens: Array,  # [B, T]
    positions: Array,  # [B, T]
    mask: Array,  # [T, T] or [B, T, T] bool
    commit: int,
    layout: Ragged | None = None,
) -> tuple[Array, KVCache]:
    """Returns the normalised hidden states [B, T, D] of tokens after the cached ones, and what the cache is to get.

    The arguments are those of `extend`, which also writes; here the cache is only read. Not for scanned layers.

    Args:
      config, params, cache, cache_length, tokens, positions, mask: as in `extend`.
      commit: of how many leading new tokens keys and values are returned, for `cache.write_all`.
      layout: names the tokens that are computed; these must see none of the others, whose states mean nothing. None
        computes all.
    """
    assert not config.scan_layers
    out = Transformer(config).apply(
        {'params': params}, tokens, positions, mask, cache, cache_length, commit, layout)
    return cast(tuple[Array, KVCache], out)


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
    if commit > cache_lib.capacity(config, cache):
        raise ValueError(f'{commit} tokens do not fit into a cache of {cache_lib.capacity(config, cache)} slots.')
    if config.scan_layers:
        out = Transformer(config).apply({'params': params}, tokens, positions, mask, cache, cache_length, commit)
        return cast(tuple[Array, KVCache], out)
    hidden, new = read(config, params, cache, cache_length, tokens, positions, mask, commit)
    return hidden, cache_lib.write_all(cache, new, cache_length, hidden)


def logits(config: TransformerConfig, params: Params, hidden: Array) -> Array:
    """Returns float32 logits [..., V] of the token after each hidden state [..., D]."""
    return cast(Array, Transformer(config).apply({'params': params}, hidden, method='logits'))


def count_params(params: Params) -> int:
    """Returns the number of scalars in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def token_flops(config: TransformerConfig) -> float:
    """Returns the FLOPs of a token's products with parameters, of all layers but the output layer."""
    matrices = config.width * config.head_dim
    mlp = config.width * config.mlp_width * (3 if config.gated else 2)
    again = config.restart_layer * (2 * config.heads * matrices + mlp) + 2 * config.vocab_size * config.width
    once = config.layers * (2 * (config.heads + config.kv_heads) * matrices + mlp)
    return 2.0 * (once + config.lookahead * again)


def stack_layers(params: Params, config: TransformerConfig) -> Params:
    """Returns parameters of separate layers as `config` has them: stacked along a new first axis, or as they are."""
    if not config.scan_layers:
        return params
    layers = [params[f'{LAYER}{index}'] for index in range(config.layers)]
    others = {name: part for name, part in params.items() if not name.startswith(LAYER)}
    return {**others, STACK: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}


def separate_layers(params: Params, config: TransformerConfig) -> Params:
    """Returns parameters with each layer under a name of its own, whichever way they were."""
    if not config.scan_layers:
        return params
    others = {name: part for name, part in params.items() if name != STACK}
    return {**others, **{f'{LAYER}{index}': jax.tree.map(lambda stack: stack[index], params[STACK])
                         for index in range(config.layers)}}


def _boxed_init(key: Array, config: TransformerConfig) -> Params:
    """Returns fresh parameters that carry the names of their axes. The draws do not depend on `scan_layers`."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    separate = dataclasses.replace(config, scan_layers=False)
    params = Transformer(separate).init(key, tokens, tokens, causal_mask(1), None, None, 0)['params']
    if not config.scan_layers:
        return params
    names = jax.tree.map(lambda box: box.names, params[f'{LAYER}0'], is_leaf=_is_box)
    stacked = stack_layers(nn.meta.unbox(params), config)[STACK]
    boxed = jax.tree.map(lambda leaf, axes: nn.LogicallyPartitioned(leaf, (STACK, *axes)), stacked, names)
    return {**{name: part for name, part in params.items() if not name.startswith(LAYER)}, STACK: boxed}


def _is_box(node: object) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


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


def _layer(stack: Array, index: Array, axis: int = 1) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, index, axis, keepdims=False)
