"""The records that flow through a run, and the callables that networks are seen through.

Letters used in every shape: B batch, P prompt, T new tokens, S cache slots, V vocabulary, C candidates,
K scores of one return distribution.

Rollouts, guidance and evaluation know a network only as a `Reference` or a `Value`, so that a tabular model, a
fake, and a sharded transformer are interchangeable.
"""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, TypeAlias

from flax import struct
import jax.numpy as jnp

Array: TypeAlias = Any  # a jax.Array on the devices, or a np.ndarray on its way there and back
Params = Any  # a plain tree of arrays
Cache = Any  # a tree of arrays; every leaf has the batch as its leading axis, so rows can be repeated or picked


@struct.dataclass
class Policy:
    """What each row is sampled from. Every field is traced, so one compiled batch serves any mixture.

    Attributes:
      eta: KL coefficient; it divides the return. `inf` is the reference itself.  # [B]
      temperature: of the reference's softmax; 0 is greedy.  # [B]
      top_k: number of tokens kept by the sampler; 0 keeps all.  # [B] int32
      top_p: mass of the nucleus kept by the sampler; 1 keeps all.  # [B]
      reference_temperature: above 0; the KL is measured to the reference at this temperature, also that of a policy
        which samples at another one.  # [B]
    """

    eta: Array
    temperature: Array
    top_k: Array
    top_p: Array
    reference_temperature: Array


@struct.dataclass
class ValueBlock:
    """New tokens for a value network: those chosen that it has not read yet, and ones that may follow them.

    Rows may have any number of either. What is not real is padding of any value, and its scores mean nothing.

    Attributes:
      roots: chosen tokens, of positions length .. length + M - 1.  # [B, M] int32
      known: how many leading roots of a row are real.  # [B] int32
      candidates: tokens to be scored.  # [B, C] int32
      parents: index of the root that each candidate follows; -1: the last token in the cache.  # [B, C] int32
      wanted: which candidates are real.  # [B, C] bool
    """

    roots: Array
    known: Array
    candidates: Array
    parents: Array
    wanted: Array

    @property
    def real(self) -> Array:
        """Which tokens are real, roots before candidates.  # [B, M + C] bool"""
        known = jnp.arange(self.roots.shape[1])[None] < self.known[:, None]
        return jnp.concatenate([known, self.wanted], axis=1)


@struct.dataclass
class ValueScores:
    """Raw outputs of a value network, to be read by `categorical.ReturnDistribution`.

    Attributes:
      roots: scores of each root, given what precedes it.  # [B, M, K]
      candidates: scores of each candidate as the token after its parent.  # [B, C, K]
      read: what `Value.keep` puts into a cache of each candidate; None where there is no such function.
    """

    roots: Array
    candidates: Array
    read: Cache = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The frozen language model π_ref, as pure functions.

    The cache is addressed by position: slot p of a row holds position p of that row. Setting a row's length back
    rewinds it; slots at or beyond the length are never read.

    Attributes:
      vocab_size: V.
      init_cache: (batch, capacity) -> Cache with `capacity` slots a row.
      prefill: (params, tokens [B, P], lengths [B], cache, start) -> Cache. Writes positions start ..
        start + lengths - 1 of each row behind the `start` (an int, the same for all rows) that the cache holds;
        tokens at or beyond `lengths` are padding of any value.
      step: (params, token [B], length [B], cache) -> (logits [B, V] float32, Cache). Puts `token` at position
        `length` and returns the logits of the token after it, -inf for ids that no token has.
    """

    vocab_size: int
    init_cache: Callable[[int, int], Cache]
    prefill: Callable[[Params, Array, Array, Cache, int], Cache]
    step: Callable[[Params, Array, Array, Cache], tuple[Array, Cache]]


@dataclasses.dataclass(frozen=True)
class Value:
    """The learned return distribution of a next token, as pure functions.

    Attributes:
      init_cache: as `Reference.init_cache`.
      prefill: as `Reference.prefill`.
      score: (params, ValueBlock, length [B], cache) -> (ValueScores, Cache). Puts the roots of each row behind the
        `length` tokens that its cache holds, and scores them and the candidates behind their parents; only roots stay
        in the cache. Of slots of roots that are not real nothing is promised.
      scores_root: whether `ValueScores.roots` means anything. A network that scores all next tokens at once, from the
        state before them, has no score of the root itself (it then holds NaN), and every candidate's parent must be
        among the roots.
      ragged: whether a pass takes the time of its real tokens alone, so that it is worth while to give it few.
      keep: (cache, read, which [B], length [B], there [B] bool) -> Cache. Puts candidate `which` of a pass behind the
        `length` tokens that each row's cache holds, where it is `there`: as if it had been a root, without another
        pass over it. `read` is `ValueScores.read` of a pass in which the candidate's parent was the last of these
        tokens. Only for a network that scores roots; None: every chosen token goes in as a root.
      init_read: (batch, C) -> anything of the shape of `read`; None where `keep` is.
    """

    init_cache: Callable[[int, int], Cache]
    prefill: Callable[[Params, Array, Array, Cache, int], Cache]
    score: Callable[[Params, ValueBlock, Array, Cache], tuple[ValueScores, Cache]]
    scores_root: bool = True
    ragged: bool = False
    keep: Callable[[Cache, Cache, Array, Array, Array], Cache] | None = None
    init_read: Callable[[int, int], Cache] | None = None
