"""Hugging Face folders, in and out: what is read, where it goes, and what is refused. No torch here."""
from __future__ import annotations

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax import sharding
from qsharp_jax.models import families, pretrained, transformer
from qsharp_jax.models.pretrained import export, safetensors
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=20, max_positions=48, norm_eps=1e-5)
SHAPES = {
    'llama': LLAMA,
    'llama_untied': dataclasses.replace(
        LLAMA, tied_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        rope_scaling=RopeScaling('llama3', 8.0, 1.0, 4.0, 32)),
    'qwen2': dataclasses.replace(
        LLAMA, qkv_bias=True, rope_base=1e6, layer_windows=(0, 7), rope_scaling=RopeScaling('linear', 2.0)),
    'qwen3': dataclasses.replace(LLAMA, qk_norm=True, tied_embeddings=False),
    'gpt2': dataclasses.replace(
        LLAMA, kv_heads=4, head_dim=4, norm='layernorm', positions='learned', activation='gelu_tanh', gated=False,
        qkv_bias=True, out_bias=True, mlp_bias=True),
    'gemma3_text': dataclasses.replace(
        LLAMA, activation='gelu_tanh', qk_norm=True, norm_offset=1.0, output_norms=True, embedding_scale=4.0,
        query_scale=24 ** -0.5, logit_cap=3.0, layer_windows=(5, 0), local_rope_base=1e4, rope_base=1e6),
}
shapes = pytest.mark.parametrize('name', SHAPES)


def random_params(config, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), transformer.param_shapes(config))


@pytest.fixture
def folder(tmp_path):
    """A folder of the family 'llama'."""
    export.write_model(tmp_path, LLAMA, random_params(LLAMA))
    return tmp_path


def change(path, **keys):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**content, **keys}.items() if value != 'absent'}))


def rewrite(folder, **arrays):
    """Replaces, adds or, where None, leaves out tensors whose names are given with '__' for dots."""
    path = folder / 'model.safetensors'
    tensors = {name: np.array(tensor.read(np.dtype(np.float32)))
               for name, tensor in safetensors.read_head(path).items()}
    tensors |= {name.replace('__', '.'): array for name, array in arrays.items()}
    safetensors.write(path, {name: (array.shape, array.dtype, lambda array=array: array)
                             for name, array in tensors.items() if array is not None})


def refused(folder, words):
    with pytest.raises(ValueError, match=words) as caught:
        pretrained.open_checkpoint(folder)
    return str(caught.value)


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@shapes
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, name):
    config, params = SHAPES[name], random_params(SHAPES[name])
    export.write_model(tmp_path, config, params)
    file = pretrained.open_checkpoint(tmp_path)
    assert file.config == config
    assert file.family.name == name.removesuffix('_untied')
    assert_equal(pretrained.load_params(file), params)


@shapes
def test_half_precision_is_kept(tmp_path, name):
    config = dataclasses.replace(SHAPES[name], param_dtype=jnp.bfloat16)
    params = random_params(config, dtype=jnp.bfloat16)
    export.write_model(tmp_path, config, params)
    file = pretrained.open_checkpoint(tmp_path)
    again = pretrained.load_params(file, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(again))
    assert_equal(again, params)
    wide = pretrained.load_params(file)
    assert_equal(wide, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


@shapes
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_parameters_stream_into_their_shards(tmp_path, name, dtype):
    config, params = SHAPES[name], random_params(SHAPES[name])
    export.write_model(tmp_path, config, params)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(mesh, transformer.logical_axes(config), params)
    loaded = pretrained.load_params(pretrained.open_checkpoint(tmp_path), shardings, dtype)
    jax.tree.map(lambda leaf, place: pytest.fail() if leaf.sharding != place else None, loaded, shardings)
    assert_equal(sharding.to_host(loaded), jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    kernel = loaded['layers_1']['mlp']['up']['kernel']
    assert kernel.addressable_data(0).shape == (config.width // 2, config.mlp_width // 2)


def test_loaded_parameters_outlive_the_file(folder):
    """They are copies: what happens to the file later is nothing to a running program."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = random_params(LLAMA)
    shardings = sharding.param_shardings(mesh, transformer.logical_axes(LLAMA), params)
    file = pretrained.open_checkpoint(folder)
    loaded, host = pretrained.load_params(file, shardings), pretrained.load_params(file)
    path = folder / 'model.safetensors'
    with path.open('r+b') as stream:
        stream.write(bytes(path.stat().st_size))
    assert_equal(host, params)
    assert_equal(sharding.to_host(loaded), params)


@pytest.mark.parametrize('most', [1, 3000])
@shapes
def test_several_files(tmp_path, name, most):
    config, params = SHAPES[name], random_params(SHAPES[name])
    export.write_model(tmp_path, config, params, file_bytes=most)
    assert len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 2
    assert not (tmp_path / 'model.safetensors').exists()
    file = pretrained.open_checkpoint(tmp_path)
    assert_equal(pretrained.load_params(file), params)
    total = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['metadata']['total_size']
    assert total == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_only_what_is_wanted_is_read(folder, monkeypatch):
    file, read = pretrained.open_checkpoint(folder), []
    monkeypatch.setattr(safetensors.StoredTensor, 'read', lambda self, dtype, old=safetensors.StoredTensor.read: (
        read.append(self.offset), old(self, dtype))[1])
    some = pretrained.load_params(file, wanted=lambda path: path[0] == 'layers_1')
    assert list(some) == ['layers_1']
    assert len(read) == len(jax.tree.leaves(some))
    assert_equal(some['layers_1'], random_params(LLAMA)['layers_1'])


def test_fingerprint_is_of_weights_and_shape(tmp_path):
    prints = []
    for number, (config, seed) in enumerate([(LLAMA, 0), (LLAMA, 0), (LLAMA, 1),
                                             (dataclasses.replace(LLAMA, norm_eps=1e-3), 0)]):
        export.write_model(tmp_path / str(number), config, random_params(LLAMA, seed))
        prints.append(pretrained.open_checkpoint(tmp_path / str(number)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@shapes
def test_base_models_are_read_where_the_head_is_the_embeddings(tmp_path, name):
    config = dataclasses.replace(SHAPES[name], tied_embeddings=True)
    params = random_params(config)
    export.write_model(tmp_path, config, params, base=True)
    head = json.loads((tmp_path / 'config.json').read_text())
    assert head['architectures'][0].endswith('Model')
    assert not any(key.startswith(('model.', 'transformer.', 'lm_head')) for key in
                   safetensors.read_head(tmp_path / 'model.safetensors'))
    assert_equal(pretrained.load_params(pretrained.open_checkpoint(tmp_path)), params)


def test_base_model_without_its_head_is_half_a_model(tmp_path):
    config = SHAPES['qwen3']
    export.write_model(tmp_path, config, random_params(config), base=True)
    assert '(qwen3)' in refused(tmp_path, "lacks the tensor 'lm_head.weight'")


def test_repeated_head_and_what_carries_nothing_are_passed_over(folder):
    rewrite(folder, lm_head__weight=np.zeros((24, 16), np.float32),
            model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(3, np.float32))
    assert_equal(pretrained.load_params(pretrained.open_checkpoint(folder)), random_params(LLAMA))


@pytest.mark.parametrize('arrays, words', [
    ({'model__layers__1__mlp__up_proj__weight': None}, r"lacks the tensor 'model.layers.1.mlp.up_proj.weight' \(1 "),
    ({'model__layers__2__mlp__up_proj__weight': np.zeros((20, 16), np.float32)},
     "has a tensor 'model.layers.2.mlp.up_proj.weight' that this architecture does not use"),
    ({'model__layers__0__self_attn__q_proj__bias': np.zeros(24, np.float32)}, "'model.layers.0.self_attn.q_proj.bias'"),
    ({'model__norm__weight': np.zeros(15, np.float32)},
     r"'model.norm.weight' has shape \(15,\); the metadata imply \(16,\)"),
    ({'score__weight': np.zeros((2, 16), np.float32)}, "has a tensor 'score.weight'"),
])
def test_tensors_that_do_not_fit_are_named(folder, arrays, words):
    rewrite(folder, **arrays)
    assert '(llama)' in refused(folder, words)


@pytest.mark.parametrize('keys, words', [
    ({'model_type': 'mamba'}, "architecture 'mamba'; allowed: llama, qwen2, qwen3, gpt2, gemma3_text"),
    ({'hidden_size': None}, "lacks 'hidden_size'"),
    ({'hidden_act': 'relu'}, "'hidden_act' is 'relu'; supported: 'silu'"),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0}}, "'rope_type' is 'yarn'; supported: 'default'"),
    ({'rope_parameters': {'rope_type': 'linear'}}, "rope_parameters .*lacks 'factor'"),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4, 'mscale': 2}}, "'mscale' = 2 is not known"),
    ({'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}}, "'partial_rotary_factor' is 0.5"),
    ({'quantization_config': {'bits': 4}}, "'quantization_config' = .* is not known, and may change"),
    ({'logit_scale': 2.0}, "'logit_scale' = 2.0 is not known"),
    ({'pretraining_tp': 2}, "'pretraining_tp' is 2"),
    ({'num_key_value_heads': 3}, r'heads \(4\) must be a multiple of kv_heads'),
    ({'hidden_size': '16'}, 'wrong type'),
])
def test_keys_that_change_the_maths_are_named(folder, keys, words):
    change(folder / 'config.json', **keys)
    message = refused(folder, words)
    assert 'llama' in message


@pytest.mark.parametrize('name, keys, words', [
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, "'scale_attn_by_inverse_layer_idx' is True"),
    ('gpt2', {'activation_function': 'relu'}, "'activation_function' is 'relu'"),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, "'attn_logit_softcapping' is 50.0"),
    ('gemma3_text', {'use_bidirectional_attention': True}, "'use_bidirectional_attention' is True"),
    ('gemma3_text', {'layer_types': ['full_attention']}, "'layer_types' names 1 layers"),
    ('gemma3_text', {'layer_types': ['linear_attention', 'full_attention']}, "'linear_attention'"),
    ('gemma3_text', {'sliding_window': None}, "'sliding_window' is missing"),
    ('gemma3_text', {'rope_parameters': {
        'full_attention': {'rope_theta': 1e6}, 'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}},
     'stretches the layers with a window'),
    ('qwen2', {'use_sliding_window': False}, "'layer_types' is "),
])
def test_other_families_are_as_strict(tmp_path, name, keys, words):
    export.write_model(tmp_path, SHAPES[name], random_params(SHAPES[name]))
    change(tmp_path / 'config.json', **keys)
    refused(tmp_path, rf'{name}.*{words}')


def test_older_writing_of_rotary_positions(folder):
    change(folder / 'config.json', rope_parameters='absent', rope_theta=5e5, rope_scaling={
        'type': 'llama3', 'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4,
        'original_max_position_embeddings': 32})
    config = pretrained.open_checkpoint(folder).config
    assert (config.rope_base, config.rope_scaling) == (5e5, RopeScaling('llama3', 8.0, 1.0, 4.0, 32))


def test_older_writing_of_gemma(tmp_path):
    config = dataclasses.replace(SHAPES['gemma3_text'], layers=7, layer_windows=(5, 5, 5, 5, 5, 0, 5))
    export.write_model(tmp_path, config, random_params(config))
    change(tmp_path / 'config.json', rope_parameters='absent', layer_types='absent', rope_theta=1e6, rope_scaling=None,
           rope_local_base_freq=1e4, sliding_window_pattern=6)
    assert pretrained.open_checkpoint(tmp_path).config == config


def test_windows_without_a_list_of_layers(tmp_path):
    config = SHAPES['qwen2']
    export.write_model(tmp_path, config, random_params(config))
    change(tmp_path / 'config.json', layer_types='absent', max_window_layers=1)
    assert pretrained.open_checkpoint(tmp_path).config == config
    change(tmp_path / 'config.json', use_sliding_window=False)
    assert pretrained.open_checkpoint(tmp_path).config == dataclasses.replace(config, layer_windows=())


@pytest.mark.parametrize('size', [0, 4, 60, 0.5, 0.999])
def test_file_cut_short_is_refused(folder, size):
    path = folder / 'model.safetensors'
    data = path.read_bytes()
    path.write_bytes(data[:size if isinstance(size, int) else int(len(data) * size)])
    refused(folder, 'model.safetensors.*(is cut short|damaged)')


def test_damaged_files_are_refused(folder, tmp_path):
    path = folder / 'model.safetensors'
    data = path.read_bytes()
    path.write_bytes(data[:8] + b'x' + data[9:])
    refused(folder, 'its head cannot be read')
    place = data.index(b'[24,16]')
    path.write_bytes(data[:place] + b'[24,15]' + data[place + 7:])
    refused(folder, r"'model.embed_tokens.weight' of shape \(24, 15\) and type F32 has 1536 bytes")
    path.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[-', 1))
    refused(folder, 'cannot begin where its head says|its head cannot be read')
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    refused(folder, r"\(llama\): the tensor .* is stored as I32; supported: F64, F32, F16, BF16")
    (folder / 'config.json').write_text('{')
    refused(folder, 'config.json is damaged')
    (folder / 'config.json').write_text('[]')
    refused(folder, 'no JSON object')


def test_missing_files_are_named(tmp_path):
    config = SHAPES['llama']
    export.write_model(tmp_path, config, random_params(config), file_bytes=3000)
    second = sorted(tmp_path.glob('model-*'))[1]
    second.rename(tmp_path / 'elsewhere')
    refused(tmp_path, f'lacks the file .{second.name}., which model.safetensors.index.json names')
    (tmp_path / 'elsewhere').rename(second)
    change(tmp_path / 'model.safetensors.index.json', weight_map={
        **json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map'], 'more': second.name})
    refused(tmp_path, "lacks the tensor 'more'")
    (tmp_path / 'model.safetensors.index.json').unlink()
    refused(tmp_path, 'neither model.safetensors nor')
    (tmp_path / 'config.json').unlink()
    refused(tmp_path, 'has no config.json')
    refused(tmp_path / 'none', 'no file or folder')


def test_nothing_is_read_before_all_is_checked(folder, monkeypatch):
    monkeypatch.setattr(safetensors.StoredTensor, 'read', lambda *_: pytest.fail('a tensor was read'))
    pretrained.open_checkpoint(folder)
    rewritten = safetensors.read_head(folder / 'model.safetensors')
    assert len(rewritten) == len(jax.tree.leaves(random_params(LLAMA)))


def test_hub(folder, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options['revision']))
        assert 'config.json' in options['allow_patterns'] and '*.bin' not in options['allow_patterns']
        return str(folder)

    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=download))
    assert pretrained.open_checkpoint('hf:owner/name').config == LLAMA
    assert pretrained.find('hf:owner/name@abc') == folder
    assert asked == [('owner/name', None), ('owner/name', 'abc')]
    with pytest.raises(ValueError, match='should read'):
        pretrained.find('hf:name')
    with pytest.raises(ValueError, match="For the hub, write 'hf:owner/name'"):
        pretrained.find('owner/name')


def test_hub_that_is_missing_or_out_of_reach_says_what_to_do(monkeypatch):
    def fail(name, **options):
        raise ConnectionError('no route')

    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=fail))
    with pytest.raises(ValueError, match='ConnectionError: no route.*give the path'):
        pretrained.find('hf:owner/name')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r'run pip install -e "\.\[hf\]" in the folder'):
        pretrained.find('hf:owner/name')


@pytest.mark.parametrize('config', [
    dataclasses.replace(LLAMA, positions='learned'),
    dataclasses.replace(LLAMA, restart_layer=1),
    dataclasses.replace(LLAMA, rope_scaling=RopeScaling('factors', factors=(1.0, 2.0, 4.0))),
])
def test_what_no_family_computes_is_not_written(tmp_path, config):
    with pytest.raises(ValueError, match='none of the families llama, qwen2'):
        export.write_model(tmp_path / 'out', config, random_params(config))
    assert not (tmp_path / 'out').exists()


@shapes
def test_every_parameter_has_a_place_of_its_own(name):
    config = SHAPES[name]
    weights = export.family_of(config).tensors.weights(config)
    assert len({(weight.name, weight.columns) for weight in weights}) == len(weights)
    assert {weight.path for weight in weights} == {
        tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(random_params(config))}


def test_families_are_listed_by_their_names():
    assert all(name == family.name for name, family in families.FAMILIES.items())
    assert set(families.GGUF_FAMILIES) == {'llama', 'qwen2', 'qwen3', 'gemma3'}
