"""Results as JSON, and JSON as the tables of docs/performance.md."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
from pathlib import Path
import re
from typing import Any

from benchmarks import measure

Row = Mapping[str, Any]


def keep(path: Path, row: Row, machine: Mapping[str, Any]) -> None:
    """Adds a row to a results file, in the place of one of the same name.

    Args:
      path: of the file; made when missing.
      row: from `measure.result`, or anything with a `name`.
      machine: what it ran on and with.
    """
    rows = read(path)
    rows[row['name']] = {**row, 'machine': dict(machine)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows.values()), indent=1) + '\n', encoding='utf-8')


def read(path: Path) -> dict[str, Row]:
    """Returns the rows of a results file by name; none where there is no file."""
    rows = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
    return {row['name']: row for row in rows}


def sentence(row: Row) -> str:
    """Returns a row in one line."""
    if 'rates' not in row:
        return ', '.join(f'{key} {value:g}' if isinstance(value, float) else f'{key} {value}'
                         for key, value in row.items() if key not in ('name', 'settings'))
    rates = ', '.join(f'{label} {_number(found["median"])}' for label, found in row['rates'].items())
    ratios = ', '.join(f'{label} / {row["base"]} {found["median"]:.2f}' for label, found in row['ratios'].items())
    others = max(reply['others'] for replies in row['repeats'].values() for reply in replies)
    # With others at work the two sides do not suffer alike.
    noise = f'; others took {others:.0%} of the machine' if others > measure.DISTURBED else ''
    return f'{row["per_second"]}/s: {rates}; {ratios}{noise}'


def rewrite(document: Path, results: Path) -> None:
    """Puts the table of each case between its markers, <!-- case --> and <!-- /case -->."""
    if document.exists():
        text = document.read_text(encoding='utf-8')
        document.write_text(filled(text, {path.stem: list(read(path).values()) for path in results.glob('*.json')}),
                            encoding='utf-8')


def filled(text: str, rows: Mapping[str, Sequence[Row]]) -> str:
    """Returns a text with a table between the markers of each case that there are rows of."""
    for case, own in rows.items():
        begin, end = f'<!-- {case} -->', f'<!-- /{case} -->'
        table = TABLES.get(case, rates_table)(own)
        between = re.compile(f'{re.escape(begin)}.*?{re.escape(end)}', re.DOTALL)
        text = between.sub(lambda _: f'{begin}\n{table}{end}', text)
    return text


def rates_table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table with one line a row and contender: median (least to greatest), and ratios likewise."""
    lines = [['', 'tokens/s', 'against', 'ratio']]
    for row in rows:
        for label, found in row['rates'].items():
            ratio = row['ratios'].get(label)
            lines.append([f'{row["name"].partition("/")[2]}: {label}', _spread(found),
                          row['base'] if ratio else '', _ratio(ratio) if ratio else ''])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of a header and rows."""
    rule = ['---'] + ['---:'] * (len(lines[0]) - 1)
    return ''.join(f'| {" | ".join(line)} |\n' for line in [lines[0], rule, *lines[1:]])


def _spread(found: Mapping[str, float]) -> str:
    return f'{_number(found["median"])} ({_number(found["min"])} – {_number(found["max"])})'


def _ratio(found: Mapping[str, float]) -> str:
    return f'{found["median"]:.2f} ({found["min"]:.2f} – {found["max"]:.2f})'


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.1f}'


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {}
