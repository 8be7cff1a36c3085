"""Numbers that a run leaves behind: training curves and the table of results."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import json
import math
import os
from pathlib import Path
import time
from typing import Any

import numpy as np
import tensorboardX

Row = dict[str, Any]

RESULT_KEY = ('method', 'iteration', 'eta', 'temperature', 'split')
# Every result has these; a value that does not exist, such as the eta of the reference, is None.
RESULT_FIELDS = RESULT_KEY + (
    'pass@1', 'pass@1_se', 'pass@k', 'maj@k', 'kl', 'kl_se', 'kl_per_token', 'truncated', 'n_examples', 'n_samples',
    'seconds', 'commit', 'devices')


class Writer:
    """Training curves in `metrics.jsonl`, and the same as TensorBoard events under `tensorboard/`.

    A row is {'stage': ..., 'step': ..., 'iteration': ..., name: number, ...}. Rows are on disk when `write` returns.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self._path = Path(workdir) / 'metrics.jsonl'
        self._events = Path(workdir) / 'tensorboard'
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and not self._path.read_bytes().endswith(b'\n'):
            # A kill cut the last row short; what is appended next must not run into it.
            replace_text(self._path, _lines(read_rows(self._path)))

    def write(self, stage: str, step: int, values: Mapping[str, float], iteration: int = 0) -> None:
        """Adds one row.

        Args:
          stage: the phase, such as 'fit_1'; steps are counted within it.
          step: gradient steps done.
          values: numbers by name.
          iteration: outer iteration, 0 outside of any.
        """
        row = {'stage': stage, 'iteration': iteration, 'step': step, **_numbers(values)}
        with open(self._path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row, allow_nan=False) + '\n')
        board = self._board(stage)
        for name, value in _numbers(values).items():
            if value is not None:  # a curve has no place for it
                board.add_scalar(name, value, step)
        board.flush()

    def resume(self, stage: str, step: int) -> None:
        """Forgets the rows of a stage that come after `step`, which are about to be written again."""
        rows = read_rows(self._path)
        kept = [row for row in rows if row['stage'] != stage or row['step'] <= step]
        if len(kept) < len(rows):
            replace_text(self._path, _lines(kept))
        # TensorBoard drops what a later event file repeats, from the step that it declares as its first.
        self._close_board(stage)
        self._board(stage, purge_step=step + 1)

    def close(self) -> None:
        """Closes the event files."""
        for stage in list(self._boards):
            self._close_board(stage)

    def _board(self, stage: str, purge_step: int | None = None) -> tensorboardX.SummaryWriter:
        if stage not in self._boards:
            # Names of event files go by the second: without more, a quick resume would overwrite one.
            self._boards[stage] = tensorboardX.SummaryWriter(
                str(self._events / stage), purge_step=purge_step, filename_suffix=f'.{time.time_ns()}')
        return self._boards[stage]

    def _close_board(self, stage: str) -> None:
        if stage in self._boards:
            self._boards.pop(stage).close()


class ResultsFile:
    """`results.jsonl`: one row for each (method, iteration, eta, temperature, split).

    Rows are sorted by that key, so the file does not depend on the order in which policies were evaluated. Of a method,
    iteration and split those are `selected` that were last added so.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def rows(self) -> list[Row]:
        """All rows; none if the file does not exist."""
        return read_rows(self._path)

    def add(self, rows: Sequence[Mapping[str, Any]], replace: bool = True) -> None:
        """Adds rows in one step.

        Args:
          rows: the new ones.
          replace: whether a row with the key of an old one takes its place, or else is left out.

        Raises:
          ValueError: a row lacks one of `RESULT_FIELDS`.
        """
        chosen = {_chosen_for(row) for row in rows if row.get('selected')}
        merged = {_key(row): {**row, 'selected': False} if _chosen_for(row) in chosen else row for row in self.rows()}
        for row in rows:
            missing = [name for name in RESULT_FIELDS if name not in row]
            if missing:
                raise ValueError(f'a row of {self._path.name} lacks {", ".join(missing)}.')
            plain = {name: _number(value) for name, value in row.items()}
            if replace or _key(plain) not in merged:
                merged[_key(plain)] = plain
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, _lines(merged[key] for key in sorted(merged, key=_order)))


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON-lines file; none if it does not exist. A last line cut short by a kill is passed over."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding='utf-8').splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f'{path}, line {number} is no JSON: {line[:80]!r}. Delete the line, or the file to '
                                 'make it again.') from error
    return rows


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file as `replace_bytes` does."""
    replace_bytes(path, text.encode('utf-8'))


def replace_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file in one step: a reader, or a run that is killed, sees the old or the new one whole."""
    temporary = Path(f'{path}.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def kept_array(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array in a file, which is made first where there is none."""
    if not path.exists():
        content = io.BytesIO()
        np.save(content, make())
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content.getvalue())
    return np.asarray(np.load(path))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in RESULT_KEY)


def _chosen_for(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What one eta is chosen for."""
    return row['method'], row['iteration'], row['split']


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sorts a missing eta (the reference's) before all others."""
    return tuple((value is not None, value if value is not None else 0) for value in key)


def _numbers(values: Mapping[str, float]) -> Row:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    """A value that JSON has: numpy's and JAX's scalars as Python's, NaN and infinities as None."""
    if hasattr(value, 'item'):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
