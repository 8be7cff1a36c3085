"""Rewards of the tasks that come with the package: 1 or 0, by text."""
from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
import inspect
import re

from qsharp_jax.data import answer_text
from qsharp_jax.data.star_graph_text import parse_question
from qsharp_jax.rewards.registry import register

_INTEGER = re.compile(r'[+-]?\d{1,1000}')  # Python reads no integer of more than 4,300 digits
_NODE = re.compile(r'0|[1-9][0-9]{0,8}')  # a name is written in one way
# Of at most a thousand digits: Python reads no integer of more than 4,300. No part of a longer number, an exponent's
# or a list's.
_UNSIGNED = (r'((?:\d{1,3}(?:,\d{3}){1,300}|\d{1,1000})(?:\.\d{1,1000})?|\.\d{1,1000})(?:/(\d{1,1000}))?'
             r'(?!,?\d|\.\d|[eE][+-]?\d|/\d)')
_LEADING = re.compile(rf'[\s*]*([-+]?)\s*(?:\\?[$€£])?\s*([-+]?){_UNSIGNED}')
# A sign behind a digit, as in 10-18, is none of the number's.
_NUMBER = re.compile(rf'(?:(?<![\w.)])([-+]))?(?<![\d.,/])(?<!\d[eE])(?<!\d[eE][-+]){_UNSIGNED}')


@register('exact_match')
def exact_match(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Whether the whole completion is the answer, but for white space around it."""
    return [float(text.strip() == right.strip()) for text, right in zip(completions, answer, strict=True)]


@register('arithmetic', final_answer=lambda text: _integer(text))
def arithmetic(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Whether the whole completion is one integer, equal to the answer."""
    return [float(_INTEGER.fullmatch(text.strip()) is not None and int(text) == int(right))
            for text, right in zip(completions, answer, strict=True)]


@register('numeric_match', final_answer=lambda text: _text_of(_last_number(text)))
def numeric_match(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Whether the last number in the completion, a fraction such as 1/2 included, is that of the answer."""
    return [float(_last_number(text) == _last_number(right) is not None)
            for text, right in zip(completions, answer, strict=True)]


@register('gsm8k', as_completion=lambda answer: f'#### {answer}', depends=(inspect.getsource(answer_text),),
          final_answer=lambda text: _text_of(_number_of(answer_text.after_hashes(text))))
def gsm8k(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Whether the number behind the last '####' is the answer. A currency sign before it does not matter."""
    return [float(_number_of(answer_text.after_hashes(text)) == _number_of(right) is not None)
            for text, right in zip(completions, answer, strict=True)]


@register('multiple_choice', as_completion=answer_text.boxed, depends=(inspect.getsource(answer_text),),
          final_answer=answer_text.last_choice)
def multiple_choice(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    r"""Whether the letter in the last \boxed{}, or else in the last 'answer is B', is the answer."""
    return [float(answer_text.last_choice(text) == right.strip())
            for text, right in zip(completions, answer, strict=True)]


@register('star_graph')
def star_graph_path(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Whether the completion is the path from start to goal."""
    return [float(_nodes(text) == _nodes(right)) for text, right in zip(completions, answer, strict=True)]


@register('star_graph_arm')
def star_graph_arm(completions: Sequence[str], question: Sequence[str]) -> list[float]:
    """Whether the completion is an arm of the graph, from the start to any end: right but for the goal."""
    earned = []
    for text, asked in zip(completions, question, strict=True):
        edges, start, _ = parse_question(asked)
        nodes = _nodes(text)
        walks = all(edge in edges for edge in zip(nodes, nodes[1:]))
        ends = len(nodes) > 1 and nodes[0] == start and not any(a == nodes[-1] for a, _ in edges)
        earned.append(float(walks and ends))
    return earned


@register('star_graph_progress')
def star_graph_progress(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """From -1, for no node, to 2, for the path from start to goal: how much of the path comes before the first mistake.

    An answer of another length than the path loses 1/2, down to -3/2.
    """
    earned = []
    for text, right in zip(completions, answer, strict=True):
        nodes, path = _nodes(text), _nodes(right)
        shared = next((i for i, (a, b) in enumerate(zip(nodes, path)) if a != b), min(len(nodes), len(path)))
        earned.append(3 * shared / len(path) - 1 - (len(nodes) != len(path)) / 2)
    return earned


def _integer(text: str) -> str:
    """Returns the integer that a completion is, in one form; what is none votes as it stands."""
    text = text.strip()
    return str(int(text)) if _INTEGER.fullmatch(text) else text


def _text_of(number: Fraction | None) -> str | None:
    return None if number is None else str(number)


def _last_number(text: str) -> Fraction | None:
    found = None
    for found in _NUMBER.finditer(text):
        pass
    return _fraction(*found.groups()) if found else None


def _number_of(text: str | None) -> Fraction | None:
    found = _LEADING.match(text or '')
    return _fraction(found[1] or found[2], *found.groups()[2:]) if found else None


def _fraction(sign: str | None, above: str, below: str | None) -> Fraction | None:
    if below is not None and not int(below):
        return None
    size = Fraction(above.replace(',', '')) / int(below or 1)
    return -size if sign == '-' else size


def _nodes(text: str) -> list[int]:
    """Returns the nodes of 'a,b,…'; none if the text is no path."""
    pieces = text.strip().split(',')
    return [int(piece) for piece in pieces] if all(_NODE.fullmatch(piece) for piece in pieces) else []
