"""One token for every row: reference, values of the candidates, THE sampling distribution, a draw."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from qsharp_jax import guidance, sharding
from qsharp_jax.categorical import ReturnDistribution
from qsharp_jax.decoding.state import DecodeState, is_eos
from qsharp_jax.types import Array, Params, Policy, Reference, Value, ValueBlock, ValueScores

_MOST_ROOTS = 4  # chosen tokens that wait for one pass: more seldom do, and attention is over rows of as many
_UNKNOWN = 1.0  # nats below the greatest possible weight: what candidates are expected to weigh where nothing is known
_LAWS = 2 ** 27  # bytes a device, about eight times its logits, above which rows are worked out by parts


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a value network bends the reference. Static: a change compiles anew.

    Attributes:
      value: the network, or None for the plain reference.
      distribution: how its scores are read.
      candidates: tokens scored per pass.
      outside: rule for tokens that are not scored (`guidance.OUTSIDE`).
      order: 'paper' (guide, then temperature, top-k, top-p) or 'after_sampler' (guide the truncated sampler).
      offset: 'qsharp', 'cd' or 'fudge'.
    """

    value: Value | None = None
    distribution: ReturnDistribution | None = None
    candidates: int = 20
    outside: str = 'mean'
    order: str = 'paper'
    offset: str = 'qsharp'


@struct.dataclass
class Scored:
    """Log-weights of the candidates, scattered over the vocabulary."""

    log_weight: Array  # [B, V]
    mean: Array  # expected return, NaN where not scored  # [B, V]
    mask: Array  # [B, V] bool
    root_log_weight: Array  # [B]
    tokens: Array  # that the network was given  # [B] int32
    weighing: Array | None  # `guidance.weighing_logits`  # [B, V]


def score_candidates(how: Guidance, params: Params, state: DecodeState, policy: Policy,
                     logits: Array) -> tuple[Scored, DecodeState]:
    """Returns the log-weights of every token that the guided law needs, and the state with what was computed for them.

    In the paper's order these are the `candidates` most probable tokens under the reference; in the other order they
    are the sampler's whole support, in as many passes as its largest nucleus needs, never cut. Where less work takes
    less time (`Value.ragged`), tokens that cannot matter are left out: those of rows that are finished or at eta = inf,
    of a nucleus of one token, and candidates that are cut whatever they weigh (`guidance.is_open`). Tokens chosen
    meanwhile wait until a value is needed.

    Args:
      how: the guidance.
      params: of the value network.
      state: before this token.
      policy: of each row.
      logits: of the reference.  # [B, V]
    """
    value, distribution = how.value, how.distribution
    assert value is not None and distribution is not None
    batch, vocab = logits.shape
    count = min(how.candidates, vocab)
    rows = jnp.arange(batch)[:, None]
    guided = state.active & jnp.isfinite(policy.eta)
    # A network that scores all next tokens at once has nothing to spare but whole passes.
    sparing = value.ragged and value.scores_root
    weighing = guidance.weighing_logits(logits, policy, outside=how.outside, order=how.order)
    scored = Scored(
        log_weight=jnp.zeros((batch, vocab), jnp.float32),
        mean=jnp.full((batch, vocab), jnp.nan, jnp.float32),
        mask=jnp.zeros((batch, vocab), bool),
        root_log_weight=jnp.zeros(batch, jnp.float32),
        tokens=jnp.zeros(batch, jnp.int32),
        weighing=weighing)
    needed = None
    if how.order == 'paper':
        ids = guidance.top_candidates(logits, count)
        possible = jnp.take_along_axis(logits, ids, axis=1) > -jnp.inf
        wanted = possible & guided[:, None]
        first = wanted
        if sparing:
            low, high = distribution.log_weight_range(policy.eta, how.offset)
            still_open = _openness(how, policy, logits, weighing, ids, low, high)
            expected = jnp.where(jnp.isnan(state.log_weight), high - _UNKNOWN, state.log_weight)
            first &= jnp.arange(count)[None] < _enough(still_open, expected, ids.shape)[:, None]
    else:
        assert weighing is not None
        needed = (weighing > -jnp.inf) & guided[:, None]
        if value.ragged:
            needed &= jnp.sum(needed, axis=-1, keepdims=True) > 1
        ids, first = _next_candidates(weighing, needed, count)

    # The first pass has what was chosen since the last one and the candidates that decide most laws.
    backlog = state.length + 1 - state.value_length
    roots = _MOST_ROOTS if value.ragged else 1
    # The last token of the prompt is nowhere but pending, and goes in at once.
    due = state.active & (jnp.any(first, axis=1) | (state.count == 0) | (backlog >= roots))
    places = state.value_length[:, None] + jnp.arange(roots)[None]
    answer = places - state.prompt_length[:, None]
    written = jnp.take_along_axis(state.tokens, jnp.clip(answer, 0, state.tokens.shape[1] - 1), axis=1)
    block = ValueBlock(
        roots=jnp.where(places == state.length[:, None], state.pending[:, None], written),
        known=jnp.where(due, backlog, 0), candidates=ids, parents=jnp.broadcast_to(backlog[:, None] - 1, ids.shape),
        wanted=first)
    scores, cache = value.score(params, block, state.value_length, state.value_cache)
    scored = _add(how, policy, block, scores, scored)
    values = state.values
    if value.scores_root:
        last = jnp.take_along_axis(scores.roots, jnp.clip(block.known - 1, 0)[:, None, None], axis=1)[:, 0]
        scored = dataclasses.replace(
            scored, root_log_weight=distribution.log_weight(last, policy.eta, how.offset))
        heard = (answer >= 0) & (jnp.arange(roots)[None] < block.known[:, None])
        target = jnp.where(heard, answer, values.shape[1])
        values = values.at[rows, target].set(distribution.mean(scores.roots), mode='drop')
    state = dataclasses.replace(
        state, value_cache=cache, value_length=state.value_length + block.known, values=values)

    # Further passes read what is chosen from the cache; a network without scores of its own reads the last again.
    again = 0 if value.scores_root else 1

    def more(ids: Array, wanted: Array, scored: Scored) -> Scored:
        block = ValueBlock(
            roots=state.pending[:, None][:, :again], known=jnp.where(jnp.any(wanted, axis=1), again, 0), candidates=ids,
            parents=jnp.full(ids.shape, again - 1), wanted=wanted)
        scores, _ = value.score(params, block, state.value_length - again, cache)
        return _add(how, policy, block, scores, scored)

    if needed is not None:
        scored = jax.lax.while_loop(
            lambda scored: jnp.any(needed & ~scored.mask),
            lambda scored: more(*_next_candidates(weighing, needed & ~scored.mask, count), scored), scored)
    elif sparing:
        rest = wanted & ~first & still_open(scored.log_weight[rows, ids], scored.mask[rows, ids])[:, None]
        scored = more(ids, rest, scored)
        # Rows that were closed before anything was scored: one token has the law to itself, as if it weighed the least.
        alone = guided & ~jnp.any(scored.mask, axis=1)
        target = jnp.where(alone, ids[:, 0], vocab)
        scored = dataclasses.replace(
            scored, mask=scored.mask.at[rows[:, 0], target].set(True, mode='drop'),
            log_weight=scored.log_weight.at[rows[:, 0], target].set(low, mode='drop'))
    return scored, dataclasses.replace(state, value_tokens=state.value_tokens + scored.tokens)


def _add(how: Guidance, policy: Policy, block: ValueBlock, scores: ValueScores, scored: Scored) -> Scored:
    """Adds the scores of a block's candidates."""
    assert how.value is not None and how.distribution is not None
    target = jnp.where(block.wanted, block.candidates, scored.mask.shape[1])  # out of range: dropped by the scatter
    row = jnp.arange(target.shape[0])[:, None]
    weight = how.distribution.log_weight(scores.candidates, policy.eta[:, None], how.offset)
    # Without a score of the root all candidates are read off it.
    given = jnp.sum(block.real, axis=1) if how.value.scores_root else block.known
    return dataclasses.replace(
        scored,
        log_weight=scored.log_weight.at[row, target].set(weight, mode='drop'),
        mean=scored.mean.at[row, target].set(how.distribution.mean(scores.candidates), mode='drop'),
        mask=scored.mask.at[row, target].set(True, mode='drop'),
        tokens=scored.tokens + given)


def _next_candidates(weighing: Array, needed: Array, count: int) -> tuple[Array, Array]:
    """Returns the `count` most probable tokens of those needed, and which of them are.  # [B, V] x 2 -> [B, C] x 2"""
    left = jnp.where(needed, weighing, -jnp.inf)
    ids = guidance.top_candidates(left, count)
    return ids, jnp.take_along_axis(left, ids, axis=1) > -jnp.inf


def _openness(how: Guidance, policy: Policy, logits: Array, weighing: Array | None, ids: Array, low: Array,
              high: Array) -> Callable[[Array, Array], Array]:
    """Returns which rows need more of the candidates `ids` [B, C], given the weights of those scored; paper's order.

    # [B, C] x 2 -> [B]
    """
    rows = jnp.arange(ids.shape[0])[:, None]
    temperature = jnp.where(policy.temperature > 0, policy.temperature, 1.0)[:, None]
    others = jax.nn.logsumexp(logits.at[rows, ids].set(-jnp.inf) / temperature, axis=-1)
    own = logits[rows, ids]
    weights = own if weighing is None else weighing[rows, ids]

    def still_open(log_weight: Array, scored: Array) -> Array:
        return guidance.is_open(own, weights, others, log_weight, scored, low, high, policy, how.outside)

    return still_open


def _enough(still_open: Callable[[Array, Array], Array], expected: Array, shape: tuple[int, ...]) -> Array:
    """Returns how many of the best candidates close a row if each weighs as much as is expected, [B].  # [B]

    That is what the token chosen last weighs: the weight of a prefix is the mean of its tokens' weights.
    """
    count = shape[1]

    def closes(number: Array) -> Array:
        scored = jnp.broadcast_to(jnp.arange(count)[None] < number, shape)
        return ~still_open(jnp.broadcast_to(expected[:, None], shape), scored)

    found = jax.vmap(closes)(jnp.arange(count))  # [C, B]
    return jnp.where(jnp.any(found, axis=0), jnp.argmax(found, axis=0), count)


def law(how: Guidance, policy: Policy, count: Array, logits: Array, scored: Scored | None) -> Array:
    """Returns the log-probabilities that each row's next token is drawn from.  # [B, V]

    Args:
      how: the guidance.
      policy: of each row.
      count: tokens of the answer so far.  # [B]
      logits: of the reference.  # [B, V]
      scored: from `score_candidates`; None where nothing is guided.
    """
    if scored is None:
        return guidance.sampler_log_probs(logits, policy)
    return guidance.policy_log_probs(
        logits, scored.weighing, scored.log_weight, scored.mask, scored.root_log_weight, count == 0, policy,
        outside=how.outside, order=how.order)


def _draw(how: Guidance, policy: Policy, keys: Array, count: Array, logits: Array,
          scored: Scored | None) -> tuple[Array, Array, Array, Array]:
    """Returns the token of each row, its expected return and log-weight, NaN unless scored, and the law's KL.

    # [B] x 4
    """
    log_probs = law(how, policy, count, logits, scored)
    token = guidance.sample(jax.vmap(jax.random.fold_in)(keys, count), log_probs)
    mean = weight = jnp.full(token.shape, jnp.nan)
    if scored is not None:
        mean, weight = (jnp.take_along_axis(array, token[:, None], axis=1)[:, 0]
                        for array in (scored.mean, scored.log_weight))
    untruncated = guidance.reference_log_probs(logits, policy.reference_temperature)
    return token, mean, jnp.where(jnp.isnan(mean), jnp.nan, weight), guidance.kl_divergence(log_probs, untruncated)


def step(reference: Reference, how: Guidance, reference_params: Params, value_params: Params, policy: Policy,
         eos_ids: tuple[int, ...], state: DecodeState) -> DecodeState:
    """Returns the complete state after one more token in every active row; finished rows do not change.

    Args:
      reference: π_ref.
      how: the guidance.
      reference_params: of the reference.
      value_params: of the value network.
      policy: of each row; a row with eta = inf samples from the reference bit for bit.
      eos_ids: tokens that end an answer.
      state: before this token.
    """
    active = state.active
    pending, length = sharding.constrain_rows((state.pending, state.length), like=policy.eta)
    logits, reference_cache = reference.step(reference_params, pending, length, state.reference_cache)
    # The law of a row is worked out whole: split over the vocabulary, its sorting would cross devices in every pass.
    logits = sharding.spread_rows(logits)
    scored = None
    if how.value is not None:
        scored, state = score_candidates(how, value_params, state, policy, logits)
    token, mean, weight, kl = sharding.map_rows(
        functools.partial(_draw, how), (policy, state.keys, state.count, logits, scored), 8 * logits.nbytes, _LAWS,
        spread=True)
    here = active[:, None] & (jnp.arange(state.tokens.shape[1])[None, :] == state.count[:, None])
    values = state.values
    if how.value is not None:
        values = jnp.where(here, mean[:, None], values)
    # Where the networks want it: spread as the law was, their tokens would have their products worked out piecemeal.
    return sharding.constrain_rows(dataclasses.replace(
        state,
        reference_cache=reference_cache,
        pending=jnp.where(active, token, state.pending),
        tokens=jnp.where(here, token[:, None], state.tokens),
        count=state.count + active.astype(jnp.int32),
        ended=state.ended | (active & is_eos(token, eos_ids)),
        kl=state.kl + jnp.where(active, kl, 0.0),
        values=values,
        log_weight=jnp.where(active, weight, state.log_weight),
    ), like=policy.eta)
