"""The networks as the pure functions that the rest of the project knows them by."""
from __future__ import annotations

from collections.abc import Collection
import functools

import jax.numpy as jnp
import numpy as np

from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import KVCache, TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Array, Params, Reference, Value, ValueScores


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
        alone = jnp.ones((1, 1), bool)
        hidden, cache = _append(config, params, token[:, None], length[:, None], alone, cache)
        logits = transformer.logits(config, params, hidden[:, 0])
        if real < config.vocab_size:
            logits = logits[:, :real]
        return logits if exists.all() else jnp.where(exists[None], logits, -jnp.inf), cache

    return Reference(
        vocab_size=real,
        init_cache=functools.partial(transformer.init_cache, config),
        prefill=functools.partial(_prefill, config),
        step=step)


def value(config: TransformerConfig, value_config: ValueConfig) -> Value:
    """Returns the value model of this shape; `config` is that of the base it was started from."""
    trunk = value_lib.trunk_config(value_config, config)
    q_type = value_config.kind == 'q'

    def prefill(params: Params, tokens: Array, lengths: Array, cache: KVCache, start: int) -> KVCache:
        return _prefill(trunk, params['trunk'], tokens, lengths, cache, start)

    def score(
        params: Params, root: Array, candidates: Array, length: Array, cache: KVCache,
    ) -> tuple[ValueScores, KVCache]:
        batch, count = candidates.shape
        tokens, positions, mask = root[:, None], length[:, None], jnp.ones((1, 1), bool)
        if not q_type:
            tokens = jnp.concatenate([tokens, candidates], axis=1)
            positions = jnp.concatenate([positions, jnp.broadcast_to(positions + 1, (batch, count))], axis=1)
            mask = candidate_mask(count)
        hidden, cache = _append(trunk, params['trunk'], tokens, positions, mask, cache)
        if q_type:
            hidden, tokens = jnp.broadcast_to(hidden, (batch, count, trunk.width)), candidates
        scores = value_lib.head_scores(value_config, trunk, params, hidden, tokens)
        if q_type:
            unknown = jnp.full((batch, value_config.num_scores), jnp.nan)
            return ValueScores(root=unknown, candidates=scores), cache
        return ValueScores(root=scores[:, 0], candidates=scores[:, 1:]), cache

    return Value(
        init_cache=functools.partial(transformer.init_cache, trunk), prefill=prefill, score=score,
        scores_root=not q_type)


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
    """Returns float32 logits [B, T, V] of the token after each one, without a cache: for pre-training."""
    hidden = transformer.hidden_states(config, params, tokens, positions, mask)
    return transformer.logits(config, params, hidden)


def candidate_mask(count: int) -> Array:
    """Returns [1 + count, 1 + count] bool: the root and then candidates that see the root and themselves."""
    return jnp.eye(1 + count, dtype=bool).at[:, 0].set(True)


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


def _append(
    config: TransformerConfig, params: Params, tokens: Array, positions: Array, mask: Array, cache: KVCache,
) -> tuple[Array, KVCache]:
    """Returns the hidden states of new tokens after positions[:, 0] cached ones; keeps the first token."""
    length = positions[:, 0]
    return transformer.extend(config, params, cache, length, tokens, positions, mask, commit=1)
