"""Rewards: names, files and sums; what a function is given, what it may return, and how it fails."""
from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest

from qsharp_jax import rewards
from qsharp_jax.rewards import processes, RewardError

HERE = {'workers': 0, 'timeout_seconds': 5.0, 'on_error': 'stop'}
PROMPTS, COMPLETIONS = ['1+1=', '2+3=', '4+4='], [' 2\n', '6', '8']
COLUMNS = {'answer': ['2', '5', '8'], 'question': ['1+1', '2+3', '4+4']}


@pytest.fixture(name='write')
def write_fixture(tmp_path):
    def write(source, name='mine.py'):
        path = tmp_path / name
        path.write_text(source)
        return f'{path}:f'
    return write


def score(spec, completions=COMPLETIONS, columns=COLUMNS, **options):
    return rewards.score(rewards.load(spec), PROMPTS[:len(completions)], completions, columns,
                         **{**HERE, **options}).tolist()


def grade(name, text, **column):
    columns = {key: [value] for key, value in column.items()}
    return rewards.score(rewards.load(name), ['?'], [text], columns, **HERE)[0]


@pytest.mark.parametrize('name, text, answer, earned', [
    ('exact_match', ' 85 \n', '85', 1), ('exact_match', '85.', '85', 0), ('exact_match', '185', '85', 0),
    ('exact_match', '85\n86', '85', 0), ('exact_match', '', '85', 0),
    ('arithmetic', ' 85', '85', 1), ('arithmetic', '085', '85', 1), ('arithmetic', '85 apples', '85', 0),
    ('arithmetic', '8 5', '85', 0), ('arithmetic', '-3', '-3', 1), ('arithmetic', '', '0', 0),
    ('arithmetic', '85\n12 + 1 = 13', '85', 0), ('arithmetic', '9' * 6000, '9', 0), ('arithmetic', '³', '3', 0),
    ('numeric_match', 'so 3 + 4 is 7.', '7', 1), ('numeric_match', '7 or 8', '7', 0),
    ('numeric_match', '1,234.50', '1234.5', 1), ('numeric_match', 'none', '7', 0), ('numeric_match', 'a', 'b', 0),
    ('numeric_match', '-.5', '-0.5', 1), ('numeric_match', '70', '7', 0), ('numeric_match', '10-18', '18', 1),
    ('numeric_match', '2024-05-18', '18', 1), ('numeric_match', 'x = -5', '-5', 1), ('numeric_match', '1/2', '2', 0),
    ('numeric_match', '1/2', '0.5', 1), ('numeric_match', '1/0', '0', 0), ('numeric_match', '5 and 1e3', '3', 0),
    ('numeric_match', '9007199254740993', '9007199254740992', 0), ('numeric_match', '9' * 6000, '9', 0),
    ('numeric_match', ',111' * 200_000, '111', 0), ('numeric_match', '1' * 1_000_000, '1', 0),
    ('star_graph', '3,1,2', '3,1,2', 1), ('star_graph', ' 3,1,2\n', '3,1,2', 1), ('star_graph', '3,1', '3,1,2', 0),
    ('star_graph', '3,1,2,', '3,1,2', 0), ('star_graph', '3,2,1', '3,1,2', 0), ('star_graph', '', '3,1,2', 0),
    ('star_graph', '3,³,2', '3,1,2', 0), ('star_graph', '03,1,2', '3,1,2', 0), ('star_graph', '٣,1,2', '3,1,2', 0),
    ('star_graph', '0,10,2', '0,10,2', 1)])
def test_builtin_rewards(name, text, answer, earned):
    assert grade(name, text, answer=answer) == earned


@pytest.mark.parametrize('text, earned', [
    ('3,1,2', 1), ('3,5,6', 1), ('3,1', 0), ('3,1,6', 0), ('1,2', 0), ('3', 0), ('', 0), ('3,1,2,9', 0), ('x', 0)])
def test_star_graph_arm_takes_any_arm_to_its_end(text, earned):
    assert grade('star_graph_arm', text, question='1,2|3,5|5,6|3,1/3,2=') == earned


def test_star_graph_arm_refuses_a_question_that_is_no_graph():
    with pytest.raises(RewardError, match='is no star graph'):
        grade('star_graph_arm', '1,2', question='1+1')


def test_scores_are_float64_in_the_order_of_the_rows():
    result = rewards.score(rewards.load('arithmetic'), PROMPTS, COMPLETIONS, COLUMNS, **HERE)
    assert result.dtype == np.float64 and result.tolist() == [1, 0, 1]
    assert rewards.score(rewards.load('arithmetic'), [], [], {'answer': []}, **HERE).shape == (0,)


def test_sums_are_weighted(write):
    spec = write('def f(completions):\n    return [len(text) for text in completions]\n')
    assert score(f'0.9*arithmetic, -0.5*{spec}') == pytest.approx([0.9 - 1.5, -0.5, 0.9 - 0.5])


@pytest.mark.parametrize('spec, terms', [
    ('arithmetic', (('arithmetic', 1.0),)),
    ('0.9*arithmetic, 0.1*my_rewards.py:brevity', (('arithmetic', 0.9), ('my_rewards.py:brevity', 0.1)))])
def test_parse(spec, terms):
    assert rewards.parse(spec) == terms


@pytest.mark.parametrize('spec', ['', 'a,', 'x*arithmetic', 'nan*arithmetic', '2*', '*arithmetic'])
def test_what_is_no_sum_is_refused(spec):
    with pytest.raises(RewardError, match=r'write a name, or number\*name'):
        rewards.parse(spec)


def test_a_misspelt_name_is_told_its_neighbours():
    with pytest.raises(RewardError, match='did you mean arithmetic.*exact_match'):
        rewards.load('aritmetic')


def test_what_a_file_lacks_is_said(write, tmp_path):
    with pytest.raises(RewardError, match=r'nothere.py.*does not exist'):
        rewards.load('nothere.py:f')
    with pytest.raises(RewardError, match='write mine.py:function'):
        rewards.load('mine.py')
    path = write('from math import sqrt\nf = 3\ndef g(completions):\n    pass\ndef _h():\n    pass\n')[:-2]
    with pytest.raises(RewardError, match='has no such function. Its functions are g.'):
        rewards.load(f'{path}:h')
    with pytest.raises(RewardError, match="has 'f', but not as a function"):
        rewards.load(f'{path}:f')
    with pytest.raises(RewardError, match='does not run: ZeroDivisionError'):
        rewards.load(write('1 / 0', 'broken.py'))
    assert not [name for name in sys.modules if 'broken' in name and name.startswith('_qsharp')]
    (tmp_path / 'notes.txt').write_text('def f(completions): pass')
    with pytest.raises(RewardError, match='no Python file'):
        rewards.load(f'{tmp_path}/notes.txt:f')


def test_what_is_called_otherwise_is_refused(write):
    with pytest.raises(RewardError, match=r'takes \(text, gold\), which is no reward function'):
        rewards.load(write('def f(text, gold):\n    return 1\n'))


def test_the_digest_is_of_code_name_and_weight(write):
    spec = write('def f(completions):\n    return [1]\ndef g(completions):\n    return [1]\n')
    digest = rewards.load(spec).digest
    assert digest == rewards.load(spec).digest != rewards.load(f'0.5*{spec}').digest
    assert digest != rewards.load(f'{spec[:-1]}g').digest != rewards.load('arithmetic').digest
    copy = write('def f(completions):\n    return [1]\ndef g(completions):\n    return [1]\n', 'elsewhere.py')
    assert rewards.load(copy).digest == digest
    write('def f(completions):\n    return [2]\n')
    assert rewards.load(spec).digest != digest


def test_a_changed_file_is_loaded_anew(write):
    assert score(write('def f(completions):\n    return [1 for _ in completions]\n')) == [1, 1, 1]
    assert score(write('def f(completions):\n    return [2 for _ in completions]\n')) == [2, 2, 2]


def test_registered_names_cannot_be_taken_twice_or_look_like_files():
    with pytest.raises(ValueError, match='registered already'):
        rewards.register('arithmetic')
    with pytest.raises(ValueError, match='cannot name a reward'):
        rewards.register('a:b')
    assert rewards.names() == sorted(rewards.names()) and 'star_graph' in rewards.names()


@pytest.mark.parametrize('source', [
    'def f(prompts, completions, answer):\n    return [len(p) + len(c) + int(a) for p, c, a in'
    ' zip(prompts, completions, answer)]',
    'def f(completions, **columns):\n    return [len(p) + len(c) + int(a) for p, c, a in'
    ' zip(columns["prompts"], completions, columns["answer"])]',
    'async def f(prompts, completions, answer, missing=0):\n    import asyncio\n    await asyncio.sleep(0)\n'
    '    return [missing + len(p) + len(c) + int(a) for p, c, a in zip(prompts, completions, answer)]',
    'class F:\n    def __call__(self, prompts, completions, answer):\n'
    '        return (len(p) + len(c) + int(a) for p, c, a in zip(prompts, completions, answer))\n'
    'def f(prompts, completions, answer):\n    return list(F()(prompts, completions, answer))',
    'def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n'
    '    assert data_source == "" and extra_info["answer"] == ground_truth\n'
    '    return 4 + len(solution_str) + int(ground_truth)\nf = compute_score',
    'def f(solution_str, ground_truth):\n    return {"score": 4 + len(solution_str) + int(ground_truth), "x": 0}',
    'async def f(solution_str, ground_truth):\n    return 4 + len(solution_str) + int(ground_truth)'])
def test_every_style_is_given_what_it_takes(write, source):
    assert score(write(source + '\n')) == [9, 10, 13]


def test_async_rewards_run_inside_a_running_loop_too(write):
    spec = write('async def f(completions):\n    return [1 for _ in completions]\n')

    async def notebook():
        return score(spec)

    assert asyncio.run(notebook()) == [1, 1, 1]


@pytest.mark.parametrize('values, expected', [
    ('[True, False, 2]', [1, 0, 2]), ('(0.5, 1, None)', [0.5, 1, math.nan]),
    ('np.array([1, 0.5, 2], np.float32)', [1, 0.5, 2]), ('[np.True_, np.int64(3), np.array(0.25)]', [1, 3, 0.25])])
def test_numbers_of_every_kind_are_taken(write, values, expected):
    spec = write(f'import numpy as np\ndef f(completions):\n    return {values}\n')
    np.testing.assert_array_equal(score(spec), expected)


@pytest.mark.parametrize('value', ['"1"', 'float("nan")', 'float("inf")', '[1]', '1j', 'np.ones(2)', 'np.str_("1")'])
def test_values_that_are_no_finite_numbers_name_function_row_and_text(write, value, caplog):
    spec = write(f'import numpy as np\ndef f(completions):\n    return [1, {value}, None]\n')
    with pytest.raises(RewardError, match=r"mine.py:f' returned .* in row 1, for the completion '6'; it must be"):
        score(spec)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(score(spec, on_error='abstain'), [1, math.nan, math.nan])
    assert 'in row 1, which abstains' in caplog.text


@pytest.mark.parametrize('result, words', [
    ('[1, 2]', 'returned 2 values for 3 completions'), ('1.0', 'must return a list'), ('"abc"', 'must return a list'),
    ('None', 'must return a list'), ('{"a": 1}', 'must return a list'), ('(x for x in [1])', 'must return a list')])
def test_results_that_are_no_list_of_one_value_a_row_are_refused_always(write, result, words):
    spec = write(f'def f(completions):\n    return {result}\n')
    for on_error in ('stop', 'abstain'):
        with pytest.raises(RewardError, match=words):
            score(spec, on_error=on_error)


RAISES = 'def f(completions, answer):\n    return [1 / (int(text) - 6) for text in completions]\n'
VERL_RAISES = 'def f(solution_str, ground_truth):\n    return 1 / (int(solution_str) - 6)\n'


@pytest.mark.parametrize('source', [RAISES, VERL_RAISES, f'async {RAISES}'])
def test_an_exception_names_function_row_and_text_and_is_kept(write, source, caplog):
    spec = write(source)
    with pytest.raises(RewardError, match=r"mine.py:f' raised ZeroDivisionError.* in row 1, for the completion '6'"
                       ) as caught:
        score(spec)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(score(spec, on_error='abstain'), [-0.25, math.nan, 0.5])
    assert "row 1, for the completion '6'; the row abstains" in caplog.text


def test_a_long_text_is_shortened(write):
    with pytest.raises(RewardError) as caught:
        score(write('def f(completions):\n    raise KeyError(completions[0])\n'), ['x' * 9000])
    assert len(str(caught.value)) < 1000 and '…' in str(caught.value)


def test_an_exception_on_the_whole_alone_says_so(write):
    spec = write('def f(completions):\n    assert len(completions) < 2, "too many"\n    return [7]\n')
    with pytest.raises(RewardError, match='AssertionError.*on 3 answers together'):
        score(spec)
    assert score(spec, on_error='abstain') == [7, 7, 7]


def test_a_column_that_is_not_there_is_named(write):
    with pytest.raises(RewardError, match="needs 'anwser'.*its columns are answer, question. Did you mean 'answer'"):
        score(write('def f(completions, anwser):\n    return completions\n'))
    with pytest.raises(RewardError, match="needs 'ground_truth'.*its columns are none"):
        score(write('def f(solution_str, ground_truth):\n    return 1\n'), columns={})
    assert score(write('def f(solution_str, ground_truth=None):\n    return 1\n'), columns={}) == [1, 1, 1]


def test_verl_prefers_its_own_columns(write):
    spec = write('def f(data_source, solution_str, ground_truth, extra_info):\n'
                 '    return len(data_source) + int(ground_truth)\n')
    columns = {**COLUMNS, 'ground_truth': ['10', '20', '30'], 'data_source': ['ab'] * 3}
    assert score(spec, columns=columns) == [12, 22, 32]
    spec = write('def f(solution_str, extra_info):\n    return extra_info["index"] + int(extra_info["answer"])\n')
    assert score(spec, columns={**COLUMNS, 'extra_info': [{'index': 100 * i} for i in range(3)]}) == [2, 105, 208]


def test_unknown_error_policies_are_refused():
    with pytest.raises(RewardError, match="'stop' or 'abstain'"):
        score('arithmetic', on_error='skip')


WORKER = """
import os, time
def f(completions, answer):
    if completions[0] == 'hang':
        time.sleep(60)
    if completions[0] == 'die':
        os._exit(3)
    if completions[0] == 'raise':
        raise KeyError('no')
    return [None if completions[0] == 'none' else float(completions == answer)]
"""


def test_workers_survive_hangs_and_deaths_and_name_what_raised(write, caplog):
    spec = write(WORKER)
    texts = ['5', 'hang', '2', 'die', '8', 'none']
    columns = {'answer': ['5', '5', '5', '5', '8', '8']}
    reward = rewards.load(f'2*{spec}')
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        result = rewards.score(reward, ['?'] * 6, texts, columns, workers=2, timeout_seconds=1.0, on_error='stop')
    assert time.monotonic() - began < 30
    np.testing.assert_array_equal(result, [2, math.nan, 0, math.nan, 2, math.nan])
    assert "1 of 6 answers took longer than 1 s and abstain; the first is row 1, 'hang'" in caplog.text
    assert "1 of 6 answers killed their workers and abstain; the first is row 3, 'die'" in caplog.text
    with pytest.raises(RewardError, match="raised KeyError.* in row 1, for the completion 'raise'"):
        rewards.score(reward, ['?'] * 2, ['5', 'raise'], {'answer': ['5', '5']}, workers=2, timeout_seconds=1.0,
                      on_error='stop')
    again = rewards.score(reward, ['?'] * 2, ['5', 'raise'], {'answer': ['5', '5']}, workers=2, timeout_seconds=1.0,
                          on_error='abstain')
    np.testing.assert_array_equal(again, [2, math.nan])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_function_that_exits_is_an_error_of_its_row(write, workers, caplog):
    spec = write('import sys\ndef f(completions):\n    return [sys.exit(0) if c == "6" else 1 for c in completions]\n')
    with pytest.raises(RewardError, match=r"raised SystemExit\('0'\) at .*mine.py:3 in row 1, for the completion '6'"):
        score(spec, workers=workers)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(score(spec, workers=workers, on_error='abstain'), [1, math.nan, 1])
    with pytest.raises(RewardError, match='does not run: SystemExit'):
        rewards.load(write('import sys\nsys.exit(0)\n', 'leaves.py'))


def test_processes_that_die_while_nothing_is_graded_are_replaced(write):
    spec = write('def f(completions):\n    return [len(c) for c in completions]\n')
    for workers in (1, 2):
        assert score(spec, workers=workers) == [3, 1, 1]
        for pause in (0.0, 1.0):  # before it is seen, and after
            pool = processes.pool(rewards.load(spec), workers)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(pause)
            assert score(spec, workers=workers) == [3, 1, 1]
        assert processes.pool(rewards.load(spec), workers) is not pool


def test_processes_that_die_as_they_start_are_an_error_and_not_a_hang(write):
    spec = write('import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(1)\n'
                 'def f(completions):\n    return [1 for _ in completions]\n')
    with pytest.raises(RewardError, match='died while they started or waited, 3 times in a row'):
        score(spec, workers=1)


@pytest.mark.parametrize('source', [
    'class F:\n    def __call__(self, completions):\n        return [len(c) for c in completions]\nf = F()\n',
    'import functools\ndef g(factor, completions):\n    return [factor * len(c) for c in completions]\n'
    'f = functools.partial(g, 1)\n',
    'f = lambda completions: [len(c) for c in completions]\n'])
def test_whatever_can_be_called_is_a_function(write, source):
    assert score(write(source)) == [3, 1, 1]


def test_a_file_may_import_its_neighbour(write):
    write('def size(text):\n    return len(text)\n', 'neighbour_of_mine.py')
    spec = write('from neighbour_of_mine import size\ndef f(completions):\n    return [*map(size, completions)]\n')
    assert score(spec) == score(spec, workers=1) == [3, 1, 1]


def test_numbers_that_no_float_holds_are_refused(write):
    with pytest.raises(RewardError, match=r'returned 1000.*\(int\) in row 0.*must be a finite number'):
        score(write('def f(completions):\n    return [10 ** 400 for _ in completions]\n'))


def test_canaries_pass_where_one_answer_comes_in_two_forms():
    for name, answers in (('gsm8k', ['5', '5.0', '7']), ('gsm8k', ['5', '5.0']), ('numeric_match', ['1/2', '0.5'])):
        rewards.check_canaries(rewards.load(name), ['?'] * len(answers), answers, {'answer': answers}, **HERE)


def test_canaries_pass_where_right_earns_more():
    rewards.check_canaries(rewards.load('arithmetic'), PROMPTS, COLUMNS['answer'], COLUMNS, **HERE)
    rewards.check_canaries(rewards.load('exact_match'), ['?', '?'], ['7', '7'], {'answer': ['7', '7']}, **HERE)


def test_canaries_stop_a_registered_reward_that_does_not_fit_the_task():
    with pytest.raises(RewardError, match="does not tell right from wrong: to '1\\+1=' the right answer 'two' earns 0"):
        rewards.check_canaries(rewards.load('arithmetic'), PROMPTS, ['two', 'five', 'eight'], COLUMNS, **HERE)


@pytest.mark.parametrize('source, words', [
    ('return [0 for _ in completions]', "'2' earns 0 and the wrong one '5' earns 0"),
    ('return [None for _ in completions]', "'2' earns nothing \\(it abstains\\)"),
    ('return [float(a != b) for a, b in zip(completions, answer)]', "'2' earns 0 and the wrong one '5' earns 1")])
def test_canaries_warn_of_a_function_of_ones_own(write, caplog, source, words):
    spec = write(f'def f(completions, answer):\n    {source}\n')
    with caplog.at_level(logging.WARNING):
        rewards.check_canaries(rewards.load(spec), PROMPTS, COLUMNS['answer'], COLUMNS, **HERE)
    assert words.replace('\\', '') in caplog.text


@pytest.mark.parametrize('text, earned', [
    ('3,1,2', 2), ('3,1', 0.5), ('3,1,4', 1), ('3,2,1', 0), ('1,3,2', -1), ('', -1.5), ('x', -1.5), ('3,1,2,4', 1.5),
    ('9,9', -1.5)])
def test_star_graph_progress_is_real_valued(text, earned):
    assert grade('star_graph_progress', text, answer='3,1,2') == pytest.approx(earned)


def test_a_column_that_is_not_there_is_found_before_anything_is_graded(write):
    reward = rewards.load(write('def f(completions, hint):\n    return hint\n'))
    with pytest.raises(RewardError, match="needs 'hint'"):
        rewards.check_columns(reward, {'answer': ['1']})
    rewards.check_columns(reward, {'hint': ['1']})
