"""Text in, guided text out."""
from __future__ import annotations

from collections.abc import Iterator
import io
from pathlib import Path
import re

import pytest

from experiments import generate as entry
from qsharp_jax import cli, generate
from tests import tiny

QUESTIONS = ['1,2|3,4|1,3|2,5/1,4=', '6,0|1,2|1,6|2,3/1,3=', '7,0|5,2|5,7|2,3/5,3=']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose value network, random but strong in its opinions, is finished."""
    root = tmp_path_factory.mktemp('generate')
    config = tiny.config(root / 'data', iterations=2, value__head_init='normal', reference__pretrain__steps=2,
                         eval__batch_rows=8)
    with tiny.devices(1):
        yield tiny.run_of_opinions(config, root / 'run')


def test_answers_are_text_and_depend_on_the_question_alone(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = generate.run(workdir, QUESTIONS, samples=4)
    assert [len(texts) for texts in answers] == [4, 4, 4]
    assert all(set(text) <= set('01234567,|/=') for texts in answers for text in texts)
    assert len({text for texts in answers for text in texts}) > 8
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f'{question} {text}' for question, texts in zip(QUESTIONS, answers) for text in texts]
    # Twelve rows take two batches of eight, one question fewer takes one.
    assert generate.run(workdir, QUESTIONS[:1], samples=4) == answers[:1]
    assert generate.run(workdir, QUESTIONS, samples=4, seed=1) != answers


def test_guidance_is_that_of_eta_and_infinity_is_the_reference(workdir: Path) -> None:
    reference = generate.run(workdir, QUESTIONS, eta=float('inf'), samples=4)
    assert generate.run(workdir, QUESTIONS, eta=1e9, samples=4) == reference
    own = generate.run(workdir, QUESTIONS, samples=4)
    assert generate.run(workdir, QUESTIONS, eta=0.1, samples=4) == own
    weak = generate.run(workdir, QUESTIONS, eta=0.7, samples=4)
    assert len({str(answers) for answers in (reference, own, weak)}) == 3


def test_a_raw_prompt_is_taken_as_it_is(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The task's template adds nothing to a question, so only the printed space differs.
    answers = generate.run(workdir, QUESTIONS[:1], raw=True)
    assert capsys.readouterr().out == f'{QUESTIONS[0]}{answers[0][0]}\n'


def test_the_entry_point_reads_prompts_from_its_input(
        workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entry.main([f'--workdir={workdir}', f'--prompt={QUESTIONS[0]}', f'--prompt={QUESTIONS[1]}', '--eta=0.2'])
    given = capsys.readouterr().out
    assert [line.split(' ')[0] for line in given.splitlines()] == QUESTIONS[:2]
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(QUESTIONS[:2]) + '\n'))
    entry.main([f'--workdir={workdir}', '--eta=0.2'])
    assert capsys.readouterr().out == given


@pytest.mark.parametrize('arguments,words', [
    (['--prompt=1', '--eta=0'], '--eta is 0; it must be above 0'),
    (['--prompt=1', '--eta=nan'], '--eta is nan; it must be above 0'),
    (['--prompt=1', '--samples=0'], '--samples is 0; it must be at least 1'),
    (['--prompt=1', '--iteration=2'], 'no value network of iteration 2 in .* the run has finished 1'),
    (['--prompt=1', '--prompt=who?'], "'w.*' at character 0 of 'who\\?' is not in the vocabulary"),
    (['--prompt=1', '--prompt=' + '|'.join('1' * 17)],
     "the prompt '1.1.1.*' has more than task.max_prompt_tokens = 32"),
    (['--prompt='], 'the prompt of example 0 is empty'),
])
def test_what_cannot_be_answered_is_refused(
        arguments: list[str], words: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(entry.main, [f'--workdir={workdir}', *arguments])
    said = capsys.readouterr()
    assert not said.out
    assert re.search(words, said.err), said.err


def test_no_prompts_at_all_are_refused(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('sys.stdin', io.StringIO(''))
    with pytest.raises(ValueError, match='there is no prompt: give --prompt'):
        entry.main([f'--workdir={workdir}'])
