"""The plots of a run, drawn with matplotlib, off screen."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import io
from pathlib import Path
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qsharp_jax.report import tables
from qsharp_jax.report.records import Run

Row = Mapping[str, Any]

INK = '#30343b'
# Middle tones, so that they stand on white and on black.
_GREY, _BLUE, _SKY, _ORANGE, _GREEN, _PURPLE = '#8a8f98', '#3273dc', '#5fb4e5', '#e08a1e', '#2a9d6f', '#9b6bd3'
_RED, _YELLOW = '#d1495b', '#b59f1a'
_LOOKS = {
    'reference': (_GREY, 's'), 'cd': (_ORANGE, '^'), 'fudge': (_GREEN, 'v'), 'qsharp': (_BLUE, 'o'),
    'vas': (_PURPLE, 'd'), 'cd_pairs': (_ORANGE, 'D'), 'fudge_pairs': (_GREEN, 'D'), 'vas_pairs': (_PURPLE, 'D'),
    'qsharp_pairs': (_BLUE, 'D'),
    'reinforce': (_PURPLE, 'P'), 'reinforce_greedy': (_PURPLE, 'X'), 'grpo': (_RED, '*'), 'dpo': (_SKY, 'P'),
    'rpo': (_YELLOW, 'X')}
_STYLE: Any = {
    'font.size': 10, 'axes.titlesize': 11, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'axes.axisbelow': True, 'grid.alpha': 0.18, 'grid.linewidth': 0.8, 'legend.frameon': False,
    'lines.linewidth': 1.8,
    'axes.titlelocation': 'left', 'figure.constrained_layout.use': True, 'svg.fonttype': 'none',
    'svg.hashsalt': 'qsharp_jax', 'axes.facecolor': 'none', 'savefig.facecolor': 'none',
    **{key: INK for key in ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color',
                            'grid.color')},
}


def draw(run: Run) -> dict[str, Figure]:
    """Every plot that the run has numbers for, by file name."""
    figures: dict[str, Figure] = {}
    with style():
        if any(row['split'] == run.sweep_split for row in run.results):
            figures['pass1_kl'] = pass1_against_kl(run.results, run.sweep_split)
        if any('loss' in row for row in run.metrics):
            figures['training'] = training_curves(run.metrics)
        if run.calibration:
            figures['reliability'] = reliability(run.calibration)
        if any(record['by_position'] for record in run.calibration.values()):
            figures['by_position'] = by_position(run.calibration)
    return figures


def save(figures: Mapping[str, Figure], directory: Path) -> None:
    """Writes each figure as PNG, on white, and as SVG."""
    directory.mkdir(parents=True, exist_ok=True)
    with style():
        for name, figure in figures.items():
            FigureCanvasAgg(figure).print_figure(directory / f'{name}.png', dpi=160, facecolor='white')
            # Without the date, the same numbers give the same file.
            FigureCanvasSVG(figure).print_figure(directory / f'{name}.svg', metadata={'Date': None})


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page: ink takes the text's colour, and ids begin with `name`."""
    buffer = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_figure(buffer, metadata={'Date': None, 'Creator': None})
    svg = buffer.getvalue()
    svg = svg[svg.index('<svg'):].replace(INK, 'currentColor')
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{name}-', svg)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of the plots, for the length of a `with` block."""
    with matplotlib.rc_context(_STYLE):
        yield


def look(method: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    return _LOOKS[method]


def pass1_against_kl(rows: Sequence[Row], split: str) -> Figure:
    """pass@1 against KL, one curve a method and iteration, one point an eta or temperature."""
    figure, axes = _figure(1, 6.8, 4.4)
    ax = axes[0]
    curves: dict[str, list[Row]] = {}
    for row in tables.of_split(rows, split):
        if row['kl'] is not None and row['pass@1'] is not None:
            curves.setdefault(tables.series(row), []).append(row)
    for (label, points), (colour, marker) in zip(curves.items(), _looks(list(curves.values()))):
        points = sorted(points, key=lambda row: row['kl'])
        ax.errorbar(
            [row['kl'] for row in points], [100 * row['pass@1'] for row in points],
            xerr=[row['kl_se'] or 0 for row in points], yerr=[100 * (row['pass@1_se'] or 0) for row in points],
            label=label, color=colour, marker=marker, markersize=6, elinewidth=1, capsize=2)
        for row in points:
            above = row['method'] == 'reference'  # so that labels of crossing curves keep out of each other's way
            eta = f'η={row["eta"]:g}' if tables.has_eta(row) else ''
            ax.annotate(f'T={row["temperature"]:g}' if above else eta, (row['kl'], 100 * row['pass@1']),
                        xytext=(-6, 5) if above else (6, -10), horizontalalignment='right' if above else 'left',
                        textcoords='offset points', fontsize=7.5, color=colour)
    ax.margins(x=0.08)
    ax.set(xlabel='KL to the reference, nats an answer', ylabel='pass@1, %',
           title=f'Accuracy against distance from the reference, {split} split')
    if curves:
        ax.legend()
    return figure


def beside_paper(labels: Sequence[str], paper: Sequence[float | None], ours: Sequence[float | None],
                 errors: Sequence[float | None], unit: str) -> Figure:
    """The paper's numbers and ours, one line each; bars are one standard error.

    Args:
      labels: of the lines, from above.
      paper: numbers of the paper; None where it has none.
      ours: likewise.
      errors: standard errors of ours.
      unit: of the axis.
    """
    figure = Figure(figsize=(8.2, 1.2 + 0.24 * len(labels)))
    ax = figure.subplots()
    for name, numbers, error, (colour, marker) in (
            ('paper', paper, [None] * len(paper), (_GREY, 's')), ('ours', ours, errors, (_BLUE, 'o'))):
        points = [(number, line, wide or 0.0) for line, (number, wide) in enumerate(zip(numbers, error, strict=True))
                  if number is not None]
        if points:
            x, y, bars = zip(*points)
            ax.errorbar(x, y, xerr=bars, linestyle='none', marker=marker, markersize=5, color=colour, elinewidth=1,
                        capsize=2, label=name)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    if ax.has_data():
        ax.legend()
    return figure


def training_curves(rows: Sequence[Row]) -> Figure:
    """Loss on training batches and held-out prompts against the step, one panel a stage."""
    stages = list(dict.fromkeys(row['stage'] for row in rows if 'loss' in row))
    figure, axes = _figure(len(stages), 4.2, 3.2)
    for ax, stage in zip(axes, stages):
        for field, label, colour in (('loss', 'training', _SKY), ('heldout_loss', 'held out', _BLUE)):
            points = [(row['step'], row[field]) for row in rows if row['stage'] == stage and row.get(field) is not None]
            if points:
                ax.plot(*zip(*points), label=label, color=colour, marker='o' if len(points) < 30 else None,
                        markersize=3)
        ax.set(title=stage.replace('_', ' '), xlabel='gradient step')
        ax.legend()
    axes[0].set_ylabel('loss')
    return figure


def reliability(calibration: Mapping[int, Row]) -> Figure:
    """Mean outcome against mean prediction, for each iteration; below, the share of predictions of the last."""
    figure = Figure(figsize=(6.4, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    ends = [bin_[end] for record in calibration.values() for bin_ in record['bins'] for end in ('low', 'high')]
    upper.plot([min(ends), max(ends)], [min(ends), max(ends)], color=_GREY, linestyle='--', linewidth=1,
               label='calibrated')
    colours = _shades(len(calibration))
    for (iteration, record), colour in zip(sorted(calibration.items()), colours):
        bins = record['bins']
        upper.errorbar(
            [bin_['mean_prediction'] for bin_ in bins], [bin_['mean_outcome'] for bin_ in bins],
            yerr=[bin_['standard_error'] or 0 for bin_ in bins], marker='o', markersize=5, elinewidth=1, capsize=2,
            color=colour, label=f'iteration {iteration}, calibration error {record["ece"]:.3f}')
    last = calibration[max(calibration)]['bins']
    lower.bar([bin_['low'] for bin_ in last], [100 * bin_['weight'] for bin_ in last],
              [bin_['high'] - bin_['low'] for bin_ in last], align='edge', color=_BLUE, alpha=0.6, linewidth=0)
    upper.set(ylabel='mean outcome', title='Predictions against outcomes, held-out prompts')
    upper.legend()
    lower.set(xlabel='predicted return', ylabel='share, %')
    return figure


def by_position(calibration: Mapping[int, Row]) -> Figure:
    """Held-out loss, calibration error and AUC against the position in the answer, for each iteration.

    A number that a position has not, such as the AUC where all answers earned the same, is left out.
    """
    shown = {'loss': 'Held-out loss', 'ece': 'Calibration error', 'auc': 'AUC'}
    figure, axes = _figure(len(shown), 4.4, 3.4)
    for ax, (name, title) in zip(axes, shown.items()):
        for (iteration, record), colour in zip(sorted(calibration.items()), _shades(len(calibration))):
            rows = [row for row in record['by_position'] if row.get(name) is not None]
            ax.plot([row['position'] for row in rows], [row[name] for row in rows], marker='o', markersize=4,
                    color=colour, label=f'iteration {iteration}')
        ax.set(xlabel='position in the answer, tokens', title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    return figure


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * panels, height))
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _shades(count: int) -> list[str]:
    """Colours of iterations; the last is the strongest."""
    return ([_GREY, _PURPLE, _GREEN, _SKY] * count)[:count - 1] + [_BLUE]


def _looks(curves: Sequence[Sequence[Row]]) -> list[tuple[str, str]]:
    """Colour and marker of each curve, by method; the last iteration of Q♯ is the strongest."""
    qsharp = sum(points[0]['method'] == 'qsharp' for points in curves)
    shades = iter((([_SKY, _PURPLE] * qsharp)[:max(qsharp - 1, 0)] + [_BLUE]))
    return [(next(shades), 'o') if points[0]['method'] == 'qsharp' else look(points[0]['method']) for points in curves]
