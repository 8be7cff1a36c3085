"""What is said of a reward before any model runs."""
from __future__ import annotations

import json

import pytest

from experiments import check_reward
from qsharp_jax import cli
from qsharp_jax.rewards import checking, RewardError

ROWS = [{'prompt': f'{n}+1', 'completion': 'x' * n, 'answer': str(n), 'data_source': 'sums'} for n in range(1, 9)]


@pytest.fixture(name='said')
def said_fixture(tmp_path):
    def said(source, rows=ROWS, workers=0, **options):
        path, data = tmp_path / 'mine.py', tmp_path / 'answers.jsonl'
        path.write_text(source)
        data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        lines = checking.report(f'{path}:f', checking.read(data, **options), workers=workers, timeout_seconds=5.0)
        return {line[:15].strip(): line[15:] for line in lines}
    return said


def test_styles_are_named(said):
    lines = said('def f(completions):\n    return [1] * len(completions)')
    assert lines['reward'].endswith('function(prompts, completions, **columns); takes completions')
    assert lines['graded'].startswith('all at once, in this process')
    assert 'takes every column' in said('def f(**rows):\n    return [1] * len(rows["completions"])')['reward']
    lines = said('def f(data_source, solution_str, ground_truth, extra_info=None):\n'
                 '    assert data_source == "sums" and extra_info["answer"] == ground_truth\n'
                 '    return float(len(solution_str) == int(ground_truth))')
    assert "verl's compute_score" in lines['reward']
    assert '1 different, 1 to 1' in lines['values'] and 'nothing to learn' in lines['equal values']
    assert ': async function' in said('async def f(completions):\n    return [1] * len(completions)')['reward']


def test_values_lengths_and_the_network_that_fits(said):
    lines = said('def f(completions):\n    return [len(text) / 4 - 1 for text in completions]')
    assert '8 different, -0.75 to 1, mean 0.125' in lines['values']
    assert '12.5% of the rows earn' in lines['equal values']
    assert '+1.00: does it pay for length alone?' in lines['length']
    assert lines['value network'] == (
        '--config.value.head=categorical --config.value.v_min=-0.75 --config.value.v_max=1 --config.value.num_atoms=8 '
        '(an atom on every value seen)')
    lines = said('def f(completions):\n    return [float(len(text) % 2) for text in completions]')
    assert '50.0% of the rows' in lines['equal values'] and '?' not in lines['length']
    assert lines['value network'] == '--config.value.head=bernoulli --config.value.v_min=0 --config.value.v_max=1'
    lines = said('def f(completions):\n    return [len(text) ** 0.5 for text in completions]')
    assert '--config.value.projection=two_hot (no 101 atoms lie on every value seen)' in lines['value network']


def test_abstentions_are_counted(said):
    lines = said('def f(completions):\n    return [None if len(t) > 2 else 1 for t in completions]')
    assert lines['abstentions'] == '6 of 8'
    assert said('def f(completions):\n    return [None] * len(completions)')['values'] == 'none: every row abstains'


def test_what_changes_from_call_to_call_is_found(said):
    lines = said('calls = [0]\ndef f(completions):\n    calls[0] += 1\n    return [calls[0]] * len(completions)')
    assert lines['deterministic'] == 'NO: 8 values differ when called again; row 0 earned 2, then 3'
    assert 'NO' in lines['row by row']


def test_what_depends_on_the_other_rows_is_found(said):
    lines = said('def f(completions):\n    return [len(completions)] * len(completions)')
    assert lines['deterministic'].startswith('yes')
    assert lines['row by row'] == 'NO: 8 values differ when called on one row alone; row 0 earned 8, then 1'


def test_the_slowest_row_is_first(said):
    lines = said('import time\ndef f(completions):\n    time.sleep(0.05 * (completions == ["xxxxx"]))\n'
                 '    return [len(t) % 2 for t in completions]')
    assert lines['one row alone'].startswith('median ')
    slowest = next(text for name, text in lines.items() if name.startswith('row ') and name != 'row by row')
    assert "'xxxxx'" in slowest


def test_a_row_that_hangs_in_a_worker_abstains(said):
    source = 'import time\ndef f(completions):\n    time.sleep(60 * ("xxx" in completions))\n    return [1.0]'
    lines = said(source, ROWS[:3], workers=1)
    assert lines['abstentions'] == '1 of 3 (where it took too long or died, a warning says so)'
    assert lines['deterministic'].startswith('yes')
    assert lines['graded'] == 'one at a time, in 1 worker process' and 'row by row' not in lines


def test_columns_are_found_and_files_refused(said, tmp_path):
    rows = [{'question': 'q', 'response': 'a', 'answer': 'a'}]
    source = 'def f(prompts, completions, answer, question):\n    assert prompts == question\n    return [1]'
    assert '1 different' in said(source, rows)['values']
    lines = said('def f(completions):\n    return [len(completions[0])]', [{'text': 'bb', 'mine': 'a'}],
                 completion='mine')
    assert '1 different, 1 to 1' in lines['values']
    with pytest.raises(ValueError, match="of its columns 'mine' none of 'completion', 'response', 'text' is"):
        said(source, [{'mine': 'a'}])
    with pytest.raises(ValueError, match="columns 'mine' 'yours' is not one. Name the right one with --completion"):
        said(source, [{'mine': 'a'}], completion='yours')
    with pytest.raises(ValueError, match="line 2 lacks 'answer'"):
        said(source, [*rows, {'question': 'q', 'response': 'a'}])
    with pytest.raises(ValueError, match='line 1 has 3 as its answer'):
        said(source, [{'response': 3}])
    with pytest.raises(ValueError, match="has the column 'completions', a name that a reward is given something else"):
        said(source, [{'response': 'a', 'completions': 'b'}])
    # As training has it, answers that are numbers are text.
    assert '1 different, 1 to 1' in said('def f(completions, answer):\n    return [answer[0] == "17"]',
                                         [{'response': 'a', 'answer': 17}])['values']
    with pytest.raises(RewardError, match="needs 'anwser'.*Did you mean 'answer'"):
        said('def f(completions, anwser):\n    return [1]', rows)
    with pytest.raises(ValueError, match='there is no file'):
        checking.read(tmp_path / 'nowhere.jsonl')


def test_the_command_prints_it_and_says_in_one_line_what_is_wrong(tmp_path, capsys):
    data = tmp_path / 'answers.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    cli.main(check_reward.main, ['exact_match', f'--data={data}', '--workers=0'])
    printed = capsys.readouterr().out
    assert printed.startswith('reward         1 * exact_match: function(prompts, completions, **columns)')
    cli.main(check_reward.main, ['exact_match', f'--data={data}'])
    assert 'all at once, in this process' in capsys.readouterr().out
    for flag, words in (('--workers=-1', 'workers is -1'), ('--timeout_seconds=0', 'timeout_seconds is 0; it must be')):
        with pytest.raises(SystemExit):
            cli.main(check_reward.main, ['exact_match', f'--data={data}', '--workers=1', flag])
        assert f'error: {words}' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(check_reward.main, ['exact_mach', f'--data={data}'])
    assert 'error: there is no reward' in capsys.readouterr().err
