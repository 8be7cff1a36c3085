"""Llama 2, 3, 3.1, 3.2, SmolLM2: RMSNorm, rotary positions, gated SiLU, grouped heads."""
from __future__ import annotations

from typing import Any

from qsharp_jax.models.families import base
from qsharp_jax.models.families.base import Family, Format, Keys
from qsharp_jax.models.transformer import TransformerConfig

NAMES = {
    'embedding': 'model.embed_tokens.weight',
    'head': 'lm_head.weight',
    'final_norm/scale': 'model.norm.weight',
    '*/attention_norm/scale': 'model.layers.*.input_layernorm.weight',
    '*/mlp_norm/scale': 'model.layers.*.post_attention_layernorm.weight',
    '*/attention/query/kernel': 'model.layers.*.self_attn.q_proj.weight',
    '*/attention/query/bias': 'model.layers.*.self_attn.q_proj.bias',
    '*/attention/key/kernel': 'model.layers.*.self_attn.k_proj.weight',
    '*/attention/key/bias': 'model.layers.*.self_attn.k_proj.bias',
    '*/attention/value/kernel': 'model.layers.*.self_attn.v_proj.weight',
    '*/attention/value/bias': 'model.layers.*.self_attn.v_proj.bias',
    '*/attention/output/kernel': 'model.layers.*.self_attn.o_proj.weight',
    '*/attention/output/bias': 'model.layers.*.self_attn.o_proj.bias',
    '*/mlp/gate/kernel': 'model.layers.*.mlp.gate_proj.weight',
    '*/mlp/gate/bias': 'model.layers.*.mlp.gate_proj.bias',
    '*/mlp/up/kernel': 'model.layers.*.mlp.up_proj.weight',
    '*/mlp/up/bias': 'model.layers.*.mlp.up_proj.bias',
    '*/mlp/down/kernel': 'model.layers.*.mlp.down_proj.weight',
    '*/mlp/down/bias': 'model.layers.*.mlp.down_proj.bias',
}
GGUF_NAMES = {
    'embedding': 'token_embd.weight',
    'head': 'output.weight',
    'final_norm/scale': 'output_norm.weight',
    '*/attention_norm/scale': 'blk.*.attn_norm.weight',
    '*/mlp_norm/scale': 'blk.*.ffn_norm.weight',
    '*/attention/query/kernel': 'blk.*.attn_q.weight',
    '*/attention/key/kernel': 'blk.*.attn_k.weight',
    '*/attention/value/kernel': 'blk.*.attn_v.weight',
    '*/attention/output/kernel': 'blk.*.attn_output.weight',
    '*/mlp/gate/kernel': 'blk.*.ffn_gate.weight',
    '*/mlp/up/kernel': 'blk.*.ffn_up.weight',
    '*/mlp/down/kernel': 'blk.*.ffn_down.weight',
}
# Frequencies of older checkpoints, which follow from the config; and a head that is the embeddings again.
IGNORED = r'.*rotary_emb\.inv_freq'
ROPE_FACTORS = r'rope_freqs\.weight'


def read(keys: Keys) -> TransformerConfig:
    """Returns the shape that a config.json describes."""
    keys.expect('hidden_act', 'silu')
    keys.expect('pretraining_tp', 1)
    keys.expect('rope_interleaved', False)
    keys.note('is_llama_config')
    rope_base, rope_scaling = base.rope(keys, 10000.0)
    biased = keys.take('attention_bias', False)
    return keys.decoder(
        **base.decoder_shape(keys), rope_base=rope_base, rope_scaling=rope_scaling, qkv_bias=biased, out_bias=biased,
        mlp_bias=keys.take('mlp_bias', False), tied_embeddings=keys.take('tie_word_embeddings', False))


def write(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    return {
        **base.decoder_keys(config), 'hidden_act': 'silu', 'attention_bias': config.qkv_bias,
        'mlp_bias': config.mlp_bias, 'rope_parameters': base.rope_section(config.rope_base, config.rope_scaling)}


def read_gguf(keys: Keys) -> TransformerConfig:
    """Returns the shape that GGUF metadata describe."""
    return keys.decoder(**base.gguf_shape(keys), **base.gguf_rope(keys))


FAMILY = Family(
    name='llama', architecture='LlamaForCausalLM', base_architecture='LlamaModel',
    read=read, write=write,
    tensors=Format(NAMES, ignored=IGNORED, prefix='model.'),
    gguf='llama', read_gguf=read_gguf,
    gguf_tensors=Format(
        GGUF_NAMES, interleaved=frozenset({'*/attention/query/kernel', '*/attention/key/kernel'}),
        ignored=ROPE_FACTORS))
