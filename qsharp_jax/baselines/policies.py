"""The update of a policy that is trained itself: what a batch is, each method's loss on it, one jitted step."""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qsharp_jax import learner, optimizers
from qsharp_jax.baselines import losses
from qsharp_jax.models import networks
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.optimizers import OptimizerConfig
from qsharp_jax.types import Array, Params

# (params, texts [B, T]) -> log-probabilities of all tokens at each place but the first  # [B, T-1, V]
LogProbsFn = Callable[[Params, Array], Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a policy.

    Attributes:
      section: of `config.baselines` that has its settings.
      pairs: whether it learns from pairs of answers that are drawn once; otherwise from answers of its own.
      greedy: whether those are its most probable ones, with no exploration.
      reference: whether its loss asks π_ref.
    """

    section: str
    pairs: bool = False
    greedy: bool = False
    reference: bool = False


METHODS = {
    'reinforce': Method('reinforce'),
    'reinforce_greedy': Method('reinforce', greedy=True),
    'grpo': Method('grpo', reference=True),
    'dpo': Method('dpo', pairs=True, reference=True),
    'rpo': Method('rpo', pairs=True, reference=True),
}


@struct.dataclass
class Batch:
    """Texts to learn from: prompts with their answers. Of a method that learns from pairs A is 2, else 1.

    Attributes:
      tokens: prompt and answer, right-padded; of a pair the better answer comes first.  # [B, A, T] int32
      weights: 1 on the tokens of the answer, 0 elsewhere.  # [B, A, T] float32
      advantages: of the answers; 0 in pairs.  # [B] float32
      drawn: log-probabilities of the tokens under the policy that drew them, 0 in pairs.  # [B, A, T-1] float32
    """

    tokens: Array
    weights: Array
    advantages: Array
    drawn: Array


def network_log_probs(config: TransformerConfig, vocab_size: int, holes: Collection[int],
                      temperature: float) -> LogProbsFn:
    """Returns the log-probabilities that a decoder gives to texts at a temperature, of the ids that have tokens.

    Args:
      config: of the decoder.
      vocab_size: as in `networks.reference`.
      holes: likewise.
      temperature: above 0.
    """
    exists = np.ones(vocab_size, bool)
    exists[[hole for hole in holes if hole < vocab_size]] = False

    def log_probs(params: Params, tokens: Array) -> Array:
        logits = networks.text_logits(config, params, tokens)[..., :vocab_size]
        return jax.nn.log_softmax(jnp.where(exists[None, None], logits / temperature, -jnp.inf), axis=-1)

    return log_probs


def lay_out(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], length: int) -> Batch:
    """Returns a batch on the host, its advantages and `drawn` 0.

    Args:
      prompts: ids of B prompts.
      answers: ids of A answers to each.
      length: T; no text is longer.
    """
    shape = len(prompts), len(answers[0]), length
    tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, (prompt, several) in enumerate(zip(prompts, answers, strict=True)):
        for place, answer in enumerate(several):
            end = len(prompt) + len(answer)
            tokens[row, place, :len(prompt)] = prompt
            tokens[row, place, len(prompt):end] = answer
            weights[row, place, len(prompt):end] = 1
    return Batch(tokens=tokens, weights=weights, advantages=np.zeros(shape[0], np.float32),
                 drawn=np.zeros((shape[0], shape[1], length - 1), np.float32))


def chosen_log_probs(all_log_probs: Array, tokens: Array) -> Array:
    """Returns the log-probabilities of the tokens that are there.  # [B, T-1, V], [B, T] -> [B, T-1]"""
    return jnp.take_along_axis(all_log_probs, tokens[:, 1:, None], axis=-1)[..., 0]


def make_drawn(log_probs_fn: LogProbsFn) -> Callable[[Params, Array], Array]:
    """Returns a jitted (params, tokens [B, A, T]) -> log-probabilities of those tokens [B, A, T-1]."""
    @jax.jit
    def drawn(params: Params, tokens: Array) -> Array:
        flat = tokens.reshape(-1, tokens.shape[-1])
        found = chosen_log_probs(log_probs_fn(params, flat), flat)
        return found.reshape(*tokens.shape[:-1], -1)

    return drawn


def loss_of(name: str, settings: dict[str, float], log_probs_fn: LogProbsFn, params: Params, reference_params: Params,
            batch: Batch) -> tuple[Array, Metrics]:
    """Returns the loss of a method on a batch, and what else it says of the batch.

    Args:
      name: of the method.
      settings: of its section.
      log_probs_fn: of the policy and π_ref alike.
      params: of the policy.
      reference_params: of π_ref; None for a method that does not ask it.
      batch: to learn from.
    """
    rows, several, length = batch.tokens.shape
    tokens = batch.tokens.reshape(rows * several, length)
    weights = batch.weights.reshape(rows * several, length)[:, 1:]
    everything = log_probs_fn(params, tokens)
    own = chosen_log_probs(everything, tokens)
    if name in ('reinforce', 'reinforce_greedy'):
        return losses.reinforce(own, weights, batch.advantages), {}
    fixed = jax.lax.stop_gradient(log_probs_fn(reference_params, tokens))
    if name == 'grpo':
        drawn = batch.drawn.reshape(own.shape)
        moved = jnp.sum(weights * (jnp.abs(jnp.exp(own - drawn) - 1) > settings['clip'])) / jnp.sum(weights)
        loss = losses.grpo(own, drawn, weights, batch.advantages, settings['clip'], everything, fixed, settings['kl'])
        return loss, {'kl': losses.divergence(everything, fixed, weights), 'clipped': moved}
    own = losses.answer_log_probs(own, weights).reshape(rows, several)
    fixed = losses.answer_log_probs(chosen_log_probs(fixed, tokens), weights).reshape(rows, several)
    four = own[:, 0], own[:, 1], fixed[:, 0], fixed[:, 1]
    metrics = {'log_prob_chosen': jnp.mean(own[:, 0]), 'log_prob_rejected': jnp.mean(own[:, 1]),
               'preferred': jnp.mean((losses.dpo_margins(*four) > 0).astype(jnp.float32))}
    if name == 'dpo':
        return losses.dpo(*four, settings['beta']), metrics
    return losses.rpo(*four, settings['beta'], settings['nll_weight']), metrics


def make_update(name: str, settings: dict[str, float], log_probs_fn: LogProbsFn, config: OptimizerConfig,
                state: learner.LearnerState, accumulate: int = 1) -> jax.stages.Wrapped:
    """Returns one jitted update, (state, reference params, batch) -> (state, metrics), which consumes the state.

    Args:
      name: of the method.
      settings: of its section.
      log_probs_fn: of the policy and π_ref alike.
      config: of the optimizer.
      state: from `learner.init`; read for where its arrays live.
      accumulate: parts of as many answers or pairs that a batch is worked through in, to save memory. Metrics are means
        over parts, and the loss is the batch's but for rounding.
    """
    optimizer, rate = optimizers.make(config), optimizers.learning_rate(config)

    def update(state: learner.LearnerState, reference_params: Params,
               batch: Batch) -> tuple[learner.LearnerState, Metrics]:
        def loss_fn(params: Params, part: Batch) -> tuple[Array, Metrics]:
            return loss_of(name, settings, log_probs_fn, params, reference_params, part)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (loss, metrics), grads = grad_fn(state.params, batch)
        else:
            def add(total: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(lambda a, b: a + b / accumulate, total, grad_fn(state.params, part)), None

            parts = learner.micro_batches(batch, accumulate)
            shapes = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda leaf: leaf[0], parts))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ((loss, metrics), grads), _ = jax.lax.scan(add, zeros, parts)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {**metrics, 'loss': loss, 'grad_norm': optax.tree.norm(grads),
                   'learning_rate': jnp.asarray(rate(state.step), jnp.float32)}
        return learner.LearnerState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
