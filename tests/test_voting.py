"""Which answers are one vote."""
from __future__ import annotations

from collections.abc import Callable
import itertools
from pathlib import Path
import random

import pytest

from qsharp_jax import rewards
from qsharp_jax.rewards import mathematics, voting


def votes(spec: str, *completions: list[str], workers: int = 0) -> list[list[str]]:
    return rewards.votes(rewards.load(spec), completions, workers=workers, timeout_seconds=20.0)


def partition(names: list[str]) -> set[frozenset[int]]:
    """Which places vote alike; those without a vote are left out."""
    return {frozenset(place for place, other in enumerate(names) if other == name) for name in names if name}


def test_texts_are_one_where_they_are_equal() -> None:
    assert votes('exact_match', ['a', ' a\n', 'A', '', '  '], ['a']) == [['a', 'a', 'A', '', ''], ['a']]


@pytest.mark.parametrize('spec, completions, classes', [
    ('arithmetic', ['7', ' 07', '+7', '8', 'seven', ''], [{0, 1, 2}, {3}, {4}]),
    ('numeric_match', ['it is 1,000', '1000.0', 'so 10', 'none'], [{0, 1}, {2}]),
    ('gsm8k', ['x #### 1,000', '#### $1000', '#### 1000.00', '1000', '#### 5'], [{0, 1, 2}, {4}]),
    ('multiple_choice', [r'\boxed{A}', 'the answer is A', r'\boxed{(A)}', r'\boxed{B}', 'A'], [{0, 1, 2}, {3}]),
])
def test_answers_vote_in_the_form_that_the_reward_reads(spec: str, completions: list[str], classes: list[set]) -> None:
    assert partition(votes(spec, completions)[0]) == {frozenset(each) for each in classes}


def boxed(*answers: str) -> list[str]:
    return [rf'Thus \boxed{{{answer}}}.' for answer in answers]


def test_mathematics_votes_by_equivalence_in_workers() -> None:
    answers = boxed(r'\frac{1}{2}', '0.5', r'\dfrac12', '2', 'x+1', '1+x', '') + ['no box', '1/2']
    asked = boxed('3', '3.0', '4')
    found = votes('math', answers, asked, workers=1)
    assert partition(found[0]) == {frozenset({0, 1, 2}), frozenset({3}), frozenset({4, 5})}
    assert found[0][6:] == ['', '', ''] and partition(found[1]) == {frozenset({0, 1}), frozenset({2})}
    order = list(range(len(answers)))
    random.Random(0).shuffle(order)
    assert votes('math', [answers[place] for place in order], workers=1)[0] == [found[0][place] for place in order]


def test_numbers_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError('asked')
    monkeypatch.setattr(voting.processes, 'run', refuse)
    assert votes('math', boxed('1', '1.0', '1,000', '1000'))[0] == ['1', '1', '1000', '1000']


def test_what_is_settled_at_once_is_what_the_grader_says() -> None:
    answers = ['1', '1.0', '01', '1,000', '1000', '$5$', '5', '11_2', '11_{2}', '11_3', '', 'x' * 2000, 'y' * 2000]
    for first, second in itertools.product(answers, answers):
        told = mathematics.settled(first, second)
        assert told in (None, mathematics.equivalent(first, second))
        assert told == mathematics.settled(second, first)
    assert mathematics.settled(r'\frac12', '0.5') is None
    assert mathematics.settled('1.0', '01') and mathematics.settled('1', '5') is False


OWN = '''
def reward(prompts, completions):
    return [1.0 for _ in completions]


reward.final_answer = lambda text: text.split()[-1] if text.split() else None
reward.equivalent = lambda first, second: abs(int(first) - int(second)) <= 1
'''


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / 'own.py').write_text(text)
        return f'{tmp_path}/own.py:reward'
    return write


def test_a_reward_of_ones_own_says_which_answers_are_one(own: Callable[[str], str]) -> None:
    # 1 is near 2 and 2 near 3: the first of a class decides, in an order that is not that of the samples.
    for order in itertools.permutations(['so 1', 'it is 2', '3', '']):
        found = dict(zip(order, votes(own(OWN), list(order))[0]))
        assert found == {'so 1': '1', 'it is 2': '1', '3': '3', '': ''}


@pytest.mark.parametrize('mischief', ('__import__("time").sleep(60)', '__import__("os")._exit(3)'))
def test_pairs_that_hang_or_kill_are_different_and_the_rest_goes_on(
        own: Callable[[str], str], mischief: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = own(OWN.replace('abs(int', f'{mischief} if first == "4" else abs(int'))
    found = rewards.votes(rewards.load(spec), [['4', '5', '7', '8']], workers=1, timeout_seconds=3.0)
    assert found == [['4', '5', '7', '7']]
    assert '3 of 6 pairs of answers' in caplog.text
