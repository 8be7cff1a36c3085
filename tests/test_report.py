"""The report: what it says, that it stands alone, and that nothing from data becomes markup."""
from __future__ import annotations

from html.parser import HTMLParser
import json
import math
from pathlib import Path
from typing import Any

import pytest

from qsharp_jax import config, metrics, report
from qsharp_jax.baseline_runs import PAIRS
from qsharp_jax.baselines import policies
from qsharp_jax.categorical import METHODS
from qsharp_jax.report import html, plots, records, tables

DEFAULT = str(Path(__file__).resolve().parents[1] / 'configs' / 'default.py')
HOSTILE = '<script>alert(1)</script>"\'&'

Row = dict[str, Any]


def result(method: str, iteration: int, eta: float | None, pass1: float, kl: float, **changes: Any) -> Row:
    row: Row = {
        'method': method, 'iteration': iteration, 'eta': eta, 'temperature': 1.0, 'split': 'test', 'pass@1': pass1,
        'pass@1_se': 0.02, 'pass@k': 0.9, 'k': 4, 'maj@k': 0.7, 'kl': kl, 'kl_se': 0.1, 'kl_per_token': kl / 4,
        'truncated': 0.0, 'n_examples': 50, 'n_samples': 4, 'seconds': 1.0, 'commit': 'abc', 'devices': 1,
        'selected': True}
    return {**row, **changes}


def results() -> list[Row]:
    rows = []
    for split, best, top in (('test', 0.1, 0.7), ('validation', 0.2, 0.65)):
        rows += [
            result('reference', 0, math.inf, 0.3, 0.0, split=split),
            result('reference', 0, math.inf, 0.4, 2.0, split=split, temperature=0.0, truncated=0.5),
            result('cd', 1, 0.1, 0.35, 4.0, split=split),
            *(result('qsharp', 2, eta, top if eta == best else 0.6, 0.3 / eta, split=split, selected=eta == 0.2)
              for eta in (0.1, 0.2)),
            result('qsharp', 1, 0.1, 0.5, 3.0, split=split)]
    return rows


def sample(method: str, iteration: int, eta: float, example: int, values: list[float | None]) -> Row:
    return {'method': method, 'iteration': iteration, 'eta': eta, 'temperature': 1.0, 'split': 'test', 'id': example,
            'sample': 0, 'prompt': f'question {example} {HOSTILE}', 'answer_tokens': ['7', HOSTILE, '\n'],
            'values': values, 'reward': float(method == 'qsharp'), 'kl': 0.5, 'truncated': False}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A workdir with one of every file, and hostile text wherever text can come from."""
    loaded = config.load(DEFAULT, [
        ('task.prefix', HOSTILE), ('sampling.max_new_tokens', '8'), ('logging.report_examples', '8')])
    (tmp_path / 'config.json').write_text(config.to_json(loaded))
    metrics.ResultsFile(tmp_path / 'results.jsonl').add(results())
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write('fit_1', step, {'loss': 1 / step, 'heldout_loss': 1.1 / step}, iteration=1)
    writer.close()
    directory = tmp_path / 'samples' / 'test' / 'x'
    directory.mkdir(parents=True)
    rows = [sample(method, iteration, eta, example, values) for example in range(12)
            for method, iteration, eta, values in (
                ('reference', 0, math.inf, [None] * 3), ('qsharp', 2, 0.2, [0.0, 0.5, 1.0]))]
    (directory / 'block_0.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'calibration').mkdir()
    for iteration in (1, 2):
        bins = [{'low': i / 4, 'high': (i + 1) / 4, 'mean_prediction': (i + .5) / 4, 'mean_outcome': (i + .4) / 4,
                 'standard_error': None if i == 1 else .02, 'weight': .25} for i in range(4)]
        (tmp_path / 'calibration' / f'iteration_{iteration}.json').write_text(json.dumps({
            'bins': bins, 'ece': 0.05, 'brier': 0.2, 'auc': 0.8,
            'by_position': [{'position': i, 'loss': 0.6 / (i + 1), 'ece': 0.1, 'auc': [None, 0.7, 0.9][i], 'count': 5}
                            for i in range(3)]}))
    (tmp_path / 'timings.json').write_text(json.dumps({f'collect {HOSTILE}': 90.0, 'fit': 30.0}))
    return tmp_path


class Page(HTMLParser):
    """Elements, outside references, texts and balance of a page."""

    void = {'meta', 'br', 'link', 'img', 'input', 'hr'}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ('src', 'href', 'xlink:href', 'action') and not (value or '').startswith('#'):
                self.outside.append(f'{tag} {name}={value}')
            if name == 'id':
                self.ids.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_stands_alone_and_escapes_everything(workdir: Path) -> None:
    path = report.write(workdir)
    assert path == workdir / 'report.html'
    text = path.read_text()
    page = Page(text)
    assert page.open == [] and 'script' not in page.elements
    assert page.outside == [] and 'url(http' not in text and '@import' not in text
    assert len(page.ids) == len(set(page.ids)), 'ids of the plots clash'
    said = ''.join(page.texts)
    # Prompts, tokens, phases and configuration all show the hostile text as text.
    assert said.count(HOSTILE) >= 4
    assert 'question 0' in said and 'collect' in said and 'task.prefix' in said
    assert 'reference, greedy: 50% of the answers reach the limit of 8 tokens' in said
    assert '70.0' in said and 'Q♯, iteration 2' in said
    assert page.elements.count('figure') == len(list((workdir / 'plots').glob('*.png'))) == 4


def test_the_same_numbers_give_the_same_files(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(workdir)
    before = {path: path.read_bytes() for path in [workdir / 'report.html', *workdir.glob('plots/*')]}
    assert report.print_results(workdir, markdown=True) == workdir / 'report.html'
    assert len(before) == 9 and all(path.read_bytes() == data for path, data in before.items())
    printed = capsys.readouterr().out
    assert '| Q♯, iteration 2 | 0.1 |' in printed and '- At equal KL' in printed
    assert str(workdir / 'report.html') in printed


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(config.to_json(config.default()))
    text = report.write(tmp_path).read_text()
    assert 'No policy has been evaluated' in text and '<figure' not in text


def test_no_run_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='holds no run'):
        report.write(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is no JSON'):
        report.write(tmp_path)


def test_the_headline_uses_the_eta_chosen_on_the_other_split(workdir: Path) -> None:
    """On the test split eta 0.1 is better, but validation chose 0.2: the headline must not pick by the test split."""
    run = records.read(workdir)
    best = html.best_guided(run)
    assert best is not None and (best['eta'], best['pass@1'], best['split']) == (0.2, 0.6, 'test')
    assert [number for _, number, _ in html.headline(run)] == ['30.0 %', '60.0 %', '+30.0', '1.50']


def test_without_a_selection_split_the_configured_eta_is_shown(workdir: Path) -> None:
    loaded = config.load(DEFAULT, [('eval.select_split', ''), ('eta', '0.1')])
    (workdir / 'config.json').write_text(config.to_json(loaded))
    best = html.best_guided(records.read(workdir))
    assert best is not None and best['eta'] == 0.1
    assert 'chosen' not in tables.markdown(results(), 'test', '')


@pytest.mark.parametrize('prompts, expected', [
    (['1 + 1 = 2\n3 + 4 = ', '1 + 1 = 2\n3 + 5 = '], '1 + 1 = 2\n'), (['1 + 1 = 2\n3', '4\n3'], ''), (['a\nb'], ''),
    ([], '')])
def test_what_prompts_share_is_whole_lines(prompts: list[str], expected: str) -> None:
    assert html.beginning(prompts) == expected


def test_the_page_shows_shared_lines_once_and_every_question(workdir: Path) -> None:
    files = list(workdir.glob('samples/*/*/*.jsonl'))
    assert files
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, 'prompt': f'solved example\n{row["prompt"]}'} for row in rows]
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    page = html.write(workdir).read_text()
    assert page.count('solved example') == 1
    assert page.count('question 0 ') == 1


def test_one_answer_a_question_has_no_columns_of_several() -> None:
    rows = [{**row, 'k': 1} for row in results()]
    assert [title for title in tables.table(rows, 'test')[0] if '@' in title] == ['pass@1 %']
    titles = tables.table(results(), 'test')[0]
    assert [title for title in titles if '@' in title] == ['pass@1 %', 'pass@4 %', 'maj@4 %']


def test_questions_show_each_policy_once_and_are_spread(workdir: Path) -> None:
    questions = html.questions(records.read(workdir))
    assert len(questions) == 8
    assert questions[0]['prompt'].startswith('question 0 ') and questions[-1]['prompt'].startswith('question 10 ')
    for question in questions:
        assert [answer['policy'] for answer in question['answers']] == ['reference', 'Q♯, iteration 2, η = 0.2']
        assert [answer['right'] for answer in question['answers']] == [False, True]


def test_colours_of_tokens() -> None:
    """Orange below the middle, blue above, stronger towards the ends, nothing where there is no value."""
    def alpha(colour: str) -> float:
        return float(colour.split(',')[-1].strip(' )'))

    for low, high in ((0.0, 1.0), (-2.0, 2.0)):
        colours = [html._token('x', low + (high - low) * share, low, high)[1] for share in (0, .2, .4, .6, .8, 1)]
        assert all(html._LOW in colour for colour in colours[:3])
        assert all(html._HIGH in colour for colour in colours[3:])
        assert [alpha(colour) for colour in colours] == [alpha(colour) for colour in reversed(colours)]
        assert alpha(colours[0]) > alpha(colours[1]) > alpha(colours[2])
    assert html._token('\n', None, 0, 1) == ('↵', 'transparent', 'not scored')


def test_tables_order_mark_and_round() -> None:
    lines = tables.markdown(results(), 'test', 'validation').splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    assert cells[0] == ['policy', 'η', 'temperature', 'pass@1 %', 'pass@4 %', 'maj@4 %', 'KL, nats', 'KL per token',
                        'truncated %']
    assert [row[0] for row in cells[2:]] == [
        'reference', 'reference, greedy', '**CD, iteration 1**', '**Q♯, iteration 1**', '**Q♯, iteration 2**',
        'Q♯, iteration 2']
    assert cells[-1] == ['Q♯, iteration 2', '0.1', '1', '70.0 ± 2.0', '90.0', '70.0', '3.00 ± 0.10', '0.750', '0.0']
    assert all(len(row) == len(cells[0]) for row in cells)


def test_differences_have_columns_with_their_intervals_where_they_are_known() -> None:
    gains = {'difference_to_reference': 0.247, 'difference_to_reference_se': 0.03, 'difference_to_reference_low': 0.175,
             'difference_to_reference_high': 0.32, 'difference_to_cd': -0.012, 'difference_to_cd_low': -0.02,
             'difference_to_cd_high': -0.004}
    # One question alone has no interval.
    alone = {**gains, 'difference_to_cd': None, 'difference_to_reference_low': None}
    text = tables.markdown([result('reference', 0, None, 0.3, 0.0), result('qsharp', 1, 0.2, 0.5, 2.0, **gains),
                            result('qsharp', 1, 0.1, 0.5, 3.0, **alone)], 'test')
    cells = [[cell.strip() for cell in line.strip('|').split('|')][4:6] for line in text.splitlines()[:5]]
    assert cells == [['over reference', 'over CD'], ['---:', '---:'], ['', ''],
                     ['+24.7 [17.5, 32.0]', '-1.2 [-2.0, -0.4]'], ['+24.7', '']]
    assert '[in brackets] their 95 % intervals' in text and 'brackets' not in tables.markdown(results(), 'test')


def test_the_summary_has_the_table_and_what_it_says(workdir: Path) -> None:
    text = html.summary(workdir)
    assert text.startswith(tables.terminal(results(), 'test', 'validation'))
    assert text.splitlines()[-1].startswith('At equal KL, Q♯, iteration 2 lies')


def test_terminal_table_is_aligned() -> None:
    lines = tables.terminal(results(), 'test', 'validation').splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert [' * ' in line for line in lines[2:-1]] == [False, False, True, True, True, False]


def test_numbers_that_do_not_exist_leave_their_cell_empty() -> None:
    row = result('reference', 0, None, 0.3, 0.0, **{'pass@1_se': None})
    row['kl'] = None
    line = tables.markdown([row, result('qsharp', 1, 0.1, 0.5, 3.0)], 'test').splitlines()[2]
    assert line.startswith('| reference |  | 1 | 30.0 | ') and 'None' not in line
    # The plot leaves such points out.
    assert len(plots.pass1_against_kl([row], 'test').axes[0].containers) == 0


def test_the_eta_is_shown_that_the_run_has_chosen() -> None:
    rows = [result('qsharp', 1, eta, 0.5, 1.0, split='validation', selected=eta == 0.4) for eta in (0.2, 0.4, 0.1)]
    assert tables.chosen_etas(rows, 'validation') == {('qsharp', 1): 0.4}
    # What was evaluated beside the run was no choice of it.
    beside = result('qsharp', 1, 0.7, 0.9, 1.0, split='validation', selected=False)
    assert tables.chosen_etas([*rows, beside], 'validation') == {('qsharp', 1): 0.4}


def test_rows_of_other_sizes_say_so_and_have_no_numbers_of_another_k() -> None:
    same = [result('reference', 0, None, 0.3, 0.0), result('qsharp', 1, 0.1, 0.5, 3.0)]
    titles, cells = tables.table(same, 'test')
    assert 'questions, answers each' not in titles and '50 questions, 4 answers each' in tables.caption(same, 'test')
    other = result('qsharp', 1, 0.3, 0.4, 1.0, k=1, n_examples=5, n_samples=1)
    titles, cells = tables.table([*same, other], 'test')
    by_title = [dict(zip(titles, line)) for line in cells]
    found = {line['η']: (line['pass@4 %'], line['maj@4 %'], line['questions, answers each']) for line in by_title}
    assert found == {'': ('90.0', '70.0', '50, 4'), '0.1': ('90.0', '70.0', '50, 4'), '0.3': ('', '', '5, 1')}
    assert 'not all of one size' in tables.caption([*same, other], 'test')


def test_every_method_has_a_name_a_look_and_a_place() -> None:
    names = [*policies.METHODS, 'reference', *(method + ending for method in METHODS for ending in ('', PAIRS))]
    rows = [result(name, 1, 0.1, 0.5, 1.0) for name in names]
    assert len(tables.table(rows, 'test')[1]) == len(names)
    assert len({plots.look(name) for name in names}) == len(names)
    assert {row['method'] for row in rows if tables.has_eta(row)} == {
        method + ending for method in ('qsharp', 'cd', 'vas') for ending in ('', PAIRS)}


def test_frontier_says_plainly_where_guidance_does_not_lead() -> None:
    base = [result('reference', 0, None, pass1, kl, temperature=temperature)
            for pass1, kl, temperature in ((0.3, 0.0, 1.0), (0.5, 2.0, 0.5), (0.45, 3.0, 0.0))]

    # The sharpened reference reaches 0.4 at KL 1 (by interpolation). It ends at KL 3 with less than its best, 0.5.
    def said(*points: tuple[float, float, float]) -> list[str]:
        return tables.frontier([*base, *(result('qsharp', 1, eta, p, kl) for eta, p, kl in points)], 'test')

    assert said((0.1, 0.41, 1.0), (0.05, 0.51, 9.0)) == [
        'At equal KL, Q♯, iteration 1 lies on or above the sharpened reference at every η (point estimates).']
    assert said((0.1, 0.39, 1.0), (0.05, 0.51, 9.0)) == [
        'At equal KL, Q♯, iteration 1 lies on or above the sharpened reference except at η = 0.1 (point estimates).']
    assert said((0.1, 0.39, 1.0), (0.05, 0.49, 9.0)) == [
        'At equal KL, Q♯, iteration 1 lies below the sharpened reference at every η (point estimates).']
    assert tables.frontier(base, 'test') == []


def test_points_of_the_plot_are_the_results() -> None:
    axes = plots.pass1_against_kl(results(), 'test').axes[0]
    drawn = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes.containers}
    assert drawn['Q♯, iteration 2'] == [pytest.approx(point) for point in ([1.5, 60.0], [3.0, 70.0])]
    assert set(drawn) == {'reference', 'CD, iteration 1', 'Q♯, iteration 1', 'Q♯, iteration 2'}
    colours = [container.lines[0].get_color() for container in axes.containers]
    assert len(set(colours)) == len(colours)


def test_quality_by_position_leaves_out_what_a_position_has_not(workdir):
    run = records.read(workdir)
    figure = plots.draw(run)['by_position']
    panels = {ax.get_title('left'): [line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes}
    assert panels['AUC'] == [[[1, 0.7], [2, 0.9]]] * 2
    assert panels['Held-out loss'][0] == [[0, 0.6], [1, 0.3], [2, pytest.approx(0.2)]]
    assert panels['Calibration error'][1] == [[0, 0.1], [1, 0.1], [2, 0.1]]
