"""Arithmetic problems in plain text, as a TFDS builder."""
from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qsharp_jax.data import builders

OPERATIONS = ('+', '-', '*', 'max', 'min')
# Part of all problems that each split draws from. Fixed, so that no choice of sizes moves a problem between splits.
FRACTIONS = {'train': 0.7, 'validation': 0.1, 'test': 0.2}
MAX_OPERAND = 999  # all problems are listed, at most a million an operation
REVISION = 2


@dataclasses.dataclass(eq=False, kw_only=True)
class ArithmeticConfig(tfds.core.BuilderConfig):
    """Which problems there are, and how many of them each split has.

    A problem is an ordered question: '3 + 5' and '5 + 3' are two problems, always in the same split. Differences are
    never negative.

    Attributes:
      operations: any of '+', '-', '*', 'max' (the larger operand) and 'min' (the smaller one), in equal
        shares.
      max_operand: operands are 0 .. max_operand.
      two_digit_share: share of problems in which both operands have two digits or more; in the others at least one
        has a single digit. Exact in every split, up to rounding.
      train_examples: number of distinct problems of the split.
      validation_examples: as above.
      test_examples: as above.
      seed: of the draw of each split's problems.
    """

    name: str = ''
    operations: tuple[str, ...] = ('+',)
    max_operand: int = 99
    two_digit_share: float = 0.75
    train_examples: int = 2000
    validation_examples: int = 100
    test_examples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        self.operations = tuple(self.operations)
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations or len(set(self.operations)) != len(self.operations):
            raise ValueError(f'operations is {self.operations!r}; name one or more of {", ".join(OPERATIONS)}, each '
                             'once.')
        if not 1 <= self.max_operand <= MAX_OPERAND:
            raise ValueError(f'max_operand is {self.max_operand}; it must be in 1 .. {MAX_OPERAND}.')
        if not 0 <= self.two_digit_share <= 1:
            raise ValueError(f'two_digit_share is {self.two_digit_share}; it is a share, 0 to 1.')
        self.name = builders.config_name(self, REVISION)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return 'train', 'validation', 'test'

    def size(self, split: str) -> int | None:
        """Returns how many records a split has."""
        return getattr(self, f'{split}_examples', None)

    def builder(self, data_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
        """Returns the builder of these problems, which keeps its files below `data_dir`."""
        return Arithmetic(config=self, data_dir=os.fspath(data_dir), file_format='array_record')


class Arithmetic(tfds.core.GeneratorBasedBuilder):
    """Problems such as question '37 + 48' with answer '85', or '37 max 48' with answer '48'.

    Features: `id` (unique over the splits), `question`, `answer`, `operation`, `digits` (of the smaller operand).
    """

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS: list[tfds.core.BuilderConfig] = []

    def _info(self) -> tfds.core.DatasetInfo:
        return builders.info(
            self, 'Arithmetic problems in plain text; splits are disjoint up to the order of operands.',
            operation=tfds.features.Text(), digits=tfds.features.Scalar(dtype=np.int64))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        splits = problems(self.builder_config)
        first, generators = 0, {}
        for name, chosen in splits.items():
            generators[name] = self._generate_examples(chosen, first)
            first += len(chosen)
        return generators

    def _generate_examples(self, chosen: list[tuple[int, str, int]],
                           first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (a, operation, b) in enumerate(chosen, start=first):
            yield number, {
                'id': number, 'question': f'{a} {operation} {b}', 'answer': str(solve(a, operation, b)),
                'operation': operation, 'digits': len(str(min(a, b)))}


def solve(a: int, operation: str, b: int) -> int:
    """Returns the value of a problem."""
    return {'+': a + b, '-': a - b, '*': a * b, 'max': max(a, b), 'min': min(a, b)}[operation]


def canonical(a: int, operation: str, b: int) -> str:
    """Returns a text that is the same for problems that differ in the order of their operands alone."""
    low, high = min(a, b), max(a, b)
    return f'{high} {operation} {low}'


def problems(config: ArithmeticConfig) -> dict[str, list[tuple[int, str, int]]]:
    """Returns the problems (a, operation, b) of each split, in an order drawn from the seed.

    Raises:
      ValueError: if a split asks for more problems of a kind than exist.
    """
    wanted = {'train': config.train_examples, 'validation': config.validation_examples, 'test': config.test_examples}
    pools = _pools(config)
    splits = {}
    for number, (split, size) in enumerate(wanted.items()):
        rng = np.random.default_rng([config.seed, number])
        chosen: list[tuple[int, str, int]] = []
        for kind, count in _counts(config, size).items():
            pool = pools[split, *kind]
            if count > len(pool):
                operation, two_digit = kind
                what = 'both operands of two digits or more' if two_digit else 'an operand of one digit'
                raise ValueError(
                    f'the {split} split of arithmetic asks for {count} problems with {operation!r} and {what} up to '
                    f'{config.max_operand}, but {len(pool)} exist: lower {split}_examples, change two_digit_share, or '
                    'raise max_operand.')
            chosen += [pool[i] for i in rng.choice(len(pool), count, replace=False)] if count else []
        splits[split] = [chosen[i] for i in rng.permutation(len(chosen))]
    return splits


def _pools(config: ArithmeticConfig) -> dict[tuple[str, str, bool], list[tuple[int, str, int]]]:
    """Returns all problems by (split, operation, whether both operands have two digits)."""
    pools: dict[tuple[str, str, bool], list[tuple[int, str, int]]] = {
        (split, operation, two_digit): []
        for split in FRACTIONS for operation in config.operations for two_digit in (False, True)}
    for operation in config.operations:
        for a in range(config.max_operand + 1):
            for b in range(a + 1):
                split = builders.split_of(canonical(a, operation, b), FRACTIONS)
                pool = pools[split, operation, b >= 10]
                pool.append((a, operation, b))
                if operation != '-' and a != b:
                    pool.append((b, operation, a))
    return pools


def _counts(config: ArithmeticConfig, size: int) -> dict[tuple[str, bool], int]:
    """Returns the number of problems of each (operation, whether both operands have two digits); sums to `size`."""
    two_digit = round(size * config.two_digit_share)
    counts = {}
    for kind, total in ((True, two_digit), (False, size - two_digit)):
        share, left = divmod(total, len(config.operations))
        for number, operation in enumerate(config.operations):
            counts[operation, kind] = share + (number < left)
    return counts
