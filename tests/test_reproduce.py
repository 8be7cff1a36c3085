"""Runs of a table, planned, shared and resumed; and what such a run says of scores, of CD and of another policy."""
from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
import shlex
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import (checkpoint, cli, config, estimates, estimators, evaluate, plans, ranking, relabel, reproduce,
                        rollout, train)
from qsharp_jax.baselines import pretraining
from qsharp_jax.data.dataset import Manifest
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import networks, pretrained
from qsharp_jax.report import publish
from qsharp_jax.rewards import registry
from tests import tiny

# At such a rate a few steps guide so much that tokens change.
KEYS = {'eval__cd_network': 'own', 'eval__methods': 'cd,qsharp', 'eval__samples': 3, 'fit__learning_rate': 0.1,
        'guidance__candidates': 4}
TOLD_BY_JOBS = 'iterations', 'fit.tokens', 'value.type', 'value.head', 'eval.methods', 'eval.reward_model'

Row = dict[str, Any]


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


@pytest.mark.parametrize('table, size', list(itertools.product(plans.NAMES, plans.SIZES)))
def test_every_plan_has_configurations_and_an_order(table: str, size: str, tmp_path: Path) -> None:
    found = reproduce.planned(table, size, tmp_path, policy='other')
    names = [one.job.name for one in found]
    assert len(set(names)) == len(names)
    for number, one in enumerate(found):
        before = {one.job.shares, one.job.reference, one.job.guided_by} - {''}
        assert before <= set(names[:number])  # those come first
        spec, given, others = cli.split_arguments(shlex.split(one.command)[2:])
        assert spec is not None and config.to_json(config.load(spec, given)) == config.to_json(one.config)
        assert one.status == 'to do'
        if one.job.shares:
            base = found[names.index(one.job.shares)].config
            assert config.to_json(base) != config.to_json(one.config)
            assert relabel.drawn_otherwise(base, one.config) == []
    if size == 'paper':
        # Each model that the table names is in its plan.
        sources = ' '.join(one.config.reference.source.lower() for one in found)
        columns = publish.paper.TABLES[table].columns if table in publish.paper.TABLES else ()
        assert all(publish.paper.MODELS[column.reference] in sources for column in columns)


def test_runs_of_fewer_graphs_have_the_reference_of_the_run_before_them(tmp_path: Path) -> None:
    found = {one.job.name: one for one in reproduce.planned('star_graph', 'small', tmp_path)}
    whole, few = found['star_graph'], found['star_graph_of_300']
    assert few.config.reference.pretrain.run == str(whole.workdir)
    keys = [config.flatten(one.config) for one in (whole, few)]
    trained = [{key: value for key, value in one.items() if key.split('.')[0] in ('seed', 'task', 'reference')}
               for one in keys]
    assert {key for key in trained[0] if trained[0][key] != trained[1][key]} == {'reference.pretrain.run'}
    assert (few.config.collect.examples, few.config.baselines.methods) == (300, ())
    # Alone, with no such run there, it trains its own; a run that was stopped goes on with either.
    alone, = reproduce.planned('star_graph', 'small', tmp_path, only=[few.job.name])
    assert alone.config.reference.pretrain.run == ''
    config.check_resume(alone.config, few.config)
    pretraining.finished(whole.workdir).mkdir(parents=True)
    (pretraining.finished(whole.workdir) / checkpoint.VALUE_FILE).write_text('')
    again, = reproduce.planned('star_graph', 'small', tmp_path, only=[few.job.name])
    assert again.command == few.command


def test_a_run_is_done_when_each_of_its_methods_has_its_rows(tmp_path: Path) -> None:
    one, = reproduce.planned('star_graph', 'tiny', tmp_path, [('eval.every_eta', 'False'), ('eval.etas', '0.1,0.3')])
    unguided = [('reference', 0, None, temperature) for temperature in (1.0, 0.7, 0.5, 0.0)] + [
        (method, 0, None, 1.0) for method in ('reinforce', 'reinforce_greedy', 'grpo', 'dpo', 'rpo')]
    guided = [(method + ending, 1, eta, 1.0) for method in ('cd', 'qsharp', 'fudge') for ending in ('', '_pairs')
              for eta in (0.1, 0.3) if not (method == 'fudge' and eta == 0.3)]
    # On the reported split, of several eta the chosen one only.
    rows = [{'method': method, 'iteration': iteration, 'eta': eta, 'temperature': temperature, 'split': split,
             'selected': eta in (None, 0.1), 'scored_by': 1}
            for method, iteration, eta, temperature in unguided + guided for split in ('validation', 'test')
            if split == 'validation' or eta != 0.3]
    one.workdir.mkdir(parents=True)

    def missing(left_out: Row | None) -> list[str]:
        (one.workdir / 'results.jsonl').write_text(''.join(
            json.dumps(row) + '\n' for row in rows if row is not left_out))
        return one.missing

    assert missing(None) == [] and one.status == 'done'
    for row in rows:
        assert missing(row) == [f'{row["method"]} {row["iteration"]}'] and one.status == 'to do'


@pytest.mark.parametrize('arguments, words', [
    (('8', 'small'), "--table is '8'; it must be one of 1, 2"),
    (('1', 'huge'), "--size is 'huge'; it must be one of tiny, small, paper"),
    (('7', 'small'), 'name its checkpoint with --policy'),
    (('4', 'small', [('fit.tokens', 'all')]), 'arithmetic_single has a value of its own'),
    (('1', 'paper', [('reference.source', 'mine')]), 'config.reference.source is not the same for all runs'),
    (('1', 'small', [('etaa', '1')]), 'there is no config.etaa'),
    (('1', 'small', [], '', ('math',)), '--jobs names math; table 1 at size small has gsm8k'),
    (('star_graph', 'small', [], '', ('math',)), 'the figure star_graph at size small has star_graph, star_graph_5_5'),
])
def test_what_cannot_be_planned_is_refused(arguments: tuple[Any, ...], words: str, tmp_path: Path) -> None:
    table, size, *rest = arguments
    with pytest.raises(ValueError) as caught:
        reproduce.planned(table, size, tmp_path, *rest)
    assert words in str(caught.value)


def test_a_model_of_ones_own_may_stand_for_one_of_the_plan(tmp_path: Path) -> None:
    found = reproduce.planned('1', 'paper', tmp_path, [('reference.source', 'mine')], only=('gsm8k_llama3.1_8b',))
    assert [one.config.reference.source for one in found] == ['mine']
    found = reproduce.planned('7', 'small', tmp_path, [('reference.source', 'mine')], policy='ppo')
    assert [one.config.reference.source for one in found] == ['mine', 'ppo']
    assert found[1].config.value.run == str(tmp_path / 'small' / 'gsm8k')


def test_a_run_of_the_paper_has_the_mesh_of_its_models_unless_another_is_given(tmp_path: Path) -> None:
    for table in ('1', '2', '3', '4', '5', '6', '7', 'fig3'):
        for one in reproduce.planned(table, 'paper', tmp_path, policy='hf:mine/7B'):
            # Of the pairs that docs/scaling.md has.
            chips = 4 if 'qwen' in one.config.value.source.lower() else 8
            assert dict(one.config.mesh) == {'data': 1, 'fsdp': 1, 'tensor': chips}
            parts = 16 if table == '6' else 8 if chips == 4 else 4
            assert one.config.fit.accumulate == parts and one.config.value.scan_layers
            # Every answer may be as long as it is allowed to be after the longest prompt.
            known = estimates._known(one.config)
            positions = [json.loads(Path(path).read_text())['max_position_embeddings'] for path in known.values()]
            longest = one.config.task.max_prompt_tokens + 2 * one.config.sampling.max_new_tokens
            assert positions and longest <= min(positions), one.job.name
    given = [('mesh.tensor', '2'), ('mesh.data', '4')]
    one, = reproduce.planned('1', 'paper', tmp_path, given, only=('math_llama3_8b',))
    assert dict(one.config.mesh) == {'data': 4, 'fsdp': 1, 'tensor': 2} and one.config.value.scan_layers
    assert not any(one.job.suits for one in reproduce.planned('4', 'small', tmp_path))


def test_what_the_papers_star_graphs_take_is_told_without_their_models(tmp_path: Path) -> None:
    text = reproduce.describe(reproduce.planned('star_graph', 'paper', tmp_path))
    flops = [float(line.split()[2]) for line in text.splitlines() if 'FLOP' in line]
    assert len(flops) == 3 and flops[0] < flops[1] < flops[2] and 'not known' not in text
    # Other models of the name are of other shapes.
    other = reproduce.planned('star_graph', 'paper', tmp_path, [('reference.pretrain.start', 'hf:mine/gpt2-xl')],
                              only=['star_graph'])
    assert "'hf:mine/gpt2-xl' cannot be downloaded" in reproduce.describe(other)


def test_a_plan_says_what_is_free_on_the_disk_while_something_is_left(tmp_path: Path) -> None:
    text = reproduce.describe(reproduce.planned('4', 'tiny', tmp_path / 'not' / 'there', only=('arithmetic',)))
    free = [line for line in text.splitlines() if line.startswith('free on disk where they are kept: ')]
    assert float(free[0].split()[-2].replace(',', '')) == pytest.approx(
        shutil.disk_usage(tmp_path).free / 2 ** 30, rel=0.2)


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


def test_published_shapes_stand_for_models_that_are_not_here(tmp_path: Path) -> None:
    one, three, *_ = reproduce.planned('2', 'paper', tmp_path)
    bounds = [estimates.bounds(planned.config, planned.workdir, False) for planned in (one, three)]
    assert 3 * 4 * 0.9e9 < bounds[0].networks < 3 * 4 * 1.6e9 < 3 * 4 * 2.5e9 < bounds[1].networks < 3 * 4 * 4e9
    assert bounds[0].collected == 2 * 6748 * 16 and bounds[0].flops < bounds[1].flops


def test_a_plan_of_the_small_size_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.sources, '_downloaded', refuse)
    one, = reproduce.planned('1', 'small', tmp_path)
    said = estimates.of_run(one.config, one.workdir, None, False)
    assert said[0].startswith('at most 4,800 answers to collect') and len(said) == 3


def test_what_keeps_a_run_from_being_estimated_is_called_by_its_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**keys: str) -> str:
        one, = reproduce.planned('1', 'tiny', tmp_path, [(key.replace('__', '.'), text) for key, text in keys.items()])
        return estimates.of_run(one.config, one.workdir, None, False)[0]

    assert said(reference__source='nowhere').startswith(
        "what it takes is not known before its models are here: There is no file or folder 'nowhere'")
    assert said(fit__frozen_layers='9').startswith('it would not run as things are here: fit.frozen_layers is 9')
    monkeypatch.setitem(sys.modules, 'math_verify', None)
    monkeypatch.delitem(sys.modules, 'qsharp_jax.rewards.mathematics', raising=False)
    monkeypatch.delitem(registry._REGISTRY, 'math', raising=False)
    assert said().startswith("it would not run as things are here: reward 'math' needs the package math_verify")


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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match='reads another tokenizer'):
        patch.setattr(train.checkpoint, 'load_meta', lambda directory: {'tokenizer': 'another'})
        train.run(tiny.config(data, reference__pretrain__steps=12, **keys), workdir)
    with pytest.raises(ValueError, match='holds no finished value network'):
        train.run(tiny.config(data, **{**keys, 'value__run': tmp_path}), tmp_path / 'none')
