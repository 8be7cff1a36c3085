r"""Whether the answer in the last \boxed{} of a completion is mathematically the right one.

`math-verify` parses and compares; what needs no algebra is settled before it. Either can take for ever on what a model
may write, so this is graded in processes that can be killed (`scoring`), never in threads.
"""
from __future__ import annotations

from collections.abc import Sequence
import contextlib
import importlib.metadata
import inspect
import logging
import multiprocessing
import re
import resource

import math_verify

from qsharp_jax.data import answer_text
from qsharp_jax.rewards import answer_forms
from qsharp_jax.rewards.registry import register

LONGEST = 1000  # characters of an answer that is parsed; a longer one is right only if it is the same text
# Answer, what is in the box, whether that is right: pairs that only algebra tells, and one that needs none.
_CANARIES = ((r'\frac{1}{2}', '0.5', True), ('x+1', '1+x', True), ('x+1', 'x-1', False), ('2', '3', False))
_DIGITS = 20  # behind the point, that two numbers must agree in
_MEMORY = 4 * 2 ** 30  # bytes of address space that a worker may take
_BASE = re.compile(r'([+-]?[0-9A-Za-z]+)_\{?(\d+)\}?')
_RELATION = re.compile(r'[<>]|\\(?:ne|neq|le|leq|ge|geq|lt|gt)(?![A-Za-z])')
_TIME = re.compile(r'\d{1,2}:\d{2}')
# Two numbers; behind a command or an index, of which the first is a part, they are not side by side.
_ADJACENT = re.compile(r'(\\[A-Za-z]+|[_^])?[\d.]+ [\d.]')

logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that it has no time limit of its own


def equivalent(answer: str, given: str) -> bool:
    """Returns whether a given answer is the right one in another form. What parses to nothing is not.

    Numbers must be equal, not near: decimal ones exactly, others to 20 digits. May take for ever.

    Args:
      answer: the right one.
      given: as it stood in a box.
    """
    told = settled(answer, given)
    if told is not None:
        return told
    try:
        parsed = [math_verify.parse(answer_text.boxed(answer_forms.tidy(text)), parsing_timeout=None)
                  for text in (answer, given)]
        return all(parsed) and bool(math_verify.verify(
            *parsed, allow_set_relation_comp=True, timeout_seconds=None, float_rounding=_DIGITS,
            numeric_precision=3 * _DIGITS))
    except (MemoryError, RecursionError):
        return False  # no model writes a right answer that takes gigabytes


def settled(answer: str, given: str) -> bool | None:
    """Returns what `equivalent` does where no algebra is needed, at once; None where it is."""
    right, other = (answer_forms.compact(answer_forms.tidy(text)) for text in (answer, given))
    if not right or not other:
        return False
    if right == other:
        return True
    if max(len(right), len(other)) > LONGEST:
        return False
    numbers = [answer_forms.number(text) for text in (right, other)]
    shares = [answer_forms.percentage(text) for text in (right, other)]
    for one, two in (numbers, shares):
        if one is not None and two is not None:
            return one == two
    for share, value in zip(shares, reversed(numbers)):
        if share is not None and value is not None:
            return share in (value, 100 * value)  # 25 % is 25, where percent were asked for, and 0.25
    if answer_text.unwrapped(right) == answer_text.unwrapped(other):
        return True
    # Of a number and a relation, 'math-verify' compares the number alone.
    if any(value is not None and _RELATION.search(text) for value, text in zip(numbers, (other, right))):
        return False
    if _TIME.fullmatch(right) and _TIME.fullmatch(other):
        return False  # as ratios 3:30 and 4:40 would be one
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
                   inspect.getsource(answer_text), inspect.getsource(answer_forms)))
def math(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    r"""Whether what is in the last \boxed{} of the completion is equivalent to the answer."""
    if multiprocessing.parent_process() is not None:
        with contextlib.suppress(ValueError, OSError):  # where there is no such limit
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return [float(equivalent(right, answer_text.last_boxed(text) or ''))
            for text, right in zip(completions, answer, strict=True)]
