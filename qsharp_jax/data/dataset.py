"""D, the aggregated data set: what every iteration rolled out, append-only, as ids; labels beside it.

    <directory>/manifest.json                       the shards there are, in order, each with its hash
    <directory>/00001-00000.array_record            one block of iteration 1
    <directory>/labels/<reward>/00001-00000-<hash>.npy

A shard is part of D once the manifest lists it. Every file is written beside its place and moved there, so a process
killed at any moment leaves D as it was before or after a call, never between. What it leaves half written is never
read, and is overwritten when that block is done again.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from pathlib import Path
import shutil
import struct
from typing import Any, BinaryIO

from array_record.python import array_record_data_source, array_record_module
import numpy as np

FORMAT = 1
_HEADER = struct.Struct('<qqqiBBii')  # iteration, example, sample, cut, ended, truncated, lengths of prompt and answer
_HASH_CHARACTERS = 12

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer: a guided prefix, finished by the reference. Its unit is (iteration, example, sample).

    Attributes:
      iteration: that drew it, from 1.
      example: id of its prompt.
      sample: number among the answers to this prompt in this iteration.
      prompt: ids.  # [P] int32
      answer: ids, prefix and continuation, with the end token where there is one.  # [L] int32
      cut: index in `answer` of the last guided token.
      ended: whether the last token is an end token.
      truncated: whether the length cap ended it.
    """

    iteration: int
    example: int
    sample: int
    prompt: np.ndarray
    answer: np.ndarray
    cut: int
    ended: bool
    truncated: bool

    def __post_init__(self) -> None:
        if not len(self.prompt) or not 0 <= self.cut < len(self.answer):
            raise ValueError(
                f'unit {self.unit} has a prompt of {len(self.prompt)} tokens and an answer of {len(self.answer)} cut '
                f'at {self.cut}; a prompt has at least one token, and the cut is the index of a token of the answer.')

    @property
    def unit(self) -> tuple[int, int, int]:
        """(iteration, example, sample)."""
        return self.iteration, self.example, self.sample

    def to_bytes(self) -> bytes:
        """Returns the record of this roll-out."""
        header = _HEADER.pack(self.iteration, self.example, self.sample, self.cut, self.ended, self.truncated,
                              len(self.prompt), len(self.answer))
        return header + np.asarray(self.prompt, '<i4').tobytes() + np.asarray(self.answer, '<i4').tobytes()

    @classmethod
    def from_bytes(cls, record: bytes) -> Rollout:
        """Returns the roll-out of a record."""
        iteration, example, sample, cut, ended, truncated, prompt, answer = _HEADER.unpack_from(record)
        tokens = np.frombuffer(record, '<i4', prompt + answer, _HEADER.size).astype(np.int32)
        return cls(iteration, example, sample, tokens[:prompt], tokens[prompt:], cut, bool(ended), bool(truncated))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard as the manifest lists it.

    Attributes:
      name: of its file.
      iteration: that collected it.
      block: its number in the iteration.
      n: number of roll-outs.
      sha256: of the file.
      meta: policy, η, sampler and budget it was drawn with.
    """

    name: str
    iteration: int
    block: int
    n: int
    sha256: str
    meta: dict[str, Any]


class Manifest:
    """The list of shards in a directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.path = self.directory / 'manifest.json'
        self.shards: dict[tuple[int, int], Shard] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            shards = [Shard(**entry) for entry in content['shards']]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{self.path} cannot be read ({error}): it is damaged. Restore it from a copy, or move '
                             f'{self.directory} away to collect anew.') from error
        if content['format'] != FORMAT:
            raise ValueError(f'{self.path} has format {content["format"]}, and this version reads {FORMAT}: read it '
                             'with the version that wrote it.')
        self.shards = {(shard.iteration, shard.block): shard for shard in shards}

    def upto(self, iteration: int) -> list[Shard]:
        """Returns the shards of iterations 1 .. iteration, in order."""
        return [shard for key, shard in sorted(self.shards.items()) if key[0] <= iteration]

    def digest(self, iteration: int) -> str:
        """Returns a hash of all data up to an iteration: it changes when any token of it does."""
        lines = [f'{shard.iteration} {shard.block} {shard.n} {shard.sha256}' for shard in self.upto(iteration)]
        return hashlib.sha256('\n'.join(lines).encode()).hexdigest()

    def path_of(self, shard: Shard) -> Path:
        """Returns where a shard's file is."""
        return self.directory / shard.name

    def labels_path(self, shard: Shard, reward_digest: str) -> Path:
        """Returns where a shard's labels are. They name the shard's hash: a shard made anew has none."""
        name = f'{Path(shard.name).stem}-{shard.sha256[:_HASH_CHARACTERS]}.npy'
        return self.directory / 'labels' / reward_digest / name

    def read(self, shard: Shard) -> list[Rollout]:
        """Returns a shard's roll-outs, in the order they were written.

        Raises:
          ValueError: if the file is not what was written; it says which and how to mend it.
        """
        self.check(shard)
        with array_record_data_source.ArrayRecordDataSource([str(self.path_of(shard))]) as source:
            return [Rollout.from_bytes(record) for record in source.__getitems__(range(shard.n))]

    def check(self, shard: Shard) -> None:
        """Raises ValueError if a shard's file is missing or is not what was written."""
        path = self.path_of(shard)
        what = 'missing' if not path.exists() else 'damaged' if _sha256(path) != shard.sha256 else ''
        if what:
            raise ValueError(
                f'{path}, block {shard.block} of iteration {shard.iteration} with {shard.n} roll-outs, is {what}. Put '
                'it back from a copy, or delete it: the same command then collects that block again.')

    def read_labels(self, shard: Shard, reward_digest: str) -> np.ndarray:
        """Returns the rewards of a shard's roll-outs, NaN where the reward abstained.  # [n] float64

        Raises:
          ValueError: if there are none, or they are damaged.
        """
        path = self.labels_path(shard, reward_digest)
        if not path.exists():
            raise ValueError(f'block {shard.block} of iteration {shard.iteration} has no labels of reward '
                             f'{reward_digest}: {path} is missing.')
        try:
            labels = np.load(path)
            if labels.shape != (shard.n,) or labels.dtype != np.float64:
                raise ValueError(f'it holds {labels.dtype} {labels.shape}, not {shard.n} numbers')
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f'the labels in {path} are damaged ({error}). Delete the file: they are then made '
                             'again.') from error
        return labels


class DatasetWriter:
    """Adds shards and labels to D. There is one writer at a time."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manifest = Manifest(self.directory)

    def has(self, iteration: int, block: int) -> bool:
        """Returns whether a block is in D. A block whose file is gone is not."""
        shard = self._manifest.shards.get((iteration, block))
        return shard is not None and self._manifest.path_of(shard).exists()

    def digest(self, iteration: int) -> str:
        """Returns a hash of all data up to an iteration: it changes when any token of it does."""
        return self._manifest.digest(iteration)

    def write_shard(self, iteration: int, block: int, rollouts: Sequence[Rollout], meta: Mapping[str, Any]) -> None:
        """Adds a block.

        Args:
          iteration: that collected it.
          block: its number in the iteration.
          rollouts: all of `iteration`, no unit twice.
          meta: how they were drawn; what JSON can hold.

        Raises:
          ValueError: if D has the block, or the roll-outs are not as described.
        """
        if self.has(iteration, block):
            raise ValueError(f'block {block} of iteration {iteration} is in {self.directory} already, and D only '
                             'grows.')
        if not rollouts:
            raise ValueError(f'block {block} of iteration {iteration} has no roll-outs.')
        foreign = [rollout.unit for rollout in rollouts if rollout.iteration != iteration]
        if foreign:
            raise ValueError(f'block {block} of iteration {iteration} has units of other iterations: {foreign[:3]}.')
        if len({rollout.unit for rollout in rollouts}) < len(rollouts):
            raise ValueError(f'block {block} of iteration {iteration} has a unit twice.')
        path = self.directory / f'{iteration:05d}-{block:05d}.array_record'
        temporary = path.with_suffix('.tmp')
        writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
        for rollout in rollouts:
            writer.write(rollout.to_bytes())
        writer.close()
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        self._add(temporary, Shard(path.name, iteration, block, len(rollouts), _sha256(temporary), dict(meta)))

    def adopt(self, source: Manifest, shard: Shard, meta: Mapping[str, Any]) -> None:
        """Adds a shard of another D, without its labels; does nothing if it is here.

        Args:
          source: the other D.
          shard: of it.
          meta: added to what the shard says of how it was drawn.

        Raises:
          ValueError: its file is missing or damaged, or D has other roll-outs as that block.
        """
        if self.has(shard.iteration, shard.block):
            if self._shard(shard.iteration, shard.block).sha256 != shard.sha256:
                raise ValueError(f'block {shard.block} of iteration {shard.iteration} in {self.directory} has other '
                                 f'roll-outs than in {source.directory}, and D only grows.')
            return
        source.check(shard)
        temporary = (self.directory / shard.name).with_suffix('.tmp')
        shutil.copyfile(source.path_of(shard), temporary)
        self._add(temporary, dataclasses.replace(shard, meta={**shard.meta, **meta}))

    def _add(self, temporary: Path, shard: Shard) -> None:
        """Moves a finished file to its place, and lists it."""
        _move(temporary, self._manifest.path_of(shard))
        self._manifest.shards[shard.iteration, shard.block] = shard
        shards = [dataclasses.asdict(shard) for _, shard in sorted(self._manifest.shards.items())]
        with _atomic(self._manifest.path) as file:
            file.write((json.dumps({'format': FORMAT, 'shards': shards}, indent=1) + '\n').encode())

    def read_shard(self, iteration: int, block: int) -> list[Rollout]:
        """Returns a block's roll-outs, in the order they were written.

        Raises:
          ValueError: if there is no such block, or its file is damaged.
        """
        return self._manifest.read(self._shard(iteration, block))

    def write_labels(self, iteration: int, block: int, reward_digest: str, labels: np.ndarray) -> None:
        """Adds the rewards of a block's roll-outs, in their order, NaN where the reward abstained.  # [n]"""
        shard = self._shard(iteration, block)
        labels = np.asarray(labels, np.float64)
        if labels.shape != (shard.n,):
            raise ValueError(f'block {block} of iteration {iteration} has {shard.n} roll-outs and was given labels of '
                             f'shape {labels.shape}.')
        with _atomic(self._manifest.labels_path(shard, reward_digest)) as file:
            np.save(file, labels)

    def unlabelled(self, reward_digest: str, iteration: int) -> list[tuple[int, int]]:
        """Returns the (iteration, block) of every shard up to `iteration` without labels of a reward."""
        return [(shard.iteration, shard.block) for shard in self._manifest.upto(iteration)
                if not self._manifest.labels_path(shard, reward_digest).exists()]

    def _shard(self, iteration: int, block: int) -> Shard:
        if (iteration, block) not in self._manifest.shards:
            raise ValueError(f'{self.directory} has no block {block} of iteration {iteration}.')
        return self._manifest.shards[iteration, block]


class AggregatedDataset:
    """All labelled roll-outs of iterations 1 .. k, with random access. Each unit is there once.

    Attributes:
      rewards: of each roll-out; none is NaN.  # [N] float64
      units: iteration, example, sample of each roll-out.  # [N, 3] int64
      lengths: tokens of prompt and of answer of each roll-out.  # [N, 2] int64
      cuts: index of the last guided token of each answer.  # [N] int64
      shared_prefix: number of tokens that all prompts begin with alike.
      abstained: number of roll-outs left out because the reward abstained.
      duplicates: number of roll-outs left out because their unit came before.
      digest: hash of all the roll-outs and labels here, in their order.
    """

    def __init__(self, directory: str | os.PathLike[str], reward_digest: str, iteration: int,
                 skip_corrupt: bool = False) -> None:
        """Reads every shard once, to check it.

        Args:
          directory: of D.
          reward_digest: whose labels are read.
          iteration: k.
          skip_corrupt: leave out damaged shards with a warning, rather than refuse them.

        Raises:
          ValueError: if a shard or its labels are missing or damaged, or no roll-out is left.
        """
        manifest = Manifest(directory)
        paths, rewards, rows, seen = [], [], [], set()
        self.abstained = self.duplicates = 0
        first, digest = 0, hashlib.sha256()
        prefix: np.ndarray | None = None
        for shard in manifest.upto(iteration):
            try:
                rollouts = manifest.read(shard)
            except ValueError as error:
                if not skip_corrupt:
                    raise
                _logger.warning('left out: %s', error)
                continue
            labels = manifest.read_labels(shard, reward_digest)
            paths.append(str(manifest.path_of(shard)))
            digest.update(f'{shard.sha256} {hashlib.sha256(labels.tobytes()).hexdigest()}\n'.encode())
            for number, (rollout, label) in enumerate(zip(rollouts, labels, strict=True)):
                if rollout.unit in seen:
                    self.duplicates += 1
                    continue
                seen.add(rollout.unit)
                if np.isnan(label):
                    self.abstained += 1
                    continue
                prefix = rollout.prompt if prefix is None else prefix[:common_prefix(prefix, rollout.prompt)]
                rewards.append(label)
                rows.append((first + number, *rollout.unit, len(rollout.prompt), len(rollout.answer), rollout.cut))
            first += shard.n
        if prefix is None:
            raise ValueError(f'{directory} has no labelled roll-outs up to iteration {iteration} '
                             f'({self.abstained} were left out because the reward abstained).')
        if self.duplicates:
            _logger.warning('%d roll-outs of %s repeat a unit and are left out.', self.duplicates, directory)
        if self.abstained:
            _logger.warning('%d of %d roll-outs of %s are left out: the reward abstained, or took too long.',
                            self.abstained, self.abstained + len(rows), directory)
        table = np.array(rows, np.int64)
        self._places, self.units, self.lengths, self.cuts = table[:, 0], table[:, 1:4], table[:, 4:6], table[:, 6]
        self.rewards = np.array(rewards, np.float64)
        self.shared_prefix = len(prefix)
        self.digest = digest.hexdigest()
        self._source = array_record_data_source.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, index: int) -> Rollout:
        return self.read([index])[0]

    @property
    def examples(self) -> np.ndarray:
        """Ids of the examples there are, increasing.  # [E] int64"""
        return np.unique(self.units[:, 1])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Rollout]:
        """Returns the roll-outs of these row numbers, in their order."""
        records = self._source.__getitems__([int(self._places[i]) for i in indices])
        return [Rollout.from_bytes(record) for record in records]

    def varied_examples(self) -> np.ndarray:
        """Returns the ids of the examples whose answers do not all have one reward, over all iterations.

        The others teach nothing about which token is better (paper, appendix E).  # [E'] int64
        """
        ids, inverse = np.unique(self.units[:, 1], return_inverse=True)
        least, most = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
        np.minimum.at(least, inverse, self.rewards)
        np.maximum.at(most, inverse, self.rewards)
        return ids[least < most]


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many leading entries are equal."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that is at `path` once the block ends, whole, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _move(temporary, path)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the name itself must survive a power cut
    finally:
        os.close(directory)


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
