"""What is measured, case by case: each yields the rows of one results file as soon as it has them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from benchmarks import cutoff as cutoff_lib
from benchmarks import growth as growth_lib
from benchmarks import measure
from benchmarks.measure import Contender, Reply, Worker
from benchmarks.workload import Guide, UNGUIDED
from qsharp_jax.metrics import read_rows

Row = dict[str, Any]

REPEATS = 3
CLOSE = 1e-3  # nats by which both sides' log-probabilities may differ
ROOM = 64  # slots of our caches for an answer; the peer's grow with it
PEER = 'PyTorch'
PACKED = 'one whole pass'
NUCLEUS_SHARES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
CUTOFFS = (0.001, 0.01, 0.05)
ACCEPTED_SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

FITS = {'equal': (1, 16), 'unequal': (4, 4)}  # samples: how many to a row of ours, and rows a step
GUIDES = {
    'unguided': UNGUIDED,
    'guided': Guide(),
    'after_sampler': Guide(order='after_sampler'),
    'cd': Guide(offset='cd'),
    'several_eta': Guide(etas=(0.05, 0.1, 0.3, math.inf)),
}


@dataclasses.dataclass
class Sides:
    """Both workers, started when first asked for, and again when asked for after `close`.

    Attributes:
      folder: where one side leaves networks and prompts for the other.
      data: folder of GSM8K.
      wanted: whether a row, by its name, is measured at all.
      full: also measure what takes long.
      named: whether what is measured was named, and so wanted however long it takes.
      questions: what the prompts are from.
    """

    folder: Path
    data: Path
    wanted: Callable[[str], bool]
    full: bool
    named: bool = False
    questions: str = ''

    def __post_init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._exported: set[tuple[int, int]] = set()
        self._versions: dict[str, Any] = {}
        self.agreements: dict[str, Row] = {}
        self.fits: dict[str, dict[str, Row]] = {}

    @property
    def ours(self) -> Worker:
        """The worker of our side."""
        if 'ours' not in self._workers:
            self._workers['ours'] = self.fresh('ours')
        return self._workers['ours']

    def peer(self, layers: int = 8, prompt: int = 64) -> Worker:
        """Returns the worker of the other side, to which these networks and prompts have been left."""
        self.export(layers, prompt)
        if 'peer' not in self._workers:
            self._workers['peer'] = self.fresh('peer')
        return self._workers['peer']

    def export(self, layers: int, prompt: int) -> None:
        """Leaves networks and prompts for the other side."""
        if (layers, prompt) not in self._exported:
            self.ours.call('export', layers=layers, prompt=prompt)
            self._exported.add((layers, prompt))

    def fresh(self, side: str) -> Worker:
        """Returns a new process of a side."""
        worker = Worker(side)
        if side == 'ours':
            self.questions = worker.call('setup', folder=str(self.folder), data=str(self.data))
        else:
            worker.call('setup', folder=str(self.folder))
        return worker

    def about(self) -> dict[str, Any]:
        """Returns versions by side, and what the prompts are from."""
        self._versions.update({side: worker.call('about') for side, worker in self._workers.items()})
        return {**self._versions, 'questions': self.questions}

    def close(self) -> None:
        """Ends the workers, and with them what they hold; what they have left in `folder` remains."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self.fits.clear()


def new_tokens(batch: int) -> int:
    """Returns how many tokens a row are timed: some seconds."""
    return {1: 64, 16: 24, 64: 8}.get(batch, 12)


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
        shape = dict(batch=batch, prompt=prompt, layers=layers, dtype='float32', room=ROOM)
        prefill = {'ours': _warm(sides.ours, 'prefill', **shape)}
        tokens = new_tokens(batch)
        # CD and several eta at one batch alone, to save time.
        guides = {label: guide for label, guide in GUIDES.items()
                  if sides.full or batch == 16 or label in ('unguided', 'guided', 'after_sampler')}
        contenders = {label: Contender(sides.ours, 'decode', {**shape, 'tokens': tokens, 'guide': guide.message()})
                      for label, guide in guides.items()}
        work = {label: sides.ours.call('work', prompt=prompt, layers=layers, guide=guide.message())
                for label, guide in guides.items()}
        yield measure.result(name, {**shape, 'tokens': tokens}, measure.alternate(contenders, REPEATS), 'unguided',
                             prefill=prefill, work=work)


def speculation(sides: Sides) -> Iterator[Row]:
    """Tokens that the reference drafts ahead of a value network of its own size, and how many are accepted."""
    shape = dict(batch=1, prompt=64, layers=30, dtype='float32', room=ROOM)
    name = 'speculation/batch=1/value=30'
    if sides.wanted(name):
        drafts = (1, 3, 5, 7) if sides.full or sides.named else (1, 3)
        guides = {PACKED: Guide(spared=False), 'spared': Guide(),
                  **{f'draft of {draft}': Guide(draft=draft) for draft in drafts}}
        yield _drafted(sides, name, {**shape, 'tokens': ROOM}, guides)
    for spread in ACCEPTED_SPREADS:
        name = f'speculation/acceptance/spread={spread:g}'
        if sides.wanted(name) and (sides.full or sides.named):
            guides = {'unguided': UNGUIDED, 'draft of 1': Guide(spread=spread, draft=1)}
            yield _drafted(sides, name, {**shape, 'batch': 16, 'layers': 8, 'tokens': ROOM}, guides, repeats=1)


def cutoff(sides: Sides) -> Iterator[Row]:
    """Candidates down to a least probability: how much less there is to score, and what it changes of the law."""
    name = 'cutoff/batch=1/value=8'
    if sides.wanted(name) and (sides.full or sides.named):
        shape = dict(batch=1, prompt=64, layers=8, dtype='float32', room=ROOM)
        guides = {'unguided': UNGUIDED, 'guided': Guide(),
                  **{cutoff_lib.label(each): Guide(epsilon_cutoff=each) for each in CUTOFFS}}
        contenders = {label: Contender(sides.ours, 'decode', {**shape, 'tokens': ROOM, 'guide': guide.message()})
                      for label, guide in guides.items()}
        effect = sides.ours.call('cutoff', batch=16, prompt=64, layers=8, steps=ROOM, cutoffs=CUTOFFS,
                                 guide=Guide(spared=False).message())
        yield measure.result(name, {**shape, 'tokens': ROOM, 'candidates': Guide().candidates},
                             measure.alternate(contenders, REPEATS), 'unguided', effect=effect)


def _drafted(sides: Sides, name: str, shape: Row, guides: Mapping[str, Guide], repeats: int = REPEATS) -> Row:
    """Returns a row that has, of each contender, tokens a step and KL an answer."""
    contenders = {label: Contender(sides.ours, 'decode', {**shape, 'guide': guide.message()})
                  for label, guide in guides.items()}
    replies = measure.alternate(contenders, repeats)
    steps = {label: own[0]['reference_tokens'] / (1 + guides[label].draft) for label, own in replies.items()}
    return measure.result(
        name, shape, replies, next(iter(guides)),
        tokens_a_step={label: own[0]['tokens'] / steps[label] for label, own in replies.items()},
        kl={label: own[0]['kl_per_token'] * shape['tokens'] for label, own in replies.items()})


def peer(sides: Sides) -> Iterator[Row]:
    """Our decoder against the same networks, prompts and law in PyTorch."""
    kinds = [(batch, 'float32') for batch in ((1, 16, 32, 64) if sides.full else (1, 16))] + [(16, 'bfloat16')]
    for batch, dtype in kinds:
        for label in ('unguided', 'guided', 'after_sampler'):
            name = f'peer/batch={batch}/{dtype}/{label}'
            if not sides.wanted(name):
                continue
            shape = dict(batch=batch, prompt=64, layers=8, dtype=dtype)
            tokens, asked = new_tokens(batch), GUIDES[label].message()
            agreement = _agreement(sides, label)
            prefill = {'ours': _warm(sides.ours, 'prefill', **shape, room=ROOM),
                       PEER: _warm(sides.peer(), 'prefill', **shape)}
            contenders = {
                'ours': Contender(sides.ours, 'decode', {**shape, 'room': ROOM, 'tokens': tokens, 'guide': asked}),
                PEER: Contender(sides.peer(), 'decode', {**shape, 'tokens': tokens, 'guide': asked})}
            yield measure.result(name, {**shape, 'tokens': tokens}, measure.alternate(contenders, REPEATS), PEER,
                                 prefill=prefill, agreement=agreement)


def _warm(worker: Worker, call: str, **arguments: Any) -> Reply:
    """Returns the second of two replies, for which nothing was compiled."""
    worker.call(call, **arguments)
    reply: Reply = worker.call(call, **arguments)
    return reply


def _agreement(sides: Sides, label: str, rows: int = 4, steps: int = 4) -> Row:
    """Returns how far both sides' float32 laws lie apart along some forced tokens, the answer of nobody in particular.

    Raises:
      RuntimeError: if that is more than rounding: what is timed would not be the same work.
    """
    if label not in sides.agreements:
        forced = [[(97 * row + 31 * step) % 997 + 20 for step in range(steps)] for row in range(rows)]
        asked = dict(batch=rows, prompt=64, layers=8, forced=forced, guide=GUIDES[label].message())
        path = sides.ours.call('log_probs', **asked)
        found: Row = sides.peer().call('log_probs', **asked, ours=path)
        if found['largest'] > CLOSE or found['other_support'] > 0.1 * found['laws']:
            raise RuntimeError(f'both sides do not sample from the same law: {found}')
        sides.agreements[label] = found
    return sides.agreements[label]


def collect(sides: Sides) -> Iterator[Row]:
    """Roll-ins and roll-outs of very unequal length: one sentence, or line, each.

    A block has many times as many units as rows, as in a run: at its end rows run empty.
    """
    name = 'collect/batch=8'
    if sides.wanted(name):
        shape = dict(prompts=12, samples=8, batch=8, room=ROOM, layers=8)
        asked = {label: {**shape, 'guide': GUIDES[label].message()} for label in ('unguided', 'guided')}
        for arguments in asked.values():
            sides.ours.call('collect', **{**arguments, 'samples': 1})  # compiled, for any number of units
        contenders = {label: Contender(sides.ours, 'collect', arguments) for label, arguments in asked.items()}
        replies = measure.alternate(contenders, REPEATS, warm_ups=0)
        occupancy = {label: own[0]['active'] / own[0]['row_steps'] for label, own in replies.items()}
        yield measure.result(name, shape, replies, 'unguided', 'pairs', occupancy=occupancy)


def fit(sides: Sides) -> Iterator[Row]:
    """One pass of the fit over the same samples, of equal and of unequal length, against PyTorch."""
    for samples in FITS:
        name = f'fit/{samples}'
        if not sides.wanted(name):
            continue
        work = _prepare_fit(sides, samples)
        contenders = {'ours': Contender(sides.ours, 'fit', {'samples': samples}),
                      PEER: Contender(sides.peer(), 'fit', {'samples': samples})}
        yield measure.result(name, dict(layers=8, dtype='float32'), measure.alternate(contenders, REPEATS), PEER,
                             work=work)


def _prepare_fit(sides: Sides, samples: str) -> dict[str, Row]:
    """Has either side make ready for a pass over those samples, once, and returns what it computes in it."""
    if samples not in sides.fits:
        per_row, batch = FITS[samples]
        sides.fits[samples] = {
            'ours': sides.ours.call('prepare_fit', samples=samples, samples_per_row=per_row, batch=batch, layers=8),
            PEER: sides.peer().call('prepare_fit', samples=samples, batch=16, layers=8)}
    return sides.fits[samples]


def profile(sides: Sides) -> Iterator[Row]:
    """Where the time of a step of decoding and of an update goes, on either side, by its own profiler."""
    more = sides.full or sides.named
    for batch, label in itertools.product((16, 1), ('unguided', 'guided', 'after_sampler')):
        name = f'profile/decode/batch={batch}/{label}'
        if sides.wanted(name) and (more or batch == 16 and label != 'unguided'):
            tokens = new_tokens(batch)
            asked = dict(batch=batch, prompt=64, layers=8, dtype='float32', tokens=tokens,
                         guide=GUIDES[label].message())
            yield _profiled(name, asked, sides.ours.call('profile_decode', **asked, room=ROOM),
                            sides.peer().call('profile_decode', **asked), tokens)
    name = 'profile/fit/equal'
    if sides.wanted(name):
        _prepare_fit(sides, 'equal')
        yield _profiled(name, {'samples': 'equal'}, sides.ours.call('profile_fit', samples='equal'),
                        sides.peer().call('profile_fit', samples='equal'), 1)


def _profiled(name: str, settings: Row, ours: Reply, theirs: Reply, steps: int) -> Row:
    """Returns a row with the milliseconds a step of each part, on either side."""
    sides = {'ours': ours, PEER: theirs}
    return {'name': name, 'settings': settings, 'parts': {
        side: {part: 1e3 * seconds / steps for part, seconds in parts.items() if part != 'peak_memory'}
        for side, parts in sides.items()}}


def startup(sides: Sides) -> Iterator[Row]:
    """From a fresh process to the first token; and a second batch of another size."""
    for label in ('unguided', 'guided'):
        name = f'startup/{label}'
        if not sides.wanted(name) or not (sides.full or sides.named or label == 'guided'):
            continue
        sides.export(8, 64)
        asked = dict(layers=8, guide=GUIDES[label].message())
        calls: dict[str, list[Row]] = {
            'ours': [dict(prompts=4, samples=samples, batch=8) for samples in (2, 1)],
            'peer': [dict(rows=rows) for rows in (8, 4)]}
        replies: dict[str, list[Reply]] = {'ours': [], PEER: []}
        for _ in range(REPEATS):
            for side, who in (('ours', 'ours'), ('peer', PEER)):
                began = time.perf_counter()
                worker = sides.fresh(side)
                first = worker.call('first_token', **calls[side][0], **asked)
                seconds = time.perf_counter() - began
                second = worker.call('first_token', **calls[side][1], **asked)
                worker.close()
                replies[who].append({
                    'seconds': seconds, 'rows': first['rows'], 'second_seconds': second['seconds'],
                    **({'compilations': first['compilations'], 'second_compilations': second['compilations']}
                       if side == 'ours' else {})})
        yield {**measure.result(name, dict(layers=8, rows=8, second_rows=4), replies, PEER, 'rows'),
               'seconds': {who: measure.spread([reply['seconds'] for reply in own]) for who, own in replies.items()}}


def nucleus(sides: Sides) -> Iterator[Row]:
    """How many tokens the sampler's nucleus holds, which are the candidates in the order 'after_sampler'."""
    name = 'nucleus/prompt=64'
    if sides.wanted(name):
        shape = dict(batch=16, prompt=64, tokens=ROOM)
        sizes = sorted(sides.ours.call('nucleus', **shape))
        yield {'name': name, 'settings': shape, 'steps': len(sizes), 'alone': sizes.count(1) / len(sizes),
               'quantiles': {str(share): sizes[math.ceil(share * len(sizes)) - 1] for share in NUCLEUS_SHARES}}


def ledger(sides: Sides) -> Iterator[Row]:
    """What an answer and a right answer cost, by policy: a small run of the demo's task, from its results.jsonl.

    At the paper's temperature and nucleus, and with one value network in both orders and with a cut-off.
    """
    if sides.wanted('ledger/arithmetic'):
        fitted, other = _arithmetic(sides), _arithmetic(sides, {'guidance.order': 'after_sampler'})
        yield {'name': 'ledger/arithmetic', 'policies': [
            *({**row, 'order': 'paper'} for row in fitted),
            *({**row, 'order': 'after_sampler'} for row in other if row['method'] == 'qsharp')]}
    if sides.wanted('ledger/cutoff') and (sides.full or sides.named):
        rows = _arithmetic(sides, {'guidance.epsilon_cutoff': CUTOFFS[1]})
        yield {'name': 'ledger/cutoff', 'policies': [
            {**row, 'order': f'paper, {cutoff_lib.label(CUTOFFS[1])}'} for row in rows if row['method'] == 'qsharp']}


def _arithmetic(sides: Sides, law: Mapping[str, Any] | None = None) -> list[Row]:
    """Returns the rows on test questions of a run of its own, or of its value network guiding by another law."""
    fitted = sides.folder / 'fitted'
    settings: dict[str, Any] = {
        'iterations': 1, 'collect.examples': 450, 'task.arithmetic.test_examples': 50, 'eval.select_split': '',
        'eval.reference_temperatures': '0.0', 'eval.methods': 'qsharp', 'sampling.temperature': 0.8,
        'sampling.top_p': 0.9, 'task.data_dir': sides.folder / 'data'}
    workdir = fitted
    if law:
        if not fitted.exists():
            _arithmetic(sides)
        workdir = sides.folder / '_'.join(map(str, law.values()))
        settings.update({**law, 'value.run': fitted})
    subprocess.run(
        [sys.executable, str(measure.ROOT / 'experiments' / 'train.py'), '--config=configs/arithmetic.py:tiny',
         f'--workdir={workdir}', *(f'--config.{key}={value}' for key, value in settings.items())],
        cwd=measure.ROOT, env=measure.environment(), check=True, stdout=subprocess.DEVNULL)
    return [row for row in read_rows(workdir / 'results.jsonl') if row['split'] == 'test']


def growth(sides: Sides) -> Iterator[Row]:
    """How time grows with context, rows, data and layers; where it is asked for by name, or everything is."""
    names = [f'growth/{cause}' for cause in ('context', 'batch', 'data', 'layers')]
    yield from growth_lib.rows(sides.ours, {name: sides.wanted(name) and (sides.full or sides.named) for name in names})


CASES: Mapping[str, Callable[[Sides], Iterator[Row]]] = {
    'decode': decode, 'cutoff': cutoff, 'peer': peer, 'speculation': speculation, 'collect': collect, 'fit': fit,
    'profile': profile, 'startup': startup, 'nucleus': nucleus, 'ledger': ledger, 'growth': growth}
GOES_ON = 'peer', 'profile'  # with what the case before them has loaded and compiled


def pick(names: Sequence[str]) -> Callable[[str], bool]:
    """Returns whether a row is asked for by `--only`, which has beginnings of names such as 'peer/batch=16'."""
    return lambda row: not names or any(f'{row}/'.startswith(f'{name}/') for name in names)
