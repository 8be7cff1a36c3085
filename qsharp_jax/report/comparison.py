"""The paper's tables with our numbers beside them: which run stands where, and what differs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from qsharp_jax import commands
from qsharp_jax import config as config_lib
from qsharp_jax.report import paper, records
from qsharp_jax.report.paper import Column, Table, Variant
from qsharp_jax.report.records import Run
from qsharp_jax.report.tables import METHODS

Row = Mapping[str, Any]
Setting = tuple[str, str, str, bool]

METRICS = {'pass@1': 'pass@1, %', 'maj@k': 'maj@{k}, %', 'best_of_k': 'best of {k}, %',
           'weighted_maj@k': 'weighted maj@{k}, %', 'kl': 'KL, nats',
           'kl_to_first_reference': 'KL to the reference, nats'}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the paper and ours.

    Attributes:
      setting: task and models of the paper.
      policy: the method, and how it is fitted.
      metric: name and unit.
      paper: the paper's number; None if it has none.
      ours: None if it is missing.
      error: standard error of ours; None if it is missing.
      differs: what is otherwise in our run; where our number is missing, what fills it in.
      run: that ours is of; None if it is missing.
    """

    setting: str
    policy: str
    metric: str
    paper: float | None
    ours: float | None
    error: float | None
    differs: str
    run: Run | None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclasses.dataclass(frozen=True)
class Possible:
    """A run that can be made, or gone on with.

    Attributes:
      workdir: where it is kept.
      config: of the run, nested.
      command: that makes it, as it stands.
    """

    workdir: Path
    config: Mapping[str, Any]
    command: str


Configured = TypeVar('Configured', Run, Possible)


def cells(table: Table, runs: Sequence[Run], possible: Sequence[Possible] = ()) -> list[Cell]:
    """Returns every number of a table, in its order, with those of these runs beside it.

    A run stands where its task, reference and value model are the paper's; one of other models stands for the first
    setting that no such run has, so that small runs have a place. How a network is fitted must be as the paper says.

    Args:
      table: of the paper.
      runs: finished or not.
      possible: runs whose commands are named where a number is missing. Those of the paper's models are named in their
        own place; those of others where such runs would stand.
    """
    of_others = [one for one in possible if not any(_is_of(_setting(column), one) for column in table.columns)]
    places = _places(table, [*runs, *of_others])
    found = []
    for column in table.columns:
        setting = _setting(column)
        here = places[setting] if setting in places else []
        run = _fitting(column, [one for one in here if isinstance(one, Run)])
        next_one = (_fitting(column, [one for one in here if isinstance(one, Possible)])
                    or _fitting(column, [one for one in possible if _is_of(setting, one)]))
        # What the paper does not report has a line only where we do.
        if run is None and all(number is None for numbers in column.numbers.values() for number in numbers.values()):
            continue
        for method, numbers in column.numbers.items():
            row = None if run is None else _row(run, table, column, method)
            for metric, number in numbers.items():
                cell = _cell(column, method, metric, number, run, row, table.split)
                if cell.run is None:
                    cell = dataclasses.replace(cell, differs=_filled_by(method, metric, run, row, next_one, possible))
                found.append(cell)
    return found


def _setting(column: Column) -> Setting:
    return *column.setting, column.variant.other_policy


def _places(table: Table, runs: Sequence[Run | Possible]) -> dict[Setting, list[Run | Possible]]:
    """Returns the runs of each setting. Runs of one task and the same models share theirs."""
    alike: dict[tuple[Any, ...], list[Run | Possible]] = {}
    for run in runs:
        value = run.config['value']
        key = (_task(run), run.config['reference']['source'], value['source'], value['init'], value['layers'],
               _guides_another(run.config))
        alike.setdefault(key, []).append(run)
    free = list(dict.fromkeys(map(_setting, table.columns)))
    places: dict[Setting, list[Run | Possible]] = {}
    # The closest first; of equals, in the order of the table and of the runs.
    pairs = sorted(((_closeness(setting, group[0]), -number, setting, group) for group in alike.values()
                    for number, setting in enumerate(free)), key=lambda pair: pair[:2], reverse=True)
    placed: list[int] = []
    for _, _, setting, group in pairs:
        if setting[3] == _guides_another(group[0].config) and setting not in places and id(group) not in placed:
            places[setting] = group
            placed.append(id(group))
    return places


def _closeness(setting: Setting, run: Run | Possible) -> tuple[bool, bool, bool]:
    task, reference, value, other_policy = setting
    return (task == _task(run), other_policy or _is(run.config['reference']['source'], reference),
            _is(run.config['value']['source'], value))


def _is_of(setting: Setting, run: Run | Possible) -> bool:
    """Returns whether a run has the task and the models of a setting."""
    return all(_closeness(setting, run)) and setting[3] == _guides_another(run.config)


def _guides_another(config: Mapping[str, Any]) -> bool:
    """Returns whether the policy is another than the value network was fitted for; on AIME's it is the same."""
    return bool(config['value']['run']) and config['task']['math']['test_set'] != 'aime24'


def _task(run: Run | Possible) -> str:
    name = str(run.config['task']['name'])
    return str(run.config['task']['math']['test_set']) if name == 'math' else name


def _is(source: str, model: str) -> bool:
    return paper.MODELS[model] in Path(source).name.lower()


def _fitting(column: Column, runs: Sequence[Configured]) -> Configured | None:
    """Returns the run whose networks are fitted as the column says.

    Of several it is the one with the fewest iterations that are enough, or with the most where none are told.
    """
    fitting = [run for run in runs if _is_variant(column.variant, run.config)]
    sign = 1 if column.variant.iterations else -1
    return min(fitting, key=lambda run: sign * run.config['iterations'], default=None)


def _is_variant(variant: Variant, config: Mapping[str, Any]) -> bool:
    value = config['value']
    return _guides_another(config) == variant.other_policy and value['type'] == variant.kind and (
        value['head'] in variant.heads and config['fit']['tokens'] == variant.tokens
        and config['iterations'] >= variant.iterations)


def _row(run: Run, table: Table, column: Column, method: str) -> Row | None:
    """Returns the row of a method at its chosen eta, of the column's iteration or of the last."""
    evaluation = run.config['eval']
    split = evaluation['split'] if table.split == 'test' else evaluation['select_split']
    rows = [row for row in run.results if row['method'] == method and row['split'] == split and row['selected']]
    if method == 'qsharp' and column.variant.iterations:
        rows = [row for row in rows if row['iteration'] == column.variant.iterations]
    return max(rows, key=lambda row: row['iteration'], default=None)


def _cell(column: Column, method: str, metric: str, number: float | None, run: Run | None, row: Row | None,
          split: str) -> Cell:
    setting = f'{paper.TASKS[column.task]}, {column.reference} with {column.value}'
    policy = column.names[method] if method in column.names else METHODS[method]
    if column.variant.name and not column.variant.other_policy:
        policy += f', {column.variant.name}'
    k = paper.SETTINGS['eval.samples'] if row is None else row['k']
    name = METRICS[metric].format(k=k)
    ours = None if row is None or metric not in row else row[metric]
    if ours is None or run is None or row is None:
        return Cell(setting, policy, name, number, None, None, '', None)
    scale = 1.0 if metric.startswith('kl') else 100.0
    error = row[f'{metric}_se']
    return Cell(setting, policy, name, number, scale * ours, None if error is None else scale * error,
                '; '.join(_differences(run, row, column, split)), run)


def _settings(config: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The keys that are otherwise than usual, with their values."""
    given = config_lib.flatten(config)
    return [f'{key.split(".")[1]} {given[key]}' for key, value in usual.items() if given[key] != value]


def _of_fit(config: Mapping[str, Any], row: Row, column: Column) -> list[str]:
    """What is otherwise than in the paper about a value network and how it guides."""
    words = _settings(config, paper.GUIDANCE)
    fit, value = config['fit'], config['value']
    if row['method'] == 'qsharp' and row['iteration'] != (column.variant.iterations or paper.ITERATIONS):
        words.append(f'{row["iteration"]} iteration{"s" * (row["iteration"] > 1)}')
    if value['head'] not in column.variant.heads[:1]:
        words.append(f'head {value["head"]}')
    words += _settings(config, {**paper.FITS, 'fit.clip_norm': paper.CLIP_NORM[value['type']]})
    batch = fit['batch_size'] * fit['samples_per_row']
    if batch != paper.BATCH:
        words.append(f'batches of {batch} answers')
    if row['iteration'] > 1 and config['collect']['eta'] != paper.ETA:
        words.append(f'collected at η {config["collect"]["eta"]:g}')
    return words


def _differences(run: Run, row: Row, column: Column, split: str) -> list[str]:
    """What is otherwise than in the paper, in words."""
    config = run.config
    words = []
    if _task(run) != column.task:
        words.append(f'task {_task(run)}')
    for section, model in (('reference', column.reference), ('value', column.value)):
        source = config[section]['source']
        if section == 'value' and not source:
            layers = config['value']['layers']
            words.append('value network from ' + (f'{layers} layers of the reference' if layers else 'the reference'))
        elif not _is(source, model):
            words.append(f'{section} {Path(source).name}')
    words += _settings(config, paper.SETTINGS)
    if row['method'] != 'reference':
        words += _of_fit(config, row, column)
    if row['split'] != split:
        words.append(f'{row["split"]} split')
    if row['n_examples'] != paper.QUESTIONS[split].get(column.task):
        words.append(f'{row["n_examples"]} questions')
    if row['eta'] is not None and row['eta'] != paper.ETA:
        words.append(f'η {row["eta"]:g}')
    if row['eta'] is not None and row['split'] == config['eval']['select_split'] and len(config['eval']['etas']) > 1:
        words.append('η chosen on these questions')
    if row['method'] == 'cd' and config['eval']['cd_network'] == 'shared':
        words.append('CD on the network of Q♯')
    return words


def _filled_by(method: str, metric: str, run: Run | None, row: Row | None, next_one: Possible | None,
               possible: Sequence[Possible]) -> str:
    """Returns the command that fills in a number that is missing, or why none does."""
    if run is None:
        return next_one.command if next_one else 'no run that is planned has it'
    place = run.workdir.resolve()
    command = next((one.command for one in possible if one.workdir.resolve() == place), None) or (
        commands.resume(run.config, run.workdir))
    methods = run.config['eval']['methods']
    if method != 'reference' and method not in methods:
        command += f' --config.eval.methods={",".join([*methods, method])}'
    if metric in ('best_of_k', 'weighted_maj@k') and not run.config['eval']['reward_model']:
        command += ' --config.eval.reward_model=True'
    return command


def rendered(table: Table, found: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Returns titles and cells in text."""
    titles = ['setting of the paper', 'policy', 'measured', 'paper', 'ours', 'difference', 'what differs']
    lines = []
    for cell in found:
        digits = 2 if 'nats' in cell.metric else 1
        ours = '' if cell.ours is None else f'{cell.ours:.{digits}f}' + (
            '' if cell.error is None else f' ± {cell.error:.{digits}f}')
        lines.append([
            cell.setting, cell.policy, cell.metric, '' if cell.paper is None else f'{cell.paper:.{digits}f}',
            ours or 'missing', '' if cell.difference is None else f'{cell.difference:+.{digits}f}',
            cell.differs if ours else f'`{cell.differs}`' if cell.differs.startswith('python') else cell.differs])
    return titles, lines


def caption(table: Table, found: Sequence[Cell]) -> str:
    """What a table is, what its signs mean, and what our numbers were made by."""
    runs = {cell.run.workdir.resolve(): cell.run for cell in found if cell.run}
    ours = '; '.join(f'{path.name} ({", ".join(run.provenance)})' for path, run in runs.items())
    return (f'Table {table.number} of the paper: {table.title}. ± is one standard error, clustered by question; the '
            'paper has none. The difference is ours less the paper\'s.' + (f' Runs: {ours}.' if ours else ''))


def markdown(table: Table, found: Sequence[Cell]) -> str:
    """Returns a table as Markdown."""
    titles, lines = rendered(table, found)
    rows = [titles, ['---'] * 3 + ['---:'] * 3 + ['---'], *lines]
    return ''.join(f'| {" | ".join(text.replace("|", chr(92) + "|") for text in row)} |\n' for row in rows) + (
        f'\n{caption(table, found)}\n')


def latex(table: Table, found: Sequence[Cell]) -> str:
    """Returns a table as LaTeX, of standard packages only."""
    titles, lines = rendered(table, found)
    rows = [' & '.join(map(_escaped, row)) + r' \\' for row in (titles, *lines)]
    return '\n'.join([r'\begin{table}', r'\small', r'\begin{tabular}{lllrrrp{5cm}}', r'\hline', rows[0], r'\hline',
                      *rows[1:], r'\hline', r'\end{tabular}', rf'\caption{{{_escaped(caption(table, found))}}}',
                      r'\end{table}', ''])


_LATEX = {'\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '_': r'\_', '#': r'\#', '$': r'\$', '{': r'\{', '}': r'\}',
          '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '±': r'$\pm$', '♯': r'$^\sharp$', 'η': r'$\eta$',
          'π': r'$\pi$', '`': ''}


def _escaped(text: str) -> str:
    return ''.join(_LATEX[mark] if mark in _LATEX else mark for mark in text)


def read(workdirs: Sequence[Path]) -> list[Run]:
    """Returns the runs of these directories, their configs and results alone.

    Raises:
      ValueError: one of them holds no run.
    """
    return [records.read(workdir, samples=False) for workdir in workdirs]
