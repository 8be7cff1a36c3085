"""Results as JSON, and JSON as the tables of docs/performance.md."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import math
from pathlib import Path
import re
from typing import Any

from benchmarks import growth, measure
from qsharp_jax.report import tables as report

Row = Mapping[str, Any]

_SETUP = ('cpu', 'cores', 'commit', 'command')


def keep(path: Path, row: Row, machine: Mapping[str, Any]) -> None:
    """Adds a row to a results file, in the place of one of the same name.

    Args:
      path: of the file; made when missing.
      row: from `measure.result`, or anything with a `name`.
      machine: what it ran on and with.
    """
    rows = {one['name']: one for one in read(path)}
    rows[row['name']] = {**row, 'machine': dict(machine)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows.values()), indent=1) + '\n', encoding='utf-8')


def read(path: Path) -> list[Row]:
    """Returns the rows of a results file; none where there is no file."""
    rows: list[Row] = json.loads(path.read_text(encoding='utf-8')) if path.exists() else []
    return rows


def sentence(row: Row) -> str:
    """Returns a row in one line, for the terminal."""
    if 'series' in row:
        return growth.sentence(row)
    if 'rates' not in row:
        return f'{len(row["policies"])} policies'
    if 'seconds' in row:
        return 'seconds to the first token: ' + ', '.join(
            f'{label} {_number(found["median"])}' for label, found in row['seconds'].items())
    rates = ', '.join(f'{label} {_number(found["median"])}' for label, found in row['rates'].items())
    ratios = ', '.join(f'{label} / {row["base"]} {found["median"]:.2f}' for label, found in row['ratios'].items())
    others = max(reply.get('others', 0.0) for replies in row['repeats'].values() for reply in replies)
    # With others at work the two sides do not suffer alike.
    noise = f'; other programs took {others:.0%} of the machine' if others > measure.DISTURBED else ''
    peak = max((reply.get('peak_memory', 0.0) for replies in row['repeats'].values() for reply in replies), default=0.0)
    memory = f'; at most {peak / 2 ** 30:.1f} GiB' if peak else ''
    return f'{row["per_second"]}/s: {rates}; {ratios}{memory}{noise}'


def rewrite(document: Path, results: Path) -> None:
    """Puts the table of each case between its markers, <!-- case --> and <!-- /case -->."""
    text = document.read_text(encoding='utf-8')
    found = {path.stem: read(path) for path in results.glob('*.json')}
    document.write_text(filled(text, found), encoding='utf-8')
    if 'growth' in found:
        growth.draw(found['growth'], str(document.parent / 'figures' / 'growth.png'))


def filled(text: str, rows: Mapping[str, Sequence[Row]]) -> str:
    """Returns a text with a table, and what it was made with, between the markers of each case that has rows."""
    for case, own in rows.items():
        begin, end = f'<!-- {case} -->', f'<!-- /{case} -->'
        if begin not in text or end not in text:
            raise ValueError(f'the document has no place for the case {case}: it needs {begin} and {end}.')
        content = f'{begin}\n{TABLES[case](own)}\n{setup(own)}\n{end}'
        text = text[:text.index(begin)] + content + text[text.index(end) + len(end):]
    return text


def setup(rows: Sequence[Row]) -> str:
    """Returns a sentence on what the rows were made with, for each such setup."""
    found = dict.fromkeys(tuple(row['machine'][key] for key in _SETUP) for row in rows)
    return '\n'.join(f'{cpu}, {cores} cores, at {commit or "no commit"}: `{command.strip()}`.'
                     for cpu, cores, commit, command in found)


def decode_table(rows: Sequence[Row]) -> str:
    """Returns guided against unguided rates, beside the ratios that weights and operations alone would give."""
    lines = [['', 'tokens/s', 'of unguided', 'parameters would make it', 'operations would make it']]
    for row in rows:
        base = row['work'][row['base']]
        for label, found in row['rates'].items():
            work = row['work'][label]
            guided = label != row['base']
            lines.append([_title(row, label), _spread(found), _ratio(row['ratios'][label]) if guided else '',
                          *(f'{base[key] / work[key]:.2f}' if guided else '' for key in ('parameters', 'flops'))])
    return _markdown(lines)


def speculation_table(rows: Sequence[Row]) -> str:
    """Returns what drafts make of the rate; and how often a draft is taken, beside what theory has as its least."""
    timed = [['', 'tokens/s', 'ratio', 'tokens a step', 'KL, nats in all']]
    taken = [['η', 'drafts accepted', 'KL to the sampler, nats a token, at most', 'accepted at least, by theory']]
    for row in rows:
        if 'acceptance' not in row['name']:
            timed += [[_title(row, label), _spread(found),
                       _ratio(row['ratios'][label]) if label != row['base'] else '',
                       f'{row["tokens_a_step"][label]:.2f}', f'{row["kl"][label]:.2f}'] for label, found in
                      row['rates'].items()]
        else:
            eta, label = row['name'].rpartition('=')[2], next(one for one in row['rates'] if one != row['base'])
            kl, least = least_accepted(row)
            taken.append([eta, f'{row["tokens_a_step"][label] - 1:.3f}', f'{kl:.4f}', f'{least:.3f}'])
    return '\n'.join(_markdown(lines) for lines in (timed, taken) if len(lines) > 1)


def least_accepted(row: Row) -> tuple[float, float]:
    """Returns the KL a token that guidance adds to the sampler's, and the share of drafts accepted at least for it.

    A shared noise draws the same from two laws with probability (1 - TV) / (1 + TV) at least, which is convex in TV,
    and the mean TV is at most sqrt(mean KL / 2) (Pinsker, Jensen).
    """
    label = next(one for one in row['rates'] if one != row['base'])
    kl = max(row['kl'][label] - row['kl'][row['base']], 0.0) / row['settings']['tokens']
    distance = min(math.sqrt(kl / 2), 1.0)
    return kl, (1 - distance) / (1 + distance)


def peer_table(rows: Sequence[Row]) -> str:
    """Returns both sides' rates and prefill, and the ratio of the rates."""
    lines = [['', *(f'{side}, tokens/s' for side in _sides(rows)), 'ratio',
              *(f'prefill, {side}' for side in _sides(rows))]]
    for row in rows:
        lines.append([_title(row), *(_spread(found) for found in row['rates'].values()),
                      *(_ratio(found) for found in row['ratios'].values()),
                      *(_number(row['prefill'][side]['tokens'] / row['prefill'][side]['seconds'])
                        for side in row['rates'])])
    return _markdown(lines)


def collect_table(rows: Sequence[Row]) -> str:
    """Returns finished units a second, and how many of the row-steps were of use."""
    lines = [['roll-in', '(question, sample) pairs/s', 'of unguided', 'occupancy']]
    for row in rows:
        for label, found in row['rates'].items():
            ratio = row['ratios'].get(label)
            lines.append([_title(row, label), _spread(found), _ratio(ratio) if ratio else '',
                          f'{row["occupancy"][label]:.0%}'])
    return _markdown(lines)


def fit_table(rows: Sequence[Row]) -> str:
    """Returns both sides' tokens with a loss a second, the ratio, and how much of what they compute is padding."""
    lines = [['samples', *(f'{side}, tokens with loss/s' for side in _sides(rows)), 'ratio',
              *(f'{what}, {side}' for side in _sides(rows) for what in ('tokens computed', 'padding'))]]
    for row in rows:
        work = [row['work'][side] for side in row['rates']]
        lines.append([_title(row), *(_spread(found) for found in row['rates'].values()),
                      *(_ratio(found) for found in row['ratios'].values()),
                      *(text for one in work for text in (
                          f'{one["computed"]:,}', f'{1 - one["real"] / one["computed"]:.0%}'))])
    return _markdown(lines)


def startup_table(rows: Sequence[Row]) -> str:
    """Returns seconds to the first token of both sides, and how often XLA compiled for it and after it."""
    lines = [['', *(f'{side}, s' for side in _sides(rows)), 'XLA compilations', 'at the second batch']]
    for row in rows:
        ours = next(iter(row['repeats'].values()))
        lines.append([_title(row), *(_spread(found) for found in row['seconds'].values()),
                      *(f'{max(reply[key] for reply in ours):.0f}'
                        for key in ('compilations', 'second_compilations'))])
    return _markdown(lines)


def ledger_table(rows: Sequence[Row]) -> str:
    """Returns what an answer and a right answer of each policy cost."""
    quantities = {'reference_tokens': ('reference tokens', 1.0), 'value_tokens': ('value tokens', 1.0),
                  'flops': ('GFLOP', 1e9), 'bytes': ('GB', 1e9), 'seconds': ('s', 1.0)}
    lines = [['policy', 'η', 'pass@1 %', *(f'{title} per {what}' for what in ('answer', 'right answer')
                                           for title, _ in quantities.values())]]
    for row in rows:
        for policy in row['policies']:
            costs = [(policy[f'{name}_per_{what}'], unit) for what in ('answer', 'right_answer')
                     for name, (_, unit) in quantities.items()]
            lines.append([report.name(policy), f'{policy["eta"]:g}' if report.has_eta(policy) else '',
                          f'{100 * policy["pass@1"]:.1f}',
                          *('' if cost is None or math.isnan(cost) else f'{cost / unit:,.3g}'
                            for cost, unit in costs)])
    return _markdown(lines)


TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    'decode': decode_table, 'speculation': speculation_table, 'peer': peer_table, 'collect': collect_table,
    'fit': fit_table, 'startup': startup_table, 'ledger': ledger_table,
    'growth': growth.table}


def _sides(rows: Sequence[Row]) -> list[str]:
    return list(rows[0]['rates'])


def _title(row: Row, label: str = '') -> str:
    """The name of a row without its case, and of a contender, in words."""
    parts = [re.sub('[=_]', ' ', part) for part in (*row['name'].split('/')[1:], label)]
    return ', '.join(filter(None, parts))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ['---'] + ['---:'] * (len(lines[0]) - 1)
    return ''.join(f'| {" | ".join(line)} |\n' for line in [lines[0], rule, *lines[1:]])


def _spread(found: Mapping[str, float]) -> str:
    return f'{_number(found["median"])} ({_number(found["min"])} – {_number(found["max"])})'


def _ratio(found: Mapping[str, float]) -> str:
    return f'{found["median"]:.2f} ({found["min"]:.2f} – {found["max"]:.2f})'


def _number(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
