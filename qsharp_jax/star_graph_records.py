"""The figure of star graphs from work directories: what `report.star_graph_figure` draws is read from these.

What the figure needs of its runs is written beside it as one file, small enough to be kept in a repository, from which
it is drawn again when the work directories are gone.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from qsharp_jax.data.star_graph_text import right_path
from qsharp_jax.metrics import read_rows, replace_text
from qsharp_jax.report import plots, records, star_graph_figure
from qsharp_jax.report.star_graph_figure import Run, SHOWN

NAME = 'star_graph'  # of the figure

# Of a row of results.jsonl; the rest is neither drawn nor what a reader of the file would miss.
_KEPT = ('method', 'iteration', 'eta', 'temperature', 'learning_rate', 'sweep', 'answers', 'pass@1', 'pass@1_se', 'kl',
         'kl_se', 'difference_to_reference', 'difference_to_reference_se', 'n_examples', 'n_samples', 'commit')

Row = dict[str, Any]


def write(sources: Sequence[Path], out: Path) -> str:
    """Writes the figure below `out`, and returns its accuracies as Markdown.

    Args:
      sources: work directories of runs, finished or not, and files that this function has written; at least one.
      out: directory of the files: star_graph.md, .png, .svg, and .json, which is all that they were made of.

    Raises:
      ValueError: there is none, or one holds no run or one of another task.
    """
    runs = [run for source in sources for run in ([read(source)] if source.is_dir() else load(source))]
    figure = star_graph_figure.draw(runs)
    text = star_graph_figure.markdown(runs)
    plots.save({NAME: figure}, out)
    replace_text(out / f'{NAME}.md', text)
    lines = [json.dumps(dataclasses.asdict(run), allow_nan=False) for run in runs]
    replace_text(out / f'{NAME}.json', '[\n' + ',\n'.join(lines) + '\n]\n')
    return text


def load(path: Path) -> list[Run]:
    """Returns the runs in a file that `write` has written.

    Raises:
      ValueError: there is no such file, or it is another.
    """
    if not path.exists():
        raise ValueError(f'there is no {path}: name work directories of runs, or the star_graph.json of a figure.')
    try:
        return [Run(**run) for run in json.loads(path.read_text(encoding='utf-8'))]
    except (ValueError, TypeError) as error:
        raise ValueError(f'{path} holds no runs on star graphs ({error}): name work directories of runs, or the '
                         'star_graph.json of a figure.') from error


def read(workdir: Path) -> Run:
    """Returns what a run on star graphs has reached so far.

    Raises:
      ValueError: the directory holds no run, or one of another task.
    """
    run = records.read(workdir, samples=False)
    config = run.config
    if config['task']['name'] != 'star_graph':
        raise ValueError(f'{workdir} is a run of the task {config["task"]["name"]!r}, and the figure is of star_graph.')
    graph = config['task']['star_graph']
    per_iteration = (config['collect']['examples'] or graph['train_examples']) * config['collect']['samples']
    chosen = [(row['split'], _kept({'answers': row['iteration'] * per_iteration, **row})) for row in run.results
              if _is_chosen(row, config['sampling']['temperature'])]
    rows = [row for split, row in chosen if split == run.split]
    # As the curves of policies in training, which are of the split that settings are chosen on.
    watched = config['eval']['select_split'] or run.split
    last = {row['method']: row for row in sorted(rows, key=lambda row: row['iteration'])}
    return Run(
        degree=graph['degree'], path_length=graph['path_length'], seed=config['seed'],
        hours=sum(run.timings.values()) / 3600, results=list(last.values()), steps=_steps(workdir, run.split, last),
        values=[*_values(workdir, 'qsharp'), *_values(workdir / 'pairs', 'qsharp_pairs')], curves=_curves(run.metrics),
        guided=[row for split, row in chosen if split == watched and row['method'] == 'qsharp'],
        variant=_variant(config))


def _variant(config: Mapping[str, Any]) -> str:
    """Returns what is other about a value network than in the sizes that are compared."""
    value = config['value']
    if value['type'] == 'q':
        return 'Q-type'
    # With three nodes the goal is what the reference itself expects.
    far = config['task']['star_graph']['path_length'] > 3
    return 'no look ahead' if far and value['extra_input'] == 'restart' and not value['lookahead'] else ''


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


def _kept(row: Row) -> Row:
    return {name: row[name] for name in _KEPT if name in row}


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


def _values(workdir: Path, method: str) -> list[Row]:
    """Returns the held-out loss of the last value network of a work directory by position, as a row of `method`."""
    files = sorted(workdir.glob('calibration/iteration_*.json'), key=lambda path: int(path.stem.split('_')[1]))
    if not files:
        return []
    content = json.loads(files[-1].read_text(encoding='utf-8'))
    return [{'method': method, 'position': row['position'], 'loss': row['loss']} for row in content['by_position']]


def _curves(metrics: Sequence[Row]) -> list[Row]:
    found = []
    for row in metrics:
        method, _, rate = row['stage'].rpartition('_')
        if 'pass@1' in row and method in SHOWN:
            found.append({'method': method, 'learning_rate': float(rate),
                          **{name: row[name] for name in ('answers', 'pass@1', 'pass@1_se')}})
    return found
