"""Star graphs from files as the task's inventors publish them: a line is a question and, behind its '=', the path.

Such a line is question and answer of this package's own graphs, side by side.
"""
from __future__ import annotations

from collections.abc import Mapping
import hashlib
import itertools
import logging
from pathlib import Path
from typing import NamedTuple

from qsharp_jax.data.star_graph_text import edges_text, parse_question

_logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A problem as text: '3,19|32,3|32,34|34,6/32,6=' and '32,34,6'."""

    question: str
    answer: str


def digest(path: str) -> str:
    """Returns the SHA-256 of a file; ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f'there is no file {path!r}, which task.star_graph names.')
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(path: str) -> list[Text]:
    """Returns the problems of a file, in its order.

    Raises:
      ValueError: with the number of the first line that is no graph with the path from its start to its goal.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding='utf-8').splitlines(), start=1):
        question, equals, answer = line.strip().partition('=')
        text = Text(question + equals, answer)
        try:
            edges, start, goal = parse_question(text.question)
            nodes = [int(node) for node in answer.split(',')]
            if nodes[0] != start or nodes[-1] != goal or not set(itertools.pairwise(nodes)) <= set(edges):
                raise ValueError(f'{answer!r} is no path from {start} to {goal}')
        except ValueError as error:
            raise ValueError(f'{path}, line {number} is no star graph with its path: {error}. A line reads '
                             'a,b|c,d|…/start,goal=start,…,goal.') from error
        found.append(text)
    return found


def graph(text: Text) -> str:
    """Returns a text that is the same for one graph whatever its goal and the order of its edges."""
    return edges_text(sorted(parse_question(text.question)[0]))


def splits(files: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, list[Text]]:
    """Returns the problems of each split: the first of its file, but for validation, which are the last of 'train'.

    No split has a graph of another one, whatever the order of its edges: in 'test' all are kept, then in 'validation',
    then in 'pretrain'. What is left out is counted in a warning. Inside a split a graph may come twice, as in the file.

    Args:
      files: paths of 'pretrain', 'train' and 'test'.
      sizes: problems of each split, of 'validation' too.

    Raises:
      ValueError: a file is damaged or has too few problems.
    """
    taken: set[str] = set()
    found: dict[str, list[Text]] = {}
    both = read(files['train'])
    for name in ('test', 'validation', 'pretrain', 'train'):
        texts = both[::-1] if name == 'validation' else both if name == 'train' else read(files[name])
        path = files.get(name, files['train'])
        own = [text for text in texts if graph(text) not in taken]
        found[name] = own[:sizes[name]]
        if len(found[name]) < sizes[name]:
            raise ValueError(f'{path} has {len(own)} graphs that no other split has, and {sizes[name]} are asked of '
                             f'it: lower task.star_graph.{name}_examples.')
        left_out = len(texts) - len(own) - (sizes['validation'] if name == 'train' else 0)
        if left_out > 0:
            _logger.warning('%s: %d graphs are left out of %s, which other splits have.', path, left_out, name)
        taken |= {graph(text) for text in found[name]}
    return {'pretrain': found['pretrain'], 'train': found['train'], 'validation': found['validation'][::-1],
            'test': found['test']}
