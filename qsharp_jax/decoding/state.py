"""The state of a batch of answers being written, how one starts, and how one goes back."""
from __future__ import annotations

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import sharding
from qsharp_jax.types import Array, Cache, Params, Reference, Value


@struct.dataclass
class DecodeState:
    """A batch of answers in the making; every field is per row, so rows never touch each other.

    The last chosen token is *pending*: it is fed to the networks by the next step, which puts it into the caches; but
    the value network has read it already where it was a candidate.

    Attributes:
      reference_cache: slots 0 .. length-1 of each row hold the prompt and the answer so far without `pending`.
      value_cache: slots 0 .. value_length-1 of each row hold prompt and answer for the value network; None where
        nothing is guided.
      value_length: at most `length`: what is chosen goes in when a value is needed. Or one more, with the pending
        token: one that was a candidate has been read.  # [B] int32
      prompt_length: tokens of the prompt, at least 1.  # [B] int32
      pending: the last token of prompt + answer; its position is `length`.  # [B] int32
      tokens: the answer; entries at or beyond `count` mean nothing.  # [B, T] int32
      count: tokens of the answer.  # [B] int32
      limit: the answer stops at this many tokens.  # [B] int32
      ended: whether the last token of the answer is an end-of-sequence token.  # [B] bool
      keys: one key per row; the noise of answer position t is `fold_in(key, t)`.  # [B] keys
      kl: Σ over the answer's tokens of KL(policy ‖ reference), in nats.  # [B]
      values: expected return of each chosen token, NaN where it is not known.  # [B, T]
      log_weight: of the pending token, as it was scored; NaN where it is not known.  # [B]
      reference_tokens: tokens that the reference was given for this row by steps.  # [B] int32
      value_tokens: tokens that the value network was given for this row by steps: chosen ones and candidates, also for
        tokens that were cut off since.  # [B] int32
    """

    reference_cache: Cache
    value_cache: Cache
    value_length: Array
    prompt_length: Array
    pending: Array
    tokens: Array
    count: Array
    limit: Array
    ended: Array
    keys: Array
    kl: Array
    values: Array
    log_weight: Array
    reference_tokens: Array
    value_tokens: Array

    @property
    def length(self) -> Array:
        """Slots of the reference's cache that are in use: all but the pending token.  # [B]"""
        return self.prompt_length + self.count - 1

    @property
    def active(self) -> Array:
        """Rows that still need tokens.  # [B] bool"""
        return ~self.ended & (self.count < self.limit)


STAGES = ('roll_in', 'cut', 'roll_out', 'evaluate')


def stage_keys(seed: int, iteration: int) -> Array:
    """Returns the key of each kind of draw, in the order of `STAGES`, from which those of units are made.  # [4]"""
    base = jax.random.fold_in(jax.random.key(seed), iteration)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, jnp.arange(len(STAGES)))


def keys_of(stages: Array, stage: str, examples: Array, samples: Array) -> Array:
    """Returns one key per (example, sample) from `stage_keys`; see `unit_keys`.  # [B]"""
    if stage not in STAGES:
        raise ValueError(f'stage {stage!r}: it must be one of {", ".join(STAGES)}')
    base = stages[STAGES.index(stage)]

    def key(example: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, example), sample)

    return jax.vmap(key)(examples, samples)


def unit_keys(seed: int, iteration: int, stage: str, examples: Array, samples: Array) -> Array:
    """Returns one key per (example, sample), the same wherever and whenever the unit is computed.

    Args:
      seed: of the run.
      iteration: outer iteration the draw belongs to.
      stage: name of the kind of draw ('roll_in', 'cut', 'roll_out', 'evaluate'): each has noise of its own.
      examples: ids of the prompts.  # [B] int32
      samples: number of the answer of its prompt.  # [B] int32
    """
    return keys_of(stage_keys(seed, iteration), stage, examples, samples)


@functools.partial(jax.jit, static_argnames=('reference', 'value'))
def prefix(reference: Reference, value: Value | None, reference_params: Params, value_params: Params,
           tokens: Array) -> tuple[Cache, Cache]:
    """Returns both caches, of one row, with what several prompts begin with: `tokens` [1, N]. See `prefill`."""
    length = tokens.shape[1]

    def filled(network: Reference | Value, params: Params) -> Cache:
        return network.prefill(params, tokens, jnp.full(1, length), network.init_cache(1, length), 0)

    return filled(reference, reference_params), None if value is None else filled(value, value_params)


def prefill(reference: Reference, value: Value | None, reference_params: Params, value_params: Params,
            prompts: Array, lengths: Array, buffer: int, before: tuple[Cache, Cache] | None = None,
            shared: int = 0) -> DecodeState:
    """Returns the state of one row a prompt, which no token may yet be added to.

    Args:
      reference: π_ref.
      value: the value network, or None where nothing will be guided.
      reference_params: of `reference`.
      value_params: of `value`; anything when that is None.
      prompts: right-padded.  # [U, P] int32
      lengths: their lengths, at least 1.  # [U] int32
      buffer: T, size of the answer buffer.
      before: from `prefix`, of the first `shared` tokens of every prompt.
      shared: how many those are, less than the shortest prompt has.
    """
    unique, width = prompts.shape

    def filled(network: Reference | Value, params: Params, start: Cache) -> Cache:
        cache = network.init_cache(unique, width + buffer)
        if shared:
            cache = jax.tree.map(_begin_with, cache, start)
        # The last prompt token stays pending: the first step feeds it, so that every step is alike.
        return network.prefill(params, prompts[:, shared:], lengths - 1 - shared, cache, shared)

    reference_before, value_before = before or (None, None)
    return DecodeState(
        reference_cache=filled(reference, reference_params, reference_before),
        value_cache=None if value is None else filled(value, value_params, value_before),
        value_length=lengths - 1,
        prompt_length=lengths,
        pending=jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0],
        tokens=jnp.zeros((unique, buffer), jnp.int32),
        count=jnp.zeros(unique, jnp.int32),
        limit=jnp.zeros(unique, jnp.int32),
        ended=jnp.zeros(unique, bool),
        keys=jnp.broadcast_to(jax.random.key(0), (unique,)),
        kl=jnp.zeros(unique, jnp.float32),
        values=jnp.full((unique, buffer), jnp.nan, jnp.float32),
        log_weight=jnp.full(unique, jnp.nan, jnp.float32),
        reference_tokens=jnp.zeros(unique, jnp.int32),
        value_tokens=jnp.zeros(unique, jnp.int32),
    )


def _begin_with(cache: Array, first: Array) -> Array:
    """Returns a cache [U, ...] whose rows begin with the smaller `first` [1, ...]: slots from 0 on, whichever axis."""
    rows = jnp.broadcast_to(first, (cache.shape[0], *first.shape[1:]))
    return jax.lax.dynamic_update_slice(cache, rows, (0,) * cache.ndim)


@functools.partial(jax.jit, static_argnames=('reference', 'value', 'buffer'))
def start(reference: Reference, value: Value | None, reference_params: Params, value_params: Params,
          prompts: Array, lengths: Array, rows: Array, keys: Array, limit: Array, buffer: int) -> DecodeState:
    """Returns the state before the first token.

    Each distinct prompt is prefilled once for all of its rows.

    On a mesh every array of the state is split by rows, as `rows` is.

    Args:
      reference: π_ref.
      value: the value network, or None where nothing will be guided.
      reference_params: of `reference`.
      value_params: of `value`; anything when that is None.
      prompts: right-padded distinct prompts.  # [U, P] int32
      lengths: their lengths, at least 1.  # [U] int32
      rows: which prompt each row answers.  # [B] int32
      keys: one per row, from `unit_keys`.  # [B]
      limit: most tokens of each answer; 0 makes a row that never runs (padding).  # [B] int32
      buffer: T, size of the answer buffer; no limit may exceed it.
    """
    once = prefill(reference, value, reference_params, value_params, prompts, lengths, buffer)
    state = jax.tree.map(lambda leaf: leaf[rows], once)
    return sharding.constrain_rows(dataclasses.replace(state, keys=keys, limit=limit), like=rows)


def is_eos(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
    """Returns whether each token ends an answer. Same shape as `tokens`."""
    ended = jnp.zeros(tokens.shape, bool)
    for eos in eos_ids:
        ended |= tokens == eos
    return ended


@functools.partial(jax.jit, static_argnames=('eos_ids',), donate_argnames=('state',))
def rewind(state: DecodeState, kept: Array, limit: Array, keys: Array, eos_ids: tuple[int, ...]) -> DecodeState:
    """Returns the state with each answer cut back to its first `kept` tokens, to go on with other noise.

    `state` is given up. Only lengths change: the caches are addressed by position and their slots beyond the length
    are never read. The token at the cut becomes the pending one. The KL of the cut-off
    tokens cannot be taken back, so `kl` is zeroed.

    Args:
      state: after some decoding.
      kept: tokens to keep, 1 <= kept <= count.  # [B] int32
      limit: as in `start`.  # [B] int32
      keys: noise for the tokens to come.  # [B]
      eos_ids: ends of an answer.
    """
    last = jnp.take_along_axis(state.tokens, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    written = jnp.arange(state.tokens.shape[1])[None, :] < kept[:, None]
    return sharding.constrain_rows(dataclasses.replace(
        state,
        value_length=jnp.minimum(state.value_length, state.prompt_length + kept - 1),
        pending=jnp.where(kept > 0, last, state.pending),
        count=kept,
        limit=limit,
        ended=is_eos(last, eos_ids) & (kept > 0),
        keys=keys,
        kl=jnp.zeros_like(state.kl),
        log_weight=jnp.full_like(state.log_weight, jnp.nan),
        tokens=jnp.where(written, state.tokens, 0),
        values=jnp.where(written, state.values, jnp.nan),
    ), like=kept)
