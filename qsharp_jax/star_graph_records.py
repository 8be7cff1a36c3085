"""The figure of star graphs from work directories: what `report.star_graph_figure` draws is read from these."""
from __future__ import annotations

from collections.abc import Sequence
import json
import math
from pathlib import Path
from typing import Any

from qsharp_jax.data.star_graph_text import right_path
from qsharp_jax.metrics import read_rows, replace_text
from qsharp_jax.report import plots, star_graph_figure
from qsharp_jax.report.star_graph_figure import Run, SHOWN

NAME = 'star_graph'  # of the figure

Row = dict[str, Any]


def write(workdirs: Sequence[Path], out: Path) -> str:
    """Writes the figure below `out`, and returns its accuracies as Markdown.

    Args:
      workdirs: of runs, finished or not, at least one.
      out: directory of the files: star_graph.md, .png and .svg.

    Raises:
      ValueError: there is none, or one holds no run or one of another task.
    """
    runs = [read(workdir) for workdir in workdirs]
    figure = star_graph_figure.draw(runs)
    text = star_graph_figure.markdown(runs)
    plots.save({NAME: figure}, out)
    replace_text(out / f'{NAME}.md', text)
    return text


def read(workdir: Path) -> Run:
    """Returns what a run on star graphs has reached so far.

    Raises:
      ValueError: the directory holds no run, or one of another task.
    """
    path = workdir / 'config.json'
    if not path.exists():
        raise ValueError(f'{workdir} holds no run: it has no config.json.')
    config = json.loads(path.read_text(encoding='utf-8'))
    if config['task']['name'] != 'star_graph':
        raise ValueError(f'{workdir} is a run of the task {config["task"]["name"]!r}, and the figure is of star_graph.')
    graph, split = config['task']['star_graph'], config['eval']['split']
    per_iteration = (config['collect']['examples'] or graph['train_examples']) * config['collect']['samples']
    rows = [_with_answers(row, per_iteration) for row in read_rows(workdir / 'results.jsonl')
            if row['split'] == split and _is_chosen(row, config['sampling']['temperature'])]
    last = {row['method']: row for row in sorted(rows, key=lambda row: row['iteration'])}
    return Run(
        degree=graph['degree'], path_length=graph['path_length'], results=list(last.values()),
        steps=_steps(workdir, split, last), values=_values(workdir), curves=_curves(workdir),
        guided=[row for row in rows if row['method'] == 'qsharp'])


def step_accuracy(answers: Sequence[tuple[str, str]]) -> list[tuple[int, float, float]]:
    """Returns (step, accuracy, standard error) of each step of the path, from 1, the node after the centre.

    Counted are the answers that are right up to that step; a step that no answer comes to is left out.

    Args:
      answers: question and text of each.
    """
    leading, length = [], 0
    for question, text in answers:
        path = right_path(question)
        length = max(length, len(path))
        nodes = text.strip().split(',')
        right = [given == str(node) for given, node in zip(nodes, path)]
        leading.append(right.index(False) if False in right else len(right))
    found = []
    for step in range(1, length):
        reached = sum(count >= step for count in leading)
        if reached:
            accuracy = sum(count > step for count in leading) / reached
            found.append((step, accuracy, math.sqrt(accuracy * (1 - accuracy) / reached)))
    return found


def _is_chosen(row: Row, temperature: float) -> bool:
    """Whether a row is shown: of several eta, that chosen on validation; of the reference, the sampler's own."""
    if row['method'] == 'reference':
        return bool(row['temperature'] == temperature)
    return row['method'] in SHOWN and bool(row['selected'])


def _with_answers(row: Row, per_iteration: int) -> Row:
    return {'answers': row['iteration'] * per_iteration, **row}


def _steps(workdir: Path, split: str, shown: dict[str, Row]) -> list[Row]:
    found = []
    for method, row in shown.items():
        home, name = (workdir / 'pairs', method.removesuffix('_pairs')) if method.endswith('_pairs') else (
            workdir, method)
        stem = f'{name}_{row["iteration"]}' if row['iteration'] else name
        answers = {
            (one['id'], one['sample']): (one['prompt'], one['text'])
            for path in sorted((home / 'samples' / split).glob(f'{stem}-*/*.jsonl')) for one in read_rows(path)
            if (_finite(one['eta']), one['temperature']) == (row['eta'], row['temperature'])}
        found += [{'method': method, 'step': step, 'accuracy': accuracy, 'se': error}
                  for step, accuracy, error in step_accuracy(list(answers.values()))]
    return found


def _finite(eta: float | None) -> float | None:
    return eta if eta is not None and math.isfinite(eta) else None


def _values(workdir: Path) -> list[Row]:
    files = sorted(workdir.glob('calibration/iteration_*.json'), key=lambda path: int(path.stem.split('_')[1]))
    if not files:
        return []
    content = json.loads(files[-1].read_text(encoding='utf-8'))
    return [{'position': row['position'], 'loss': row['loss']} for row in content['by_position']]


def _curves(workdir: Path) -> list[Row]:
    found = []
    for row in read_rows(workdir / 'metrics.jsonl'):
        method, _, rate = row['stage'].rpartition('_')
        if 'pass@1' in row and method in SHOWN:
            found.append({**row, 'method': method, 'learning_rate': float(rate)})
    return found
