"""Sets of questions: formats as published, splits, versions, and what is said of files that are not as they should be.

The files are made here; what the published ones hold is asserted by their checksums alone.
"""
from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import threading

import pytest

from experiments import train
from qsharp_jax import cli
from qsharp_jax.data import builders, published, questions, readers, split_ledger
from qsharp_jax.data.published import File
from qsharp_jax.data.questions import Gsm8kConfig, JsonlConfig, MathConfig, QualityConfig
from qsharp_jax.data.split_ledger import Entry
from tests import tiny


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(row if isinstance(row, str) else json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def asked(number):
    return {'question': f'How many is {number} and 1?',
            'answer': f'It is <<{number}+1={number + 1}>>.\n#### {number + 1:,}'}


@pytest.fixture(name='folder')
def folder_fixture(tmp_path):
    write(tmp_path / 'set' / 'train.jsonl', [asked(number) for number in range(995, 1035)])
    write(tmp_path / 'set' / 'test.jsonl', [asked(number) for number in range(2000, 2010)])
    return tmp_path / 'set'


def own(tmp_path, rows, **columns):
    return JsonlConfig(train=str(write(tmp_path / 'own.jsonl', rows)), **columns)


def read(config, tmp_path, split='train'):
    return builders.read(config, split, tmp_path / 'data')


def test_gsm8k_answers_are_behind_the_hashes_without_commas(folder, tmp_path):
    config = Gsm8kConfig(folder=str(folder), any_version=True)
    splits = {split: read(config, tmp_path, split) for split in ('validation', 'train', 'test')}
    assert [len(records) for records in splits.values()] == [4, 36, 10]
    assert [record['id'] for records in splits.values() for record in records] == list(range(50))
    for record in splits['train']:
        number = int(record['question'].split()[3])
        assert record['answer'] == str(number + 1)
        assert record['solution'].endswith(f'#### {number + 1:,}')
    assert len({record['question'] for records in splits.values() for record in records}) == 50


def test_what_is_held_out_depends_on_the_texts_alone(folder, tmp_path):
    config = Gsm8kConfig(folder=str(folder), any_version=True)
    held_out = read(config, tmp_path, 'validation')
    rows = (folder / 'train.jsonl').read_text().splitlines(keepends=True)
    write(folder / 'train.jsonl', rows[::-1])
    assert read(config, tmp_path, 'validation') == held_out
    none = dataclasses.replace(config, validation_share=0.0)
    assert len(read(none, tmp_path)) == 40
    with pytest.raises(ValueError, match="no split 'validation'"):
        read(none, tmp_path, 'validation')


def test_a_changed_file_is_read_anew(folder, tmp_path):
    config = Gsm8kConfig(folder=str(folder), any_version=True)
    assert len(read(config, tmp_path, 'test')) == 10
    write(folder / 'test.jsonl', [asked(7)])
    assert [record['answer'] for record in read(config, tmp_path, 'test')] == ['8']


def test_sizes_of_published_sets_are_known_before_they_are_read():
    assert [Gsm8kConfig().size(split) for split in ('train', 'validation', 'test')] == [6726, 747, 1319]
    assert [MathConfig().size(split) for split in ('train', 'validation', 'test')] == [6748, 750, 500]
    assert MathConfig(test_set='aime24').size('test') == 30
    assert QualityConfig().size('train') is None is Gsm8kConfig(any_version=True).size('test')
    assert JsonlConfig(train='anywhere').size('train') is None


def test_math_answers_are_in_the_last_box_and_empty_boxes_are_left_out(tmp_path, caplog):
    rows = [{'problem': f'p{i}', 'level': 'Level 1', 'type': 'Algebra',
             'solution': rf'\boxed{{1}}, \boxed{{\frac{{{i}}}{{2}}}}.'}
            for i in range(10)]
    rows[3]['solution'] = r'There are $\boxed{}$ such.'
    found = readers.math(write(tmp_path / 'train.jsonl', rows))
    assert [question.answer for question in found] == [rf'\frac{{{i}}}{{2}}' for i in range(10) if i != 3]
    assert found[0].columns == {'level': 'Level 1', 'type': 'Algebra', 'solution': rows[0]['solution']}
    assert 'the box is empty in train.jsonl:4' in caplog.text


@pytest.mark.parametrize('test_set', ['math500', 'aime24'])
def test_math_is_tested_on_math500_or_aime24(tmp_path, test_set):
    write(tmp_path / 'math' / 'train.jsonl', [{'problem': f'p{i}', 'solution': rf'\boxed{{{i}}}'} for i in range(20)])
    write(tmp_path / 'test' / 'test.jsonl',
          [{'problem': 'q', 'solution': r'\boxed{5}', 'answer': '5', 'subject': 'Algebra', 'level': 2,
            'unique_id': 'test/algebra/1.json'}])
    write(tmp_path / 'test' / 'aime24.jsonl',
          [{'id': 60, 'problem': 'q', 'solution': 'The sum is 25.', 'answer': '025', 'url': 'u', 'question': 'q'}])
    config = MathConfig(folder=str(tmp_path / 'math'), test_set=test_set, test_folder=str(tmp_path / 'test'),
                        any_version=True)
    assert [record['answer'] for record in read(config, tmp_path, 'test')] == [
        {'math500': '5', 'aime24': '025'}[test_set]]
    assert len(read(config, tmp_path)) == 18
    with pytest.raises(ValueError, match="'math500' or 'aime24'"):
        MathConfig(test_set='math')


def articles(number, first=0):
    entry = {'options': ['w', 'x', 'y', 'z'], 'writer_label': 1, 'difficult': 1, 'validation': [],
             'speed_validation': []}
    return [{'article_id': str(i // 2), 'set_unique_id': f'{i}_w', 'title': f'T{i // 2}',
             'article': f'The story number {i // 2}.',
             'questions': [{**entry, 'question': f'Who is {q} in it, writer {i % 2}?', 'gold_label': q}
                           for q in (1, 4)]}
            for i in range(first, first + number)]


def test_quality_questions_have_lettered_options_and_articles_stay_whole(tmp_path):
    folder = tmp_path / 'quality'
    write(folder / published.QUALITY_TRAIN.name, articles(20))
    write(folder / published.QUALITY_DEV.name, articles(4, first=100))
    config = QualityConfig(folder=str(folder), any_version=True, validation_share=0.2)
    splits = {split: read(config, tmp_path, split) for split in ('train', 'validation', 'test')}
    assert {split: len(records) for split, records in splits.items()} == {'train': 32, 'validation': 8, 'test': 8}
    titles = [{record['title'] for record in records} for records in splits.values()]
    assert not titles[0] & titles[1] and [len(found) for found in titles] == [8, 2, 2]
    for record in splits['train']:
        assert record['question'] == (f'The story number {record["title"][1:]}.\n\n{record["asked"]}\n\n(A) w\n(B) x\n'
                                      '(C) y\n(D) z')
        assert record['answer'] == {'1': 'A', '4': 'D'}[record['asked'].split()[2]]
        assert record['options'] == ['w', 'x', 'y', 'z'] and record['difficult'] == 1


def test_quality_questions_without_a_label_are_refused(tmp_path):
    rows = articles(2)
    del rows[1]['questions'][0]['gold_label']
    with pytest.raises(ValueError, match=r'dev, line 2 has no answer to question 1: gold_label is None.*not published'):
        readers.quality(write(tmp_path / 'dev', rows))


def test_own_files_keep_all_their_columns(tmp_path):
    rows = [{'id': 7, 'q': 'one', 'a': 1, 'tests': ['x', {'y': None}], 'weight': 0.5},
            {'id': 8, 'q': 'two', 'a': '2', 'tests': [], 'weight': 2}]
    config = own(tmp_path, rows, question='q', answer='a', validation_share=0.0)
    found = sorted(read(config, tmp_path), key=lambda record: record['source_id'])
    assert [{name: record[name] for name in record if name != 'id'} for record in found] == [
        {'question': 'one', 'answer': '1', 'tests': ['x', {'y': None}], 'weight': 0.5, 'source_id': 7},
        {'question': 'two', 'answer': '2', 'tests': [], 'weight': 2, 'source_id': 8}]
    free = own(tmp_path, [{'q': 'one'}], question='q', answer='', validation_share=0.0)
    assert read(free, tmp_path) == [{'id': 0, 'question': 'one'}]


def test_own_files_may_bring_every_split(tmp_path):
    paths = {split: str(write(tmp_path / f'{split}.jsonl', [{'question': f'{split} {i}', 'answer': i}
                                                            for i in range(5)]))
             for split in ('train', 'validation', 'test')}
    for split in paths:
        assert {record['question'] for record in read(JsonlConfig(**paths), tmp_path, split)} == {
            f'{split} {i}' for i in range(5)}


def test_the_splits_are_known_before_a_file_is_read(tmp_path):
    train = tmp_path / 'own.jsonl'
    assert JsonlConfig(train=str(train)).splits == ('train', 'validation')
    assert JsonlConfig(train=str(train), validation_share=0.0).splits == ('train',)
    assert set(JsonlConfig(train=str(train), test='test.jsonl').splits) == {'train', 'test', 'validation'}
    assert set(Gsm8kConfig().splits) == {'train', 'test', 'validation'}


def test_a_split_that_a_task_lacks_is_refused_before_anything_is_made(tmp_path, capsys):
    arguments = [f'--config={tiny.ROOT}/configs/arithmetic.py:tiny', f'--workdir={tmp_path}/run',
                 '--config.task.name=jsonl',
                 f"--config.task.jsonl.train={write(tmp_path / 'own.jsonl', [GOOD] * 9)}"]
    for more, words in (([], "eval.split is 'test', and task.jsonl has the splits train, validation only"),
                        (['--config.eval.split=validation', '--config.task.jsonl.validation_share=0'],
                         "eval.split is 'validation', and task.jsonl has the splits train only")):
        with tiny.devices(1), pytest.raises(SystemExit):
            cli.main(train.main, [*arguments, *more])
        assert words in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_questions_of_one_text_leave_something_to_train_on(tmp_path):
    rows = [{'question': 'How many?', 'answer': str(i), 'context': f'c{i}'} for i in range(9)]
    with pytest.raises(ValueError, match="9 questions of train are too few.*: 'How many.'. Put what tells them"):
        read(own(tmp_path, rows), tmp_path)
    assert len(read(own(tmp_path, rows, validation_share=0.0), tmp_path)) == 9


GOOD = {'question': 'q', 'answer': 'a'}


@pytest.mark.parametrize('row, words', [
    ('{"question": "q", "answer": }\n', r"line 2 is no JSON: Expecting value at column 29 of '\{"),
    ('[1, 2]\n', 'line 2 is no JSON object in {}'),
    ('{"question": "q", "answer": NaN}\n', 'line 2 is no JSON: NaN is no number'),
    ('[' * 100_000 + '\n', 'line 2 is no JSON'),
    ({'question': 'r'}, "line 2 lacks 'answer', which the first row has"),
    ({**GOOD, 'question': 'r', 'more': 1}, "line 2 has 'more', which the first row lacks"),
    ({'question': 'r', 'answer': ' '}, "line 2 has no answer: 'answer' is empty"),
    ({'question': '', 'answer': 'a'}, "line 2 has no question: 'question' is empty"),
    ({'question': 'r', 'answer': None}, r"line 2 has None as its answer \('answer'\)"),
    ({'question': 'r', 'answer': True}, 'line 2 has True as its answer'),
    ({'question': 'r', 'answer': '\ud800'}, r"line 2 has half of a surrogate pair in its answer \('answer'\)"),
    ({'question': ['r'], 'answer': 'a'}, r"line 2 has \['r'\] as its question")])
def test_a_wrong_row_is_named_by_file_line_and_what_is_wrong(tmp_path, row, words):
    with pytest.raises(ValueError, match=r'own.jsonl, ' + words.replace('{}', r'\{\}')):
        read(own(tmp_path, [GOOD, row]), tmp_path)


def test_a_missing_column_is_told_its_neighbour(tmp_path):
    with pytest.raises(ValueError, match="line 1 has no 'question'; it has 'questions', 'answer'. Did you mean"):
        read(own(tmp_path, [{'questions': 'q', 'answer': 'a'}]), tmp_path)
    with pytest.raises(ValueError, match='a name that is used otherwise: rename it'):
        read(own(tmp_path, [{**GOOD, 'prompts': 1}]), tmp_path)
    path = tmp_path / 'latin.jsonl'
    path.write_bytes(b'{"question": "q", "answer": "\xe9"}\n')
    with pytest.raises(ValueError, match='latin.jsonl, line 1 is no UTF-8: .* at byte 29'):
        read(JsonlConfig(train=str(path)), tmp_path)
    with pytest.raises(ValueError, match='own.jsonl is empty'):
        read(own(tmp_path, []), tmp_path)


@pytest.mark.parametrize('reader, row, words', [
    (readers.gsm8k, {'question': 'q', 'answer': 'so 3.'}, "line 1 has no answer: there is no number behind ####"),
    (readers.math, {'problem': 'p', 'solution': r'\boxed{3'}, r'line 1 has no answer: there is no closed \\boxed'),
    (readers.aime, {'problem': 'p'}, "line 1 has no 'answer'; it has 'problem'")])
def test_a_question_without_an_answer_is_refused(tmp_path, reader, row, words):
    with pytest.raises(ValueError, match=words):
        reader(write(tmp_path / 'set.jsonl', [row]))


def test_another_version_is_refused_by_its_checksum(folder, tmp_path):
    with pytest.raises(ValueError, match='train.jsonl is of another version .* it has 40 questions, sha256:.*'
                       'set task.gsm8k.any_version=True'):
        read(Gsm8kConfig(folder=str(folder)), tmp_path)


@pytest.mark.parametrize('kind', [0, 1, 2])
def test_any_digest_of_the_published_version_will_do(folder, kind):
    path = folder / 'train.jsonl'
    found = readers.gsm8k(path)
    digests = (*published.file_digests(path), published.questions_digest(found[::-1]))
    assert [digest.split(':')[0] for digest in digests] == ['sha256', 'git', 'questions']
    published.check_version(File('train.jsonl', (digests[kind],)), path, found, '')
    changed = [dataclasses.replace(found[0], answer='0'), *found[1:]]
    assert published.questions_digest(changed) != digests[2]


def test_git_names_content_by_the_same_digest(tmp_path):
    path = write(tmp_path / 'hello', ['hello\n'])
    assert published.file_digests(path)[1] == 'git:ce013625030ba8dba906f756967f9e9ca394464a'


def test_a_folder_without_the_file_says_what_it_holds(folder, tmp_path):
    (folder / 'test.jsonl').unlink()
    with pytest.raises(ValueError, match="task.gsm8k.folder is .*, which holds train.jsonl; the file test.jsonl is"):
        read(Gsm8kConfig(folder=str(folder)), tmp_path)
    with pytest.raises(ValueError, match='which is no folder'):
        read(Gsm8kConfig(folder=str(tmp_path / 'nowhere')), tmp_path)
    with pytest.raises(ValueError, match="task.jsonl.train is 'nowhere', which is no file"):
        read(JsonlConfig(train='nowhere'), tmp_path)


@pytest.fixture(name='server')
def server_fixture(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(('localhost', 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://localhost:{server.server_address[1]}'
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_are_downloaded_once_and_checked(folder, tmp_path, monkeypatch, server):
    for name, attribute in (('train', 'GSM8K_TRAIN'), ('test', 'GSM8K_TEST')):
        file = File(f'{name}.jsonl', published.file_digests(folder / f'{name}.jsonl')[:1], f'{server}/{name}.jsonl')
        monkeypatch.setattr(published, attribute, file)
    assert len(read(Gsm8kConfig(), tmp_path)) == 36
    (folder / 'test.jsonl').unlink()
    assert len(read(Gsm8kConfig(validation_share=0.0), tmp_path)) == 40
    monkeypatch.setattr(published, 'GSM8K_TEST', dataclasses.replace(published.GSM8K_TEST, url=f'{server}/gone.jsonl'))
    with pytest.raises(ValueError, match='test.jsonl cannot be downloaded from .*404.*task.gsm8k.folder'):
        read(Gsm8kConfig(validation_share=0.5), tmp_path)
    write(folder / 'gone.jsonl', [asked(1)])
    with pytest.raises(ValueError, match='of another version'):
        read(Gsm8kConfig(validation_share=0.5), tmp_path)
    # What was refused would be found again.
    assert len(list((tmp_path / 'data' / 'downloads').glob('*.jsonl'))) == 2
    with pytest.raises(ValueError, match='there is no address to download train.jsonl from.*task.math.folder'):
        read(MathConfig(), tmp_path)


@pytest.mark.parametrize('other, how', [
    ('How many\tis 3 AND 1?', 'the same but for case and white space'), ('How many is 3 and 1?', 'the same text')])
def test_splits_that_share_a_question_are_refused(tmp_path, other, how):
    train = write(tmp_path / 'train.jsonl', [{'question': 'q', 'answer': 1}, {'question': other, 'answer': 4}])
    test = write(tmp_path / 'test.jsonl', [{'question': 'How many is 3 and 1?', 'answer': 4}])
    with pytest.raises(ValueError, match=rf'1 questions .* two splits: train.jsonl:2 \(.*test.jsonl:1 \(test\), {how}'):
        read(JsonlConfig(train=str(train), test=str(test)), tmp_path)
    assert not list((tmp_path / 'data').rglob('*.array_record*'))


def test_published_files_that_share_a_question_say_what_a_changed_one_needs(folder, tmp_path, monkeypatch):
    write(folder / 'test.jsonl', [asked(1000)])
    for name, attribute in (('train', 'GSM8K_TRAIN'), ('test', 'GSM8K_TEST')):
        file = File(f'{name}.jsonl', published.file_digests(folder / f'{name}.jsonl'))
        monkeypatch.setattr(published, attribute, file)
    with pytest.raises(ValueError, match='out of one of the files, and set task.gsm8k.any_version=True, since'):
        read(Gsm8kConfig(folder=str(folder)), tmp_path)
    with pytest.raises(ValueError, match='out of one of the files.$'):
        read(Gsm8kConfig(folder=str(folder), any_version=True), tmp_path)


def test_signs_tell_questions_apart_and_repetitions_stay_in_one_split():
    split_ledger.check({'train': [Entry(0, 'a:1', 'x^2 + 1'), Entry(1, 'a:2', 'x^2 + 1')],
                        'test': [Entry(2, 'b:1', 'x^2 - 1')]})
    twice = [readers.Question(f'q{i // 4}', '', {}, f'a:{i}', f'q{i // 4}') for i in range(60)]
    for share in (0.1, 0.25, 0.5):
        divided = questions.divide({'train': twice}, share)
        held_out, train = ({question.key for _, question in divided[split]} for split in ('validation', 'train'))
        assert not held_out & train and len(held_out | train) == 15
        assert share * 60 <= len(divided['validation']) < share * 60 + 4


def test_the_ledger_lists_ids_places_and_files(folder, tmp_path):
    config = Gsm8kConfig(folder=str(folder), any_version=True)
    records = {record['id']: record for record in read(config, tmp_path)}
    ledger = json.loads((builders.prepared(config, tmp_path / 'data') / split_ledger.FILE).read_text())
    assert ledger['files']['test'] == list(published.file_digests(folder / 'test.jsonl'))
    train = ledger['splits']['train']
    assert train['n'] == 36 and train['ids'] == list(records)
    lines = (folder / 'train.jsonl').read_text().splitlines()
    for id_, place in zip(train['ids'], train['places'], strict=True):
        assert json.loads(lines[int(place.split(':')[1]) - 1])['question'] == records[id_]['question']
