"""Progress of long phases: a bar in a terminal, plain lines elsewhere."""
from __future__ import annotations

from collections.abc import Iterator
import contextlib
import resource
import sys
import time
from typing import TextIO

import jax
import tqdm

_seconds_between_lines = 10.0


class Bar:
    """Counts what a phase has done.

    Attributes:
      count: how much is done, what was done before the start included.
    """

    def __init__(self, name: str, total: int, unit: str, initial: int, stream: TextIO) -> None:
        self.count = initial
        self._name, self._total, self._unit, self._stream = name, total, unit, stream
        self._first = initial
        self._began = self._said = time.monotonic()
        self._compiled: tuple[int, float] | None = None  # count and time when the first part was done
        self._stats: dict[str, float] = {}
        self._tqdm = tqdm.tqdm(
            desc=name, total=total, unit=f' {unit}', initial=initial, file=stream, dynamic_ncols=True,
            smoothing=0.1) if stream.isatty() else None

    def update(self, n: int = 1, **stats: float) -> None:
        """Adds `n`; the latest of each of `stats` is shown beside the count."""
        self.count += n
        self._stats.update(stats)
        if n and self._compiled is None:
            self._compiled = self.count, time.monotonic()
        if self._tqdm is not None:
            self._tqdm.set_postfix({name: f'{value:.3g}' for name, value in self._stats.items()}, refresh=False)
            self._tqdm.update(n)
        elif time.monotonic() - self._said >= _seconds_between_lines and self.count < self._total:
            self._say(self._ahead())

    def close(self, finished: bool) -> None:
        """Ends the bar; a phase that was not `finished` by an error says nothing more."""
        if self._tqdm is not None:
            self._tqdm.close()
        elif finished:
            self._say(f'done in {duration(time.monotonic() - self._began)}, {memory()}')

    def _ahead(self) -> str:
        """Returns rate and time left, or the time so far while nothing is done.

        The rate is that since the first part was done, which is what compiles, as soon as there is a second.
        """
        count, began = self._first, self._began
        if self._compiled is not None and self.count > self._compiled[0]:
            count, began = self._compiled
        seconds = time.monotonic() - began
        if self.count <= count or not seconds:
            return f'{duration(time.monotonic() - self._began)} so far'
        rate = (self.count - count) / seconds
        return f'{rate:.3g} {self._unit}/s, {duration((self._total - self.count) / rate)} left'

    def _say(self, timing: str) -> None:
        self._said = time.monotonic()
        share = f' ({self.count / self._total:.0%})' if self._total else ''
        stats = ''.join(f', {name} {value:.3g}' for name, value in self._stats.items())
        print(f'{self._name}: {self.count}/{self._total} {self._unit}{share}{stats}, {timing}', file=self._stream,
              flush=True)


@contextlib.contextmanager
def bar(name: str, total: int, unit: str, initial: int = 0, stream: TextIO | None = None) -> Iterator[Bar]:
    """A bar for the phase of the `with` block.

    Args:
      name: of the phase, such as 'collect 1/2'.
      total: how much there is to do.
      unit: what is counted, in the plural.
      initial: how much an earlier run has done.
      stream: where to; None is standard error. A terminal gets a bar, anything else plain lines.
    """
    this = Bar(name, total, unit, initial, sys.stderr if stream is None else stream)
    try:
        yield this
    except BaseException:
        this.close(finished=False)
        raise
    this.close(finished=True)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line without spoiling a bar that is on the screen."""
    tqdm.tqdm.write(text, file=sys.stderr if stream is None else stream)


def set_seconds_between_lines(seconds: float) -> None:
    """Sets the pause between two plain lines of a phase."""
    global _seconds_between_lines
    _seconds_between_lines = seconds


def memory() -> str:
    """What was held at most so far, in words: by a device where devices tell, otherwise by this process."""
    told = [stats['peak_bytes_in_use'] for device in jax.local_devices() if (stats := device.memory_stats())]
    if told:
        return f'at most {max(told) / 2 ** 30:.2f} GiB on a device'
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    return f'at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.2f} GiB in memory'


def duration(seconds: float) -> str:
    """A time in words: '42 s', '3 min 05 s', '2 h 07 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60:02d} s'
    return f'{whole // 3600} h {whole % 3600 // 60:02d} min'
