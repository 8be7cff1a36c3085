"""A reward tried on a file of answers before any model runs: what it is, what it takes, what it says."""
from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import inspect
from pathlib import Path
import time
from typing import Any

import numpy as np

from qsharp_jax.data import readers
from qsharp_jax.rewards.registry import load, Reward
from qsharp_jax.rewards.scoring import score

_SHOWN = 5  # slowest rows
_MOST_ATOMS = 101
_TEXT = 60  # characters of a completion
_COMPLETIONS = 'completion', 'response', 'text'  # names of the column with the answers, the first there is
_PROMPTS = 'prompt', 'question'
_TEXTS = 'answer', 'question', 'prompt'  # numbers in these become text, as those of a task do


@dataclasses.dataclass(frozen=True)
class Answers:
    """Rows of a file as a reward is given them.

    Attributes:
      prompts: texts.  # N
      completions: texts.  # N
      columns: everything else, by name.  # lists of N
    """

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]

    def row(self, number: int) -> Answers:
        """Returns one row alone."""
        return Answers(self.prompts[number:number + 1], self.completions[number:number + 1],
                       {name: column[number:number + 1] for name, column in self.columns.items()})


def read(path: Path, completion: str = '') -> Answers:
    """Returns the rows of a JSON Lines file.

    Args:
      path: of the file.
      completion: name of the column with the answers; '' for the first of 'completion', 'response' and 'text'.

    Raises:
      ValueError: the file is not as it should be, with line and what is wrong there.
    """
    if not path.is_file():
        raise ValueError(f'there is no file {path}.')
    rows = list(readers.json_lines(path))
    first = rows[0][1]
    used = [name for name in first if name in readers.RESERVED]
    if used:
        raise ValueError(f'{path} has the column {", ".join(map(repr, used))}, a name that a reward is given something '
                         'else by: rename it.')
    names = [name for name in ((completion,) if completion else _COMPLETIONS) if name in first]
    if not names:
        wanted = repr(completion) if completion else f'none of {", ".join(map(repr, _COMPLETIONS))}'
        raise ValueError(f'{path} has no answers: of its columns {", ".join(map(repr, first))} {wanted} '
                         f'{"is not one" if completion else "is there"}. Name the right one with --completion.')
    for number, row in rows:
        missing = [name for name in first if name not in row]
        if missing:
            raise ValueError(f'{path}, line {number} lacks {", ".join(map(repr, missing))}, which the first row has.')
        if not isinstance(row[names[0]], str):
            raise ValueError(f'{path}, line {number} has {row[names[0]]!r} as its answer ({names[0]!r}); it must be '
                             'text.')
        row.update({name: str(row[name]) for name in _TEXTS
                    if isinstance(row.get(name), (int, float)) and not isinstance(row[name], bool)})
    prompt = next((name for name in _PROMPTS if name in first), None)
    return Answers(
        prompts=[str(row[prompt]) if prompt else '' for _, row in rows],
        completions=[row[names[0]] for _, row in rows],
        columns={name: [row[name] for _, row in rows] for name in first if name not in (names[0], 'prompt')})


def report(spec: str, answers: Answers, *, workers: int | None, timeout_seconds: float) -> Iterator[str]:
    """Yields what there is to say of a reward, line by line.

    Args:
      spec: as `reward` of a config.
      answers: to try it on.
      workers: as `reward_options.workers`; None: 0, or 1 for a reward that needs them. With workers every answer is
        graded alone.
      timeout_seconds: as `reward_options.timeout_seconds`.

    Raises:
      RewardError: as `score`.
    """
    reward = load(spec)
    if workers is None:
        workers = int(any(term.registered.in_workers for term in reward.terms))
    yield from _styles(reward)
    yield ('graded         '
           + (f'one at a time, in {workers} worker process{"es" if workers > 1 else ""}' if workers else
              'all at once, in this process, where nothing ends what hangs (--workers=1 does)'))

    def graded(some: Answers) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        earned = score(reward, some.prompts, some.completions, some.columns, workers=workers,
                       timeout_seconds=timeout_seconds, on_error='stop')
        return earned, time.perf_counter() - began

    graded(answers.row(0))  # whatever is loaded or compiled at first
    earned, seconds = graded(answers)
    yield f'rows           {len(earned)}, in {seconds:.3g} s ({1000 * seconds / len(earned):.3g} ms a row)'
    again, _ = graded(answers)
    alone = [graded(answers.row(number)) for number in range(len(answers.completions))]
    separate = np.concatenate([one for one, _ in alone])
    yield from _slowest(answers.completions, np.array([taken for _, taken in alone]))
    yield (f'abstentions    {np.isnan(earned).sum()} of {len(earned)}'
           + (' (where it took too long or died, a warning says so)' if workers and np.isnan(earned).any() else ''))
    yield f'deterministic  {_agreement(earned, again, "called again")}'
    if not workers:
        yield f'row by row     {_agreement(earned, separate, "called on one row alone")}'
    yield from _values(earned[~np.isnan(earned)], answers.completions, ~np.isnan(earned))


def run(spec: str, data: Path, completion: str, workers: int | None, timeout_seconds: float) -> None:
    """Prints the report on a reward and a file; see `read` and `report`."""
    for line in report(spec, read(data, completion), workers=workers, timeout_seconds=timeout_seconds):
        print(line, flush=True)


def _styles(reward: Reward) -> list[str]:
    lines = []
    for term in reward.terms:
        style = {'batch': 'function(prompts, completions, **columns)',
                 'verl': "verl's compute_score(data_source, solution_str, ground_truth, extra_info)"}
        asynchronous = 'async ' if inspect.iscoroutinefunction(term.function) else ''
        takes = 'every column' if term.accepted is None else ', '.join(term.accepted)
        lines.append(f'reward         {term.weight:g} * {term.name}: {asynchronous}{style[term.style]}; takes {takes}')
    return lines


def _slowest(completions: Sequence[str], times: np.ndarray) -> list[str]:
    lines = [f'one row alone  median {1000 * np.median(times):.3g} ms, longest {1000 * times.max():.3g} ms; slowest:']
    for number in np.argsort(-times, kind='stable')[:_SHOWN]:
        text = completions[number]
        shown = text if len(text) <= _TEXT else f'{text[:_TEXT]}…'
        lines.append(f'  row {number:<8} {1000 * times[number]:8.3g} ms  {shown!r}')
    return lines


def _agreement(first: np.ndarray, second: np.ndarray, what: str) -> str:
    differ = np.flatnonzero(~((first == second) | (np.isnan(first) & np.isnan(second))))
    if not len(differ):
        return f'yes: the same values when {what}'
    row = differ[0]
    return f'NO: {len(differ)} values differ when {what}; row {row} earned {first[row]:g}, then {second[row]:g}'


def _values(earned: np.ndarray, completions: Sequence[str], kept: np.ndarray) -> list[str]:
    """Returns what the values are like, and what value network fits them.

    Args:
      earned: values, without abstentions.  # [n]
      completions: texts.  # N
      kept: which of them have a value.  # [N] bool
    """
    if not len(earned):
        return ['values         none: every row abstains']
    counts: Mapping[float, int] = collections.Counter(earned.tolist())
    value, most = max(counts.items(), key=lambda item: item[1])
    lines = [
        f'values         {len(counts)} different, {earned.min():g} to {earned.max():g}, mean {earned.mean():.4g}',
        f'equal values   {most / len(earned):.1%} of the rows earn {value:g}'
        + ('; where all answers are equal there is nothing to learn' if len(counts) == 1 else '')]
    lengths = np.array([len(text) for text, there in zip(completions, kept, strict=True) if there], float)
    if len(counts) > 1 and lengths.std() > 0:
        correlation = float(np.corrcoef(lengths, earned)[0, 1])
        lines.append(f'length         correlation of value and characters {correlation:+.2f}'
                     + (': does it pay for length alone?' if abs(correlation) > 0.5 else ''))
    if len(counts) > 1:
        lines.append(f'value network  {_head(np.unique(earned))}')
    return lines


def _head(values: np.ndarray) -> str:
    """Returns the keys of a value network whose support has all the values, of which there are two or more."""
    span = f'--config.value.v_min={values[0]:g} --config.value.v_max={values[-1]:g}'
    if len(values) == 2:
        return f'--config.value.head=bernoulli {span}'
    steps = (values - values[0]) / np.diff(values).min()
    keys = f'--config.value.head=categorical {span}'
    if np.allclose(steps, steps.round()) and steps[-1] < _MOST_ATOMS:
        return f'{keys} --config.value.num_atoms={round(steps[-1]) + 1} (an atom on every value seen)'
    return f'{keys} --config.value.projection=two_hot (no {_MOST_ATOMS} atoms lie on every value seen)'
