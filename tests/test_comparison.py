"""The paper's tables with runs beside them, on results written by hand."""
from __future__ import annotations

import json
from pathlib import Path
import shlex
import subprocess
from typing import Any

import pytest

from experiments import tables as entry
from qsharp_jax import cli, commands, config, metrics, reproduce
from qsharp_jax.report import comparison, paper, publish
from qsharp_jax.report.comparison import Possible

ROOT = Path(__file__).resolve().parents[1]
SMALL = str(ROOT / 'configs' / 'gsm8k.py') + ':small'
PAPER = str(ROOT / 'configs' / 'math.py') + ':paper'
ARITHMETIC = str(ROOT / 'configs' / 'arithmetic.py') + ':small'

Row = dict[str, Any]


def result(method: str, iteration: int, eta: float | None, value: float, **changes: Any) -> Row:
    row: Row = {
        'method': method, 'iteration': iteration, 'eta': eta, 'temperature': 1.0, 'split': 'test', 'pass@1': value,
        'pass@1_se': 0.02, 'pass@k': 0.9, 'k': 4, 'maj@k': value + 0.1, 'maj@k_se': 0.03, 'kl': 10 * value,
        'kl_se': 0.1, 'kl_per_token': 0.1, 'best_of_k': None, 'best_of_k_se': None, 'weighted_maj@k': None,
        'weighted_maj@k_se': None, 'truncated': 0.0, 'n_examples': 50, 'n_samples': 4, 'seconds': 1.0,
        'commit': 'abc', 'devices': 1, 'selected': True}
    return {**row, **changes}


def make(directory: Path, spec: str, rows: list[Row], **keys: Any) -> Path:
    directory.mkdir(parents=True)
    loaded = config.load(spec, [(key.replace('__', '.'), str(text)) for key, text in keys.items()])
    (directory / 'config.json').write_text(config.to_json(loaded))
    metrics.ResultsFile(directory / 'results.jsonl').add(rows)
    (directory / 'timings.json').write_text(json.dumps({'collect 1': 3600.0, 'fit 1': 4000.0}))
    return directory


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make(tmp_path / 'small', SMALL, [
        result('reference', 0, None, 0.3), result('reference', 0, None, 0.4, temperature=0.0, selected=False),
        result('cd', 1, 0.5, 0.35), result('qsharp', 1, 0.1, 0.36), result('qsharp', 2, 0.05, 0.9, selected=False),
        result('qsharp', 2, 0.2, 0.42, best_of_k=0.5, best_of_k_se=0.04),
        *(result('qsharp', 2, eta, 0.1 / eta, split='validation', selected=eta == 0.2, commit='def')
          for eta in (0.2, 0.5))])


def test_a_small_run_stands_in_the_first_place_and_says_what_differs(small: Path) -> None:
    table = paper.TABLES['1']
    found = comparison.cells(table, comparison.read([small]))
    assert len(found) == 4 * (2 + 3 + 3)
    ours = {(cell.policy, cell.metric): cell for cell in found if cell.ours is not None}
    assert {cell.setting for cell in ours.values()} == {'GSM8K, Llama 3 8B with Llama 3.2 1B'}
    # The last iteration at the chosen eta, the reference at its own temperature.
    assert {key: cell.ours for key, cell in ours.items()} == pytest.approx({
        ('reference', 'pass@1, %'): 30, ('reference', 'maj@4, %'): 40,
        ('CD', 'pass@1, %'): 35, ('CD', 'maj@4, %'): 45, ('CD', 'KL, nats'): 3.5,
        ('Q♯', 'pass@1, %'): 42, ('Q♯', 'maj@4, %'): 52, ('Q♯', 'KL, nats'): 4.2})
    cell = ours['Q♯', 'pass@1, %']
    assert cell.paper == 78.4 and cell.difference == pytest.approx(42 - 78.4) and cell.error == pytest.approx(2)
    for words in ('reference Qwen2.5-0.5B-Instruct', 'value network from 12 layers of the reference', 'top_p 1.0',
                  'max_new_tokens 300', 'samples 4', '50 questions', 'η 0.2'):
        assert words in cell.differs, words
    assert 'chosen on these questions' not in cell.differs
    ablated = [cell for cell in comparison.cells(paper.TABLES['4'], comparison.read([small])) if cell.ours is not None]
    assert ablated and all('η chosen on these questions' in cell.differs for cell in ablated)
    lacking = [cell for cell in found if cell.ours is None]
    assert {cell.setting for cell in lacking} == {cell.setting for cell in found} - {cell.setting}
    assert all(cell.difference is None and cell.run is None for cell in lacking)


def test_the_paper_s_own_models_stand_in_their_own_place(small: Path, tmp_path: Path) -> None:
    own = make(tmp_path / 'own', PAPER, [result('qsharp', 2, 0.1, 0.467, k=8, n_examples=500, temperature=0.8)],
               reference__source='models/Llama-3.1-8B-Instruct', value__source='models/Llama-3.2-1B-Instruct',
               eval__methods='qsharp')
    found = comparison.cells(paper.TABLES['1'], comparison.read([small, own]))
    filled = {cell.setting: cell for cell in found if cell.ours is not None and cell.metric.startswith('pass@1')
              and cell.policy == 'Q♯'}
    assert set(filled) == {'GSM8K, Llama 3 8B with Llama 3.2 1B', 'MATH, Llama 3.1 8B with Llama 3.2 1B'}
    cell = filled['MATH, Llama 3.1 8B with Llama 3.2 1B']
    assert cell.differs == '' and cell.difference == pytest.approx(0)
    lacking = next(cell for cell in found if cell.setting.startswith('MATH, Llama 3.1') and cell.policy == 'CD')
    wanted = make(tmp_path / 'wanted', PAPER, [], reference__source='models/Llama-3.1-8B-Instruct',
                  value__source='models/Llama-3.2-1B-Instruct', eval__methods='qsharp,cd')
    spec, text = asked(lacking.differs, own)
    assert spec.endswith('configs/math.py:paper') and text == (wanted / 'config.json').read_text()


def test_a_score_that_is_missing_names_its_key(tmp_path: Path) -> None:
    run = make(tmp_path / 'small', SMALL, [
        result('reference', 0, None, 0.3), result('qsharp', 2, 0.2, 0.42, best_of_k=0.5, best_of_k_se=0.04)],
        eval__reward_model=False)
    found = comparison.cells(paper.TABLES['3'], comparison.read([run]))
    there = [cell for cell in found if cell.setting.startswith('GSM8K')]
    assert len(there) == 8
    best = {cell.policy: cell for cell in there if cell.metric.startswith('best of')}
    assert best['Q♯'].ours == pytest.approx(50) and best['Q♯'].metric == 'best of 4, %' and best['Q♯'].paper == 86.0
    assert best['reference'].differs.endswith(' --config.eval.reward_model=False --config.eval.reward_model=True')


def asked(command: str, workdir: Path) -> tuple[str, str]:
    """The configuration file that a command of a missing number names, and the configuration that it gives as text."""
    words = shlex.split(command.split(' && ')[-1])
    spec, overrides, others = cli.split_arguments(words[2:])
    assert words[:2] == ['python', commands.from_here('experiments/train.py')] and spec is not None
    assert others[0] == f'--workdir={workdir}'
    return spec, config.to_json(config.load(spec, overrides))


def possible(number: str, size: str, root: Path) -> list[Possible]:
    return reproduce.possible(reproduce.planned(number, size, root, policy='path/to/policy'))


def missing(number: str, runs: list[Path], *plans: list[Possible]) -> dict[tuple[str, str, str], str]:
    """What is said of each number that is missing."""
    found = comparison.cells(paper.TABLES[number], comparison.read(runs), [one for plan in plans for one in plan])
    return {(cell.setting, cell.policy, cell.metric): cell.differs for cell in found if cell.ours is None}


def rows_of(plan: Possible) -> list[Row]:
    """A row of all that a run measures, with as many votes as the paper has."""
    of_some = ['best_of_k', 'weighted_maj@k', *(['kl_to_first_reference'] if plan.config['value']['run'] else [])]
    scores = {name: 0.5 for score in of_some for name in (score, f'{score}_se')}
    methods = [('reference', 0), *((name, 1) for name in plan.config['eval']['methods'] if name != 'qsharp'),
               *(('qsharp', k) for k in range(1, plan.config['iterations'] + 1))]
    return [result(method, k, 0.1 if k else None, 0.5, split=split, **{'k': 8, **scores}) for method, k in methods
            for split in ('test', 'validation')]


@pytest.mark.parametrize('number', paper.TABLES)
def test_the_command_of_a_missing_number_makes_the_run_that_has_it(number: str, tmp_path: Path) -> None:
    plan = possible(number, 'paper', tmp_path / 'runs')
    lacking = missing(number, [], plan)
    assert set(lacking.values()) <= {one.command for one in plan}
    made = {}
    for one in plan:
        assert 'folder=path/to/' in one.command
        make(one.workdir, ARITHMETIC, rows_of(one))
        spec, text = asked(one.command, one.workdir)
        (one.workdir / 'config.json').write_text(text)
        made[one.command] = one.workdir
    for where, command in lacking.items():
        assert where not in missing(number, [made[command]], plan), where
    assert not missing(number, list(made.values()), plan)


def test_a_run_that_takes_from_another_is_made_after_it(tmp_path: Path) -> None:
    base, single, *_ = possible('4', 'small', tmp_path)
    assert single.command == f'{base.command} && {single.command.split(" && ")[1]}'
    assert '--relabel_from' in single.command
    alone = reproduce.possible(reproduce.planned('4', 'small', tmp_path, only=('arithmetic_single',)))
    assert 'relabel' not in alone[0].command and '&&' not in alone[0].command


def test_small_runs_are_named_where_they_would_stand(tmp_path: Path) -> None:
    root = tmp_path / 'runs'
    small_plan, papers = possible('4', 'small', root), possible('4', 'paper', root)
    lacking = missing('4', [], small_plan, papers)
    commands_of = {setting: {said for (where, *_), said in lacking.items() if where == setting}
                   for setting in ('GSM8K, Llama 3 8B with Llama 3.2 1B', 'MATH, Llama 3.1 8B with Llama 3.2 1B')}
    for said, plan in zip(commands_of.values(), (small_plan, papers), strict=True):
        assert said and said < {one.command for one in plan}
    # A run that was begun is named by its own command.
    begun = make(small_plan[1].workdir, ARITHMETIC, [], fit__tokens='single', iterations=1)
    left = missing('4', [begun], small_plan, papers)
    assert left['GSM8K, Llama 3 8B with Llama 3.2 1B', 'Q♯, single prefix, V, distributional, 1 iteration', 'pass@1, %'
                ] == small_plan[1].command


def variants(tmp_path: Path) -> list[Path]:
    def rows(*values: float) -> list[Row]:
        return [result('qsharp', k, 0.1, value, split='validation') for k, value in enumerate(values, start=1)]
    return [make(tmp_path / name, ARITHMETIC, rows(*values), iterations=len(values), **keys)
            for name, values, keys in (
                ('single', [0.1], {'fit__tokens': 'single'}), ('base', [0.2, 0.3], {}),
                ('mse', [0.4], {'value__head': 'mse'}), ('q', [0.5], {'value__type': 'q'}),
                ('categorical', [0.6], {'value__head': 'categorical'}))]


def test_each_ablation_is_found_by_how_it_was_fitted(tmp_path: Path) -> None:
    found = comparison.cells(paper.TABLES['4'], comparison.read(variants(tmp_path)))
    ours = [cell for cell in found if cell.ours is not None]
    # One run of two iterations has both lines.
    assert [(cell.policy.split(', ', 1)[1], cell.paper, round(cell.ours or 0)) for cell in ours] == [
        ('single prefix, V, distributional, 1 iteration', 80.5, 10),
        ('all prefixes, Q, distributional, 1 iteration', 81.4, 50), ('all prefixes, V, MSE, 1 iteration', 81.4, 40),
        ('all prefixes, V, distributional, 1 iteration', 82.3, 20),
        ('all prefixes, V, distributional, 2 iterations', 83.5, 30),
        ('all prefixes, V, categorical, 1 iteration', None, 60)]
    assert all('task arithmetic' in cell.differs for cell in ours)
    assert len([cell for cell in found if cell.ours is None]) == 5  # of MATH; what it does not report has no line


def test_two_value_networks_of_one_reference_have_two_places(small: Path, tmp_path: Path) -> None:
    deeper = make(tmp_path / 'deeper', SMALL, [result('qsharp', 2, 0.1, 0.5)], value__layers=18)
    found = comparison.cells(paper.TABLES['2'], comparison.read([small, deeper]))
    ours = [(cell.setting, cell.ours) for cell in found
            if cell.policy == 'Q♯' and cell.metric.startswith('pass@1') and cell.ours is not None]
    assert ours == [('MATH, Llama 3 70B with Llama 3.2 1B', pytest.approx(42)),
                    ('MATH, Llama 3 70B with Llama 3.2 3B', pytest.approx(50))]


def test_another_policy_has_its_own_place(small: Path, tmp_path: Path) -> None:
    to_first = {'kl_to_first_reference': 7.5, 'kl_to_first_reference_se': 0.2}
    other = make(tmp_path / 'other', SMALL,
                 [result('reference', 0, None, 0.5), result('qsharp', 2, 0.1, 0.6, **to_first)],
                 value__run=small, reference__source='ppo', eval__cd_network='shared', eval__methods='qsharp')
    found = comparison.cells(paper.TABLES['7'], comparison.read([other, small]))
    ours = {(cell.policy, cell.metric.split(',')[0]): cell.ours for cell in found if cell.ours is not None}
    assert ours['PPO', 'pass@1'] == pytest.approx(50) and ours['PPO + Q♯', 'pass@1'] == pytest.approx(60)
    assert ours['Q♯', 'pass@1'] == pytest.approx(42)
    assert ours['PPO + Q♯', 'KL to the reference'] == pytest.approx(7.5)
    # KL to the policy that is guided does not stand for it where it is missing.
    assert ('PPO', 'KL to the reference') not in ours
    assert any(cell.ours is None and cell.paper == 69.52 for cell in found)


def test_commands_are_one_line_whatever_a_key_holds(tmp_path: Path) -> None:
    text = "one's \\boxed{{7}}\n{question} $HOME"
    command = commands.train('configs/gsm8k.py:tiny', tmp_path / 'a run', [('task.template', text)])
    read = subprocess.run(['bash', '-c', f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    assert '\n' not in command and read.stdout.split('\0')[3:5] == [
        f'--workdir={tmp_path / "a run"}', f'--config.task.template={text}']


@pytest.mark.parametrize('number', publish.NAMES)
def test_every_table_is_made_without_a_run_and_with_one(number: str, small: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    nothing = reproduce.table(number, [], out)
    assert 'missing' in nothing.lower() and '`python ' in nothing and 'experiments/train.py' in nothing
    text = reproduce.table(number, [small], out)
    made = 'seed 0, 1 device, commit abc, def, 2 h 06 min in all'
    assert (f'Run: {made}.' if number == 'fig3' else f'Runs: small ({made}).') in text and 'seed 0' not in nothing
    names = sorted(path.name for path in out.iterdir())
    if number == 'fig3':
        assert names == ['fig3.md', 'fig3_small.png', 'fig3_small.svg'] and '| **Q♯, iteration 2** | **0.2** |' in text
        return
    assert {f'table_{number}.{end}' for end in ('md', 'tex', 'png', 'svg')} <= set(names)
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in lines}) == 1
    tex = (out / f'table_{number}.tex').read_text()
    rows = [line for line in tex.splitlines() if line.endswith(r'\\')]
    assert len(rows) == len(lines) - 1 and all(row.replace(r'\&', '').count('&') == 6 for row in rows)
    assert made in tex and '_' not in tex.replace(r'\_', '') and '♯' not in tex
    assert (out / f'table_{number}.md').read_text() == text


def test_what_the_paper_repeats_is_repeated() -> None:
    """Numbers that stand in two tables, and what the paper says of all: Q# is above CD, at less KL."""
    seen: dict[tuple[str, ...], float | None] = {}
    for table in paper.TABLES.values():
        for column in table.columns:
            assert column.reference in paper.MODELS and column.value in paper.MODELS and column.task in paper.TASKS
            if table.split != 'test' or column.variant.other_policy:
                continue
            for method, numbers in column.numbers.items():
                for metric, number in numbers.items():
                    key = (*column.setting[:2 if method == 'reference' else 3], method, metric)
                    assert seen.setdefault(key, number) == number, key
            if 'cd' in column.numbers:
                cd, qsharp = column.numbers['cd'], column.numbers['qsharp']
                assert cd['pass@1'] < qsharp['pass@1'] and cd['maj@k'] < qsharp['maj@k'] and cd['kl'] > qsharp['kl']
    assert [len(table.columns) for table in paper.TABLES.values()] == [4, 4, 2, 12, 3, 2, 2]


def test_the_entry_point_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (([], '--table=NUMBER'), (['runs/a'], '--table=NUMBER'),
                             (['--table=1', f'--out={tmp_path}', str(tmp_path / 'none')], 'holds no run')):
        with pytest.raises(SystemExit) as ended:
            cli.main(entry.main, arguments)
        assert ended.value.code == 2 and words in capsys.readouterr().err
