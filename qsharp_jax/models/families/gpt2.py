"""GPT-2: LayerNorm, learned positions, GELU, biases everywhere, matrices stored with their inputs first."""
from __future__ import annotations

from typing import Any

from qsharp_jax.models.families.base import Family, Format, Keys
from qsharp_jax.models.transformer import TransformerConfig

_PARTS = ('query', 'key', 'value')
_MODULES = {
    'final_norm': 'transformer.ln_f',
    '*/attention_norm': 'transformer.h.*.ln_1',
    '*/mlp_norm': 'transformer.h.*.ln_2',
    '*/attention/output': 'transformer.h.*.attn.c_proj',
    '*/mlp/up': 'transformer.h.*.mlp.c_fc',
    '*/mlp/down': 'transformer.h.*.mlp.c_proj',
    **{f'*/attention/{part}': 'transformer.h.*.attn.c_attn' for part in _PARTS},
}
NAMES = {
    'embedding': 'transformer.wte.weight',
    'position_embedding': 'transformer.wpe.weight',
    'head': 'lm_head.weight',
    **{f'{ours}/{"scale" if ours.endswith("norm") else "kernel"}': f'{theirs}.weight'
       for ours, theirs in _MODULES.items()},
    **{f'{ours}/bias': f'{theirs}.bias' for ours, theirs in _MODULES.items()},
}
# One tensor has the three projections side by side.
FUSED = {f'*/attention/{part}/{leaf}': (place, len(_PARTS))
         for place, part in enumerate(_PARTS) for leaf in ('kernel', 'bias')}


def read(keys: Keys) -> TransformerConfig:
    """Returns the shape that a config.json describes."""
    keys.expect('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
    keys.expect('scale_attn_weights', True)
    keys.expect('scale_attn_by_inverse_layer_idx', False)
    keys.expect('add_cross_attention', False)
    keys.note('reorder_and_upcast_attn', 'n_ctx', 'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'summary_activation',
              'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj',
              'gradient_checkpointing')
    width, heads = keys.take('n_embd'), keys.take('n_head')
    return keys.decoder(
        vocab_size=keys.take('vocab_size'), width=width, layers=keys.take('n_layer'), heads=heads, kv_heads=heads,
        head_dim=width // heads, mlp_width=keys.take('n_inner', 4 * width), max_positions=keys.take('n_positions'),
        norm='layernorm', norm_eps=keys.take('layer_norm_epsilon', 1e-5), positions='learned', activation='gelu_tanh',
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        tied_embeddings=keys.take('tie_word_embeddings', True))


def write(config: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a config.json."""
    return {
        'vocab_size': config.vocab_size, 'n_embd': config.width, 'n_layer': config.layers, 'n_head': config.heads,
        'n_inner': config.mlp_width, 'n_positions': config.max_positions, 'layer_norm_epsilon': config.norm_eps,
        'activation_function': 'gelu_new', 'tie_word_embeddings': config.tied_embeddings}


FAMILY = Family(
    name='gpt2', architecture='GPT2LMHeadModel', base_architecture='GPT2Model',
    read=read, write=write,
    # Causal masks that older checkpoints carry along.
    tensors=Format(NAMES, heads_first=False, columns=FUSED, ignored=r'.*\.attn\.(masked_)?bias',
                   prefix='transformer.'))
