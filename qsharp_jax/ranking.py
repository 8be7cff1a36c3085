"""The value network as a reward model: what it expects of a finished answer (paper, table 3)."""
from __future__ import annotations

from collections.abc import Sequence
import hashlib
from typing import Any

import numpy as np

from qsharp_jax import fit, learner, progress, sharding
from qsharp_jax.data.dataset import common_prefix, Rollout
from qsharp_jax.data.packing import FitBatches
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import kept_array
from qsharp_jax.types import Params

Row = dict[str, Any]


class _Answers:
    """Finished answers as D would have them, each with a loss on its last token alone."""

    def __init__(self, prompts: Prompts, rows: Sequence[Row], filler: float) -> None:
        place = {int(example): index for index, example in enumerate(prompts.ids)}
        self._prompts = [np.asarray(prompts.tokens[place[row['id']]], np.int32) for row in rows]
        self._tokens = [np.asarray(row['tokens'], np.int32) for row in rows]
        number = np.arange(len(rows))
        self.units = np.stack([0 * number, [row['id'] for row in rows], number], axis=1)
        self.lengths = np.array([(len(p), len(t)) for p, t in zip(self._prompts, self._tokens, strict=True)])
        self.cuts = self.lengths[:, 1] - 1
        self.rewards = np.full(len(rows), filler)
        prefix = self._prompts[0]
        for prompt in self._prompts:
            prefix = prefix[:common_prefix(prefix, prompt)]
        self.shared_prefix = len(prefix)
        self.digest = digest_of(prompts, rows)

    @property
    def examples(self) -> np.ndarray:
        """Ids of the prompts there are.  # [E] int64"""
        return np.unique(self.units[:, 1])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Rollout]:
        """Returns these answers, each with its number as the id by which `FitBatch.examples` knows it."""
        return [Rollout(0, int(i), 0, self._prompts[i], self._tokens[i], int(self.cuts[i]), True, False)
                for i in indices]


def digest_of(prompts: Prompts, rows: Sequence[Row]) -> str:
    """Returns what names answers and their prompts, by their ids and order."""
    place = {int(example): index for index, example in enumerate(prompts.ids)}
    digest = hashlib.sha256()
    for row in rows:
        prompt, tokens = (np.asarray(ids, np.int32) for ids in (prompts.tokens[place[row['id']]], row['tokens']))
        digest.update(f'{len(prompt)} {len(tokens)} '.encode() + prompt.tobytes() + tokens.tobytes())
    return digest.hexdigest()


def end_values(experiment: Experiment, iteration: int, params: Params, prompts: Prompts,
               rows: Sequence[Row]) -> np.ndarray:
    """Returns E[Z] at the last token of each answer: its end token, or where it was truncated.  # [n] float64

    The answers are packed and read as in a fit, once each. What was found is kept, and read back by the same call.

    Args:
      experiment: the run.
      iteration: that the network is of.
      params: of the network.
      prompts: of the split.
      rows: of `evaluate.samples_of`, at least one.
    """
    identity = f'{digest_of(prompts, rows)} {experiment.value_digest(iteration)}'
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return kept_array(experiment.workdir / 'samples' / 'end_values' / f'{name}.npy',
                      lambda: _end_values(experiment, params, prompts, rows))


def _end_values(experiment: Experiment, params: Params, prompts: Prompts, rows: Sequence[Row]) -> np.ndarray:
    answers, config = _Answers(prompts, rows, experiment.distribution.v_min), experiment.config.fit
    batches = FitBatches(answers, config.batch_size, config.samples_per_row, 0,
                         rows_divisible_by=sharding.batch_shards(experiment.mesh))
    predict = learner.make_predict(fit.scores_fn(experiment), experiment.distribution)
    found = np.full(len(rows), np.nan)
    with progress.bar('score answers', total=len(rows), unit='answers') as bar:
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(step)
            mean = sharding.to_host(predict(params, sharding.shard_batch(experiment.mesh, batch))['mean'])
            last = np.asarray(batch.weights) > 0
            found[np.asarray(batch.examples)[last]] = mean[last]
            bar.update(int(last.sum()))
    return found
