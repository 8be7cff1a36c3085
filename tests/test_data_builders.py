"""The tasks' TFDS builders: right answers, disjoint splits, exact shares, files found by what they hold."""
from __future__ import annotations

import collections
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from qsharp_jax.data import arithmetic, builders, star_graph, tokenizers
from qsharp_jax.data.arithmetic import ArithmeticConfig
from qsharp_jax.data.star_graph import StarGraphConfig
from qsharp_jax.data.star_graph_text import parse_question, right_path

SIZES = {'train_examples': 40, 'validation_examples': 10, 'test_examples': 20}
GRAPHS = {'pretrain_examples': 60, **SIZES}


def graph_of(question: str) -> frozenset[str]:
    return frozenset(question.split('/')[0].split('|'))


def test_arithmetic_records_are_right_and_in_the_order_of_their_ids(tmp_path):
    config = ArithmeticConfig(operations=('+', '-', '*'), two_digit_share=0.5, **SIZES)
    first = 0
    for split, size in (('train', 40), ('validation', 10), ('test', 20)):
        records = builders.read(config, split, tmp_path)
        assert [record['id'] for record in records] == list(range(first, first + size))
        first += size
        assert len({record['question'] for record in records}) == size
        assert sum(record['digits'] >= 2 for record in records) == size // 2
        for record in records:
            a, b = map(int, record['question'].split(record['operation']))
            assert record['answer'] == str({'+': a + b, '-': a - b, '*': a * b}[record['operation']])
            assert not record['answer'].startswith('-')
            assert record['digits'] == min(len(str(a)), len(str(b)))


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_arithmetic_shares_are_exact(share):
    config = ArithmeticConfig(operations=('+', '*'), two_digit_share=share, **SIZES)
    for split, chosen in arithmetic.problems(config).items():
        size = SIZES[f'{split}_examples']
        assert len(chosen) == size
        assert sum(min(a, b) >= 10 for a, _, b in chosen) == round(size * share)
        assert abs(sum(operation == '+' for _, operation, _ in chosen) - size / 2) <= 1


def test_arithmetic_splits_share_nothing_up_to_the_order_of_operands_whatever_seed_and_sizes():
    held_out = set()
    trained = set()
    for seed, sizes in itertools.product(range(3), (SIZES, {**SIZES, 'train_examples': 400, 'test_examples': 100})):
        for split, chosen in arithmetic.problems(ArithmeticConfig(seed=seed, **sizes)).items():
            seen = {(min(a, b), max(a, b)) for a, _, b in chosen}
            if split == 'train':
                trained |= seen
            else:
                held_out |= seen
    assert trained and held_out and not trained & held_out


def test_arithmetic_both_orders_of_the_operands_are_asked():
    chosen = arithmetic.problems(ArithmeticConfig(**SIZES))['train']
    assert any(a > b for a, _, b in chosen) and any(a < b for a, _, b in chosen)


def test_arithmetic_split_can_take_all_there_is_and_no_more():
    exist = {True: 0, False: 0}
    for a, b in itertools.product(range(21), repeat=2):
        split = builders.split_of(arithmetic.canonical(a, '*', b), arithmetic.FRACTIONS)
        exist[min(a, b) >= 10] += split == 'test'
    both = {'operations': ('*',), 'max_operand': 20, 'train_examples': 1, 'validation_examples': 1}
    for share, kind in ((1, True), (0, False)):
        config = ArithmeticConfig(two_digit_share=share, test_examples=exist[kind], **both)
        assert len(arithmetic.problems(config)['test']) == exist[kind] > 0
        config = ArithmeticConfig(two_digit_share=share, test_examples=exist[kind] + 1, **both)
        with pytest.raises(ValueError, match=f'test split .* asks for {exist[kind] + 1} .* but {exist[kind]} exist'):
            arithmetic.problems(config)


def test_too_large_a_split_is_refused_in_the_same_words_by_the_builder(tmp_path):
    config = ArithmeticConfig(max_operand=12, two_digit_share=0, train_examples=5000)
    with pytest.raises(ValueError, match='lower train_examples'):
        builders.read(config, 'train', tmp_path)


@pytest.mark.parametrize('change, words', [
    ({'operations': ('/',)}, "name one or more of"), ({'operations': ()}, 'name one or more of'),
    ({'operations': ('+', '+')}, 'each once'), ({'max_operand': 0}, 'max_operand is 0'),
    ({'max_operand': 1000}, '1 .. 999'), ({'two_digit_share': 1.5}, '0 to 1')])
def test_arithmetic_refuses_parameters(change, words):
    with pytest.raises(ValueError, match=words):
        ArithmeticConfig(**change)


def test_star_graph_records(tmp_path):
    config = StarGraphConfig(degree=3, path_length=4, num_nodes=30, **GRAPHS)
    ids, graphs = [], {}
    for split in ('pretrain', 'train', 'validation', 'test'):
        records = builders.read(config, split, tmp_path)
        assert len(records) == GRAPHS[f'{split}_examples']
        ids += [record['id'] for record in records]
        graphs[split] = {graph_of(record['question']) for record in records}
        for record in records:
            question, answer = record['question'], record['answer']
            assert re.fullmatch(r'\d+,\d+(\|\d+,\d+){8}/\d+,\d+=', question)
            nodes = re.findall(r'\d+', question.split('/')[0])
            assert len(set(nodes)) == 10 and all(int(node) < 30 for node in nodes)
            path = answer.split(',')
            start, goal = question.split('/')[1].rstrip('=').split(',')
            assert len(path) == 4 and path[0] == start and path[-1] == goal
            assert {f'{a},{b}' for a, b in itertools.pairwise(path)} <= graph_of(question)
    assert sorted(ids) == list(range(len(ids)))
    for one, other in itertools.combinations(graphs.values(), 2):
        assert not one & other


def test_star_graph_splits_share_no_graph_where_draws_often_repeat():
    config = StarGraphConfig(path_length=3, num_nodes=14, pretrain_examples=3000, train_examples=3000,
                             validation_examples=500, test_examples=2000)
    graphs = [{star.graph() for star in stars} for stars in star_graph.problems(config).values()]
    for one, other in itertools.combinations(graphs, 2):
        assert not one & other


def test_random_paths_are_arms_and_take_each_alike():
    question, rng = '1,2|7,3|3,9|7,1|7,5|5,4/7,9=', np.random.default_rng(0)
    counts = collections.Counter(star_graph.random_path(question, rng) for _ in range(600))
    assert set(counts) == {'7,1,2', '7,3,9', '7,5,4'} and min(counts.values()) > 150


def test_a_smaller_graph_has_some_of_the_arms_and_their_first_edges():
    question, rng = '1,2|7,3|3,9|7,1|2,6|7,5|5,4|4,8|9,0/7,0=', np.random.default_rng(0)
    arms = [[7, 1, 2, 6], [7, 3, 9, 0], [7, 5, 4, 8]]
    drawn = collections.Counter(star_graph.smaller(question, 2, 3, rng) for _ in range(600))
    assert len(drawn) == 3 * 2 and min(drawn.values()) > 60  # two of three arms, and either of them right
    for text, answer in drawn:
        edges, start, goal = parse_question(text)
        path = right_path(text)
        assert start == 7 and len(edges) == 4 and answer == ','.join(map(str, path))
        assert path in [arm[:3] for arm in arms] and path[-1] == goal
        places = [parse_question(question)[0].index(edge) for edge in edges]
        assert places == sorted(places)
    whole, answer = star_graph.smaller(question, 5, 9, rng)  # nothing to cut
    assert whole.split('/')[0] == question.split('/')[0] and [*map(int, answer.split(','))] in arms


def test_star_graph_texts_are_made_of_its_vocabulary(tmp_path):
    config = StarGraphConfig(path_length=3, num_nodes=20, **GRAPHS)
    tokenizer = tokenizers.from_vocabulary(*star_graph.vocabulary(20))
    for record in builders.read(config, 'train', tmp_path):
        text = record['question'] + record['answer']
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == 4 * 2 + 3 + 4 + 3 and not {*ids} & tokenizer.eos_ids
    assert tokenizer.vocab_size == 24


def test_star_graph_hides_the_right_arm():
    """Neither the place of an edge in the question nor the size of its nodes tells the arm of the goal."""
    config = StarGraphConfig(degree=2, path_length=3, num_nodes=20, pretrain_examples=1, train_examples=2000,
                             validation_examples=1, test_examples=1)
    first = smaller = 0
    rng = np.random.default_rng(0)
    for star in star_graph.problems(config)['train']:
        edges = [star.edges()[i] for i in rng.permutation(4)]
        firsts = [b for a, b in edges if a == star.centre]
        first += firsts[0] == star.arms[0][0]
        smaller += star.arms[0][0] < star.arms[1][0]
    assert abs(first / 2000 - 0.5) < 0.05 and abs(smaller / 2000 - 0.5) < 0.05


def test_star_graph_questions_shuffle_their_edges(tmp_path):
    records = builders.read(StarGraphConfig(path_length=3, num_nodes=20, **GRAPHS), 'pretrain', tmp_path)
    place = [record['question'].split('/')[0].split('|').index(','.join(record['answer'].split(',')[:2]))
             for record in records]
    assert set(place) == {0, 1, 2, 3}


@pytest.mark.parametrize('degree, path_length, num_nodes', [(2, 2, 5), (2, 3, 6), (3, 2, 5), (1, 3, 4)])
def test_distinct_graphs_counts_what_listing_finds(degree, path_length, num_nodes):
    size = 1 + degree * (path_length - 1)
    stars = [star_graph.Star.from_nodes(nodes, degree) for nodes in itertools.permutations(range(num_nodes), size)]
    graphs = {frozenset(star.edges()) for star in stars}
    assert star_graph.distinct_graphs(degree, path_length, num_nodes) == len(graphs)
    assert len({star.graph() for star in stars}) == len(graphs)
    assert len(set(stars)) == degree * len(graphs)


def test_small_star_graph_splits_can_take_all_there_is_and_no_more():
    few = {'degree': 2, 'path_length': 2, 'num_nodes': 5, 'pretrain_examples': 1, 'train_examples': 1,
           'validation_examples': 1}
    graphs = {star.graph() for nodes in itertools.permutations(range(5), 3)
              for star in [star_graph.Star.from_nodes(nodes, 2)]}
    exist = 2 * sum(builders.split_of(graph, star_graph.FRACTIONS) == 'test' for graph in graphs)
    problems = star_graph.problems(StarGraphConfig(test_examples=exist, **few))['test']
    assert len(set(problems)) == exist > 0
    with pytest.raises(ValueError, match=f'asks for {exist + 1} problems, but {exist} exist'):
        star_graph.problems(StarGraphConfig(test_examples=exist + 1, **few))


def test_large_star_graph_splits_refuse_what_does_not_exist():
    assert star_graph.distinct_graphs(2, 3, 12) == 12 * 11 * 10 * 9 * 8 // 2
    with pytest.raises(ValueError, match='asks for 200000 problems, but about .* exist in G'):
        star_graph.problems(StarGraphConfig(path_length=3, num_nodes=20, train_examples=10, pretrain_examples=10,
                                            validation_examples=200_000, test_examples=1))


@pytest.mark.parametrize('change, words', [
    ({'num_nodes': 8}, 'has 9 nodes'), ({'degree': 0}, 'at least 1 arm'), ({'path_length': 1}, 'at least 2 nodes')])
def test_star_graph_refuses_parameters(change, words):
    with pytest.raises(ValueError, match=words):
        StarGraphConfig(**change)


@pytest.mark.parametrize('config, other', [
    (ArithmeticConfig(**SIZES), {'seed': 1}), (ArithmeticConfig(**SIZES), {'train_examples': 41}),
    (ArithmeticConfig(**SIZES), {'operations': ('*',)}),
    (StarGraphConfig(path_length=3, num_nodes=20, **GRAPHS), {'num_nodes': 21})])
def test_files_are_found_again_by_equal_parameters_and_by_no_other(tmp_path, config, other):
    given = {field: getattr(config, field) for field in type(config).__dataclass_fields__
             if field in type(config).__annotations__ and field != 'name'}
    records = builders.read(config, 'train', tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.array_record*')}
    assert builders.read(type(config)(**given), 'train', tmp_path) == records
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.array_record*')} == written
    assert builders.read(type(config)(**{**given, **other}), 'train', tmp_path) != records


def test_two_processes_may_generate_the_same_records_at_once(tmp_path, monkeypatch):
    config, drawn = ArithmeticConfig(**SIZES), []
    original = arithmetic.problems

    def overtaken(given):
        if not drawn:
            drawn.append(original(given))
            assert len(builders.read(ArithmeticConfig(**SIZES), 'train', tmp_path)) == 40
        return original(given)

    monkeypatch.setattr(arithmetic, 'problems', overtaken)
    assert len(builders.read(config, 'train', tmp_path)) == 40
    assert not list(tmp_path.rglob('*incomplete*'))


def test_a_full_disk_is_no_such_case(tmp_path, monkeypatch):
    def full(config):
        raise OSError('no space left')

    monkeypatch.setattr(arithmetic, 'problems', full)
    with pytest.raises(OSError, match='no space left'):
        builders.read(ArithmeticConfig(**SIZES), 'train', tmp_path)


def test_a_revision_of_the_generator_has_files_of_its_own():
    assert builders.config_name(ArithmeticConfig(), 1) != builders.config_name(ArithmeticConfig(), 2)


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev' .* train"):
        builders.read(ArithmeticConfig(**SIZES), 'dev', tmp_path)


def test_split_shares_are_as_said():
    fractions = {'a': 0.5, 'b': 0.2, 'c': 0.3}
    counts = dict.fromkeys(fractions, 0)
    for number in range(4000):
        counts[builders.split_of(f'problem {number}', fractions)] += 1
    for name, fraction in fractions.items():
        assert abs(counts[name] / 4000 - fraction) < 0.03


def test_builders_are_quiet_and_need_no_tensorflow(tmp_path):
    script = (
        'import sys\n'
        'from qsharp_jax.data import arithmetic, builders\n'
        'config = arithmetic.ArithmeticConfig(train_examples=5, validation_examples=1, test_examples=1)\n'
        'assert len(builders.read(config, "train", sys.argv[1])) == 5\n'
        'assert "tensorflow" not in sys.modules\n')
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
