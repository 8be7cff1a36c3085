"""The paper's setting of star graphs: files of the published generator, and a published model pre-trained on them."""
from __future__ import annotations

import json
import logging
from pathlib import Path
import random
from typing import Any

import jax
import numpy as np
import pytest

from qsharp_jax import config as config_lib
from qsharp_jax import experiment, export, plans, reproduce, sharding, star_graph_records, train
from qsharp_jax.data import builders, star_graph_files
from qsharp_jax.data.star_graph import StarGraphConfig
from qsharp_jax.data.star_graph_text import parse_question, right_path
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.pretrained import export as writing
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.report import star_graph_figure
from tests import small_tokenizers, tiny

CONTENT = json.loads(small_tokenizers.trained('gpt2'))
GPT2 = TransformerConfig(
    vocab_size=len(CONTENT['model']['vocab']) + 1, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=64,
    max_positions=160, norm='layernorm', positions='learned', activation='gelu_tanh', gated=False, qkv_bias=True,
    out_bias=True, mlp_bias=True, tied_embeddings=True)


pytestmark = pytest.mark.usefixtures('one_device')


def lines(count: int, degree: int, length: int, num_nodes: int, seed: int) -> list[str]:
    """Graphs as the published generator draws them: distinct nodes, the goal at the end of one arm, edges shuffled."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        nodes = source.sample(range(num_nodes), 1 + degree * (length - 1))
        arms = [[nodes[0], *nodes[1 + i * (length - 1):1 + (i + 1) * (length - 1)]] for i in range(degree)]
        edges = [edge for arm in arms for edge in zip(arm, arm[1:])]
        source.shuffle(edges)
        found.append('|'.join(f'{a},{b}' for a, b in edges) + f'/{nodes[0]},{arms[0][-1]}='
                     + ','.join(map(str, arms[0])))
    return found


def files(folder: Path, **texts: list[str]) -> dict[str, str]:
    for name, text in texts.items():
        (folder / f'{name}.txt').write_text(''.join(f'{line}\n' for line in text))
    return {f'{name}_file': str(folder / f'{name}.txt') for name in texts}


def test_splits_are_read_from_published_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test, pretrain, train_ = lines(5, 2, 4, 50, 0), lines(6, 2, 4, 50, 1), lines(9, 2, 4, 50, 2)
    edges, rest = train_[8].split('/')
    again = '|'.join(reversed(edges.split('|'))) + '/' + rest  # the last of train, which is validation's
    config = StarGraphConfig(
        degree=2, path_length=4, pretrain_examples=6, train_examples=6, validation_examples=2, test_examples=4,
        **files(tmp_path, test=test, pretrain=[*pretrain, test[0], again], train=[pretrain[3], *train_]))
    with caplog.at_level(logging.WARNING):
        found = {split: [record['question'] + record['answer'] for record in builders.read(config, split, tmp_path)]
                 for split in ('pretrain', 'train', 'validation', 'test')}
    assert found == {'test': test[:4], 'validation': train_[7:], 'pretrain': pretrain, 'train': train_[:6]}
    assert '2 graphs are left out of pretrain' in caplog.text and '1 graphs are left out of train' in caplog.text
    # Another file makes other records, under another name.
    (tmp_path / 'test.txt').write_text('\n'.join(lines(5, 2, 4, 50, 3)))
    changed = StarGraphConfig(**{name: getattr(config, name) for name in (
        'degree', 'path_length', 'pretrain_examples', 'train_examples', 'validation_examples', 'test_examples',
        'pretrain_file', 'train_file', 'test_file')})
    assert changed.name != config.name


@pytest.mark.parametrize('line, words', [
    ('1,2|2,3|1,4|4,5/1,3=1,2,5', 'line 2 is no star graph with its path: .1,2,5. is no path from 1 to 3'),
    ('1,2|2,3|1,4|4,5/1,3=1,4,3', 'is no path'), ('1,2|2,3/1,3=', 'line 2 is no star graph'),
    ('1,2|2,3', 'line 2 is no star graph'), ('', 'line 2 is no star graph'),
    ('-1,2|2,3|-1,4|4,5/-1,3=-1,2,3', 'it has the node -1, and names are 0 or more'),
    ('1,2|2,3|1,4|4,5|1,6|6,7/1,3=1,2,3', r'it is of G\(3, 3\), and task.star_graph.degree and .* say G\(2, 3\)'),
    ('1,2|2,3|3,8|1,4|4,5|5,9/1,8=1,2,3,8', r'it is of G\(2, 4\), and'),
    ('1,2|2,3|1,4|4,20/1,3=1,2,3', 'it has the node 20, and task.star_graph.num_nodes is 20: set 21 or more'),
    ('1,2|2,3|3,1|1,4|4,5/1,3=1,2,3', 'no arms of one length'), ('1,2|2,3|1,4/1,3=1,2,3', 'no arms of one length'),
    ('1,2|2,3|1,2|2,3/1,3=1,2,3', 'no arms of one length'), ('1,2|2,3|6,4|4,5/1,3=1,2,3', 'no arms of one length'),
    ('1,2|2,3|1,4|4,5/1,1=1', 'is no path from 1 to 1'), ('1,2|2,3|1,4|4,3/1,3=1,2,3', 'no arms of one length'),
    *((line, 'not written as 0, 1, 2') for line in (
        '1,2|2,3|1,4|4,5/1,3=1,+2,3', '1,2|2,3|1,4|4,05/1,3=1,2,3', '1,2|2,3|1,4|4,٥/1,3=1,2,3',
        '1,2|2,3|1,4|4,1_0/1,3=1,2,3'))])
def test_a_line_that_is_no_graph_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / 'a.txt').write_text(f'{lines(1, 2, 3, 20, 0)[0]}\n{line}\n1')
    with pytest.raises(ValueError, match=words):
        star_graph_files.read(str(tmp_path / 'a.txt'), star_graph_files.Shape(2, 3, 20))


def test_marks_and_blanks_around_the_lines_do_no_harm(tmp_path: Path) -> None:
    text, shape = lines(3, 2, 3, 20, 0), star_graph_files.Shape(2, 3, 20)
    for content in ('\ufeff' + '\r\n'.join(text) + '\r\n\r\n', '\n'.join(text), ' \n'.join(text) + '\n\n'):
        (tmp_path / 'a.txt').write_bytes(content.encode())
        assert [''.join(one) for one in star_graph_files.read(str(tmp_path / 'a.txt'), shape)] == text
    (tmp_path / 'a.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match='a.txt is no UTF-8: invalid start byte at byte 0'):
        star_graph_files.read(str(tmp_path / 'a.txt'), shape)


def test_files_that_are_missing_or_too_small_are_refused(tmp_path: Path) -> None:
    given = files(tmp_path, test=lines(3, 2, 3, 20, 0), pretrain=lines(3, 2, 3, 20, 1), train=lines(3, 2, 3, 20, 2))
    with pytest.raises(ValueError, match='give all of them or none'):
        StarGraphConfig(train_file=given['train_file'])
    with pytest.raises(ValueError, match='there is no file'):
        StarGraphConfig(**{**given, 'test_file': str(tmp_path / 'absent.txt')})
    config = StarGraphConfig(**given, path_length=3, pretrain_examples=3, train_examples=3, validation_examples=1,
                             test_examples=3)
    with pytest.raises(ValueError, match='train.txt has 2 graphs that no other split has, and 3 are asked of it: .*'
                                         'lower task.star_graph.train_examples'):
        builders.read(config, 'train', tmp_path)


def test_our_graphs_are_distributed_as_the_published_ones(tmp_path: Path) -> None:
    """Same format, and the same shares of where the right first edge stands and of what names it has."""
    sizes = {'pretrain_examples': 4000, 'train_examples': 10, 'validation_examples': 10, 'test_examples': 10}
    records = builders.read(StarGraphConfig(degree=3, path_length=3, num_nodes=20, **sizes), 'pretrain', tmp_path)
    ours = [record['question'] + record['answer'] for record in records]

    def places(texts: list[str]) -> np.ndarray:
        """Place of the first step's edge among the edges, and its node.  # [6 + 20]"""
        counts = np.zeros(26)
        for text in texts:
            question = text[:text.index('=') + 1]
            path = right_path(question)
            assert text == question + ','.join(map(str, path))
            counts[parse_question(question)[0].index((path[0], path[1]))] += 1
            counts[6 + path[1]] += 1
        return counts

    one, other = places(ours), places(lines(4000, 3, 3, 20, 0))
    assert len(ours) == len(set(ours)) == 4000
    # Chi-squared of two samples, with 5 + 19 degrees of freedom: above 52 once in a thousand times.
    assert np.sum((one - other) ** 2 / (one + other)) < 52


def published(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape) + (leaf.ndim == 1)).astype(np.float32),
                          transformer.param_shapes(GPT2))
    writing.write_model(folder, GPT2, params)
    return small_tokenizers.write(folder, 'gpt2')


def config_of(data: Path, folder: Path, **changes: Any) -> Any:
    return config_lib.load(f'{tiny.ROOT}/configs/star_graph.py:paper', list(tiny.overrides(data, **{
        'reference.pretrain.start': folder, 'reference.pretrain.random_arm_share': 0, 'value.source': folder,
        'task.max_prompt_tokens': 80, 'sampling.max_new_tokens': 14, 'task.star_graph.path_length': 3,
        'reference.dtype': 'float32', 'value.dtype': 'float32', 'baselines.methods': 'dpo',
        'baselines.value_on_pairs': False, 'baselines.right': 'sampled', 'baselines.batch_size': 8,
        'baselines.epochs': 1, 'iterations': 1, 'eval.methods': 'qsharp', 'eval.select_split': '', 'eval.etas': '0.1',
        'baselines.dpo.learning_rates': '1e-4', 'fit.learning_rate_factors': '1.0', 'baselines.curve_examples': 0,
        **changes}).items()))


def test_a_published_model_is_where_pretraining_starts(tmp_path: Path) -> None:
    folder = published(tmp_path / 'gpt2')
    file = pretrained.open_checkpoint(folder)
    given = pretrained.load_params(file)

    def reference(workdir: Path, **changes: Any) -> experiment.Experiment:
        config = config_of(tmp_path / 'data', folder, **changes)
        train.prepare(config, workdir)
        return experiment.load(experiment.outline(config, workdir))

    parts = reference(tmp_path / 'still', **{'reference.pretrain.learning_rate': 1e-30})
    assert parts.reference_config.positions == 'learned' and parts.reference_config.layers == 1
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(parts.reference_params), given)
    assert parts.tokenizer.decode(parts.prompts('train').tokens[0]) == parts.prompts('train').texts[0]
    moved = reference(tmp_path / 'moved', **{'reference.pretrain.learning_rate': 1e-2})
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(sharding.to_host(moved.reference_params)),
                                              jax.tree.leaves(given)))
    # The values start from the model as it was published.
    trunk = sharding.to_host(moved.init_value_params())['trunk']
    np.testing.assert_array_equal(trunk['layers_0']['mlp']['up']['kernel'], given['layers_0']['mlp']['up']['kernel'])
    # Other weights to start from are another reference, whatever the folder is called.
    published(folder, seed=1)
    assert reference(tmp_path / 'other', **{'reference.pretrain.learning_rate': 1e-2}).reference_digest != (
        moved.reference_digest)


def test_a_task_without_texts_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / 'data', published(tmp_path / 'gpt2'), **{
        'task.name': 'arithmetic', 'reward': 'arithmetic'})
    with pytest.raises(ValueError, match="'pretrain' needs a task with a corpus"):
        experiment.outline(config, tmp_path)


@pytest.mark.slow
@pytest.mark.whole
def test_the_papers_run_in_small(tmp_path: Path) -> None:
    folder, workdir = published(tmp_path / 'gpt2'), tmp_path / 'run'
    config = config_of(tmp_path / 'data', folder, **{'baselines.methods': 'dpo', 'baselines.value_on_pairs': True})
    report = train.run(config, workdir)
    assert not reproduce.Planned(plans.Job('run', ''), workdir, config, (), None).missing
    rows = read_rows(workdir / 'results.jsonl')
    assert {row['method'] for row in rows} == {'reference', 'qsharp', 'qsharp_pairs', 'dpo'}
    assert report is not None and 'DPO' in report.read_text() and 'Q♯ on pairs' in report.read_text()
    # The network beside is fitted to the pairs, of which half are right, and not to the roll-outs.
    labels = [np.load(path) for path in sorted((workdir / 'pairs/dataset/labels').rglob('*.npy'))]
    assert labels and all((one.reshape(-1, 2) == [1, 0]).all() for one in labels)
    star_graph_figure.draw([star_graph_records.read(workdir)])
    made = {path.name: path for path in export.run(workdir, tmp_path / 'out')}
    assert made.keys() == {'reference', 'value', 'policy_dpo'}
    assert pretrained.open_checkpoint(made['policy_dpo']).config == pretrained.open_checkpoint(folder).config
    assert (made['policy_dpo'] / 'tokenizer.json').exists()
