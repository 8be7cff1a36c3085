"""GGUF files of every architecture, named by gguf's own tables, give the logits of `transformers`."""
from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsharp_jax.models import pretrained
from tests import published
from tests.published import torch_model

pytestmark = pytest.mark.parity

ARCHITECTURES = {
    'llama': gguf.MODEL_ARCH.LLAMA, 'llama_linear': gguf.MODEL_ARCH.LLAMA, 'llama3': gguf.MODEL_ARCH.LLAMA,
    'qwen2': gguf.MODEL_ARCH.QWEN2, 'qwen2_tied': gguf.MODEL_ARCH.QWEN2, 'qwen3': gguf.MODEL_ARCH.QWEN3,
    'gemma3': gguf.MODEL_ARCH.GEMMA3}


def convert(name, path, kinds=gguf.GGMLQuantizationType.F32):
    """Writes a tiny model of `transformers` as published converters do, and returns the model."""
    import torch
    model = torch_model(name)
    config, arch = model.config, ARCHITECTURES[name]
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim \
        if getattr(config, 'head_dim', None) else config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, prefix)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if name == 'gemma3':
        writer.add_sliding_window(config.sliding_window)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        rope = rope['full_attention']
    else:
        writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope['rope_theta'])
    if rope['rope_type'] == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope['factor'])
    if rope['rope_type'] == 'llama3':
        # One divisor for each frequency.
        rotary = model.model.rotary_emb.inv_freq.numpy()
        plain = rope['rope_theta'] ** (-np.arange(0, size, 2) / size)
        writer.add_tensor('rope_freqs.weight', (plain / rotary).astype(np.float32))
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if tied and key == 'lm_head.weight':
            continue
        array = tensor.detach().to(torch.float32).numpy()
        if prefix == 'llama' and key.endswith(('q_proj.weight', 'k_proj.weight')):
            count = heads if 'q_proj' in key else kv_heads
            array = array.reshape(count, 2, size // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if prefix == 'gemma3' and key.endswith('norm.weight'):
            array = array + 1
        stored = names.get_name(key, try_suffixes=('.weight', '.bias'))
        assert stored, key
        kind = kinds if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_tiny_random_models(name, tmp_path, monkeypatch):
    if name == 'gemma3':  # the files leave the scale of the scores to be the width of a head
        kind, changes = published.CASES[name]
        monkeypatch.setitem(published.CASES, name, (kind, {**changes, 'query_pre_attn_scalar': changes['head_dim']}))
    model = convert(name, tmp_path / 'model.gguf')
    file = pretrained.open_checkpoint(tmp_path / 'model.gguf')
    params = jax.tree.map(jnp.asarray, pretrained.load_params(file))
    tokens = np.random.default_rng(1).integers(0, 50, (3, 60))
    published.check_logits(model, file.config, params, tokens, [20, 1, 13], 25)
