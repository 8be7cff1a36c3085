"""The figure of star graphs and the records it is drawn from."""
from __future__ import annotations

import json
import math
from pathlib import Path
import shutil
from typing import Any

from matplotlib.axes import Axes
import pytest

from experiments import reproduce as reproduce_entry
from experiments import tables as entry
from qsharp_jax import reproduce, star_graph_records
from qsharp_jax.metrics import read_rows
from qsharp_jax.report import plots, star_graph_figure
from qsharp_jax.report.star_graph_figure import Run

QUESTION = '1,2|5,3|5,1|3,4/5,4='  # the path is 5,3,4
Row = dict[str, Any]


def run(degree: int, length: int, seed: int = 0, answers: int = 100, **changes: Any) -> Run:
    def row(method: str, accuracy: float, **more: Any) -> Row:
        return {'method': method, 'pass@1': accuracy, 'pass@1_se': 0.03, 'answers': answers, **more}

    return Run(**{
        'degree': degree, 'path_length': length, 'seed': seed, 'hours': 0.25,
        'results': [row('reference', 1 / degree), row('reinforce', 0.4 + seed / 10, learning_rate=0.1),
                    row('qsharp', 0.9)],
        'steps': [{'method': 'qsharp', 'step': 1, 'accuracy': 0.9, 'se': 0.01, 'count': 100}], 'earlier': [],
        'fits': [],
        'values': [{'method': 'qsharp', 'position': 0, 'loss': 0.69}, {'method': 'qsharp', 'position': 1, 'loss': 0.05},
                   {'method': 'qsharp_pairs', 'position': 0, 'loss': 0.7 + seed / 10}],
        'curves': [row('reinforce', 0.3, learning_rate=0.1), row('reinforce', 0.1, learning_rate=0.2)],
        'guided': [row('qsharp', 0.9)], **changes})


def curves_of(ax: Axes) -> dict[str, list[list[float]]]:
    """Points of each curve with errors by its label: where, and how high in per cent."""
    return {container.get_label(): [list(values) for values in container.lines[0].get_data()]
            for container in ax.containers}


def test_a_panel_a_graph_with_its_line_and_three_that_say_why(tmp_path: Path) -> None:
    other = run(2, 5, seed=2)
    # Another seed may choose another learning rate.
    other.results[1].update(learning_rate=0.2)
    other.curves[1].update({'pass@1': 0.6})
    figure = star_graph_figure.draw([run(5, 5), run(2, 5), other, run(3, 8), run(2, 5, answers=10)])
    above, *below = figure.subfigs
    assert [ax.get_title('left') for ax in above.axes] == [
        'G(2, 5), 1/d = 50 %', 'G(5, 5), 1/d = 20 %', 'G(3, 8), 1/d = 33 %']
    dashed = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == '--'] for ax in above.axes]
    assert dashed == [[50], [20], [pytest.approx(100 / 3)]]
    assert [[text.get_text() for text in ax.get_legend().get_texts()] for ax in below[0].axes] == [
        ['Q♯'], ['Q♯ on pairs', 'Q♯'], ['REINFORCE', 'Q♯']]
    # The two seeds with as many answers are averaged, and the run with fewer is a point of the curve alone.
    assert [patch.get_height() for patch in above.axes[0].patches] == pytest.approx([50, 50, 90])
    assert [label.get_text() for label in above.axes[0].get_xticklabels()] == ['reference', 'REINFORCE', 'Q♯']
    assert 'over seeds where there are several (2 on G(2, 5))' in above.get_supxlabel()
    assert [[ax.get_title('left').partition(':')[0] for ax in part.axes] for part in below] == [
        [name] * 3 for name in ('G(2, 5)', 'G(5, 5)', 'G(3, 8)')]
    step, value, answers = below[0].axes
    assert curves_of(step) == {'Q♯': [[1], [90]]}
    assert {line.get_label(): list(line.get_ydata()) for line in value.lines[:2]} == {
        'Q♯': [0.69, 0.05], 'Q♯ on pairs': [pytest.approx(0.8)]}
    curves = curves_of(answers)
    assert curves['Q♯'][0] == [10, 100] and answers.get_xscale() == 'log'
    # Of a sweep, the rate that each run chose: 0.3, and 0.6 of the other seed.
    assert curves['REINFORCE'] == [[10, 100], pytest.approx([30, 45])]
    plots.save({'star_graph': figure}, tmp_path)
    assert (tmp_path / 'star_graph.png').stat().st_size > 10_000


def test_runs_of_qsharp_alone_are_points_by_the_length_of_the_path(tmp_path: Path) -> None:
    alone = [[{'method': 'reference', 'pass@1': 0.5, 'pass@1_se': 0.01, 'answers': 0},
              {'method': 'qsharp', 'pass@1': accuracy, 'pass@1_se': 0.01, 'answers': 100}] for accuracy in (1.0, 0.7)]
    losses = [[{'method': 'qsharp', 'position': 0, 'loss': 0.69}, {'method': 'qsharp', 'position': 1, 'loss': loss}]
              for loss in (0.01, 0.4)]
    figure = star_graph_figure.draw([
        run(2, 5), run(5, 5), *(run(2, length, results=rows, values=own)
                                for length, rows, own in zip((3, 8), alone, losses))])
    above, *below = figure.subfigs
    assert [ax.get_title('left') for ax in above.axes] == ['G(2, 5), 1/d = 50 %', 'G(5, 5), 1/d = 20 %']
    assert len(below) == 3, 'two graphs, and the lengths of stars of two arms; of five there is one'
    accuracy, loss = below[-1].axes
    curves = curves_of(accuracy)
    assert list(curves) == ['reference', 'Q♯'] and curves['Q♯'] == [[3, 5, 8], pytest.approx([100, 90, 70])]
    assert [list(values) for values in loss.lines[0].get_data()] == [[3, 5, 8], [0.01, 0.05, 0.4]]
    plots.save({'star_graph': figure}, tmp_path)
    # Without any policies all graphs are shown.
    assert len(star_graph_figure.draw([run(2, 3, results=alone[0]), run(2, 8, results=alone[1])]).subfigs) == 4


def test_another_value_network_is_a_curve_of_its_loss_and_a_line_of_the_table() -> None:
    losses = [{'method': 'qsharp', 'position': 0, 'loss': 0.69}, {'method': 'qsharp', 'position': 1, 'loss': 0.66}]
    rows = [{'method': 'qsharp', 'pass@1': 0.55, 'pass@1_se': 0.01, 'answers': 200}]
    runs = [run(2, 5), run(2, 5, answers=10), run(2, 5, variant='Q-type', values=losses, results=rows, guided=rows)]
    above, below = star_graph_figure.draw(runs).subfigs
    assert [patch.get_height() for patch in above.axes[0].patches] == pytest.approx([50, 40, 90])
    curves = {line.get_label(): list(line.get_ydata()) for line in below.axes[1].lines}
    assert curves['Q♯'] == [0.69, 0.05] and curves['Q♯, Q-type'] == [0.69, 0.66]
    assert curves_of(below.axes[2])['Q♯'][0] == [10, 100], 'it is no point of the curve'
    text = star_graph_figure.markdown(runs)
    assert '| Q♯ | 90.0 ± 3.0 |' in text and '| Q♯, Q-type | 55.0 ± 1.0 |' in text and 'G(2, 5), Q-type, seed 0' in text


def test_a_guess_costs_the_entropy_of_one_in_d() -> None:
    for degree, entropy in ((2, math.log(2)), (5, 0.2 * math.log(5) + 0.8 * math.log(1.25))):
        _, below = star_graph_figure.draw([run(degree, 5)]).subfigs
        line = below.axes[1].lines[-1]
        assert line.get_ydata() == pytest.approx([math.log(2)] * 2), 'of pairs; with two arms it is that of 1/d'
        known = next(line for line in below.axes[1].lines if line.get_linestyle() == '--')
        assert known.get_ydata() == pytest.approx([entropy] * 2)
        # Of pairs one in two is right, whatever d is.
        assert [text.get_text() for text in below.axes[1].texts] == [
            '1/d: nothing else is known', 'on pairs: nothing is known'][:1 + (degree > 2)]


def test_a_run_that_has_only_begun_is_drawn() -> None:
    star_graph_figure.draw([run(2, 5, results=[], steps=[], values=[], curves=[], guided=[])])
    with pytest.raises(ValueError, match='no run of star graphs'):
        star_graph_figure.draw([])


def test_errors_of_seeds() -> None:
    rows = [{'a': 0.4, 'e': 0.03}, {'a': 0.8, 'e': 0.04}]
    # Both are asked the same graphs: 0.0125 over these, and half the variance of 0.4 and 0.8.
    assert star_graph_figure.mean_of(rows, 'a', 'e') == pytest.approx((0.6, (0.00125 + 0.04) ** 0.5))
    assert star_graph_figure.mean_of(rows[:1], 'a', 'e') == pytest.approx((0.4, 0.03))
    alike = [{'a': 0.5, 'e': 0.03}] * 3
    assert star_graph_figure.mean_of(alike, 'a', 'e') == pytest.approx((0.5, 0.03))


def test_steps_count_the_answers_that_come_to_them() -> None:
    texts = ['5,3,4'] * 60 + ['5,1,2'] * 20 + ['5,3,1'] * 40 + ['3,3,4', '5,3,4,2'] * 10 + ['5,3'] * 20 + ['']
    found = star_graph_records.step_accuracy([(QUESTION, text) for text in texts])
    shares = [150 / 161, 130 / 150, 70 / 130, 60 / 70]  # the centre, two steps, and the end of the answer
    assert [(row['step'], row['count']) for row in found] == [(0, 161), (1, 150), (2, 130), (3, 70)]
    assert [row['accuracy'] for row in found] == pytest.approx(shares)
    assert math.prod(row['accuracy'] for row in found) == pytest.approx(60 / len(texts)), 'what the reward says'
    assert found[1]['se'] == pytest.approx((shares[1] * (1 - shares[1]) / 150) ** 0.5, rel=0.02)
    # Nothing is certain, and of fewer than 30 answers nothing is said.
    assert star_graph_records.step_accuracy([(QUESTION, '5,3,4')] * 30)[0]['se'] > 0.01
    assert star_graph_records.step_accuracy([(QUESTION, '5,3,4')] * 29) == []
    few = star_graph_records.step_accuracy([(QUESTION, text) for text in ['5,1,2'] * 40 + ['5,3,4']])
    assert [row['step'] for row in few] == [0, 1]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """What a run leaves behind, so far as it is read."""
    graph = {'degree': 2, 'path_length': 3, 'train_examples': 50}
    config = {'seed': 7, 'task': {'name': 'star_graph', 'star_graph': graph},
              'eval': {'split': 'test', 'select_split': 'validation'},
              'value': {'type': 'v', 'extra_input': 'restart', 'lookahead': 0},
              'collect': {'examples': 0, 'samples': 2}, 'sampling': {'temperature': 1.0}}
    (tmp_path / 'config.json').write_text(json.dumps(config))

    def row(method: str, iteration: int, eta: float | None, **more: Any) -> Row:
        return {'method': method, 'iteration': iteration, 'eta': eta, 'temperature': 1.0, 'split': 'test',
                'pass@1': 0.5, 'pass@1_se': 0.1, 'selected': True, 'seconds_per_answer': None, **more}

    write(tmp_path / 'results.jsonl', [
        row('reference', 0, None, selected=False), row('reference', 0, None, temperature=0.0),
        row('reinforce', 0, None, answers=64, learning_rate=0.001), row('qsharp', 1, 0.1), row('qsharp', 2, 0.1),
        row('qsharp', 2, 0.5, selected=False), row('qsharp_pairs', 1, 0.1, answers=75),
        *(row('qsharp', iteration, 0.1, split='validation', **{'pass@1': iteration / 5}) for iteration in (1, 2)),
        row('qsharp', 2, 0.5, split='validation', selected=False)])

    def samples(texts: str, eta: float, temperature: float = 1.0) -> list[Row]:
        return [{'id': number, 'sample': 0, 'prompt': QUESTION, 'text': text, 'eta': eta, 'temperature': temperature,
                 'reward': float(text == '5,3,4')} for number, text in enumerate(texts.split())]

    right, wrong = '5,3,4 ' * 30, '5,1,2 ' * 30
    write(tmp_path / 'samples/test/reference-a/block_00000.jsonl', [
        *samples(right + wrong, math.inf), *samples(right, math.inf, 0.0)])
    # Of a policy of another rate, which was chosen before it.
    write(tmp_path / 'samples/test/reinforce-a/block_00000.jsonl', samples(right + right + wrong, math.inf))
    write(tmp_path / 'samples/test/reinforce-b/block_00000.jsonl', samples(wrong + right, math.inf))
    write(tmp_path / 'samples/test/reinforce_greedy-a/block_00000.jsonl', samples(right, math.inf))
    write(tmp_path / 'samples/test/qsharp_2-a/block_00000.jsonl', [
        *samples(right + '5,3,1 ' * 30, 0.1), *samples('1 ' * 40, 0.5)])
    write(tmp_path / 'pairs/samples/test/qsharp_1-a/block_00000.jsonl', samples(right + '9 ' * 30, 0.1))
    for iteration in (1, 2, 10):
        path = tmp_path / 'calibration' / f'iteration_{iteration}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({'learning_rate': 0.1, 'sweep': {'0.1': 1.0},
                                    'by_position': [{'position': 0, 'loss': iteration / 10}]}))
    path = tmp_path / 'pairs/calibration/iteration_1.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({'by_position': [{'position': 0, 'loss': 0.3, 'count': 9}]}))
    (tmp_path / 'timings.json').write_text(json.dumps({'collect 1': 1800.0, 'train dpo': 5400.0}))
    write(tmp_path / 'metrics.jsonl', [
        {'stage': 'fit_1', 'step': 1, 'loss': 0.1}, {'stage': 'reinforce_0.001', 'step': 1, 'loss': 0.1},
        {'stage': 'reinforce_0.001', 'step': 1, 'pass@1': 0.5, 'pass@1_se': 0.1, 'answers': 32}])
    return tmp_path


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_a_work_directory_is_read(workdir: Path) -> None:
    found = star_graph_records.read(workdir)
    assert found.graph == (2, 3) and found.variant == ''
    assert {row['method']: (row['iteration'], row['temperature'], row['answers']) for row in found.results} == {
        'reference': (0, 1.0, 0), 'reinforce': (0, 1.0, 64), 'qsharp': (2, 1.0, 200), 'qsharp_pairs': (1, 1.0, 75)}
    # On the split that the curves of policies are of, and nothing that was not chosen there.
    assert [(row['answers'], row['eta'], row['pass@1']) for row in found.guided] == [(100, 0.1, 0.2), (200, 0.1, 0.4)]
    steps = {(row['method'], row['step']): row['accuracy'] for row in found.steps}
    half = {0: 1, 1: 0.5, 2: 1, 3: 1}
    assert steps == {(method, step): share for method, shares in (
        ('reference', half), ('reinforce', half), ('qsharp', {0: 1, 1: 1, 2: 0.5, 3: 1}),
        ('qsharp_pairs', {0: 0.5, 1: 1, 2: 1, 3: 1})) for step, share in shares.items()}
    assert {row['method']: row['arms'] for row in found.results} == {
        'reference': 1, 'reinforce': 1, 'qsharp': 0.5, 'qsharp_pairs': 0.5}
    assert [(row['method'], row['iteration']) for row in found.earlier] == [('qsharp', 1)]
    assert found.fits == [{'method': 'qsharp', 'learning_rate': 0.1, 'sweep': {'0.1': 1.0}}]
    assert found.values == [{'method': 'qsharp', 'position': 0, 'loss': 1.0},
                            {'method': 'qsharp_pairs', 'position': 0, 'loss': 0.3}]
    assert (found.seed, found.hours) == (7, 2.0)
    curve, = found.curves
    assert (curve['method'], curve['learning_rate'], curve['answers']) == ('reinforce', 0.001, 32)


@pytest.mark.parametrize('length, changes, variant', [
    (3, {}, ''), (5, {}, 'no look ahead'), (5, {'lookahead': 2}, ''), (5, {'extra_input': 'stream'}, ''),
    (5, {'lookahead': 2, 'type': 'q'}, 'Q-type')])
def test_another_value_network_is_named(workdir: Path, length: int, changes: Row, variant: str) -> None:
    config = json.loads((workdir / 'config.json').read_text())
    config['task']['star_graph']['path_length'] = length
    config['value'].update(changes)
    (workdir / 'config.json').write_text(json.dumps(config))
    assert star_graph_records.read(workdir).variant == variant


def test_the_entry_point_draws_work_directories(
        workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    entry.main(['--figure=star_graph', f'--out={out}', str(workdir)])
    assert sorted(path.name for path in out.iterdir()) == [
        'star_graph.json', 'star_graph.md', 'star_graph.png', 'star_graph.svg']
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert (out / 'star_graph.md').read_text() in printed
    assert [line.split(' | ') for line in printed.splitlines()[:5]] == [
        ['| whole path right, %', 'G(2, 3) |'], ['| ---', '---: |'], ['| a guess of the arm', '50.0 |'],
        ['| reference', '50.0 ± 10.0 |'], ['| REINFORCE', '50.0 ± 10.0 |']]
    assert '| G(2, 3), seed 7 | 200 | 2.00 |\n| together |  | 2.00 |' in printed
    with pytest.raises(SystemExit):
        entry.main(['--figure=star_graph', f'--workdir={workdir}'])
    assert '--figure=star_graph and work directories' in capsys.readouterr().err


def test_the_file_of_a_figure_is_all_that_it_needs(
        workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, root = tmp_path / 'first', tmp_path / 'again', tmp_path / 'root'
    text = star_graph_records.write([workdir], first)
    kept, run_ = first / 'star_graph.json', star_graph_records.read(workdir)
    assert star_graph_records.load(kept) == [run_]
    # What is kept of a run may be named beside it, unless the run has gone on since.
    assert star_graph_records.write([kept, workdir], tmp_path / 'both') == text
    gone_on = tmp_path / 'gone_on.json'
    gone_on.write_text(kept.read_text().replace('"hours": 2.0', '"hours": 3.0'))
    with pytest.raises(ValueError, match='gone_on.json and .* both have a run on G.2, 3. with 200 answers and seed 7'):
        star_graph_records.write([gone_on, workdir], tmp_path / 'both')
    shutil.copyfile(first / 'star_graph.json', tmp_path / 'star_graph_tiny.json')
    assert star_graph_records.write([tmp_path / 'star_graph_tiny.json'], again) == text
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    # Where there is no run, the plan draws the file that is kept.
    monkeypatch.setattr(reproduce, '_RESULTS', tmp_path)
    reproduce_entry.main(['--figure=star_graph', '--size=tiny', f'--root={root}'])
    assert text in capsys.readouterr().out and (root / 'tiny/tables/star_graph.png').exists()


def test_a_file_whose_rows_lack_something_is_refused(workdir: Path, tmp_path: Path) -> None:
    star_graph_records.write([workdir], tmp_path / 'out')
    path = tmp_path / 'out' / 'star_graph.json'
    path.write_text(path.read_text().replace('"pass@1"', '"pass@2"', 1))
    with pytest.raises(ValueError, match='holds no runs on star graphs .a row lacks one of method, answers, pass@1'):
        star_graph_records.load(path)


@pytest.mark.parametrize('content', ['[{"degree": 2}]', '{"degree": 2}', '[', '3'])
def test_files_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'star_graph.json'
    with pytest.raises(ValueError, match='there is no .*star_graph.json: name work directories'):
        star_graph_records.load(path)
    path.write_text(content)
    with pytest.raises(ValueError, match='star_graph.json holds no runs on star graphs .*name work directories'):
        star_graph_records.load(path)


def test_the_plan_of_the_figure_draws_what_there_is(
        workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / 'root'
    reproduce_entry.main(['--figure=star_graph', '--size=tiny', f'--root={root}'])
    printed = capsys.readouterr().out
    assert 'star_graph: to do' in printed and '0 of 1 runs are done.' in printed
    assert not root.exists()
    shutil.copytree(workdir, root / 'tiny' / 'star_graph', ignore=shutil.ignore_patterns('root'))
    reproduce_entry.main(['--figure=star_graph', '--size=tiny', f'--root={root}'])
    assert '| Q♯ | 50.0 ± 10.0 |' in capsys.readouterr().out
    assert (root / 'tiny' / 'tables' / 'star_graph.png').exists()
    with pytest.raises(SystemExit):
        reproduce_entry.main(['--figure=star_graph', '--table=1'])
    assert 'not allowed with argument' in capsys.readouterr().err


def test_runs_of_other_tasks_are_refused(workdir: Path) -> None:
    path = workdir / 'config.json'
    path.write_text(path.read_text().replace('"name": "star_graph"', '"name": "math"'))
    with pytest.raises(ValueError, match="a run of the task 'math'"):
        star_graph_records.read(workdir)
    with pytest.raises(ValueError, match='holds no run'):
        star_graph_records.read(workdir / 'samples')
    assert read_rows(workdir / 'metrics.jsonl')
