"""Processes that grade and can be killed: what hangs or dies costs its own answer and no other."""
from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import dataclasses
import multiprocessing
from typing import Any

import pebble

from qsharp_jax.rewards.registry import load, Reward, RewardError

_TRIES = 3  # pools in a row that may break before it is an error
_LOOK = 1.0  # seconds between two looks at whether a pool that answers nothing is broken

_pools: dict[tuple[str, str, int], pebble.ProcessPool] = {}
_in_worker: dict[str, Reward] = {}  # the reward of a worker process, by its spec


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What came of some tasks.

    Attributes:
      values: what each returned; None for those below.
      late: tasks that took too long.
      dead: tasks whose process died.
    """

    values: list[Any]
    late: list[int]
    dead: list[int]


def run(reward: Reward, workers: int, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]],
        timeout_seconds: float) -> Outcomes:
    """Calls a function on each task in worker processes.

    A pool whose idle processes were killed, as a system short of memory does, is replaced, and what it had not answered
    is asked again.

    Args:
      reward: that the processes are started for.
      workers: number of processes.
      function: of a module; finds its reward by `reward_of_worker`.
      tasks: its arguments.
      timeout_seconds: for one task.

    Raises:
      RewardError: the function raised it, or processes die again and again without any task.
    """
    outcomes = Outcomes([None] * len(tasks), [], [])
    left = list(range(len(tasks)))
    for _ in range(_TRIES):
        left = _ask(pool(reward, workers), function, tasks, left, timeout_seconds, outcomes)
        if not left:
            return outcomes
    raise RewardError(f'the worker processes of reward {reward.spec!r} died while they started or waited, {_TRIES} '
                      'times in a row: what it imports may end them, or the memory of this machine may not do for '
                      f'{workers} of them (reward_options.workers).')


def _ask(processes: pebble.ProcessPool, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]],
         numbers: Sequence[int], timeout_seconds: float, outcomes: Outcomes) -> list[int]:
    """Fills in what comes of these tasks; returns those that are unanswered since the pool broke."""
    futures: dict[int, pebble.ProcessFuture] = {}
    try:
        for number in numbers:
            futures[number] = processes.schedule(function, args=tasks[number], timeout=timeout_seconds)
    except RuntimeError:  # from pebble: it runs nothing here
        pass
    try:
        for number, future in futures.items():
            # A pool that breaks leaves futures that nobody will ever answer.
            while not concurrent.futures.wait([future], timeout=_LOOK).done and processes.active:
                pass
            try:
                outcomes.values[number] = future.result(timeout=0)
            except BrokenProcessPool:
                break
            except concurrent.futures.TimeoutError:
                if not future.done():  # the pool broke without a word
                    break
                outcomes.late.append(number)
            except pebble.ProcessExpired:
                outcomes.dead.append(number)
            except RewardError as error:
                raise RewardError(str(error)) from error  # raised here, in this project's words
        else:
            return [number for number in numbers if number not in futures]
    except BaseException:
        for future in futures.values():
            future.cancel()
        raise
    return list(numbers[list(futures).index(number):])


def pool(reward: Reward, workers: int) -> pebble.ProcessPool:
    """Returns the worker processes of a reward, which live until this process ends."""
    key = reward.spec, reward.digest, workers
    if key in _pools and not _pools[key].active:
        _close(key)
    if key not in _pools:
        _pools[key] = pebble.ProcessPool(
            # Spawned: a fork would copy the threads' locks of the array library.
            workers, context=multiprocessing.get_context('spawn'), initializer=_start_worker, initargs=(reward.spec,))
        atexit.register(_close, key)
    return _pools[key]


def reward_of_worker(spec: str) -> Reward:
    """Returns a reward in a worker process: the one it was started for, or a part of that."""
    if spec not in _in_worker:
        _in_worker[spec] = load(spec)
    return _in_worker[spec]


def _close(key: tuple[str, str, int]) -> None:
    if key in _pools:  # it may have been replaced, and closed, before this process ends
        ended = _pools.pop(key)
        ended.stop()
        ended.join()


def _start_worker(spec: str) -> None:
    reward_of_worker(spec)  # before the time of an answer begins
