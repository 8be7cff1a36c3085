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
from qsharp_jax.rewards.builtin import star_graph_arm

NAME = 'star_graph'  # of the figure

# Of a row of results.jsonl; the rest is neither drawn nor what a reader of the file would miss.
_KEPT = ('method', 'iteration', 'eta', 'temperature', 'learning_rate', 'sweep', 'answers', 'pass@1', 'pass@1_se', 'kl',
         'kl_se', 'difference_to_reference', 'difference_to_reference_se', 'difference_to_cd', 'difference_to_cd_se',
         'n_examples', 'n_samples', 'commit')
_DRAWN = ('method', 'answers', 'pass@1', 'pass@1_se')
_STEP, _VALUE = ('method', 'step', 'accuracy', 'se', 'count'), ('method', 'position', 'loss')
_FEWEST = 30  # answers that come to a step: of fewer, its accuracy says nothing

Row = dict[str, Any]


def write(sources: Sequence[Path], out: Path) -> str:
    """Writes the figure below `out`, and returns its accuracies as Markdown.

    Args:
      sources: work directories of runs, finished or not, and files that this function has written; at least one.
      out: directory of the files: star_graph.md, .png, .svg, and .json, which is all that they were made of.

    Raises:
      ValueError: there is none, or one holds no run or one of another task, or two hold the same.
    """
    found: dict[tuple[Any, ...], tuple[Run, Path]] = {}
    for source in sources:
        for run in [read(source)] if source.is_dir() else load(source):
            # Of one graph and as many answers, runs that differ in the seed are averaged.
            one = run.graph, run.answers, run.variant, run.seed
            other, before = found.setdefault(one, (run, source))
            if other != run:
                raise ValueError(
                    f'{before} and {source} both have a run on G({run.degree}, {run.path_length}) with {run.answers:,} '
                    f'answers and seed {run.seed}{", " if run.variant else ""}{run.variant}, and they are not the '
                    'same: leave one of them out.')
    runs = [run for run, _ in found.values()]
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
        runs = [Run(**run) for run in json.loads(path.read_text(encoding='utf-8'))]
        for run in runs:
            for rows, names in ((run.results, _DRAWN), (run.earlier, _DRAWN), (run.guided, _DRAWN),
                                (run.curves, (*_DRAWN, 'learning_rate')), (run.steps, _STEP), (run.values, _VALUE)):
                if not all({*names} <= {*row} for row in rows):
                    raise ValueError(f'a row lacks one of {", ".join(names)}')
        return runs
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
    fits = {'qsharp': _last_fit(workdir), 'qsharp_pairs': _last_fit(workdir / 'pairs')}
    answers = {method: _answers(workdir, run.split, row) for method, row in last.items()}
    return Run(
        degree=graph['degree'], path_length=graph['path_length'], seed=config['seed'],
        hours=sum(run.timings.values()) / 3600,
        results=[{**row, **_arms(answers[method])} for method, row in last.items()],
        earlier=[row for row in rows if row['iteration'] < last[row['method']]['iteration']],
        steps=[{'method': method, **step} for method, own in answers.items() for step in step_accuracy(own)],
        values=_values(fits), curves=_curves(run.metrics),
        fits=[{'method': method, **{name: fit[name] for name in ('learning_rate', 'sweep')}}
              for method, fit in fits.items() if 'sweep' in fit],
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


def step_accuracy(answers: Sequence[tuple[str, str]]) -> list[Row]:
    """Returns `accuracy` of each `step`, its `count` of answers and `se`, half of Wilson's interval of one deviation.

    Step 0 is the centre, step l the end behind the last node, so that the product is the share of right answers.
    Counted are those that are right up to that step; steps that fewer than 30 come to are left out.

    Args:
      answers: question and text of each.
    """
    leading, steps = [], 0
    for question, text in answers:
        wanted = [*map(str, right_path(question)), None]  # no node behind the last
        steps = max(steps, len(wanted))
        nodes = [*text.strip().split(','), None]
        leading.append(next((step for step, (given, right) in enumerate(zip(nodes, wanted)) if given != right),
                            len(wanted)))
    found = []
    for step in range(steps):
        reached = sum(count >= step for count in leading)
        if reached < _FEWEST:
            break
        share = sum(count > step for count in leading) / reached
        error = math.sqrt(share * (1 - share) / reached + 1 / (2 * reached) ** 2) / (1 + 1 / reached)
        found.append({'step': step, 'accuracy': share, 'se': error, 'count': reached})
    return found


def _is_chosen(row: Row, temperature: float) -> bool:
    """Whether a row is shown: of several eta, that chosen on validation; of the reference, the sampler's own."""
    if row['method'] == 'reference':
        return bool(row['temperature'] == temperature)
    return row['method'] in SHOWN and bool(row['selected'])


def _kept(row: Row) -> Row:
    return {name: row[name] for name in _KEPT if name in row}


def _answers(workdir: Path, split: str, row: Row) -> list[tuple[str, str]]:
    """Returns question and text of each answer that a row of results is of."""
    method = row['method']
    home, name = (workdir / 'pairs', method.removesuffix('_pairs')) if method.endswith('_pairs') else (workdir, method)
    stem = f'{name}_{row["iteration"]}' if row['iteration'] else name
    for directory in sorted((home / 'samples' / split).glob(f'{stem}-*')):
        found = [one for path in sorted(directory.glob('*.jsonl')) for one in read_rows(path)
                 if (_finite(one['eta']), one['temperature']) == (row['eta'], row['temperature'])]
        # Of another learning rate's policy, which was chosen before, answers may be there as well.
        if found and math.isclose(sum(one['reward'] or 0 for one in found) / len(found), row['pass@1'], abs_tol=1e-9):
            return [(one['prompt'], one['text']) for one in found]
    return []


def _arms(answers: Sequence[tuple[str, str]]) -> Row:
    """Returns the share of answers that are an arm of the graph, whether or not it is the goal's."""
    if not answers:
        return {}
    questions, texts = zip(*answers)
    return {'arms': sum(star_graph_arm(texts, questions)) / len(texts)}


def _finite(eta: float | None) -> float | None:
    return eta if eta is not None and math.isfinite(eta) else None


def _last_fit(workdir: Path) -> Row:
    """Returns what is known of the last value network of a work directory; nothing if there is none."""
    files = sorted(workdir.glob('calibration/iteration_*.json'), key=lambda path: int(path.stem.split('_')[1]))
    return dict(json.loads(files[-1].read_text(encoding='utf-8'))) if files else {}


def _values(fits: Mapping[str, Row]) -> list[Row]:
    """Returns the held-out loss of value networks by position, as rows of the methods that they are named after."""
    return [{'method': method, 'position': row['position'], 'loss': row['loss']}
            for method, fit in fits.items() for row in (fit['by_position'] if fit else [])]


def _curves(metrics: Sequence[Row]) -> list[Row]:
    found = []
    for row in metrics:
        method, _, rate = row['stage'].rpartition('_')
        if 'pass@1' in row and method in SHOWN:
            found.append({'method': method, 'learning_rate': float(rate),
                          **{name: row[name] for name in ('answers', 'pass@1', 'pass@1_se')}})
    return found
