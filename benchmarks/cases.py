"""What is measured, case by case: each yields the rows of one results file as soon as it has them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import Contender, Worker
from benchmarks.workload import Guide, UNGUIDED

Row = dict[str, Any]

REPEATS = 3
CLOSE = 1e-3  # nats by which both sides' log-probabilities may differ

GUIDES = {
    'unguided': UNGUIDED,
    'guided': Guide(),
    'after_sampler': Guide(order='after_sampler'),
    'cd': Guide(offset='cd'),
    'several_eta': Guide(etas=(0.05, 0.1, 0.3, math.inf)),
}


@dataclasses.dataclass
class Sides:
    """Both workers, started when first asked for.

    Attributes:
      folder: where one side leaves networks and prompts for the other.
      data: folder of GSM8K.
      wanted: whether a row, by its name, is measured at all.
      full: also measure what takes long.
    """

    folder: Path
    data: Path
    wanted: Callable[[str], bool]
    full: bool
    questions: str = ''

    def __post_init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._exported: set[tuple[int, int]] = set()

    @property
    def ours(self) -> Worker:
        """The worker of our side."""
        if 'ours' not in self._workers:
            self._workers['ours'] = Worker('ours')
            self.questions = self.ours.call('setup', folder=str(self.folder), data=str(self.data))['questions']
        return self._workers['ours']

    def peer(self, layers: int, prompt: int) -> Worker:
        """Returns the worker of the other side, to which these networks and prompts have been left."""
        if (layers, prompt) not in self._exported:
            self.ours.call('export', layers=layers, prompt=prompt)
            self._exported.add((layers, prompt))
        if 'peer' not in self._workers:
            self._workers['peer'] = Worker('peer')
            self._workers['peer'].call('setup', folder=str(self.folder))
        return self._workers['peer']

    def about(self) -> dict[str, Any]:
        """Returns versions by side, and what the prompts are from."""
        versions = {side: worker.call('about') for side, worker in self._workers.items()}
        return {**versions, 'questions': self.questions}

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers.values():
            worker.__exit__()
        self._workers.clear()


def new_tokens(batch: int) -> int:
    """Returns how many tokens a row are timed: a second or two."""
    return 32 if batch == 1 else 16 if batch <= 16 else 8


def decode(sides: Sides) -> Iterator[Row]:
    """Our decoder alone: what guidance costs, by batch, order, and size of prompt and value network."""
    shapes = [(batch, 64, 8) for batch in (1, 16, 64)]
    if sides.full:
        shapes += [(batch, 64, layers) for batch in (1, 16) for layers in (15, 30)]
        shapes += [(batch, 512, 8) for batch in (1, 16)]
    for batch, prompt, layers in shapes:
        name = f'decode/batch={batch}/prompt={prompt}/value={layers}'
        if not sides.wanted(name):
            continue
        shape = dict(batch=batch, prompt=prompt, layers=layers, dtype='float32', room=64)
        prefill = [sides.ours.call('prefill', **shape) for _ in range(2)][-1]
        contenders = {label: Contender(sides.ours, 'decode', {
            **shape, 'tokens': new_tokens(batch), 'guide': guide.message()}) for label, guide in GUIDES.items()}
        yield measure.result(name, {**shape, 'tokens': new_tokens(batch)},
                             measure.alternate(contenders, REPEATS), 'unguided', prefill={'ours': prefill})


def peer(sides: Sides) -> Iterator[Row]:
    """Our decoder against the same networks, prompts and law in PyTorch."""
    kinds = [(batch, 'float32') for batch in (1, 16, 64 if sides.full else 32)] + [(16, 'bfloat16')]
    for batch, dtype in kinds:
        for label in ('unguided', 'guided', 'after_sampler'):
            name = f'peer/batch={batch}/{dtype}/{label}'
            if sides.wanted(name):
                yield _against_peer(sides, name, batch, dtype, GUIDES[label])


def _against_peer(sides: Sides, name: str, batch: int, dtype: str, guide: Guide) -> Row:
    shape = dict(batch=batch, prompt=64, layers=8, dtype=dtype)
    other, tokens, asked = sides.peer(8, 64), new_tokens(batch), guide.message()
    agreement = None if dtype != 'float32' else _agreement(sides, shape, guide)
    prefill = {'ours': [sides.ours.call('prefill', **shape, room=64) for _ in range(2)][-1],
               'PyTorch': [other.call('prefill', **shape) for _ in range(2)][-1]}
    contenders = {
        'ours': Contender(sides.ours, 'decode', {**shape, 'room': 64, 'tokens': tokens, 'guide': asked}),
        'PyTorch': Contender(other, 'decode', {**shape, 'tokens': tokens, 'guide': asked})}
    return measure.result(name, {**shape, 'tokens': tokens}, measure.alternate(contenders, REPEATS), 'PyTorch',
                          prefill=prefill, agreement=agreement)


def _agreement(sides: Sides, shape: dict[str, Any], guide: Guide, steps: int = 4) -> dict[str, float]:
    """Returns how far both sides' laws lie apart along some forced tokens, the answer of nobody in particular.

    Raises:
      RuntimeError: if that is more than rounding: what is timed would not be the same work.
    """
    shape = {**shape, 'batch': min(shape['batch'], 8)}
    forced = [[(97 * row + 31 * step) % 997 + 20 for step in range(steps)] for row in range(shape['batch'])]
    path, = sides.ours.call('log_probs', **shape, forced=forced, guide=guide.message())
    found: dict[str, float] = sides.peer(shape['layers'], shape['prompt']).call(
        'log_probs', **shape, forced=forced, guide=guide.message(), ours=path)
    if found['largest'] > CLOSE or found['other_support'] > 0.1 * found['laws']:
        raise RuntimeError(f'both sides do not sample from the same law: {found}')
    return found


CASES: dict[str, Callable[[Sides], Iterator[Row]]] = {'decode': decode, 'peer': peer}


def pick(names: Sequence[str]) -> Callable[[str], bool]:
    """Returns whether a row is asked for by `--only`, which has beginnings of names such as 'peer/batch=16'."""
    return lambda row: not names or any(f'{row}/'.startswith(f'{name}/') for name in names)
