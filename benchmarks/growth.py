"""How time grows: with the context, the rows, the data and the layers. None should grow faster than its cause."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measure import number, Worker
from benchmarks.workload import Guide, UNGUIDED

Row = dict[str, Any]

CONTEXTS = (64, 256, 1024, 4096)  # tokens
BATCHES = (1, 4, 16, 64)  # rows
DATA = (1_000, 10_000, 100_000, 1_000_000)  # answers in D
LAYERS = (2, 4, 8, 16, 30)  # of the value network
GUIDES = {'unguided': UNGUIDED, 'guided': Guide()}

_TOKENS = 16  # a row, of each measurement
_REPEATS = 3


def rows(ours: Worker, wanted: Mapping[str, bool]) -> Iterator[Row]:
    """Yields one row a cause, with a point for each of its sizes.

    Args:
      ours: the worker of our side.
      wanted: whether each row is measured, by its name.
    """
    if wanted['growth/context']:
        yield _row('growth/context', 'tokens of context', 'ms a step', {
            label: [(size, _step(ours, 1, size, guide)) for size in CONTEXTS] for label, guide in GUIDES.items()})
    if wanted['growth/batch']:
        yield _row('growth/batch', 'rows', 'ms a step', {
            label: [(size, _step(ours, size, 64, guide)) for size in BATCHES] for label, guide in GUIDES.items()})
    if wanted['growth/data']:
        found = [(size, ours.call('data', answers=size)) for size in DATA]
        yield _row('growth/data', 'answers in D', 'µs an answer', {
            'to open D and lay it out': [(size, 1e6 * one['open_seconds'] / size) for size, one in found],
            'to make a batch': [(size, 1e6 * one['batch_seconds'] / one['batch_answers']) for size, one in found]})
    if wanted['growth/layers']:
        yield _row('growth/layers', 'layers of the value network', 's to compile a guided step', {
            'guided': [(size, _compilation(ours, size)) for size in LAYERS]})


def _row(name: str, cause: str, effect: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Row:
    return {'name': name, 'cause': cause, 'effect': effect, 'series': {
        label: [list(point) for point in points] for label, points in series.items()}}


def _step(ours: Worker, batch: int, prompt: int, guide: Guide) -> float:
    """Returns the milliseconds of a step."""
    asked = dict(batch=batch, prompt=prompt, layers=8, dtype='float32', room=64, tokens=_TOKENS, guide=guide.message())
    ours.call('decode', **asked)
    return 1e3 * statistics.median(ours.call('decode', **asked)['seconds'] for _ in range(_REPEATS)) / _TOKENS


def _compilation(ours: Worker, layers: int) -> float:
    """Returns the seconds that the first answer takes more than the second."""
    asked = dict(batch=16, prompt=64, layers=layers, dtype='float32', room=64, tokens=1, guide=Guide().message())
    ours.call('forget')
    first, second = (ours.call('decode', **asked)['seconds'] for _ in range(2))
    return float(first - second)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the points of each row in Markdown."""
    texts = ['![time against its causes](figures/growth.png)\n']
    for row in found:
        labels = list(row['series'])
        lines = [f'| {row["cause"]} | ' + ' | '.join(f'{label}, {row["effect"]}' for label in labels) + ' |',
                 '|' + ' ---: |' * (1 + len(labels))]
        for points in zip(*row['series'].values()):
            lines.append(f'| {points[0][0]:,} | ' + ' | '.join(number(value) for _, value in points) + ' |')
        texts.append('\n'.join(lines) + '\n')
    return '\n'.join(texts)


def sentence(row: Mapping[str, Any]) -> str:
    """Returns a row in one line, for the terminal."""
    return f'{row["effect"]}: ' + '; '.join(
        f'{label} ' + ', '.join(f'{size:,} {value:.3g}' for size, value in points)
        for label, points in row['series'].items())


def draw(found: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draws a panel a row, on logarithmic axes, beside what grows like its cause."""
    figure = Figure(figsize=(4.2 * len(found), 3.6), layout='constrained')
    for row, ax in zip(found, figure.subplots(1, len(found), squeeze=False)[0], strict=True):
        for label, points in row['series'].items():
            ax.plot(*zip(*points), marker='o', markersize=4, label=label)
        # Times of one answer should not grow at all, others no faster than this.
        flat = row['effect'].endswith('an answer')
        first = next(iter(row['series'].values()))
        sizes = [size for size, _ in first]
        ax.plot(sizes, [first[0][1] * (1 if flat else size / sizes[0]) for size in sizes], color='#8a8f98',
                linestyle='--', linewidth=1, label='constant' if flat else 'in proportion')
        ax.set(xscale='log', yscale='log', xlabel=row['cause'], ylabel=row['effect'])
        ax.set_xticks(sizes, [f'{size:,}' for size in sizes])
        ax.set_xticks([], minor=True)
        ax.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)
