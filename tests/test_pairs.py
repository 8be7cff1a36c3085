"""Two checkpoints at work together: the one is the reference, the other becomes the value network."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from experiments import export as entry
from qsharp_jax import checkpoint
from qsharp_jax import config as config_lib
from qsharp_jax import experiment, export, references, sharding, train
from qsharp_jax.data import tokenizers
from qsharp_jax.metrics import read_rows
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.pretrained import export as writing
from qsharp_jax.models.pretrained import safetensors
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Params
from tests import small_tokenizers, tiny

pytestmark = pytest.mark.usefixtures('one_device')

ROOT = Path(__file__).resolve().parents[1]
CONTENT = json.loads(small_tokenizers.trained('llama3'))
IDS = len(CONTENT['model']['vocab']) + len(CONTENT['added_tokens'])
# The rows of both are padded, each to another number.
REFERENCE = TransformerConfig(
    vocab_size=IDS + 27, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=24, max_positions=256)
VALUE = dataclasses.replace(
    REFERENCE, vocab_size=IDS + 3, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, qk_norm=True,
    tied_embeddings=False, max_positions=200)

OVERRIDES: dict[str, Any] = {
    'iterations': 1, 'task.chat': True, 'task.prefix': '', 'task.stop': '()', 'task.max_prompt_tokens': 128,
    'task.arithmetic.train_examples': 16, 'task.arithmetic.validation_examples': 4, 'task.arithmetic.test_examples': 4,
    'collect.examples': 0, 'collect.samples': 2, 'collect.block_examples': 8, 'collect.batch_rows': 16,
    'value.init': 'pretrained', 'value.layers': 0, 'guidance.candidates': 5, 'guidance.outside': 'min',
    'eta': 0.1, 'fit.warmup_steps': 1,
    'fit.samples_per_row': 1, 'fit.frozen_layers': 0, 'fit.heldout_fraction': 0.2, 'eval.samples': 2, 'eval.maj_k': 2,
    'eval.etas': '0.1', 'eval.batch_rows': 8, 'eval.block_examples': 4, 'eval.reference_temperatures': '0.0',
    'eval.methods': 'qsharp', 'sampling.max_new_tokens': 6,
    'reward': str(ROOT / 'tests' / 'tiny_reward.py') + ':starts_low',
}


def random_params(config: TransformerConfig, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 1)).astype(np.float32),
        transformer.param_shapes(config))
    # The rows behind the tokenizer would be most probable of all.
    params['embedding' if config.tied_embeddings else 'head'][IDS:] *= 50
    return params


def write(folder: Path, config: TransformerConfig, seed: int, content: str | None = None) -> Path:
    writing.write_model(folder, config, random_params(config, seed))
    return small_tokenizers.write(folder, 'llama3', eos_ids=[3, 5], content=content)


def renamed(old: str, new: str) -> str:
    return small_tokenizers.trained('llama3').replace(json.dumps(old), json.dumps(new))


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reference beside a value checkpoint that calls a reserved token otherwise, as Llama 3 and 3.2."""
    root = tmp_path_factory.mktemp('pair')
    return (write(root / 'reference', REFERENCE, 0),
            write(root / 'value', VALUE, 1, renamed('<|reserved_special_token_0|>', '<|step_id|>')))


def config_of(folders: tuple[Path, Path], tmp_path: Path, **changes: Any) -> ml_collections.ConfigDict:
    sources = {'reference.source': folders[0], 'value.source': folders[1]}
    given = {**OVERRIDES, **sources, 'task.data_dir': tmp_path / 'data',
             **{key.replace('__', '.'): value for key, value in changes.items()}}
    return config_lib.load(str(ROOT / 'configs' / 'arithmetic.py') + ':tiny',
                           [(key, str(value)) for key, value in given.items()])


def loaded(folders: tuple[Path, Path], tmp_path: Path, **changes: Any) -> experiment.Experiment:
    return experiment.load(experiment.outline(config_of(folders, tmp_path, **changes), tmp_path / 'run'))


def refused(words: str, folders: tuple[Path, Path], tmp_path: Path, **changes: Any) -> None:
    with pytest.raises(ValueError, match=words):
        loaded(folders, tmp_path, **changes)


@pytest.mark.filterwarnings('ignore:the tokenizers of reference and value.source differ in 1 special')
@pytest.mark.parametrize('changes', [
    {}, {'value__init': 'truncate', 'value__layers': 1}, {'value__init': 'scratch', 'value__layers': 3},
    {'value__type': 'q', 'value__head_init': 'lm_head'}])
def test_value_network_starts_from_its_own_checkpoint(
        folders: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = loaded(folders, tmp_path, **changes)
    params, base = parts.init_value_params(), random_params(VALUE, 1)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, parts.value_target)
    layers = changes.get('value__layers', 2)
    assert [name for name in sorted(params['trunk']) if name.startswith('layers')] == [
        f'layers_{index}' for index in range(layers)]
    copied = changes.get('value__init') != 'scratch'
    for name in set(base) & set(params['trunk']):
        same = jax.tree.map(np.array_equal, params['trunk'][name], base[name])
        assert all(jax.tree.leaves(same)) == (copied or name == 'none'), name
    if 'value__head_init' in changes:
        assert np.array_equal(params['head']['kernel'][:, 0], base['head'])
    again = parts.init_value_params()
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_special_tokens_that_nothing_uses_may_differ_with_a_warning(
        folders: tuple[Path, Path], tmp_path: Path) -> None:
    place = tokenizers.from_folder(folders[0]).single_token('<|reserved_special_token_0|>')
    with pytest.warns(UserWarning, match=f"differ in 1 special tokens.*: {place} .'<|reserved_special_token_0|>'"):
        loaded(folders, tmp_path)


@pytest.mark.parametrize('token, words', [
    ('<|start_header_id|>', 'which prompts hold'), ('<|eot_id|>', 'which ends an answer')])
def test_other_special_tokens_are_refused_by_id(
        folders: tuple[Path, Path], tmp_path: Path, token: str, words: str) -> None:
    place = tokenizers.from_folder(folders[0]).single_token(token)
    other = write(tmp_path / 'other', VALUE, 1, renamed(token, '<|other|>'))
    path = other / 'tokenizer_config.json'
    path.write_text(path.read_text().replace('<|eot_id|>', '<|end_of_text|>'))
    refused(f'differ in id {place}, {token!r} and .*{words}'.replace('|', r'\|'), (folders[0], other), tmp_path)


def test_other_vocabularies_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    swapped = json.loads(small_tokenizers.trained('llama3'))
    vocab = swapped['model']['vocab']
    vocab['A'], vocab['B'] = vocab['B'], vocab['A']
    other = write(tmp_path / 'other', VALUE, 1, json.dumps(swapped))
    refused(f"differ in id {min(vocab['A'], vocab['B'])}: 'A' and 'B'", (folders[0], other), tmp_path)
    few = write(tmp_path / 'few', dataclasses.replace(VALUE, vocab_size=100), 1)
    refused('with id 100, and the model has 100 ids: they are not of one model', (folders[0], few), tmp_path)


@pytest.mark.filterwarnings('ignore:.*special tokens')
def test_value_network_must_have_every_id(folders: tuple[Path, Path], tmp_path: Path) -> None:
    few = write(tmp_path / 'few', dataclasses.replace(VALUE, vocab_size=IDS - 2), 1)
    refused(f'value.source has {IDS - 2} ids, and the tokenizer of the reference {IDS}', (folders[0], few), tmp_path)


def test_special_tokens_without_a_row_are_said_and_not_asked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    few = write(tmp_path / 'few', dataclasses.replace(REFERENCE, vocab_size=IDS - 2), 1)
    with pytest.warns(UserWarning, match='has no ids for the special tokens .*eot_id'):
        with pytest.raises(ValueError, match=f'eot_id.* with id {IDS - 2}, and the reference has {IDS - 2} ids'):
            loaded((few, few), tmp_path, value__source='', value__init='reference')


def test_positions_of_both_are_kept_to(folders: tuple[Path, Path], tmp_path: Path) -> None:
    short = write(tmp_path / 'short', dataclasses.replace(VALUE, max_positions=40), 1)
    refused('positions, and the value network has 40', (folders[0], short), tmp_path)


@pytest.mark.parametrize('changes, words', [
    ({'value__source': ''}, "'pretrained', and config.value.source names no checkpoint"),
    ({'value__init': 'reference'}, "config.value.init is 'reference', and config.value.source is"),
    ({'value__layers': 2}, "'pretrained' copy every layer"),
])
def test_keys_that_contradict_are_refused(
        folders: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(folders, tmp_path, **changes)


def test_bfloat16_reference_is_kept_in_bfloat16(folders: tuple[Path, Path], tmp_path: Path) -> None:
    parts = loaded(folders, tmp_path, value__source='', value__init='reference', reference__dtype='bfloat16')
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(parts.reference_params)} == {'bfloat16'}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(parts.init_value_params())} == {'float32'}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.filterwarnings('ignore:the tokenizers of reference and value.source differ in 1 special')
def test_a_whole_run_and_its_networks_out(
        folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, workdir = config_of(folders, tmp_path), tmp_path / 'run'
    train.run(config, str(workdir))
    rows = read_rows(workdir / 'results.jsonl')
    assert {row['method'] for row in rows} >= {'reference', 'qsharp'}
    assert all(np.isfinite(row['kl']) for row in rows)
    parts, iteration, values = train.open_run(workdir)
    meta = checkpoint.load_meta(parts.value_dir(1))
    assert meta['base'] == references.fingerprint(str(folders[1])) != ''
    digest = parts.value_digest(1)

    entry.main([f'--workdir={workdir}', f'--out={tmp_path / "out"}'])
    made = [str(tmp_path / 'out' / name) for name in ('reference', 'value')]
    assert capsys.readouterr().out.splitlines()[-2:] == made
    file = pretrained.open_checkpoint(tmp_path / 'out' / 'reference')
    assert file.config == REFERENCE
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(file), random_params(REFERENCE, 0))
    trunk = pretrained.open_checkpoint(tmp_path / 'out' / 'value')
    values = sharding.to_host(values)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(trunk), values['trunk'])
    head = safetensors.read_head(tmp_path / 'out' / 'value' / writing.HEAD)
    assert set(head) == set(values['head'])
    np.testing.assert_array_equal(head['kernel'].read(np.dtype(np.float32)), values['head']['kernel'])
    about = json.loads((tmp_path / 'out' / 'value' / writing.HEAD_CONFIG).read_text())
    assert about['type'] == 'v' and about['valid_for']['base'] == meta['base']
    written = tokenizers.from_folder(tmp_path / 'out' / 'value')
    for chat in small_tokenizers.CHATS:
        assert written.encode_chat(chat) == parts.tokenizer.encode_chat(chat)
    assert written.encode_prompt('hi') == parts.tokenizer.encode_prompt('hi')
    assert written.eos_ids == parts.tokenizer.eos_ids
    with pytest.raises(ValueError, match='holds something already'):
        export.run(workdir, tmp_path / 'out')

    # Another source is another value network, even where nothing else differs.
    checkpoint.save_params(parts.value_dir(1), values_on_mesh(parts), {**meta, 'base': 'other'})
    assert parts.value_digest(1) != digest


def values_on_mesh(parts: experiment.Experiment) -> Params:
    return checkpoint.restore_params(parts.value_dir(1), parts.value_target)[0]


def test_reference_without_a_fit_is_exported_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(folders, tmp_path, value__source='', value__init='reference')
    train.prepare(config, tmp_path / 'run')
    assert export.run(tmp_path / 'run', tmp_path / 'out') == [tmp_path / 'out' / 'reference']
    with pytest.raises(ValueError, match='no value network of iteration 1'):
        export.run(tmp_path / 'run', tmp_path / 'more', iteration=1)
    assert not (tmp_path / 'more').exists()


def test_closed_vocabulary_is_exported_as_a_list(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / 'data', reference__pretrain__steps=2)
    train.prepare(config, tmp_path / 'run')
    with pytest.raises(ValueError, match='has not finished pre-training its reference'):
        export.run(tmp_path / 'run', tmp_path / 'out')
    experiment.load(experiment.outline(config, tmp_path / 'run'))
    made = export.run(tmp_path / 'run', tmp_path / 'out')
    file = pretrained.open_checkpoint(made[0])
    tokens = json.loads((made[0] / 'vocabulary.json').read_text())['tokens']
    assert len(tokens) == file.config.vocab_size
    assert file.family.name == 'llama'
