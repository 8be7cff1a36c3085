"""The whole algorithm on a language whose optimum is known: collect, aggregate, fit, guide, and measure.

    python -m tests.oracle_convergence --out=docs/figures/oracle_convergence.png

draws the distance to the optimal policy against the number of roll-outs, and writes the numbers beside the
figure. The fit is the exact maximum-likelihood one (shares of the returns seen at each node), so that what is
measured is the algorithm and not a network.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qsharp_jax import categorical, decoding, rollout, types
from tests import pools, tabular

ETA = 0.3
ITERATIONS = 2
BATCH = 2048
RETURNS = categorical.make('bernoulli', 0.0, 1.0)
MEASURES = ('kl', 'total_variation', 'value_gap')

# Given a prefix the return still depends on what the reference writes next. No answer is rare, so that a few
# hundred roll-outs cover them all.
_LANGUAGE = tabular.random_language(4)
NOISY = dataclasses.replace(_LANGUAGE, logits=_LANGUAGE.logits / 4)
# The same answers, but the first token decides the return: Z* has no variance anywhere.
SETTLED = dataclasses.replace(NOISY, rewards=np.array([
    [float(len(answer) > 0 and (answer[0] + prompt) % 3 == 0) for answer in NOISY.answers]
    for prompt in range(2)]))
# Both have the same shape, so that they share compiled programs.
REFERENCE, VALUE = NOISY.as_reference(), NOISY.as_value()


def draw(tree: tabular.Language, law: np.ndarray | None, number: int, seed: int,
         iteration: int) -> np.ndarray:
    """The roll-outs of one iteration, half of them to each prompt.

    Args:
      tree: the language.
      law: the fit that guides the roll-in; None rolls in with the reference.
      number: of roll-outs.
      seed: of the run.
      iteration: from 1.

    Returns:
      One row each: prompt, cut, length of the answer, its tokens (0 beyond the length).  # [n, 3 + horizon]
    """
    how = decoding.Guidance() if law is None else decoding.Guidance(VALUE, RETURNS, tree.vocab_size)
    scores = None if law is None else tree.scores(RETURNS, law)
    policy = types.Policy(*(jnp.full(BATCH, value) for value in (math.inf if law is None else ETA, 1.0)),
                          jnp.zeros(BATCH, jnp.int32), jnp.ones(BATCH), jnp.ones(BATCH))
    width = max(map(len, tree.prompts))
    prompts = jnp.asarray([prompt + (0,) * (width - len(prompt)) for prompt in tree.prompts])
    lengths = jnp.asarray([len(prompt) for prompt in tree.prompts])
    found = []
    for first in range(0, number, BATCH):
        unit = first + np.arange(BATCH)
        rows = jnp.asarray(unit % len(tree.prompts))
        units = pools.Units(prompts, lengths, rows, rows, jnp.asarray(unit // len(tree.prompts)),
                            jnp.asarray(unit < number))
        drawn = pools.collect(REFERENCE, how, tree.reference_params(), scores, policy, units,
                              rollout.RolloutConfig(tree.horizon), tree.eos, seed, iteration)
        count, tokens = np.asarray(drawn.count), np.asarray(drawn.tokens)
        tokens = np.where(np.arange(tree.horizon) < count[:, None], tokens, 0)
        found.append(np.column_stack([rows, drawn.cut, count, tokens])[unit < number])
    return np.concatenate(found)


def fit(tree: tabular.Language, data: np.ndarray) -> np.ndarray:
    """`Language.counted_law` of many roll-outs, equal ones counted together.  # [n, ...] -> [N, M, K]"""
    counts = np.zeros(tree.rewards.shape + tree.support.shape)
    for (prompt, cut, count, *tokens), times in zip(*np.unique(data, axis=0, return_counts=True)):
        earned = tree.rewards[prompt, tree.node(tokens[:count])] == tree.support
        for end in range(cut + 1, count + 1):
            counts[prompt, tree.node(tokens[:end])] += times * earned
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), 1 / len(tree.support))


def covered(tree: tabular.Language, data: np.ndarray) -> bool:
    """Whether every prefix that answers have was fitted."""
    fitted = {(row[0], tree.node(row[3:3 + end])) for row in np.unique(data, axis=0)
              for end in range(row[1] + 1, row[2] + 1)}
    return len(fitted) == len(tree.prompts) * ((tree.open | tree.ends).sum() - 1)


def guide(tree: tabular.Language, law: np.ndarray) -> np.ndarray:
    """The policy that a fit guides to.  # [N, M, K] -> [N, M, V]"""
    return tree.tilt(tree.reference(), np.log(law @ np.exp(tree.support / ETA)))


def collect(tree: tabular.Language, number: int, seed: int) -> list[np.ndarray]:
    """The roll-outs of each iteration, `number` in all; each rolls in with the fit to all before it."""
    data: list[np.ndarray] = []
    for iteration in range(1, ITERATIONS + 1):
        law = fit(tree, np.concatenate(data)) if data else None
        data.append(draw(tree, law, number // ITERATIONS, seed, iteration))
    return data


def distances(tree: tabular.Language, policy: np.ndarray) -> dict[str, float]:
    """How far a policy is from the optimal one over whole answers, in the mean over the prompts.

    Returns:
      KL(π ‖ π*) in nats, total variation, and V* - V^π, the regularised value that is missing.
    """
    reference = tree.reference()
    optimum = tree.optimal_policy(ETA, reference)
    apart = np.abs(tree.answer_law(policy) - tree.answer_law(optimum)).sum(-1) / 2
    gap = tree.soft_values(ETA, reference)[:, 0] - tree.regularised_values(policy, ETA, reference)
    divergence = tree.divergences(policy, optimum)[:, 0]
    return dict(zip(MEASURES, (float(each.mean()) for each in (divergence, apart, gap))))


def curve(tree: tabular.Language, numbers: Sequence[int], seeds: int) -> dict[str, np.ndarray]:
    """Distances after so many roll-outs, each entry from data of its own.  # per measure [numbers, seeds]"""
    def once(number: int, seed: int) -> dict[str, float]:
        return distances(tree, guide(tree, fit(tree, np.concatenate(collect(tree, number, seed)))))
    found = [[once(number, 1000 * place + seed) for seed in range(seeds)]
             for place, number in enumerate(numbers)]
    return {name: np.array([[each[name] for each in row] for row in found]) for name in MEASURES}


def slope(numbers: Sequence[int], values: np.ndarray) -> tuple[float, float]:
    """The exponent of n in the mean over seeds, and its standard error by the jackknife over seeds."""
    def exponent(table: np.ndarray) -> float:
        return float(np.polyfit(np.log(numbers), np.log(table.mean(1)), 1)[0])
    seeds = values.shape[1]
    without = np.array([exponent(np.delete(values, seed, axis=1)) for seed in range(seeds)])
    return exponent(values), float(np.sqrt((seeds - 1) * np.mean((without - without.mean()) ** 2)))


def plot(path: Path, numbers: Sequence[int], noisy: dict[str, np.ndarray],
         settled: dict[str, np.ndarray]) -> None:
    """Draws the three distances; the language without variance falls off the axes when it is exact."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    titles = {'kl': 'KL(π ‖ π*) over whole answers, nats', 'total_variation': 'total variation',
              'value_gap': 'value gap V* − V^π'}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout='constrained')
    n = np.asarray(numbers, float)
    for axis, name in zip(axes, MEASURES):
        floor = noisy[name].min() / 10
        for table, colour, label in ((noisy[name], 'C0', 'returns vary'),
                                     (settled[name], 'C3', 'returns settled')):
            mean = table.mean(1)
            low, high = np.maximum(table.min(1), floor), np.maximum(table.max(1), floor)
            axis.fill_between(n, low, high, color=colour, alpha=0.18, linewidth=0)
            exact = table.max(1) < 1e-12
            axis.plot(n[~exact], mean[~exact], 'o-', color=colour, markersize=4,
                      label=f'{label} (mean and range of seeds)')
            axis.plot(n[exact], np.full(exact.sum(), floor), 'v', color=colour, markersize=6,
                      label='settled: exactly optimal, every seed' if exact.any() else None)
        exponent, text = (-0.5, 'n^(−1/2)') if name == 'total_variation' else (-1.0, '1/n')
        middle = len(n) // 2
        guide_line = noisy[name].mean(1)[middle] * (n / n[middle]) ** exponent
        axis.plot(n, guide_line, 'k--', linewidth=1, label=text)
        axis.set(xscale='log', yscale='log', xlabel='number of roll-outs, two iterations', title=titles[name],
                 ylim=(floor / 2, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc='upper right')
    axes[1].legend(*[[entry[-1]] for entry in axes[1].get_legend_handles_labels()], fontsize=8)
    figure.suptitle(f'Guided by exact maximum-likelihood fits, η = {ETA}', fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _rounded(value: float) -> float:
    return float(f'{value:.3g}') if abs(value) > 1e-12 else 0.0  # below is float64 arithmetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0] if __doc__ else None)
    parser.add_argument('--out', type=Path, required=True, help='the figure, a .png; a .json goes beside it')
    parser.add_argument('--seeds', type=int, default=10)
    parser.add_argument('--most', type=int, default=2 ** 16, help='roll-outs of the last point')
    flags = parser.parse_args()
    if flags.most < 2048:
        parser.error(f'--most is {flags.most}; slopes are taken from 1024 on, so it must be at least 2048.')
    numbers = [2 ** power for power in range(7, flags.most.bit_length())]
    languages = {'noisy': NOISY, 'settled': SETTLED}
    curves = {name: curve(tree, numbers, flags.seeds) for name, tree in languages.items()}
    late = [place for place, number in enumerate(numbers) if number >= 1024]  # every state is covered
    slopes = {name: slope([numbers[place] for place in late], curves['noisy'][name][late])
              for name in MEASURES}
    plot(flags.out, numbers, curves['noisy'], curves['settled'])
    numbers_of = {
        language: {name: {kind: [_rounded(value) for value in getattr(np, kind)(table, axis=1)]
                          for kind in ('mean', 'min', 'max')} for name, table in found.items()}
        for language, found in curves.items()}
    flags.out.with_suffix('.json').write_text(json.dumps({
        'eta': ETA, 'iterations': ITERATIONS, 'seeds': flags.seeds, 'roll_outs': numbers,
        'slopes_from_1024_roll_outs': {
            name: {'exponent': round(value, 3), 'standard_error': round(error, 3)}
            for name, (value, error) in slopes.items()},
        **numbers_of}, indent=1) + '\n')
    for name, (value, error) in slopes.items():
        print(f'{name}: falls as n^{value:.2f} (standard error {error:.2f})')


if __name__ == '__main__':
    main()
