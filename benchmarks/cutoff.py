"""What a cut-off of the candidates changes of the law (`guidance.epsilon_cutoff`), along answers without one."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import laws
from qsharp_jax import decoding, guidance
from qsharp_jax.types import Params, Policy, Reference

Row = Mapping[str, Any]


def label(cutoff: float) -> str:
    """Returns what a contender is called."""
    return f'cut at {cutoff:g}'


def effect(reference: Reference, how: decoding.Guidance, cutoffs: Sequence[float], params: Params, values: Params,
           policy: Policy, state: decoding.DecodeState, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns, of each cut-off, means over the steps of all rows.

    `moved`: total variation between the law with the cut-off and without. `bound`: what `candidacy.are_candidates` says
    that it is at most, were there no top-p. `scored`: candidates.

    Args:
      reference: π_ref.
      how: guidance in the paper's order, with the rule 'zero', whose network scores every candidate.
      cutoffs: `epsilon_cutoff` of each.
      params: of the reference.
      values: of the value network.
      policy: of each row.
      state: before the first step.
      steps: tokens of each answer; no row may end before.
      seed: of the answers.
    """
    assert how.value is not None and not how.value.ragged and (how.order, how.outside) == ('paper', 'zero'), how
    step = jax.jit(functools.partial(laws.law_of_step, reference, how))
    follow = jax.jit(functools.partial(laws.follow, how))
    compare = {cutoff: jax.jit(functools.partial(_compare, reference, dataclasses.replace(how, epsilon_cutoff=cutoff)))
               for cutoff in cutoffs}
    found: dict[float, list[np.ndarray]] = {cutoff: [] for cutoff in cutoffs}
    for number in range(steps):
        _, log_probs, *after = step(params, values, policy, state)
        for cutoff in cutoffs:
            found[cutoff].append(np.asarray(compare[cutoff](params, values, policy, state, log_probs)))
        key = jax.random.fold_in(jax.random.key(seed), number)
        state = follow(*after, jax.random.categorical(key, log_probs))
    return {label(cutoff): dict(zip(('moved', 'bound', 'scored'), np.mean(each, axis=0).tolist()))
            for cutoff, each in found.items()}


def _compare(reference: Reference, how: decoding.Guidance, params: Params, values: Params, policy: Policy,
             state: decoding.DecodeState, whole: jax.Array) -> jax.Array:
    """Returns `moved`, `bound` and `scored` of a step, means over rows; `whole` is the law without a cut-off.  # [3]"""
    assert how.distribution is not None
    logits, log_probs, _, scored, _ = laws.law_of_step(reference, how, params, values, policy, state)
    assert scored is not None
    moved = jnp.sum(jnp.abs(jnp.exp(log_probs) - jnp.exp(whole)), axis=-1) / 2
    rows = jnp.arange(logits.shape[0])[:, None]
    best = jnp.zeros(logits.shape, bool).at[rows, guidance.top_candidates(logits, how.candidates)].set(True)
    cut = best & ~scored.mask
    high = how.distribution.log_weight_range(policy.eta, how.offset)[1][:, None]
    weight = jnp.where(scored.mask, scored.log_weight, jnp.where(cut, high, 0.0))
    mass = jax.nn.softmax((logits + weight) / policy.temperature[:, None], axis=-1)
    bound = jnp.sum(mass, axis=-1, where=cut)
    return jnp.stack([jnp.mean(part) for part in (moved, bound, jnp.sum(scored.mask, axis=-1))])


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Returns the lines of a table, the heads first."""
    found = [['', 'guided / unguided, time', 'value tokens a token', 'candidates', 'total variation, at most',
              'total variation, measured']]
    for row in rows:
        for name, ratio in row['ratios'].items():
            one, effect_ = row['repeats'][name][0], row['effect'].get(name)
            found.append([
                name, f'{1 / ratio["median"]:.2f} ({1 / ratio["max"]:.2f} – {1 / ratio["min"]:.2f})',
                f'{one["value_tokens"] / one["tokens"]:.1f}',
                *([f'{effect_["scored"]:.1f}', f'{effect_["bound"]:.4f}', f'{effect_["moved"]:.4f}'] if effect_ else
                  [f'{row["settings"]["candidates"]}', '', ''])])
    return found
