"""What an answer costs: tokens, arithmetic and memory traffic, counted from shapes. Nothing is measured here.

Counted is the work that the answer needs: padding, rows that wait for others and cache slots that nothing is in are the
decoder's own waste, which the benchmark shows (docs/performance.md).
"""
from __future__ import annotations

from collections import Counter
import dataclasses
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.models import transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Params

Numbers: TypeAlias = float | np.ndarray


@dataclasses.dataclass(frozen=True)
class NetworkCost:
    """What a network's forward passes cost. Products alone are counted, two operations a multiplication and addition.

    Attributes:
      token: FLOPs of the projections of one token, in all layers.
      pair: FLOPs of one token that sees one key, in one layer.
      windows: how many layers see that many positions; 0 stands for all.  # {positions: layers}
      output: FLOPs of what is read off one token: logits, or scores.
      weights: bytes of the parameters that a pass reads, whatever it is asked.
      cached: bytes of the keys and values of one token, in all layers.
    """

    token: float
    pair: float
    windows: dict[int, int]
    output: float
    weights: float
    cached: float

    def flops(self, tokens: Numbers, keys: Numbers, outputs: Numbers) -> Numbers:
        """Returns the FLOPs of a forward pass.

        Args:
          tokens: that go in.
          keys: that each of them sees on average, itself included.
          outputs: tokens that something is read off.
        """
        seen = sum(layers * (np.minimum(keys, window) if window else keys) for window, layers in self.windows.items())
        return tokens * (self.token + self.pair * seen) + outputs * self.output


class Work(NamedTuple):
    """What each of several answers took; a share where it was shared, so that the sums are those of the device.

    Attributes:
      reference_tokens: tokens that went through the reference.  # [B]
      value_tokens: tokens that went through the value network: prompts, chosen tokens and candidates.  # [B]
      flops: arithmetic operations of both.  # [B]
      bytes: parameters and caches that were read, and what was written to the caches.  # [B]
    """

    reference_tokens: np.ndarray
    value_tokens: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray


def reference_cost(config: TransformerConfig) -> NetworkCost:
    """Returns what the reference costs; what is read off a token is all its logits."""
    read = {name: leaf for name, leaf in transformer.param_shapes(config).items()
            # Rows of the table are picked out, unless it is the output layer too.
            if name != 'position_embedding' and (name != 'embedding' or config.tied_embeddings)}
    return _cost(config, read, 2.0 * config.width * config.vocab_size)


def value_cost(config: TransformerConfig, value_config: ValueConfig, candidates: int) -> NetworkCost:
    """Returns what the value network costs.

    Args:
      config: of the base that it was started from.
      value_config: of the value network.
      candidates: that are scored together. A network of kind 'q' reads all of them off one token.
    """
    trunk = value_lib.trunk_config(value_config, config)
    whole = transformer.param_shapes(trunk)
    read = {name: leaf for name, leaf in whole.items() if not name.endswith('embedding')}
    below = [f'{transformer.LAYER}{layer}' for layer in range(trunk.restart_layer)]
    again = {name: whole[name] for name in ('embedding', *below)} if trunk.lookahead else {}
    scored = candidates if value_config.kind == 'q' else 1
    return _cost(trunk, [read, *trunk.lookahead * [again]], 2.0 * trunk.width * value_config.num_scores * scored)


def of_answers(reference: NetworkCost, value: NetworkCost | None, *, prompts: np.ndarray, prefilled: np.ndarray,
               made: np.ndarray, reference_made: np.ndarray, value_made: np.ndarray, reference_passes: int,
               value_passes: int) -> Work:
    """Returns the work of answers that are decoded together.

    Args:
      reference: from `reference_cost`.
      value: from `value_cost`; None where nothing was guided.
      prompts: tokens of each answer's prompt.  # [B]
      prefilled: its share of what was prefilled, in tokens.  # [B]
      made: tokens of each answer.  # [B]
      reference_made: tokens that went through the reference while it was written.  # [B]
      value_made: likewise through the value network.  # [B]
      reference_passes: that read its parameters, in steps and prefills of all the answers.
      value_passes: likewise.
    """
    keys = prompts + (made - 1) / 2  # that the average token of the answer sees
    value_made = value_made if value is not None else np.zeros_like(made)
    flops, moved = np.zeros(len(made)), np.zeros(len(made))
    for network, tokens, passes in ((reference, reference_made, reference_passes), (value, value_made, value_passes)):
        if network is not None:
            flops += network.flops(prefilled, prompts / 2, 0) + network.flops(tokens, keys, tokens)
            moved += network.weights * passes / len(made) + network.cached * (prefilled + made * (keys + 1))
    return Work(reference_tokens=prefilled + reference_made,
                value_tokens=(prefilled if value is not None else 0) + value_made, flops=flops, bytes=moved)


def prefilled_shares(prompts: np.ndarray, rows: np.ndarray, shared: int) -> np.ndarray:
    """Returns each answer's share of the tokens that are prefilled for all of them.  # [B]

    What all prompts begin with is prefilled once, the rest of a prompt once for all of its answers, and its last token
    goes in with the first step.

    Args:
      prompts: tokens of each answer's prompt.  # [B]
      rows: which prompt that is.  # [B]
      shared: leading tokens that all prompts have in common.
    """
    _, place, answers = np.unique(rows, return_inverse=True, return_counts=True)
    return (prompts - 1 - shared) / answers[place] + shared / len(rows)


def _cost(config: TransformerConfig, read: Params | list[Params], output: float) -> NetworkCost:
    runs = [*range(config.layers), *config.lookahead * [*range(config.restart_layer)]]
    return NetworkCost(
        token=transformer.token_flops(config), pair=4.0 * config.heads * config.head_dim,
        windows=dict(Counter(map(config.window, runs))), output=output,
        weights=float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))),
        cached=2.0 * config.layers * config.kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize)
