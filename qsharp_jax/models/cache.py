"""The cache of keys and values, addressed by position, and how it is written."""
from __future__ import annotations

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax.models.layers import TransformerConfig
from qsharp_jax.types import Array

_LANES = 128  # numbers side by side in a tile on TPU, up to which the last axis is filled


@struct.dataclass
class KVCache:
    """Keys (rotated) and values of the tokens so far; slot p of a row holds its position p.

    One array per layer rather than a stack, which XLA on CPU copies in every step, unless the layers are scanned;
    each laid out for the product that reads it, which makes attention in a decode step about three times faster there.
    A stack is laid out for XLA on TPU, which would otherwise copy it as the decode loop begins and ends: both ways of
    writing it have slots first, unless so few numbers a slot would be filled up to a tile's 128.
    """

    keys: tuple[Array, ...]  # layers x [B, Hkv, Dh, S], or one [B, layers, Hkv, S, Dh] or [B, layers, Hkv, Dh, S]
    values: tuple[Array, ...]  # layers x [B, Hkv, S, Dh], or one like that of the keys

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical names of the axes of its arrays, as `sharding.constrain_rows` wants them."""
        return (None, *(None,) * (self.keys[0].ndim - 4), 'kv_heads')


def init_cache(config: TransformerConfig, batch: int, capacity: int) -> KVCache:
    """Returns an empty cache of `capacity` slots a row."""
    if not 1 <= capacity <= config.max_positions:
        raise ValueError(
            f'A cache of {capacity} slots was asked for; this model allows 1 to {config.max_positions} '
            'positions. Shorten the prompt or max_new_tokens.')
    return empty(config, batch, capacity)


def empty(config: TransformerConfig, batch: int, capacity: int) -> KVCache:
    """Returns an empty cache of any number of slots, which need not be positions."""
    # Rows lead in a stack as well, so that they can be repeated and picked alike.
    leading, arrays = ((batch, config.layers), 1) if config.scan_layers else ((batch,), config.layers)
    first = (*leading, config.kv_heads, capacity, config.head_dim)
    last = (*leading, config.kv_heads, config.head_dim, capacity)
    keys, values = (last if it_is else first for it_is in slots_last(config))
    return KVCache(
        keys=tuple(jnp.zeros(keys, config.dtype) for _ in range(arrays)),
        values=tuple(jnp.zeros(values, config.dtype) for _ in range(arrays)))


def capacity(config: TransformerConfig, cache: KVCache) -> int:
    """Returns the number of slots a row, S."""
    return cache.keys[0].shape[-1 if slots_last(config)[0] else -2]


def slots_last(config: TransformerConfig) -> tuple[bool, bool]:
    """Returns whether slots are the last axis of the keys, and of the values, of a cache."""
    return (config.head_dim % _LANES > 0,) * 2 if config.scan_layers else (True, False)


def write_all(cache: KVCache, new: KVCache, start: Array | None, hidden: Array) -> KVCache:
    """Returns a cache of separate layers with the keys and values of new tokens in it.

    Args:
      cache: of all layers.
      new: of as many tokens as are to be written; a slot beyond the capacity is not.
      start: their first slot of each row, [B]; None: 0.
      hidden: what the layers made of the new tokens, [B, T, D]. XLA is free to write a cache before the layer has read
        it, and on CPU then copies every cache in every step to keep what was there: so slots are made to depend on the
        last output. A row whose stream is NaN is not written.
    """
    if not new.keys[0].shape[-1]:
        return cache
    if start is not None:
        start = jnp.where(jnp.isnan(hidden[:, 0, 0]), cache.keys[0].shape[-1], start)
    return KVCache(tuple(write(old, part, start, axis=-1) for old, part in zip(cache.keys, new.keys)),
                   tuple(write(old, part, start, axis=-2) for old, part in zip(cache.values, new.values)))


def write_one(cache: KVCache, new: KVCache, which: Array, start: Array, there: Array) -> KVCache:
    """Returns a cache of separate layers with one of some new tokens in it.

    Args:
      cache: of all layers.
      new: keys and values of the tokens.
      which: of them each row gets.  # [B] int32
      start: in which slot; nothing beyond the capacity is written.  # [B] int32
      there: rows that get one.  # [B] bool
    """
    start = jnp.where(there, start, cache.keys[0].shape[-1])
    which = which[:, None, None, None]

    def put(array: Array, new: Array, axis: int) -> Array:
        return write(array, jnp.take_along_axis(new, which, axis, mode='clip'), start, axis)

    return KVCache(tuple(put(old, part, -1) for old, part in zip(cache.keys, new.keys)),
                   tuple(put(old, part, -2) for old, part in zip(cache.values, new.values)))


def split(new: KVCache, count: int) -> tuple[KVCache, KVCache]:
    """Returns keys and values of the first `count` tokens and of the others, of separate layers."""
    def part(which: slice) -> KVCache:
        return KVCache(tuple(keys[..., which] for keys in new.keys),
                       tuple(values[:, :, which] for values in new.values))

    return part(slice(count)), part(slice(count, None))


def write(array: Array, new: Array, start: Array | None, axis: int, layer: Array | None = None) -> Array:
    """Returns a cache with `new` [B, Hkv, ...] in the slots from `start` [B] on (None: from 0).

    Args:
      array: of one layer, [B, Hkv, ...], or of all of them, [B, N, Hkv, ...].
      new: of one layer.
      start: the first slot of each row.
      axis: of the slots in `new`, from behind: -1 or -2.
      layer: which of all the layers; None for a cache of one.
    """
    count = new.shape[axis]
    if start is None:
        if layer is None:
            return jax.lax.dynamic_update_slice_in_dim(array, new, 0, axis)
        return jax.lax.dynamic_update_slice_in_dim(array, new[:, None], layer, 1)
    rows = jnp.arange(array.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(count)[None]
    place: tuple[Any, ...]
    if layer is not None:
        # Heads are indexed one by one: XLA on TPU lays a cache out for what is written at once, and the products want
        # one head's numbers together, not those of all heads.
        heads = jnp.arange(array.shape[2])[None, :, None]
        place = rows[:, None], layer, heads, *(slice(None),) * (axis == -1), slots[:, None]
        new = new.swapaxes(-1, -2) if axis == -1 else new
    else:
        # What is indexed comes first: [B, count, Hkv, Dh].
        place = (rows, slice(None), slice(None), slots) if axis == -1 else (rows, slice(None), slots)
        new = jnp.moveaxis(new, axis, 1)
    return array.at[place].set(new, mode='drop', unique_indices=True, indices_are_sorted=True)
