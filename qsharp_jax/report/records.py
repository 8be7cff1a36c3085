"""The files of a workdir, read for the report. A file that is not there yet is an empty record."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import math
import os
from pathlib import Path
import re
from typing import Any

from qsharp_jax import config as config_lib
from qsharp_jax.metrics import read_rows
from qsharp_jax.progress import duration

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      workdir: where it was read from.
      config: nested.
      results: rows of results.jsonl.
      metrics: rows of metrics.jsonl.
      calibration: calibration/iteration_<k>.json by k. Read are {'bins': [{'low', 'high', 'mean_prediction',
        'mean_outcome', 'standard_error', 'weight'}], 'ece', 'by_position': [{'position', 'loss', 'ece', 'auc'}]}.
      samples: first answers of each policy to each question, from samples/.
      timings: seconds by the name of a phase.
    """

    workdir: Path
    config: Mapping[str, Any]
    results: list[Row]
    metrics: list[Row]
    calibration: dict[int, Row]
    samples: list[Row]
    timings: dict[str, float]

    @property
    def split(self) -> str:
        """The split that the report is about."""
        return str(self.config['eval']['split'])

    @property
    def sweep_split(self) -> str:
        """The split on which every eta was evaluated: that of the report if it is one."""
        evaluation = self.config['eval']
        return self.split if evaluation['every_eta'] else str(evaluation['select_split']) or self.split

    @property
    def provenance(self) -> list[str]:
        """What its numbers were made by, in words: seed, devices, commits of the code, time of all its phases."""
        devices = dict.fromkeys(row['devices'] for row in self.results)
        commits = dict.fromkeys(row['commit'] for row in self.results if row['commit'])
        words = [f'seed {self.config["seed"]}',
                 *(f'{count} device{"s" if count > 1 else ""}' for count in devices)]
        if commits:
            words.append(f'commit {", ".join(commits)}')
        if self.timings:
            words.append(f'{duration(sum(self.timings.values()))} in all')
        return words


def read(workdir: str | os.PathLike[str], samples: bool = True) -> Run:
    """The records of a workdir.

    Args:
      workdir: of the run.
      samples: whether to read answers, which may be many.

    Raises:
      ValueError: the directory holds no run, or one of its files is no JSON.
    """
    directory = Path(workdir)
    if not (directory / 'config.json').exists():
        raise ValueError(f'{directory} holds no run: it has no config.json.')
    calibration = {}
    for path in sorted(directory.glob('calibration/iteration_*.json')):
        match = re.fullmatch(r'iteration_(\d+)', path.stem)
        if match:
            calibration[int(match[1])] = _read_json(path)
    timings = directory / 'timings.json'
    # Keys that were added since the run was made have their defaults.
    config = config_lib.from_json(json.dumps(_read_json(directory / 'config.json'))).to_dict()
    return Run(
        workdir=directory,
        config=config,
        results=[_clean(row) for row in read_rows(directory / 'results.jsonl')],
        metrics=read_rows(directory / 'metrics.jsonl'),
        calibration=calibration,
        samples=_read_samples(directory / 'samples', config['eval']['split']) if samples else [],
        timings=_read_json(timings) if timings.exists() else {})


def policy_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells policies apart, in results and in samples."""
    return row['method'], row['iteration'], row['eta'], row['temperature']


def _read_samples(directory: Path, split: str) -> list[Row]:
    """Rows of the first sample of each (policy, question) of a split, in the order of questions."""
    first: dict[tuple[Any, ...], Row] = {}
    for path in sorted(directory.rglob('*.jsonl')):
        for row in map(_clean, read_rows(path)):
            if row['split'] == split and row['sample'] == 0:
                first[(*policy_key(row), row['id'])] = row
    return sorted(first.values(), key=lambda row: row['id'])


def _clean(row: Row) -> Row:
    """The reference's eta is infinite; JSON has no such number, so readers see None."""
    eta = row['eta']
    return {**row, 'eta': None if isinstance(eta, float) and not math.isfinite(eta) else eta}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON: {error}. Bring it back from a copy; without one, the report does without '
                         'times and calibration, and without config.json there is no run.') from error
