"""The value network as reward model, CD's own network, and another policy that is guided: a whole tiny run."""
from __future__ import annotations

from collections.abc import Iterator
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import checkpoint, estimators, evaluate, ranking, train
from qsharp_jax.data.dataset import Manifest
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import networks
from tests import tiny

KEYS = {'eval__cd_network': 'own', 'eval__methods': 'qsharp,cd', 'value__head': 'categorical', 'eval__samples': 3,
        'value__num_atoms': 3, 'fit__learning_rate': 0.1, 'guidance__candidates': 4}


@pytest.fixture(scope='module', autouse=True)
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.devices(1), tiny.compiled_once(tmp_path_factory.mktemp('compiled')):
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of two iterations with a network of CD's own."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    train.run(tiny.config(data, **KEYS), workdir)
    return workdir


def answers(run: Path, split: str = 'test') -> list[evaluate.Row]:
    return [row for path in sorted((run / 'samples' / split).rglob('*.jsonl')) for row in read_rows(path)]


@pytest.mark.whole
def test_scores_are_the_network_s_value_of_each_last_token(run: Path) -> None:
    parts, iteration, values = train.open_run(run)
    prompts = parts.prompts('test')
    rows = answers(run)
    assert iteration == 2 and len({len(row['tokens']) for row in rows}) > 1
    assert {row['truncated'] for row in rows} == {True, False}
    found = ranking.end_values(parts, iteration, values, prompts, rows)
    place = {int(example): index for index, example in enumerate(prompts.ids)}

    width = max(map(len, prompts.tokens)) + 8

    @jax.jit
    def read(tokens: jax.Array) -> jax.Array:
        index = jnp.arange(width)[None]
        scores = networks.value_scores(parts.value_shape, parts.value_config, values, tokens, index,
                                       (index[:, None] <= index[..., None]), jnp.maximum(index - 1, 0))
        return parts.distribution.mean(scores)[0]

    for row, score in zip(rows[::5], found[::5], strict=True):  # one by one, without packing
        sequence = [*prompts.tokens[place[row['id']]], *row['tokens']]
        alone = read(jnp.asarray([sequence + [0] * (width - len(sequence))]))
        assert score == pytest.approx(float(alone[len(sequence) - 1]), abs=1e-5)
    # What was written down while the same network guided is the same value.
    known = [(row['values'][-1], score) for row, score in zip(rows, found, strict=True)
             if row['iteration'] == 2 and row['method'] == 'qsharp' and row['values'][-1] is not None]
    assert len(known) > 10
    np.testing.assert_allclose(*zip(*known), atol=1e-5)
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_allclose(
        ranking.end_values(parts, iteration, values, prompts, [rows[i] for i in order]), found[order], atol=1e-5)


@pytest.mark.whole
def test_rows_say_what_scores_choose_and_which_have_none(run: Path) -> None:
    rows = read_rows(run / 'results.jsonl')
    scored = {(row['method'], row['iteration'], row['eta'], row['temperature']) for row in rows
              if row['best_of_k'] is not None}
    chosen = {row['method']: (row['iteration'], row['eta']) for row in rows if row['selected'] and row['split'] == 'test'}
    assert chosen['reference'] == (0, None)
    assert scored == {(method, iteration, eta, 1.0) for method, (iteration, eta) in chosen.items()}
    assert {row['method'] for row in rows} == {'reference', 'cd', 'qsharp'}
    for row in rows:
        has = row['split'] == 'test' and (row['method'], row['iteration'], row['eta'], row['temperature']) in scored
        assert row['scored_by'] == (2 if has else None)
        assert (row['weighted_maj@k'] is None) == (row['weighted_maj@k_se'] is None) == (not has)
        assert 0 <= (row['best_of_k'] or 0) <= 1
        if row['method'] == 'reference':
            assert 'difference_to_reference' not in row and 'difference_to_cd' not in row
        else:
            assert row['difference_to_reference_low'] <= row['difference_to_reference'] <= (
                row['difference_to_reference_high'])
            assert ('difference_to_cd' in row) == ((row['method'], row['eta']) != ('cd', chosen['cd'][1]))


@pytest.mark.whole
def test_intervals_and_choices_are_those_of_the_answers(run: Path) -> None:
    rows = [row for row in read_rows(run / 'results.jsonl') if row['split'] == 'test' and row['selected']]
    tables = {row['method']: evaluate.by_example(
        [one for one in answers(run) if (one['method'], one['iteration'], one['temperature']) == (
            row['method'], row['iteration'], row['temperature']) and (row['eta'] in (None, one['eta']))], 0.0)
        for row in rows if row['iteration'] in (0, 2 if row['method'] == 'qsharp' else 1)}
    row = next(row for row in rows if row['method'] == 'qsharp' and row['iteration'] == 2)
    for other in ('reference', 'cd'):
        mean, _ = estimators.paired_difference(tables['qsharp']['reward'], tables[other]['reward'])
        low, high = estimators.bootstrap_interval(tables['qsharp']['reward'], tables[other]['reward'], '0 test')
        assert row[f'difference_to_{other}'] == pytest.approx(mean)
        assert (row[f'difference_to_{other}_low'], row[f'difference_to_{other}_high']) == pytest.approx((low, high))


@pytest.mark.whole
def test_cd_has_a_network_of_its_own_of_the_reference_s_answers(run: Path) -> None:
    meta = checkpoint.load_meta(run / 'checkpoints' / 'cd_1')
    assert meta['dataset'] != checkpoint.load_meta(run / 'checkpoints' / 'value_1')['dataset'] or meta['iteration'] == 1
    assert meta['dataset'] != checkpoint.load_meta(run / 'checkpoints' / 'value_2')['dataset']
    assert not (run / 'checkpoints' / 'cd_2').exists()
    parts, _, _ = train.open_run(run, 1)
    assert parts.distribution.kind == 'categorical' and parts.for_cd.distribution.kind == 'mse'
    own, _ = checkpoint.restore_params(parts.for_cd.value_dir(1), parts.for_cd.value_target)
    assert own['head']['kernel'].shape[0] == 1 and parts.value_config.num_scores == 3
    # It was fitted: the mean squared error of the first step is not that of the last.
    losses = [row['loss'] for row in read_rows(run / 'metrics.jsonl') if row['stage'] == 'fit_cd_1' and 'loss' in row]
    assert losses and losses[-1] < losses[0]
    assert Manifest(run / 'dataset').upto(1)
    quality = json.loads((run / 'calibration' / 'iteration_2.json').read_text())
    for weights in quality['weights']:
        assert [part['position'] for part in weights['by_position']] == [
            part['position'] for part in quality['by_position']]
    # The same command does nothing again, and another sweep of CD needs no other fit.
    train.evaluate_checkpoint(run, [0.7], 'validation', 1, ['vas'], examples=0, samples=0)
    new = [row for row in read_rows(run / 'results.jsonl') if row['eta'] == 0.7]
    assert {row['method'] for row in new} == {'vas'} and all(math.isfinite(row['kl']) for row in new)


@pytest.mark.whole
@pytest.mark.filterwarnings('ignore:the value network was fitted with')
def test_a_value_network_guides_another_policy(run: Path, data: Path, tmp_path: Path) -> None:
    keys = {**KEYS, 'eval__methods': 'qsharp', 'eval__cd_network': 'shared', 'value__run': run}
    workdir = tmp_path / 'other'
    # Another reference of the same tokenizer: one that was trained longer.
    train.run(tiny.config(data, reference__pretrain__steps=12, **keys), workdir)
    rows = read_rows(workdir / 'results.jsonl')
    assert {(row['method'], row['iteration']) for row in rows} == {('reference', 0), ('qsharp', 2)}
    assert not (workdir / 'dataset').exists() and not list((workdir / 'checkpoints').glob('value_*'))
    kl = {(row['method'], row['eta'], row['temperature']): row['kl'] for row in rows if row['split'] == 'test'}
    assert len({kl['reference', None, 1.0], kl['qsharp', 0.5, 1.0], kl['qsharp', 0.1, 1.0]}) == 3  # it guides
    assert any(row['scored_by'] == 2 for row in rows)
    assert answers(workdir) != answers(run)
    with pytest.raises(ValueError, match="reads another tokenizer"):
        train.run(tiny.config(data, task__star_graph__num_nodes=9, **keys), tmp_path / 'nodes')
    with pytest.raises(ValueError, match='holds no finished value network'):
        train.run(tiny.config(data, **{**keys, 'value__run': tmp_path}), tmp_path / 'none')
    with pytest.raises(ValueError, match='nothing is fitted where the network of another run guides'):
        tiny.config(data, **{**KEYS, 'value__run': run})
