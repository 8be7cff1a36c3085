"""Star graphs from files as the task's inventors publish them: a line is a question and, behind its '=', the path.

Such a line is question and answer of this package's own graphs, side by side.
"""
from __future__ import annotations

from collections.abc import Mapping
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from qsharp_jax.data.star_graph_text import edges_text, parse_question, path_text, question_text

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


class Shape(NamedTuple):
    """What all graphs of a task have in common: d arms of l nodes, the centre included, of names below `num_nodes`."""

    degree: int
    path_length: int
    num_nodes: int


def read(path: str, shape: Shape) -> list[Text]:
    """Returns the problems of a file, in its order.

    Raises:
      ValueError: it is no text, or it has a line that is no graph of this shape with the path from its start to its
        goal; the message names the first.
    """
    try:
        lines = Path(path).read_bytes().decode('utf-8-sig').rstrip().split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is no UTF-8: {error.reason} at byte {error.start}.') from error
    found = []
    for number, line in enumerate(lines, start=1):
        question, equals, answer = line.strip().partition('=')
        text = Text(question + equals, answer)
        try:
            _check(text, shape)
        except ValueError as error:
            raise ValueError(f'{path}, line {number} is no star graph with its path: {error}. A line reads '
                             'a,b|c,d|…/start,goal=start,…,goal.') from error
        found.append(text)
    return found


def _check(text: Text, shape: Shape) -> None:
    """Raises ValueError unless a text is a graph of a shape, with its path."""
    edges, start, goal = parse_question(text.question)
    nodes = [int(node) for node in text.answer.split(',')]
    after = dict(edges)
    arms = [[start, first] for node, first in edges if node == start]
    for arm in arms:
        while arm[-1] in after and len(arm) <= len(edges):
            arm.append(after[arm[-1]])
    names = {node for arm in arms for node in arm}
    lengths = {len(arm) for arm in arms}
    if len(lengths) != 1 or not len(names) - 1 == len(edges) == sum(len(arm) - 1 for arm in arms):
        raise ValueError(f'its edges are no arms of one length from {start}')
    if (len(arms), *lengths) != shape[:2]:
        raise ValueError(f'it is of G({len(arms)}, {lengths.pop()}), and task.star_graph.degree and path_length say '
                         f'G({shape.degree}, {shape.path_length})')
    if min(names) < 0:
        raise ValueError(f'it has the node {min(names)}, and names are 0 or more')
    if max(names) >= shape.num_nodes:
        raise ValueError(f'it has the node {max(names)}, and task.star_graph.num_nodes is {shape.num_nodes}: set '
                         f'{max(names) + 1} or more')
    if nodes[-1] != goal or nodes not in arms:
        raise ValueError(f'{text.answer!r} is no path from {start} to {goal}')
    if question_text(edges, start, goal) + path_text(tuple(nodes)) != text.question + text.answer:
        raise ValueError('its numbers are not written as 0, 1, 2, …')


def graph(text: Text) -> str:
    """Returns a text that is the same for one graph whatever its goal and the order of its edges."""
    return edges_text(sorted(parse_question(text.question)[0]))


def splits(files: Mapping[str, str], sizes: Mapping[str, int], shape: Shape) -> dict[str, list[Text]]:
    """Returns the problems of each split: the first of its file, but for validation, which are the last of 'train'.

    No split has a graph of another one, whatever the order of its edges: in 'test' all are kept, then in 'validation',
    then in 'pretrain'. What is left out is counted in a warning. Inside a split a graph may come twice, as in the file.

    Args:
      files: paths of 'pretrain', 'train' and 'test'.
      sizes: problems of each split, of 'validation' too.
      shape: of every graph.

    Raises:
      ValueError: a file is damaged or has too few problems.
    """
    taken: set[str] = set()
    found: dict[str, list[Text]] = {}
    both = read(files['train'], shape)
    for name in ('test', 'validation', 'pretrain', 'train'):
        texts = both[::-1] if name == 'validation' else both if name == 'train' else read(files[name], shape)
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
