"""Small tokenizers of the published kinds, trained here: as folders, and as the metadata of a GGUF file."""
from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, Regex, Tokenizer, trainers

# As published: Llama 3's words, and Qwen's, which take digits one by one.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')

TEXT = """The quick brown fox jumps over the lazy dog. The answer is 42, and 3.14159 is not 22/7; 1000000 is 10^6.
def f(x):\n    return x ** 2 + 1\n\nfor item in range(10):\n\tprint(item, f(item))
Question: How many apples are there? Answer: there are twelve apples, I'll say. Don't ask again; we've seen it.
naïve café Straße Привет мир 東京 日本語のテキスト مرحبا بالعالم 안녕하세요 😀👍🏽 e\u0301 ½ ﬁ
"""

# Special tokens by kind, their template, the end tokens.
LLAMA3_TOKENS = ['<|begin_of_text|>', '<|end_of_text|>', '<|reserved_special_token_0|>', '<|finetune_right_pad_id|>',
                 '<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>', '<|eot_id|>', '<|reserved_special_token_1|>']
QWEN_TOKENS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<tool_call>', '</tool_call>']
GEMMA_TOKENS = ['<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>']

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- generation %}{{- '\\n' + message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GEMMA_TEMPLATE = """{{ bos_token }}{%- for message in messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- elif message['role'] == 'system' -%}{{ raise_exception("System role not supported") }}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
TEMPLATES = {'llama3': LLAMA3_TEMPLATE, 'qwen2': QWEN_TEMPLATE, 'smollm': None, 'gpt2': None, 'gemma': GEMMA_TEMPLATE}
BOS = {'llama3': '<|begin_of_text|>', 'gemma': '<bos>', 'gpt2': '<|endoftext|>'}
EOS = {'llama3': '<|eot_id|>', 'qwen2': '<|im_end|>', 'smollm': '<|im_end|>', 'gpt2': '<|endoftext|>', 'gemma': '<eos>'}
GGUF_PRE = {'llama3': 'llama-bpe', 'qwen2': 'qwen2', 'smollm': 'smollm', 'gpt2': 'gpt-2'}
KINDS = tuple(TEMPLATES)


def _split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def trained(kind: str) -> str:
    """The tokenizer.json of a small tokenizer."""
    special = {'llama3': LLAMA3_TOKENS, 'gemma': GEMMA_TOKENS, 'gpt2': ['<|endoftext|>']}.get(kind, QWEN_TOKENS)
    backend = Tokenizer(models.BPE(ignore_merges=kind == 'llama3'))
    if kind == 'gemma':
        backend = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Replace(' ', '▁')
        backend.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
        backend.decoder = decoders.Sequence(
            [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [f'<0x{byte:02X}>' for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + alphabet, show_progress=False)
    else:
        backend.pre_tokenizer = {
            'llama3': lambda: _split(LLAMA3), 'qwen2': lambda: _split(QWEN),
            'smollm': lambda: pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]),
            'gpt2': lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)}[kind]()
        backend.decoder = decoders.ByteLevel()
        if kind == 'qwen2':
            backend.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([TEXT] * 3, trainer)
    if kind == 'llama3':  # whose vocabulary has words that no merge leads to
        content = json.loads(backend.to_str())
        content['model']['vocab']['Ġunmergeable'] = len(content['model']['vocab'])
        backend = Tokenizer.from_str(json.dumps(content))
    if kind == 'gemma':  # trained as special, published as ordinary ones
        content = json.loads(backend.to_str())
        content['added_tokens'] = [entry for entry in content['added_tokens'] if not entry['content'].startswith('<0x')]
        backend = Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special
                                if 'tool_call' not in token])
    backend.add_tokens([AddedToken(token, normalized=False) for token in special if 'tool_call' in token])
    if kind in ('llama3', 'gemma'):
        bos = BOS[kind]
        backend.post_processor = processors.TemplateProcessing(
            single=f'{bos} $A', pair=f'{bos} $A {bos} $B', special_tokens=[(bos, backend.token_to_id(bos))])
    return backend.to_str()


def write(folder: Path, kind: str, *, template='jinja', eos_ids=None, tokenizer_class='PreTrainedTokenizerFast',
          content=None) -> Path:
    """Writes the tokenizer's files to a folder and returns it.

    Args:
      folder: made when missing.
      kind: one of KINDS.
      template: 'jinja' for a file of its own, 'config' for one in tokenizer_config.json, 'named' for a list there.
      eos_ids: of generation_config.json; None for no such file.
      tokenizer_class: which class transformers takes for it.
      content: of tokenizer.json, where it is changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.json').write_text(content or trained(kind), encoding='utf-8')
    config = {'tokenizer_class': tokenizer_class, 'eos_token': EOS[kind], 'clean_up_tokenization_spaces': False}
    if kind in BOS:
        config['bos_token'] = {'content': BOS[kind], '__type': 'AddedToken', 'special': True}
    text = TEMPLATES[kind]
    if text is not None and template == 'jinja':
        (folder / 'chat_template.jinja').write_text(text, encoding='utf-8')
    elif text is not None:
        config['chat_template'] = text if template == 'config' else [
            {'name': 'tool_use', 'template': 'other'}, {'name': 'default', 'template': text}]
    (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    if eos_ids is not None:
        (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': eos_ids}))
    return folder


def gguf_metadata(kind: str, padding: int = 0) -> dict:
    """The same tokenizer as GGUF files write it, with `padding` unused tokens at its end."""
    content = json.loads(trained(kind))
    tokens = {index: (text, 1) for text, index in content['model']['vocab'].items()}
    tokens |= {entry['id']: (entry['content'], 3 if entry['special'] else 4) for entry in content['added_tokens']}
    listed = [tokens[index] for index in range(len(tokens))]
    listed += [(f'[PAD{len(listed) + number}]', 5) for number in range(padding)]
    ids = {text: index for index, (text, _) in enumerate(listed)}
    metadata = {
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': GGUF_PRE[kind],
        'tokenizer.ggml.tokens': [text for text, _ in listed],
        'tokenizer.ggml.token_type': [kind for _, kind in listed],
        'tokenizer.ggml.merges': [' '.join(merge) for merge in content['model']['merges']],
        'tokenizer.ggml.eos_token_id': ids[EOS[kind]]}
    if kind in BOS:
        metadata['tokenizer.ggml.bos_token_id'] = ids[BOS[kind]]
    if TEMPLATES[kind] is not None:
        metadata['tokenizer.chat_template'] = TEMPLATES[kind]
    return metadata


def varied_texts() -> list[str]:
    """More than two hundred texts: scripts, white space, digits, special tokens, emoji, things that compose."""
    rng = np.random.default_rng(0)
    alphabet = list('abcXYZ 019.,;:!?\'"()[]{}<>|/\\\n\t-_=+*&^%$#@~`éßñ東京😀\u00a0\u200b\u3000\ufeff')
    words = [
        'hello', ' world', ' unmergeable', "don't", "I'LL", "we'VE", '12345', '3.14159', '1,000,000', '٣٤٥', 'Ⅳ²½',
        '1st', 'def f(x):\n    return x', 'naïve', '   ', '\r\n', '\n\n\n', '\t\t', ' \n ', 'Straße', 'Привет', 'مرحبا',
        '日本語', '안녕하세요', 'ไทย', 'हिन्दी', '👩‍👩‍👧', '👍🏽', '🇩🇪', 'e\u0301', 'ﬁ', '\u1e9b\u0323', '\u0000', '\x7f', '…—“”',
        'https://example.org/a?b=c&d=%20', '<|im_start|>', '<|im_end|>\n', '<|endoftext|>', '<|eot_id|>',
        '<|begin_of_text|>', '<tool_call>', '<bos>', '<start_of_turn>user', '<|im_sta', '<0x41>', '▁', 'Ġ', '',
        '<|start_header_id|>user<|end_header_id|>\n\nhi']
    texts = list(words)
    texts += [''.join(rng.choice(alphabet, size=rng.integers(1, 30))) for _ in range(100)]
    texts += [' '.join(rng.choice(words, size=rng.integers(1, 8))) for _ in range(60)]
    texts += [' ' * count + 'x' + '\n' * count + '7' * count for count in range(12)]
    return texts


CHATS = [
    [{'role': 'user', 'content': 'Hi'}],
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' 1 + 1 =\n'}],
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c\n\n'}],
    [{'role': 'user', 'content': '日本語 😀 12345'}, {'role': 'assistant', 'content': '<|im_end|> quoted'},
     {'role': 'user', 'content': "  don't\t"}, {'role': 'assistant', 'content': 'x' * 40},
     {'role': 'user', 'content': ''}],
]
