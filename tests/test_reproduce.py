"""Runs of a table, planned, shared and resumed; and what such a run says of scores, of CD and of another policy."""
from __future__ import annotations

import functools
import json
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import (checkpoint, config, estimates, estimators, evaluate, experiment, ranking, reproduce, rollout,
                        train)
from qsharp_jax.data.dataset import Manifest
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import networks
from tests import tiny

# At such a rate a few steps guide so much that tokens change.
KEYS = {'eval__cd_network': 'own', 'eval__methods': 'cd,qsharp', 'eval__samples': 3, 'fit__learning_rate': 0.1,
        'guidance__candidates': 4}
TOLD_BY_JOBS = 'iterations', 'fit.tokens', 'value.type', 'value.head', 'eval.methods', 'eval.reward_model'


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def overrides(data: Path) -> list[tuple[str, str]]:
    """What makes the configuration of any job that of the tiny job."""
    keys = config.flatten(tiny.config(data, **KEYS))
    return [(key, str(value)) for key, value in keys.items() if key not in TOLD_BY_JOBS]


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def run(overrides: list[tuple[str, str]], root: Path) -> Path:
    """The workdir of the first run of table 4: two iterations, with a network of CD's own."""
    reproduce.run('4', 'tiny', root, overrides, only=('arithmetic',), execute=True)
    return root / 'tiny' / 'arithmetic'


@pytest.mark.slow
@pytest.mark.whole
def test_a_variant_takes_what_is_there_and_goes_on_where_it_stopped(
        run: Path, root: Path, overrides: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    ask = functools.partial(reproduce.run, '4', 'tiny', root, overrides, only=('arithmetic', 'arithmetic_single'))
    single = root / 'tiny' / 'arithmetic_single'
    text = ask()
    said = capsys.readouterr().out
    assert 'arithmetic: done' in said and 'arithmetic_single: to do' in said and '1 of 2 runs are done.' in said
    assert f'--relabel_from={run} --relabel_iterations=1' in said and 'FLOP: ' in said and 'GiB on disk' in said
    assert not single.exists() and text.count('missing') == 2 * 5 - 2

    asked = []
    answer = evaluate._answer
    monkeypatch.setattr(evaluate, '_answer', lambda experiment, prompts, policies, *rest: (
        asked.append(policies[0].method), answer(experiment, prompts, policies, *rest))[1])
    monkeypatch.setattr(rollout, 'RollingOut', refuse)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(train.fit, 'fit_iteration', refuse)
        ask(execute=True)
    capsys.readouterr()
    ask()
    assert 'arithmetic_single: stopped in or after "fit 1"' in capsys.readouterr().out
    text = ask(execute=True)
    # Neither roll-outs nor the reference's answers are made again, and what is done is not run.
    assert set(asked) == {'qsharp'}
    assert {shard.iteration for shard in Manifest(single / 'dataset').upto(9)} == {1}
    assert text.count('missing') == 2 * 5 - 3 and 'single prefix' in text
    assert (root / 'tiny' / 'tables' / 'table_4.tex').exists()
    own, other = ([row for row in read_rows(path / 'results.jsonl') if row['method'] == 'reference']
                  for path in (run, single))
    assert [(row['pass@1'], row['kl']) for row in own] == [(row['pass@1'], row['kl']) for row in other]
    monkeypatch.setattr(train, 'run', refuse)
    assert ask(execute=True) == text
    assert '2 of 2 runs are done.' in capsys.readouterr().out


def refuse(*arguments: object, **keywords: object) -> None:
    raise AssertionError('asked')


def answers(run: Path, split: str = 'test') -> list[evaluate.Row]:
    return [row for path in sorted((run / 'samples' / split).rglob('*.jsonl')) for row in read_rows(path)]


@pytest.mark.whole
def test_a_run_takes_no_more_than_was_said(run: Path, root: Path, overrides: list[tuple[str, str]]) -> None:
    planned, = reproduce.planned('4', 'tiny', root, overrides, only=('arithmetic',))
    most = estimates.bounds(planned.config, planned.workdir, False)
    rows = read_rows(run / 'results.jsonl')
    shards = Manifest(run / 'dataset').upto(2)
    assert most.collected == sum(shard.n for shard in shards)
    assert most.evaluated == sum(row['n_examples'] * row['n_samples'] for row in rows)
    decoded = sum(row['flops_per_answer'] * row['n_examples'] * row['n_samples'] for row in rows)
    assert decoded < most.flops < 1000 * decoded
    parts, _, values = train.open_run(run)
    assert most.networks == 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(values))  # of two iterations, and CD's
    shared = estimates.bounds(planned.config, planned.workdir, True)
    assert shared.collected == sum(shard.n for shard in shards if shard.iteration == 2)
    assert shared.evaluated == most.evaluated - sum(
        row['n_examples'] * row['n_samples'] for row in rows if row['method'] == 'reference')
    assert shared.flops < most.flops and shared.disk < most.disk
    rate = estimates.measured_rate([run, root])
    assert rate is not None and rate > 0 and estimates.measured_rate([root]) is None
    assert estimates.seconds_taken(run) > 0


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
    assert len(known) > 5
    np.testing.assert_allclose(*zip(*known), atol=1e-5)
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_allclose(
        ranking.end_values(parts, iteration, values, prompts, [rows[i] for i in order]), found[order], atol=1e-5)


@pytest.mark.whole
def test_rows_say_what_scores_choose_and_which_have_none(run: Path) -> None:
    rows = read_rows(run / 'results.jsonl')
    scored = {(row['method'], row['iteration'], row['eta'], row['temperature']) for row in rows
              if row['best_of_k'] is not None}
    chosen = {row['method']: (row['iteration'], row['eta']) for row in rows
              if row['selected'] and row['split'] == 'test'}
    assert chosen['reference'] == (0, None)
    marked = [(row['method'], row['iteration'], row['split']) for row in rows if row['selected']]
    assert len(marked) == len(set(marked)) == 2 * 4  # one eta of each network, one temperature of the reference
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
    data = {name: checkpoint.load_meta(run / 'checkpoints' / name)['dataset']
            for name in ('cd_1', 'value_1', 'value_2')}
    assert data['cd_1'] == data['value_1'] != data['value_2'] and not (run / 'checkpoints' / 'cd_2').exists()
    parts, _, values = train.open_run(run, 1)
    assert parts.distribution.kind == 'bernoulli' and parts.for_cd.distribution.kind == 'mse'
    own, _ = checkpoint.restore_params(parts.for_cd.value_dir(1), parts.for_cd.value_target)
    assert 0 < float(jnp.abs(own['head']['kernel'] - values['head']['kernel']).max())
    # It is fitted by squared error, which for rewards of 0 and 1 is at most 1.
    losses = [row['loss'] for row in read_rows(run / 'metrics.jsonl') if row['stage'] == 'fit_cd_1' and 'loss' in row]
    assert losses[0] == pytest.approx(0.25) and max(losses) <= 1
    quality = json.loads((run / 'calibration' / 'iteration_2.json').read_text())
    for weights in quality['weights']:
        assert [part['position'] for part in weights['by_position']] == [
            part['position'] for part in quality['by_position']]
    # VAS reads the same network; what it adds to a candidate is its height above the average.
    how = parts.for_cd.guidance('vas')
    assert (how.offset, how.outside, how.value) == ('cd', 'average', parts.for_cd.value)


@pytest.mark.slow
@pytest.mark.whole
def test_cd_may_have_all_data_that_q_sharp_has(run: Path, tmp_path: Path, overrides: list[tuple[str, str]]) -> None:
    root = tmp_path / 'more'
    shutil.copytree(run, root / 'tiny' / 'arithmetic')
    every = [*overrides, ('eval.each_iteration', 'True')]
    planned, = reproduce.planned('4', 'tiny', root, every, only=('arithmetic',))
    assert planned.missing == ['cd 2']
    reproduce.run('4', 'tiny', root, every, only=('arithmetic',), execute=True)
    assert not planned.missing
    data = {name: checkpoint.load_meta(planned.workdir / 'checkpoints' / name)['dataset']
            for name in ('cd_1', 'cd_2', 'value_1', 'value_2')}
    assert data['cd_2'] == data['value_2'] != data['cd_1'] == data['value_1']
    most = estimates.bounds(planned.config, planned.workdir, False)
    rows = read_rows(planned.workdir / 'results.jsonl')
    assert most.evaluated == sum(row['n_examples'] * row['n_samples'] for row in rows)
    _, _, values = train.open_run(planned.workdir)
    assert most.networks == 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(values))
    # One network after the other: both were compared, the later with the earlier.
    chosen = {row['iteration']: row for row in rows
              if (row['method'], row['split'], row['selected']) == ('cd', 'test', True)}
    assert set(chosen) == {1, 2} and 'difference_to_previous' in chosen[2]


@pytest.mark.whole
@pytest.mark.filterwarnings('ignore:the value network was fitted with')
def test_a_value_network_guides_another_policy(run: Path, data: Path, tmp_path: Path) -> None:
    keys = {**KEYS, 'value__run': run}
    workdir = tmp_path / 'other'
    # Another reference of the same tokenizer: one that was trained longer.
    train.run(tiny.config(data, reference__pretrain__steps=12, **keys), workdir)
    rows = read_rows(workdir / 'results.jsonl')
    assert {(row['method'], row['iteration']) for row in rows} == {('reference', 0), ('cd', 1), ('qsharp', 2)}
    assert not (workdir / 'dataset').exists() and not list((workdir / 'checkpoints').glob('[vc]*_*'))
    kl = {(row['method'], row['eta'], row['temperature']): row['kl'] for row in rows if row['split'] == 'test'}
    assert len({kl['reference', None, 1.0], kl['qsharp', 0.5, 1.0], kl['qsharp', 0.1, 1.0]}) == 3  # it guides
    assert any(row['scored_by'] == 2 for row in rows)
    assert answers(workdir) != answers(run)
    compared = {row['method']: row for row in rows if 'kl_to_first_reference' in row}
    assert set(compared) == {'reference', 'cd', 'qsharp'}
    assert all(row['selected'] and row['split'] == 'test' and row['scored_by'] for row in compared.values())
    first, other = (experiment.load(experiment.outline(config.from_json((path / 'config.json').read_text()), path))
                    for path in (run, workdir))
    own = [row for row in answers(workdir) if (row['method'], row['temperature']) == ('reference', 1.0)]
    prompts = first.prompts('test')
    place = {int(example): index for index, example in enumerate(prompts.ids)}

    def log_prob(parts: experiment.Experiment, row: evaluate.Row) -> float:
        text = jnp.asarray([[*prompts.tokens[place[row['id']]], *row['tokens']]])
        each = jax.nn.log_softmax(networks.text_logits(parts.reference_config, parts.reference_params, text))[0]
        return float(sum(each[place - 1, text[0, place]] for place in range(text.shape[1])[-len(row['tokens']):]))

    # Unguided, it is as far from itself as its sampler's top-k takes it.
    ratio = np.mean([log_prob(other, row) - log_prob(first, row) for row in own])
    row = compared['reference']
    assert row['kl_to_first_reference'] == pytest.approx(row['kl'] + ratio, abs=1e-5) and abs(ratio) > 0.1
    # The same policy is as far from the first reference as from itself.
    train.run(tiny.config(data, **keys), tmp_path / 'same')
    assert all(row['kl_to_first_reference'] == row['kl'] for row in read_rows(tmp_path / 'same' / 'results.jsonl')
               if row['selected'] and row['split'] == 'test')
    assert not (tmp_path / 'same' / 'samples' / 'first_reference').exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match='reads another tokenizer'):
        patch.setattr(train.checkpoint, 'load_meta', lambda directory: {'tokenizer': 'another'})
        train.run(tiny.config(data, reference__pretrain__steps=12, **keys), workdir)
    with pytest.raises(ValueError, match='holds no finished value network'):
        train.run(tiny.config(data, **{**keys, 'value__run': tmp_path}), tmp_path / 'none')
