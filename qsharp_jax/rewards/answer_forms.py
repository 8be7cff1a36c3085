r"""What an answer's text comes to without what says nothing of its value: signs, units in plain words, white space."""
from __future__ import annotations

from fractions import Fraction
import re

from qsharp_jax.data import answer_text

_UNICODE = {
    '°': r'^\circ ', '∞': r'\infty ', '∪': r'\cup ', '∩': r'\cap ', '≤': r'\le ', '≥': r'\ge ', '≠': r'\ne ',
    '·': r'\cdot ', '×': r'\times ', '÷': r'\div ', '±': r'\pm ', 'π': r'\pi ', 'θ': r'\theta ', '∅': r'\emptyset ',
    '½': r'\frac{1}{2}', '⅓': r'\frac{1}{3}', '⅔': r'\frac{2}{3}', '¼': r'\frac{1}{4}', '¾': r'\frac{3}{4}',
    '−': '-', '–': '-', '€': '', '£': '', '~': ' '}
_SIGNS = str.maketrans(_UNICODE)
_ROOT = re.compile(r'√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))')
_POWERS = str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-')
_POWER = re.compile('[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+')
_THOUSANDS = re.compile(r'(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))')
_GROUPED = re.compile(r'(?<![\d.,])(?<![\d.,] )\d{1,3}(?: \d{3})+(?![\d/]| \d)')
_MIXED = re.compile(r'(?<![\w.])(\d+)\s+(\d+)/(\d+)(?![\w.])')
_WORDED = re.compile(r'\d[\w.,/ ]*')  # a number, perhaps with its unit
_NAMED = re.compile(r'(?<=\d)\s+(hundred|thousand|million|billion|trillion)\b')
_NAMES = {'hundred': 2, 'thousand': 3, 'million': 6, 'billion': 9, 'trillion': 12}
# White space that tells two numbers apart: without it 2 1/2 would be 21/2, and the list 1, 234 one number.
_BETWEEN_NUMBERS = re.compile(r'(?<=[\d.])\s+(?=[\d.])|(?<=\d,)\s+(?=\d{3}(?!\d))')
_NUMBER = re.compile(r'[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|[+-]?\.\d+')
_PERCENT = re.compile(r'(.*?)(?:\\?%|percent)')
_UNIT = re.compile(r'(?<=[\d}])\s+([A-Za-z][A-Za-z/^{}23. -]*)$')
_EXPONENT = re.compile(r'\^\{?[23]\}?')
_WORD = re.compile(r'[a-z]*[aeiouy][a-z]*')
_ABBREVIATED = {
    'cm', 'cu', 'dm', 'ft', 'ft/s', 'hr', 'hrs', 'in', 'kg', 'km', 'km/h', 'kph', 'lb', 'lbs', 'mg', 'ml', 'mm', 'mph',
    'pts', 'sq', 'yd', 'yds'}
_LINKS = {'a', 'an', 'of'}
# Words behind a number that are no unit: they have a value, or join what has one.
_MEANT = {
    'alpha', 'and', 'arccos', 'arcsin', 'arctan', 'beta', 'choose', 'cos', 'cosh', 'cot', 'csc', 'cubed', 'delta',
    'divided', 'exp', 'factorial', 'gamma', 'inf', 'infinity', 'lambda', 'less', 'log', 'minus', 'mod', 'modulo',
    'more', 'multiplied', 'not', 'omega', 'over', 'phi', 'plus', 'psi', 'root', 'sec', 'sigma', 'sin', 'sinh', 'sqrt',
    'squared', 'tan', 'tanh', 'tau', 'than', 'theta', 'times', 'undefined'}


def tidy(text: str) -> str:
    r"""Returns an answer without signs and units that mean nothing, as LaTeX has it.

    Unicode signs become commands, a mixed number (2 1/2) and a number's name (3 million) become LaTeX, and words
    behind a number that can be no more than its unit (18 dollars) are left out.
    """
    text = text.translate(_SIGNS).strip()
    for left, right in (('$', '$'), ('\\(', '\\)')):
        if len(text) > 2 and text.startswith(left) and text.endswith(right):
            text = text[len(left):-len(right)].strip()
    bare = answer_text.unwrapped(text)
    if text.startswith('\\') and text.endswith('}') and _WORDED.fullmatch(bare):
        text = bare
    text = _ROOT.sub(lambda root: rf'\sqrt{{{root[1] or root[2]}}}', text)
    text = _POWER.sub(lambda power: f'^{{{power[0].translate(_POWERS)}}}', text)
    text = _THOUSANDS.sub('', text.rstrip(',;').removesuffix('.'))
    text = _GROUPED.sub(lambda number: number[0].replace(' ', ''), text)
    text = _NAMED.sub(lambda name: rf'\cdot 10^{{{_NAMES[name[1]]}}}', text)
    text = _UNIT.sub(lambda unit: '' if _is_unit(unit[1]) else unit[0], text)
    return _MIXED.sub(r'\1\\frac{\2}{\3}', text)


def compact(text: str) -> str:
    """Returns a text without white space, but for one space where there is some between two numbers."""
    return ' '.join(''.join(part.split()) for part in _BETWEEN_NUMBERS.split(text))


def number(text: str) -> Fraction | None:
    """Returns the number that a compact text is, exactly; None if it is none."""
    return Fraction(text.replace(',', '')) if _NUMBER.fullmatch(text) else None


def percentage(text: str) -> Fraction | None:
    """Returns the number in front of the percent sign of a compact text; None if it is no such text."""
    found = _PERCENT.fullmatch(text)
    return number(found[1]) if found else None


def _is_unit(words: str) -> bool:
    """Returns whether words can be no more than a unit: 'dollars', 'square cm', 'miles per hour', 'cm^2'."""
    bare = [word.rstrip('.') for word in _EXPONENT.sub('', words.lower()).replace('-', ' ').split()]
    parts = [part for word in bare for part in ([word] if word in _ABBREVIATED else word.split('/'))]
    units = [part for part in parts if part not in _LINKS]
    return bool(units) and all(
        unit in _ABBREVIATED or len(unit) > 2 and _WORD.fullmatch(unit) and unit not in _MEANT for unit in units)
