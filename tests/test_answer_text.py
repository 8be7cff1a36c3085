"""Where the final answer stands in a text."""
from __future__ import annotations

import time

import pytest

from qsharp_jax.data import answer_text


@pytest.mark.parametrize('text, inside', [
    (r'so \boxed{7}.', '7'), (r'\boxed{1} then \boxed{2}', '2'), (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{ 3 }', '3'), (r'\boxed{\{1, 2\}}', r'\{1, 2\}'), (r'\boxed{\left\{x\right\}}', r'\left\{x\right\}'),
    (r'\boxed{\boxed{5}}', '5'), (r'\fbox{9}', '9'), (r'$\boxed 2$.', '2'), (r'\boxed{}', ''), ('7', None),
    (r'\boxed{7', None), (r'\boxed{1} and \boxed{\frac{1}{2}', None), (r'\boxed', None), (r'\boxed(7)', None),
    (r'$\boxed7$', '7'), (r'\boxedx', None),
    (r'\boxed{a \\} b}', r'a \\'), ('\\boxed{1\n2}', '1\n2'), (r'\boxed{\text{no } \} brace}', r'\text{no } \} brace')])
def test_last_boxed(text, inside):
    assert answer_text.last_boxed(text) == inside


@pytest.mark.parametrize('text', [
    r'\boxed' + '{' * 100_000, r'\boxed' + '{' * 50_000 + '1' + '}' * 50_000, r'\boxed{' * 20_000, '\\' * 100_000,
    r'\boxed{' + '\\' * 100_000, r'\boxed' + ' ' * 100_000])
def test_hostile_texts_take_linear_time(text):
    began = time.perf_counter()
    answer_text.last_boxed(text)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize('text, inside', [
    ('so 3.\n#### 3', '3'), ('#### 1\n#### 1,234\nbye', '1,234'), ('####5', '5'), ('3', None), ('####', None),
    ('####\n', None)])
def test_after_hashes(text, inside):
    assert answer_text.after_hashes(text) == inside


@pytest.mark.parametrize('text, letter', [
    (r'\boxed{B}', 'B'), (r'\boxed{(C)}', 'C'), (r'\boxed{\text{D}}', 'D'), (r'\boxed{\textbf{(A)}}', 'A'),
    (r'\boxed{A.}', 'A'), (r'\boxed{AB}', None), (r'\boxed{b}', 'B'), (r'\boxed{}', None),
    (r'\boxed{(B) a dog}', 'B'), (r'\boxed{B. a dog}', 'B'), (r'\boxed{B) a dog}', 'B'), (r'\boxed{B: a, and b}', 'B'),
    (r'\boxed{\text{(B) a dog}}', 'B'), (r'\boxed{\text{(B)} a dog}', 'B'), (r'\boxed{\text{B}.}', 'B'),
    (r'\boxed{$B$}', 'B'), (r'\boxed{**B**}', 'B'), (r'\boxed{Option B}', 'B'), (r'\boxed{B and C}', None),
    (r'\boxed{(B) and (C)}', None), (r'\boxed{(B), (C)}', None), (r'\boxed{A dog}', None),
    (r'\boxed{(A) a cat (B) a dog}', None), ('The answer is **B**.', 'B'), ('**Answer:** B', 'B'), ('ANSWER: B', 'B'),
    ('The correct option is B', 'B'), ('the answer is option B', 'B'), ('The answer is C. Option B is wrong.', 'C'),
    ('The answer is C.', 'C'), ('Answer: (B)', 'B'), ('the answer is A, no, the answer is B', 'B'),
    ('The answer is a cat', None), ("The answer is I'm not sure", None), ('The answer is Apple', None), ('B', None),
    (r'The answer is A: \boxed{B}', 'B')])
def test_last_choice(text, letter):
    assert answer_text.last_choice(text) == letter
