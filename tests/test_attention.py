"""Attention against a dense softmax."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models.attention import attend, PARTS, QUERIES


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_attention_equals_dense_softmax_over_repeated_heads(kv_heads):
    batch, new, slots, heads, size = 3, 4, 6, 4, 5
    rng = np.random.default_rng(0)
    query = rng.normal(size=(batch, new, heads, size))
    keys, values = rng.normal(size=(2, batch, kv_heads, slots + new, size))
    block, seen = rng.random((batch, new, new)) < 0.7, rng.random((batch, slots)) < 0.6
    block[..., 0] = True
    mask = np.concatenate([np.broadcast_to(seen[:, None], (batch, new, slots)), block], axis=-1)
    expected = np.zeros(query.shape)
    for b in range(batch):
        for head in range(heads):
            group = head // (heads // kv_heads)
            for t in range(new):
                weights = np.exp(keys[b, group] @ query[b, t, head] / np.sqrt(size)) * mask[b, t]
                expected[b, t, head] = weights @ values[b, group] / weights.sum()
    keys = keys.swapaxes(2, 3)
    got = attend(
        *map(jnp.asarray, (query, keys[..., slots:], values[:, :, slots:], block)),
        (jnp.asarray(keys[..., :slots]), jnp.asarray(values[:, :, :slots])), jnp.asarray(seen)[:, None])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('length', [QUERIES + 2, 2 * QUERIES, QUERIES * PARTS + 9])
@pytest.mark.parametrize('slots', [0, 5])
def test_attention_in_parts_has_the_values_and_gradients_of_the_whole(length, slots):
    batch, kv_heads, heads, size = 2, 1, 2, 4
    rng = np.random.default_rng(0)
    query, cotangent = rng.normal(size=(2, batch, length, heads, size)).astype(np.float32)
    key, value = rng.normal(size=(2, batch, kv_heads, length + slots, size)).astype(np.float32)
    mask = np.tril(rng.random((batch, length, length)) < 0.3)
    mask[:, 7] = mask[:, -1] = False
    cached_mask = rng.random((batch, length, slots)) < 0.5
    cached_mask[:, 7] = False
    whole = np.concatenate([cached_mask, mask], axis=-1)

    def dense(query, key, value):
        keys, values = (jnp.repeat(array, heads, axis=1) for array in (key, value))
        scores = jnp.einsum('bthd,bhsd->bhts', query, keys) / 2
        weights = jnp.where(whole[:, None], jnp.exp(scores), 0)
        return jnp.einsum('bhts,bhsd->bthd', weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30), values)

    def ours(query, key, value):
        keys = key.swapaxes(2, 3)
        cached = (keys[..., :slots], value[:, :, :slots]) if slots else None
        return attend(query, keys[..., slots:], value[:, :, slots:], jnp.asarray(mask), cached,
                      jnp.asarray(cached_mask) if slots else None)

    for got, expected in zip(*(jax.jit(lambda *arrays, f=f: jax.vjp(f, *arrays)[1](cotangent) + (f(*arrays),))(
            query, key, value) for f in (ours, dense))):
        np.testing.assert_allclose(got, expected, atol=2e-5)
