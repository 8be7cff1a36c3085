"""The oracle: languages so small that every answer can be listed, with exact values and policies.

A language is a tree per prompt. Node 0 is the empty answer; node m · V + 1 + y is the child of node m by
token y. An answer ends at an end-of-sequence token or after `horizon` tokens. All tables are float64 numpy,
indexed [N prompts, M nodes]; random logits are multiples of 1/8, so that float32 networks made from them are
exact.

`as_reference` and `as_value` show a language to the decoder as networks whose cache is the token history.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import categorical, types

NEVER = -1e6  # a log-probability of 0 that float32 arithmetic keeps finite


@dataclasses.dataclass(frozen=True)
class Language:
    """A tree of answers per prompt.

    Attributes:
      prompts: token ids; none begins with another one.
      horizon: the longest answer.
      eos: tokens that end an answer.
      logits: of the next token at each node.  # [N, M, V]
      rewards: of the answer that ends at a node; read at `ends` only.  # [N, M]
    """

    prompts: tuple[tuple[int, ...], ...]
    horizon: int
    eos: tuple[int, ...]
    logits: np.ndarray
    rewards: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @functools.cached_property
    def answers(self) -> list[tuple[int, ...]]:
        """The tokens of each node, whether an answer can get there or not."""
        found: list[tuple[int, ...]] = [()]
        for node in range(1, self.rewards.shape[1]):
            found.append(found[(node - 1) // self.vocab_size] + ((node - 1) % self.vocab_size,))
        return found

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Nodes at which an answer ends.  # [M] bool"""
        return np.array([
            not set(answer[:-1]) & set(self.eos)
            and (len(answer) == self.horizon or (len(answer) > 0 and answer[-1] in self.eos))
            for answer in self.answers])

    @functools.cached_property
    def open(self) -> np.ndarray:
        """Nodes at which an answer goes on.  # [M] bool"""
        return np.array([
            not set(answer) & set(self.eos) and len(answer) < self.horizon for answer in self.answers])

    def node(self, answer: Sequence[int]) -> int:
        node = 0
        for token in answer:
            node = node * self.vocab_size + 1 + int(token)
        return node

    def children(self, table: np.ndarray) -> np.ndarray:
        """A table [N, M, ...] read at the children of every node: [N, M, V, ...], 0 below the last level."""
        num_nodes, vocab = table.shape[1], self.vocab_size
        found = np.zeros((len(table), num_nodes, vocab) + table.shape[2:])
        inner = (num_nodes - 1) // vocab
        found[:, :inner] = table[:, 1:].reshape((len(table), inner, vocab) + table.shape[2:])
        return found

    def reference(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
        """π_ref, the sampler of the logits.  # [N, M, V]"""
        return sampler_probs(self.logits, temperature, top_k, top_p)

    # Values: one recursion per quantity, from the longest answers back.

    def _backwards(self, ends: np.ndarray, step) -> np.ndarray:
        table = np.where(self.ends.reshape((1, -1) + (1,) * (ends.ndim - 2)), ends, 0.0)
        for node in np.flatnonzero(self.open)[::-1]:
            first = node * self.vocab_size + 1
            table[:, node] = step(node, table[:, first:first + self.vocab_size])
        return table

    @functools.cached_property
    def support(self) -> np.ndarray:
        """The returns that occur, increasing.  # [K]"""
        return np.unique(self.rewards[:, self.ends])

    def return_law(self, policy: np.ndarray) -> np.ndarray:
        """The pmf over `support` of the return when `policy` finishes from each node.  # [N, M, K]

        At node (prefix, token) and the reference as policy this is the paper's Z*(prefix, token).
        """
        ends = (self.rewards[..., None] == self.support).astype(float)
        return self._backwards(ends, lambda node, below: np.einsum('nv,nvk->nk', policy[:, node], below))

    def soft_values(self, eta: float, reference: np.ndarray) -> np.ndarray:
        """V*,η by the soft Bellman recursion (equation 2); at node (prefix, token) this is Q*,η.  # [N, M]"""
        def step(node, below):
            return eta * _log_sum(_log(reference[:, node]) + below / eta)
        return self._backwards(self.rewards, step)

    def values(self, policy: np.ndarray) -> np.ndarray:
        """E[return] when `policy` finishes from each node.  # [N, M]"""
        return self._backwards(self.rewards, lambda node, below: np.sum(policy[:, node] * below, axis=-1))

    def divergences(self, policy: np.ndarray, other: np.ndarray) -> np.ndarray:
        """KL of the rest of the answer, policy to other, from each node.  # [N, M]"""
        def step(node, below):
            p, q = policy[:, node], other[:, node]
            possible = p > 0
            ratio = np.where(possible, _log(p), 0.0) - np.where(possible, _log(q), 0.0)
            return np.sum(p * (ratio + below), axis=-1)
        return self._backwards(np.zeros_like(self.rewards), step)

    def regularised_values(self, policy: np.ndarray, eta: float, reference: np.ndarray) -> np.ndarray:
        """V^{π,η} of the empty answer: E[return] - η · KL(π ‖ π_ref) over whole answers.  # [N]"""
        return self.values(policy)[:, 0] - eta * self.divergences(policy, reference)[:, 0]

    # Policies.

    def tilt(self, reference: np.ndarray, log_weight: np.ndarray) -> np.ndarray:
        """π ∝ π_ref(y | x) · exp(log_weight at the node (x, y)).  # [N, M, V], [N, M] -> [N, M, V]"""
        unnormalised = _log(reference) + self.children(log_weight)
        return np.exp(unnormalised - _log_sum(unnormalised)[..., None])

    def optimal_policy(self, eta: float, reference: np.ndarray) -> np.ndarray:
        """π*,η.  # [N, M, V]"""
        return self.tilt(reference, self.soft_values(eta, reference) / eta)

    def answer_law(self, policy: np.ndarray) -> np.ndarray:
        """Probability of each whole answer, 0 at nodes that are none; sums to 1 over the nodes.  # [N, M]"""
        reached = np.zeros_like(self.rewards)
        reached[:, 0] = 1
        for node in np.flatnonzero(self.open):
            first = node * self.vocab_size + 1
            reached[:, first:first + self.vocab_size] = reached[:, node, None] * policy[:, node]
        return np.where(self.ends, reached, 0.0)

    # Networks.

    def as_reference(self) -> types.Reference:
        """The language as a network; its params are `reference_params`, any [N, M, V] table of logits."""
        def step(params, token, length, cache):
            cache = _write(cache, token, length)
            prompt, node = self._locate(cache['tokens'], length + 1)
            return params[prompt, jnp.minimum(node, params.shape[1] - 1)], cache
        return types.Reference(self.vocab_size, _init_cache, _prefill, step)

    def reference_params(self) -> jax.Array:
        return jnp.asarray(self.logits, jnp.float32)

    def as_value(self) -> types.Value:
        """A table of scores as a network; its params are any [N, M, S] table, for instance `scores`.

        The root of an empty answer, which no data ever fit, scores NaN.
        """
        def score(params, block, length, cache):
            cache, last = _write_roots(cache, block, length), params.shape[1] - 1

            def root(number):
                prompt, node = self._locate(cache['tokens'], length + number + 1)
                return jnp.where((node > 0)[:, None], params[prompt, jnp.minimum(node, last)], jnp.nan)

            def candidate(token, parent):
                prompt, node = self._locate(cache['tokens'], length + parent + 1)
                return params[prompt, jnp.minimum(node * self.vocab_size + 1 + token, last)]
            return _each(root, candidate, block), cache
        return types.Value(_init_cache, _prefill, score, ragged=True, keep=_keep, init_read=_init_cache)

    def scores(self, distribution: categorical.ReturnDistribution, law: np.ndarray) -> jax.Array:
        """The scores with which `distribution` says `law`, a pmf over `support`.  # [N, M, K] -> [N, M, S]"""
        atoms = np.asarray(distribution.atoms)
        if distribution.kind == 'categorical':
            place = np.abs(self.support[:, None] - atoms).argmin(-1)
            if not np.allclose(atoms[place], self.support):
                raise ValueError(f'The returns {self.support} are not all atoms of {atoms}.')
            log_pmf = np.full(law.shape[:-1] + atoms.shape, NEVER)
            log_pmf[..., place] = np.maximum(_log(law), NEVER)
            return jnp.asarray(log_pmf, jnp.float32)
        share = (law @ self.support - atoms[0]) / (atoms[1] - atoms[0])
        logit = _log(share) - _log(1 - share)
        return jnp.asarray(np.clip(logit, NEVER, -NEVER), jnp.float32)[..., None]

    def counted_law(self, units: Iterable[tuple[int, Sequence[int], int, float]]) -> np.ndarray:
        """The maximum-likelihood fit of Z: the shares of the returns seen at each node, uniform if none were.

        Args:
          units: (prompt index, answer, cut, return); the tokens of the answer from the cut on are fitted.

        Returns:
          A pmf over `support`.  # [N, M, K]
        """
        counts = np.zeros(self.rewards.shape + self.support.shape)
        for prompt, answer, cut, reward in units:
            for end in range(cut + 1, len(answer) + 1):
                counts[prompt, self.node(answer[:end])] += np.isclose(self.support, reward)
        total = counts.sum(-1, keepdims=True)
        return np.where(total > 0, counts / np.maximum(total, 1), 1 / len(self.support))

    def _locate(self, tokens: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which prompt and node the first `count` tokens of each history are.  # [B, S], [B] -> [B], [B]"""
        lengths = np.array([len(prompt) for prompt in self.prompts])
        matches = []
        for prompt in self.prompts:
            begins = jnp.all(tokens[:, :len(prompt)] == jnp.asarray(prompt)[None], axis=-1)
            matches.append(begins & (count >= len(prompt)))
        prompt_index = jnp.argmax(jnp.stack(matches, axis=-1), axis=-1)
        start = jnp.asarray(lengths)[prompt_index]
        node = jnp.zeros_like(count)
        for position in range(self.horizon):
            slot = jnp.minimum(start + position, tokens.shape[1] - 1)
            token = jnp.take_along_axis(tokens, slot[:, None], axis=1)[:, 0]
            node = jnp.where(start + position < count, node * self.vocab_size + 1 + token, node)
        return prompt_index, node


def random_language(seed: int, *, vocab_size: int = 3, horizon: int = 3, num_prompts: int = 2,
                    eos: tuple[int, ...] = (2,), returns: Sequence[float] = (0.0, 1.0)) -> Language:
    """Random logits and rewards; each prompt has its own length, and each return occurs."""
    random = np.random.default_rng(seed)
    num_nodes = sum(vocab_size ** depth for depth in range(horizon + 1))
    logits = np.round(random.normal(size=(num_prompts, num_nodes, vocab_size)) * 8) / 8
    rewards = random.choice(np.asarray(returns, float), size=(num_prompts, num_nodes))
    prompts = tuple((0,) * index + (1 + index % (vocab_size - 1),) for index in range(num_prompts))
    return Language(prompts, horizon, eos, logits, rewards)


def theorem_tree(p_left: float = 0.5) -> Language:
    """The tree of the paper's theorem 4.2: left (token 0) is worth 0.1, right is worth 1 once in 20 times."""
    logits = np.zeros((1, 7, 2))
    logits[0, 0] = np.log([p_left, 1 - p_left])
    logits[0, 2] = np.log([0.95, 0.05])
    rewards = np.array([[0, 0, 0, 0.1, 0.1, 0, 1]], float)
    return Language(((1,),), 2, (), logits, rewards)


def dyadic_reference(vocab_size: int, seed: int = 0) -> types.Reference:
    """A language of any length: logits, multiples of 1/4, drawn by a hash of all tokens so far. No params."""
    def step(params, token, length, cache):
        cache = _write(cache, token, length)
        drawn = _hashed(cache['tokens'], length + 1, jnp.arange(vocab_size, dtype=jnp.uint32)[None], seed)
        return (drawn % 16).astype(jnp.float32) / 4, cache
    return types.Reference(vocab_size, _init_cache, _prefill, step)


def dyadic_value(num_scores: int = 1, seed: int = 1) -> types.Value:
    """Scores for `dyadic_reference`: multiples of 1/4 in [-2, 2), drawn by the same hash. No params."""
    def draw(tokens, count):
        drawn = _hashed(tokens, count, jnp.arange(num_scores, dtype=jnp.uint32)[None], seed)
        return (drawn % 16).astype(jnp.float32) / 4 - 2

    def score(params, block, length, cache):
        cache = _write_roots(cache, block, length)

        def root(number):
            return draw(cache['tokens'], length + number + 1)

        def candidate(token, parent):
            place = length + parent + 1
            return draw(_write(cache, token, place)['tokens'], place + 1)
        return _each(root, candidate, block), cache
    return types.Value(_init_cache, _prefill, score, ragged=True, keep=_keep, init_read=_init_cache)


def block_after(root: jax.Array, candidates: jax.Array) -> types.ValueBlock:
    """One chosen token [B], and candidates [B, C] that may follow it."""
    return types.ValueBlock(
        roots=root[:, None], known=jnp.ones_like(root), candidates=candidates, parents=jnp.zeros_like(candidates),
        wanted=jnp.ones(candidates.shape, bool))


def sampler_probs(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0) -> np.ndarray:
    """Temperature, then top-k, then top-p, row by row and token by token.  # [..., V]"""
    rows = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    found = np.zeros_like(rows)
    for row, result in zip(rows, found):
        ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
        if temperature == 0:
            result[ranked[0]] = 1
            continue
        if top_k > 0:
            ranked = ranked[:top_k]
        mass = {token: np.exp((row[token] - row[ranked[0]]) / temperature) for token in ranked}
        total, before = sum(mass.values()), 0.0
        for token in ranked:
            if before >= top_p * total and top_p < 1 and token != ranked[0]:
                break
            result[token] = mass[token]
            before += mass[token]
        result /= result.sum()
    return found.reshape(logits.shape)


def _init_cache(batch: int, capacity: int) -> types.Cache:
    return {'tokens': jnp.full((batch, capacity), -1, jnp.int32)}


def _prefill(params: types.Params, tokens: jax.Array, lengths: jax.Array, cache: types.Cache,
             start: int) -> types.Cache:
    # Padding is written too, as a network would: reading past the length must show.
    return {'tokens': cache['tokens'].at[:, start:start + tokens.shape[1]].set(tokens.astype(jnp.int32))}


def _write_roots(cache: types.Cache, block: types.ValueBlock, length: jax.Array) -> types.Cache:
    for number in range(block.roots.shape[1]):
        # Where a root is not real, a token that would be seen if it were read.
        token = jnp.where(number < block.known, block.roots[:, number], 1)
        cache = _write(cache, token, length + number)
    return cache


def _each(root: Callable[[jax.Array], jax.Array], candidate: Callable[[jax.Array, jax.Array], jax.Array],
          block: types.ValueBlock) -> types.ValueScores:
    """The scores of each token of a block; of those that are not real, NaN.

    `root` is from its number, `candidate` from tokens and parents [B]; both to scores [B, K].
    """
    numbers = jnp.arange(block.roots.shape[1])
    roots = jax.vmap(root, out_axes=1)(numbers)
    candidates = jax.vmap(candidate, in_axes=1, out_axes=1)(block.candidates, block.parents)
    known = numbers[None] < block.known[:, None]
    return types.ValueScores(jnp.where(known[..., None], roots, jnp.nan),
                             jnp.where(block.wanted[..., None], candidates, jnp.nan),
                             {'tokens': jnp.where(block.wanted, block.candidates, 1)})


def _keep(cache: types.Cache, read: types.Cache, which: jax.Array, length: jax.Array, there: jax.Array) -> types.Cache:
    token = jnp.take_along_axis(read['tokens'], which[:, None], axis=1)[:, 0]
    return _write(cache, token, jnp.where(there, length, cache['tokens'].shape[1]))


def _write(cache: types.Cache, token: jax.Array, position: jax.Array) -> types.Cache:
    rows = jnp.arange(token.shape[0])
    return {'tokens': cache['tokens'].at[rows, position].set(token.astype(jnp.int32))}


def _hashed(tokens: jax.Array, count: jax.Array, lane: jax.Array, seed: int) -> jax.Array:
    """A 16-bit draw for each lane from the first `count` tokens.  # [B, S], [B], [1, L] -> [B, L] uint32"""
    def mix(state):
        state = (state ^ (state >> 16)) * jnp.uint32(0x7feb352d)
        state = (state ^ (state >> 15)) * jnp.uint32(0x846ca68b)
        return state ^ (state >> 16)
    slot = jnp.arange(tokens.shape[1])[None]
    each = mix(tokens.astype(jnp.uint32) + jnp.uint32(0x9e3779b9) * (slot + 1).astype(jnp.uint32))
    history = jnp.sum(jnp.where(slot < count[:, None], each, 0), axis=-1, dtype=jnp.uint32)
    return mix(history[:, None] + mix(lane + jnp.uint32(seed * 7919 + 1))) >> 16


def _log(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide='ignore'):
        return np.log(probs)


def _log_sum(values: np.ndarray) -> np.ndarray:
    top = values.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return _log(np.exp(values - top).sum(-1)) + top[..., 0]
