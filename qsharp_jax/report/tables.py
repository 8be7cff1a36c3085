"""Rows of results.jsonl as tables for people."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

Row = Mapping[str, Any]

METHODS = {
    'reference': 'reference', 'reinforce': 'REINFORCE', 'reinforce_greedy': 'REINFORCE, greedy', 'grpo': 'GRPO',
    'dpo': 'DPO', 'rpo': 'RPO', 'cd_pairs': 'CD on pairs', 'fudge_pairs': 'FUDGE on pairs',
    'vas_pairs': 'VAS on pairs', 'qsharp_pairs': 'Q♯ on pairs', 'cd': 'CD', 'vas': 'VAS', 'fudge': 'FUDGE',
    'qsharp': 'Q♯'}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its title, and the text of a row's cell."""

    title: str
    text: Callable[[Row], str]


def series(row: Row) -> str:
    """The name of the curve that a row is a point of, such as 'Q♯, iteration 2'."""
    name = METHODS[row['method']]
    only = row['method'].endswith('_pairs')  # of one iteration, which has no roll-outs
    return f'{name}, iteration {row["iteration"]}' if row['iteration'] and not only else name


def name(row: Row) -> str:
    """The name of a row's policy, such as 'reference, greedy'."""
    if row['method'] == 'reference' and row['temperature'] == 0:
        return 'reference, greedy'
    return series(row)


def has_eta(row: Row) -> bool:
    """Whether the policy depends on eta: others have no value network, and FUDGE's weight is free of it."""
    return row['method'].removesuffix('_pairs') in ('cd', 'vas', 'qsharp')


def of_split(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of a split: the reference from hot to greedy, then each method by iteration from weak to strong."""
    methods = list(METHODS)
    return sorted(
        (row for row in rows if row['split'] == split),
        key=lambda row: (methods.index(row['method']), row['iteration'], -row['temperature'], -_eta(row)))


def chosen_etas(rows: Sequence[Row], select_split: str) -> dict[tuple[str, int], float]:
    """The eta that the run has chosen on `select_split`, by (method, iteration)."""
    return {(row['method'], row['iteration']): row['eta'] for row in rows
            if row['split'] == select_split and has_eta(row) and row['selected']}


def markdown(rows: Sequence[Row], split: str, select_split: str = '') -> str:
    """A Markdown table of a split; an eta chosen on `select_split` is bold."""
    titles, cells = table(rows, split, select_split)
    lines = [titles, ['---'] + ['---:'] * (len(titles) - 1)]
    chosen = _chosen_rows(rows, split, select_split)
    for texts, is_chosen in zip(cells, chosen, strict=True):
        lines.append([f'**{text}**' if is_chosen and text else text for text in texts])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines) + f'\n{caption(rows, split, select_split)}\n'


def terminal(rows: Sequence[Row], split: str, select_split: str = '') -> str:
    """A table of a split in aligned text; an eta chosen on `select_split` is starred."""
    titles, cells = table(rows, split, select_split)
    chosen = _chosen_rows(rows, split, select_split)
    cells = [[texts[0] + ' *' * is_chosen, *texts[1:]] for texts, is_chosen in zip(cells, chosen, strict=True)]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [_aligned(titles, widths), '─' * (sum(widths) + 2 * len(widths) - 2)]
    lines += [_aligned(texts, widths) for texts in cells]
    return '\n'.join(lines) + f'\n{caption(rows, split, select_split)}\n'


def table(rows: Sequence[Row], split: str, select_split: str = '') -> tuple[list[str], list[list[str]]]:
    """Titles and cells of a split's table; columns that no row fills are left out."""
    shown = of_split(rows, split)
    # Most rows have it; those of another k have no such numbers.
    k = _commonest([row['k'] for row in shown])
    sizes = {_size(row) for row in shown}
    columns = [
        Column('policy', name),
        Column('η', lambda row: f'{row["eta"]:g}' if has_eta(row) else ''),
        Column('temperature', lambda row: f'{row["temperature"]:g}'),
        Column('pass@1 %', lambda row: _percent(row, 'pass@1')),
        Column('over reference', lambda row: _interval(row, 'difference_to_reference')),
        Column('over CD', lambda row: _interval(row, 'difference_to_cd')),
        # Of one answer, both are pass@1 again.
        Column(f'pass@{k} %', lambda row: '' if k == 1 else _of_k(row, 'pass@k', k)),
        Column(f'maj@{k} %', lambda row: '' if k == 1 else _of_k(row, 'maj@k', k)),
        Column(f'best of {k} by value %', lambda row: _of_k(row, 'best_of_k', k)),
        Column(f'weighted maj@{k} %', lambda row: _of_k(row, 'weighted_maj@k', k)),
        Column('KL, nats', lambda row: _measured(row, 'kl')),
        Column('KL per token', lambda row: _measured(row, 'kl_per_token', digits=3)),
        Column('truncated %', lambda row: _percent(row, 'truncated')),
        Column('GFLOP per answer', lambda row: _giga(row, 'flops_per_answer')),
        Column('per right answer', lambda row: _giga(row, 'flops_per_right_answer')),
        Column('questions, answers each', lambda row: '{}, {}'.format(*_size(row)) if len(sizes) > 1 else ''),
    ]
    texts = [[column.text(row) for row in shown] for column in columns]
    filled = [i for i, column in enumerate(texts) if i == 0 or any(column)]
    return [columns[i].title for i in filled], [[texts[i][j] for i in filled] for j in range(len(shown))]


def caption(rows: Sequence[Row], split: str, select_split: str = '') -> str:
    """What the table is of: split, size, and what ±, brackets and the mark mean."""
    shown = of_split(rows, split)
    if not shown:
        return f'No policy has been evaluated on the split {split!r} yet.'
    sizes = {_size(row) for row in shown}
    size = '{} questions, {} answers each'.format(*_size(shown[0])) if len(sizes) == 1 else 'not all of one size'
    text = f'{split.capitalize()} split: {size}; ± is one standard error.'
    if any(_interval(row, 'difference_to_reference') for row in shown):
        text += ' Differences are in points of pass@1, [in brackets] their 95 % intervals by the paired bootstrap.'
    if any(_chosen_rows(rows, split, select_split)):
        text += f' Marked: the η chosen on the {select_split} split.'
    return text


def frontier(rows: Sequence[Row], split: str) -> list[str]:
    """Sentences on where the last Q♯ lies above and below every other curve of pass@1 against KL, by point estimates.

    A curve joins its points and the reference's own; beyond its last point it stays at its best pass@1.
    """
    shown = [row for row in of_split(rows, split) if row['pass@1'] is not None and row['kl'] is not None]
    guided = [row for row in shown if row['method'] == 'qsharp']
    plain = [row for row in shown if row['method'] == 'reference']
    if not guided or not plain:
        return []
    last = max(row['iteration'] for row in guided)
    points = [row for row in guided if row['iteration'] == last]
    start = min(plain, key=lambda row: row['kl'])
    others: dict[str, list[Row]] = {}
    for row in shown:
        if row is not start and (row['method'], row['iteration']) != ('qsharp', last):
            label = 'the sharpened reference' if row['method'] == 'reference' else series(row)
            others.setdefault(label, []).append(row)
    sentences = []
    for label, curve in others.items():
        below = [f'{row["eta"]:g}' for row in points if row['pass@1'] < _height([start, *curve], row['kl'])]
        where = f'except at η = {", ".join(below)}' if below and len(below) < len(points) else 'at every η'
        side = 'below' if len(below) == len(points) else 'on or above'
        sentences.append(f'At equal KL, {series(points[0])} lies {side} {label} {where} (point estimates).')
    return sentences


def _height(curve: Sequence[Row], kl: float) -> float:
    """pass@1 of a curve at a KL."""
    ordered = sorted(curve, key=lambda row: row['kl'])
    kls, heights = [row['kl'] for row in ordered], [row['pass@1'] for row in ordered]
    return max(heights) if kl > kls[-1] else float(np.interp(kl, kls, heights))


def _chosen_rows(rows: Sequence[Row], split: str, select_split: str) -> list[bool]:
    chosen = chosen_etas(rows, select_split) if select_split else {}
    return [has_eta(row) and chosen.get((row['method'], row['iteration'])) == row['eta']
            for row in of_split(rows, split)]


def _eta(row: Row) -> float:
    return row['eta'] if has_eta(row) else 0.0


def _commonest(numbers: Sequence[int]) -> int:
    """The number that is there most often, of equals the largest; 1 of none."""
    return max(numbers, key=lambda number: (numbers.count(number), number), default=1)


def _size(row: Row) -> tuple[int, int]:
    return row['n_examples'], row['n_samples']


def _of_k(row: Row, field: str, k: int) -> str:
    return _percent(row, field) if row['k'] == k else ''


def _percent(row: Row, field: str) -> str:
    if field not in row or row[field] is None:
        return ''
    return f'{100 * row[field]:.1f}' + _error(row, field, 100, 1)


def _interval(row: Row, field: str) -> str:
    """A difference with its 95 % interval, which one question alone does not have."""
    if field not in row or row[field] is None:
        return ''
    low, high = row[f'{field}_low'], row[f'{field}_high']
    return f'{100 * row[field]:+.1f}' + ('' if low is None else f' [{100 * low:.1f}, {100 * high:.1f}]')


def _measured(row: Row, field: str, digits: int = 2) -> str:
    if field not in row or row[field] is None:
        return ''
    return f'{row[field]:.{digits}f}' + _error(row, field, 1, digits)


def _giga(row: Row, field: str) -> str:
    return '' if row.get(field) is None else f'{row[field] / 1e9:,.3g}'


def _error(row: Row, field: str, scale: float, digits: int) -> str:
    error = f'{field}_se'
    return f' ± {scale * row[error]:.{digits}f}' if error in row and row[error] is not None else ''


def _aligned(texts: Sequence[str], widths: Sequence[int]) -> str:
    padded = [texts[0].ljust(widths[0])] + [text.rjust(width) for text, width in zip(texts[1:], widths[1:])]
    return '  '.join(padded).rstrip()
