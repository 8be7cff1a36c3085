"""Calling a reward: what it is given, what it may return, and what happens when it fails or hangs."""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
import concurrent.futures
import contextlib
import difflib
import inspect
import logging
import math
import numbers
import time
import traceback
from typing import Any

import numpy as np

from qsharp_jax.rewards import processes
from qsharp_jax.rewards.registry import load, Reward, RewardError, Term, VERL_ARGUMENTS

_SHOWN = 200  # characters of a text in a message
_HANG = 20  # seconds that a task takes which is to be killed far earlier

_logger = logging.getLogger(__name__)


class _Failed(Exception):
    """The function raised; the cause is what it raised."""


def score(reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]], *,
          workers: int, timeout_seconds: float, on_error: str) -> np.ndarray:
    """Returns what each completion earns; NaN where a function abstained by returning None.  # [N] float64

    Args:
      reward: from `load`.
      prompts: texts.  # N
      completions: texts, without the token that ended them.  # N
      columns: what else is known of each row, by name.  # lists of N
      workers: processes that grade, one answer at a time; 0 grades in this process, all answers in one call.
      timeout_seconds: for one answer, with workers: one that takes longer loses its worker and abstains, as does one
        whose worker dies.
      on_error: when a function raises, or returns for a row what is no finite number: 'stop' with an error, or
        'abstain' in that row.

    Raises:
      RewardError: naming function, row and text, with the function's own exception as its cause. Also if a function
        returns a wrong number of values, or needs a column that there is not.
    """
    if on_error not in ('stop', 'abstain'):
        raise RewardError(f"on_error is {on_error!r}; it is 'stop' or 'abstain'.")
    check_columns(reward, columns)
    _check_workers(reward, workers)
    if workers > 0 and not timeout_seconds > 0:
        raise RewardError(f'timeout_seconds is {timeout_seconds:g}; it must be above 0.')
    if workers > 0:
        return _score_in_workers(reward, workers, prompts, completions, columns, timeout_seconds, on_error)
    total = np.zeros(len(completions))
    for term in reward.terms:
        total += term.weight * np.array(_grade(term, prompts, completions, columns, on_error, 0), np.float64)
    return total


def check_canaries(reward: Reward, prompts: Sequence[str], answers: Sequence[str],
                   columns: Mapping[str, Sequence[Any]], *, workers: int, timeout_seconds: float,
                   on_error: str) -> None:
    """Grades each answer, and beside it wrong ones: those of other rows. Call it before anything costly.

    Before that, worker processes that a reward needs must say of its own canaries what these earn, and be killed when
    they take too long.

    An answer becomes a completion in the form that the reward looks for (`Reward.as_completion`).

    A registered reward that gives the right one no more than any of these is an error. A function of the user's own may
    mean to reward something else, so it gets a warning.

    Args:
      reward: from `load`.
      prompts: texts.  # N
      answers: the right ones.  # N
      columns: as in `score`.
      workers: as in `score`.
      timeout_seconds: as in `score`.
      on_error: as in `score`.

    Raises:
      RewardError: as `score`, and as above.
    """
    _check_workers(reward, workers)
    _check_processes(reward, workers, timeout_seconds)
    right_ones = [reward.as_completion(answer) for answer in answers]
    # Another row's answer may be the right one in another form. A digit makes another answer of a number, a letter and
    # an expression.
    wrong_ones = [[reward.as_completion(other) for other in dict.fromkeys(
        (*answers[row + 1:], *answers[:row], f'{answer}7')) if other != answer] for row, answer in enumerate(answers)]
    tried = [(row, text) for row, right in enumerate(right_ones) for text in (right, *wrong_ones[row])]
    earned = iter(score(
        reward, [prompts[row] for row, _ in tried], [text for _, text in tried],
        {name: [column[row] for row, _ in tried] for name, column in columns.items()},
        workers=workers, timeout_seconds=timeout_seconds, on_error=on_error).tolist())
    for row, (right_one, texts) in enumerate(zip(right_ones, wrong_ones, strict=True)):
        right, less = next(earned), [next(earned) for _ in texts]
        if not any(value < right or math.isnan(value) for value in less) or math.isnan(right):
            message = (f'reward {reward.spec!r} does not tell right from wrong: to {_short(prompts[row])} the right '
                       f'answer {_short(right_one)} earns {_words(right)} and the wrong one {_short(texts[0])} '
                       f'earns {_words(less[0])}.')
            if not any(':' in term.name for term in reward.terms):
                raise RewardError(f'{message} Choose a reward that fits the task.')
            _logger.warning('%s If it is meant to, ignore this.', message)
            return


def _check_workers(reward: Reward, workers: int) -> None:
    """Raises RewardError if a function may hang and would be graded in this process."""
    if workers < 0:
        raise RewardError(f'workers is {workers}; it is a number of processes, 0 for none.')
    for term in reward.terms:
        if term.registered.in_workers and workers == 0:
            raise RewardError(f'reward {term.name!r} may take for ever on what a model writes, so it is graded in '
                              'processes that can be killed: set reward_options.workers to 1 or more.')


def _check_processes(reward: Reward, workers: int, timeout_seconds: float) -> None:
    """Raises RewardError unless worker processes grade canaries as they should, and are killed when they hang."""
    terms = [term for term in reward.terms if term.registered.in_workers]
    for term in terms:
        answers, completions, rewards = zip(*term.registered.canaries)
        earned = _score_in_workers(load(term.name), workers, [''] * len(answers), completions, {'answer': answers},
                                   timeout_seconds, 'stop')
        for answer, completion, right, found in zip(answers, completions, rewards, earned):
            if found != right:
                raise RewardError(
                    f'reward {term.name!r} fails its own canary: where the answer is {answer!r}, {completion!r} must '
                    f'earn {right:g}, and earns {_words(found)}. What it grades with is broken, or of versions that '
                    'were not tried: install those of constraints.txt. If it took too long, raise '
                    'reward_options.timeout_seconds.')
    if terms and not processes.run(reward, workers, time.sleep, [(_HANG,)], _HANG / 40).late:
        raise RewardError(f'a worker process that was to be killed after {_HANG / 40:g} s went on for {_HANG} s: '
                          f'reward {reward.spec!r} could hang for ever. Run it where processes may be killed.')


def _grade(term: Term, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]],
           on_error: str, first: int) -> list[float]:
    """Returns one number a row, NaN for None. Rows are named from `first` on."""
    try:
        values = _call(term, prompts, completions, columns)
    except _Failed as failure:
        if len(completions) == 1:
            return [_failed(term, on_error, first, completions[0], failure.__cause__)]
        # One answer at a time, to find the one that the function cannot grade.
        graded = [_grade(term, prompts[row:row + 1], completions[row:row + 1],
                         {name: column[row:row + 1] for name, column in columns.items()}, on_error, first + row)[0]
                  for row in range(len(completions))]
        if on_error == 'stop':
            raise RewardError(
                f'reward {term.name!r} raised {_what(term, failure.__cause__)} on {len(completions)} answers together, '
                'though not on any of them alone.') from failure.__cause__
        return graded
    return [_number(term, value, on_error, first + row, completions[row]) for row, value in enumerate(values)]


def _call(term: Term, prompts: Sequence[str], completions: Sequence[str],
          columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Returns what the function returns, one value a row."""
    try:
        if term.style == 'verl':
            return [_call_verl(term, completion, {name: column[row] for name, column in columns.items()})
                    for row, completion in enumerate(completions)]
        given = {'prompts': list(prompts), 'completions': list(completions),
                 **{name: list(column) for name, column in columns.items()}}
        if term.accepted is not None:
            given = {name: value for name, value in given.items() if name in term.accepted}
        result = _awaited(term.function(**given))
    except (Exception, SystemExit) as error:  # a run does not end because a function calls sys.exit
        raise _Failed from error
    if isinstance(result, (str, bytes, Mapping)) or not hasattr(result, '__len__') or not hasattr(result, '__iter__'):
        raise RewardError(f'reward {term.name!r} returned {_short(result)} ({type(result).__name__}); it must return '
                          'a list with one number, or None, for each completion.')
    values = list(result)
    if len(values) != len(completions):
        raise RewardError(f'reward {term.name!r} returned {len(values)} values for {len(completions)} completions; it '
                          'must return one for each, and None where it abstains.')
    return values


def _call_verl(term: Term, completion: str, row: Mapping[str, Any]) -> Any:
    given = {
        'data_source': row['data_source'] if 'data_source' in row else '',
        'solution_str': completion,
        # Data in verl's own form have such a column.
        'extra_info': {**row, **row['extra_info']} if isinstance(row.get('extra_info'), Mapping) else dict(row),
        **{'ground_truth': row[name] for name in ('answer', 'ground_truth') if name in row},
    }
    if term.accepted is not None:
        given = {name: value for name, value in given.items() if name in term.accepted}
    result = _awaited(term.function(**given))
    return result['score'] if isinstance(result, Mapping) else result


def _awaited(result: Any) -> Any:
    if not inspect.isawaitable(result):
        return result

    async def wait(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait(result))
    # A notebook runs a loop of its own in this thread.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait(result)).result()


def _number(term: Term, value: Any, on_error: str, row: int, completion: str) -> float:
    """Returns a row's value as a number, NaN for None."""
    if value is None:
        return math.nan
    if isinstance(value, np.bool_) or hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
        value = value.item()
    number = math.nan
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):  # an integer or fraction that no float holds
            number = float(value)
    if math.isfinite(number):
        return number
    if on_error == 'abstain':
        _logger.warning('reward %r returned %s in row %d, which abstains.', term.name, _short(value), row)
        return math.nan
    raise RewardError(
        f'reward {term.name!r} returned {_short(value)} ({type(value).__name__}) in row {row}, for the completion '
        f'{_short(completion)}; it must be a finite number, or None to abstain.')


def _failed(term: Term, on_error: str, row: int, completion: str, cause: BaseException | None) -> float:
    """Returns NaN for a row whose grading raised, or stops."""
    message = f'reward {term.name!r} raised {_what(term, cause)} in row {row}, for the completion {_short(completion)}'
    if on_error == 'stop':
        raise RewardError(f"{message}. Mend the function, or set reward_options.on_error to 'abstain'.") from cause
    _logger.warning('%s; the row abstains.', message)
    return math.nan


def _score_in_workers(reward: Reward, workers: int, prompts: Sequence[str], completions: Sequence[str],
                      columns: Mapping[str, Sequence[Any]], timeout_seconds: float, on_error: str) -> np.ndarray:
    known = [{name: column[row] for name, column in columns.items()} for row in range(len(completions))]
    outcomes = processes.run(reward, workers, _grade_one, [
        (reward.spec, row, prompts[row], completion, known[row], on_error)
        for row, completion in enumerate(completions)], timeout_seconds)
    for rows, what in ((outcomes.late, f'took longer than {timeout_seconds:g} s'),
                       (outcomes.dead, 'killed their workers')):
        if rows:
            _logger.warning('reward %r: %d of %d answers %s and abstain; the first is row %d, %s.', reward.spec,
                            len(rows), len(completions), what, rows[0], _short(completions[rows[0]]))
    return np.array([math.nan if value is None else value for value in outcomes.values], np.float64)


def _grade_one(spec: str, row: int, prompt: str, completion: str, columns: Mapping[str, Any], on_error: str) -> float:
    lists = {name: [value] for name, value in columns.items()}
    return sum(term.weight * _grade(term, [prompt], [completion], lists, on_error, row)[0]
               for term in processes.reward_of_worker(spec).terms)


def check_columns(reward: Reward, columns: Mapping[str, Sequence[Any]]) -> None:
    """Raises RewardError if a function needs a column that there is not."""
    for term in reward.terms:
        _check_columns(term, columns)


def _check_columns(term: Term, columns: Mapping[str, Sequence[Any]]) -> None:
    if term.style == 'verl':
        given = {*VERL_ARGUMENTS}
        if 'ground_truth' in term.required and not {'ground_truth', 'answer'} & {*columns}:
            given.remove('ground_truth')
    else:
        given = {'prompts', 'completions', *columns}
    for name in term.required:
        if name not in given:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f' Did you mean {near[0]!r}?' if near else ''
            raise RewardError(f'reward {term.name!r} needs {name!r}, which the task has no column for; its columns are '
                              f'{", ".join(sorted(columns)) or "none"}.{hint}')


def _what(term: Term, error: BaseException | None) -> str:
    """Returns what was raised, and the last line of the function's own file that it came through."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    place = next((f' at {frame.filename}:{frame.lineno}' for frame in reversed(frames)
                  if frame.filename == str(term.file)), '')
    return f'{type(error).__name__}({str(error)[:_SHOWN]!r}){place}'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN // 2]} … {text[-_SHOWN // 2:]}'


def _words(value: float) -> str:
    return 'nothing (it abstains)' if math.isnan(value) else f'{value:g}'
