"""Curves and results on disk: nothing doubled, nothing half written."""
from __future__ import annotations

import json
import math
from pathlib import Path
import struct
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from qsharp_jax import metrics


def result(**changes: Any) -> metrics.Row:
    row: metrics.Row = {name: 0 for name in metrics.RESULT_FIELDS}
    return {**row, 'method': 'qsharp', 'iteration': 1, 'eta': 0.1, 'temperature': 1.0, 'split': 'test', **changes}


def test_rows_are_on_disk_at_once_and_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write('fit_1', 10, {'loss': np.float32(0.5), 'accuracy': 1, 'bad': math.nan}, iteration=1)
    assert metrics.read_rows(tmp_path / 'metrics.jsonl') == [
        {'stage': 'fit_1', 'iteration': 1, 'step': 10, 'loss': 0.5, 'accuracy': 1, 'bad': None}]
    assert not caplog.records  # TensorBoard is given numbers only


def test_a_resumed_stage_is_written_once(tmp_path: Path) -> None:
    """Rows of a run killed after step 5 with a checkpoint at 3, then resumed, are those of a straight run."""
    straight = metrics.Writer(tmp_path / 'straight')
    for writer, steps in ((straight, range(1, 9)), (metrics.Writer(tmp_path / 'killed'), range(1, 6))):
        writer.write('pretrain', 7, {'loss': 7.0})
        for step in steps:
            writer.write('fit_1', step, {'loss': 1 / step}, iteration=1)
        writer.close()
    again = metrics.Writer(tmp_path / 'killed')
    again.resume('fit_1', 3)
    for step in range(4, 9):
        again.write('fit_1', step, {'loss': 1 / step}, iteration=1)
    again.close()
    files = [tmp_path / name / 'metrics.jsonl' for name in ('straight', 'killed')]
    assert files[0].read_text() == files[1].read_text()
    curves = [curve(tmp_path / name / 'tensorboard' / 'fit_1') for name in ('straight', 'killed')]
    assert curves[0] == curves[1] and len(curves[0]) == 8


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write('fit_1', 1, {'loss': 1.0})
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"stage": "fit_1", "st')
    metrics.Writer(tmp_path).write('fit_1', 2, {'loss': 2.0})
    assert [row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'rows.jsonl'
    path.write_text('{}\nbroken\n{}\n')
    with pytest.raises(ValueError, match='line 2'):
        metrics.read_rows(path)


def test_results_replace_their_own_key_alone(tmp_path: Path) -> None:
    file = metrics.ResultsFile(tmp_path / 'sub' / 'results.jsonl')
    assert file.rows() == []
    first = [result(), result(eta=0.2), result(method='reference', iteration=0, eta=math.inf), result(split='train'),
             result(temperature=0.5), result(iteration=2)]
    file.add(first)
    assert len(file.rows()) == len(first)
    file.add([result(eta=0.2, kl=3.0), result(method='reference', iteration=0, eta=math.inf, kl=4.0)])
    rows = file.rows()
    assert len(rows) == len(first)
    assert {(row['method'], row['eta']) for row in rows if row['kl']} == {('qsharp', 0.2), ('reference', None)}


def test_of_a_method_those_are_selected_that_were_last_added_so(tmp_path: Path) -> None:
    file = metrics.ResultsFile(tmp_path / 'results.jsonl')

    def selected() -> set[tuple[Any, ...]]:
        return {(row['method'], row['eta'], row['split']) for row in file.rows() if row['selected']}

    file.add([result(eta=eta, split=split, selected=eta == 0.2) for eta in (0.1, 0.2) for split in ('test', 'train')]
             + [result(method='cd', selected=True), result(iteration=2, eta=0.3, selected=True)])
    others = {('cd', 0.1, 'test'), ('qsharp', 0.3, 'test'), ('qsharp', 0.2, 'train')}
    assert selected() == others | {('qsharp', 0.2, 'test')}
    file.add([result(eta=0.5, selected=True)])
    assert selected() == others | {('qsharp', 0.5, 'test')}
    # Rows beside a run take the place of none, and choose nothing.
    file.add([result(eta=0.5, kl=7.0, selected=False), result(eta=0.7, selected=False)], replace=False)
    assert selected() == others | {('qsharp', 0.5, 'test')} and len(file.rows()) == 8
    assert not any(row['kl'] for row in file.rows())


def test_results_do_not_depend_on_the_order_of_evaluation(tmp_path: Path) -> None:
    rows = [result(eta=eta, iteration=i) for eta in (0.1, 0.2) for i in (1, 2)] + [result(method='reference', eta=None)]
    texts = []
    for name, ordered in (('a', rows), ('b', rows[::-1])):
        file = metrics.ResultsFile(tmp_path / name)
        for row in ordered:
            file.add([row])
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


def test_results_have_every_field(tmp_path: Path) -> None:
    row = result()
    del row['kl_se'], row['commit']
    with pytest.raises(ValueError, match='lacks kl_se, commit'):
        metrics.ResultsFile(tmp_path / 'results.jsonl').add([row])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'results.jsonl'
    file = metrics.ResultsFile(path)
    file.add([result()])
    before = path.read_text()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        file.add([result(eta=0.2)])
    assert path.read_text() == before
    assert [json.loads(line)['eta'] for line in before.splitlines()] == [0.1]


def curve(directory: Path) -> dict[int, float]:
    """The curve 'loss' as TensorBoard shows it: a session's start drops what earlier files have from its step on."""
    points: dict[int, float] = {}
    for path in sorted(directory.glob('*tfevents*')):
        for event in events(path.read_bytes()):
            if event.HasField('session_log') and event.session_log.status == event_pb2.SessionLog.START:
                points = {step: value for step, value in points.items() if step < event.step}
            for value in event.summary.value:
                assert event.step not in points, 'a doubled point'
                points[event.step] = value.simple_value
    return points


def events(data: bytes) -> list[Any]:
    """The records of an event file: length, its checksum, the event, its checksum."""
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from('<Q', data, at)
        found.append(event_pb2.Event.FromString(data[at + 12:at + 12 + length]))
        at += length + 16
    return found
