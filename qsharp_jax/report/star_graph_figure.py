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
# Of methods that fail or succeed alike, one is drawn step by step.
_STEPPING = ('reference', 'reinforce', 'reinforce_greedy', 'dpo', 'qsharp_pairs', 'qsharp')
_VARIED = ('grpo', 'fudge')  # whose colours and markers other value networks have, where these are not drawn


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on one kind of graph.

    Attributes:
      degree: d, arms of the star.
      path_length: l, nodes of an arm.
      seed: of the run.
      hours: that it took so far, of all its phases.
      results: one row a method, on the test split, of what was chosen on validation: `method`, `pass@1`, `pass@1_se`,
        and `answers`, how many were graded for it in training (0 for the reference); of a policy that was trained
        itself also `learning_rate`; `arms`, the share of answers that are an arm of the graph.
      earlier: likewise of iterations before the last.
      steps: accuracy of each step: `method`, `step` (0 is the centre, l the end of the answer), `accuracy` among the
        `count` answers that were right up to it, `se`.
      values: held-out loss of the last value network of Q♯, and of the one that was fitted to pairs: `method` ('qsharp'
        or 'qsharp_pairs'), `position` (token of the answer, from 0), `loss`.
      fits: of these networks: `method`, `learning_rate`, and `sweep`, the held-out loss at each rate that was tried.
      curves: accuracy on validation in training: `method`, `learning_rate`, `answers`, `pass@1`, `pass@1_se`.
      guided: `answers`, `pass@1` and `pass@1_se` of Q♯ on validation after each iteration.
      variant: what is other about Q♯'s value network than in the runs that are compared; '' for nothing.
    """

    degree: int
    path_length: int
    seed: int
    hours: float
    results: Sequence[Row]
    earlier: Sequence[Row]
    steps: Sequence[Row]
    values: Sequence[Row]
    fits: Sequence[Row]
    curves: Sequence[Row]
    guided: Sequence[Row]
    variant: str = ''

    @property
    def graph(self) -> tuple[int, int]:
        """(d, l)."""
        return self.degree, self.path_length

    @property
    def answers(self) -> int:
        """That Q♯ has had graded in training."""
        return max((row['answers'] for row in self.guided), default=0)


def draw(runs: Sequence[Run]) -> Figure:
    """Returns the figure of some runs; several of one graph with as many answers are seeds, whose mean is shown.

    Above, accuracy of each method on each graph, and the line 1/d of a guess. Below, for each graph: accuracy by step
    and the value networks' loss by position, which tell where a method fails; and accuracy on validation against
    answers graded in training, on a logarithmic axis, where runs of Q♯ with fewer answers are points of its curve.
    Graphs on which policies were trained too are shown so, or all where none was. Last, for each number of arms with
    several lengths of path: accuracy by length, and the value network's loss at the first step. Of a run with another
    value network the loss alone is shown, beside that of the others.

    Args:
      runs: at least one; without a variant, too.

    Raises:
      ValueError: there is none.
    """
    if not runs:
        raise ValueError('there is no run of star graphs to draw: name the work directories of some.')
    variants, runs = [run for run in runs if run.variant], _plain(runs)
    every = _fullest(runs)
    fullest = {graph: own for graph, own in every.items() if any(_trains_policies(run) for run in own)} or every
    lengths = {degree: [own for graph, own in every.items() if graph[0] == degree] for degree, _ in every}
    several = {degree: own for degree, own in lengths.items() if len(own) > 1}
    with plots.style():
        rows = 1 + len(fullest) + len(several)
        figure = Figure(figsize=(13.5, 4.6 * rows))
        above, *below = np.ravel(figure.subfigures(rows, 1, squeeze=False))
        for own, ax in zip(fullest.values(), above.subplots(1, len(fullest), sharey=True, squeeze=False)[0]):
            _accuracy(ax, own)
        above.supxlabel(_errors(fullest), fontsize=8)
        for (graph, own), part in zip(fullest.items(), below):
            step, value, answers = part.subplots(1, 3)
            _steps(step, own)
            _values(value, [*own, *(run for run in variants if run.graph == graph)])
            _answers(answers, [run for run in runs if run.graph == graph])
            for ax in (step, value, answers):
                if ax.get_legend_handles_labels()[0]:
                    ax.legend(fontsize=7, ncols=3, loc='upper center', bbox_to_anchor=(0.5, -0.2))
        for (degree, seeds), part in zip(several.items(), below[len(fullest):]):
            accuracy, loss = part.subplots(1, 2)
            _by_length(accuracy, loss, degree, seeds)
    return figure


def markdown(runs: Sequence[Run]) -> str:
    """Returns the accuracies above as a table, a method a line and a graph a column, and the hours of each run.

    Args:
      runs: at least one, as in `draw`.
    """
    fullest = _fullest(_plain(runs))
    lines = [['whole path right, %', *map(_name, fullest)],
             ['---', *('---:' for _ in fullest)],
             ['a guess of the arm', *(f'{100 / degree:.1f}' for degree, _ in fullest)]]
    shown = [(method, '') for method in SHOWN]
    shown += [('qsharp', variant) for variant in sorted({run.variant for run in runs if run.variant})]
    for method, variant in shown:
        cells = []
        for graph, own in fullest.items():
            meant = [run for run in runs if (run.graph, run.variant) == (graph, variant)] if variant else own
            found = [row for run in meant for row in run.results if row['method'] == method]
            mean, error = mean_of(found, 'pass@1', 'pass@1_se') if found else (0.0, 0.0)
            cells.append(f'{100 * mean:.1f} ± {100 * error:.1f}' if found else '')
        if any(cells):
            lines.append([_titled(method, variant), *cells])
    took = [['run', 'answers for Q♯', 'hours'], ['---', '---:', '---:'],
            *([', '.join(filter(None, (_name(run.graph), run.variant, f'seed {run.seed}'))), f'{run.answers:,}',
               f'{run.hours:.2f}'] for run in runs),
            ['together', '', f'{sum(run.hours for run in runs):.2f}']]
    return f'{_table(lines)}\n{_errors(fullest)}\n\n{_table(took)}'


def _table(lines: Sequence[Sequence[str]]) -> str:
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _titled(method: str, variant: str) -> str:
    return ', '.join(filter(None, (tables.METHODS[method], variant)))


def _plain(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs without a variant, or all where each has one."""
    return [run for run in runs if not run.variant] or list(runs)


def _name(graph: tuple[int, int]) -> str:
    return f'G({graph[0]}, {graph[1]})'


def _errors(fullest: Mapping[tuple[int, int], Sequence[Run]]) -> str:
    """Returns what the errors are over, as a sentence."""
    several = [f'{len(runs)} on {_name(graph)}' for graph, runs in fullest.items() if len(runs) > 1]
    spread = f', and over seeds where there are several ({", ".join(several)})' if several else ', of one seed each'
    return f'Errors are one standard error over the graphs of the split{spread}.'


def _fullest(runs: Sequence[Run]) -> dict[tuple[int, int], list[Run]]:
    """Returns the runs of each graph, short paths first, in which Q♯ has most answers: its seeds."""
    graphs = sorted({run.graph for run in runs}, key=lambda graph: (graph[1], graph[0]))
    most = {graph: max(run.answers for run in runs if run.graph == graph) for graph in graphs}
    return {graph: [run for run in runs if (run.graph, run.answers) == (graph, most[graph])] for graph in graphs}


def mean_of(rows: Sequence[Row], value: str, error: str) -> tuple[float, float]:
    """Returns the mean of a value over seeds, and its standard error.

    All seeds are asked the same graphs, so the error over graphs is not less for several of them; their own spread
    comes on top of it.
    """
    values = np.array([row[value] for row in rows])
    over_graphs = np.mean([(row[error] or 0.0) ** 2 for row in rows])
    over_seeds = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
    return float(values.mean()), math.sqrt(over_graphs + over_seeds)


def _trains_policies(run: Run) -> bool:
    return any('learning_rate' in row for row in run.results)


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
    _guess(ax, runs)
    ax.set_xticks(range(len(shown)), [tables.METHODS[method] for method in shown], rotation=40,
                  horizontalalignment='right', fontsize=8)
    ax.grid(axis='x', visible=False)
    ax.set(title=f'{_name(runs[0].graph)}, 1/d = {100 / runs[0].degree:.0f} %', ylim=(0, 108))
    if ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        ax.set_ylabel('whole path right, %')


def _steps(ax: Axes, runs: Sequence[Run]) -> None:
    rows = [row for run in runs for row in run.steps if row['method'] in _STEPPING]
    for method, own in _sorted(_by(rows, lambda row: row['method'])):
        _curve(ax, method, own, 'step', 'accuracy', 'se')
    length = runs[0].path_length
    _guess(ax, runs, named=True)
    ax.set_xticks(range(length + 1), ['centre', *map(str, range(1, length)), 'end'])
    ax.set(xlim=(-0.3, length + 0.3), ylim=(0, 104), xlabel='step of the path', ylabel='step right, %',
           title=f'{_name(runs[0].graph)}: each step, if those before are right')


def _values(ax: Axes, runs: Sequence[Run]) -> None:
    rows = [{**row, 'variant': run.variant} for run in runs for row in run.values]
    variants = sorted({run.variant for run in runs if run.variant})
    for variant, varied in _by(rows, lambda row: row['variant']).items():
        for method, own in _sorted(_by(varied, lambda row: row['method'])):
            points = sorted((position, sum(row['loss'] for row in several) / len(several))
                            for position, several in _by(own, lambda row: row['position']).items())
            colour, marker = plots.look(_VARIED[variants.index(variant) % len(_VARIED)] if variant else method)
            ax.plot(*zip(*points), label=_titled(method, variant), **_line(method, colour, marker))
    _nothing_known(ax, runs[0].degree, any(row['method'].endswith('_pairs') for row in rows))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title=f'{_name(runs[0].graph)}: value networks, held-out graphs', xlabel='token of the answer, from 0',
           ylabel='loss, nats')
    ax.set_ylim(bottom=0)


def _answers(ax: Axes, runs: Sequence[Run]) -> None:
    curves: list[Row] = []
    for run in runs:
        # Of a sweep, the rate that this run chose.
        rates = {(row['method'], row['learning_rate']) for row in run.results if 'learning_rate' in row}
        curves += [row for row in run.curves
                   if row['method'] in _DRAWING and (row['method'], row['learning_rate']) in rates]
        curves += run.guided
    for method, own in _sorted(_by(curves, lambda row: row['method'])):
        _curve(ax, method, own, 'answers', 'pass@1', 'pass@1_se')
    _guess(ax, runs, named=True)
    ax.set(title=f'{_name(runs[0].graph)}: what more answers buy', ylim=(0, 104),
           xlabel='answers graded (policies: so far in one training;\nQ♯: in all of a training of its own)',
           ylabel='whole path right, validation, %')
    if curves:
        ax.set_xscale('log')


def _by_length(accuracy: Axes, loss: Axes, degree: int, lengths: Sequence[Sequence[Run]]) -> None:
    """Draws accuracy, and the loss at the first step, by length of path; an item of `lengths` is seeds."""
    rows = [{**row, 'length': run.path_length} for own in lengths for run in own for row in run.results]
    for method, own in _sorted(_by(rows, lambda row: row['method'])):
        if method in ('reference', 'qsharp'):
            _curve(accuracy, method, own, 'length', 'pass@1', 'pass@1_se')
    _guess(accuracy, lengths[0], named=True)
    accuracy.set(title=f'G({degree}, l): paths of more nodes', xlabel='nodes of an arm, l',
                 ylabel='whole path right, %', ylim=(0, 104))
    # The first token is the centre, which all answers have.
    first = [(own[0].path_length, [row['loss'] for run in own for row in run.values
                                   if (row['method'], row['position']) == ('qsharp', 1)]) for own in lengths]
    points = [(length, sum(losses) / len(losses)) for length, losses in first if losses]
    if points:
        loss.plot(*zip(*points), label=tables.METHODS['qsharp'], **_line('qsharp'))
    _nothing_known(loss, degree)
    loss.set(title=f'G({degree}, l): the value of the first step', xlabel='nodes of an arm, l',
             ylabel='held-out loss, nats')
    loss.set_ylim(bottom=0)
    for ax in (accuracy, loss):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.legend(fontsize=7)


def _nothing_known(ax: Axes, degree: int, pairs: bool = False) -> None:
    """Draws the loss of a network that knows no more than that one in `degree` of the reference's answers is right.

    Of pairs one in two is.
    """
    share = 1 / degree
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    lines = [(entropy, '1/d: nothing else is known', '--')]
    if pairs and degree > 2:
        lines.append((math.log(2), 'on pairs: nothing is known', ':'))
    for loss, what, look in lines:
        ax.axhline(loss, color=plots.INK, linestyle=look, linewidth=1)
        # On the right: the loss of the first token, which all answers share, lies on the line.
        ax.annotate(what, (0.98, loss), xycoords=('axes fraction', 'data'), xytext=(0, 3),
                    textcoords='offset points', fontsize=8, ha='right')


def _guess(ax: Axes, runs: Sequence[Run], named: bool = False) -> None:
    """Draws the line 1/d."""
    ax.axhline(100 / runs[0].degree, color=plots.INK, linestyle='--', linewidth=1)
    if named:
        ax.annotate('1/d', (1, 100 / runs[0].degree), xycoords=('axes fraction', 'data'), xytext=(2, 0),
                    textcoords='offset points', fontsize=8, va='center')


def _curve(ax: Axes, method: str, rows: Sequence[Row], place: str, value: str, error: str) -> None:
    """Draws a share in per cent against what `place` names, with its standard error; rows of one place are seeds."""
    points = [(where, *mean_of(several, value, error))
              for where, several in sorted(_by(rows, lambda row: row[place]).items())]
    ax.errorbar([where for where, *_ in points], [100 * mean for _, mean, _ in points],
                yerr=[100 * deviation for *_, deviation in points], elinewidth=1, label=tables.METHODS[method],
                **_line(method))


def _line(method: str, colour: str = '', marker: str = '') -> dict[str, Any]:
    """Returns how the curve of a method looks; what is on pairs, or greedy, has the colour of what is not."""
    usual, sign = plots.look(method)
    return {'color': colour or usual, 'marker': marker or sign, 'markersize': 5, 'linewidth': 1.2,
            'linestyle': ':' if method.endswith('_pairs') else '--' if method.endswith('_greedy') else '-'}


def _sorted(curves: Mapping[str, list[Row]]) -> list[tuple[str, list[Row]]]:
    return [(method, curves[method]) for method in SHOWN if method in curves]
