"""Where the real tokens of a batch are, one behind the other and in tiles."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models import ragged
from qsharp_jax.models.ragged import WIDTH


@pytest.mark.parametrize('rows, shards, seed', (
    *((8, shards, seed) for shards in (1, 2) for seed in range(12)), *((1, 1, seed) for seed in range(5)), (2, 2, 3)))
def test_every_token_is_in_one_tile_of_its_row(rows, shards, seed):
    rng = np.random.default_rng(seed)
    length = 40
    most = rng.integers(0, 12, rows) * (rng.random(rows) < 0.7)
    if seed == 0:
        most[:] = 1  # the most tiles for their tokens: a token each
    if seed == 1:
        most[:] = 0
    real = np.zeros((rows, length), bool)
    for row, number in enumerate(most):
        real[row, rng.choice(length, number, replace=False)] = True
    tokens = int(real.reshape(shards, -1).sum(axis=1).max())
    laid = ragged.layout(jnp.asarray(real), shards, max(tokens, 1) + seed % 3)
    assert laid.tiles is not None
    names = np.arange(rows * length).reshape(rows, length)  # of the places
    flat = np.asarray(laid.gather(jnp.asarray(names)))
    parts = laid.tiles.of_tokens(jnp.asarray(flat))
    of_parts = laid.tiles.of_rows(jnp.arange(rows)[:, None])
    found = np.asarray(laid.tiles.to_tokens(parts))
    assert [part.shape for part in parts] == [(len(of_part), WIDTH) for of_part in of_parts]
    budget = max(tokens, 1) + seed % 3
    own = budget >= rows // shards
    assert len(parts) == own + (not own or budget > WIDTH)
    if own:  # a tile for each row, which needs no copy
        np.testing.assert_array_equal(of_parts[0][:, 0], np.arange(rows))
    tiles, of_rows = (np.concatenate([np.asarray(part).reshape(shards, -1, part.shape[1]) for part in each], axis=1)
                      for each in (parts, of_parts))
    scattered = np.asarray(laid.scatter(jnp.asarray(flat), rows))
    for shard in range(shards):
        own = names.reshape(shards, -1)[shard][real.reshape(shards, -1)[shard]]
        np.testing.assert_array_equal(flat[shard, :len(own)], own)
        np.testing.assert_array_equal(found[shard, :len(own)], own)  # there and back
        for slot in np.asarray(laid.tiles.slots)[shard, :len(own)]:
            assert tiles[shard].reshape(-1)[slot] // length == of_rows[shard, slot // WIDTH, 0]
    np.testing.assert_array_equal(scattered[real], names[real])


def test_rows_that_are_mostly_full_are_not_tiled():
    real = jnp.ones((4, 8), bool)
    assert ragged.layout(real, 1, 32).tiles is None


def test_sizes_of_passes_follow_the_real_tokens_and_spare_enough():
    for whole in (1, 5, 40, 336, 3150, 100_000):
        every = ragged._budgets(whole, 1e9)
        assert all(0 < one < other for one, other in zip(every, [*every[1:], whole]))
        assert all(other <= 2 * one for one, other in zip(every, every[1:]))
        assert not whole > 64 or every[0] * 64 >= whole and every[-1] * 2 > whole * 0.6
        for flops in (1e4, 1e5, 1e6):
            some = ragged._budgets(whole, flops)
            assert set(some) <= set(every)
            assert all((other - one) * flops >= 1e7 for one, other in zip(some, [*some[1:], whole]))
    assert ragged._budgets(336, 1e9) and not ragged._budgets(336, 1e4)
