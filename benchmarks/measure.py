"""Two processes that take turns, and what their times amount to."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

DISTURBED = 0.05  # share of the machine that others may take in a round
_PATIENCE = 2  # rounds at most, as a multiple of those wanted

ROOT = Path(__file__).resolve().parents[1]

Reply = dict[str, float]


class Worker:
    """One side in a process of its own, which sleeps between calls."""

    def __init__(self, side: str) -> None:
        """`side` is 'ours' or 'peer'."""
        self._side = side
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.worker', side], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment())

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """Returns the result of a call.

        Raises:
          RuntimeError: the call failed; with what the process said.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = ''
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({'call': name, **arguments}) + '\n')
            process.stdin.flush()
            line = process.stdout.readline()
        answer = json.loads(line) if line else {'error': _ended(process.wait())}
        if 'error' in answer:
            raise RuntimeError(f'{self._side}, {name}: {answer["error"]}')
        return answer['result']

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _ended(code: int) -> str:
    """Returns what is said of a process that ended with this code."""
    if code == -signal.SIGKILL:
        return 'its process was killed, as the system does when memory runs out.'
    return f'its process has ended with code {code}; see above.'


def environment() -> dict[str, str]:
    """Returns the variables of a process that imports this checkout and, unless told otherwise, runs on the CPU."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {'JAX_PLATFORMS': 'cpu', **os.environ, 'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': path}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
      worker: where it is done.
      call: name of what is called there; it returns `seconds` and `tokens` among others.
      arguments: of the call.
    """

    worker: Worker
    call: str
    arguments: Mapping[str, Any]

    def run(self) -> Reply:
        """Does the work once. Adds to the reply `others`, the share of the machine that other processes took."""
        began, clock = _busy(self.worker.pid), time.perf_counter()
        reply: Reply = self.worker.call(self.call, **self.arguments)
        busy = _busy(self.worker.pid) - began
        capacity = (time.perf_counter() - clock) * (os.cpu_count() or 1)
        return {**reply, 'others': round(max(busy, 0.0) / capacity, 3)}


def alternate(contenders: Mapping[str, Contender], repeats: int, warm_ups: int = 1) -> dict[str, list[Reply]]:
    """Returns the replies of each contender, by label, to as many rounds in which all take one turn each.

    A round in which other processes took more than `DISTURBED` of the machine is done again, for a while; after that
    those are kept in which they took least. Times play no part in the choice.

    Args:
      contenders: by label.
      repeats: rounds that count.
      warm_ups: rounds before, which do not: there programs are compiled and memory is touched.
    """
    for _ in range(warm_ups):
        for contender in contenders.values():
            contender.run()
    rounds: list[dict[str, Reply]] = []

    def disturbance(one: Mapping[str, Reply]) -> float:
        return max(reply['others'] for reply in one.values())

    for _ in range(_PATIENCE * repeats):
        rounds.append({label: contender.run() for label, contender in contenders.items()})
        if sum(disturbance(one) <= DISTURBED for one in rounds) == repeats:
            break
    # In the order of time.
    kept = sorted(sorted(range(len(rounds)), key=lambda number: disturbance(rounds[number]))[:repeats])
    return {label: [rounds[number][label] for number in kept] for label in contenders}


def _busy(pid: int) -> float:
    """Returns the seconds of all cores that went to anything but a process so far; 0 where Linux does not tell."""
    try:
        fields = Path('/proc/stat').read_text(encoding='ascii').split(maxsplit=9)[1:9]
        own = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupts, soft, stolen = map(int, fields)
    # Of its own: time in user mode and in the kernel, the 14th and 15th field of proc_pid_stat(5).
    ticks = user + nice + system + interrupts + soft + stolen - int(own[11]) - int(own[12])
    return ticks / os.sysconf('SC_CLK_TCK')


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Returns median, least and greatest."""
    return {'median': statistics.median(numbers), 'min': min(numbers), 'max': max(numbers)}


def rates(replies: Sequence[Reply], amount: str = 'tokens') -> list[float]:
    """Returns what was done per second in each reply."""
    return [reply[amount] / reply['seconds'] for reply in replies]


def result(name: str, settings: Mapping[str, Any], replies: Mapping[str, Sequence[Reply]], base: str,
           amount: str = 'tokens', **more: Any) -> dict[str, Any]:
    """Returns one row of a results file.

    Args:
      name: of the row.
      settings: what was measured.
      replies: of each contender, by label, in the order of the rounds.
      base: label of the contender that the others are divided by.
      amount: what is counted per second.
      more: what else belongs to the row.
    """
    found = {label: rates(list(own), amount) for label, own in replies.items()}
    return {
        'name': name, 'settings': dict(settings), 'per_second': amount, 'base': base,
        'rates': {label: spread(own) for label, own in found.items()},
        # Within a round both sides saw the same machine.
        'ratios': {label: spread([one / other for one, other in zip(own, found[base], strict=True)])
                   for label, own in found.items() if label != base},
        'repeats': {label: list(own) for label, own in replies.items()}, **more}


def number(value: float) -> str:
    """Returns a number as tables have it, of three places or more."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
