"""The networks as the pure functions that the rest of the project knows them by."""
from __future__ import annotations

from collections.abc import Collection
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from qsharp_jax.models import cache as cache_lib
from qsharp_jax.models import ragged as ragged_lib
from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.ragged import Ragged
from qsharp_jax.models.transformer import KVCache, TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Array, Params, Reference, Value, ValueBlock, ValueScores


def reference(config: TransformerConfig, vocab_size: int | None = None, holes: Collection[int] = ()) -> Reference:
    """Returns the reference of this shape; its parameters are an argument of every call.

    Args:
      config: of the decoder.
      vocab_size: how many leading ids the tokenizer has; None for all. Published models pad their vocabularies, and
        this is where the padding ends: no logit of it is seen by sampler, guidance or KL.
      holes: ids below that no token has. Their logits are -inf: every law is that of a vocabulary without them.

    Raises:
      ValueError: the model has fewer ids, or no id is left.
    """
    real = vocab_size or config.vocab_size
    if real > config.vocab_size:
        raise ValueError(f'vocab_size is {real}, but the model has {config.vocab_size} ids.')
    exists = np.ones(real, bool)
    exists[[hole for hole in holes if hole < real]] = False
    if not exists.any():
        raise ValueError(f'none of the {real} ids has a token.')

    def step(params: Params, token: Array, length: Array, cache: KVCache) -> tuple[Array, KVCache]:
        hidden, cache = transformer.extend(
            config, params, cache, length, token[:, None], length[:, None], transformer.causal_mask(1), commit=1)
        logits = transformer.logits(config, params, hidden[:, 0])
        if real < config.vocab_size:
            logits = logits[:, :real]
        return logits if exists.all() else jnp.where(exists[None], logits, -jnp.inf), cache

    return Reference(
        vocab_size=real,
        init_cache=functools.partial(transformer.init_cache, config),
        prefill=functools.partial(_prefill, config),
        step=step)


def value(config: TransformerConfig, value_config: ValueConfig, ragged: bool = True) -> Value:
    """Returns the value model of this shape.

    Args:
      config: of the base that it was started from.
      value_config: of the value model.
      ragged: whether a pass is over the real tokens of its block alone. Layers that are scanned read whole blocks.
    """
    trunk = value_lib.trunk_config(value_config, config)
    q_type = value_config.kind == 'q'
    # Elsewhere a pass has a place for a root whether one is there or not.
    sparing = ragged and not trunk.scan_layers
    keeps = sparing and not q_type

    def prefill(params: Params, tokens: Array, lengths: Array, cache: KVCache, start: int) -> KVCache:
        return _prefill(trunk, params['trunk'], tokens, lengths, cache, start)

    def score(params: Params, block: ValueBlock, length: Array, cache: KVCache) -> tuple[ValueScores, KVCache]:
        roots = block.roots.shape[1]
        tokens, positions = block.roots, length[:, None] + jnp.arange(roots)[None]
        mask, real = transformer.causal_mask(roots), block.real
        if q_type:
            real = real[:, :roots]
        else:
            tokens = jnp.concatenate([tokens, block.candidates], axis=1)
            positions = jnp.concatenate([positions, length[:, None] + block.parents + 1], axis=1)
            mask = block_mask(roots, block.parents)

        def head(hidden: Array) -> ValueScores:
            if q_type:
                before = jnp.take_along_axis(hidden, jnp.maximum(block.parents, 0)[..., None], axis=1)
                scores = value_lib.head_scores(value_config, trunk, params, before, block.candidates)
                return ValueScores(jnp.full((*block.roots.shape, value_config.num_scores), jnp.nan), scores)
            scores = value_lib.head_scores(value_config, trunk, params, hidden, tokens)
            return ValueScores(roots=scores[:, :roots], candidates=scores[:, roots:])

        if trunk.scan_layers:  # it computes padding, and writes as it goes
            hidden, cache = transformer.extend(
                trunk, params['trunk'], cache, length, tokens, positions, mask, commit=roots)
            return head(hidden), cache

        def run(layout: Ragged | None) -> tuple[ValueScores, Array, KVCache]:
            hidden, new = transformer.read(
                trunk, params['trunk'], cache, length, tokens, positions, mask,
                commit=tokens.shape[1] if keeps else roots, layout=layout)
            return head(hidden), hidden, new

        scores, hidden, new = ragged_lib.by_budget(
            run, real, like=length, flops=transformer.token_flops(trunk)) if ragged else run(None)
        new, read = cache_lib.split(new, roots)
        cache = cache_lib.write_all(cache, new, length, hidden)
        return dataclasses.replace(scores, read=read) if keeps else scores, cache

    return Value(
        init_cache=functools.partial(transformer.init_cache, trunk), prefill=prefill, score=score,
        scores_root=not q_type, ragged=sparing, keep=cache_lib.write_one if keeps else None,
        init_read=functools.partial(cache_lib.empty, trunk) if keeps else None)


def value_scores(
    config: TransformerConfig,
    value_config: ValueConfig,
    params: Params,
    tokens: Array,  # [B, T]
    positions: Array,  # [B, T]
    mask: Array,  # [B, T, T] bool
    parents: Array,  # [B, T]
) -> Array:
    """Returns float32 scores [B, T, K] of each token as the one chosen there, without a cache: for the fit.

    Args:
      config: of the base that the value model was started from.
      value_config: of the value model.
      params: its parameters.
      tokens: packed sequences.
      positions: the position of each token in its own sequence.
      mask: whether token i (row) sees token j (column).
      parents: index along T of the token that precedes each one; only kind 'q' reads it. A token without a
        parent may name any index: its score means nothing then.
    """
    trunk = value_lib.trunk_config(value_config, config)
    hidden = transformer.hidden_states(trunk, params['trunk'], tokens, positions, mask)
    if value_config.kind == 'q':
        hidden = jnp.take_along_axis(hidden, jnp.clip(parents, 0, tokens.shape[1] - 1)[..., None], axis=1)
    return value_lib.head_scores(value_config, trunk, params, hidden, tokens)


def reference_logits(
    config: TransformerConfig, params: Params, tokens: Array, positions: Array, mask: Array,
) -> Array:
    """Returns float32 logits [B, T, V] of the token after each one, without a cache."""
    hidden = transformer.hidden_states(config, params, tokens, positions, mask)
    return transformer.logits(config, params, hidden)


def text_logits(config: TransformerConfig, params: Params, tokens: Array) -> Array:
    """Returns float32 logits of all tokens but the first of right-padded texts.  # [B, T] -> [B, T-1, V]"""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    return reference_logits(config, params, tokens[:, :-1], positions, transformer.causal_mask(length))


def block_mask(roots: int, parents: Array) -> Array:
    """Returns whether new token i (row) sees new token j (column): roots, then candidates.  # [B, C] -> [B, T, T] bool

    A root sees those up to itself, a candidate those up to its parent and itself.
    """
    batch, count = parents.shape
    last = jnp.concatenate([jnp.broadcast_to(jnp.arange(roots)[None], (batch, roots)), parents], axis=1)
    sees_roots = jnp.arange(roots)[None, None] <= last[..., None]
    itself = jnp.eye(roots + count, dtype=bool)[None, :, roots:]
    return jnp.concatenate([sees_roots, jnp.broadcast_to(itself, (batch, roots + count, count))], axis=2)


def _prefill(
    config: TransformerConfig, params: Params, tokens: Array, lengths: Array, cache: KVCache, start: int,
) -> KVCache:
    """Returns the cache with the tokens in it; padding lands in slots behind the tokens, never read."""
    del lengths
    batch, length = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(length)[None], (batch, length))
    held = jnp.full(batch, start) if start else None
    mask = transformer.causal_mask(length)
    _, filled = transformer.extend(config, params, cache, held, tokens, positions, mask, commit=length)
    return filled
