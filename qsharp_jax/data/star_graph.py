"""Star graphs and the path from their centre to a goal, as a TFDS builder.

The task of Bachmann & Nagarajan (2024) in the form the paper uses (Q#, arXiv 2502.20548, section 3.1 and appendix C).
"""
from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import itertools
import math
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qsharp_jax.data import builders, star_graph_files
from qsharp_jax.data.star_graph_text import edges_text, parse_question, path_text, question_text, right_path

# Part of all graphs that each split draws from. Fixed, so that no choice of sizes moves a graph between splits.
FRACTIONS = {'pretrain': 0.4, 'train': 0.4, 'validation': 0.05, 'test': 0.15}
LISTED = 200_000  # up to so many arrangements of nodes, problems are listed; beyond, they are drawn until all differ
REVISION = 1


@dataclasses.dataclass(eq=False, kw_only=True)
class StarGraphConfig(tfds.core.BuilderConfig):
    """G(d, l) and how many graphs each split has. All splits are disjoint up to the order of edges.

    Attributes:
      degree: d, number of arms.
      path_length: l, nodes of an arm, the centre included.
      num_nodes: node names are 0 .. num_nodes - 1.
      pretrain_examples: number of distinct problems of the split.
      train_examples: as above.
      validation_examples: as above.
      test_examples: as above.
      seed: of the graphs.
      pretrain_file: a file of the published generator that the split is read from; '' for all three: generated.
      train_file: likewise; its last graphs are the validation split.
      test_file: likewise.
    """

    name: str = ''
    degree: int = 2
    path_length: int = 5
    num_nodes: int = 50
    pretrain_examples: int = 200_000
    train_examples: int = 200_000
    validation_examples: int = 1000
    test_examples: int = 20_000
    seed: int = 42
    pretrain_file: str = ''
    train_file: str = ''
    test_file: str = ''

    def __post_init__(self) -> None:
        if self.degree < 1 or self.path_length < 2:
            raise ValueError(f'degree is {self.degree} and path_length is {self.path_length}; a star has at least 1 '
                             'arm, of at least 2 nodes with the centre.')
        if self.graph_nodes > self.num_nodes:
            raise ValueError(f'num_nodes is {self.num_nodes}, but G({self.degree}, {self.path_length}) has '
                             f'{self.graph_nodes} nodes: raise num_nodes, or lower degree or path_length.')
        given = [bool(path) for path in self.files.values()]
        if any(given) and not all(given):
            raise ValueError(f'of the files {", ".join(f"{key}_file" for key in self.files)} of star_graph some are '
                             'given and some are not: give all of them or none.')
        contents = {key: star_graph_files.digest(path) for key, path in self.files.items() if path}
        self.name = builders.config_name(self, REVISION, contents)

    @property
    def files(self) -> dict[str, str]:
        """Files to read in place of generating graphs, by what they are for."""
        return {'pretrain': self.pretrain_file, 'train': self.train_file, 'test': self.test_file}

    @property
    def graph_nodes(self) -> int:
        """Number of nodes of one graph."""
        return 1 + self.degree * (self.path_length - 1)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return 'train', 'validation', 'test'

    def size(self, split: str) -> int | None:
        """Returns how many records a split has."""
        return getattr(self, f'{split}_examples', None)

    def builder(self, data_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
        """Returns the builder of these graphs, which keeps its files below `data_dir`."""
        return StarGraph(config=self, data_dir=os.fspath(data_dir), file_format='array_record')


class StarGraph(tfds.core.GeneratorBasedBuilder):
    """Problems such as question '3,19|32,3|32,34|34,6/32,6=' with answer '32,34,6'.

    Features: `id` (unique over the splits), `question` (edges in random order, start, goal), `answer` (the path).
    """

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS: list[tfds.core.BuilderConfig] = []

    def _info(self) -> tfds.core.DatasetInfo:
        return builders.info(
            self, 'Star graphs with the path from centre to goal; splits are disjoint up to the order of edges.')

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        config = self.builder_config
        first, generators = 0, {}
        if config.train_file:
            shape = star_graph_files.Shape(config.degree, config.path_length, config.num_nodes)
            sizes = {split: config.size(split) or 0 for split in FRACTIONS}
            for name, texts in star_graph_files.splits(config.files, sizes, shape).items():
                generators[name] = self._read_examples(texts, first)
                first += len(texts)
            return generators
        for number, (name, chosen) in enumerate(problems(self.builder_config).items()):
            generators[name] = self._generate_examples(chosen, first, number)
            first += len(chosen)
        return generators

    def _read_examples(self, texts: list[star_graph_files.Text], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in enumerate(texts, start=first):
            yield number, {'id': number, 'question': text.question, 'answer': text.answer}

    def _generate_examples(self, chosen: list[Star], first: int,
                           split: int) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng([self.builder_config.seed, 1, split])
        for number, star in enumerate(chosen, start=first):
            edges = star.edges()
            yield number, {
                'id': number, 'question': question_text([edges[i] for i in rng.permutation(len(edges))],
                                                        star.centre, star.arms[0][-1]),
                'answer': path_text((star.centre, *star.arms[0]))}


@dataclasses.dataclass(frozen=True)
class Star:
    """One problem: the goal is the end of the first arm, and the other arms are in increasing order."""

    centre: int
    arms: tuple[tuple[int, ...], ...]

    @classmethod
    def from_nodes(cls, nodes: tuple[int, ...], degree: int) -> Star:
        """Returns the star whose centre is the first node and whose arms are the rest, in equal parts."""
        size = (len(nodes) - 1) // degree
        arms = [nodes[1 + i * size:1 + (i + 1) * size] for i in range(degree)]
        return cls(nodes[0], (arms[0], *sorted(arms[1:])))

    def edges(self) -> list[tuple[int, int]]:
        """Returns the directed edges, outwards."""
        return [edge for arm in self.arms for edge in itertools.pairwise((self.centre, *arm))]

    def graph(self) -> str:
        """Returns a text that is the same for one graph whatever its goal and the order of its edges."""
        return edges_text(sorted(self.edges()))


def random_path(question: str, rng: np.random.Generator) -> str:
    """Returns the path from the start to the end of an arm drawn at random, whatever the goal."""
    edges, start, _ = parse_question(question)
    after: dict[int, list[int]] = {}
    for node, neighbour in sorted(edges):
        after.setdefault(node, []).append(neighbour)
    path = [start]
    while path[-1] in after:
        path.append(int(rng.choice(after[path[-1]])))
    return path_text(tuple(path))


def smaller(question: str, degree: int, path_length: int, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a graph cut down, and its path: arms drawn at random, shortened at their ends, edges in their order.

    Args:
      question: of a graph.
      degree: arms that are left, at most.
      path_length: nodes of an arm that are left, at most, the centre included.
      rng: that draws the arms, and which of their ends is the goal.
    """
    edges, start, _ = parse_question(question)
    ends = sorted(after for _, after in edges if after not in {before for before, _ in edges})
    kept = [right_path(question_text(edges, start, ends[i]))[:path_length]
            for i in rng.permutation(len(ends))[:degree]]
    left = {edge for arm in kept for edge in itertools.pairwise(arm)}
    return question_text([edge for edge in edges if edge in left], start, kept[0][-1]), path_text(tuple(kept[0]))


def distinct_graphs(degree: int, path_length: int, num_nodes: int) -> int:
    """Returns how many graphs there are up to the order of edges; each has `degree` goals."""
    size = 1 + degree * (path_length - 1)
    return math.perm(num_nodes, size) // math.factorial(degree)


def problems(config: StarGraphConfig) -> dict[str, list[Star]]:
    """Returns the distinct problems of each split, in an order drawn from the seed.

    A graph with another goal is another problem, always in the same split.

    Raises:
      ValueError: if a split asks for more problems than exist.
    """
    wanted = {split: getattr(config, f'{split}_examples') for split in FRACTIONS}
    exist = config.degree * distinct_graphs(config.degree, config.path_length, config.num_nodes)
    rng = np.random.default_rng([config.seed, 0])
    if math.perm(config.num_nodes, config.graph_nodes) <= LISTED:
        pools: dict[str, set[Star]] = {split: set() for split in FRACTIONS}
        for nodes in itertools.permutations(range(config.num_nodes), config.graph_nodes):
            star = Star.from_nodes(nodes, config.degree)
            pools[builders.split_of(star.graph(), FRACTIONS)].add(star)
        for split, pool in pools.items():
            _check_size(config, split, wanted[split], len(pool), exactly=True)
        ordered = {split: sorted(pool, key=lambda star: (star.centre, star.arms)) for split, pool in pools.items()}
        return {split: [pool[i] for i in rng.permutation(len(pool))[:wanted[split]]]
                for split, pool in ordered.items()}
    for split, fraction in FRACTIONS.items():
        # Near the end of a pool, almost every draw would be a repetition.
        _check_size(config, split, wanted[split], int(exist * fraction * 0.8), exactly=False)
    drawn: dict[str, dict[Star, None]] = {split: {} for split in FRACTIONS}
    while any(len(drawn[split]) < wanted[split] for split in FRACTIONS):
        nodes = tuple(map(int, rng.permutation(config.num_nodes)[:config.graph_nodes]))
        star = Star.from_nodes(nodes, config.degree)
        split = builders.split_of(star.graph(), FRACTIONS)
        if len(drawn[split]) < wanted[split]:
            drawn[split][star] = None
    return {split: list(stars) for split, stars in drawn.items()}


def _check_size(config: StarGraphConfig, split: str, wanted: int, exist: int, exactly: bool) -> None:
    if wanted > exist:
        raise ValueError(
            f'the {split} split of star_graph asks for {wanted} problems, but {"" if exactly else "about "}{exist} '
            f'exist in G({config.degree}, {config.path_length}) with {config.num_nodes} node names: lower '
            f'{split}_examples, or raise num_nodes.')


def vocabulary(num_nodes: int) -> tuple[list[str], str, str]:
    """Returns the tokens of all texts of this task, the one that ends a text, and the joint of two nodes.

    As in the numeral tokenizer of the task's inventors, the comma is no token: two nodes stand next to each other.
    """
    end = '<end>'
    return [*map(str, range(num_nodes)), '|', '/', '=', end], end, ','
