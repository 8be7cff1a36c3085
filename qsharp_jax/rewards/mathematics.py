r"""Whether the answer in the last \boxed{} of a completion is mathematically the right one.

`math-verify` parses and compares; what needs no algebra is settled before it. Either can take for ever on what a model
may write, so this is graded in processes that can be killed (`scoring`), never in threads.
"""
from __future__ import annotations

from collections.abc import Sequence
import contextlib
from fractions import Fraction
import importlib.metadata
import inspect
import logging
import multiprocessing
import re
import resource

import math_verify

from qsharp_jax.data import answer_text
from qsharp_jax.rewards.registry import register

LONGEST = 1000  # characters of an answer that is parsed; a longer one is right only if it is the same text
# Answer, what is in the box, whether that is right: pairs that only algebra tells, and one that needs none.
_CANARIES = ((r'\frac{1}{2}', '0.5', True), ('x+1', '1+x', True), ('x+1', 'x-1', False), ('2', '3', False))
_MEMORY = 4 * 2 ** 30  # bytes of address space that a worker may take
_NUMBER = re.compile(r'[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|[+-]?\.\d+')
_THOUSANDS = re.compile(r'(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))')
_GROUPED = re.compile(r'(?<![\d.,])(?<![\d.,] )\d{1,3}(?: \d{3})+(?![\d/]| \d)')
_BASE = re.compile(r'([0-9A-Za-z]+)_\{?(\d+)\}?')
# White space that tells two numbers apart: without it 2 1/2 would be 21/2, and the list 1, 234 one number.
_BETWEEN_NUMBERS = re.compile(r'(?<=[\d.])\s+(?=[\d.])|(?<=\d,)\s+(?=\d{3}(?!\d))')
_MIXED = re.compile(r'(?<![\w.])(\d+)\s+(\d+)/(\d+)(?![\w.])')
# Two numbers; behind a command or an index, of which the first is a part, they are not side by side.
_ADJACENT = re.compile(r'(\\[A-Za-z]+|[_^])?[\d.]+ [\d.]')

logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that it has no time limit of its own


def equivalent(answer: str, given: str) -> bool:
    """Returns whether a given answer is the right one in another form. What parses to nothing is not.

    Numbers must be equal, not near. May take for ever.

    Args:
      answer: the right one.
      given: as it stood in a box.
    """
    told = settled(answer, given)
    if told is not None:
        return told
    try:
        parsed = [math_verify.parse(answer_text.boxed(_tidy(text)), parsing_timeout=None) for text in (answer, given)]
        return all(parsed) and bool(math_verify.verify(
            *parsed, allow_set_relation_comp=True, timeout_seconds=None))
    except (MemoryError, RecursionError):
        return False  # no model writes a right answer that takes gigabytes


def settled(answer: str, given: str) -> bool | None:
    """Returns what `equivalent` does where no algebra is needed, at once; None where it is."""
    right, other = _compact(_tidy(answer)), _compact(_tidy(given))
    if not right or not other:
        return False
    if right == other:
        return True
    if max(len(right), len(other)) > LONGEST:
        return False
    if _NUMBER.fullmatch(right) and _NUMBER.fullmatch(other):
        return _value(right) == _value(other)
    bases = _BASE.fullmatch(right), _BASE.fullmatch(other)
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    # Two numbers side by side are none, though math-verify adds them up.
    if any(not pair[1] for text in (right, other) for pair in _ADJACENT.finditer(text)):
        return False
    return None


@register('math', as_completion=answer_text.boxed, in_workers=True, final_answer=answer_text.last_boxed,
          equivalent=equivalent, settled=settled,
          canaries=tuple((answer, answer_text.boxed(given), float(right)) for answer, given, right in _CANARIES),
          depends=(importlib.metadata.version('math-verify'), importlib.metadata.version('latex2sympy2_extended'),
                   inspect.getsource(answer_text)))
def math(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    r"""Whether what is in the last \boxed{} of the completion is equivalent to the answer."""
    if multiprocessing.parent_process() is not None:
        with contextlib.suppress(ValueError, OSError):  # where there is no such limit
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return [float(equivalent(right, answer_text.last_boxed(text) or ''))
            for text, right in zip(completions, answer, strict=True)]


def _tidy(text: str) -> str:
    """Returns an answer without signs that mean nothing, a mixed number (2 1/2) as LaTeX has it."""
    text = text.strip()
    for left, right in (('$', '$'), ('\\(', '\\)')):
        if len(text) > 2 and text.startswith(left) and text.endswith(right):
            text = text[len(left):-len(right)].strip()
    text = _THOUSANDS.sub('', text.removesuffix('.'))
    text = _GROUPED.sub(lambda number: number[0].replace(' ', ''), text)
    return _MIXED.sub(r'\1\\frac{\2}{\3}', text)


def _compact(text: str) -> str:
    """Returns a text without white space, but for one space where there is some between two numbers."""
    return ' '.join(''.join(part.split()) for part in _BETWEEN_NUMBERS.split(text))


def _value(number: str) -> Fraction:
    return Fraction(number.replace(',', ''))
