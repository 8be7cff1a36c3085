"""Bars in terminals, lines elsewhere."""
from __future__ import annotations

import io
import re

import pytest

from qsharp_jax import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def test_lines_come_at_most_every_period_with_rate_and_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.bar('collect 1/2', total=100, unit='answers', stream=stream) as bar:
        for second in range(1, 26):
            clock[0] = second
            bar.update(2, reward=second / 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == 'collect 1/2: 20/100 answers (20%), reward 0.1, 2 answers/s, 40 s left'
    assert lines[1].startswith('collect 1/2: 40/100 answers (40%)')
    assert len(lines) == 3
    done = r'collect 1/2: 50/100 answers \(50%\), reward 0.25, done in 25 s, at most (\d+\.\d\d) GiB in memory'
    held = re.fullmatch(done, lines[2])
    assert held and 0 < float(held[1]) < 100


def test_the_pause_between_lines_can_be_set(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, '_seconds_between_lines', progress._seconds_between_lines)
    progress.set_seconds_between_lines(3)
    stream = io.StringIO()
    with progress.bar('x', total=10, unit='steps', stream=stream) as bar:
        for second in range(1, 10):
            clock[0] = second
            bar.update()
    assert len(stream.getvalue().splitlines()) == 4


def test_the_rate_leaves_out_what_was_done_before(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.bar('fit', total=100, unit='steps', initial=50, stream=stream) as bar:
        assert bar.count == 50
        clock[0] = 10.0
        bar.update(10)
        assert bar.count == 60
    assert '60/100 steps (60%), 1 steps/s, 40 s left' in stream.getvalue()


def test_the_rate_leaves_out_what_the_first_part_took_to_compile(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.bar('fit', total=100, unit='steps', initial=10, stream=stream) as bar:
        for second in (30, 31, 42):
            clock[0] = second
            bar.update(1)
    first, second = stream.getvalue().splitlines()[:2]
    assert first == 'fit: 11/100 steps (11%), 0.0333 steps/s, 44 min 30 s left'
    assert second == 'fit: 13/100 steps (13%), 0.167 steps/s, 8 min 42 s left'


def test_nothing_done_yet_has_no_rate(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.bar('fit', total=4, unit='steps', stream=stream) as bar:
        clock[0] = 20.0
        bar.update(0)
    assert stream.getvalue().splitlines()[0] == 'fit: 0/4 steps (0%), 20 s so far'


def test_a_phase_that_fails_does_not_say_that_it_is_done() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError):
        with progress.bar('fit', total=1, unit='steps', stream=stream):
            raise KeyError
    assert stream.getvalue() == ''


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with progress.bar('fit 1/2', total=4, unit='steps', stream=stream) as bar:
        bar.update(4, loss=0.25)
    shown = stream.getvalue()
    assert '\r' in shown and re.search(r'fit 1/2: 100%.*4/4.*loss=0\.25', shown)


@pytest.mark.parametrize('seconds, words', [
    (0, '0 s'), (59.4, '59 s'), (59.6, '1 min 00 s'), (185, '3 min 05 s'), (3600, '1 h 00 min'), (7620, '2 h 07 min')])
def test_duration(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
