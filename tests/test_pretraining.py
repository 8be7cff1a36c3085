"""Pre-training: its loss against a loop, its order of texts, and that it learns, resumes and refuses."""
from __future__ import annotations

from pathlib import Path
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import checkpoint, experiment, sharding
from qsharp_jax.baselines import pretraining
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import networks, transformer
from tests import tiny

SHAPE = transformer.TransformerConfig(
    vocab_size=7, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp_width=16, max_positions=16)


pytestmark = pytest.mark.usefixtures('one_device')


def trained(data: Path, workdir: Path, **changes: Any) -> tuple[Any, str]:
    config = tiny.config(data, **changes)
    tokenizer = pretraining.tokenizer_of(config)
    shape = pretraining.model_shape(config, tokenizer.vocab_size)
    return pretraining.load_or_train(config, shape, tokenizer, workdir, sharding.make_mesh())


def losses(workdir: Path) -> list[float]:
    return [row['loss'] for row in read_rows(workdir / 'metrics.jsonl')]


def test_the_loss_is_the_mean_over_weighted_tokens() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 7, (3, 5)).astype(np.int32)
    weights = np.array([[0, 1, 1, 1, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0]], np.float32)
    params = jax.tree.map(lambda leaf: 5 * leaf, transformer.init_params(jax.random.key(0), SHAPE))

    def loss(tokens: np.ndarray) -> float:
        return float(pretraining.next_token_loss(SHAPE, params, pretraining.Sequences(tokens, weights)))

    @jax.jit
    def logits_of(tokens: jax.Array) -> jax.Array:
        return networks.reference_logits(SHAPE, params, tokens, jnp.arange(5)[None], transformer.causal_mask(5))[0]

    total, count = 0.0, 0
    for row, weight in zip(tokens, weights):
        for place in range(1, 5):
            if weight[place]:
                before = np.where(np.arange(5) < place, row, 0)
                logits = logits_of(jnp.asarray(before[None]))[place - 1]
                total += float(jax.nn.logsumexp(logits) - logits[row[place]])
                count += 1
    assert count == 6
    assert loss(tokens) == pytest.approx(total / count, rel=1e-5)
    # Nothing predicts the first token, and nothing is predicted from padding.
    tokens[0, 4], tokens[2, 2:] = 6 - tokens[0, 4], 6 - tokens[2, 2:]
    assert loss(tokens) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize('batch,rows', [(4, 10), (10, 4), (5, 5)])
def test_every_epoch_has_every_text_once_in_its_own_order(batch: int, rows: int) -> None:
    steps = 3 * rows
    drawn = np.concatenate([pretraining.batch_rows(1, step, batch, rows) for step in range(steps)])
    epochs = drawn[:len(drawn) // rows * rows].reshape(-1, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert any(pretraining.batch_rows(2, 0, batch, rows) != drawn[:batch])


def test_the_loss_is_on_the_answer_or_on_all(data: Path) -> None:
    for loss in ('target', 'all'):
        config = tiny.config(data, reference__pretrain__loss=loss, reference__pretrain__random_arm_share=0)
        tokenizer = pretraining.tokenizer_of(config)
        corpus = pretraining.sequences(config, tokenizer, 19)
        assert corpus.tokens.shape == corpus.weights.shape == (64, 19)
        for tokens, weights in zip(corpus.tokens, corpus.weights):
            text = tokenizer.decode(tokens[:-1].tolist())
            assert tokens[-1] in tokenizer.eos_ids and text.count('=') == 1
            first = 1 if loss == 'all' else tokens.tolist().index(tokenizer.single_token('=')) + 1
            assert weights.tolist() == [0] * first + [1] * (19 - first)
    with pytest.raises(ValueError, match='has 19 tokens, and the reference 18 positions.* task.max_prompt_tokens'):
        pretraining.sequences(config, tokenizer, 18)


def test_it_learns_and_goes_on_from_a_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {'reference__pretrain__steps': 60, 'reference__pretrain__learning_rate': 0.02,
               'task__star_graph__pretrain_examples': 16, 'fit__checkpoint_every_steps': 20}
    params, digest = trained(data, tmp_path / 'straight', **changes)
    curve = losses(tmp_path / 'straight')
    assert len(curve) == 60
    # The logits of fresh parameters are about standard normal, over 13 tokens.
    assert curve[0] == pytest.approx(np.log(13) + 0.5, abs=0.1) and curve[-1] < 0.6 * curve[0]

    save = checkpoint.Checkpoints.save

    def stop(self: checkpoint.Checkpoints, step: int, state: Any, meta: Any) -> None:
        save(self, step, state, meta)
        if step == 40:
            raise KeyboardInterrupt

    workdir = tmp_path / 'stopped'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, 'save', stop)
        trained(data, workdir, **changes)
    again, same = trained(data, workdir, **changes)
    assert same == digest and losses(workdir) == curve
    jax.tree.map(np.testing.assert_array_equal, params, again)
    # What is on disk is read back rather than trained once more.
    before = (workdir / 'metrics.jsonl').stat().st_mtime_ns
    read, same = trained(data, workdir, **changes)
    assert same == digest and (workdir / 'metrics.jsonl').stat().st_mtime_ns == before
    jax.tree.map(np.testing.assert_array_equal, params, read)


def test_the_first_steps_may_be_on_smaller_graphs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {'reference__pretrain__steps': 5, 'reference__pretrain__curriculum_steps': 3,
               'reference__pretrain__curriculum_degree': 1, 'reference__pretrain__curriculum_path_length': 2,
               'task__star_graph__pretrain_examples': 16, 'fit__checkpoint_every_steps': 1}
    seen: list[np.ndarray] = []
    shard = sharding.shard_batch
    with monkeypatch.context() as patch:
        patch.setattr(sharding, 'shard_batch', lambda mesh, batch: (seen.append(batch.tokens), shard(mesh, batch))[1])
        params, digest = trained(data, tmp_path / 'both', **changes)
    # a b / a b = a b end, and then G(2, 3).
    assert [tokens.shape for tokens in seen] == [(16, 9)] * 3 + [(16, 19)] * 2
    assert all((one[:, :2] == one[:, 3:5]).all() and (one[:, :2] == one[:, 6:8]).all() for one in seen[:3])
    whole, other = trained(data, tmp_path / 'whole', **{**changes, 'reference__pretrain__curriculum_steps': 0})
    assert other != digest
    # What plays no part is no part of the recipe.
    _, same = trained(data, tmp_path / 'same', **{
        **changes, 'reference__pretrain__curriculum_steps': 0, 'reference__pretrain__curriculum_degree': 2})
    assert same == other
    assert float(max(np.abs(one - two).max() for one, two in zip(
        jax.tree.leaves(params), jax.tree.leaves(whole), strict=True))) > 0


def test_a_loss_that_is_no_number_stops_it_in_words(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='the loss of the pre-training is (nan|inf) at step .* lower .*learning_rate'):
        trained(data, tmp_path, reference__pretrain__learning_rate=1e30)


def test_a_task_without_a_corpus_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny.config(data, task__name='arithmetic', reward='arithmetic')
    with pytest.raises(ValueError, match="'pretrain' needs a task with a corpus .* 'arithmetic' has none"):
        experiment.outline(config, tmp_path)


def test_a_reference_is_taken_from_a_run_that_trained_it_just_so(data: Path, tmp_path: Path) -> None:
    changes = {'reference__pretrain__steps': 2, 'task__star_graph__pretrain_examples': 16}
    params, digest = trained(data, tmp_path / 'first', **changes)
    again, same = trained(data, tmp_path / 'second', reference__pretrain__run=str(tmp_path / 'first'), **changes)
    assert same == digest and not (tmp_path / 'second' / 'metrics.jsonl').exists()
    jax.tree.map(np.testing.assert_array_equal, params, again)
    shutil.rmtree(tmp_path / 'first')  # the second has one of its own
    trained(data, tmp_path / 'second', reference__pretrain__run=str(tmp_path / 'first'), **changes)
    with pytest.raises(ValueError, match='was trained otherwise: the keys of reference and task and the seed'):
        trained(data, tmp_path / 'third', **{**changes, 'reference__pretrain__run': str(tmp_path / 'second'),
                                             'reference__pretrain__learning_rate': 0.5})
    assert not (tmp_path / 'third' / 'checkpoints').exists()
    config = tiny.config(data, reference__pretrain__run=str(tmp_path / 'nowhere'))
    experiment.outline(config, tmp_path / 'second')
    with pytest.raises(ValueError, match='nowhere.*holds no finished reference: name the work directory of a run'):
        experiment.outline(config, tmp_path / 'fourth')
