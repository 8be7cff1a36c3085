"""The policy π(y | x) ∝ π_ref(y | x) · weight(x, y): the one place where logits and values become a law.

Sampler, KL and log-probabilities all read `policy_log_probs`. Every function takes a batch of rows and must
not be vmapped: work that only some settings need (a nucleus, a greedy row) is skipped when no row needs it.
Each row's result depends on that row alone.
"""
from __future__ import annotations

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp

from qsharp_jax import types

Array = jax.Array

OUTSIDE = ('zero', 'remove', 'min', 'mean', 'average', 'soft_bellman')
ORDERS = ('paper', 'after_sampler')

_HEAD = 256  # a nucleus that ends among this many most probable tokens is found without looking at the others
_BLOCK = 256  # tokens that share one draw of noise in the first stage of `sample`
_GROUP = 4  # rows that are searched for a wide nucleus together
_MIN_OUTSIDE_MASS = 1e-3  # below it, what soft_bellman divides by the outside mass is rounding error


def reference_log_probs(logits: Array, temperature: Array) -> Array:
    """log softmax(logits / temperature), the reference without truncation: the paper's KL is measured to it.

    # [B, V], [B] (> 0) -> [B, V]
    """
    return jax.nn.log_softmax(logits / temperature[:, None], axis=-1)


def sampler_log_probs(logits: Array, policy: types.Policy) -> Array:
    """The reference as it is sampled: temperature, then top-k, then top-p.

    Among equally probable tokens the lower id ranks first. Temperature 0 puts all mass on the first-ranked
    token. Top-p keeps the shortest run of first-ranked tokens whose mass (after top-k) reaches it, at least
    one token.

    Args:
      logits: of the reference.  # [B, V]
      policy: its η is not read.

    Returns:
      Log-probabilities, -inf for tokens that are cut.  # [B, V]
    """
    return jax.nn.log_softmax(_sampler_logits(logits, policy), axis=-1)


def weighing_logits(logits: Array, policy: types.Policy, *, outside: str, order: str) -> Array | None:
    """The sampler that the law of a guided token is made from besides the logits; None where it is not.

    Args:
      logits: of the reference.  # [B, V]
      policy: its η is not read.
      outside: see `policy_log_probs`.
      order: see `policy_log_probs`. Under 'after_sampler', where the sampler cuts the support of the law, it is
        the sampler itself; otherwise what weighs the tokens that are not scored: the row's sampler, the one its value
        was fitted for, and at temperature 0, at which no data are collected, the sampler at temperature 1.

    Returns:
      Logits over temperature, -inf for tokens that are cut; not normalised.  # [B, V]

    Raises:
      ValueError: `order` is unknown.
    """
    if order not in ORDERS:
        raise ValueError(f'order is {order!r}; it must be one of {", ".join(ORDERS)}.')
    if order == 'after_sampler':
        return _sampler_logits(logits, policy)
    if outside not in ('mean', 'soft_bellman'):
        return None
    temperature = jnp.where(policy.temperature > 0, policy.temperature, 1.0)
    return _sampler_logits(logits, dataclasses.replace(policy, temperature=temperature))


def policy_log_probs(logits: Array, weighing: Array | None, log_weight: Array, scored: Array, root_log_weight: Array,
                     first_token: Array, policy: types.Policy, *, outside: str, order: str) -> Array:
    """THE distribution the next token is sampled from.

    At η = inf it is bit for bit `sampler_log_probs(logits, policy)`, whatever was scored; under `mean` also
    where all scored tokens weigh the same.

    Args:
      logits: of the reference.  # [B, V]
      weighing: `weighing_logits` of the same.  # [B, V] or None
      log_weight: log weight of each scored token, anything elsewhere.  # [B, V]
      scored: which tokens the value network has scored.  # [B, V] bool
      root_log_weight: log weight of the token chosen last; read by `soft_bellman` only.  # [B]
      first_token: whether the answer is still empty, so that the root's value was never fitted.  # [B] bool
      policy: parameters of each row.
      outside: one of `OUTSIDE`, see `offsets`.
      order: 'paper' adds the offsets to the logits and then applies temperature, top-k and top-p, so that
        those cut and sharpen the guided law, as the official code does. 'after_sampler' takes the sampler
        with its temperature and its cuts for π_ref, as the theory does, and cuts nothing after; a greedy row
        then has no choice left to guide.

    Returns:
      Log-probabilities, -inf for tokens that cannot be drawn.  # [B, V]

    Raises:
      ValueError: `outside` is unknown.
    """
    weights = logits if weighing is None else weighing
    if outside == 'soft_bellman':  # the other rules spare a pass over the vocabulary
        weights = jax.nn.log_softmax(weights, axis=-1)
    added = offsets(weights, log_weight, scored, root_log_weight, first_token, policy.eta, outside)
    if order == 'after_sampler':
        return jax.nn.log_softmax(weights + added, axis=-1)
    return sampler_log_probs(logits + added, policy)


def offsets(sampler_log_probs: Array, log_weight: Array, scored: Array, root_log_weight: Array,
            first_token: Array, eta: Array, outside: str) -> Array:
    """What guidance adds to the logits: log weights less that of the best scored token, whose offset is 0.

    A token that was not scored gets, before centring, the log weight

      zero: 0, as the official code for Bernoulli heads;
      remove: -inf, as the official star-graph code;
      min: the least of the scored tokens;
      mean: the mean weight of the scored tokens under the sampler;
      average: the plain mean of the scored tokens' log weights: with E[Z] / η, value-augmented sampling (Han et al.
        2024), which adds to each scored token by how much it is above their average, and nothing to the others;
      soft_bellman: what is left of the root's weight, (w(root) - Σ π w) / (1 - Σ π) over the scored tokens,
        since the weight of a prefix is the mean of its tokens' weights; kept within the range of the scored
        weights, and `mean` at the first token or where the sampler puts less than 1e-3 on all such tokens.

    Args:
      sampler_log_probs: π of the sampler; read by `soft_bellman`, and up to a constant by `mean`.  # [B, V]
      log_weight: log weight of each scored token, anything elsewhere.  # [B, V]
      scored: which tokens have been scored.  # [B, V] bool
      root_log_weight: log weight of the token chosen last.  # [B]
      first_token: whether the answer is still empty.  # [B] bool
      eta: rows at `inf` and rows without a scored token get 0 everywhere.  # [B]
      outside: one of `OUTSIDE`.

    Returns:
      Nats; exactly 0 on scored tokens that weigh as much as the best.  # [B, V]

    Raises:
      ValueError: `outside` is unknown.
    """
    if outside not in OUTSIDE:
        raise ValueError(f'outside is {outside!r}; it must be one of {", ".join(OUTSIDE)}.')
    best = jnp.max(log_weight, axis=-1, keepdims=True, where=scored, initial=-jnp.inf)
    # A comparison, so that impossible tokens alone (best = -inf) are equals and not NaN.
    centred = jnp.where(scored & (log_weight < best), log_weight - best, 0.0)
    least = jnp.min(centred, axis=-1, keepdims=True, where=scored, initial=0.0)
    if outside == 'zero':
        rest = jnp.where(jnp.isfinite(best), -best, 0.0)
    elif outside == 'remove':
        rest = jnp.full_like(best, -jnp.inf)
    elif outside == 'min':
        rest = least
    elif outside == 'average':
        rest = jnp.sum(centred, axis=-1, keepdims=True, where=scored) / jnp.maximum(
            jnp.sum(scored, axis=-1, keepdims=True), 1)
    else:
        inside_mass = _log_sum(sampler_log_probs, scored)
        inside_weight = _log_sum(sampler_log_probs + centred, scored)
        rest = jnp.where(inside_mass > -jnp.inf, inside_weight - inside_mass, 0.0)
        if outside == 'soft_bellman':
            outside_mass = _log_sum(sampler_log_probs, ~scored)
            root = jnp.where(jnp.isneginf(best), 0.0, root_log_weight[:, None] - best)
            left = root + jnp.log1p(-jnp.exp(inside_weight - root))
            left = jnp.where(inside_weight >= root, -jnp.inf, left)
            untold = first_token[:, None] | (outside_mass < jnp.log(_MIN_OUTSIDE_MASS))
            rest = jnp.where(untold, rest, left - outside_mass)
        # The range is also what makes equal weights leave no trace: rounding cannot escape [0, 0].
        rest = jnp.clip(rest, least, 0.0)
    guided = jnp.any(scored, axis=-1, keepdims=True) & ~jnp.isinf(eta)[:, None]
    return jnp.where(guided, jnp.where(scored, centred, rest), 0.0)


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p ‖ q) in nats over the whole vocabulary; `inf` where p has mass that q has not.

    # [B, V] x 2 -> [B]
    """
    impossible = jnp.isneginf(log_p)
    difference = jnp.where(impossible, 0.0, log_p) - jnp.where(impossible, 0.0, log_q)
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * difference, axis=-1), 0.0)


def top_candidates(log_probs: Array, count: int) -> Array:
    """Ids of the `count` most probable tokens, best first, the lower id first of equals.

    # [B, V] -> [B, C] int32
    """
    return _top_k(log_probs, count)[1]


def sample(keys: Array, log_probs: Array) -> Array:
    """One token per row, by the Gumbel-max rule with the row's own key; tokens at -inf are never drawn.

    The rule is applied to the masses of blocks of tokens and then inside the winning block: the same law as
    noise on every token, for a hundredth of the random numbers.

    Args:
      keys: typed keys.  # [B]
      log_probs: normalised or not.  # [B, V]

    Returns:
      Token ids.  # [B] int32
    """
    batch, vocab = log_probs.shape
    num_blocks = -(-vocab // _BLOCK)
    padding = ((0, 0), (0, num_blocks * _BLOCK - vocab))
    blocks = jnp.reshape(jnp.pad(log_probs, padding, constant_values=-jnp.inf), (batch, num_blocks, _BLOCK))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (_BLOCK + num_blocks,)))(keys)
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + noise[:, _BLOCK:], axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(inside + noise[:, :_BLOCK], axis=-1)).astype(jnp.int32)


def _sampler_logits(logits: Array, policy: types.Policy) -> Array:
    """Logits over temperature, -inf where top-k and top-p cut; not normalised.  # [B, V]"""
    vocab = logits.shape[-1]
    greedy = policy.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, policy.temperature)[:, None]
    limit = jnp.where(policy.top_k > 0, jnp.minimum(policy.top_k, vocab), vocab)
    cutting = ~greedy & ((limit < vocab) | (policy.top_p < 1))

    def keep_first(scaled: Array) -> Array:
        first = lax.broadcasted_iota(jnp.int32, scaled.shape, 1) == jnp.argmax(logits, axis=-1)[:, None]
        return jnp.where(greedy[:, None] & ~first, -jnp.inf, scaled)

    def keep_nucleus(scaled: Array) -> Array:
        return jnp.where(cutting[:, None] & ~_nucleus(scaled, limit, policy.top_p), -jnp.inf, scaled)

    scaled = lax.cond(jnp.any(greedy), keep_first, lambda scaled: scaled, scaled)
    return lax.cond(jnp.any(cutting), keep_nucleus, lambda scaled: scaled, scaled)


def _nucleus(logits: Array, limit: Array, top_p: Array) -> Array:
    """Which tokens remain of the `limit` best once their mass reaches `top_p`.

    # [B, V], [B], [B] -> [B, V] bool
    """
    vocab = logits.shape[-1]
    logits = jnp.where(logits == 0, 0.0, logits)  # sorting ranks -0 below 0
    head = min(_HEAD, vocab)
    values, ids = _top_k(logits, head)
    rank = jnp.arange(head)[None]
    mass = jnp.where(rank < limit[:, None], jnp.exp(values - values[:, :1]), 0.0)
    everything = jnp.sum(jnp.exp(logits - values[:, :1]), axis=-1)
    total = jnp.where(limit <= head, jnp.sum(mass, axis=-1), everything)
    before = jnp.cumsum(mass, axis=-1) - mass
    kept = (rank < limit[:, None]) & (before < _target(top_p, total)[:, None])
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    # Rows that keep everything need no search; the caller passes them over.
    ends = (limit <= head) | ((limit == vocab) & ((last[:, 0] + 1 < head) | (top_p >= 1)))
    threshold = jnp.take_along_axis(values, last, axis=-1)
    token = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    tie = (logits == threshold) & (token <= jnp.take_along_axis(ids, last, axis=-1))
    from_head = (logits > threshold) | tie

    def search(logits: Array, limit: Array, top_p: Array) -> Array:
        best = lax.cond(
            jnp.any(limit < vocab),
            lambda: _shortest_run(logits, jnp.ones_like(logits), limit.astype(logits.dtype)),
            lambda: jnp.ones(logits.shape, bool))
        mass = jnp.where(best, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
        return best & _shortest_run(logits, mass, _target(top_p, jnp.sum(mass, axis=-1)))

    if jax.typeof(logits).sharding.mesh.size > 1:  # to pick rows would move them between devices
        return lax.cond(
            jnp.all(ends), lambda: from_head, lambda: jnp.where(ends[:, None], from_head, search(logits, limit, top_p)))

    def some(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, kept = carry
        rows = lax.top_k(left.astype(jnp.int32), min(_GROUP, left.size))[1]
        found = search(logits[rows], limit[rows], jnp.asarray(top_p)[rows])
        return left.at[rows].set(False), kept.at[rows].set(jnp.where(left[rows, None], found, kept[rows]))

    return lax.while_loop(lambda carry: jnp.any(carry[0]), some, (~ends, from_head))[1]


def _top_k(array: Array, count: int) -> tuple[Array, Array]:
    """The `count` greatest of each row, and where they are.  # [B, V] -> [B, count] x 2"""
    values, ids = lax.top_k(array, count)
    # The barriers keep XLA from turning a slice of the k best into one of a full sort, sixty times dearer. One around
    # both arrays would make XLA abort on CPU where the mesh splits no rows.
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def _target(top_p: Array, total: Array) -> Array:
    # Above 0, so that one token always remains; beyond any sum at top-p 1, so that rounding cuts nothing.
    return jnp.where(top_p < 1, jnp.maximum(top_p * total, jnp.finfo(total.dtype).tiny), jnp.inf)


def _shortest_run(logits: Array, mass: Array, target: Array) -> Array:
    """The fewest first-ranked tokens whose mass reaches the target, by bisection over all float32 numbers.

    Thirty-two passes over the vocabulary take a fifth of the time of sorting it.

    # [B, V] x 2, [B] -> [B, V] bool
    """
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    place = jnp.where(bits < 0, bits ^ jnp.int32(0x7fffffff), bits)  # increases with the number

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        reached = jnp.sum(mass, axis=-1, where=place >= middle[:, None]) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    lowest = jnp.full(target.shape, jnp.iinfo(jnp.int32).min, jnp.int32)
    threshold = lax.fori_loop(0, 32, halve, (lowest, jnp.max(place, axis=-1) + 1))[0][:, None]
    above = place > threshold
    tied = place == threshold
    before = jnp.cumsum(jnp.where(tied, mass, 0.0), axis=-1) - jnp.where(tied, mass, 0.0)
    room = target - jnp.sum(mass, axis=-1, where=above)
    return above | (tied & (before < room[:, None]))


def _log_sum(log_probs: Array, where: Array) -> Array:
    return jax.nn.logsumexp(jnp.where(where, log_probs, -jnp.inf), axis=-1, keepdims=True)
