"""Tokenizers of Hugging Face folders and of GGUF metadata: ids, BOS, ends, chat templates, and pairs of two."""
from __future__ import annotations

import functools
import json
import warnings

import pytest

from qsharp_jax.data import tokenizer_pairs, tokenizers
from tests import small_tokenizers
from tests.small_tokenizers import BOS, EOS, KINDS, trained, varied_texts, write

kinds = pytest.mark.parametrize('kind', KINDS)


def test_texts_are_many():
    assert len(set(varied_texts())) >= 200


@kinds
def test_text_survives(tmp_path, kind):
    tokenizer = tokenizers.from_folder(write(tmp_path, kind))
    for text in varied_texts():
        back = tokenizer.decode(tokenizer.encode(text))
        # Qwen composes characters first; a SentencePiece model has one mark for both, blank and its sign.
        normal = tokenizer.backend.normalizer.normalize_str(text) if tokenizer.backend.normalizer else text
        assert back == (text.replace('▁', ' ') if kind == 'gemma' else normal), text


@pytest.mark.parametrize('kind', small_tokenizers.GGUF_PRE)
def test_gguf_and_folder_are_one_tokenizer(tmp_path, kind):
    folder = tokenizers.from_folder(write(tmp_path, kind))
    gguf = tokenizers.from_gguf(small_tokenizers.gguf_metadata(kind, padding=9))
    assert gguf.vocab_size == folder.vocab_size
    assert gguf.bos_id == folder.bos_id
    assert gguf.bos_first == folder.bos_first == (kind == 'llama3')
    assert gguf.eos_ids >= folder.eos_ids
    for text in varied_texts():
        ids = folder.encode(text)
        assert gguf.encode(text) == ids, text
        assert gguf.encode_prompt(text) == folder.encode_prompt(text)
        assert gguf.decode(ids) == folder.decode(ids)
    if small_tokenizers.TEMPLATES[kind]:
        for chat in small_tokenizers.CHATS:
            assert gguf.encode_chat(chat) == folder.encode_chat(chat)


@kinds
def test_bos_comes_once(tmp_path, kind):
    tokenizer = tokenizers.from_folder(write(tmp_path, kind))
    first = kind in ('llama3', 'gemma')
    assert tokenizer.bos_first == first
    bos = tokenizer.bos_id
    for text in ('hello', '', f'{BOS.get(kind, "")}hello'):
        ids = tokenizer.encode_prompt(text)
        assert ids.count(bos) == (first or text.startswith('<|end'))
        assert tokenizer.encode(text) == tokenizer.encode_prompt(text)[first and not text.startswith('<'):]
    if small_tokenizers.TEMPLATES[kind]:
        ids = tokenizer.encode_chat(small_tokenizers.CHATS[2])
        assert (ids.count(bos), ids[:1] == [bos]) == ((1, True) if first else (0, False))


@pytest.mark.parametrize('ends', [None, 7, [3, 5]])
@pytest.mark.parametrize('kind', ['llama3', 'qwen2'])
def test_every_end_is_an_end(tmp_path, kind, ends):
    folder = write(tmp_path, kind, eos_ids=ends)
    (folder / 'config.json').write_text(json.dumps({'eos_token_id': [11]}))
    tokenizer = tokenizers.from_folder(folder)
    own = tokenizer.single_token(EOS[kind])
    listed = ends if isinstance(ends, list) else [11 if ends is None else ends]
    assert tokenizer.eos_ids == {own, *listed}


@pytest.mark.parametrize('place', ['jinja', 'config', 'named'])
@pytest.mark.parametrize('kind', ['llama3', 'qwen2', 'gemma'])
def test_templates_are_found_wherever_they_are(tmp_path, kind, place):
    tokenizer = tokenizers.from_folder(write(tmp_path, kind, template=place))
    text = tokenizer.render_chat(small_tokenizers.CHATS[2])
    assert {'llama3': 'user<|end_header_id|>\n\nc<|eot_id|>', 'qwen2': '<|im_start|>assistant\nb<|im_end|>\n',
            'gemma': '<start_of_turn>model\nb<end_of_turn>\n'}[kind] in text
    assert text.endswith({'llama3': '<|start_header_id|>assistant<|end_header_id|>\n\n',
                          'qwen2': '<|im_start|>assistant\n', 'gemma': '<start_of_turn>model\n'}[kind])


def test_prompts_are_the_same_every_day(tmp_path):
    text = tokenizers.from_folder(write(tmp_path, 'llama3')).render_chat(small_tokenizers.CHATS[0])
    assert 'Today Date: 26 Jul 2024' in text


def test_templates_may_refuse(tmp_path):
    with pytest.raises(ValueError, match='System role not supported'):
        tokenizers.from_folder(write(tmp_path, 'gemma')).render_chat(small_tokenizers.CHATS[1])


def test_broken_folders_are_refused(tmp_path):
    folder = write(tmp_path, 'qwen2')

    def refused(words):
        with pytest.raises(ValueError, match=words):
            tokenizers.from_folder(folder)

    config = json.loads((folder / 'tokenizer_config.json').read_text())
    (folder / 'tokenizer_config.json').write_text(json.dumps({**config, 'eos_token': '<none>'}))
    refused("names '<none>' as eos_token, and tokenizer.json has no such")
    (folder / 'tokenizer_config.json').write_text('{')
    refused('tokenizer_config.json is damaged')
    write(tmp_path, 'qwen2')
    (folder / 'chat_template.jinja').write_text('{% for %}')
    refused('chat template cannot be read')
    write(tmp_path, 'qwen2')
    content = json.loads(trained('llama3'))
    content['post_processor']['single'].append({'SpecialToken': {'id': '<|begin_of_text|>', 'type_id': 0}})
    write(tmp_path, 'llama3', content=json.dumps(content))
    refused('only BOS in front is supported')
    (folder / 'tokenizer.json').write_text('{}')
    refused('tokenizer.json is damaged')
    (folder / 'tokenizer.json').unlink()
    refused('has no tokenizer.json')


def test_limits_of_the_file_do_not_cut_prompts(tmp_path):
    content = json.loads(trained('qwen2'))
    content['truncation'] = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    content['padding'] = {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
                          'pad_type_id': 0, 'pad_token': '<|endoftext|>'}
    plain = tokenizers.from_folder(write(tmp_path / 'a', 'qwen2'))
    limited = tokenizers.from_folder(write(tmp_path / 'b', 'qwen2', content=json.dumps(content)))
    assert limited.encode('one two three four') == plain.encode('one two three four')
    assert limited.fingerprint == plain.fingerprint


# Pairs.

@functools.cache
def base(kind='llama3'):
    return json.loads(trained(kind))


def changed(tmp_path, change, kind='llama3'):
    """The pair of a tokenizer and of one whose content `change` has changed."""
    content = json.loads(trained(kind))
    change(content)
    return (tokenizers.from_folder(write(tmp_path / 'a', kind)),
            tokenizers.from_folder(write(tmp_path / 'b', kind, content=json.dumps(content))))


def rename(content, old, new):
    entry = next(entry for entry in content['added_tokens'] if entry['content'] == old)
    entry['content'] = new
    return entry['id']


def test_llama_3_beside_3_2_is_a_pair(tmp_path):
    """They differ in the names of reserved tokens, which nothing uses."""
    ids = {}

    def change(content):
        ids['reserved'] = rename(content, '<|reserved_special_token_0|>', '<|step_id|>')
        ids['pad'] = rename(content, '<|finetune_right_pad_id|>', '<|reserved_special_token_2|>')

    reference, value = changed(tmp_path, change)
    differences = tokenizer_pairs.compare(reference, value)
    assert differences == {ids['reserved']: ('<|reserved_special_token_0|>', '<|step_id|>'),
                           ids['pad']: ('<|finetune_right_pad_id|>', '<|reserved_special_token_2|>')}
    used = {*reference.eos_ids, *reference.encode_chat(small_tokenizers.CHATS[2])}
    tokenizer_pairs.check_used(differences, used, 'prompts hold')
    with pytest.warns(UserWarning, match=f"in 2 special tokens.*{ids['reserved']} .'<|reserved.*{ids['pad']} "):
        tokenizer_pairs.warn(differences)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tokenizer_pairs.warn(tokenizer_pairs.compare(reference, reference))


def test_special_tokens_that_are_used_must_be_the_same(tmp_path):
    reference, value = changed(tmp_path, lambda content: rename(content, '<|start_header_id|>', '<|other|>'))
    differences = tokenizer_pairs.compare(reference, value)
    tokenizer_pairs.check_used(differences, reference.eos_ids, 'ends an answer')
    place = reference.single_token('<|start_header_id|>')
    with pytest.raises(ValueError, match=rf"in id {place}, '<|start_header_id|>' and '<|other|>', which prompts"):
        tokenizer_pairs.check_used(differences, reference.encode_chat(small_tokenizers.CHATS[0]), 'prompts hold')


def test_ordinary_tokens_and_merges_must_be_the_same(tmp_path):
    def swap(content):
        vocab = content['model']['vocab']
        vocab['A'], vocab['B'] = vocab['B'], vocab['A']

    reference, value = changed(tmp_path, swap)
    first = min(base()['model']['vocab'][letter] for letter in 'AB')
    with pytest.raises(ValueError, match=f"differ in id {first}: 'A' and 'B'"):
        tokenizer_pairs.compare(reference, value)

    def reorder(content):
        merges = content['model']['merges']
        merges[3], merges[4] = merges[4], merges[3]

    with pytest.raises(ValueError, match='differ in merge 3: '):
        tokenizer_pairs.compare(*changed(tmp_path, reorder))
    with pytest.raises(ValueError, match=f"differ in merge {len(base()['model']['merges']) - 1}: .* and none"):
        tokenizer_pairs.compare(*changed(tmp_path, lambda content: content['model']['merges'].pop()))


def test_vocabularies_may_end_at_different_places_in_special_tokens_only(tmp_path):
    def drop(content):
        content['added_tokens'] = content['added_tokens'][:-1]

    reference, value = changed(tmp_path, drop)
    last = reference.vocab_size - 1
    assert tokenizer_pairs.compare(reference, value) == {last: ('<|reserved_special_token_1|>', None)}
    assert tokenizer_pairs.compare(value, reference) == {last: (None, '<|reserved_special_token_1|>')}


def test_merges_written_the_older_way_are_the_same(tmp_path):
    def older(content):
        content['model']['merges'] = [' '.join(merge) for merge in content['model']['merges']]

    assert tokenizer_pairs.compare(*changed(tmp_path, older)) == {}


@pytest.mark.parametrize('kind', small_tokenizers.GGUF_PRE)
def test_folder_and_gguf_of_one_model_are_a_pair(tmp_path, kind):
    folder = tokenizers.from_folder(write(tmp_path, kind))
    assert tokenizer_pairs.compare(folder, tokenizers.from_gguf(small_tokenizers.gguf_metadata(kind, padding=3))) == {}


def test_other_kinds_are_no_pair(tmp_path):
    reference = tokenizers.from_folder(write(tmp_path / 'a', 'llama3'))
    for other in (tokenizers.from_vocabulary(['a', 'b'], eos='b'),
                  tokenizers.from_folder(write(tmp_path / 'b', 'qwen2'))):
        for pair in ((reference, other), (other, reference)):
            with pytest.raises(ValueError, match='of reference and value.source (are of different kinds|differ in)'):
                tokenizer_pairs.compare(*pair)
