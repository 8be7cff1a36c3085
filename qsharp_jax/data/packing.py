"""Batches of one fixed shape for the fit: what several answers have in common is computed once.

A row is a tree of tokens, written down depth first: what its prompts begin with alike, under it the rest of each
prompt, and under each prompt its answers; padding follows. A token sees the tokens above it, at the positions they had
when the answer was drawn, so a packed row computes what separate rows would.
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

Array = np.ndarray | jax.Array
Group = tuple[Sequence[Rollout], np.ndarray]  # answers to one prompt, and their rewards


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


def pack(rows: Sequence[Sequence[Group]], size: int, length: int, tokens: Literal['all', 'single'],
         filler: float) -> FitBatch:
    """Returns a batch; rows beyond those given are padding.

    Args:
      rows: groups of answers that share a row, each to one prompt.
      size: B.
      length: T.
      tokens: which carry loss: 'all' from the cut on, or the 'single' one at the cut.
      filler: reward of padding rows, inside the support of the returns.
    """
    shape = size, length
    own = np.tile(np.arange(length, dtype=np.int32), (size, 1))
    batch = FitBatch(
        tokens=np.zeros(shape, np.int32), ends=own + 1, positions=np.zeros(shape, np.int32), parents=own,
        examples=np.full(shape, -1, np.int32), answer_positions=np.full(shape, -1, np.int32),
        rewards=np.full(shape, filler, np.float32), weights=np.zeros(shape, np.float32))
    for row, groups in enumerate(rows):
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
        shared = _common(np.asarray(row.tokens)[path], prompt)
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


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many leading entries are equal."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


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
                 prompts_per_row: int = 1, examples: Collection[int] | np.ndarray | None = None,
                 tokens: Literal['all', 'single'] = 'all', multiple: int = 16, rows_divisible_by: int = 1) -> None:
        """Lays out the rows.

        Args:
          dataset: D.
          rows: B, rows a batch over all devices.
          samples_per_row: most answers of one prompt in a row.
          seed: of the order, and of which answers and prompts share a row.
          prompts_per_row: most prompts in a row; worth it where prompts begin alike.
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
        for name, most in (('samples_per_row', samples_per_row), ('prompts_per_row', prompts_per_row)):
            if most < 1:
                raise ValueError(f'{name} is {most}; it must be at least 1.')
        if tokens not in ('all', 'single'):
            raise ValueError(f"tokens is {tokens!r}; it is 'all' (from the cut on) or 'single' (the one at the cut).")
        chosen = dataset.examples if examples is None else np.intersect1d(dataset.examples, np.fromiter(examples, int))
        groups = _groups(dataset, chosen, samples_per_row, seed)
        if not groups:
            raise ValueError(f'D has no answers to the {0 if examples is None else len(examples)} chosen prompts.')
        mixed = np.random.default_rng([seed, len(groups)]).permutation(len(groups)).tolist()
        laid = [[groups[index] for index in mixed[first:first + prompts_per_row]]
                for first in range(0, len(mixed), prompts_per_row)]
        kept = np.array([_kept(length, cut, tokens)
                         for length, cut in zip(dataset.lengths[:, 1], dataset.cuts, strict=True)])
        longest = max(_row_length(dataset, row, kept) for row in laid)
        length = math.ceil(longest / multiple) * multiple
        self.steps_per_epoch = math.ceil(len(laid) / rows)
        self.num_samples = sum(len(group) for group in groups)
        self.num_examples = len(chosen)
        self.shape = rows, length
        layout = ' '.join(map(str, (dataset.digest, rows, samples_per_row, prompts_per_row, seed, tokens, length,
                                    chosen.tolist())))
        self.digest = hashlib.sha256(layout.encode()).hexdigest()
        filler = float(dataset.rewards[groups[0][0]])
        self._batches = (
            grain.MapDataset.source(_Rows(dataset, laid))
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


class _Rows:
    """The rows before they are laid out, one by one, for grain."""

    def __init__(self, dataset: AggregatedDataset, rows: Sequence[Sequence[np.ndarray]]) -> None:
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[Group]:
        return [(self._dataset.read(group), self._dataset.rewards[group]) for group in self._rows[index]]


def _row_length(dataset: AggregatedDataset, row: Sequence[np.ndarray], kept: np.ndarray) -> int:
    """Returns how many tokens a row takes."""
    prompts = sorted(dataset.read(group[:1])[0].prompt.tolist() for group in row) if len(row) > 1 else []
    saved = sum(_common(np.array(one), np.array(other)) for one, other in zip(prompts, prompts[1:]))
    return sum(int(dataset.lengths[group[0], 0] + kept[group].sum()) for group in row) - saved


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
