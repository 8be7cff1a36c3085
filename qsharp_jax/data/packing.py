"""Batches of one fixed shape for the fit: what several answers have in common is computed once.

A row is a tree of tokens, written down depth first: what its prompts begin with alike, under it the rest of each
prompt, and under each prompt its answers; padding follows. A token sees the tokens above it, at the positions they had
when the answer was drawn, so a packed row computes what separate rows would.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
import hashlib
import heapq
import math
from typing import Literal, Protocol

from flax import struct
import grain
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.data import builders
from qsharp_jax.data.dataset import common_prefix, Rollout

Array = np.ndarray | jax.Array

# In rows of so many tokens attention takes as long as all other work. On CPU 750 were measured at width 64 and 3,500 at
# width 576; a number between these makes rows that take a few per cent more work at most, whichever is right.
ATTENTION_KEYS = 2560
ROUND_TO = 16  # of which the length of a row is a multiple

Group = tuple[Sequence[Rollout], np.ndarray]  # answers to one prompt, and their rewards


class Answers(Protocol):
    """What is packed: D (`AggregatedDataset`, which says what the fields are), or answers of any other origin."""

    rewards: np.ndarray
    units: np.ndarray
    lengths: np.ndarray
    cuts: np.ndarray
    shared_prefix: int
    digest: str

    @property
    def examples(self) -> np.ndarray:
        """Ids of the prompts."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Rollout]:
        """Returns the answers of these row numbers."""
        ...


@struct.dataclass
class FitBatch:
    """Rows of packed answers.

    Attributes:
      tokens: ids; 0 on padding.  # [B, T] int32
      ends: index along T behind the last of the tokens that see this one; they lie between.  # [B, T] int32
      positions: of each token in its own sequence; 0 on padding.  # [B, T] int32
      parents: index along T of the token before this one in its sequence; its own index on the first token of a
        prompt and on padding.  # [B, T] int32
      examples: id of the prompt that a token answers; -1 off the answers.  # [B, T] int32
      answer_positions: of a token in its answer, from 0; -1 off the answers.  # [B, T] int32
      rewards: of each token's answer. Off the answers it is some reward of the row, so that it lies in the support
        of the returns and weight 0 times its loss is 0.  # [B, T] float32
      weights: 1 / (number of the answer's tokens with loss) on these tokens, 0 elsewhere: they sum to the number of
        answers, and Σ weights · loss / Σ weights is the mean over an answer's tokens, then over answers.
        # [B, T] float32
    """

    tokens: Array
    ends: Array
    positions: Array
    parents: Array
    examples: Array
    answer_positions: Array
    rewards: Array
    weights: Array


def attention_mask(ends: Array) -> jax.Array:
    """Returns whether token i (second axis) sees token j (third axis): itself and what is above it.  # [B, T, T] bool

    Args:
      ends: as in `FitBatch`.  # [B, T]
    """
    index = jnp.arange(ends.shape[1])
    return (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < ends[:, None, :])


def pack(rows: Sequence[Sequence[Group]], length: int, tokens: Literal['all', 'single'],
         filler: float) -> FitBatch:
    """Returns a batch.

    Args:
      rows: groups of answers that share a row, each to one prompt; a row without any is padding.  # B
      length: T.
      tokens: which carry loss: 'all' from the cut on, or the 'single' one at the cut.
      filler: reward of padding rows, inside the support of the returns.
    """
    shape = len(rows), length
    own = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    batch = FitBatch(
        tokens=np.zeros(shape, np.int32), ends=own + 1, positions=np.zeros(shape, np.int32), parents=own,
        examples=np.full(shape, -1, np.int32), answer_positions=np.full(shape, -1, np.int32),
        rewards=np.full(shape, filler, np.float32), weights=np.zeros(shape, np.float32))
    for row, groups in enumerate(rows):
        if groups:
            _fill(jax.tree.map(lambda leaf: leaf[row], batch), groups, tokens)
    return batch


def _fill(row: FitBatch, groups: Sequence[Group], tokens: str) -> None:
    """Writes groups into the arrays of one row."""
    row.rewards[:] = groups[0][1][0]
    path: list[int] = []  # indices along T of the prompt that was written last
    end = 0
    for rollouts, earned in sorted(groups, key=lambda group: group[0][0].prompt.tolist()):
        prompt = rollouts[0].prompt
        other = [rollout.unit for rollout in rollouts if not np.array_equal(rollout.prompt, prompt)]
        if other:
            raise ValueError(f'unit {other[0]} has another prompt than unit {rollouts[0].unit}: prefix, template or '
                             'tokenizer changed while D was collected. Start in another workdir.')
        shared = common_prefix(np.asarray(row.tokens)[path], prompt)
        row.ends[path[shared:]] = end
        path = path[:shared] + _chain(row, prompt[shared:], end, path[:shared])
        end += len(prompt) - shared
        for rollout, reward in zip(rollouts, earned, strict=True):
            answer = rollout.answer[:_kept(len(rollout.answer), rollout.cut, tokens)]
            _chain(row, answer, end, path)
            place = slice(end, end + len(answer))
            row.ends[place], row.examples[place], row.rewards[place] = place.stop, rollout.example, reward
            row.answer_positions[place] = np.arange(len(answer))
            row.weights[end + rollout.cut:place.stop] = 1 / (len(answer) - rollout.cut)
            end = place.stop
    row.ends[path] = end


def _chain(row: FitBatch, tokens: np.ndarray, start: int, above: Sequence[int]) -> list[int]:
    """Writes tokens one below the other from index `start` on, below the path `above`; returns their indices."""
    place = list(range(start, start + len(tokens)))
    row.tokens[place] = tokens
    row.positions[place] = len(above) + np.arange(len(tokens))
    row.parents[place] = [above[-1] if above else start, *place[:-1]][:len(place)]
    return place


class FitBatches:
    """Batches of D in an order that is shuffled anew in each epoch. `batch(step)` depends on nothing but its arguments:
    a fit that resumes at a step needs no other position.

    Every epoch holds every answer once. Groups of answers are sorted by their tokens into as many classes as a batch
    has groups, and a batch has at most one of each class: long and short answers come in the same proportion in all
    batches. Which groups share a row is laid out once, such that rows are evenly full; which rows share a batch is
    drawn anew in each epoch.

    Attributes:
      steps_per_epoch: batches an epoch.
      num_samples: answers an epoch.
      num_examples: prompts.
      shape: B and T of every batch.
      digest: hash of the data and of how it is grouped and ordered. Not of its rows, whose number is the devices': a
        fit that goes on with another may see some answers twice, and others not, in the epoch where it was stopped.
    """

    def __init__(self, dataset: Answers, batch_size: int, samples_per_row: int, seed: int, *,
                 examples: Collection[int] | np.ndarray | None = None, tokens: Literal['all', 'single'] = 'all',
                 multiple: int = ROUND_TO, rows_divisible_by: int = 1) -> None:
        """Lays out the rows.

        Args:
          dataset: D.
          batch_size: most groups a batch over all devices; the steps of an epoch share the groups out evenly.
          samples_per_row: most answers of a group; all are to one prompt, which they share.
          seed: of the order, and of which answers are grouped.
          examples: ids of the prompts to use; None for all.
          tokens: which carry loss: 'all' from the cut on, or the 'single' one at the cut.
          multiple: of which T is one.
          rows_divisible_by: what B must be divisible by: devices, times parts of an accumulated gradient.

        Raises:
          ValueError: if no answer is left.
        """
        for name, most in (('batch_size', batch_size), ('samples_per_row', samples_per_row)):
            if most < 1:
                raise ValueError(f'{name} is {most}; it must be at least 1.')
        if tokens not in ('all', 'single'):
            raise ValueError(f"tokens is {tokens!r}; it is 'all' (from the cut on) or 'single' (the one at the cut).")
        chosen = dataset.examples if examples is None else np.intersect1d(dataset.examples, np.fromiter(examples, int))
        if not len(chosen):
            raise ValueError(f'D has no answers to the {0 if examples is None else len(examples)} chosen prompts.')
        rng = np.random.default_rng(seed)
        members, starts = _groups(dataset, chosen, samples_per_row, rng)
        kept = dataset.lengths[:, 1] if tokens == 'all' else dataset.cuts + 1
        answers = np.add.reduceat(kept[members], starts)
        own = dataset.lengths[members[starts], 0] - dataset.shared_prefix + answers
        self.steps_per_epoch = math.ceil(len(starts) / batch_size)
        mixed = rng.permutation(len(starts))
        classes = min(batch_size, len(starts))
        slots = np.full((classes, self.steps_per_epoch), -1)
        for slot, numbers in zip(slots, _split(mixed[np.argsort(-own[mixed], kind='stable')], classes)):
            slot[:len(numbers)] = numbers
        laid, length = lay_out(np.append(own, 0)[slots], dataset.shared_prefix, multiple, rows_divisible_by)
        rows = [np.array([slots[number, columns] for number, columns in row]).reshape(-1, self.steps_per_epoch).T
                for row in laid]
        self._dataset, self._members, self._bounds = dataset, members, np.append(starts, len(members))
        # Rows shuffled alike would come together in each epoch. Grain adds the epoch to its seed: seeds of a run that
        # follow each other would share their orders.
        self._rows = [
            grain.MapDataset.source(numbers)
            .shuffle(seed=int(builders.hash_share(f'order {seed} {index}') * 2 ** 32))
            .repeat() for index, numbers in enumerate(rows)]
        self._tokens: Literal['all', 'single'] = tokens
        self.num_samples = len(members)
        self.num_examples = len(chosen)
        self.shape = len(rows), length
        layout = ' '.join(map(str, (dataset.digest, batch_size, samples_per_row, seed, tokens)))
        self.digest = hashlib.sha256(layout.encode() + chosen.tobytes()).hexdigest()

    def batch(self, step: int) -> FitBatch:
        """Returns the batch of a step, counted from 0 through all epochs."""
        rows = [[self._group(number) for number in row[step] if number >= 0] for row in self._rows]
        return pack(rows, self.shape[1], self._tokens, float(self._dataset.rewards[self._members[0]]))

    def _group(self, number: int) -> Group:
        members = self._members[self._bounds[number]:self._bounds[number + 1]]
        return self._dataset.read(members), self._dataset.rewards[members]


def lay_out(sizes: np.ndarray, shared: int, multiple: int,
            rows_divisible_by: int) -> tuple[list[list[tuple[int, np.ndarray]]], int]:
    """Returns which classes of groups share each row, and the tokens of a row: of the ways tried the least work.

    Args:
      sizes: tokens of each group beyond what all prompts begin with, largest classes first.  # [C, steps]
      shared: tokens that all prompts begin with, once in each row.
      multiple: of which the tokens of a row are one.
      rows_divisible_by: of which the number of rows is a multiple; some may stay empty.

    Returns:
      For each row its classes, each with the column of `sizes` whose group each step has [steps]; and the tokens.
    """
    classes, steps = sizes.shape
    most, mean = sizes.max(axis=1), sizes.sum() / steps
    descending = np.argsort(-sizes, axis=1, kind='stable')
    best: tuple[float, list[list[tuple[int, np.ndarray]]], int] | None = None
    # Rows as long as the longest group can hold all of them in so many, each but one filled to half or more.
    enough = min(classes, int(2 * most.sum() / most.max()) + 1)
    for count in range(math.ceil(enough / rows_divisible_by) * rows_divisible_by, 0, -rows_divisible_by):
        # The bound is convex in the number of rows: it only rises from here.
        if best is not None and _work(count, shared + mean / count) >= best[0]:
            break
        rows: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(count)]
        filled = np.zeros((count, steps), np.int64)
        longest = [(0, row) for row in range(count)]
        for number in range(classes):
            # To the row that is shortest where it is longest; there the largest to the steps that have least.
            row = longest[0][1]
            columns = np.empty(steps, np.int64)
            columns[np.argsort(filled[row], kind='stable')] = descending[number]
            rows[row].append((number, columns))
            filled[row] += sizes[number, columns]
            heapq.heapreplace(longest, (int(filled[row].max()), row))
        length = math.ceil((shared + int(filled.max())) / multiple) * multiple
        if best is None or _work(count, length) < best[0]:
            best = _work(count, length), rows, length
    assert best is not None
    return best[1:]


def _work(rows: int, length: float) -> float:
    return rows * length * (1 + length / ATTENTION_KEYS)


def split_examples(ids: Collection[int] | np.ndarray, fraction: float, seed: int,
                   among: Collection[int] | np.ndarray = ()) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids to train on and those held out, increasing, with at least one of each if 0 < fraction < 1.

    An id's rank is drawn from the seed alone. Of all examples that there may be, the share of the lowest rank is held
    out, whichever are here: what is held out once is so when more examples have come. Only where that would leave none
    of a kind, the ids here are divided by themselves.

    Args:
      ids: of examples.
      fraction: share held out.
      seed: of the split.
      among: ids of all that there may be; none for `ids`.
    """
    ids = np.unique(np.fromiter(ids, np.int64))
    if not 0 <= fraction < 1:
        raise ValueError(f'the share of held-out examples is {fraction}; it must be at least 0 and below 1.')
    if fraction and len(ids) < 2:
        raise ValueError(f'{len(ids)} example cannot be split into some to train on and some held out: collect more, '
                         'or set the held-out share to 0.')

    def lowest(ids: np.ndarray) -> np.ndarray:
        order = sorted(ids.tolist(), key=lambda id_: builders.hash_share(f'held out {seed} {id_}'))
        return np.array(order[:min(max(round(fraction * len(ids)), 1), len(ids) - 1) if fraction else 0], np.int64)

    held = np.intersect1d(ids, lowest(np.union1d(ids, np.fromiter(among, np.int64))))
    if fraction and not 0 < len(held) < len(ids):
        held = np.sort(lowest(ids))
    return np.setdiff1d(ids, held), held


def _split(numbers: np.ndarray, parts: int) -> list[np.ndarray]:
    """Returns consecutive parts, of which the larger ones, by 1, lie evenly among the others."""
    bounds = np.arange(parts + 1) * len(numbers) // parts
    return [numbers[first:last] for first, last in zip(bounds, bounds[1:])]


def _groups(dataset: Answers, examples: np.ndarray, samples_per_row: int,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns row numbers of the dataset, grouped, and where each group begins.

    A group has answers to one prompt, of all iterations; those of a prompt are split evenly.
    """
    chosen = rng.permutation(np.flatnonzero(np.isin(dataset.units[:, 1], examples)))
    chosen = chosen[np.argsort(dataset.units[chosen, 1], kind='stable')]
    _, first, which, count = np.unique(
        dataset.units[chosen, 1], return_index=True, return_inverse=True, return_counts=True)
    parts = -(-count // samples_per_row)
    part = (np.arange(len(chosen)) - first[which]) * parts[which] // count[which]
    return chosen, np.flatnonzero((np.diff(which, prepend=-1) != 0) | (np.diff(part, prepend=0) != 0))


def _kept(length: int, cut: int, tokens: str) -> int:
    """Returns how many tokens of an answer a row needs: what follows the last token with loss is left out."""
    return length if tokens == 'all' else cut + 1
