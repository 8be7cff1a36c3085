"""report.html: one page, without outside resources, with everything a run has to show."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qsharp_jax import config as config_lib
from qsharp_jax.metrics import replace_text
from qsharp_jax.progress import duration
from qsharp_jax.report import plots, records, tables
from qsharp_jax.report.records import Run

Row = Mapping[str, Any]

_LOW, _HIGH = '224, 138, 30', '50, 115, 220'  # orange and blue: told apart by every kind of colour vision
_CAPTIONS = {
    'pass1_kl': 'Each point is one η (or temperature) of one policy; bars are one standard error.',
    'training': 'The loss of the fit, on training batches and on prompts kept from it.',
    'reliability': 'What the value network predicts on held-out prompts, against what the answers then earned.',
    'by_position': 'Where in an answer its outcome becomes predictable, and how far predictions there can be trusted.',
}


def write(workdir: str | os.PathLike[str]) -> Path:
    """Writes report.html, results.md and plots/*.png, *.svg into a workdir, from its files.

    Returns:
      the path of report.html.

    Raises:
      ValueError: the workdir holds no run, or one of its files cannot be read.
    """
    run = records.read(workdir)
    figures = plots.draw(run)
    plots.save(figures, run.workdir / 'plots')
    select_split = run.config['eval']['select_split']
    frontier = tables.frontier(run.results, run.sweep_split)
    replace_text(run.workdir / 'results.md', '\n'.join([
        tables.markdown(run.results, run.split, select_split), *(f'- {sentence}' for sentence in frontier), '']))
    titles, cells = tables.table(run.results, run.split, select_split)
    shown = questions(run)
    page = _environment().get_template('report.html.jinja').render(
        name=run.workdir.resolve().name,
        task=run.config['task']['name'],
        headline=headline(run),
        facts=_facts(run),
        titles=titles,
        rows=list(zip(tables.of_split(run.results, run.split), cells, strict=True)),
        chosen=tables.chosen_etas(run.results, select_split) if select_split else {},
        caption=tables.caption(run.results, run.split, select_split),
        frontier=frontier,
        warnings=_warnings(run),
        # The figures are drawn here and hold no text from data, so they are the one thing that is not escaped.
        figures=[(name, Markup(plots.inline_svg(figure, name)), _CAPTIONS[name]) for name, figure in figures.items()],
        questions=shown,
        beginning=beginning([question['prompt'] for question in shown]),
        timings=_timings(run.timings),
        config=_config_rows(run.config))
    path = run.workdir / 'report.html'
    replace_text(path, page)
    return path


def summary(workdir: str | os.PathLike[str]) -> str:
    """The table of a workdir's results for a terminal, and what it says about pass@1 at equal KL."""
    run = records.read(workdir)
    return '\n'.join([tables.terminal(run.results, run.split, run.config['eval']['select_split']),
                      *tables.frontier(run.results, run.sweep_split)])


def print_results(workdir: str | os.PathLike[str], markdown: bool = False) -> Path:
    """Writes the report anew, prints its table, and returns the path of report.html.

    Args:
      workdir: of the run.
      markdown: whether to print the table as Markdown; otherwise it is aligned for a terminal.

    Raises:
      ValueError: as `write`.
    """
    path = write(workdir)
    print((path.parent / 'results.md').read_text(encoding='utf-8') if markdown else summary(workdir))
    print(f'\nReport: {path}')
    return path


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(what, number, remark) of the reference and of the best guided policy, whose eta was not chosen on this split."""
    rows = tables.of_split(run.results, run.split)
    temperature = run.config['sampling']['temperature']
    reference = [row for row in rows if row['method'] == 'reference' and row['temperature'] == temperature]
    best = best_guided(run)
    tiles = []
    for row in (*reference[:1], *([best] if best else [])):
        settings = f'η = {row["eta"]:g}' if tables.has_eta(row) else f'temperature {row["temperature"]:g}'
        tiles.append((tables.name(row), f'{100 * row["pass@1"]:.1f} %', f'pass@1, {settings}'))
    if reference and best:
        lift = best['pass@1'] - reference[0]['pass@1']
        tiles.append(('lift', f'{100 * lift:+.1f}', 'points of pass@1'))
        if best['kl'] is not None:
            tiles.append(('distance', f'{best["kl"]:.2f}', 'nats of KL an answer'))
    return tiles


def best_guided(run: Run) -> Row | None:
    """The row of the last Q♯ at the eta chosen on the selection split, or at the configured eta without one."""
    rows = [row for row in tables.of_split(run.results, run.split) if row['method'] == 'qsharp']
    if not rows:
        return None
    last = max(row['iteration'] for row in rows)
    chosen = tables.chosen_etas(run.results, run.config['eval']['select_split'])
    eta = chosen.get(('qsharp', last), float(run.config['eta']))
    return next((row for row in rows if row['iteration'] == last and row['eta'] == eta), None)


def questions(run: Run) -> list[dict[str, Any]]:
    """Questions for the page, each with one answer of the reference and one of the best guided policy."""
    best = best_guided(run)
    temperature = run.config['sampling']['temperature']
    keys = [('reference', 0, None, temperature)] + ([records.policy_key(best)] if best else [])
    grouped: dict[int, list[Row]] = {}
    for row in run.samples:
        if records.policy_key(row) in keys:
            grouped.setdefault(row['id'], []).append(row)
    whole = [rows for rows in grouped.values() if len(rows) == len(keys)]
    count = min(run.config['logging']['report_examples'], len(whole))
    spread = [whole[i * len(whole) // count] for i in range(count)]
    low, high = run.config['value']['v_min'], run.config['value']['v_max']
    return [{
        'prompt': rows[0]['prompt'],
        'answers': [{
            'policy': tables.name(row) + (f', η = {row["eta"]:g}' if tables.has_eta(row) else ''),
            'reward': row['reward'], 'right': row['reward'] is not None and row['reward'] >= high, 'kl': row['kl'],
            'truncated': row['truncated'],
            'tokens': [_token(text, value, low, high) for text, value in
                       zip(row['answer_tokens'], row['values'], strict=True)],
        } for row in sorted(rows, key=lambda row: keys.index(records.policy_key(row)))],
    } for rows in spread]


def beginning(prompts: Sequence[str]) -> str:
    """The whole lines that several prompts all begin with, such as solved examples."""
    shared = os.path.commonprefix(prompts) if len(prompts) > 1 else ''
    return shared[:shared.rfind('\n') + 1]


def _token(text: str, value: float | None, low: float, high: float) -> tuple[str, str, str]:
    """(text, colour of its ground, hint) of a token: orange below the middle of the range, blue above."""
    shown = text.replace('\n', '↵')
    if value is None:
        return shown, 'transparent', 'not scored'
    share = min(max((value - low) / (high - low), 0), 1)
    colour = _HIGH if share >= 0.5 else _LOW
    return shown, f'rgba({colour}, {0.06 + 0.84 * abs(share - 0.5):.2f})', f'expected return {value:.3f}'


def _facts(run: Run) -> list[str]:
    """Short facts for the line under the title."""
    return [f'reference {Path(run.config["reference"]["source"]).name}', f'iterations {run.config["iterations"]}',
            *run.provenance]


def _warnings(run: Run) -> list[str]:
    limit = run.config['sampling']['max_new_tokens']
    return [f'{tables.name(row)}: {row["truncated"]:.0%} of the answers reach the limit of {limit} tokens '
            '(sampling.max_new_tokens).'
            for row in tables.of_split(run.results, run.split) if row['truncated'] > 0.2]


def _timings(timings: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(phase, time in words, share of the longest in percent)."""
    longest = max(timings.values(), default=0)
    return [(name, duration(seconds), 100 * seconds / longest if longest else 0) for name, seconds in timings.items()]


def _config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(key, value, whether it differs from configs/default.py) of every key."""
    default = config_lib.flatten(config_lib.default())
    return [(key, repr(list(value)) if isinstance(value, tuple) else repr(value), default.get(key) != value)
            for key, value in config_lib.flatten(config).items()]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
