"""A table or figure of the paper from work directories: Markdown, LaTeX, and plots."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qsharp_jax.metrics import replace_text
from qsharp_jax.report import comparison, paper, plots, tables
from qsharp_jax.report.comparison import Cell, Possible
from qsharp_jax.report.records import Run

NAMES = (*paper.TABLES, 'fig3')


def write(number: str, workdirs: Sequence[Path], out: Path, possible: Sequence[Possible] = ()) -> str:
    """Writes a table or figure below `out`, and returns it as Markdown.

    Args:
      number: one of `NAMES`.
      workdirs: of runs, finished or not; none is needed.
      out: directory of the files: table_<number>.md, .tex, .png and .svg, or fig3.md and fig3_<run>.png and .svg.
      possible: runs whose commands are named where a number is missing.

    Raises:
      ValueError: there is no such table, or a directory holds no run.
    """
    if number not in NAMES:
        raise ValueError(f'--table is {number!r}; it must be one of {", ".join(NAMES)}.')
    runs = comparison.read(workdirs)
    out.mkdir(parents=True, exist_ok=True)
    if number == 'fig3':
        text, figures = _frontier(runs, possible)
        name = 'fig3'
    else:
        table = paper.TABLES[number]
        found = comparison.cells(table, runs, possible)
        text, name = comparison.markdown(table, found), f'table_{number}'
        replace_text(out / f'{name}.tex', comparison.latex(table, found))
        figures = _plots(name, found)
    replace_text(out / f'{name}.md', text)
    plots.save(figures, out)
    return text


def _plots(name: str, found: Sequence[Cell]) -> dict[str, Figure]:
    """Accuracies and KL have a plot each."""
    figures = {}
    with plots.style():
        for suffix, unit in (('', '%'), ('_kl', 'nats')):
            kept = [cell for cell in found if cell.metric.endswith(unit)]
            if kept:
                figures[name + suffix] = plots.beside_paper(
                    [f'{cell.setting}: {cell.policy}, {cell.metric.split(",")[0]}' for cell in kept],
                    [cell.paper for cell in kept], [cell.ours for cell in kept], [cell.error for cell in kept],
                    'per cent' if unit == '%' else 'nats an answer')
    return figures


def _frontier(runs: Sequence[Run], possible: Sequence[Possible]) -> tuple[str, dict[str, Figure]]:
    """pass@1 against KL on the split that eta is chosen on, of each run."""
    figures, parts = {}, []
    with plots.style():
        for run in runs:
            split = run.config['eval']['select_split'] or run.split
            if not tables.of_split(run.results, split):
                continue
            figures[f'fig3_{run.workdir.resolve().name}'] = plots.pass1_against_kl(run.results, split)
            parts += [f'### {run.workdir.resolve().name}: {run.config["task"]["name"]}, '
                      f'{Path(run.config["reference"]["source"]).name}\n', tables.markdown(run.results, split, split),
                      f'Run: {", ".join(run.provenance)}.\n',
                      *(f'- {sentence}' for sentence in tables.frontier(run.results, split)), '']
    if not parts:
        parts = ['Missing. Each of these runs fills it in:\n', *(f'- `{one.command}`' for one in possible), '']
    title = ('Figure 3 of the paper: pass@1 against KL, GSM8K, validation. The paper says that Q♯ lies above CD '
             'throughout, and gives neither numbers nor the values of η.\n')
    return '\n'.join([title, *parts]), figures
