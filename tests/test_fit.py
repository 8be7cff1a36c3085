"""A step of the fit over packed rows is the step over the same answers, each in a row of its own."""
from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import categorical, fit
from qsharp_jax.data.dataset import AggregatedDataset, DatasetWriter, Rollout
from qsharp_jax.data.packing import FitBatches
from qsharp_jax.models import networks, transformer
from tests.test_transformer import FAMILIES, quick_jit, TINY
from tests.test_value import KINDS, shaken

ANSWERS = (1, 3, 4, 2, 1, 4, 3)  # number of answers by prompt
LONGEST = TINY.max_positions
DISTRIBUTION = categorical.make('categorical', 0.0, 1.0, num_atoms=3)


def random_rollouts():
    """Answers of one token and more to prompts of unequal lengths that begin alike, some further than all."""
    rng = np.random.default_rng(0)
    begin = rng.integers(0, TINY.vocab_size, 6)
    for example, count in enumerate(ANSWERS):
        rest = rng.integers(0, TINY.vocab_size, int(rng.integers(12)))
        prompt = np.concatenate([begin[:6 - example % 3], rest]).astype(np.int32)
        for sample in range(count):
            length = int(rng.integers(1, LONGEST - len(prompt)))
            answer = rng.integers(0, TINY.vocab_size, length).astype(np.int32)
            yield Rollout(1, example, sample, prompt, answer, int(rng.integers(length)), True, False)


ROLLOUTS = list(random_rollouts())
REWARDS = np.random.default_rng(1).integers(0, 2, len(ROLLOUTS)).astype(float)


@pytest.fixture(name='dataset', scope='module')
def dataset_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp('d')
    writer = DatasetWriter(folder)
    writer.write_shard(1, 0, ROLLOUTS, {})
    writer.write_labels(1, 0, 'reward', REWARDS)
    return AggregatedDataset(folder, 'reward', 1)


def loss_of_separate_rows(config, value_config, params):
    """The mean over each answer's tokens from the cut on, then over answers, without packing."""
    tokens = np.zeros((len(ROLLOUTS), LONGEST), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, rollout in enumerate(ROLLOUTS):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.answer)
        tokens[row, :end] = [*rollout.prompt, *rollout.answer]
        weights[row, start + rollout.cut:end] = 1 / (len(rollout.answer) - rollout.cut)
    index = np.tile(np.arange(LONGEST), (len(ROLLOUTS), 1))
    mask = transformer.causal_mask(LONGEST)[None]
    scores = networks.value_scores(config, value_config, params, tokens, index, mask, index - 1)
    rewards = jnp.asarray(np.tile(REWARDS[:, None], (1, LONGEST)), jnp.float32)
    return jnp.sum(weights * DISTRIBUTION.loss(scores, rewards)) / len(ROLLOUTS)


LAYOUTS = {
    'one long row': {'samples_per_row': 4, 'multiple': 512},
    'rows': {'samples_per_row': 2},
    'eight rows': {'samples_per_row': 1, 'rows_divisible_by': 8}}


@pytest.mark.parametrize('layout, kind, family', [
    *((layout, kind, 'llama') for layout in LAYOUTS for kind in KINDS),
    *(('one long row', 'v', family) for family in FAMILIES if family != 'llama')])
def test_loss_and_gradient_are_those_of_separate_rows(dataset, layout, kind, family):
    config = FAMILIES[family]
    value_config = dataclasses.replace(KINDS[kind], num_scores=3)
    params = shaken(value_config, config)
    batch = FitBatches(dataset, len(ROLLOUTS), seed=0, **LAYOUTS[layout]).batch(0)
    scores = fit.scores_fn(types.SimpleNamespace(value_shape=config, value_config=value_config))

    def packed(params):
        losses = DISTRIBUTION.loss(scores(params, batch), jnp.asarray(batch.rewards))
        return jnp.sum(batch.weights * losses) / batch.weights.sum()

    def separate(params):
        return loss_of_separate_rows(config, value_config, params)

    def close(one, other):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(other).max())))

    found, wanted = (quick_jit(jax.value_and_grad(loss))(params) for loss in (packed, separate))
    jax.tree.map(close, found, wanted)
