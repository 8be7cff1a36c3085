"""Where the time of a program goes: a trace of XLA's own profiler, divided among the parts of the model."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
import re
import tempfile
from typing import Any, NamedTuple

import jax

from qsharp_jax.decoding.candidates import CANDIDATES, VALUE_PASS
from qsharp_jax.decoding.step import REFERENCE_PASS

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_PRODUCT = re.compile(r'/(?:dot_general/[^/]*|dot[^/]*)$')  # those of gradients are `transpose`, but still a dot
_KEYS_COPIED = 'jit(_take)'  # within attention: of rows for their tiles


class Event(NamedTuple):
    """An operation on one thread, in any unit of time."""

    begin: float
    end: float
    name: str


def decode_part(operation: str) -> str:
    """Returns what an operation of a decode step is for, by the name that JAX gives it and that of XLA behind it."""
    if VALUE_PASS in operation:
        return f'value network, {_network_part(operation)}'
    if REFERENCE_PASS in operation:
        return f'reference, {_network_part(operation)}'
    return 'choice of candidates' if f'/{CANDIDATES}/' in operation else 'law and draw'


def fit_part(operation: str) -> str:
    """Returns what an operation of an update is for."""
    if 'Transformer' not in operation:
        return 'loss, clipping and optimizer'
    return f'{"backward" if "transpose(" in operation else "forward"}, {_network_part(operation)}'


def _network_part(operation: str) -> str:
    if '._attend' in operation or _KEYS_COPIED in operation and '/attention/' in operation:
        return 'attention'
    return 'products with weights' if _PRODUCT.search(operation) else 'the rest'


def measure(run: Callable[[], Any], program: jax.stages.Compiled, part: Callable[[str], str]) -> dict[str, float]:
    """Runs a program once under the profiler, and returns the seconds of its parts; they sum to those of the run.

    Args:
      run: which runs the program and waits for it.
      program: the same, compiled: it has the names of its operations.
      part: from the names of an operation, JAX's and then XLA's, to that of a part.
    """
    names = {name: part(f'{operation}/{name}') for name, operation in _INSTRUCTION.findall(program.as_text() or '')}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        file, = Path(folder).rglob('*.xplane.pb')
        threads = [
            [Event(event.start_ns, event.end_ns, names[event.name]) for event in line.events
             if event.name in names]
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines]
    return {name: nanoseconds / 1e9 for name, nanoseconds in divided(threads).items()}


def divided(threads: Iterable[Iterable[Event]]) -> dict[str, float]:
    """Returns the time of each name, from the first event to the last.

    Of events within each other, as a loop and its body, only the innermost counts; where several threads work at once,
    their time is divided among them. A time without any is of what ended last: a large product leaves its work to
    threads that make no note of it, and ends.
    """
    marks = sorted((mark for thread in threads for mark in _innermost(thread)), key=lambda mark: mark[0])
    found: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    for (time, name, change), following in zip(marks, marks[1:]):
        running[name] += change
        span, at_work = following[0] - time, sum(running.values())
        for one, count in (running.items() if at_work else ((name, 1),)):
            found[one] += span * count / max(at_work, 1)
    return {name: time for name, time in found.items() if time}


def _innermost(events: Iterable[Event]) -> list[tuple[float, str, int]]:
    """Returns when, of the events of a thread, the innermost begin (1) and end (-1)."""
    marks: list[tuple[float, str, int]] = []
    open_: list[Event] = []
    for event in [*sorted(events, key=lambda one: (one.begin, -one.end)), None]:
        while open_ and (event is None or open_[-1].end <= event.begin):
            ended = open_.pop()
            marks.append((ended.end, ended.name, -1))
            if open_:
                marks.append((ended.end, open_[-1].name, 1))
        if event is not None:
            if open_:
                marks.append((event.begin, open_[-1].name, -1))
            marks.append((event.begin, event.name, 1))
            open_.append(event)
    return marks
