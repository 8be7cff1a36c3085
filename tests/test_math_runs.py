"""Runs on questions in the formats of GSM8K and MATH, graded by math-verify: from the command to the paper's table."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import reproduce, tables, train
from qsharp_jax import cli
from qsharp_jax.data import answer_text
from qsharp_jax.metrics import read_rows

# Solved examples, after which so small a model writes boxes, and gets the easier half of these questions right.
TEMPLATE = ''.join(f'What is {number} plus 1? \\boxed{{{{{number + 1}}}}}\n' for number in (6, 31, 58)) + '{question}'
KEYS = {'task.template': TEMPLATE, 'task.chat': False, 'task.stop': "('\\n',)", 'sampling.max_new_tokens': 16,
        'collect.samples': 2, 'value.layers': 2, 'fit.batch_size': 4, 'eval.methods': 'qsharp',
        'eval.reference_temperatures': ''}


def asked(number: int) -> tuple[str, int]:
    return (f'What is {number} times 173?', 173 * number) if number % 2 else (f'What is {number} plus 1?', number + 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / 'gsm8k'
    folder.mkdir()
    for name, numbers in (('train', range(2, 14)), ('test', range(20, 24))):
        rows = [{'question': question, 'answer': f'So <<it={right}>>.\n#### {right:,}'}
                for question, right in map(asked, numbers)]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.usefixtures('one_device')
def test_a_table_is_made_of_questions_and_their_grades(
        folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**KEYS, 'task.gsm8k.any_version': True, 'task.gsm8k.folder': folder, 'task.data_dir': tmp_path / 'data'}
    cli.main(reproduce.main, ['--table=1', '--size=tiny', f'--root={tmp_path}', '--run',
                              *(f'--config.{key}={value}' for key, value in keys.items())])
    workdir = tmp_path / 'tiny' / 'gsm8k'
    rows = read_rows(workdir / 'results.jsonl')
    assert {row['method'] for row in rows} == {'reference', 'qsharp'}
    assert all(row['abstained'] == 0 and row['n_examples'] == 4 for row in rows)
    answers = [row for path in (workdir / 'samples').rglob('*.jsonl') for row in read_rows(path)]
    right = dict(map(asked, range(20, 24)))
    for row in answers:
        given = answer_text.last_boxed(row['text'])
        assert row['reward'] == (given == str(right[row['prompt'].splitlines()[-1]])), row['text']
    assert {row['reward'] for row in answers} == {0, 1}
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith('| GSM8K, Llama 3 8B') and 'pass@1' in line]
    assert ['missing' in line for line in lines] == [False, True, False]  # CD was not asked for
    assert '--config.eval.methods=qsharp,cd`' in lines[1] and 'reference SmolLM2-135M-Instruct' in lines[2]
    assert (tmp_path / 'tiny' / 'tables' / 'table_1.tex').exists()


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.usefixtures('one_device')
def test_answers_to_questions_of_math_are_right_however_they_are_written(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, numbers in (('train', range(2, 14)), ('test', range(20, 24))):
        rows = [{'problem': question, 'level': 'Level 1', 'subject': 'Algebra',
                 'solution': rf'Twice that is {2 * right}, so it is $\boxed{{\frac{{{2 * right}}}{{2}}}}$.'}
                for question, right in map(asked, numbers)]
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    workdir, keys = tmp_path / 'run', {
        **KEYS, 'task.math.any_version': True, 'task.math.folder': tmp_path, 'task.math.test_folder': tmp_path,
        'task.data_dir': tmp_path / 'data'}
    cli.main(train.main, ['--config=configs/math.py:tiny', f'--workdir={workdir}',
                          *(f'--config.{key}={value}' for key, value in keys.items())])
    answers = [row for path in (workdir / 'samples' / 'test').rglob('*.jsonl') for row in read_rows(path)]
    right = dict(map(asked, range(20, 24)))
    for row in answers:
        given = answer_text.last_boxed(row['text'])
        assert row['reward'] == (given == str(right[row['prompt'].splitlines()[-1]])), row['text']
    assert {row['reward'] for row in answers} == {0, 1}
    cli.main(tables.main, ['--table=1', f'--out={tmp_path / "tables"}', str(workdir)])
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith('| MATH, Llama 3 8B') and 'missing' not in line]
