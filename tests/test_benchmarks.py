"""The benchmark: turns and rounds, results as tables, and the peer's law beside ours on tiny networks."""
from __future__ import annotations

import dataclasses
import json
import math
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import acceptance, cases, measure, profiles, tables, workload
from benchmarks.workload import Guide
from qsharp_jax import decoding
from qsharp_jax.data.arithmetic import solve


class FakeWorker:
    """Takes so many seconds, and tells which of the contenders were at work."""

    pid = 0

    def __init__(self, seconds, log):
        self.seconds, self.log = iter(seconds), log

    def call(self, name, **arguments):
        self.log.append(name)
        return {'seconds': next(self.seconds), 'tokens': 6}


def contenders(first, second):
    log = []
    return log, {'ours': measure.Contender(FakeWorker(first, log), 'a', {}),
                 'peer': measure.Contender(FakeWorker(second, log), 'b', {})}


def test_a_process_that_was_killed_is_told_of():
    worker = measure.Worker('ours')
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RuntimeError, match='ours, about: its process was killed, as the system does when memory'):
            worker.call('about')
    worker.close()


def test_sides_take_turns_and_ratios_are_of_one_round(monkeypatch):
    monkeypatch.setattr(measure, '_busy', lambda pid: 0.0)
    # Everything takes ten times as long in the second round that counts: ratios do not see it.
    log, both = contenders([9, 1, 10, 3], [9, 2, 20, 3])
    replies = measure.alternate(both, repeats=3)
    assert log == ['a', 'b'] * 4
    row = measure.result('case/x', {}, replies, 'peer')
    assert row['rates']['ours'] == {'median': 2.0, 'min': 0.6, 'max': 6.0}
    assert row['ratios'] == {'ours': {'median': 2.0, 'min': 1.0, 'max': 2.0}}
    assert [reply['seconds'] for reply in row['repeats']['peer']] == [2, 20, 3]


def test_disturbed_rounds_are_done_again(monkeypatch):
    # Of each call the processor seconds of other programs before and after: in the second call that counts, many.
    log, both = contenders([9, 1, 2, 3, 4], [9] * 5)
    calls = iter(range(100))
    monkeypatch.setattr(measure, '_busy', lambda pid: 1e9 if next(calls) == 5 else 0.0)
    replies = measure.alternate(both, repeats=2)
    assert log == ['a', 'b'] * 4
    assert [reply['seconds'] for reply in replies['ours']] == [2, 3]
    assert all(reply['others'] == 0 for reply in replies['ours'])


def test_rows_are_picked_by_the_beginning_of_their_names():
    wanted = cases.pick(['peer/batch=1', 'fit'])
    assert wanted('peer/batch=1/float32/guided') and wanted('fit/equal')
    assert not wanted('peer/batch=16/float32/guided') and not wanted('decode/batch=1')
    assert cases.pick([])('anything')


def test_a_guide_survives_json():
    for guide in cases.GUIDES.values():
        assert Guide.of(json.loads(json.dumps(guide.message(), allow_nan=False))) == guide
    assert Guide(etas=(0.1, math.inf)).eta_of_rows(3).tolist() == [np.float32(0.1), math.inf, np.float32(0.1)]
    assert np.isinf(workload.UNGUIDED.eta_of_rows(2)).all()


def test_questions_are_gsm8k_or_else_arithmetic(tmp_path):
    pairs, source = workload.solved(tmp_path, 5)
    assert source == 'arithmetic' and len(pairs) == 5
    for question, answer in pairs:
        a, operation, b = question.split()
        assert int(answer) == solve(int(a), operation, int(b))
    (tmp_path / 'train.jsonl').write_text(json.dumps({'question': 'How?', 'answer': 'So: 2<<1+1=2>>.\n#### 2'}) + '\n')
    assert workload.solved(tmp_path, 5) == ([('How?', 'So: 2.\n#### 2')], 'GSM8K')


class Letters:
    """A tokenizer with a token a letter."""

    def encode_chat(self, messages):
        return [ord(letter) for letter in f'user: {messages[0]["content"]} end']


def test_prompts_are_chats_of_one_length():
    pairs = [('one?', '1'), ('and two?', '2')]

    def texts(count, length):
        found = workload.token_prompts(pairs, Letters(), count, length)
        assert found.shape == (count, length)
        return [''.join(map(chr, row)) for row in found]

    filled = texts(3, 30)
    assert filled[1] == 'user: ' + 'and two?\n2\n\none?\n1\n\nand two? end'[-24:] and filled[0] == filled[2]
    assert filled[0].startswith('user: ') and filled[0].endswith('\n2\n\none? end')
    # First those that have the length themselves.
    assert texts(3, 14) == ['user: one? end', 'user: one? end', 'user: two? end']


def fake_row(name, **more):
    replies = {'ours': [{'seconds': 1, 'tokens': 200}], 'PyTorch': [{'seconds': 2, 'tokens': 200}]}
    return measure.result(name, {}, replies, 'PyTorch', **more)


MACHINE = {'cpu': 'a processor', 'cores': 2, 'commit': 'abc', 'command': 'python benchmarks/run.py '}


def test_results_become_tables_between_markers(tmp_path):
    path, document = tmp_path / 'peer.json', tmp_path / 'doc.md'
    prefill = {side: {'seconds': 2.0, 'tokens': 1000} for side in ('ours', 'PyTorch')}
    tables.keep(path, {**fake_row('peer/batch=1/guided', prefill=prefill), 'rates': {}}, MACHINE)
    tables.keep(path, fake_row('peer/batch=16/guided', prefill=prefill), MACHINE)
    tables.keep(path, fake_row('peer/batch=1/guided', prefill=prefill), MACHINE)  # takes the place of the first
    assert [row['name'] for row in tables.read(path)] == ['peer/batch=1/guided', 'peer/batch=16/guided']
    document.write_text('before\n<!-- peer -->\nold\n<!-- /peer -->\nafter\n')
    for _ in range(2):  # and again: the same
        tables.rewrite(document, tmp_path)
        text = document.read_text()
        assert text.startswith('before\n<!-- peer -->\n| ') and text.endswith('.\n<!-- /peer -->\nafter\n')
        assert 'old' not in text and text.count('| batch 1, guided |') == 1
        line, = [line for line in text.splitlines() if line.startswith('| batch 16')]
        assert line == ('| batch 16, guided | 200 (200 – 200) | 100 (100 – 100) | 2.00 (2.00 – 2.00) | 500 | 500 |')
        assert 'a processor, 2 cores, at abc: `python benchmarks/run.py`.' in text
    with pytest.raises(ValueError, match='no place for the case peer'):
        tables.filled('nothing', {'peer': tables.read(path)})


def test_every_case_has_a_table_and_a_place_for_it():
    assert set(tables.TABLES) == set(cases.CASES)
    text = (measure.ROOT / 'docs' / 'performance.md').read_text()
    assert all(f'<!-- {case} -->' in text and f'<!-- /{case} -->' in text for case in cases.CASES)


def test_a_table_of_decoding_beside_what_arithmetic_says():
    replies = {'unguided': [{'seconds': 1, 'tokens': 90}],
               'guided': [{'seconds': 2, 'tokens': 90, 'value_tokens': 270}]}
    work = {'unguided': {'parameters': 30, 'flops': 10},
            'guided': {'parameters': 40, 'flops': 50, 'flops_a_value_token': 2}}
    row = measure.result('decode/batch=2', {}, replies, 'unguided', work=work)
    last = tables.decode_table([row]).splitlines()[-1]
    assert last == '| batch 2, guided | 45 (45 – 45) | 0.50 (0.50 – 0.50) | 0.75 | 0.20 | 0.62 | 3.0 |'


def test_time_is_of_the_innermost_operation_and_divided_among_threads():
    one = [profiles.Event(0, 10, 'loop'), profiles.Event(2, 6, 'a'), profiles.Event(6, 8, 'b'),
           profiles.Event(14, 16, 'a')]
    other = [profiles.Event(4, 7, 'b')]
    assert profiles.divided([one]) == {'loop': 4 + 4, 'a': 6, 'b': 2}
    # From 4 to 6 beside 'a', from 6 to 7 beside another 'b'. From 10 to 14 nothing runs.
    assert profiles.divided([one, other]) == {'loop': 4 + 4, 'a': 5, 'b': 3}
    assert profiles.divided([]) == {}


@pytest.mark.parity
def test_a_profile_tells_the_parts_of_a_step_apart(tmp_path, monkeypatch):
    ours, peer = tiny_sides(tmp_path, monkeypatch)
    shape = dict(batch=3, prompt=64, layers=2, dtype='float32', tokens=4, guide=Guide(candidates=5).message())
    found = ours.profile_decode(**shape, room=8)
    for part in ('reference, products with weights', 'reference, attention', 'value network, products with weights',
                 'value network, attention', 'choice of candidates', 'law and draw'):
        assert found[part] > 0
    assert peer.profile_decode(**shape)['products'] > 0
    ours.prepare_fit(samples='equal', samples_per_row=1, batch=16, layers=2)
    peer.prepare_fit(samples='equal', batch=16, layers=2)
    found = ours.profile_fit('equal')
    for part in ('forward, products with weights', 'backward, products with weights', 'backward, attention',
                 'loss, clipping and optimizer'):
        assert found[part] > 0
    assert peer.profile_fit('equal')['products'] > 0
    row = {'name': 'profile/fit', 'parts': {'ours': {'some': 1.0, 'more': 3.0}}}
    lines = tables.profile_table([row]).splitlines()
    assert lines[2:] == ['| more | 3 | 75% |', '| some | 1 | 25% |', '| all | 4 |  |']


@pytest.mark.parity
def test_how_many_tokens_the_nucleus_holds(tmp_path, monkeypatch):
    ours, _ = tiny_sides(tmp_path, monkeypatch)
    sizes = ours.nucleus(batch=3, prompt=64, tokens=4)
    assert len(sizes) == 12 and 1 <= min(sizes) and max(sizes) < 50
    assert len(set(sizes)) > 1


def test_drafts_taken_beside_theory(tmp_path):
    replies = {label: [{'seconds': 1, 'tokens': 8}] for label in ('unguided', 'draft of 1')}
    row = measure.result('speculation/acceptance/spread=2', {'tokens': 10}, replies, 'unguided',
                         tokens_a_step={'unguided': 1.0, 'draft of 1': 1.6}, kl={'unguided': 1.0, 'draft of 1': 1.8})
    assert acceptance.measured(row) == pytest.approx((0.08, 0.6))
    assert acceptance.least(0.08) == pytest.approx(0.8 / 1.2)
    assert acceptance.least(5.0) == 0 and acceptance.least(0) == 1
    assert acceptance.lines([row])[1] == ['2', '0.600', '0.0800', '0.667']
    acceptance.draw([row], str(tmp_path / 'drawn.png'))
    assert (tmp_path / 'drawn.png').stat().st_size > 1000


def tiny_sides(tmp_path, monkeypatch):
    """Both sides in this process, on a tiny model of random weights far from their start."""
    from benchmarks import ours, peer
    from qsharp_jax.models import pretrained
    from tests import published
    published.save('llama', tmp_path / 'model')
    monkeypatch.setattr(ours.references, 'tokenizer_of', lambda file: TinyTokenizer())
    monkeypatch.setattr(ours.pretrained, 'open_checkpoint', lambda source: pretrained.open_folder(tmp_path / 'model'))
    monkeypatch.setattr(ours, '_SPREAD', 2.0)
    both = ours.Side(), peer.Side()
    both[0].setup(str(tmp_path), str(tmp_path))
    both[1].setup(str(tmp_path))
    both[0].export(layers=2, prompt=64)
    return both


class TinyTokenizer:
    """Folds letters into 50 ids."""

    vocab_size = 50

    def encode(self, text):
        return [ord(letter) % 50 for letter in text]

    def encode_chat(self, messages):
        return self.encode(f'Question: {messages[0]["content"]}')


@pytest.mark.parity
@pytest.mark.parametrize('guide', [
    workload.UNGUIDED, Guide(), Guide(outside='zero', candidates=5), Guide(offset='cd', candidates=5),
    Guide(etas=(0.05, 0.3, math.inf), candidates=7), Guide(order='after_sampler', candidates=50)])
def test_the_peer_samples_from_our_law(guide, tmp_path, monkeypatch):
    import torch
    ours, peer = tiny_sides(tmp_path, monkeypatch)
    forced = np.random.default_rng(1).integers(0, 50, (6, 5)).tolist()
    asked = dict(batch=6, prompt=64, layers=2, forced=forced, guide=guide.message())
    with torch.no_grad():
        found = peer.log_probs(**asked, ours=ours.log_probs(**asked))
    assert found['laws'] == 30 and found['other_support'] == found['wide'] == 0
    assert found['largest'] < 1e-4
    # The guidance is there to be seen: another guide is another law.
    other = dataclasses.replace(guide, etas=(1.0,))
    asked['guide'] = other.message()
    with torch.no_grad():
        again = peer.log_probs(**asked, ours=str(tmp_path / 'ours_log_probs.npy'))
    assert again['other_support'] or again['largest'] > 1e-2


@pytest.mark.parity
def test_both_sides_write_as_many_tokens_as_asked(tmp_path, monkeypatch):
    ours, peer = tiny_sides(tmp_path, monkeypatch)
    shape = dict(batch=3, prompt=64, layers=2, dtype='float32', tokens=4, guide=Guide(candidates=5).message())
    replies = [ours.decode(**shape, room=8), peer.decode(**shape)]
    assert [reply['tokens'] for reply in replies] == [12, 12]
    assert 12 <= replies[0]['value_tokens'] <= 12 * 6 and replies[0]['kl_per_token'] > 0


@pytest.mark.parity
@pytest.mark.parametrize('samples', ('equal', 'unequal'))
def test_both_sides_fit_the_same_loss(samples, tmp_path, monkeypatch):
    # The sides have orders of their own: at such a rate updates hardly change the losses after them.
    monkeypatch.setattr(workload, 'LEARNING_RATE', 1e-7)
    ours, peer = tiny_sides(tmp_path, monkeypatch)
    per_row = 1 if samples == 'equal' else 4
    work = [ours.prepare_fit(samples=samples, samples_per_row=per_row, batch=16 // per_row, layers=2),
            peer.prepare_fit(samples=samples, batch=16, layers=2)]
    assert all(one['real'] <= one['computed'] for one in work)
    if samples == 'equal':
        assert all(one == {'computed': 32 * 128, 'real': 32 * 128} for one in work)
    first, second = ours.fit(samples), peer.fit(samples)
    assert first['tokens'] == second['tokens']
    assert first['loss'] == pytest.approx(second['loss'], abs=1e-4)
    assert jnp.isfinite(first['loss'])
    # Another pass goes on from there, and lowers it.
    assert ours.fit(samples)['loss'] < first['loss'] and peer.fit(samples)['loss'] < second['loss']


@pytest.mark.parity
def test_row_steps_are_those_of_the_decoder(tmp_path, monkeypatch):
    ours, _ = tiny_sides(tmp_path, monkeypatch)
    monkeypatch.setattr(type(ours), '_sentence_ends', lambda self: (7,))
    advance, steps = decoding.advance, []

    def counted(*arguments):
        pool, block = advance(*arguments)
        steps.append(int(block.steps))
        return pool, block
    monkeypatch.setattr(decoding, 'advance', counted)
    found = ours.collect(prompts=3, samples=2, batch=4, room=8, layers=2, guide=workload.UNGUIDED.message())
    assert found['pairs'] == 6 and found['row_steps'] == 4 * sum(steps) and 0 < found['active'] <= found['row_steps']
