"""The optimum that a run with a real-valued reward is compared with."""
from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import evaluate, experiment
from qsharp_jax.evaluate import Evaluated
from tests import real_valued, tiny


@pytest.mark.whole
def test_the_language_of_a_run_is_what_its_reference_writes(tmp_path: Path) -> None:
    with tiny.devices(1):
        config = tiny.config(
            tmp_path / 'data', reward='star_graph_progress', value__head='categorical', value__v_min=-1.5,
            value__v_max=2.0, value__num_atoms=8, sampling__max_new_tokens=3, sampling__top_k=0, eval__split='train',
            task__star_graph__num_nodes=6, guidance__candidates=4)
        parts = experiment.load(experiment.outline(config, tmp_path / 'run'))
        tree = real_valued.language(parts, 2)
        assert tree.vocab_size == 10 and tree.rewards.shape == (2, 1 + 10 + 100 + 1000)

        # One token at a time, as the decoder feeds them.
        prompts = parts.prompts('train')
        for row, answer in ((0, ()), (0, (3,)), (1, (5, 6)), (1, (6, 1))):
            cache = parts.reference.init_cache(1, 32)
            for place, token in enumerate([*prompts.tokens[row], *answer]):
                logits, cache = parts.reference.step(
                    parts.reference_params, jnp.array([token]), jnp.array([place]), cache)
            np.testing.assert_allclose(tree.logits[row, tree.node(answer)], logits[0], rtol=1e-4, atol=1e-4)

        # What is drawn earns what the law of the answers says.
        policy = tree.reference()
        law = tree.answer_law(policy)
        np.testing.assert_allclose(law.sum(-1), 1, rtol=1e-9)
        drawn = evaluate.samples_of(parts, prompts, np.arange(2), [Evaluated('reference', 0, np.inf, 1.0)], None,
                                    'train', 512, 128, 2)
        for row, expected in enumerate(tree.values(policy)[:, 0]):
            earned = np.array([one['reward'] for one in drawn if one['id'] == prompts.ids[row]])
            assert len(earned) == 512 and len(set(earned)) > 2
            assert abs(earned.mean() - expected) < 4 * earned.std() / 512 ** 0.5
        nodes = [tree.node(one['tokens']) for one in drawn if one['id'] == prompts.ids[0]]
        assert all(tree.ends[node] for node in nodes)
        np.testing.assert_allclose(
            tree.rewards[0, nodes], [one['reward'] for one in drawn if one['id'] == prompts.ids[0]])
