"""Star graphs as text. Apart from their builder, so that a reward can read them without TFDS."""
from __future__ import annotations


def edges_text(edges: list[tuple[int, int]]) -> str:
    """Returns 'a,b|c,d|…'."""
    return '|'.join(f'{a},{b}' for a, b in edges)


def path_text(nodes: tuple[int, ...]) -> str:
    """Returns 'a,b,…'."""
    return ','.join(map(str, nodes))


def question_text(edges: list[tuple[int, int]], start: int, goal: int) -> str:
    """Returns 'a,b|c,d|…/start,goal='."""
    return f'{edges_text(edges)}/{start},{goal}='


def parse_question(text: str) -> tuple[list[tuple[int, int]], int, int]:
    """Returns edges, start and goal of a question.

    Raises:
      ValueError: if the text is no question of this task.
    """
    try:
        listed, ends = text.strip().rstrip('=').split('/')
        *edges, (start, goal) = [(int(a), int(b)) for a, b in (
            pair.split(',') for pair in (*listed.split('|'), ends))]
    except ValueError as error:
        raise ValueError(f'{text!r} is no star graph; one reads a,b|c,d|…/start,goal=') from error
    return edges, start, goal


def right_path(question: str) -> list[int]:
    """Returns the nodes from start to goal; ValueError if the text is no question, or the goal is not reached."""
    edges, start, goal = parse_question(question)
    before = {after: node for node, after in edges}
    path = [goal]
    while path[-1] != start:
        if path[-1] not in before or len(path) > len(edges):
            raise ValueError(f'{question!r} has no path from {start} to {goal}')
        path.append(before[path[-1]])
    return path[::-1]
