"""Batches of one fixed shape for the fit: the answers to one prompt share one copy of it.

A row holds one prompt (segment 0) and up to `samples_per_row` of its answers (segments 1, 2, …) one after the other;
the rest is padding (segment -1). Each answer attends to the prompt and to itself at the positions it had when it was
drawn, so a packed row computes what separate rows would.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
import hashlib
import math
from typing import Literal

from flax import struct
import grain
import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.data import builders
from qsharp_jax.data.dataset import AggregatedDataset, Rollout

PADDING = -1
Array = np.ndarray | jax.Array
Group = tuple[Sequence[Rollout], np.ndarray]


@struct.dataclass
class FitBatch:
    """Rows of packed answers.

    Attributes:
      tokens: ids; 0 on padding.  # [B, T] int32
      segments: 0 on the prompt, 1, 2, … on its answers, -1 on padding.  # [B, T] int32
      positions: of each token in its own sequence; 0 on padding.  # [B, T] int32
      parents: index along T of the token before this one in its sequence; its own index on the first token of a
        prompt and on padding.  # [B, T] int32
      rewards: of each token's answer. Off the answers it is some reward of the row, so that it lies in the support
        of the returns and weight 0 times its loss is 0.  # [B, T] float32
      weights: 1 / (number of the answer's tokens with loss) on these tokens, 0 elsewhere: they sum to the number of
        answers, and Σ weights · loss / Σ weights is the mean over an answer's tokens, then over answers.
        # [B, T] float32
    """

    tokens: Array
    segments: Array
    positions: Array
    parents: Array
    rewards: Array
    weights: Array


def attention_mask(segments: Array, positions: Array) -> jax.Array:
    """Returns whether token i (second axis) sees token j (third axis).  # [B, T, T] bool

    A token sees what precedes it in its own sequence, and itself. Padding sees itself alone, so no row is empty.

    Args:
      segments: as in `FitBatch`.  # [B, T]
      positions: as in `FitBatch`.  # [B, T]
    """
    of, at = segments[:, :, None], segments[:, None, :]
    shared = ((at == 0) | (at == of)) & (at != PADDING) & (of != PADDING)
    before = positions[:, None, :] <= positions[:, :, None]
    return (shared & before) | jnp.eye(segments.shape[1], dtype=bool)[None]


def pack(groups: Sequence[Group], rows: int, length: int, tokens: Literal['all', 'single'],
         filler: float) -> FitBatch:
    """Returns groups as rows of one length; rows beyond the groups are padding.

    Args:
      groups: for each row, answers to one prompt and their rewards.
      rows: B.
      length: T.
      tokens: which carry loss: 'all' from the cut on, or the 'single' one at the cut.
      filler: reward of padding rows, inside the support of the returns.
    """
    shape = rows, length
    ids, segments = np.zeros(shape, np.int32), np.full(shape, PADDING, np.int32)
    positions, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    parents = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    rewards = np.full(shape, filler, np.float32)
    for row, (rollouts, earned) in enumerate(groups):
        prompt = rollouts[0].prompt
        size = len(prompt)
        other = [rollout.unit for rollout in rollouts if not np.array_equal(rollout.prompt, prompt)]
        if other:
            raise ValueError(f'unit {other[0]} has another prompt than unit {rollouts[0].unit}: prefix, template or '
                             'tokenizer changed while D was collected. Start in another workdir.')
        rewards[row] = earned[0]
        ids[row, :size], segments[row, :size], positions[row, :size] = prompt, 0, np.arange(size)
        parents[row, 1:size] = np.arange(size - 1)
        start = size
        for segment, (rollout, reward) in enumerate(zip(rollouts, earned, strict=True), start=1):
            answer = rollout.answer[:_kept(len(rollout.answer), rollout.cut, tokens)]
            place = slice(start, start + len(answer))
            ids[row, place], segments[row, place], rewards[row, place] = answer, segment, reward
            positions[row, place] = size + np.arange(len(answer))
            parents[row, place] = [size - 1, *range(start, start + len(answer) - 1)]
            weights[row, start + rollout.cut:place.stop] = 1 / (len(answer) - rollout.cut)
            start += len(answer)
    return FitBatch(tokens=ids, segments=segments, positions=positions, parents=parents, rewards=rewards,
                    weights=weights)


class FitBatches:
    """Batches of D in an order that is shuffled anew in each epoch. `batch(step)` depends on nothing but its arguments:
    a fit that resumes at a step needs no other position.

    Every epoch holds every answer once. Its last batch is filled up with padding rows.

    Attributes:
      steps_per_epoch: batches an epoch.
      num_samples: answers an epoch.
      num_examples: prompts.
      shape: B and T of every batch.
      digest: hash of the data and of how it is packed and ordered.
    """

    def __init__(self, dataset: AggregatedDataset, rows: int, samples_per_row: int, seed: int, *,
                 examples: Collection[int] | np.ndarray | None = None, tokens: Literal['all', 'single'] = 'all',
                 multiple: int = 16, rows_divisible_by: int = 1) -> None:
        """Lays out the rows.

        Args:
          dataset: D.
          rows: B, rows a batch over all devices.
          samples_per_row: most answers of one prompt in a row.
          seed: of the order, and of which answers share a row.
          examples: ids of the prompts to use; None for all.
          tokens: which carry loss: 'all' from the cut on, or the 'single' one at the cut.
          multiple: T is the longest row, rounded up to a multiple of this.
          rows_divisible_by: what B must be divisible by: devices, times parts of an accumulated gradient.

        Raises:
          ValueError: if B is not divisible, or no answer is left.
        """
        if rows < 1 or rows % rows_divisible_by:
            raise ValueError(f'a batch of {rows} rows does not divide into {rows_divisible_by} equal parts: make it '
                             f'{max(1, round(rows / rows_divisible_by)) * rows_divisible_by}, or another multiple.')
        if samples_per_row < 1:
            raise ValueError(f'samples_per_row is {samples_per_row}; it must be at least 1.')
        if tokens not in ('all', 'single'):
            raise ValueError(f"tokens is {tokens!r}; it is 'all' (from the cut on) or 'single' (the one at the cut).")
        chosen = dataset.examples if examples is None else np.intersect1d(dataset.examples, np.fromiter(examples, int))
        groups = _groups(dataset, chosen, samples_per_row, seed)
        if not groups:
            raise ValueError(f'D has no answers to the {0 if examples is None else len(examples)} chosen prompts.')
        kept = np.array([_kept(length, cut, tokens)
                         for length, cut in zip(dataset.lengths[:, 1], dataset.cuts, strict=True)])
        longest = max(dataset.lengths[group[0], 0] + kept[group].sum() for group in groups)
        length = math.ceil(longest / multiple) * multiple
        self.steps_per_epoch = math.ceil(len(groups) / rows)
        self.num_samples = sum(len(group) for group in groups)
        self.num_examples = len(chosen)
        self.shape = rows, length
        layout = f'{dataset.digest} {rows} {samples_per_row} {seed} {tokens} {length} {chosen.tolist()}'
        self.digest = hashlib.sha256(layout.encode()).hexdigest()
        filler = float(dataset.rewards[groups[0][0]])
        self._batches = (
            grain.MapDataset.source(_Groups(dataset, groups))
            # Grain adds the epoch to its seed: seeds of a run that follow each other would share their orders.
            .shuffle(seed=int(builders.hash_share(f'order {seed}') * 2 ** 32))
            .batch(rows, batch_fn=lambda chunk: pack(chunk, rows, length, tokens, filler))
            .repeat())

    def batch(self, step: int) -> FitBatch:
        """Returns the batch of a step, counted from 0 through all epochs."""
        return self._batches[step]


def split_examples(ids: Collection[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids to train on and those held out, increasing, with at least one of each if 0 < fraction < 1.

    An id's rank is drawn from the seed alone: ids that come later move few of the others.

    Args:
      ids: of examples.
      fraction: share held out.
      seed: of the split.
    """
    ids = np.unique(np.fromiter(ids, np.int64))
    if not 0 <= fraction < 1:
        raise ValueError(f'the share of held-out examples is {fraction}; it must be at least 0 and below 1.')
    if fraction and len(ids) < 2:
        raise ValueError(f'{len(ids)} example cannot be split into some to train on and some held out: collect more, '
                         'or set the held-out share to 0.')
    order = sorted(ids.tolist(), key=lambda id_: builders.hash_share(f'held out {seed} {id_}'))
    count = min(max(round(fraction * len(ids)), 1), len(ids) - 1) if fraction else 0
    return np.sort(np.array(order[count:], np.int64)), np.sort(np.array(order[:count], np.int64))


class _Groups:
    """The rows before they are laid out, one by one, for grain."""

    def __init__(self, dataset: AggregatedDataset, groups: Sequence[np.ndarray]) -> None:
        self._dataset, self._groups = dataset, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Group:
        group = self._groups[index]
        return self._dataset.read(group), self._dataset.rewards[group]


def _groups(dataset: AggregatedDataset, examples: np.ndarray, samples_per_row: int,
            seed: int) -> list[np.ndarray]:
    """Returns row numbers of the dataset, grouped: answers to one prompt, of all iterations, in even parts."""
    members: dict[int, list[int]] = {int(example): [] for example in examples}
    for index, example in enumerate(dataset.units[:, 1].tolist()):
        if example in members:
            members[example].append(index)
    groups = []
    for example, indices in members.items():
        mixed = np.random.default_rng([seed, example]).permutation(indices)
        groups += np.array_split(mixed, math.ceil(len(mixed) / samples_per_row))
    return groups


def _kept(length: int, cut: int, tokens: str) -> int:
    """Returns how many tokens of an answer a row needs: what follows the last token with loss is left out."""
    return length if tokens == 'all' else cut + 1
