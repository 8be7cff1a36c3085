"""Passes over the real tokens of a batch whose rows have different numbers of them."""
from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import sharding
from qsharp_jax.types import Array

WIDTH = 4  # tokens of a tile
_LEAST = 4  # tokens: a pass over fewer takes as long
_SPARED = 2  # queries that there must be in rows, as a multiple of those in tiles, for which keys are copied
_FINE = 16  # tokens, up to which passes of twice the size are compiled, and of half more from there on
_SMALL = 64  # tokens, of a pass that is always worth having
_RANGE = 64  # that a whole block is as a multiple of the smallest pass, at most
_WORTH = 1e7  # FLOPs that a size must spare beside the next: fewer are a tenth of a millisecond, and compiling is dear


@struct.dataclass
class Tiles:
    """The tokens as queries of attention: some that follow each other in a row make a tile, which has its row's keys.

    Rows of one length would have as many queries as the longest.

    Attributes:
      rows: of each tile in its shard.  # [G, X] int32
      tokens: in each place of the tiles, laid one behind the other.  # [G, X * WIDTH] int32
      slots: place of each token in them.  # [G, N] int32
    """

    rows: Array
    tokens: Array
    slots: Array

    def of_tokens(self, flat: Array) -> Array:
        """# [G, N, ...] -> [G * X, WIDTH, ...]"""
        return _take(flat, self.tokens).reshape(-1, WIDTH, *flat.shape[2:])

    def of_rows(self, rows: Array) -> Array:
        """Returns what a row has for each of its tiles.  # [B, ...] -> [G * X, ...]"""
        return _take(rows.reshape(self.rows.shape[0], -1, *rows.shape[1:]), self.rows).reshape(-1, *rows.shape[1:])

    def to_tokens(self, tiles: Array) -> Array:
        """# [G * X, WIDTH, ...] -> [G, N, ...]"""
        return _take(tiles.reshape(self.tokens.shape[0], -1, *tiles.shape[2:]), self.slots)


@struct.dataclass
class Ragged:
    """The real tokens of a batch, one behind the other, and where they are in rows of one length.

    Everything but attention works on the tokens alone. A shard of the batch has tokens of its own, so that none crosses
    devices.

    Attributes:
      places: of each token in the rows of its shard, laid one behind the other.  # [G, N] int32
      tokens: the token in each place, anything where there is none.  # [G, B / G * T] int32
      tiles: that attention works on; None where it works on the rows, of which little is empty then.
    """

    places: Array
    tokens: Array
    tiles: Tiles | None

    def gather(self, rows: Array) -> Array:
        """Returns the tokens of rows.  # [B, T, ...] -> [G, N, ...]"""
        flat = rows.reshape(self.places.shape[0], -1, *rows.shape[2:])
        return _take(flat, self.places)

    def scatter(self, flat: Array, batch: int) -> Array:
        """Returns rows that hold the tokens, and anything elsewhere.  # [G, N, ...] -> [B, T, ...]"""
        return _take(flat, self.tokens).reshape(batch, -1, *flat.shape[2:])


def layout(real: Array, shards: int, budget: int) -> Ragged:
    """Returns where the real tokens are, of which no shard has more than `budget`.  # real: [B, T] bool"""
    flat = real.reshape(shards, -1)
    tokens = jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1
    place = jnp.broadcast_to(jnp.arange(flat.shape[1], dtype=jnp.int32), flat.shape)
    places = _placed(jnp.where(flat, tokens, budget), place, budget)
    tiles = None
    rows = real.shape[0] // shards
    count = (budget + (WIDTH - 1) * min(rows, budget)) // WIDTH  # at most: a row's last tile may have one token
    if _SPARED * count * WIDTH < flat.shape[1]:
        tiles = _tiles(real.reshape(shards, rows, -1), tokens, places, count)
    return Ragged(places, jnp.where(flat, tokens, 0), tiles)


def _tiles(real: Array, tokens: Array, places: Array, count: int) -> Tiles:
    """# [G, B / G, T] bool, [G, B / G * T], [G, N] -> `count` tiles"""
    shards, rows, _ = real.shape
    rank = jnp.cumsum(real, axis=2, dtype=jnp.int32) - 1
    used = (rank[:, :, -1] + WIDTH) // WIDTH  # tiles of each row
    first = jnp.cumsum(used, axis=1) - used
    slot = (first[..., None] * WIDTH + rank).reshape(shards, -1)
    target = jnp.where(real.reshape(shards, -1), slot, count * WIDTH)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None, :, None], real.shape).reshape(shards, -1)
    return Tiles(rows=_placed(target // WIDTH, row, count), tokens=_placed(target, tokens, count * WIDTH),
                 slots=_take(slot, places))


def _placed(target: Array, values: Array, size: int) -> Array:
    """Returns `size` numbers, the values at their targets and 0 elsewhere; a target of `size` drops its value.

    # [G, M] x 2 -> [G, size]
    """
    empty = jnp.zeros((target.shape[0], size), jnp.int32)
    return jax.vmap(lambda empty, target, value: empty.at[target].set(value, mode='drop'))(empty, target, values)


def by_budget(run: Callable[[Ragged | None], Any], real: Array, like: Array, flops: float) -> Any:
    """Returns what `run` makes of a layout with little more room than there are real tokens: of None, if of most.

    Without a real token nothing is run, and all is zero. What `run` closes over must only be read: XLA copies what a
    branch would write.

    Args:
      run: from a layout to a tree of arrays, whose shapes do not depend on it.
      real: which tokens are.  # [B, T] bool
      like: as in `sharding.constrain_rows`.
      flops: that a token takes.
    """
    shards = sharding.row_shards(like)
    budgets = _budgets(real.size // shards, flops)

    def nothing() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, None))

    def some(budget: int) -> Any:
        return run(layout(real, shards, budget))

    branches: list[Callable[[], Any]] = [
        nothing, *(functools.partial(some, budget) for budget in budgets), functools.partial(run, None)]
    most = jnp.max(jnp.sum(real.reshape(shards, -1), axis=1, dtype=jnp.int32))
    return jax.lax.switch(jnp.sum(most > jnp.asarray([0, *budgets])), branches)


def _budgets(whole: int, flops: float) -> list[int]:
    """Returns sizes of passes, in tokens, below that of a whole block; those of other sizes are not compiled.

    Above 16 at most a third of a pass is empty: more would cost time, as more programs would cost time to compile. For
    these a large block has no passes of less than a 64th of it, and none that would spare less than two fifths; and a
    small network has none that would spare next to nothing.
    """
    sizes, size = [], _LEAST
    while size * _RANGE < whole:
        size *= 2
    while size < whole and (size <= _SMALL or 5 * size <= 3 * whole):
        sizes.append(size)
        power = size & (size - 1) == 0
        size = size * 2 if size < _FINE else size * 3 // 2 if power else size * 4 // 3
    found, next_ = [], whole
    for size in reversed(sizes):
        if (next_ - size) * flops >= _WORTH:
            found.append(size)
            next_ = size
    return found[::-1]


def _take(array: Array, index: Array) -> Array:
    """# [G, N, ...], [G, M] -> [G, M, ...]"""
    return jax.vmap(lambda array, index: jnp.take(array, index, axis=0, mode='clip'))(array, index)
