"""Gemma 3, text only: windows in five of six layers, norms on both sides, scaled embeddings."""
from __future__ import annotations

from typing import Any

from qsharp_jax.models.families import base, llama, qwen
from qsharp_jax.models.families.base import Family, Format, Keys
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

PATTERN = 6  # every sixth layer sees all positions, unless the file says otherwise
LOCAL_ROPE_BASE = 10000.0  # of the layers with a window, as GGUF files leave unsaid

NAMES = {
    **llama.NAMES, **qwen.HEAD_NORMS,
    '*/attention_output_norm/scale': 'model.layers.*.post_attention_layernorm.weight',
    '*/mlp_norm/scale': 'model.layers.*.pre_feedforward_layernorm.weight',
    '*/mlp_output_norm/scale': 'model.layers.*.post_feedforward_layernorm.weight',
}
GGUF_NAMES = {
    **llama.GGUF_NAMES, **qwen.GGUF_HEAD_NORMS,
    '*/attention_output_norm/scale': 'blk.*.post_attention_norm.weight',
    '*/mlp_output_norm/scale': 'blk.*.post_ffw_norm.weight',
}
# What all members share beside the sizes. The norms' scales are stored as their distance from 1.
SWITCHES: dict[str, Any] = {
    'activation': 'gelu_tanh', 'qk_norm': True, 'norm_offset': 1.0, 'output_norms': True}


def _kinds(layers: int, pattern: int) -> list[str]:
    return [base.FULL if (index + 1) % pattern == 0 else base.SLIDING for index in range(layers)]


def read(keys: Keys) -> TransformerConfig:
    """Returns the shape that a config.json describes."""
    keys.expect('hidden_activation', 'gelu_pytorch_tanh')
    keys.expect('hidden_act', 'gelu_pytorch_tanh')
    keys.expect('attn_logit_softcapping', None)
    keys.expect('use_bidirectional_attention', False)
    shape = {**base.decoder_shape(keys), 'head_dim': keys.take('head_dim', 256)}
    pattern = keys.take('sliding_window_pattern', keys.take('_sliding_window_pattern', PATTERN))
    rope_base, rope_scaling = base.rope(keys, 1e6, base.FULL)
    if keys.take('rope_parameters', {}):
        keys.note('rope_local_base_freq')
        local, stretched = base.rope(keys, LOCAL_ROPE_BASE, base.SLIDING)
        if stretched is not None:
            raise ValueError(f"{keys.source} ({keys.family}): 'rope_parameters' stretches the layers with a window "
                             f"({stretched.kind}); supported: 'default' there.")
    else:
        local = float(keys.take('rope_local_base_freq', LOCAL_ROPE_BASE))
    biased = keys.take('attention_bias', False)
    return keys.decoder(
        **shape, **SWITCHES, rope_base=rope_base, rope_scaling=rope_scaling, local_rope_base=local, qkv_bias=biased,
        out_bias=biased, embedding_scale=shape['width'] ** 0.5,
        query_scale=keys.take('query_pre_attn_scalar', 256) ** -0.5,
        logit_cap=keys.take('final_logit_softcapping', 0.0),
        layer_windows=base.windows(keys, shape['layers'], _kinds(shape['layers'], pattern)),
        tied_embeddings=keys.take('tie_word_embeddings', True))


def write(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    scalar = round((config.query_scale or config.head_dim ** -0.5) ** -2, 6)
    return {
        **base.decoder_keys(config), 'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': config.qkv_bias,
        'query_pre_attn_scalar': int(scalar) if scalar == int(scalar) else scalar,
        'final_logit_softcapping': config.logit_cap or None,
        # The class wants a number even where no layer has a window.
        'sliding_window': max(config.layer_windows, default=0) or config.max_positions,
        'layer_types': base.layer_kinds(config),
        'rope_parameters': {base.FULL: base.rope_section(config.rope_base, config.rope_scaling),
                            base.SLIDING: base.rope_section(config.local_rope_base, None)}}


def read_gguf(keys: Keys) -> TransformerConfig:
    """Returns the shape that GGUF metadata describe."""
    shape, rope = base.gguf_shape(keys), base.gguf_rope(keys, 1e6)
    layers, size = shape['layers'], keys.take('attention.sliding_window')
    factor = keys.take('rope.scaling.factor', 1.0)
    if rope['rope_scaling'] is None and factor != 1.0:
        rope['rope_scaling'] = RopeScaling('linear', float(factor))
    # The 27B model alone scales its scores by the width of a head as the others count it.
    scalar = shape['width'] // shape['heads'] if layers == 62 else shape['head_dim']
    pattern = keys.take('attention.sliding_window_pattern', PATTERN)
    return keys.decoder(
        **shape, **SWITCHES, **rope,
        local_rope_base=float(keys.take('rope.freq_base_swa', LOCAL_ROPE_BASE)),
        embedding_scale=shape['width'] ** 0.5, query_scale=scalar ** -0.5,
        logit_cap=keys.take('final_logit_softcapping', 0.0),
        layer_windows=tuple(size if kind == base.SLIDING else 0 for kind in _kinds(layers, pattern)))


FAMILY = Family(
    name='gemma3_text', architecture='Gemma3ForCausalLM', base_architecture='Gemma3TextModel',
    read=read, write=write,
    tensors=Format(NAMES, ignored=llama.IGNORED, prefix='model.'),
    gguf='gemma3', read_gguf=read_gguf,
    # There the scales are stored whole.
    gguf_tensors=Format(GGUF_NAMES, shift=-1.0))
