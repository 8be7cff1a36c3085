"""Results as JSON, and JSON as the tables of docs/performance.md."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import math
from pathlib import Path
import re
from typing import Any

from benchmarks import acceptance, cutoff, growth, measure
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
    if 'parts' in row:
        return 'ms a step: ' + '; '.join(
            f'{side} {sum(parts.values()):.0f}, of which ' + ', '.join(
                f'{part} {milliseconds:.0f}' for part, milliseconds in _longest_first(parts))
            for side, parts in row['parts'].items())
    if 'quantiles' in row:
        return 'tokens in the nucleus: ' + ', '.join(
            f'{float(share):.0%} {size:,}' for share, size in row['quantiles'].items())
    if 'rates' not in row:
        return f'{len(row["policies"])} policies'
    if 'seconds' in row:
        return 'seconds to the first token: ' + ', '.join(
            f'{label} {measure.number(found["median"])}' for label, found in row['seconds'].items())
    rates = ', '.join(f'{label} {measure.number(found["median"])}' for label, found in row['rates'].items())
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
    if taken := list(filter(_is_acceptance, found.get('speculation', []))):
        acceptance.draw(taken, str(document.parent / 'figures' / 'acceptance.png'))


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
    """Returns guided against unguided rates, beside the ratios that weights and operations alone would give.

    Operations if all candidates were computed, and of the tokens that were.
    """
    lines = [['', 'tokens/s', 'of unguided', 'parameters would make it', 'operations would make it',
              'those of tokens computed', 'value tokens a token']]
    for row in rows:
        base = row['work'][row['base']]
        for label, found in row['rates'].items():
            work = row['work'][label]
            cells = [_title(row, label), _spread(found)]
            if label != row['base']:
                one = row['repeats'][label][0]
                tokens = one['value_tokens'] / one['tokens']
                cells += [_ratio(row['ratios'][label]), f'{base["parameters"] / work["parameters"]:.2f}',
                          f'{base["flops"] / work["flops"]:.2f}',
                          f'{base["flops"] / (base["flops"] + tokens * work["flops_a_value_token"]):.2f}',
                          f'{tokens:.1f}']
            lines.append(cells + [''] * (len(lines[0]) - len(cells)))
    return _markdown(lines)


def speculation_table(rows: Sequence[Row]) -> str:
    """Returns what drafts make of the rate; and how often a draft is taken, beside what theory has as its least."""
    timed = [['', 'tokens/s', 'ratio', 'tokens a step', 'KL, nats in all']]
    for row in rows:
        if not _is_acceptance(row):
            timed += [[_title(row, label), _spread(found),
                       _ratio(row['ratios'][label]) if label != row['base'] else '',
                       f'{row["tokens_a_step"][label]:.2f}', f'{row["kl"][label]:.2f}'] for label, found in
                      row['rates'].items()]
    taken = acceptance.lines(list(filter(_is_acceptance, rows)))
    figure = ['![drafts taken against KL](figures/acceptance.png)\n'] if len(taken) > 1 else []
    return '\n'.join([*(_markdown(lines) for lines in (timed, taken) if len(lines) > 1), *figure])


def cutoff_table(rows: Sequence[Row]) -> str:
    """Returns what cut-offs spare, and how far they move the law."""
    return _markdown(cutoff.lines(rows))


def _is_acceptance(row: Row) -> bool:
    return '/acceptance/' in row['name']


def peer_table(rows: Sequence[Row]) -> str:
    """Returns both sides' rates and prefill, and the ratio of the rates."""
    lines = [['', *(f'{side}, tokens/s' for side in _sides(rows)), 'ratio',
              *(f'prefill, {side}' for side in _sides(rows))]]
    for row in rows:
        lines.append([_title(row), *(_spread(found) for found in row['rates'].values()),
                      *(_ratio(found) for found in row['ratios'].values()),
                      *(measure.number(row['prefill'][side]['tokens'] / row['prefill'][side]['seconds'])
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


def profile_table(rows: Sequence[Row]) -> str:
    """Returns the milliseconds of a step, part by part, the longest first; a table for each row and side."""
    texts = []
    for row in rows:
        for side, parts in row['parts'].items():
            lines = [[f'{_title(row)}: {side}', 'ms a step', 'share']]
            total = sum(parts.values())
            for part, milliseconds in _longest_first(parts):
                lines.append([part, measure.number(milliseconds), f'{milliseconds / total:.0%}'])
            texts.append(_markdown([*lines, ['all', measure.number(total), '']]))
    return '\n'.join(texts)


def _longest_first(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: -part[1])


def startup_table(rows: Sequence[Row]) -> str:
    """Returns seconds to the first token of both sides, and how often XLA compiled for it and after it."""
    lines = [['', *(f'{side}, s' for side in _sides(rows)), 'XLA compilations', 'at the second batch']]
    for row in rows:
        ours = next(iter(row['repeats'].values()))
        lines.append([_title(row), *(_spread(found) for found in row['seconds'].values()),
                      *(f'{max(reply[key] for reply in ours):.0f}'
                        for key in ('compilations', 'second_compilations'))])
    return _markdown(lines)


def nucleus_table(rows: Sequence[Row]) -> str:
    """Returns quantiles of the tokens in the sampler's nucleus."""
    shares = list(rows[0]['quantiles'])
    lines = [['', *(f'{float(share):.0%} of steps' for share in shares), 'one token']]
    for row in rows:
        lines.append([_title(row), *(f'{row["quantiles"][share]:,}' for share in shares), f'{row["alone"]:.0%}'])
    return _markdown(lines)


def ledger_table(rows: Sequence[Row]) -> str:
    """Returns what an answer and a right answer of each policy cost."""
    quantities = {'reference_tokens': ('reference tokens', 1.0), 'value_tokens': ('value tokens', 1.0),
                  'flops': ('GFLOP', 1e9), 'bytes': ('GB', 1e9), 'seconds': ('s', 1.0)}
    lines = [['policy', 'order', 'η', 'pass@1 %', 'KL, nats',
              *(f'{title} per {what}' for what in ('answer', 'right answer') for title, _ in quantities.values())]]
    for row in rows:
        for policy in row['policies']:
            costs = [(policy[f'{name}_per_{what}'], unit) for what in ('answer', 'right_answer')
                     for name, (_, unit) in quantities.items()]
            guided = report.has_eta(policy)
            lines.append([report.name(policy), policy['order'] if guided else '',
                          f'{policy["eta"]:g}' if guided else '', f'{100 * policy["pass@1"]:.1f}',
                          f'{policy["kl"]:.2f}',
                          *('' if cost is None or math.isnan(cost) else f'{cost / unit:,.3g}'
                            for cost, unit in costs)])
    return _markdown(lines)


TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    'decode': decode_table, 'cutoff': cutoff_table, 'speculation': speculation_table, 'peer': peer_table,
    'collect': collect_table, 'fit': fit_table, 'profile': profile_table, 'startup': startup_table,
    'nucleus': nucleus_table, 'ledger': ledger_table, 'growth': growth.table}


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
    return f'{measure.number(found["median"])} ({measure.number(found["min"])} – {measure.number(found["max"])})'


def _ratio(found: Mapping[str, float]) -> str:
    return f'{found["median"]:.2f} ({found["min"]:.2f} – {found["max"]:.2f})'
