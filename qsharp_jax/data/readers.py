"""Questions from files: the formats of published sets, and anyone's own JSON Lines.

Every error names file, line and what is wrong there.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import difflib
import json
import logging
from pathlib import Path
from typing import Any, NoReturn

from qsharp_jax.data import answer_text

Row = dict[str, Any]

_logger = logging.getLogger(__name__)
_SHOWN = 80  # characters of a line in a message
RESERVED = ('prompts', 'completions')  # what a reward is given beside the columns


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as it is in a file.

    Attributes:
      question: what is asked.
      answer: the final answer; '' if the file has none to be had.
      columns: what else the file says of it, by name.
      place: 'file:line'.
      key: text that must not be in two splits; the question, unless several are asked of one text.
    """

    question: str
    answer: str
    columns: Mapping[str, Any]
    place: str
    key: str


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields line number, from 1, and object of every line that is not empty.

    Raises:
      ValueError: a line is no UTF-8, no JSON, or no object; or all are empty.
    """
    found = False
    with open(path, 'rb') as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'), parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                _refuse(path, number, f'is no UTF-8: {error.reason} at byte {error.start}')
            except json.JSONDecodeError as error:
                _refuse(path, number, f'is no JSON: {error.msg} at column {error.colno} of {_short(line)}')
            except (ValueError, RecursionError) as error:
                _refuse(path, number, f'is no JSON: {error}')
            if not isinstance(row, dict):
                _refuse(path, number, f'is no JSON object in {{}}: {_short(line)}')
            found = True
            yield number, row
    if not found:
        raise ValueError(f'{path} is empty.')


def own(path: Path, question: str, answer: str) -> list[Question]:
    """Returns the questions of any JSON Lines file; all its columns are kept, `id` as `source_id`.

    Args:
      path: of the file.
      question: name of the column with the question.
      answer: name of the column with the answer; '' if there is none.

    Raises:
      ValueError: a row has no question or no answer, or other columns than the first one.
    """
    found, names = [], None
    for number, row in json_lines(path):
        names = names or list(row)
        missing = [name for name in names if name not in row]
        if missing:
            _refuse(path, number, f'lacks {_listed(missing)}, which the first row has')
        added = [name for name in row if name not in names]
        if added:
            _refuse(path, number, f'has {_listed(added)}, which the first row lacks')
        asked = _text(path, number, row, question, 'question')
        right = _text(path, number, row, answer, 'answer') if answer else ''
        columns = {'source_id' if name == 'id' else name: value for name, value in row.items()
                   if name not in (question, answer)}
        clash = [name for name in columns if name in (*RESERVED, 'question', 'answer')]
        if clash or 'id' in row and 'source_id' in row:
            _refuse(path, number, f'has the column {_listed(clash or ["source_id"])}, a name that is used otherwise: '
                                  'rename it')
        found.append(Question(asked, right, columns, f'{path.name}:{number}', asked))
    return found


def gsm8k(path: Path) -> list[Question]:
    """Returns the questions of a GSM8K file: `question`, and `answer` whose end is behind '####'."""
    def final(text: str) -> str | None:
        number = answer_text.after_hashes(text)
        return number and number.replace(',', '')

    return _solved(path, 'question', 'answer', final, 'no number behind ####')


def math(path: Path) -> list[Question]:
    r"""Returns the questions of a MATH file: `problem`, `solution` with the answer in its last box, and others.

    Questions whose box is empty are left out: nothing could be right. The published training set has two of them.
    """
    solved = _solved(path, 'problem', 'solution', answer_text.last_boxed, r'no closed \boxed{}')
    empty = [question.place for question in solved if not question.answer]
    if empty:
        _logger.warning('%s: the box is empty in %s; left out.', path, ', '.join(empty))
    return [question for question in solved if question.answer]


def aime(path: Path) -> list[Question]:
    """Returns the questions of an AIME file: `problem`, `answer`, and others such as `solution`."""
    return [
        Question(asked, _text(path, number, row, 'answer', 'answer'),
                 {name: row[name] for name in ('solution', 'url') if name in row}, f'{path.name}:{number}', asked)
        for number, row in json_lines(path) for asked in (_text(path, number, row, 'problem', 'question'),)]


def quality(path: Path) -> list[Question]:
    """Returns the questions of a QuALITY file, one line of which has an article and the questions of one writer.

    Each becomes the article, the question and its four options with the letters A to D; the answer is a letter. All
    questions on one article share their key.
    """
    found = []
    for number, row in json_lines(path):
        article = _text(path, number, row, 'article', 'article')
        for place, entry in enumerate(_value(path, number, row, 'questions'), start=1):
            asked = _text(path, number, entry, 'question', 'question')
            options = _value(path, number, entry, 'options')
            label = entry.get('gold_label')
            if label not in range(1, len(options) + 1):
                _refuse(path, number, f'has no answer to question {place}: gold_label is {label!r}, not the number of '
                                      'an option (the labels of the test set are not published)')
            letters = [chr(ord('A') + i) for i in range(len(options))]
            listed = '\n'.join(f'({letter}) {option}' for letter, option in zip(letters, options))
            columns = {'title': str(row.get('title', '')), 'difficult': int(entry.get('difficult', 0)),
                       'asked': asked, 'options': list(options)}
            found.append(Question(f'{article.strip()}\n\n{asked}\n\n{listed}', letters[label - 1], columns,
                                  f'{path.name}:{number}', article))
    return found


def _solved(path: Path, question: str, solution: str, final: Callable[[str], str | None], lacks: str) -> list[Question]:
    """Returns the questions of a file whose answers stand inside worked solutions."""
    found = []
    for number, row in json_lines(path):
        asked = _text(path, number, row, question, 'question')
        worked = _text(path, number, row, solution, 'answer')
        right = final(worked)
        if right is None:
            _refuse(path, number, f'has no answer: there is {lacks} in its {solution!r}')
        columns: Row = {name: str(row[name]) for name in ('level', 'type', 'subject') if name in row}
        found.append(Question(asked, right, {**columns, 'solution': worked}, f'{path.name}:{number}', asked))
    return found


def _text(path: Path, number: int, row: Row, name: str, what: str) -> str:
    value = _value(path, number, row, name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        _refuse(path, number, f'has {value!r} as its {what} ({name!r}); it must be text or a number')
    if not str(value).strip():
        _refuse(path, number, f'has no {what}: {name!r} is empty')
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(path, number, f'has half of a surrogate pair in its {what} ({name!r}), which is no text')
    return text


def _value(path: Path, number: int, row: Row, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        names = list(row) if isinstance(row, dict) else []
        near = difflib.get_close_matches(name, names, n=1)
        hint = f'. Did you mean {near[0]!r}?' if near else ''
        _refuse(path, number, f'has no {name!r}; it has {_listed(names) or "nothing"}{hint}')
    return row[name]


def _refuse(path: Path, number: int, what: str) -> NoReturn:
    raise ValueError(f'{path}, line {number} {what}{"" if what.endswith("?") else "."}')


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no number')


def _short(line: bytes) -> str:
    text = line.decode('utf-8', 'replace').strip()
    return repr(text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…')


def _listed(names: list[str]) -> str:
    return ', '.join(map(repr, names))
