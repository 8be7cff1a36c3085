"""Any checkpoint, guided or not, answering token by token."""
from __future__ import annotations

from collections.abc import Iterator
import io
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import export as export_entry
from experiments import generate as entry
from qsharp_jax import chat, cli, generate
from qsharp_jax.data import tokenizers
from qsharp_jax.models import pretrained
from tests import published, test_pairs, tiny

pytestmark = pytest.mark.usefixtures('one_device')

RUN = {'value__head_init': 'normal', 'task__template': '{question}'}
PROMPTS = ['What is 2 + 3?', 'Name a colour.']


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp('chat')
    return (test_pairs.write(root / 'reference', test_pairs.REFERENCE, 0),
            test_pairs.write(root / 'value', test_pairs.VALUE, 1))


@pytest.fixture(scope='module')
def workdir(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose value network has strong opinions."""
    root = tmp_path_factory.mktemp('run')
    return tiny.run_of_opinions(test_pairs.config_of(folders, root, **RUN), root / 'run')


def answers(folders: tuple[Path, Path], *arguments: str) -> list[str]:
    found = []

    def kept(*given, **options):
        found.extend(run(*given, **options))

    run = chat.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, 'run', kept)
        entry.main([f'--reference={folders[0]}', *(f'--prompt={prompt}' for prompt in PROMPTS), *arguments])
    return found


def test_greedy_answers_are_those_of_the_model(
        folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(folders, '--temperature=0', '--max_new_tokens=12')
    assert capsys.readouterr().out == ''.join(f'{text}\n' for text in found)
    file = pretrained.open_checkpoint(folders[0])
    tokenizer = tokenizers.from_folder(folders[0])
    asked = [tokenizer.encode_chat([{'role': 'user', 'content': prompt}]) for prompt in PROMPTS]
    params = pretrained.load_params(file)
    params['embedding'] = params['embedding'][:tokenizer.vocab_size]  # the rows behind are the most probable of all
    config = chat.dataclasses.replace(file.config, vocab_size=tokenizer.vocab_size)
    for text, ids in zip(found, published.greedy(config, params, asked, 12), strict=True):
        end = next((place for place, token in enumerate(ids) if int(token) in tokenizer.eos_ids), 12)
        assert text == tokenizer.decode(ids[:end])


def test_pieces_are_whole_characters_and_come_one_by_one(folders: tuple[Path, Path]) -> None:
    speaker = chat.load(str(folders[0]), None, None, 1.0, 1.0, 24, 'float32', False)
    ids = speaker.tokenizer.encode_prompt('Grüße: ')
    pieces = list(speaker.answer(ids, 0, 0))
    assert len(pieces) > 8
    assert pieces == list(speaker.answer(ids, 0, 0)) and pieces != list(speaker.answer(ids, 1, 0))
    assert ''.join(list(speaker.answer(ids, 0, 1))) != ''.join(pieces)
    assert not any(piece.endswith('\ufffd') for piece in pieces[:-1])


@pytest.mark.slow
def test_guided_by_the_network_of_a_run_and_by_its_export(
        folders: tuple[Path, Path], workdir: Path, tmp_path: Path) -> None:
    alone = answers(folders, '--seed=3', '--temperature=1', '--max_new_tokens=6')
    value = f'--value={workdir}/checkpoints/value_1'
    guided = answers(folders, '--seed=3', value, '--eta=0.1')
    assert guided != alone
    assert answers(folders, '--seed=3', value) == guided  # the run's own eta and sampler
    assert answers(folders, '--seed=3', value, '--eta=inf') == alone
    export_entry.main([f'--workdir={workdir}', f'--out={tmp_path}/out'])
    exported = tmp_path / 'out' / 'value'
    assert answers(folders, '--seed=3', f'--value={exported}', '--eta=0.1') == guided
    # It guides as its run does, not by default.
    about = json.loads((exported / 'value_head.json').read_text())
    assert about['guidance']['candidates'] == test_pairs.OVERRIDES['guidance.candidates'] != chat.Guidance().candidates
    (exported / 'value_head.json').write_text(json.dumps({**about, 'guidance': {'outside': 'mean'}}))
    assert answers(folders, '--seed=3', f'--value={exported}', '--eta=0.1') != guided
    del about['guidance']
    (exported / 'value_head.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match="lacks 'guidance': export the network again"):
        answers(folders, f'--value={exported}', '--eta=0.1')
    (exported / 'value_head.json').write_text(json.dumps({**about, 'guidance': {}}))
    (tmp_path / 'loose').symlink_to(workdir / 'checkpoints' / 'value_1')
    for arguments, words in (
            ([f'--value={tmp_path}/out/value'], 'does not say its KL coefficient: give --eta'),
            ([f'--value={tmp_path}'], 'holds no value network: give <workdir>/checkpoints/value_<k>'),
            ([f'--value={tmp_path}/loose'], 'is not inside its run')):
        with pytest.raises(ValueError, match=words):
            answers(folders, *arguments)


@pytest.mark.slow
def test_answers_end_where_those_of_the_run_do(
        folders: tuple[Path, Path], tmp_path: Path, workdir: Path) -> None:
    own, alone = test_pairs.OVERRIDES['eta'], float('inf')
    endless = {eta: generate.run(workdir, PROMPTS[:1], eta, samples=4)[0] for eta in (own, alone)}
    tokenizer = tokenizers.from_folder(folders[0])
    said = ''.join(endless[own]) + ''.join(endless[alone])
    stop = tuple(text for token, text in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))
                 if token % 2 and text in said and tokenizer.encode(text) == [token])
    stopping = tiny.run_of_opinions(test_pairs.config_of(folders, tmp_path, task__stop=stop, **RUN), tmp_path / 'run')
    export_entry.main([f'--workdir={stopping}', f'--out={tmp_path}/out'])
    for eta, whole in endless.items():
        expected = generate.run(stopping, PROMPTS[:1], eta, samples=4)[0]
        assert expected != whole
        assert all(text.startswith(part.rstrip('\ufffd')) for text, part in zip(whole, expected, strict=True))
        for value, asked in ((stopping / 'checkpoints' / 'value_1', None if eta == own else eta),
                             (tmp_path / 'out' / 'value', eta)):
            assert chat.run(str(folders[0]), value, PROMPTS[:1], conversation=False, eta=asked, samples=4) == expected
    path = tmp_path / 'out' / 'value' / 'value_head.json'
    about = json.loads(path.read_text())
    del about['eos_ids']
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="lacks 'eos_ids': export the network again"):
        answers(folders, f'--value={path.parent}', '--eta=0.1')


def test_another_reference_is_refused_unless_asked_for(
        folders: tuple[Path, Path], workdir: Path, tmp_path: Path) -> None:
    other = test_pairs.write(tmp_path / 'other', test_pairs.REFERENCE, 5), folders[1]
    value = f'--value={workdir}/checkpoints/value_1'
    with pytest.raises(ValueError, match='was fitted with reference .* its scores would mean nothing here'):
        answers(other, value)
    with pytest.warns(UserWarning, match='used all the same, as asked'):
        assert len(answers(other, value, '--allow_other_reference')) == 2
    with pytest.warns(UserWarning, match='fitted with sampler'):
        answers(folders, value, '--temperature=0.5')


def test_lines_of_input_are_turns_of_a_conversation(
        folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def answer(self: chat.Speaker, prompt: list[int], seed: int, sample: int) -> Iterator[str]:
        asked.append(self.tokenizer.decode(prompt))
        yield from ('Answer ', str(len(asked)))

    monkeypatch.setattr(chat.Speaker, 'answer', answer)
    monkeypatch.setattr('sys.stdin', io.StringIO('First\nSecond\n'))
    entry.main([f'--reference={folders[0]}'])
    assert capsys.readouterr().out == 'Answer 1\nAnswer 2\n'
    assert 'First' in asked[1] and 'Answer 1' in asked[1] and 'Second' in asked[1] and 'Second' not in asked[0]
    asked.clear()
    monkeypatch.setattr('sys.stdin', io.StringIO('First\nSecond\n'))
    entry.main([f'--reference={folders[0]}', '--raw'])
    assert asked[1].endswith('FirstAnswer 1Second')
    asked.clear()
    entry.main([f'--reference={folders[0]}', '--prompt=First', '--prompt=Second'])
    assert 'First' not in asked[1]


@pytest.mark.parametrize('arguments, words', [
    (['--eta=0.1'], '--eta is 0.1, and nothing guides the reference: give --value'),
    (['--eta=0', '--value=x'], '--eta is 0; it must be above 0'),
    (['--temperature=-1'], '--temperature -1'), (['--top_p=0'], '--top_p 0'), (['--max_new_tokens=0'], '0: they must'),
    (['--samples=0'], '--samples is 0'), (['--max_new_tokens=250'], 'do not fit the 256 positions'),
    (['--value=nowhere', '--eta=1'], '--value nowhere holds no value network')])
def test_what_cannot_be_answered_is_refused(
        folders: tuple[Path, Path], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(entry.main, [f'--reference={folders[0]}', '--prompt=x', *arguments])
    said = capsys.readouterr()
    assert not said.out and words in said.err, said.err


def test_options_of_a_checkpoint_are_not_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((['--workdir=x', '--top_p=0.5'], '--top_p goes with --reference'),
                             (['--workdir=x', '--dtype=bfloat16'], '--dtype goes with --reference'),
                             (['--reference=x', '--iteration=1'], '--iteration goes with --workdir'),
                             (['--workdir=x', '--reference=y'], 'not allowed with'), ([], 'is required')):
        with pytest.raises(SystemExit):
            entry.main(arguments)
        assert words in capsys.readouterr().err


def test_several_devices_share_one_answer(folders: tuple[Path, Path]) -> None:
    one = answers(folders, '--temperature=0', '--max_new_tokens=8')
    with tiny.devices(2):
        assert answers(folders, '--temperature=0', '--max_new_tokens=8') == one
    assert np.all([len(text) > 0 for text in one])
