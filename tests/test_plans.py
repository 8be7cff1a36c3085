"""The runs that a table or figure needs: their configurations and order, what they take, what is done."""
from __future__ import annotations

import itertools
import json
from pathlib import Path
import shlex
import shutil
import sys
from typing import Any

import pytest

from qsharp_jax import checkpoint, cli, commands, config, estimates, plans, relabel, reproduce, results
from qsharp_jax.baselines import pretraining
from qsharp_jax.models import pretrained
from qsharp_jax.report import publish
from qsharp_jax.rewards import registry

pytestmark = pytest.mark.usefixtures('one_device')


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
             'selected': eta in (None, 0.1), 'scored_by': 1, 'seconds_per_answer': None}
            for method, iteration, eta, temperature in unguided + guided for split in ('validation', 'test')
            if split == 'validation' or eta != 0.3]
    one.workdir.mkdir(parents=True)

    def missing(left_out: dict[str, Any] | None) -> list[str]:
        (one.workdir / 'results.jsonl').write_text(''.join(
            json.dumps(row) + '\n' for row in rows if row is not left_out))
        return one.missing

    assert missing(None) == [] and one.status == 'done'
    for row in rows:
        assert missing(row) == [f'{row["method"]} {row["iteration"]}'] and one.status == 'to do'
    # A finished run may be given more learning rates.
    dpo = next(row for row in rows if row['method'] == 'dpo')
    dpo |= {'sweep': {'1e-05': 0.5, '0.001': 0.4}, 'learning_rate': 1e-5}
    assert missing(None) == ['dpo at 0.0001']
    dpo['sweep']['0.0001'] = 0.3
    assert missing(None) == []
    dpo |= {'sweep': {}, 'learning_rate': 0.5}  # one rate has no sweep
    assert missing(None) == ['dpo at 1e-05, 0.0001, 0.001']
    # Numbers of another configuration are not this one's.
    dpo |= {'sweep': {'1e-05': 0.5, '0.0001': 0.3, '0.001': 0.4}, 'learning_rate': 1e-5}
    (one.workdir / 'config.json').write_text(config.to_json(one.config))
    assert missing(None) == []
    other, = reproduce.planned('star_graph', 'tiny', tmp_path, [
        ('eval.every_eta', 'False'), ('eval.etas', '0.1,0.3'), ('seed', '1')])
    assert other.missing and other.status == 'there is another run in its place'
    assert 'seed was 0, now 1' in reproduce.describe([other])
    with pytest.raises(ValueError, match='star_graph: .* seed was 0, now 1.* elsewhere, with --root'):
        reproduce.run('star_graph', 'tiny', tmp_path, [('seed', '1')], execute=True)


def test_what_a_run_would_be_refused_for_is_said_before_others_take_their_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce.train, 'run', lambda *args, **keys: pytest.fail('it ran'))
    monkeypatch.setattr(reproduce, '_check', lambda one, check=reproduce._check: (
        check(one) if one.job.other_policy else None))
    with pytest.raises(ValueError, match='no file or folder .*nowhere'):
        reproduce.run('7', 'tiny', tmp_path, policy='nowhere/model', execute=True)


def test_methods_that_borrow_a_network_are_of_the_iterations_that_guide(tmp_path: Path) -> None:
    def asked(**keys: str) -> set[tuple[str, int]]:
        overrides = [('iterations', '2'), ('value.run', 'runs/a'), ('eval.methods', 'cd,qsharp'), *keys.items()]
        loaded = config.load(commands.from_here('configs/gsm8k.py:tiny'), overrides)
        one = reproduce.Planned(plans.Job('a', ''), tmp_path, loaded, overrides, None)
        return {(name, policy.iteration) for name, policy in one._evaluated(results.plan_of(loaded))}

    assert asked() == {('reference', 0), ('cd', 1), ('qsharp', 2)}
    assert asked(**{'eval.each_iteration': 'True'}) == {('reference', 0), ('cd', 2), ('qsharp', 2)}


def test_the_paper_s_q_type_starts_from_the_lm_head_and_is_not_clipped(tmp_path: Path) -> None:
    for size, expected in (('paper', ('lm_head', 0.0)), ('small', ('zero', 5.0))):
        found = [one.config for one in reproduce.planned('4', size, tmp_path) if one.config.value.type == 'q']
        assert found and all((one.value.head_init, one.fit.clip_norm) == expected for one in found)


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


def test_published_shapes_stand_for_models_that_are_not_here(tmp_path: Path) -> None:
    one, three, *_ = reproduce.planned('2', 'paper', tmp_path)
    bounds = [estimates.bounds(planned.config, planned.workdir, False) for planned in (one, three)]
    assert 3 * 4 * 0.9e9 < bounds[0].networks < 3 * 4 * 1.6e9 < 3 * 4 * 2.5e9 < bounds[1].networks < 3 * 4 * 4e9
    assert bounds[0].collected == 2 * 6748 * 16 and bounds[0].flops < bounds[1].flops


def test_a_plan_of_the_small_size_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained.sources, '_downloaded', None)  # calling it would fail
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
