"""The figure of star graphs: what each method reaches, at which step it fails, and what more samples buy."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from qsharp_jax.report import plots, tables

Row = Mapping[str, Any]

# Of a run's rows those are shown, in this order: what is not guided, what is trained itself, what guides.
SHOWN = ('reference', 'reinforce', 'reinforce_greedy', 'grpo', 'dpo', 'rpo', 'cd_pairs', 'fudge_pairs', 'qsharp_pairs',
         'cd', 'fudge', 'qsharp')
_DRAWING = ('reinforce', 'reinforce_greedy', 'grpo')  # methods that draw answers as they learn


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on one kind of graph.

    Attributes:
      degree: d, arms of the star.
      path_length: l, nodes of an arm.
      results: one row a method, on the test split, of what was chosen on validation: `method`, `pass@1`, `pass@1_se`,
        and `answers`, how many were graded for it in training (0 for the reference).
      steps: accuracy of each step: `method`, `step` (from 1, the node after the centre), `accuracy` among the answers
        that were right up to it, `se`.
      values: held-out loss of the last value network: `position` (token of the answer, from 0), `loss`.
      curves: accuracy on validation in training: `method`, `learning_rate`, `answers`, `pass@1`, `pass@1_se`.
      guided: `answers`, `pass@1` and `pass@1_se` of Q♯ after each iteration.
    """

    degree: int
    path_length: int
    results: Sequence[Row]
    steps: Sequence[Row]
    values: Sequence[Row]
    curves: Sequence[Row]
    guided: Sequence[Row]

    @property
    def graph(self) -> tuple[int, int]:
        """(d, l)."""
        return self.degree, self.path_length


def draw(runs: Sequence[Run]) -> Figure:
    """Returns the figure of some runs; several of one graph with as many answers are seeds, whose mean is shown.

    Above, accuracy of each method on each graph, and the line 1/d of a guess. Below, of the first graph: accuracy by
    step and the value network's loss by position, which tell where a method fails; and accuracy against answers graded
    in training, on a logarithmic axis, where runs of Q♯ with fewer answers are points of its curve.

    Args:
      runs: at least one.

    Raises:
      ValueError: there is none.
    """
    if not runs:
        raise ValueError('there is no run of star graphs to draw: name the work directories of some.')
    graphs = sorted({run.graph for run in runs}, key=lambda graph: (graph[1], graph[0]))
    with plots.style():
        figure = Figure(figsize=(13.5, 8.2))
        above, below = np.ravel(figure.subfigures(2, 1, squeeze=False))
        for graph, ax in zip(graphs, above.subplots(1, len(graphs), sharey=True, squeeze=False)[0]):
            _accuracy(ax, _fullest([run for run in runs if run.graph == graph]))
        first = [run for run in runs if run.graph == graphs[0]]
        step, value, answers = below.subplots(1, 3)
        _steps(step, _fullest(first))
        _values(value, _fullest(first))
        _answers(answers, first)
    return figure


def markdown(runs: Sequence[Run]) -> str:
    """Returns the accuracies above as a table: a method a line, a graph a column, the mean over seeds.

    Args:
      runs: at least one.
    """
    graphs = sorted({run.graph for run in runs}, key=lambda graph: (graph[1], graph[0]))
    fullest = {graph: _fullest([run for run in runs if run.graph == graph]) for graph in graphs}
    lines = [['whole path right, %', *(f'G({degree}, {length})' for degree, length in graphs)],
             ['---', *('---:' for _ in graphs)],
             ['a guess of the arm', *(f'{100 / degree:.1f}' for degree, _ in graphs)]]
    for method in SHOWN:
        cells = []
        for graph in graphs:
            found = [row for run in fullest[graph] for row in run.results if row['method'] == method]
            mean, error = mean_of(found, 'pass@1', 'pass@1_se') if found else (0.0, 0.0)
            cells.append(f'{100 * mean:.1f} ± {100 * error:.1f}' if found else '')
        if any(cells):
            lines.append([tables.METHODS[method], *cells])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _fullest(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs in which Q♯ has most answers."""
    def size(run: Run) -> float:
        return max((row['answers'] for row in run.guided), default=0)

    most = max(map(size, runs))
    return [run for run in runs if size(run) == most]


def mean_of(rows: Sequence[Row], value: str, error: str) -> tuple[float, float]:
    """Returns the mean of a value over seeds, and its standard error from those of the seeds."""
    count = len(rows)
    return (sum(row[value] for row in rows) / count,
            math.sqrt(sum((row[error] or 0.0) ** 2 for row in rows)) / count)


def _by(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _accuracy(ax: Axes, runs: Sequence[Run]) -> None:
    found = _by([row for run in runs for row in run.results], lambda row: row['method'])
    shown = [method for method in SHOWN if method in found]
    for place, method in enumerate(shown):
        mean, error = mean_of(found[method], 'pass@1', 'pass@1_se')
        colour, _ = plots.look(method)
        ax.bar(place, 100 * mean, yerr=100 * error, color=colour, width=0.72, alpha=0.85, ecolor=plots.INK, capsize=2)
        ax.annotate(f'{100 * mean:.0f}', (place, 100 * (mean + error)), xytext=(0, 2), textcoords='offset points',
                    horizontalalignment='center', fontsize=8)
    degree, length = runs[0].graph
    ax.axhline(100 / degree, color=plots.INK, linestyle='--', linewidth=1)
    ax.set_xticks(range(len(shown)), [tables.METHODS[method] for method in shown], rotation=40,
                  horizontalalignment='right', fontsize=8)
    ax.grid(axis='x', visible=False)
    ax.set(title=f'G({degree}, {length}), 1/d = {100 / degree:.0f} %', ylim=(0, 108))
    if ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        ax.set_ylabel('whole path right, %')


def _steps(ax: Axes, runs: Sequence[Run]) -> None:
    rows = [row for run in runs for row in run.steps]
    for method, own in _sorted(_by(rows, lambda row: row['method'])):
        _curve(ax, method, own, 'step', 'accuracy', 'se')
    degree, length = runs[0].graph
    ax.axhline(100 / degree, color=plots.INK, linestyle='--', linewidth=1)
    ax.set_xticks(range(1, length))
    ax.set(xlim=(0.7, length - 0.7), ylim=(0, 104), xlabel='step of the path', ylabel='step right, %',
           title=f'G({degree}, {length}): each step, if those before are right')
    if rows:
        ax.legend(fontsize=7, ncols=2, loc='lower right')


def _values(ax: Axes, runs: Sequence[Run]) -> None:
    rows = _by([row for run in runs for row in run.values], lambda row: row['position'])
    points = sorted((position, sum(row['loss'] for row in several) / len(several))
                    for position, several in rows.items())
    if points:
        ax.plot(*zip(*points), color=plots.look('qsharp')[0], marker='o', markersize=5)
    ax.axhline(math.log(2), color=plots.INK, linestyle='--', linewidth=1)
    ax.annotate('ln 2: nothing is known', (0, math.log(2)), xytext=(0, 3), textcoords='offset points', fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title='Value network, held-out graphs', xlabel='token of the answer, from 0',
           ylabel='loss, nats', ylim=(0, 0.8))


def _answers(ax: Axes, runs: Sequence[Run]) -> None:
    rates = {(row['method'], row['learning_rate']) for run in runs for row in run.results if 'learning_rate' in row}
    curves = [row for run in runs for row in run.curves
              if row['method'] in _DRAWING and (row['method'], row['learning_rate']) in rates]
    curves += [{**row, 'method': 'qsharp'} for run in runs for row in run.guided]
    for method, own in _sorted(_by(curves, lambda row: row['method'])):
        _curve(ax, method, own, 'answers', 'pass@1', 'pass@1_se')
    ax.axhline(100 / runs[0].degree, color=plots.INK, linestyle='--', linewidth=1)
    ax.set(title='What more answers buy', xlabel='answers graded in training', ylabel='whole path right, %',
           ylim=(0, 104))
    if curves:
        ax.set_xscale('log')
        ax.legend(fontsize=7)


def _curve(ax: Axes, method: str, rows: Sequence[Row], place: str, value: str, error: str) -> None:
    """Draws a share in per cent against what `place` names, with its standard error; rows of one place are seeds."""
    points = [(where, *mean_of(several, value, error))
              for where, several in sorted(_by(rows, lambda row: row[place]).items())]
    colour, marker = plots.look(method)
    ax.errorbar([where for where, *_ in points], [100 * mean for _, mean, _ in points],
                yerr=[100 * deviation for *_, deviation in points], color=colour, marker=marker, markersize=5,
                linewidth=1.2, elinewidth=1, label=tables.METHODS[method])


def _sorted(curves: Mapping[str, list[Row]]) -> list[tuple[str, list[Row]]]:
    return [(method, curves[method]) for method in SHOWN if method in curves]
