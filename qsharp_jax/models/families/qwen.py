"""Qwen 2, 2.5 and 3: Llama with biases on query, key and value, or with norms of queries and keys."""
from __future__ import annotations

from typing import Any

from qsharp_jax.models.families import base, llama
from qsharp_jax.models.families.base import Family, Format, Keys
from qsharp_jax.models.transformer import TransformerConfig

HEAD_NORMS = {
    '*/attention/query_norm/scale': 'model.layers.*.self_attn.q_norm.weight',
    '*/attention/key_norm/scale': 'model.layers.*.self_attn.k_norm.weight',
}
GGUF_HEAD_NORMS = {
    '*/attention/query_norm/scale': 'blk.*.attn_q_norm.weight',
    '*/attention/key_norm/scale': 'blk.*.attn_k_norm.weight',
}
GGUF_BIASES = {
    '*/attention/query/bias': 'blk.*.attn_q.bias',
    '*/attention/key/bias': 'blk.*.attn_k.bias',
    '*/attention/value/bias': 'blk.*.attn_v.bias',
}


def _common(keys: Keys) -> dict[str, Any]:
    keys.expect('hidden_act', 'silu')
    keys.expect('use_mrope', False)
    shape = base.decoder_shape(keys)
    rope_base, rope_scaling = base.rope(keys, 10000.0)
    layers, first = shape['layers'], keys.take('max_window_layers', 28)
    if keys.take('use_sliding_window', False):
        # Without a list of kinds, all layers from a number on have the window.
        kinds = [base.SLIDING if index >= first else base.FULL for index in range(layers)]
        shape['layer_windows'] = base.windows(keys, layers, kinds)
    else:
        keys.note('sliding_window')  # the file may name one all the same
        keys.expect('layer_types', [base.FULL] * layers)
    return {**shape, 'rope_base': rope_base, 'rope_scaling': rope_scaling,
            'tied_embeddings': keys.take('tie_word_embeddings', False)}


def _write_common(config: TransformerConfig) -> dict[str, Any]:
    keys = {**base.decoder_keys(config), 'hidden_act': 'silu',
            'rope_parameters': base.rope_section(config.rope_base, config.rope_scaling)}
    size = max(config.layer_windows, default=0)
    if size:
        keys |= {'use_sliding_window': True, 'sliding_window': size, 'layer_types': base.layer_kinds(config)}
    return keys


def read_qwen2(keys: Keys) -> TransformerConfig:
    """Returns the shape that a config.json of Qwen 2 or 2.5 describes."""
    return keys.decoder(**_common(keys), qkv_bias=True)


def read_qwen3(keys: Keys) -> TransformerConfig:
    """Returns the shape that a config.json of Qwen 3 describes."""
    biased = keys.take('attention_bias', False)
    shape = {**_common(keys), 'head_dim': keys.take('head_dim', 128)}
    return keys.decoder(**shape, qkv_bias=biased, out_bias=biased, qk_norm=True)


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    return _write_common(config)


def write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    return {**_write_common(config), 'attention_bias': config.qkv_bias}


def read_gguf_qwen2(keys: Keys) -> TransformerConfig:
    """Returns the shape that GGUF metadata describe."""
    return keys.decoder(**base.gguf_shape(keys), **base.gguf_rope(keys), qkv_bias=True)


def read_gguf_qwen3(keys: Keys) -> TransformerConfig:
    """Returns the shape that GGUF metadata describe."""
    return keys.decoder(**base.gguf_shape(keys), **base.gguf_rope(keys), qk_norm=True)


QWEN2 = Family(
    name='qwen2', architecture='Qwen2ForCausalLM', base_architecture='Qwen2Model',
    read=read_qwen2, write=write_qwen2,
    tensors=Format(llama.NAMES, ignored=llama.IGNORED, prefix='model.'),
    gguf='qwen2', read_gguf=read_gguf_qwen2,
    gguf_tensors=Format({**llama.GGUF_NAMES, **GGUF_BIASES}, ignored=llama.ROPE_FACTORS))
QWEN3 = Family(
    name='qwen3', architecture='Qwen3ForCausalLM', base_architecture='Qwen3Model',
    read=read_qwen3, write=write_qwen3,
    tensors=Format({**llama.NAMES, **HEAD_NORMS}, ignored=llama.IGNORED, prefix='model.'),
    gguf='qwen3', read_gguf=read_gguf_qwen3,
    gguf_tensors=Format({**llama.GGUF_NAMES, **GGUF_HEAD_NORMS}, ignored=llama.ROPE_FACTORS))
