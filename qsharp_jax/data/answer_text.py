"""Where the final answer stands in a text. Apart from builders and rewards, which must read it alike."""
from __future__ import annotations

import re

_BOXES = re.compile(r'\\(?:boxed|fbox)')
_UNBRACED = re.compile(r'\s+([^\s$]+)|(\d+)')
_BRACES = re.compile(r'\\.|[{}]', re.DOTALL)
# (B) with or without the option's text behind it, B alone, or B with a mark and the text.
_CHOICE = re.compile(r'(?:(?:option|choice|answer)\b[\s:]*)?(?:\(([A-Za-z])\)|([A-Za-z])(?=[.:)]|$))[.:)]?(?:\s(.*))?',
                     re.DOTALL | re.IGNORECASE)
_SEVERAL = re.compile(r'\s*(?:and|or|[,;/&])(?:\W|$)|.*(?:^|\s)\(?[B-Z][.:)]', re.DOTALL)
_MARKS = re.compile(r'[$*]')
_WRAPPED = re.compile(r'\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}')
_SAID = re.compile(r"\b(?:[Aa]nswer|ANSWER|(?:[Cc]orrect|[Rr]ight|[Bb]est) (?:option|choice))(?: is| IS)?[:*]*\s+"
                   r"(?:[Oo]ption\s+|[Cc]hoice\s+)?[*$\"'(]*([A-Z])\b(?!['’])")


def boxed(answer: str) -> str:
    r"""Returns the text that says no more than an answer: \boxed{answer}."""
    return rf'\boxed{{{answer}}}'


def unwrapped(text: str) -> str:
    r"""Returns a text without `\text{…}` and its like around words."""
    return _WRAPPED.sub(r'\1', text)


def last_boxed(text: str) -> str | None:
    r"""Returns what is inside the last `\boxed{…}` of a text; None if there is none or its brace is never closed.

    Braces nest, and escaped ones are text. `\boxed 7`, which a few solutions of MATH have, and `\boxed7` are read as
    well. Takes time linear in the length of the text.
    """
    start = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
    if start < 0:
        return None
    after = _BOXES.match(text, start).end()  # type: ignore[union-attr]  # it was found there
    if text[after:after + 1] != '{':
        bare = _UNBRACED.match(text, after)
        return bare[1] or bare[2] if bare else None
    depth = 0
    for mark in _BRACES.finditer(text, after):
        depth += {'{': 1, '}': -1}.get(mark[0], 0)
        if depth == 0:
            return text[after + 1:mark.start()].strip()
    return None


def after_hashes(text: str) -> str | None:
    """Returns the rest of the line behind the last '####' of a text, which is where GSM8K has its answers; or None."""
    _, hashes, rest = text.rpartition('####')
    lines = rest.strip().splitlines()
    return lines[0].strip() if hashes and lines else None


def last_choice(text: str) -> str | None:
    r"""Returns the letter that a text chooses: that in its last box, or else in its last 'answer is B'; or None."""
    inside = last_boxed(text)
    if inside is not None:
        letter = _CHOICE.fullmatch(_MARKS.sub('', unwrapped(inside)).strip())
        one = letter and not (letter[3] and _SEVERAL.match(letter[3]))
        return (letter[1] or letter[2]).upper() if letter and one else None
    said = _SAID.findall(text)
    return said[-1] if said else None
