"""The grader of mathematics against labelled pairs, hostile texts, and its own absence."""
from __future__ import annotations

import collections
import logging
import math
import multiprocessing
import os
from pathlib import Path
import subprocess
import sys
import time

import pebble
import pytest

from qsharp_jax import rewards
from qsharp_jax.data import answer_text
from qsharp_jax.rewards import mathematics, registry, RewardError, scoring
from tests import grading_matrix, grading_pairs
from tests.grading_matrix import ENDLESS

ROOT = Path(__file__).resolve().parents[1]
GRADING = ROOT / 'docs' / 'grading.md'
REWARD = rewards.load('math')
KILLABLE = {'workers': 1, 'timeout_seconds': 20.0, 'on_error': 'stop'}


def test_the_fixture_has_what_it_says():
    pairs = grading_matrix.labelled()
    assert len(pairs) >= 150 and len({pair[:3] for pair in pairs}) == len(pairs)
    assert sum(right for *_, right in pairs) > 100 < sum(not right for *_, right in pairs) + 10


@pytest.mark.parametrize('kind', [*grading_pairs.RIGHT])
def test_right_answers_in_another_form_are_accepted(kind):
    rejected = {pair for pair in grading_pairs.RIGHT[kind] if not mathematics.equivalent(*pair)}
    assert rejected == grading_pairs.KNOWN_REJECTIONS & {*grading_pairs.RIGHT[kind]}


@pytest.mark.parametrize('kind', [kind for kind in grading_pairs.WRONG if kind != ENDLESS])
def test_wrong_answers_are_rejected_whichever_is_called_the_answer(kind):
    for answer, given in grading_pairs.WRONG[kind]:
        assert not mathematics.equivalent(answer, given), (answer, given)
        assert not mathematics.equivalent(given, answer), (given, answer)


def test_what_no_box_holds_is_never_right():
    for text in grading_pairs.BOXLESS:
        assert mathematics.math([text], ['72']) == [0.0]
    # Nor if the answer itself were nothing.
    assert mathematics.math([r'\boxed{}', '', 'x'], ['', '', '']) == [0.0] * 3


def test_numbers_are_equal_not_near():
    assert mathematics.equivalent('1' * 60, '1' * 60 + '.0')
    assert not mathematics.equivalent('1' * 60, '1' * 59 + '2')
    assert not mathematics.equivalent('2', '2.0000000001')
    assert mathematics.equivalent('1,000.50', '1000.5') and not mathematics.equivalent('1', '1' * 5000)


def test_a_comparison_without_end_is_killed_and_counted_and_the_others_are_graded(caplog):
    endless = answer_text.boxed(grading_pairs.WRONG[ENDLESS][0][1])
    completions = [r'so \boxed{72}', endless, r'\boxed{71}', r'\boxed{144/2}']
    # The worker starts before, so that the limit is that of grading alone.
    assert rewards.score(REWARD, ['?'], completions[:1], {'answer': ['72']}, **KILLABLE).tolist() == [1]
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        earned = rewards.score(REWARD, ['?'] * 4, completions, {'answer': ['72'] * 4},
                               **{**KILLABLE, 'timeout_seconds': 5.0})
    assert time.monotonic() - began < 60
    assert earned.tolist()[::2] == [1, 0] and math.isnan(earned[1]) and earned[3] == 1
    assert '1 of 4 answers took longer than 5 s and abstain; the first is row 1' in caplog.text


def test_it_is_never_graded_where_it_cannot_be_killed():
    with pytest.raises(RewardError, match="'math' may take for ever .* set reward_options.workers to 1 or more"):
        rewards.score(REWARD, ['?'], [r'\boxed{1}'], {'answer': ['1']}, **{**KILLABLE, 'workers': 0})
    assert multiprocessing.parent_process() is None


@pytest.mark.parametrize('text', [
    '1' * 10 ** 6, '1' + ' ' * 10 ** 6 + 'a', '1' + ' 111' * 250_000 + '/', '1 ' * 500_000, '1,111' * 200_000,
    '1\\,' * 300_000, '1 ' + 'aa ' * 300_000 + '1', '1 a' * 300_000, '\\text{' * 150_000, '√(' * 300_000,
    '1 million' * 100_000, '1' * 10 ** 6 + '%', '.,;' * 300_000])
def test_long_texts_are_settled_in_linear_time(text):
    began = time.perf_counter()
    assert not mathematics.settled('72', text)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize('name, answers', [
    ('math', ['72', r'\frac{1}{2}', r'\text{even}']), ('math', ['7', '7']), ('math', [r'\frac{1}{2}'] * 2),
    ('math', [r'\frac{1}{2}', r'\dfrac{1}{2}', '7']),
    ('gsm8k', ['72', '18']), ('gsm8k', ['5', '5']), ('multiple_choice', ['A', 'C']), ('multiple_choice', ['B', 'B'])])
def test_canaries_are_written_as_the_reward_looks_for_them(name, answers):
    options = KILLABLE if name == 'math' else {**KILLABLE, 'workers': 0}
    rewards.check_canaries(rewards.load(name), ['?'] * len(answers), answers, {'answer': answers}, **options)


BROKEN = """
def parse(text, **options):
    return []


def verify(*parsed, **options):
    return False
"""


def test_canaries_reach_what_the_workers_grade_with(tmp_path):
    """A question whose answer is an integer never does: a broken package would grade it well."""
    (tmp_path / 'math_verify.py').write_text(BROKEN)
    script = ('from qsharp_jax import rewards\n'
              f'rewards.check_canaries(rewards.load("math"), ["?"], ["7"], {{"answer": ["7"]}}, **{KILLABLE})\n')
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': path})
    assert r"reward 'math' fails its own canary: where the answer is '\\frac{1}{2}', '\\boxed{0.5}' must earn 1, and" \
           ' earns 0' in done.stderr


def test_canaries_stop_where_a_worker_is_not_killed(monkeypatch):
    schedule = pebble.ProcessPool.schedule
    monkeypatch.setattr(pebble.ProcessPool, 'schedule',
                        lambda self, function, args=(), timeout=None: schedule(self, function, args=args))
    monkeypatch.setattr(scoring, '_HANG', 1)
    with pytest.raises(RewardError, match='was to be killed after 0.025 s went on for 1 s'):
        rewards.check_canaries(REWARD, ['?'], ['7'], {'answer': ['7']}, **KILLABLE)


def test_canaries_stop_where_the_answers_are_not_what_the_reward_grades():
    with pytest.raises(RewardError, match='does not tell right from wrong.*#### B.* earns 0'):
        rewards.check_canaries(rewards.load('gsm8k'), ['?'] * 2, ['B', 'C'], {'answer': ['B', 'C']},
                               **{**KILLABLE, 'workers': 0})


def test_a_function_of_ones_own_may_say_how_an_answer_is_written(tmp_path, caplog):
    source = 'def f(completions, answer):\n    return [float(c == f"<{a}>") for c, a in zip(completions, answer)]\n'
    path = tmp_path / 'mine.py'
    for extra, warns in (('', True), ('f.as_completion = lambda answer: f"<{answer}>"\n', False)):
        path.write_text(source + extra)
        caplog.clear()
        rewards.check_canaries(rewards.load(f'{path}:f'), ['?'] * 2, ['1', '2'], {'answer': ['1', '2']},
                               **{**KILLABLE, 'workers': 0})
        assert ('does not tell right from wrong' in caplog.text) == warns


@pytest.mark.parametrize('text, answer, earned', [
    ('#### 18', '18', 1), ('so 18.\n#### $18.00\n', '18', 1), ('#### 1,234', '1234', 1), ('#### 18 dollars', '18', 1),
    ('#### 17\n#### 18', '18', 1), ('#### -3', '-3', 1), ('18', '18', 0), ('####', '18', 0), ('#### none', '18', 0),
    ('#### -$18', '-18', 1), ('#### $-18', '-18', 1), (r'#### \$18', '18', 1), ('#### **18**', '18', 1),
    ('#### €18', '18', 1), ('#### 18.', '18', 1), ('#### 18/day', '18', 1), ('#### 1/2', '1', 0), ('#### 1/2', '.5', 1),
    ('#### 1,8', '18', 0), ('#### 1e1', '1', 0), ('#### 1/0', '0', 0), ('#### ' + '1,' * 99_999, '1', 0),
    ('#### 180', '18', 0), ('#### ' + '9' * 9000, '9', 0), ('#### x', 'y', 0)])
def test_gsm8k(text, answer, earned):
    reward = rewards.load('gsm8k')
    assert rewards.score(reward, ['?'], [text], {'answer': [answer]}, **{**KILLABLE, 'workers': 0}) == earned


@pytest.mark.parametrize('text, answer, earned', [
    (r'\boxed{B}', 'B', 1), (r'\boxed{\text{(B)}}', 'B', 1), ('The answer is B.', 'B', 1), (r'\boxed{C}', 'B', 0),
    (r'\boxed{B and C}', 'B', 0), ('', 'B', 0), ('perhaps B', 'B', 0)])
def test_multiple_choice(text, answer, earned):
    reward = rewards.load('multiple_choice')
    assert rewards.score(reward, ['?'], [text], {'answer': [answer]}, **{**KILLABLE, 'workers': 0}) == earned


def test_without_its_package_it_says_what_to_install():
    script = ('import sys\nsys.modules["math_verify"] = None\nfrom qsharp_jax import rewards\n'
              'assert "math" in rewards.names()\nrewards.load("math")\n')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
    assert 'RewardError: reward \'math\' needs the package math_verify, which is not installed: run pip install -e ' \
           '".[math]" in the folder' in done.stderr


def test_the_digest_is_of_what_the_verdict_depends_on(monkeypatch):
    digest = rewards.load('math').digest
    assert any('\\boxed' in text for text in registry._REGISTRY['math'].depends)
    monkeypatch.setitem(registry._REGISTRY, 'math', registry.Registered(mathematics.math, depends=('0.0.1',)))
    assert rewards.load('math').digest != digest


def matrix(document):
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in document.splitlines()]
    return {row[0]: [int(cell) for cell in row[1:]] for row in rows if len(row) == 6 and row[1].isdecimal()}


def test_the_matrix_in_the_docs_is_of_these_pairs():
    counts = {kind: sum(verdicts) for kind, verdicts in matrix(GRADING.read_text()).items()}
    pairs = grading_matrix.labelled()
    assert counts == {**collections.Counter(kind for kind, *_ in pairs), 'all': len(pairs)}
    assert f'matrix of {len(pairs)} labelled pairs' in (ROOT / 'docs' / 'rewards.md').read_text()


@pytest.mark.slow
def test_the_matrix_in_the_docs_is_what_the_grader_says():
    found, said = matrix(grading_matrix.document()), matrix(GRADING.read_text())
    for kind in said:  # which of the wrong ones get no verdict in time depends on the machine
        assert found[kind][:3] == said[kind][:3], kind
