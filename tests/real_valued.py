"""A real-valued reward on a trained transformer: what one value network reaches at five eta, beside the optimum.

    python -m tests.real_valued --workdir=runs/real_valued --out=docs/figures/real_valued.png

reads a finished run of configs/real_valued.py. Its reference is asked for every answer to every question that was
evaluated, so that E[reward] and KL of the optimal policy (paper, equations 2 to 4) are sums and not samples.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import rewards, train
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import read_rows
from tests import tabular


def language(parts: Experiment, count: int) -> tabular.Language:
    """The answers that a run's reference can give to its first `count` questions, with the run's reward of each."""
    prompts, vocabulary = parts.prompts(parts.config.eval.split), parts.reference.vocab_size
    horizon = parts.config.sampling.max_new_tokens
    nodes = sum(vocabulary ** depth for depth in range(horizon + 1))
    empty = tabular.Language(tuple(tuple(tokens) for tokens in prompts.tokens[:count]), horizon, parts.eos_ids,
                             np.zeros((count, nodes, vocabulary)), np.zeros((count, nodes)))
    inner = np.flatnonzero(empty.open)
    logits, earned = empty.logits.copy(), empty.rewards.copy()
    ends = np.flatnonzero(empty.ends)
    texts = [parts.answer_text(empty.answers[node]) for node in ends]
    ask = _ask(parts)
    for row in range(count):
        logits[row, inner] = next_logits(ask, prompts.tokens[row], [empty.answers[node] for node in inner])
        columns = {name: [column[row]] * len(texts) for name, column in prompts.columns.items()}
        earned[row, ends] = rewards.score(parts.reward, [prompts.texts[row]] * len(texts), texts, columns,
                                          **parts.config.reward_options)
    return tabular.Language(empty.prompts, horizon, parts.eos_ids, logits, earned)


def next_logits(ask: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """The logits of the token after each answer to a prompt, by `_ask` of a run.  # [len(answers), V]"""
    rows = [[*prompt, *answer] for answer in answers]
    lengths = jnp.array([len(row) for row in rows], jnp.int32)
    width = max(map(len, rows))
    tokens = jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32)
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return np.asarray(ask(tokens, lengths - 1, last), np.float64)


def _ask(parts: Experiment) -> Any:
    def ask(tokens: jax.Array, before: jax.Array, last: jax.Array) -> jax.Array:
        cache = parts.reference.init_cache(*tokens.shape)
        cache = parts.reference.prefill(parts.reference_params, tokens, before, cache, 0)
        return parts.reference.step(parts.reference_params, last, before, cache)[0]
    return jax.jit(ask)


def compare(workdir: Path) -> list[dict[str, float]]:
    """Per eta: reward and KL of the optimum, and of the run's last value network with their standard errors."""
    parts, iteration, _ = train.open_run(workdir)
    config = parts.config
    tree = language(parts, config.eval.examples)
    reference = tree.reference(config.sampling.temperature)
    measured = {row['eta']: row for row in read_rows(workdir / 'results.jsonl')
                if (row['method'], row['iteration'], row['split']) == ('qsharp', iteration, config.eval.split)}
    measured[math.inf] = next(row for row in read_rows(workdir / 'results.jsonl') if row['method'] == 'reference')
    table = []
    for eta, row in sorted(measured.items()):
        policy = reference if eta == math.inf else tree.optimal_policy(eta, reference)
        table.append({
            'eta': eta, 'optimal_reward': float(tree.values(policy)[:, 0].mean()),
            'optimal_kl': float(tree.divergences(policy, reference)[:, 0].mean()),
            'reward': row['pass@1'], 'reward_se': row['pass@1_se'], 'kl': row['kl'], 'kl_se': row['kl_se']})
    return table


def curve(workdir_table: Sequence[dict[str, float]]) -> str:
    """The table as Markdown."""
    lines = ['| η | reward, optimal | reward, measured | KL, optimal | KL, measured |', '|--:|--:|--:|--:|--:|']
    for row in workdir_table:
        eta = '∞' if math.isinf(row['eta']) else f'{row["eta"]:g}'
        lines.append(f'| {eta} | {row["optimal_reward"]:.3f} | {row["reward"]:.3f} ± {row["reward_se"]:.3f} | '
                     f'{row["optimal_kl"]:.3f} | {row["kl"]:.3f} ± {row["kl_se"]:.3f} |')
    return '\n'.join(lines)


def plot(path: Path, table: Sequence[dict[str, float]]) -> None:
    """Draws reward against KL."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4.2), layout='constrained')
    rows = sorted(table, key=lambda row: row['optimal_kl'])
    axis.plot([row['optimal_kl'] for row in rows], [row['optimal_reward'] for row in rows], 'k.-', linewidth=1,
              label='optimal, every answer listed')
    axis.errorbar([row['kl'] for row in rows], [row['reward'] for row in rows],
                  xerr=[row['kl_se'] for row in rows], yerr=[row['reward_se'] for row in rows], fmt='o', color='C0',
                  label='one value network (± one standard error)')
    for row in rows:
        axis.annotate('π_ref' if math.isinf(row['eta']) else f'η = {row["eta"]:g}', (row['kl'], row['reward']),
                      textcoords='offset points', xytext=(6, -12), fontsize=8)
    axis.set(xlabel='KL to the reference, nats an answer', ylabel='mean reward, from −1.5 to 2')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc='lower right')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, required=True, help='of a finished run of configs/real_valued.py')
    parser.add_argument('--out', type=Path, required=True, help='the figure, a .png; a .json goes beside it')
    flags = parser.parse_args(argv)
    table = compare(flags.workdir)
    plot(flags.out, table)
    flags.out.with_suffix('.json').write_text(json.dumps(
        [{**row, 'eta': str(row['eta'])} for row in table], indent=1) + '\n')
    print(curve(table))


if __name__ == '__main__':
    main()
