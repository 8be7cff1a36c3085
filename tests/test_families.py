"""The config.json of published models, as their owners wrote them, and the shapes that they describe."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qsharp_jax.models.families import FAMILIES, Keys
from qsharp_jax.models.pretrained import export
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

LLAMA_3_2_1B = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 128000,
    'eos_token_id': [128001, 128008, 128009], 'head_dim': 64, 'hidden_act': 'silu', 'hidden_size': 2048,
    'initializer_range': 0.02, 'intermediate_size': 8192, 'max_position_embeddings': 131072, 'mlp_bias': False,
    'model_type': 'llama', 'num_attention_heads': 32, 'num_hidden_layers': 16, 'num_key_value_heads': 8,
    'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': {
        'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 8192,
        'rope_type': 'llama3'},
    'rope_theta': 500000.0, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.45.0',
    'use_cache': True, 'vocab_size': 128256}
QWEN_2_5_7B = {
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643, 'eos_token_id': 151643,
    'hidden_act': 'silu', 'hidden_size': 3584, 'initializer_range': 0.02, 'intermediate_size': 18944,
    'max_position_embeddings': 131072, 'max_window_layers': 28, 'model_type': 'qwen2', 'num_attention_heads': 28,
    'num_hidden_layers': 28, 'num_key_value_heads': 4, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0,
    'sliding_window': 131072, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
    'transformers_version': '4.40.1', 'use_cache': True, 'use_mrope': False, 'use_sliding_window': False,
    'vocab_size': 152064}
QWEN_3 = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 1024, 'initializer_range': 0.02,
    'intermediate_size': 3072, 'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
    'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-06,
    'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'use_cache': True, 'use_sliding_window': False, 'vocab_size': 151936}
GEMMA_3_1B = {
    'architectures': ['Gemma3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'attn_logit_softcapping': None, 'bos_token_id': 2, 'cache_implementation': 'hybrid', 'eos_token_id': [1, 106],
    'final_logit_softcapping': None, 'head_dim': 256, 'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 1152,
    'initializer_range': 0.02, 'intermediate_size': 6912, 'max_position_embeddings': 32768,
    'model_type': 'gemma3_text', 'num_attention_heads': 4, 'num_hidden_layers': 26, 'num_key_value_heads': 1,
    'pad_token_id': 0, 'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_local_base_freq': 10000,
    'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': 512, 'sliding_window_pattern': 6,
    'torch_dtype': 'bfloat16', 'use_cache': True, 'vocab_size': 262144}
GPT2 = {
    'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1, 'bos_token_id': 50256,
    'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02, 'layer_norm_epsilon': 1e-05,
    'model_type': 'gpt2', 'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12, 'n_positions': 1024,
    'resid_pdrop': 0.1, 'summary_activation': None, 'summary_first_dropout': 0.1, 'summary_proj_to_labels': True,
    'summary_type': 'cls_index', 'summary_use_proj': True, 'task_specific_params': {}, 'vocab_size': 50257}
SMOLLM2 = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1,
    'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 576, 'initializer_range': 0.041666666666666664,
    'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192, 'mlp_bias': False,
    'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3,
    'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None,
    'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers.js_config': {},
    'use_cache': True, 'vocab_size': 49152}

EXPECTED = {
    'llama': (LLAMA_3_2_1B, TransformerConfig(
        vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp_width=8192,
        max_positions=131072, rope_base=5e5, rope_scaling=RopeScaling('llama3', 32.0, 1.0, 4.0, 8192))),
    'qwen2': (QWEN_2_5_7B, TransformerConfig(
        vocab_size=152064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp_width=18944,
        max_positions=131072, norm_eps=1e-6, rope_base=1e6, qkv_bias=True, tied_embeddings=False)),
    'qwen3': (QWEN_3, TransformerConfig(
        vocab_size=151936, width=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp_width=3072,
        max_positions=40960, norm_eps=1e-6, rope_base=1e6, qk_norm=True)),
    'gemma3': (GEMMA_3_1B, TransformerConfig(
        vocab_size=262144, width=1152, layers=26, heads=4, kv_heads=1, head_dim=256, mlp_width=6912,
        max_positions=32768, norm_eps=1e-6, rope_base=1e6, activation='gelu_tanh', qk_norm=True, norm_offset=1.0,
        output_norms=True, embedding_scale=1152 ** 0.5, query_scale=1 / 16, local_rope_base=1e4,
        layer_windows=((512,) * 5 + (0,)) * 4 + (512, 512))),
    'gpt2': (GPT2, TransformerConfig(
        vocab_size=50257, width=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp_width=3072, max_positions=1024,
        norm='layernorm', positions='learned', activation='gelu_tanh', gated=False, qkv_bias=True, out_bias=True,
        mlp_bias=True)),
    'smollm2': (SMOLLM2, TransformerConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536, max_positions=8192,
        rope_base=1e5)),
}
published = pytest.mark.parametrize('name', EXPECTED)


def read(keys: dict[str, Any]) -> TransformerConfig:
    family = FAMILIES[keys['model_type']]
    reader = Keys(keys, family.name, 'config.json', {})
    config = family.read(reader)
    reader.finish()
    return config


@published
def test_published_configs_are_read_without_a_key_left_over(name: str) -> None:
    keys, expected = EXPECTED[name]
    assert read(keys) == expected


@published
def test_what_is_written_says_the_same(name: str) -> None:
    keys, config = EXPECTED[name]
    family = export.family_of(config)
    assert family.name == keys['model_type']
    assert read({**family.write(config), 'model_type': family.name}) == config


@published
def test_every_sublist_of_layers_can_be_written(name: str) -> None:
    """A value network is a few of them."""
    config = EXPECTED[name][1]
    short = dataclasses.replace(config, layers=3, layer_windows=config.layer_windows[:3])
    assert export.family_of(short).name == EXPECTED[name][0]['model_type']
