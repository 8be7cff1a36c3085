"""How far policies are from the reference that a borrowed value network was fitted for (paper, table 7).

A run with `value.run` guides another policy than that reference. With π the guided one, p the policy that it guides
and q the first reference,

    KL(π ‖ q) = KL(π ‖ p) + E[Σ_t log p(y_t) − log q(y_t)],  y drawn from π:

the first part is exact at each step and known when an answer is drawn, and what is found here is the sum in the second.
"""
from __future__ import annotations

from collections.abc import Sequence
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qsharp_jax import checkpoint
from qsharp_jax import config as config_lib
from qsharp_jax import progress, references, sharding, units
from qsharp_jax.baselines import losses, policies
from qsharp_jax.data.prompts import Prompts
from qsharp_jax.data.tokenizers import Tokenizer
from qsharp_jax.experiment import Experiment
from qsharp_jax.metrics import kept_array
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.ranking import digest_of
from qsharp_jax.types import Array, Params

_BYTES = 2 ** 30  # of the log-probabilities of a batch, on one device

Row = dict[str, Any]


def outline(experiment: Experiment) -> tuple[Any, TransformerConfig, Tokenizer]:
    """Returns config, shape and tokenizer of the first reference, of which only the head of its file is read.

    Raises:
      ValueError: its weights are not where its run found them.
    """
    source = Path(experiment.config.value.run)
    config = config_lib.from_json((source / 'config.json').read_text())
    try:
        return config, *references.outline(config, experiment.mesh)
    except ValueError as error:
        raise ValueError(f'value.run is {str(source)!r}, and KL is told to its reference, too, whose weights must be '
                         f'where that run found them: {error}') from error


def log_ratios(experiment: Experiment, iteration: int, prompts: Prompts, rows: Sequence[Row]) -> np.ndarray:
    """Returns log p(answer) − log q(answer) of each answer, at the temperature of the run's sampler.  # [n] float64

    It is 0 where p and q are one. What was found is kept, and read back by the same call.

    Args:
      experiment: the run, whose reference is p.
      iteration: of a value network that it borrows.
      prompts: of the split.
      rows: of `evaluate.samples_of`, at least one.

    Raises:
      ValueError: as `outline`.
    """
    digest = checkpoint.load_meta(experiment.value_dir(iteration))['reference']
    if digest == experiment.reference_digest:
        return np.zeros(len(rows))
    temperature = experiment.config.sampling.temperature or 1.0
    identity = f'{digest_of(prompts, rows)} {experiment.reference_digest} {digest} {temperature}'
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def found() -> np.ndarray:
        config, shape, tokenizer = outline(experiment)
        params, _ = references.load(config, shape, tokenizer, Path(experiment.config.value.run), experiment.mesh)
        own = _log_probs(experiment, experiment.reference_config, experiment.reference_params, prompts, rows)
        return own - _log_probs(experiment, shape, params, prompts, rows)

    return kept_array(experiment.workdir / 'samples' / 'first_reference' / f'{name}.npy', found)


def _log_probs(experiment: Experiment, shape: TransformerConfig, params: Params, prompts: Prompts,
               rows: Sequence[Row]) -> np.ndarray:
    """Returns the log-probability that a decoder of the run's tokenizer gives to each answer.  # [n] float64"""
    vocab_size = references.network(shape, experiment.tokenizer).vocab_size
    log_probs = policies.network_log_probs(shape, vocab_size, experiment.tokenizer.holes,
                                           experiment.config.sampling.temperature or 1.0)

    @jax.jit
    def of_batch(params: Params, batch: policies.Batch) -> Array:
        tokens, weights = batch.tokens[:, 0], batch.weights[:, 0, 1:]
        return losses.answer_log_probs(policies.chosen_log_probs(log_probs(params, tokens), tokens), weights)

    place = {int(example): index for index, example in enumerate(prompts.ids)}
    length = units.prompt_width(prompts) + max(len(row['tokens']) for row in rows)
    shards = sharding.batch_shards(experiment.mesh)
    each = min(max(_BYTES // (4 * length * vocab_size), 1), -(-len(rows) // shards))  # rows on a device
    size = shards * each
    found = []
    with progress.bar('log-probabilities of answers', total=len(rows), unit='answers') as bar:
        for first in range(0, len(rows), size):
            # The last batch is filled up with its last text: one shape serves all.
            chosen = [rows[min(number, len(rows) - 1)] for number in range(first, first + size)]
            batch = policies.lay_out([prompts.tokens[place[row['id']]] for row in chosen],
                                     [[row['tokens']] for row in chosen], length)
            found.append(sharding.to_host(of_batch(params, sharding.shard_batch(experiment.mesh, batch))))
            bar.update(min(size, len(rows) - first))
    return np.concatenate(found)[:len(rows)].astype(np.float64)
