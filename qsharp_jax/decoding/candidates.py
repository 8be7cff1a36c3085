"""Which tokens are scored, and their log-weights: of all that decide the laws of a step, and of no others."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import guidance
from qsharp_jax.categorical import ReturnDistribution
from qsharp_jax.decoding import candidacy
from qsharp_jax.decoding.state import DecodeState
from qsharp_jax.types import Array, Cache, Params, Policy, Value, ValueBlock, ValueScores

CANDIDATES, VALUE_PASS = 'candidates', 'value_pass'  # what profiles call their choice, and each pass over them
_MOST_ROOTS = 4  # chosen tokens that wait for one pass: more seldom do, and attention is over rows of as many
_UNKNOWN = 1.0  # nats below the greatest possible weight: what candidates are expected to weigh where nothing is known


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a value network bends the reference. Static: a change compiles anew.

    Attributes:
      value: the network, or None for the plain reference.
      distribution: how its scores are read.
      candidates: tokens scored per law and pass.
      epsilon_cutoff: probability under the reference, at the sampler's temperature, below which a token is no
        candidate in the paper's order, but for the most probable one.
      outside: rule for tokens that are not scored (`guidance.OUTSIDE`).
      order: 'paper' (guide, then temperature, top-k, top-p) or 'after_sampler' (guide the truncated sampler).
      offset: 'qsharp', 'cd' or 'fudge'.
      draft: tokens that the reference writes ahead in each step, for one pass of the value network to judge (`step`).
    """

    value: Value | None = None
    distribution: ReturnDistribution | None = None
    candidates: int = 20
    epsilon_cutoff: float = 0.0
    outside: str = 'mean'
    order: str = 'paper'
    offset: str = 'qsharp'
    draft: int = 0

    @property
    def places(self) -> int:
        """M: laws that a step works out for each row, that of the next token and those behind each drafted one."""
        return 1 + (self.draft if self.value is not None else 0)


@struct.dataclass
class Scored:
    """Log-weights of the candidates, scattered over the vocabulary; N = B * M places, those of a row together."""

    log_weight: Array  # [N, V]
    mean: Array  # expected return, NaN where not scored  # [N, V]
    mask: Array  # [N, V] bool
    root_log_weight: Array  # [N]
    weighing: Array | None  # `guidance.weighing_logits`  # [N, V]


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """The tokens behind which candidates stand: the pending one of each row, and what is drafted behind it.

    Attributes:
      tokens: the pending one first.  # [B, M] int32
      there: which places may be reached.  # [B, M] bool
    """

    tokens: Array
    there: Array

    @property
    def places(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def drafted(self) -> Array:
        """How many drafted tokens may be reached.  # [B] int32"""
        return jnp.sum(self.there, axis=1, dtype=jnp.int32) - self.there[:, 0]

    def spread(self, rows: Array) -> Array:
        """# [B, ...] -> [N, ...]: of a row for each of its places"""
        return spread(rows, self.places)

    def together(self, flat: Array) -> Array:
        """# [N, C, ...] -> [B, M * C, ...]"""
        return flat.reshape(-1, self.places * flat.shape[1], *flat.shape[2:])


@struct.dataclass
class Read:
    """Candidates of the first pass of a step: the chosen one of them need not be read again (`Value.keep`).

    Attributes:
      ids: of the candidates.  # [B, C] int32
      there: which were in the pass.  # [B, C] bool
      read: what `Value.keep` puts into a cache of them.
    """

    ids: Array
    there: Array
    read: Cache

    def keep(self, how: Guidance, state: DecodeState, chosen: Array) -> DecodeState:
        """Returns the state with the pending token of each row in its value cache too, where it was one of these.

        Args:
          how: the guidance.
          state: after the step.
          chosen: rows whose pending token was chosen in it.  # [B] bool
        """
        assert how.value is not None and how.value.keep is not None
        same = self.there & (self.ids == state.pending[:, None])
        found = chosen & jnp.any(same, axis=1)  # all tokens before it went in with the pass
        cache = how.value.keep(state.value_cache, self.read, jnp.argmax(same, axis=1), state.value_length, found)
        return dataclasses.replace(state, value_cache=cache, value_length=state.value_length + found)


def spread(rows: Array, places: int) -> Array:
    """Returns what belongs to rows for each of their places.  # [B, ...] -> [B * M, ...]"""
    shape = (rows.shape[0], places, *rows.shape[1:])
    return jnp.broadcast_to(rows[:, None], shape).reshape(-1, *rows.shape[1:])


def score_candidates(how: Guidance, params: Params, state: DecodeState, policy: Policy, logits: Array,
                     tokens: Array, there: Array) -> tuple[Scored, DecodeState, Read | None]:
    """Returns the log-weights of every token that the guided laws need, and the state with what was computed for them;
    and the candidates that were read for them, where the chosen one may be kept.

    In the paper's order these are the `candidates` most probable tokens under the reference, down to
    `how.epsilon_cutoff`; in the other order they are the sampler's whole support, in as many passes as its largest
    nucleus needs, never cut. Where less work takes less time (`Value.ragged`), tokens that cannot matter are left out:
    those of rows that are finished or at eta = inf, of a nucleus of one token, and candidates that are cut whatever
    they weigh (`candidacy.is_open`). Tokens chosen meanwhile wait until a value is needed; one that was a candidate
    itself has been read.

    Args:
      how: the guidance.
      params: of the value network.
      state: before this token. The returned one counts the drafted tokens to what is in the value cache.
      policy: of each row.
      logits: of the reference, behind each of `tokens`.  # [B, M, V]
      tokens: the pending one, and those that may come to follow it.  # [B, M] int32
      there: whether a row can get to each place; no place behind one that it cannot.  # [B, M] bool
    """
    value, distribution = how.value, how.distribution
    assert value is not None and distribution is not None
    batch, places, vocab = logits.shape
    logits, count = logits.reshape(-1, vocab), min(how.candidates, vocab)
    rows = jnp.arange(batch * places)[:, None]
    ahead = _Ahead(tokens, there)
    each: Policy = jax.tree.map(ahead.spread, policy)
    guided = ahead.there.reshape(-1) & jnp.isfinite(each.eta)
    # A network that scores all next tokens at once has nothing to spare but whole passes.
    sparing = value.ragged and value.scores_root
    weighing = guidance.weighing_logits(logits, each, outside=how.outside, order=how.order)
    scored = Scored(
        log_weight=jnp.zeros(logits.shape, jnp.float32),
        mean=jnp.full(logits.shape, jnp.nan, jnp.float32),
        mask=jnp.zeros(logits.shape, bool),
        root_log_weight=jnp.zeros(batch * places, jnp.float32),
        weighing=weighing)
    if how.order == 'paper':
        ids = guidance.top_candidates(logits, count)
        possible = candidacy.are_candidates(logits, ids, each, how.epsilon_cutoff)
        wanted = first = possible & guided[:, None]
        if sparing:
            low, high = distribution.log_weight_range(each.eta, how.offset)
            still_open = _openness(how, each, logits, weighing, ids, possible, low, high)
            known = ahead.spread(state.log_weight)
            expected = jnp.where(jnp.isnan(known), high - _UNKNOWN, known)
            first &= jnp.arange(count)[None] < _enough(still_open, expected, ids.shape)[:, None]
    else:
        assert weighing is not None
        needed = (weighing > -jnp.inf) & guided[:, None]
        if value.ragged:
            needed &= jnp.sum(needed, axis=-1, keepdims=True) > 1
        ids, first = _next_candidates(weighing, needed, count)

    def left(scored: Scored) -> tuple[Array, Array]:
        """What a further pass is for."""
        if how.order != 'paper':
            return _next_candidates(weighing, needed & ~scored.mask, count)
        done = scored.mask[rows, ids]
        return ids, wanted & ~done & still_open(scored.log_weight[rows, ids], done)[:, None]

    # The first pass has what was chosen and is not in the cache, what is drafted, and candidates that decide most laws.
    chosen = state.length + 1 - state.value_length
    begin = _first_block(how, state, ahead, chosen, ids, first)

    def make(carry: _Passes) -> _Passes:
        """One pass. Written once for the first and all further ones: each copy of the network takes time to compile."""
        initial = carry.number == 0
        further = _next_block(how, ahead, carry.ids, carry.wanted, begin.roots.shape[1])
        block = jax.tree.map(lambda one, other: jnp.where(initial, one, other), begin, further)
        # Slots of roots that are not real are written with anything: a row that has none writes behind what it holds.
        behind = jnp.where(further.known > 0, state.length + int(value.scores_root), state.value_length + begin.known)
        length = jnp.where(initial, state.value_length, behind)
        with jax.named_scope(VALUE_PASS):
            scores, cache = value.score(params, block, length, carry.cache)
        scored, given = _add(how, each, block, carry.ids, carry.wanted, scores, carry.scored)
        found = scores.roots, scores.read if keeping else None
        of_first = jax.tree.map(lambda one, before: jnp.where(initial, one, before), found, carry.of_first)
        return _Passes(carry.number + 1, scored, *(left(scored) if several else (carry.ids, carry.wanted)), cache,
                       of_first, carry.spent + given)

    several = sparing or how.order != 'paper'
    keeping = value.keep is not None and value.scores_root and places == 1  # a drafted token is a root as it is
    if keeping and value.init_read is None:
        raise ValueError('The value network has `keep` but no `init_read`: give it both, or neither (types.Value).')
    nothing = (jnp.zeros((*begin.roots.shape, distribution.num_scores), jnp.float32),
               value.init_read(batch, count) if keeping and value.init_read is not None else None)
    passes = _Passes(jnp.int32(0), scored, ids, first, state.value_cache, nothing, jnp.zeros(batch, jnp.int32))
    passes = jax.lax.while_loop(lambda carry: (carry.number == 0) | jnp.any(carry.wanted), make, passes
                                ) if several else make(passes)
    scored, values, (roots, read) = passes.scored, state.values, passes.of_first
    if value.scores_root:
        width = begin.roots.shape[1]
        here = jnp.clip((chosen - 1)[:, None] + jnp.arange(places)[None], 0, width - 1)
        last = jnp.take_along_axis(roots, here[..., None], axis=1).reshape(batch * places, -1)
        root = jnp.where(ahead.spread(chosen) > 0, distribution.log_weight(last, each.eta, how.offset),
                         ahead.spread(state.log_weight))
        scored = dataclasses.replace(scored, root_log_weight=root)
        answer = state.value_length[:, None] + jnp.arange(width)[None] - state.prompt_length[:, None]
        heard = (answer >= 0) & (jnp.arange(width)[None] < begin.known[:, None])
        target = jnp.where(heard, answer, values.shape[1])
        values = values.at[jnp.arange(batch)[:, None], target].set(distribution.mean(roots), mode='drop')
    if sparing and how.order == 'paper':
        # Rows that were closed before anything was scored: one token has the law to itself, as if it weighed the least.
        alone = guided & ~jnp.any(scored.mask, axis=1)
        target = jnp.where(alone, ids[:, 0], vocab)
        scored = dataclasses.replace(
            scored, mask=scored.mask.at[rows[:, 0], target].set(True, mode='drop'),
            log_weight=scored.log_weight.at[rows[:, 0], target].set(low, mode='drop'))
    state = dataclasses.replace(
        state, value_cache=passes.cache, value_length=state.value_length + begin.known, values=values,
        value_tokens=state.value_tokens + passes.spent)
    return scored, state, Read(ids, first, read) if keeping else None


class _Passes(NamedTuple):
    """Passes of the value network, of one step.

    Attributes:
      number: that were made.  # []
      scored: by them.
      ids: candidates of the next one.  # [N, C]
      wanted: which of them are.  # [N, C]
      cache: of the network.
      of_first: scores of the first pass's roots, [B, W, K]; and `ValueScores.read`, None where no one asks.
      spent: tokens that rows had in them.  # [B] int32
    """

    number: Array
    scored: Scored
    ids: Array
    wanted: Array
    cache: Cache
    of_first: tuple[Array, Cache]
    spent: Array


def _first_block(how: Guidance, state: DecodeState, ahead: _Ahead, chosen: Array, ids: Array,
                 wanted: Array) -> ValueBlock:
    """Returns the first pass over candidates `ids` [N, C], for which `chosen` tokens wait in each row, [B]."""
    assert how.value is not None
    places = ahead.places
    waiting = max(_MOST_ROOTS, 2 * places) if how.value.ragged else 1
    # The last token of the prompt is nowhere but pending, and goes in at once.
    due = state.active & (
        jnp.any(ahead.together(wanted), axis=1) | (state.count == 0) | (chosen + places > waiting))
    slots = state.value_length[:, None] + jnp.arange(waiting + places - 1)[None]
    behind = slots - state.length[:, None]
    answer = jnp.clip(slots - state.prompt_length[:, None], 0, state.tokens.shape[1] - 1)
    roots = jnp.where(behind < 0, jnp.take_along_axis(state.tokens, answer, axis=1),
                      jnp.take_along_axis(ahead.tokens, jnp.clip(behind, 0, places - 1), axis=1))
    return _block(ahead, roots, jnp.where(due, chosen + ahead.drafted, 0), chosen - 1, ids, wanted)


def _next_block(how: Guidance, ahead: _Ahead, ids: Array, wanted: Array, width: int) -> ValueBlock:
    """Returns a further pass over candidates `ids` [N, C], behind the pending token, which is in the cache.

    Those behind drafted tokens must not see the later ones, so that all of these are read again; a network without
    scores of its own for roots reads the pending one again as well.
    """
    assert how.value is not None
    again = 0 if how.value.scores_root else 1
    roots = jnp.pad(ahead.tokens, ((0, 0), (0, width)))[:, 1 - again:][:, :width]
    needed = jnp.any(ahead.together(wanted), axis=1)
    known = jnp.where(needed, again + ahead.drafted, 0)
    return _block(ahead, roots, known, jnp.full_like(known, again - 1), ids, wanted)


def _block(ahead: _Ahead, roots: Array, known: Array, first: Array, ids: Array, wanted: Array) -> ValueBlock:
    """Returns the pass in which the candidates of a row's places follow the roots from `first` [B] on."""
    parents = first[:, None] + jnp.repeat(jnp.arange(ahead.places), ids.shape[1])[None]
    return ValueBlock(roots=roots, known=known, candidates=ahead.together(ids), parents=parents,
                      wanted=ahead.together(wanted))


def _add(how: Guidance, policy: Policy, block: ValueBlock, ids: Array, wanted: Array, scores: ValueScores,
         scored: Scored) -> tuple[Scored, Array]:
    """Returns `scored` with the scores of a block's candidates `ids` [N, C]; and the tokens of each row in it, [B]."""
    assert how.value is not None and how.distribution is not None
    target = jnp.where(wanted, ids, scored.mask.shape[1])  # out of range: dropped by the scatter
    row = jnp.arange(target.shape[0])[:, None]
    found = scores.candidates.reshape(*ids.shape, -1)
    weight = how.distribution.log_weight(found, policy.eta[:, None], how.offset)
    # Without a score of the root all candidates are read off it.
    given = jnp.sum(block.real, axis=1) if how.value.scores_root else block.known
    return dataclasses.replace(
        scored,
        log_weight=scored.log_weight.at[row, target].set(weight, mode='drop'),
        mean=scored.mean.at[row, target].set(how.distribution.mean(found), mode='drop'),
        mask=scored.mask.at[row, target].set(True, mode='drop')), given


def _next_candidates(weighing: Array, needed: Array, count: int) -> tuple[Array, Array]:
    """Returns the `count` most probable tokens of those needed, and which of them are.  # [N, V] x 2 -> [N, C] x 2"""
    left = jnp.where(needed, weighing, -jnp.inf)
    ids = guidance.top_candidates(left, count)
    return ids, jnp.take_along_axis(left, ids, axis=1) > -jnp.inf


def _openness(how: Guidance, policy: Policy, logits: Array, weighing: Array | None, ids: Array, possible: Array,
              low: Array, high: Array) -> Callable[[Array, Array], Array]:
    """Returns which places need more of the candidates, given the weights of those scored; paper's order.

    The candidates are those of `ids` [N, C] that are `possible`.

    # [N, C] x 2 -> [N]
    """
    rows = jnp.arange(ids.shape[0])[:, None]
    temperature = jnp.where(policy.temperature > 0, policy.temperature, 1.0)[:, None]
    removed = jnp.where(possible, ids, logits.shape[1])
    others = jax.nn.logsumexp(logits.at[rows, removed].set(-jnp.inf, mode='drop') / temperature, axis=-1)
    own, weights = (jnp.where(possible, numbers[rows, ids], -jnp.inf)
                    for numbers in (logits, logits if weighing is None else weighing))

    def still_open(log_weight: Array, scored: Array) -> Array:
        return candidacy.is_open(own, weights, others, log_weight, scored, low, high, policy, how.outside)

    return still_open


def _enough(still_open: Callable[[Array, Array], Array], expected: Array, shape: tuple[int, ...]) -> Array:
    """Returns how many of the best candidates close a place if each weighs as much as is expected, [N].  # [N]

    That is what the token chosen last weighs: the weight of a prefix is the mean of its tokens' weights. If any is
    needed it is one more, since a further pass takes longer than some tokens of this one.
    """
    count = shape[1]

    def closes(number: Array) -> Array:
        scored = jnp.broadcast_to(jnp.arange(count)[None] < number, shape)
        return ~still_open(jnp.broadcast_to(expected[:, None], shape), scored)

    found = jax.vmap(closes)(jnp.arange(count))  # [C, N]
    fewest = jnp.argmax(found, axis=0)
    return jnp.where(jnp.any(found, axis=0), fewest + (fewest > 0), count)
