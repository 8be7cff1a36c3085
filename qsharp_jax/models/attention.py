"""Attention of new tokens to cached ones and to one another, and the block that it is half of."""
from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import sharding
from qsharp_jax.models.cache import slots_last
from qsharp_jax.models.layers import Linear, MLP, Norm, TransformerConfig
from qsharp_jax.models.ragged import Ragged, Tiles
from qsharp_jax.types import Array

HIDDEN = -1e30  # the score of a key that is not seen: finite, so that no row makes NaN
QUERIES = 128  # attended to the keys up to them and no further ones, together
PARTS = 8  # that the queries are split into at most: half of the keys are spared, and programs stay short
_SCORES = 2 ** 28  # bytes of attention scores a device, above which rows attend by parts
_CACHED_SCORES = 2 ** 25  # the same over caches


class Attention(nn.Module):
    """Grouped-query attention of new tokens to the cache and to one another.

    Returns the output [B, T, D] and the new keys [B, Hkv, Dh, T] and values [B, Hkv, T, Dh], laid out as the
    cache. With a `layout`, input, rotation and output are of its tokens, [G, N, ...]; the rest is of rows, and the
    queries of rows or tiles.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, T, D]
        rotation: tuple[Array, Array] | None,  # cos and sin, [B, T, 1, Dh / 2]
        block_mask: Array,  # [B, T, T]
        cached: tuple[Array, ...] | None,  # [B, Hkv, Dh, S], [B, Hkv, S, Dh]; or twice [B, N, Hkv, S, Dh], which of N
        cache_mask: Array | None,  # [B, 1 or T, S]
        layout: Ragged | None,
        made: tuple[Array, Array] | None = None,  # keys and values of the new tokens, in place of those of `x`
    ) -> tuple[Array, Array, Array]:
        config = self.config
        width, head_dim = config.width, config.head_dim
        out_scale = 1 / np.sqrt(2 * config.layers)

        def project(name: str, heads: int, axis: str) -> Array:
            axes = 'embed', axis, 'head_dim'
            return Linear(config, (width,), (heads, head_dim), axes, config.qkv_bias, name=name)(x)

        def placed(name: str, x: Array) -> Array:
            if config.qk_norm:
                x = Norm(config, axis=None, name=f'{name}_norm')(x)
            return x if rotation is None else _rotate(x, *rotation)

        batch = block_mask.shape[0]
        tiles = None if layout is None else layout.tiles
        query = placed('query', project('query', config.heads, 'heads'))
        if layout is not None and tiles is None:
            query = layout.scatter(query, batch)
        if made is None:
            key = placed('key', project('key', config.kv_heads, 'kv_heads'))
            value = project('value', config.kv_heads, 'kv_heads')
            if layout is not None:
                key, value = (layout.scatter(part, batch) for part in (key, value))
            made = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
        key, value = made
        new = query, key, value, block_mask
        if layout is not None and tiles is not None:
            mixed = tiles.to_tokens([self._attend(*part) for part in _of_tiles(layout, tiles, new, cached, cache_mask)])
        else:
            mixed = self._attend(new, cached, cache_mask)
            mixed = mixed if layout is None else layout.gather(mixed)
        axes = 'heads', 'head_dim', 'embed'
        inputs = config.heads, head_dim
        output = Linear(config, inputs, (width,), axes, config.out_bias, out_scale, name='output')(mixed)
        return output, key, value

    def _attend(self, new: tuple[Array, Array, Array, Array], cached: tuple[Array, ...] | None,
                cache_mask: Array | None) -> Array:
        """Returns the mixed values, worked out for some rows after the others where there are many scores."""
        query, _, _, block_mask = new
        scale, scores = self.config.query_scale, 4 * query.shape[0] * query.shape[1] * self.config.heads
        if cached is None or cache_mask is None:
            def alone(query: Array, key: Array, value: Array, mask: Array) -> Array:
                return attend(query, key, value, mask, None, None, scale)
            return sharding.map_rows(alone, new, scores * block_mask.shape[-1], _SCORES)
        keys, values, *layer = cached

        # The layer of a stack is picked inside, by the products that read it: before the parts it would be copied.
        def beside(query: Array, key: Array, value: Array, mask: Array, cache_mask: Array, keys: Array,
                   values: Array) -> Array:
            if layer:
                keys, values = (
                    jax.lax.dynamic_index_in_dim(stack, layer[0], 1, keepdims=False) for stack in (keys, values))
                turned = (values if slots_last(self.config)[0] else keys).swapaxes(-1, -2)
                keys, values = (keys, turned) if slots_last(self.config)[0] else (turned, values)
            return attend(query, key, value, mask, (keys, values), cache_mask, scale)

        return sharding.map_rows(
            beside, (*new, cache_mask), scores * cache_mask.shape[-1], _CACHED_SCORES, fixed=(keys, values))


def _of_tiles(
    layout: Ragged, tiles: Tiles, new: tuple[Array, Array, Array, Array], cached: tuple[Array, ...] | None,
    cache_mask: Array | None,
) -> Iterator[tuple[Any, tuple[Array, ...] | None, Array | None]]:
    """Yields the arguments of attention for each part of the tiles, which have keys, values and masks of their rows."""
    query, key, value, block_mask = new
    masks = tiles.of_tokens(layout.gather(block_mask))
    own = zip(tiles.of_tokens(query), tiles.of_rows(key), tiles.of_rows(value), masks)
    if cached is None or cache_mask is None:
        yield from ((part, None, None) for part in own)
        return
    every = cache_mask.shape[1] == 1  # the same for all tokens of a row
    seen = tiles.of_rows(cache_mask) if every else tiles.of_tokens(layout.gather(cache_mask))
    yield from zip(own, zip(*(tiles.of_rows(part) for part in cached)), seen)


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and, by `output_norms`, behind it, added to the stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: tuple[Array, Array] | None,
        block_mask: Array,
        cached: tuple[Array, ...] | None,
        cache_mask: Array | None,
        layout: Ragged | None,
        made: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array, Array]:
        config = self.config
        normed = Norm(config, name='attention_norm')(x)
        attention = Attention(config, name='attention')
        mixed, key, value = attention(normed, rotation, block_mask, cached, cache_mask, layout, made)
        if config.output_norms:
            mixed = Norm(config, name='attention_output_norm')(mixed)
        x = x + mixed
        fed = MLP(config, name='mlp')(Norm(config, name='mlp_norm')(x))
        if config.output_norms:
            fed = Norm(config, name='mlp_output_norm')(fed)
        return x + fed, key, value


def attend(
    query: Array,  # [B, T, H, Dh]
    key: Array,  # [B, Hkv, Dh, T]
    value: Array,  # [B, Hkv, T, Dh]
    block_mask: Array,  # [B, T, T]
    cached: tuple[Array, Array] | None,  # [B, Hkv, Dh, S], [B, Hkv, S, Dh]
    cache_mask: Array | None,  # [B, 1 or T, S]
    scale: float | None = None,  # of the scores; None: Dh ** -0.5
) -> Array:
    """Returns the mixed values [B, T, H, Dh] of one softmax over cached and new keys together.

    The two parts are never concatenated, and keys and values are not repeated over the query heads of a
    group. A query that sees nothing gets zeros. The mask is expected to hide the keys behind each query.
    """
    length = query.shape[1]
    step = max(QUERIES, -(-length // PARTS))
    if length <= step:
        return _attend(query, key, value, block_mask, cached, cache_mask, scale)
    mixed = []
    for first in range(0, length, step):
        rows, last = slice(first, first + step), first + step
        seen = cache_mask if cache_mask is None or cache_mask.shape[1] == 1 else cache_mask[:, rows]
        mixed.append(_attend(query[:, rows], key[..., :last], value[:, :, :last], block_mask[:, rows, :last], cached,
                             seen, scale))
    return jnp.concatenate(mixed, axis=1)


def _attend(
    query: Array, key: Array, value: Array, block_mask: Array, cached: tuple[Array, Array] | None,
    cache_mask: Array | None, scale: float | None,
) -> Array:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    scale = head_dim ** -0.5 if scale is None else scale
    grouped = (query * scale).reshape(batch, length, kv_heads, groups, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, head_dim)
    parts = [(key, value, block_mask[:, None, None])]
    if cached is not None and cache_mask is not None:
        parts.append((*cached, cache_mask[:, None, None]))
    scores = []
    for keys, _, mask in parts:
        score = jnp.matmul(grouped, keys, preferred_element_type=jnp.float32)
        scores.append(jnp.where(mask, score.reshape(batch, kv_heads, groups, length, -1), HIDDEN))
    top = functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
    top = jax.lax.stop_gradient(top)
    total, mixed = jnp.float32(0), jnp.float32(0)
    for score, (_, values, _) in zip(scores, parts):
        weights = jnp.exp(score - top)
        total += weights.sum(axis=-1, keepdims=True)
        weights = weights.reshape(batch, kv_heads, groups * length, -1).astype(values.dtype)
        mixed += jnp.matmul(weights, values, preferred_element_type=jnp.float32)
    # Where a query sees nothing, every score equals the maximum.
    mixed = mixed.reshape(batch, kv_heads, groups, length, head_dim) * jnp.where(top > HIDDEN, 1 / total, 0.0)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(query.dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
