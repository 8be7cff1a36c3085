"""Tiny checkpoints of every family as `transformers` writes them, with all weights far from their initial values."""
from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.models import networks, transformer

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=192)


def torch_config(name):
    """Returns the config of one tiny model; the names are the keys of CASES."""
    import transformers
    kind, changes = CASES[name]
    return getattr(transformers, kind)(**changes)


ROPE = dict(rope_type='default', rope_theta=10000.0)
CASES = {
    'llama': ('LlamaConfig', dict(SIZES, tie_word_embeddings=True)),
    'llama_untied': ('LlamaConfig', dict(SIZES, head_dim=12, attention_bias=True, mlp_bias=True)),
    'llama_linear': ('LlamaConfig', dict(SIZES, rope_parameters=dict(ROPE, rope_type='linear', factor=4.0))),
    'llama3': ('LlamaConfig', dict(
        SIZES, head_dim=32, rope_parameters=dict(
            rope_type='llama3', rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64))),
    'qwen2': ('Qwen2Config', dict(SIZES, rope_parameters=dict(ROPE, rope_theta=1e6))),
    'qwen2_tied': ('Qwen2Config', dict(SIZES, tie_word_embeddings=True)),
    'qwen2_windows': ('Qwen2Config', dict(SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    'qwen3': ('Qwen3Config', dict(SIZES, head_dim=16, tie_word_embeddings=True)),
    'qwen3_bias': ('Qwen3Config', dict(SIZES, head_dim=8, attention_bias=True)),
    'gpt2': ('GPT2Config', dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=192)),
    'gemma3': ('Gemma3TextConfig', dict(
        SIZES, num_hidden_layers=7, head_dim=16, sliding_window=9, query_pre_attn_scalar=24,
        final_logit_softcapping=4.0, rope_parameters=dict(
            full_attention=dict(rope_type='linear', rope_theta=1e6, factor=8.0),
            sliding_attention=dict(rope_type='default', rope_theta=1e4)))),
    'gemma3_plain': ('Gemma3TextConfig', dict(
        SIZES, num_hidden_layers=2, head_dim=8, sliding_window=4096, layer_types=['full_attention'] * 2)),
}


def torch_model(name, seed=0):
    """Returns a tiny model of `transformers`, every parameter random and far from its start."""
    import torch
    import transformers
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(torch_config(name), attn_implementation='eager').float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            shift = float('norm' in key and 'weight' in key and 'gemma' not in name or '.ln_' in key)
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.2) + shift)
    return model.eval()


def torch_logits(model, tokens):
    import torch
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def plain_logits(config, params, tokens):
    """Logits after every token, without a cache.  # [B, T, V]"""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    run = jax.jit(functools.partial(networks.reference_logits, config))
    return np.asarray(run(params, jnp.asarray(tokens), positions, transformer.causal_mask(tokens.shape[1])))


def ragged_logits(config, params, tokens, lengths, steps):
    """Logits after tokens lengths .. lengths + steps - 1 of each row, by prefill and cached steps.  # [B, steps, V]"""
    reference, rows = networks.reference(config), np.arange(len(tokens))
    lengths = np.asarray(lengths)
    prompt = np.where(np.arange(lengths.max())[None] < lengths[:, None], tokens[:, :lengths.max()], 7)
    cache = reference.init_cache(len(tokens), tokens.shape[1])
    prefill = jax.jit(reference.prefill, static_argnums=4)
    cache = prefill(params, jnp.asarray(prompt), jnp.asarray(lengths), cache, 0)
    step, found = jax.jit(reference.step), []
    for number in range(steps):
        place = lengths + number
        logits, cache = step(params, jnp.asarray(tokens[rows, place]), jnp.asarray(place), cache)
        found.append(np.asarray(logits))
    return np.stack(found, axis=1)


def check_logits(model, config, params, tokens, lengths, steps):
    """Asserts that logits are those of `model` to 1e-4, in one pass, and from prompts of `lengths` step by step."""
    expected = torch_logits(model, tokens)
    np.testing.assert_allclose(plain_logits(config, params, tokens), expected, atol=1e-4, rtol=0)
    got = ragged_logits(config, params, tokens, lengths, steps)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row], expected[row, length:length + steps], atol=1e-4, rtol=0)


def greedy(config, params, prompts, count):
    """The greedy continuations of prompts of any lengths, decoded in one batch.  # [B] lists of `count`"""
    reference = networks.reference(config)
    lengths = np.array([len(prompt) - 1 for prompt in prompts])  # the last one is the first to be fed
    padded = np.zeros((len(prompts), max(1, lengths.max())), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, :lengths[row]] = prompt[:-1]
    cache = reference.init_cache(len(prompts), padded.shape[1] + count + 1)
    cache = jax.jit(reference.prefill, static_argnums=4)(
        params, jnp.asarray(padded), jnp.asarray(lengths), cache, 0)
    token, found, step = np.array([prompt[-1] for prompt in prompts]), [], jax.jit(reference.step)
    for number in range(count):
        logits, cache = step(params, jnp.asarray(token), jnp.asarray(lengths + number), cache)
        token = np.argmax(np.asarray(logits), axis=-1)
        found.append(token)
    return np.stack(found, axis=1)


def check_greedy(model, config, params, prompts, count=64):
    """Asserts that continuations are those of `model`, but where its two best tokens are within 1e-3; counts those.

    The tokens are judged along our own continuation: after a split that is allowed, both would go on differently.
    """
    splits = 0
    for prompt, ours in zip(prompts, greedy(config, params, prompts, count), strict=True):
        expected = torch_logits(model, [[*prompt, *ours[:-1]]])[0, len(prompt) - 1:]
        two = np.sort(expected, axis=-1)[:, -2:]
        differ = np.flatnonzero(expected.argmax(axis=-1) != ours)
        assert np.all(two[differ, 1] - two[differ, 0] < 1e-3), (differ, two[differ])
        splits += len(differ)
    return splits


def save(name, path: Path, **options):
    """Writes a tiny model's folder and returns the model."""
    model = torch_model(name)
    model.save_pretrained(path, **options)
    return model
