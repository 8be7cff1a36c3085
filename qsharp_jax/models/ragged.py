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

    Rows of one length would have as many queries as the longest. Where there are tokens enough, the first tile of each
    row is its own, in the order of rows: these need no copy of keys. What is of tiles is in two parts, such ones and
    further ones, or in one where there are none of a kind.

    Attributes:
      rows: of each further tile, in its shard.  # [G, X] int32
      tokens: in each place of the tiles, laid one behind the other.  # [G, (B / G + X or X) * WIDTH] int32
      slots: place of each token in them.  # [G, N] int32
    """

    rows: Array
    tokens: Array
    slots: Array

    @property
    def own(self) -> int:
        """Rows of a shard that have a tile of their own: all or none."""
        return int(self.tokens.shape[1] // WIDTH - self.rows.shape[1])

    def of_tokens(self, flat: Array) -> list[Array]:
        """Returns the parts: tiles of tokens.  # [G, N, ...] -> [B, WIDTH, ...], [G * X, WIDTH, ...]"""
        places = jnp.split(self.tokens, [self.own * WIDTH], axis=1)
        return [_take(flat, part).reshape(-1, WIDTH, *flat.shape[2:]) for part in places if part.shape[1]]

    def of_rows(self, rows: Array) -> list[Array]:
        """Returns the parts: what the row of each tile has.  # [B, ...] -> [B, ...], [G * X, ...]"""
        shards, further = self.rows.shape
        parts = [rows] if self.own else []
        if further:
            copies = _take(rows.reshape(shards, -1, *rows.shape[1:]), self.rows)
            parts.append(copies.reshape(-1, *rows.shape[1:]))
        return parts

    def to_tokens(self, parts: list[Array]) -> Array:
        """# [B, WIDTH, ...], [G * X, WIDTH, ...] -> [G, N, ...]"""
        shards = self.rows.shape[0]
        tiles = [part.reshape(shards, -1, *part.shape[2:]) for part in parts]
        return _take(jnp.concatenate(tiles, axis=1), self.slots)


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
    own = rows if rows <= budget else 0
    count = (budget - 1) // WIDTH if own else budget  # at most: the last tile of a row may have one token
    if _SPARED * (own + count) * WIDTH < flat.shape[1]:
        tiles = _tiles(real.reshape(shards, rows, -1), tokens, places, own, count)
    return Ragged(places, jnp.where(flat, tokens, 0), tiles)


def _tiles(real: Array, tokens: Array, places: Array, own: int, count: int) -> Tiles:
    """Returns `own` tiles, one a row or none, and `count` others.  # [G, B / G, T] bool, [G, B / G * T], [G, N]"""
    shards, rows, _ = real.shape
    total = own + count
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None, :, None], real.shape)
    rank = jnp.cumsum(real, axis=2, dtype=jnp.int32) - 1
    used = (rank[:, :, -1] + WIDTH) // WIDTH - (own > 0)  # further tiles of each row; -1: not even its own
    used = jnp.maximum(used, 0)
    first = own + jnp.cumsum(used, axis=1) - used
    slot = first[..., None] * WIDTH + rank
    if own:
        slot = jnp.where(rank < WIDTH, row * WIDTH + rank, slot - WIDTH)
    slot, row = slot.reshape(shards, -1), row.reshape(shards, -1)
    target = jnp.where(real.reshape(shards, -1), slot, total * WIDTH)
    return Tiles(rows=_placed(target // WIDTH, row, total)[:, own:], tokens=_placed(target, tokens, total * WIDTH),
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
